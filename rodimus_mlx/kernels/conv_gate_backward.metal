// The gradients of conv_gate.metal's c = silu(conv(x) + bias) and v = sigmoid(u + value_bias) * x in x and u.
//
// Inputs   xz [B, T, 2D]: x | z     u [B, T, D]   value_bias [D]   tail [B, K - 1, D]: the inputs before x
//          weight [D, K]   bias [D]   marks [B, T] uint8 (with MARKS): 0 padding, 1 token, 2 first of a document
//          d_c, d_v [B, T, D]
// Outputs  d_x [B, T, D] of x's type   d_u [B, T, D] of u's type
// Template D: a multiple of 4   K: taps   BLOCK: tokens a thread   MARKS
// Grid     (D / 4 / threads, T / BLOCK, B), rounded up; one thread four features

constexpr int SPAN = BLOCK + K - 1;  // a token's input is met by the taps of the K - 1 tokens behind it as well
const uint d = 4 * (group.x * threads + tid);
if (d < uint(D)) {
  const int length = int(xz_shape[1]);
  const size_t row = size_t(group.z) * length;
  const int begin = int(group.y) * BLOCK;
  float window[(SPAN + K - 1) * 4];  // the inputs from K - 1 before the block through the end of its span
  load_inputs<D, K, SPAN + K - 1, MARKS>(
      xz + row * (2 * D) + d, tail + size_t(group.z) * (K - 1) * D + d, marks + row, begin, length, window);
  float d_sum[4 * SPAN];  // of what silu takes
  UNROLL
  for (int i = 0; i < SPAN; i++) {
    if (begin + i < length) {
      load4(d_c + (row + begin + i) * D + d, d_sum + 4 * i);
    } else {
      d_sum[4 * i] = d_sum[4 * i + 1] = d_sum[4 * i + 2] = d_sum[4 * i + 3] = 0.0f;
    }
  }
  float gate[4 * BLOCK];
  float d_value[4 * BLOCK];
  UNROLL
  for (int i = 0; i < BLOCK; i++) {
    if (begin + i < length) {
      load4(u + (row + begin + i) * D + d, gate + 4 * i);
      load4(d_v + (row + begin + i) * D + d, d_value + 4 * i);
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
  for (int i = 0; i < SPAN; i++) {
    age = MARKS && begin + i < length && is_start(marks[row + begin + i]) ? 0 : age + 1;
    for (int e = 0; e < 4; e++) {
      const float sum = convolve<K, MARKS>(taps + e * K, window + 4 * i + e, shift[e], age);
      const float s = sigmoid_fast(sum);
      d_sum[4 * i + e] *= s * (1.0f + sum * (1.0f - s));
    }
  }
  UNROLL
  for (int i = 0; i < BLOCK; i++) {
    const int t = begin + i;
    if (t < length) {
      float d_input[4] = {0.0f, 0.0f, 0.0f, 0.0f};
      bool met = !MARKS || !is_padding(marks[row + t]);
      for (int later = 0; later < K; later++) {
        met = met && (!MARKS || later == 0 || t + later >= length || !is_start(marks[row + t + later]));
        for (int e = 0; e < 4; e++) {
          d_input[e] += met ? taps[e * K + K - 1 - later] * d_sum[4 * (i + later) + e] : 0.0f;
        }
      }
      float d_gate[4];
      for (int e = 0; e < 4; e++) {
        const float s = sigmoid_fast(gate[4 * i + e] + value_shift[e]);
        d_input[e] += (!MARKS || !is_padding(marks[row + t])) ? d_value[4 * i + e] * s : 0.0f;
        d_gate[e] = d_value[4 * i + e] * window[4 * (i + K - 1) + e] * s * (1.0f - s);
      }
      store4(d_x + (row + t) * D + d, d_input);
      store4(d_u + (row + t) * D + d, d_gate);
    }
  }
}
