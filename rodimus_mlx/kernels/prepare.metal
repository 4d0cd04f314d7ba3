// Gates, decays, and all of a chunk that is not D wide, so that the rest of the recurrence is matrix products.
//
// With a_t the decay of a token, per key feature:
//   A[t, s] = sum_n q_t k_s a_(s+1) ... a_t  for s <= t, 0 above      q_decayed[t] = q_t a_0 ... a_t
//   k_decayed[s] = k_s a_(s+1) ... a_(C-1)                            total = a_0 ... a_(C-1)
// Products of decays, never quotients or differences of logs: exact at any decay.
//
// Inputs   qkgt [B, T, 4N]: q | k | g | tau before their gates    gate_bias [2N]: of g | tau    norm_floor [1] float
//          marks [B, T] uint8 (with MARKS): 0 padding, which leaves the state, 1 token, 2 first of a document
// Outputs  A [B, chunks, C, C]   q_decayed, k_decayed [B, chunks, C, N]   total [B, chunks, N], all float
// Template C: tokens a chunk, a multiple of 8   TILE: of them in threadgroup memory at once   N: key features   MARKS
// Grid     (chunks, B, 1) of 4 C threads: four threads a token s, each every fourth key feature, while t moves on

constexpr int EACH = (N + 3) / 4;
TG_ARRAY(float, q_tile, TILE * N);
TG_ARRAY(float, a_tile, TILE * N);

const size_t length = uint(qkgt_shape[1]);
const size_t chunk = size_t(group.y) * group_count.x + group.x;
const uint s = tid / 4;
const uint part = tid % 4;
const size_t position = size_t(group.x) * C + s;
const size_t token = size_t(group.y) * length + position;
const bool exists = position < length;
const uint mark = exists ? (MARKS ? uint(marks[token]) : 1u) : 0u;
float q[EACH];
float k[EACH];  // k_s, decayed as t moves on
float a[EACH];
gate_quarter<N>(qkgt + token * (4 * N), gate_bias + 0, norm_floor[0], exists, mark, part, q, k, a);

constexpr int COLUMNS = (N + 4 * C - 1) / (4 * C);
float product[COLUMNS];  // of the decays from the chunk's start: a thread keeps key feature tid, tid + 4 C, ...
for (int j = 0; j < COLUMNS; j++) {
  product[j] = 1.0f;
}
for (uint tile = 0; tile < uint(C); tile += TILE) {
  TG_BARRIER();
  if (s >= tile && s < tile + TILE) {
    for (int j = 0; j < EACH; j++) {
      const uint n = 4 * j + part;
      if (n < uint(N)) {
        q_tile[(s - tile) * N + n] = q[j];
        a_tile[(s - tile) * N + n] = a[j];
      }
    }
  }
  TG_BARRIER();
  for (int j = 0; j < COLUMNS; j++) {
    const uint n = tid + j * 4 * C;
    for (uint i = 0; n < uint(N) && i < uint(TILE); i++) {
      product[j] *= a_tile[i * N + n];
      q_decayed[(chunk * C + tile + i) * N + n] = q_tile[i * N + n] * product[j];
    }
  }
  const uint first = s / 8 * 8;  // of the tokens that the simdgroup holds
  for (uint i = 0; i < uint(TILE); i++) {
    const uint t = tile + i;
    float dot = 0.0f;
    if (t >= first) {
      for (int j = 0; j < EACH; j++) {
        const uint n = 4 * j + part;
        if (n < uint(N)) {
          k[j] = t > s ? k[j] * a_tile[i * N + n] : k[j];
          dot += q_tile[i * N + n] * k[j];
        }
      }
      dot += simd_shuffle_xor(dot, 1);
      dot += simd_shuffle_xor(dot, 2);
    }
    if (part == 0) {
      A[(chunk * C + t) * C + s] = t >= s ? dot : 0.0f;
    }
  }
}
for (int j = 0; j < EACH; j++) {
  const uint n = 4 * j + part;
  if (n < uint(N)) {
    k_decayed[(chunk * C + s) * N + n] = k[j];
  }
}
for (int j = 0; j < COLUMNS; j++) {
  const uint n = tid + j * 4 * C;
  if (n < uint(N)) {
    total[chunk * N + n] = product[j];
  }
}
