// The gradients of gate_norm.metal's out = y / rms(y) * weight, y = (o + residual_weight * c) * silu(z), row by row.
//
// Inputs   o [R, D]   c [R, D]   xz [R, 2D]: x | z   residual_weight [D]   weight [D]   eps [1] float   d_out [R, D]
// Outputs  d_o, d_c, d_z [R, D] of their types
// Template D: a multiple of 4   WIDTH: threads
// Grid     (R, 1, 1) of WIDTH threads

constexpr int FOURS = (D / 4 + WIDTH - 1) / WIDTH;
TG_ARRAY(float, squares, 32);
TG_ARRAY(float, products, 32);
const size_t row = size_t(group.x) * D;
float sum[4 * FOURS];   // o + residual_weight * c
float z[4 * FOURS];
float unit[4 * FOURS];  // the gradient of y / rms(y)
float square = 0.0f;
float product = 0.0f;
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  if (d < uint(D)) {
    float residual[4];
    float w[4];
    float w_norm[4];
    load4(o + row + d, sum + 4 * i);
    load4(c + row + d, residual);
    load4(xz + 2 * row + D + d, z + 4 * i);
    load4(d_out + row + d, unit + 4 * i);
    load4(residual_weight + d, w);
    load4(weight + d, w_norm);
    for (int e = 0; e < 4; e++) {
      sum[4 * i + e] += w[e] * residual[e];
      unit[4 * i + e] *= w_norm[e];
      const float y = sum[4 * i + e] * silu(z[4 * i + e]);
      square += y * y;
      product += y * unit[4 * i + e];
    }
  }
}
square = simd_sum(square);
product = simd_sum(product);
if (lane == 0) {
  squares[simd_id] = square;
  products[simd_id] = product;
}
TG_BARRIER();
square = 0.0f;
product = 0.0f;
for (int i = 0; i < WIDTH / 32; i++) {
  square += squares[i];
  product += products[i];
}
const float scale = rsqrtf(square / D + eps[0]);
const float back = scale * scale * product / D;
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  if (d < uint(D)) {
    float w[4];
    float d_gate[4];
    load4(residual_weight + d, w);
    for (int e = 0; e < 4; e++) {
      const float s = sigmoid_fast(z[4 * i + e]);
      const float gate = z[4 * i + e] * s;
      const float d_y = scale * (unit[4 * i + e] - back * sum[4 * i + e] * gate);
      d_gate[e] = d_y * sum[4 * i + e] * s * (1.0f + z[4 * i + e] * (1.0f - s));
      unit[4 * i + e] = d_y * gate;
      w[e] *= unit[4 * i + e];
    }
    store4(d_o + row + d, unit + 4 * i);
    store4(d_c + row + d, w);
    store4(d_z + row + d, d_gate);
  }
}
