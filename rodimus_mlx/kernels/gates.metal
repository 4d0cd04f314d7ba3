// Functions that the kernels share. Templates on P take any pointer: device or constant, any float type.

FN float sigmoid(float x) { return 1.0f / (1.0f + expf(-x)); }

// Of activations, not of decays, whose errors add up: in the time of their loads and stores.
FN float sigmoid_fast(float x) { return divide_fast(1.0f, 1.0f + exp_fast(-x)); }

FN float silu(float x) { return divide_fast(x, 1.0f + exp_fast(-x)); }

FN float softplus(float x) { return fmaxf(x, 0.0f) + log1pf(expf(-fabsf(x))); }

// x to the y, x >= 0: a third of powf's time, and as good where y log x is small.
FN float power(float x, float y) { return expf(y * logf(fmaxf(x, 1e-37f))); }

// What a token's mark says of it; see rodimus_mlx/marks.py.
FN bool is_padding(uint mark) { return mark == 0; }
FN bool is_start(uint mark) { return mark == 2; }

// The gates of one key feature: from k / |k| and the projections g and tau with their biases to the gated key and decay.
FN void select(float unit_key, float g_in, float tau_in, uint mark, THREAD float& key, THREAD float& decay) {
  const float g = softplus(g_in);
  const float tau = sigmoid(tau_in);
  key = is_padding(mark) ? 0.0f : unit_key * power(g, tau);
  decay = is_padding(mark) ? 1.0f : (is_start(mark) ? 0.0f : expf(-g * tau));
}

// A sum over PARTS neighbouring threads, for each of them.
template <int PARTS>
FN float sum_parts(float x) {
  for (int step = 1; step < PARTS; step *= 2) {
    x += simd_shuffle_xor(x, step);
  }
  return x;
}

// One token's q / sqrt(N), gated key and decay, by PARTS neighbouring threads: thread `part` gets features part,
// part + PARTS, ...
// at: the token's row of qkgt [4N]: q | k | g | tau. Tokens past the end, whose row is not read, are padding.
template <int N, int PARTS, typename P, typename Q>
FN void gate_part(
    P at, Q gate_bias, float norm_floor, bool exists, uint mark, uint part,
    THREAD float* q, THREAD float* k, THREAD float* a) {
  constexpr int EACH = (N + PARTS - 1) / PARTS;
  float squares = 0.0f;
  for (int j = 0; j < EACH; j++) {
    const uint n = PARTS * j + part;
    const bool read = exists && n < uint(N);
    q[j] = read ? static_cast<float>(at[n]) * rsqrtf(float(N)) : 0.0f;
    k[j] = read ? static_cast<float>(at[N + n]) : 0.0f;
    a[j] = 1.0f;
    squares += k[j] * k[j];
  }
  const float scale = rsqrtf(fmaxf(sum_parts<PARTS>(squares), norm_floor * norm_floor));
  for (int j = 0; j < EACH; j++) {
    const uint n = PARTS * j + part;
    if (exists && n < uint(N)) {
      const float g = static_cast<float>(at[2 * N + n]) + static_cast<float>(gate_bias[n]);
      const float tau = static_cast<float>(at[3 * N + n]) + static_cast<float>(gate_bias[N + n]);
      select(k[j] * scale, g, tau, mark, k[j], a[j]);
    }
  }
}

// Where an element of a matrix COLUMNS wide lies, row by row or in squares of 16 x 16.
template <bool TILED, int COLUMNS>
FN uint place(uint row, uint column) {
  return TILED ? (row / 16 * (COLUMNS / 16) + column / 16) * 256 + row % 16 * 16 + column % 16 : row * COLUMNS + column;
}
