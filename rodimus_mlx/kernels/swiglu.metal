// out = silu(gate) * value.
//
// Inputs   x [R, 2F]: value | gate
// Outputs  out [R, F]
// Template F: a multiple of 4
// Grid     (F / 4 / threads, R, 1), rounded up; one thread four features

const uint f = 4 * (group.x * threads + tid);
if (f < uint(F)) {
  const size_t row = size_t(group.y) * F;
  float value[4];
  float gate[4];
  load4(x + 2 * row + f, value);
  load4(x + 2 * row + F + f, gate);
  for (int e = 0; e < 4; e++) {
    value[e] *= silu(gate[e]);
  }
  store4(out + row + f, value);
}
