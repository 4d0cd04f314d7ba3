// The gradient of add_norm.metal's total = h + delta and normed = total / rms(total) * weight in the total, row by row.
//
// Inputs   h [R, D]: with KEEP the total itself   delta [R, D] (with ADD)   weight [D]   eps [1] float
//          d_normed [R, D]   d_total [R, D] (with KEEP)
// Outputs  d_h [R, D] of h's type   d_delta [R, D] (with BOTH, else [1]): the same of delta's type DELTA
// Template DELTA   D: a multiple of 4   WIDTH: threads   ADD   KEEP   BOTH
// Grid     (R, 1, 1) of WIDTH threads

constexpr int FOURS = (D / 4 + WIDTH - 1) / WIDTH;
TG_ARRAY(float, squares, 32);
TG_ARRAY(float, products, 32);
const size_t row = size_t(group.x) * D;
float x[4 * FOURS];
float unit[4 * FOURS];  // the gradient of total / rms(total)
float kept[4 * FOURS];  // what the total's other use gives it
float square = 0.0f;
float product = 0.0f;
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  if (d < uint(D)) {
    float more[4];
    float w[4];
    load4(h + row + d, x + 4 * i);
    load4(d_normed + row + d, unit + 4 * i);
    if (ADD) {
      load4(delta + row + d, more);
    }
    if (KEEP) {  // before the barrier, so as not to wait twice
      load4(d_total + row + d, kept + 4 * i);
    }
    load4(weight + d, w);
    for (int e = 0; e < 4; e++) {
      x[4 * i + e] += ADD ? more[e] : 0.0f;
      unit[4 * i + e] *= w[e];
      square += x[4 * i + e] * x[4 * i + e];
      product += x[4 * i + e] * unit[4 * i + e];
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
if (!BOTH && tid == 0 && group.x == 0) {
  d_delta[0] = static_cast<DELTA>(0.0f);
}
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  if (d < uint(D)) {
    for (int e = 0; e < 4; e++) {
      x[4 * i + e] = scale * (unit[4 * i + e] - back * x[4 * i + e]) + (KEEP ? kept[4 * i + e] : 0.0f);
    }
    store4(d_h + row + d, x + 4 * i);
    if (BOTH) {
      store4(d_delta + row + d, x + 4 * i);
    }
  }
}
