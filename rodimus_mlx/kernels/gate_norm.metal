// out = rmsnorm((o + residual_weight * c) * silu(z)) * weight, row by row.
//
// Inputs   o [R, D]   c [R, D]   xz [R, 2D]: x | z   residual_weight [D]   weight [D]   eps [1] float
// Outputs  out [R, D] of type T
// Template T   D   WIDTH: threads
// Grid     (R, 1, 1) of WIDTH threads

constexpr int EACH = (D + WIDTH - 1) / WIDTH;
TG_ARRAY(float, square, 32);
const size_t row = size_t(group.x) * D;
float y[EACH];
float sum = 0.0f;
for (int i = 0; i < EACH; i++) {
  const uint d = tid + i * WIDTH;
  y[i] = 0.0f;
  if (d < uint(D)) {
    y[i] = static_cast<float>(o[row + d]) + static_cast<float>(residual_weight[d]) * static_cast<float>(c[row + d]);
    y[i] *= silu(static_cast<float>(xz[2 * row + D + d]));
  }
  sum += y[i] * y[i];
}
sum = simd_sum(sum);
if (lane == 0) {
  square[simd_id] = sum;
}
TG_BARRIER();
float mean = 0.0f;
for (int i = 0; i < WIDTH / 32; i++) {
  mean += square[i];
}
const float scale = rsqrtf(mean / D + eps[0]);
for (int i = 0; i < EACH; i++) {
  const uint d = tid + i * WIDTH;
  if (d < uint(D)) {
    out[row + d] = static_cast<T>(y[i] * scale * static_cast<float>(weight[d]));
  }
}
