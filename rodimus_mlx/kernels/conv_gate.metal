// c = silu(conv(x) + bias) and v = sigmoid(u + value_bias) * x for a block of tokens, and the convolution's next tail.
//
// Inputs   xz [B, T, 2D]: x | z     u [B, T, D]   value_bias [D]   tail [B, K - 1, D]: the inputs before x
//          expand [D, R] (with R): makes u of what is given for it then, [B, T, R]
//          weight [D, K]   bias [D]   marks [B, T] uint8 (with MARKS): 0 padding, 1 token, 2 first of a document
// Outputs  c [B, T, D] and next_tail [B, K - 1, D] of x's type   v [B, T, D] float or x's type
// Template D: a multiple of 4   K: taps   BLOCK: tokens a thread   R: a multiple of 4, or 0   MARKS
// Grid     (D / 4 / threads, T / BLOCK, B), rounded up; one thread four features

const uint d = 4 * (group.x * threads + tid);
if (d < uint(D)) {
  const int length = int(xz_shape[1]);
  const size_t row = size_t(group.z) * length;
  const int begin = int(group.y) * BLOCK;
  float window[(BLOCK + K - 1) * 4];  // the inputs from K - 1 before the block through its end
  load_inputs<D, K, BLOCK + K - 1, MARKS>(
      xz + row * (2 * D) + d, tail + size_t(group.z) * (K - 1) * D + d, marks + row, begin, length, window);
  float gate[4 * BLOCK];  // all loads come before the first store, which the compiler may not move them over
  UNROLL
  for (int i = 0; i < BLOCK; i++) {
    if (begin + i < length && R == 0) {
      load4(u + (row + begin + i) * D + d, gate + 4 * i);
    } else if (begin + i < length) {
      gate[4 * i] = gate[4 * i + 1] = gate[4 * i + 2] = gate[4 * i + 3] = 0.0f;
      for (int r = 0; r < R; r += 4) {
        float low[4];
        load4(u + (row + begin + i) * R + r, low);
        for (int e = 0; e < 4; e++) {
          float part[4];
          load4(expand + (d + e) * R + r, part);
          gate[4 * i + e] += part[0] * low[0] + part[1] * low[1] + part[2] * low[2] + part[3] * low[3];
        }
      }
    }
  }
  float taps[4 * K];
  float shift[4];
  float value_shift[4];
  load4(bias + d, shift);
  load4(value_bias + d, value_shift);
  for (int i = 0; i < K; i++) {
    load4(weight + d * K + 4 * i, taps + 4 * i);
  }
  int age = age_before<K, MARKS>(marks + row, begin, length);
  UNROLL
  for (int i = 0; i < BLOCK; i++) {
    const int t = begin + i;
    if (t < length) {
      age = MARKS && is_start(marks[row + t]) ? 0 : age + 1;
      float sum[4];
      for (int e = 0; e < 4; e++) {
        sum[e] = silu(convolve<K, MARKS>(taps + e * K, window + 4 * i + e, shift[e], age));
        gate[4 * i + e] = sigmoid_fast(gate[4 * i + e] + value_shift[e]) * window[4 * (i + K - 1) + e];
      }
      store4(c + (row + t) * D + d, sum);
      store4(v + (row + t) * D + d, gate + 4 * i);
    }
    if (t == length - 1) {
      for (int before = 0; before < K - 1; before++) {
        store4(next_tail + (size_t(group.z) * (K - 1) + before) * D + d, window + 4 * (i + 1 + before));
      }
    }
  }
}
