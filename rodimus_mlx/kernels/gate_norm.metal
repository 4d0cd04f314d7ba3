// out = rmsnorm((o + residual_weight * c) * silu(z)) * weight, row by row.
//
// Inputs   o [R, D]   c [R, D]   xz [R, 2D]: x | z   residual_weight [D]   weight [D]   eps [1] float
// Outputs  out [R, D]
// Template D: a multiple of 4   WIDTH: threads
// Grid     (R, 1, 1) of WIDTH threads

constexpr int FOURS = (D / 4 + WIDTH - 1) / WIDTH;
TG_ARRAY(float, square, 32);
const size_t row = size_t(group.x) * D;
float y[4 * FOURS];
float sum = 0.0f;
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  for (int e = 0; e < 4; e++) {
    y[4 * i + e] = 0.0f;
  }
  if (d < uint(D)) {
    float residual[4];
    float w[4];
    float z[4];
    load4(o + row + d, y + 4 * i);
    load4(c + row + d, residual);
    load4(residual_weight + d, w);
    load4(xz + 2 * row + D + d, z);
    for (int e = 0; e < 4; e++) {
      y[4 * i + e] = (y[4 * i + e] + w[e] * residual[e]) * silu(z[e]);
    }
  }
  for (int e = 0; e < 4; e++) {
    sum += y[4 * i + e] * y[4 * i + e];
  }
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
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  if (d < uint(D)) {
    float w[4];
    load4(weight + d, w);
    for (int e = 0; e < 4; e++) {
      w[e] *= y[4 * i + e] * scale;
    }
    store4(out + row + d, w);
  }
}
