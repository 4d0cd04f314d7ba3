// The recurrence for one token or a few, from the projections to the gated output, state in registers throughout.
//
// Inputs   qkgt [B, T, 4N]: q | k | g | t before their gates    gate_bias [2N]: of g | t    norm_floor [1] float
//          v [B, T, D]   c [B, T, D]   xz [B, T, 2D]: x | z   residual_weight [D]   state [B, N, D] float
//          marks [B, T] uint8 (with MARKS): 0 padding, which leaves the state
// Outputs  y [B, T, D] float: (o + residual_weight * c) * silu(z)    next_state [B, N, D] float
// Template N: key features, at most 256   D: value features   MARKS
// Grid     (D / 32, 1, B) of 256 threads, rounded up: a lane a value feature, a simdgroup every eighth key feature

constexpr int SLICES = 8;
constexpr int ROWS = (N + SLICES - 1) / SLICES;
TG_ARRAY(float, q_row, N);
TG_ARRAY(float, k_row, N);
TG_ARRAY(float, decay_row, N);
TG_ARRAY(float, square, SLICES);
TG_ARRAY(float, partial, 256);

const uint length = uint(qkgt_shape[1]);
const uint column = group.x * 32 + lane;
const bool inside = column < uint(D);
const size_t batch = group.z;
float s[ROWS];
for (int r = 0; r < ROWS; r++) {
  const uint row = simd_id + r * SLICES;
  s[r] = (inside && row < uint(N)) ? state[(batch * N + row) * D + column] : 0.0f;
}
for (uint t = 0; t < length; t++) {
  const size_t token = batch * length + t;
  const size_t at = token * (4 * N) + tid;  // thread n sees to key feature n's gates; N <= 256
  const float key = tid < uint(N) ? static_cast<float>(qkgt[at + N]) : 0.0f;
  const float squares = simd_sum(key * key);
  if (lane == 0) {
    square[simd_id] = squares;
  }
  TG_BARRIER();
  if (tid < uint(N)) {
    float sum = 0.0f;
    for (int i = 0; i < SLICES; i++) {
      sum += square[i];
    }
    const float g = static_cast<float>(qkgt[at + 2 * N]) + static_cast<float>(gate_bias[tid]);
    const float tau = static_cast<float>(qkgt[at + 3 * N]) + static_cast<float>(gate_bias[N + tid]);
    const float unit_key = key * rsqrtf(fmaxf(sum, norm_floor[0] * norm_floor[0]));
    float gated = 0.0f;
    float decay = 0.0f;
    select(unit_key, g, tau, MARKS ? uint(marks[token]) : 1u, gated, decay);
    q_row[tid] = static_cast<float>(qkgt[at]) * rsqrtf(float(N));
    k_row[tid] = gated;
    decay_row[tid] = decay;
  }
  TG_BARRIER();
  const size_t value = token * D + column;
  const float vt = inside ? static_cast<float>(v[value]) : 0.0f;
  float o = 0.0f;
  for (int r = 0; r < ROWS; r++) {
    const uint row = simd_id + r * SLICES;
    if (row < uint(N)) {
      s[r] = decay_row[row] * s[r] + k_row[row] * vt;
      o += q_row[row] * s[r];
    }
  }
  partial[tid] = o;
  TG_BARRIER();
  if (simd_id == 0 && inside) {
    float sum = 0.0f;
    for (int i = 0; i < SLICES; i++) {
      sum += partial[lane + 32 * i];
    }
    sum += static_cast<float>(residual_weight[column]) * static_cast<float>(c[value]);
    y[value] = sum * silu(static_cast<float>(xz[token * (2 * D) + D + column]));
  }
}
for (int r = 0; r < ROWS; r++) {
  const uint row = simd_id + r * SLICES;
  if (inside && row < uint(N)) {
    next_state[(batch * N + row) * D + column] = s[r];
  }
}
