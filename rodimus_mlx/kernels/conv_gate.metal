// c = silu(conv(x) + bias) and v = sigmoid(u) * x for a block of tokens, and the convolution's next tail.
//
// Inputs   xz [B, T, 2D]: x | z     u [B, T, D]     tail [B, K - 1, D]: the inputs before x
//          weight [D, K]   bias [D]   marks [B, T] uint8 (with MARKS): 0 padding, 1 token, 2 first of a document
// Outputs  c [B, T, D] and next_tail [B, K - 1, D] of type T   v [B, T, D] float
// Template T: type of the values   D   K: taps   BLOCK: tokens a thread   MARKS
// Grid     (D / threads, T / BLOCK, B), rounded up; one thread a feature

const uint d = group.x * threads + tid;
const int length = int(xz_shape[1]);
if (d < uint(D)) {
  const size_t row = size_t(group.z) * length;
  const int begin = int(group.y) * BLOCK;
  const int end = begin + BLOCK < length ? begin + BLOCK : length;
  float taps[K];
  float window[K];  // window[K - 1] is the current input
  for (int i = 0; i < K; i++) {
    taps[i] = static_cast<float>(weight[d * K + i]);
    const int at = begin - (K - 1) + i - 1;  // shifted by one: the loop below moves the window first
    float x = 0.0f;
    if (i > 0) {
      if (at >= 0) {
        const bool real = !MARKS || !is_padding(marks[row + at]);
        x = real ? static_cast<float>(xz[(row + at) * (2 * D) + d]) : 0.0f;
      } else {
        x = static_cast<float>(tail[(size_t(group.z) * (K - 1) + (at + K - 1)) * D + d]);
      }
    }
    window[i] = x;
  }
  int age = K;  // tokens since the document's start, as far as the taps reach
  if (MARKS) {
    for (int i = 1; i < K; i++) {
      const int at = begin - i;
      if (at >= 0 && age == K && is_start(marks[row + at])) {
        age = i - 1;
      }
    }
  }
  const float shift = static_cast<float>(bias[d]);
  for (int t = begin; t < end; t++) {
    const uint mark = MARKS ? uint(marks[row + t]) : 1u;
    const float x = is_padding(mark) ? 0.0f : static_cast<float>(xz[(row + t) * (2 * D) + d]);
    for (int i = 0; i < K - 1; i++) {
      window[i] = window[i + 1];
    }
    window[K - 1] = x;
    age = is_start(mark) ? 0 : age + 1;
    float sum = shift;
    for (int i = 0; i < K; i++) {
      sum += (!MARKS || K - 1 - i <= age) ? taps[i] * window[i] : 0.0f;
    }
    const size_t out = (row + t) * D + d;
    c[out] = static_cast<T>(silu(sum));
    v[out] = sigmoid(static_cast<float>(u[out])) * x;
  }
  if (end == length) {
    for (int i = 0; i < K - 1; i++) {
      next_tail[(size_t(group.z) * (K - 1) + i) * D + d] = static_cast<T>(window[i + 1]);
    }
  }
}
