// What conv_gate.metal and conv_gate_backward.metal share, for one thread's four features. xz, tail and marks point to
// the thread's row, and in it to its features; `begin` is the first token of its block.

// COUNT inputs from K - 1 tokens before `begin` on; 0 for padding and past the end.
template <int D, int K, int COUNT, bool MARKS, typename X, typename T, typename M>
FN void load_inputs(X xz, T tail, M marks, int begin, int length, THREAD float* window) {
  UNROLL
  for (int i = 0; i < COUNT; i++) {
    const int t = begin + i - (K - 1);
    if (t < 0) {
      load4(tail + (t + K - 1) * D, window + 4 * i);
    } else if (t < length && (!MARKS || !is_padding(marks[t]))) {
      load4(xz + size_t(t) * (2 * D), window + 4 * i);
    } else {
      window[4 * i] = window[4 * i + 1] = window[4 * i + 2] = window[4 * i + 3] = 0.0f;
    }
  }
}

// Tokens since the document's start at the token before `begin`, as far as the taps reach.
template <int K, bool MARKS, typename M>
FN int age_before(M marks, int begin, int length) {
  int age = K;
  if (MARKS) {
    for (int i = K - 1; i > 0; i--) {
      age = begin - i >= 0 && begin - i < length && is_start(marks[begin - i]) ? 0 : age + 1;
    }
  }
  return age;
}

// One feature's sum at a token of that age, whose first tap meets window[0].
template <int K, bool MARKS>
FN float convolve(const THREAD float* taps, const THREAD float* window, float shift, int age) {
  float sum = shift;
  for (int tap = 0; tap < K; tap++) {
    sum += (!MARKS || K - 1 - tap <= age) ? taps[tap] * window[4 * tap] : 0.0f;
  }
  return sum;
}
