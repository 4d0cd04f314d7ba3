// out = silu(gate) * value.
//
// Inputs   x [R, 2F]: value | gate
// Outputs  out [R, F] of type T
// Template T   F
// Grid     (F / threads, R, 1), rounded up

const uint f = group.x * threads + tid;
if (f < uint(F)) {
  const size_t row = size_t(group.y) * (2 * F);
  out[size_t(group.y) * F + f] = static_cast<T>(silu(static_cast<float>(x[row + F + f])) * static_cast<float>(x[row + f]));
}
