// total = h + delta (with ADD; kept with KEEP) and normed = total / rms(total) * weight, row by row.
//
// Inputs   h [R, D]   delta [R, D] (with ADD)   weight [D]   eps [1] float
// Outputs  total [R, D] of h's type H (with KEEP, else [1])   normed [R, D] of type T
// Template H   T   D   WIDTH: threads   ADD   KEEP
// Grid     (R, 1, 1) of WIDTH threads

constexpr int EACH = (D + WIDTH - 1) / WIDTH;
TG_ARRAY(float, square, 32);
const size_t row = size_t(group.x) * D;
float x[EACH];
float sum = 0.0f;
for (int i = 0; i < EACH; i++) {
  const uint d = tid + i * WIDTH;
  x[i] = 0.0f;
  if (d < uint(D)) {
    x[i] = static_cast<float>(h[row + d]);
    if (ADD) {
      x[i] += static_cast<float>(delta[row + d]);
    }
    if (KEEP) {
      total[row + d] = static_cast<H>(x[i]);
    }
  }
  sum += x[i] * x[i];
}
if (!KEEP && tid == 0 && group.x == 0) {
  total[0] = static_cast<H>(0.0f);
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
    normed[row + d] = static_cast<T>(x[i] * scale * static_cast<float>(weight[d]));
  }
}
