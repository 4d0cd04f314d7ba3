// Functions that the kernels share. Templates on P take any pointer: device or constant, any float type.

FN float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

FN float silu(float x) { return x / (1.0f + expf(-x)); }

FN float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// What a token's mark says of it; marks are made in recurrence.py.
FN bool is_padding(uint mark) { return mark == 0; }
FN bool is_start(uint mark) { return mark == 2; }

// One token's q / sqrt(N), gated key, and decay, by a whole simdgroup: lane l works on key features l, l + 32, ...
// at: the token's row of qkgt [4N]: q | k | g | t. mark 0 also for tokens past the end, whose row is not read.
template <int N, typename P, typename Q>
FN void gate_token(
    P at, Q gate_bias, float norm_floor, bool exists, uint mark, uint lane,
    THREADGROUP float* q_row, THREADGROUP float* k_row, THREADGROUP float* a_row) {
  constexpr int LANES = (N + 31) / 32;
  float keys[LANES];
  float squares = 0.0f;
  for (int l = 0; l < LANES; l++) {
    const uint n = lane + 32 * l;
    keys[l] = (exists && n < uint(N)) ? static_cast<float>(at[N + n]) : 0.0f;
    squares += keys[l] * keys[l];
  }
  const float norm = fmaxf(sqrtf(simd_sum(squares)), norm_floor);
  for (int l = 0; l < LANES; l++) {
    const uint n = lane + 32 * l;
    if (n < uint(N)) {
      q_row[n] = exists ? static_cast<float>(at[n]) * rsqrtf(float(N)) : 0.0f;
      if (is_padding(mark)) {
        k_row[n] = 0.0f;
        a_row[n] = 1.0f;
      } else {
        const float g = softplus(static_cast<float>(at[2 * N + n]) + static_cast<float>(gate_bias[n]));
        const float tau = sigmoid(static_cast<float>(at[3 * N + n]) + static_cast<float>(gate_bias[N + n]));
        k_row[n] = keys[l] / norm * powf(g, tau);
        a_row[n] = is_start(mark) ? 0.0f : expf(-g * tau);
      }
    }
  }
}
