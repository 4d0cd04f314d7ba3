// total = h + delta (with ADD; kept with KEEP) and normed = total / rms(total) * weight, row by row.
//
// Inputs   h [R, D]   delta [R, D] (with ADD)   weight [D]   eps [1] float
// Outputs  total [R, D] of h's type H (with KEEP, else [1])   normed [R, D] of the weight's type
// Template H   D: a multiple of 4   WIDTH: threads   ADD   KEEP
// Grid     (R, 1, 1) of WIDTH threads

constexpr int FOURS = (D / 4 + WIDTH - 1) / WIDTH;
TG_ARRAY(float, square, 32);
const size_t row = size_t(group.x) * D;
float x[4 * FOURS];
float sum = 0.0f;
for (int i = 0; i < FOURS; i++) {
  const uint d = 4 * (tid + i * WIDTH);
  for (int e = 0; e < 4; e++) {
    x[4 * i + e] = 0.0f;
  }
  if (d < uint(D)) {
    load4(h + row + d, x + 4 * i);
    if (ADD) {
      float more[4];
      load4(delta + row + d, more);
      for (int e = 0; e < 4; e++) {
        x[4 * i + e] += more[e];
      }
    }
  }
  for (int e = 0; e < 4; e++) {
    sum += x[4 * i + e] * x[4 * i + e];
  }
}
if (!KEEP && tid == 0 && group.x == 0) {
  total[0] = static_cast<H>(0.0f);
}
for (int i = 0; KEEP && i < FOURS; i++) {  // after all loads, which the compiler may not move over a store
  const uint d = 4 * (tid + i * WIDTH);
  if (d < uint(D)) {
    store4(total + row + d, x + 4 * i);
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
      w[e] *= x[4 * i + e] * scale;
    }
    store4(normed + row + d, w);
  }
}
