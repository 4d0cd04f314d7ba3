// The gradient of swiglu.metal's out = silu(gate) * value.
//
// Inputs   x [R, 2F]: value | gate   d_out [R, F]
// Outputs  d_x [R, 2F] of x's type
// Template F: a multiple of 4
// Grid     (R F / 4 / threads, 1, 1), rounded up; one thread four features

const uint rows = uint(x_shape[0]);
const uint item = group.x * threads + tid;
const uint row = item / (F / 4);
const uint f = 4 * (item % (F / 4));
if (row < rows) {
  const size_t start = size_t(row) * F;
  float value[4];
  float gate[4];
  float d[4];
  load4(x + 2 * start + f, value);
  load4(x + 2 * start + F + f, gate);
  load4(d_out + start + f, d);
  for (int e = 0; e < 4; e++) {
    const float s = sigmoid_fast(gate[e]);
    const float d_silu = d[e] * value[e];
    value[e] = d[e] * gate[e] * s;
    gate[e] = d_silu * s * (1.0f + gate[e] * (1.0f - s));
  }
  store4(d_x + 2 * start + f, value);
  store4(d_x + 2 * start + F + f, gate);
}
