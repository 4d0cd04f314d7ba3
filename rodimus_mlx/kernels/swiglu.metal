// out = silu(gate) * value.
//
// Inputs   x [R, 2F]: value | gate
// Outputs  out [R, F]
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
  load4(x + 2 * start + f, value);
  load4(x + 2 * start + F + f, gate);
  for (int e = 0; e < 4; e++) {
    value[e] *= silu(gate[e]);
  }
  store4(out + start + f, value);
}
