// Gates, decays, and all of a chunk that is not D wide, so that the rest of the recurrence is matrix products.
//
// With a_t the decay of a token, per key feature n:
//   A[t, s] = sum_n q_t k_s a_(s+1) ... a_t  for s <= t, 0 above      q_decayed[t] = q_t a_0 ... a_t
//   k_decayed[s] = k_s a_(s+1) ... a_(C-1)                            total = a_0 ... a_(C-1)
// Products of decays, never quotients or differences of logs: exact at any decay.
//
// Inputs   qkgt [B, T, 4N]: q | k | g | t before their gates    gate_bias [2N]: of g | t    norm_floor [1] float
//          marks [B, T] uint8 (with MARKS): 0 padding, which leaves the state, 1 token, 2 first of a document
// Outputs  A [B, chunks, C, C]   q_decayed, k_decayed [B, chunks, C, N]   total [B, chunks, N], all float
// Template C: tokens a chunk, a multiple of 8   N: key features   MARKS
// Grid     (chunks, B, 1) of 4 C threads: four threads a token s, each every fourth key feature, while t moves on

constexpr int TILE = 8;  // tokens whose gates are worked out together, one for each of the first eight simdgroups
constexpr int EACH = (N + 3) / 4;
TG_ARRAY(float, q_tile, TILE * N);
TG_ARRAY(float, k_tile, TILE * N);
TG_ARRAY(float, a_tile, TILE * N);

const size_t length = uint(qkgt_shape[1]);
const size_t chunk = size_t(group.y) * group_count.x + group.x;
const uint s = tid / 4;
const uint part = tid % 4;
float k[EACH];  // k_s, decayed as t moves on
for (int j = 0; j < EACH; j++) {
  k[j] = 0.0f;
}
float product = 1.0f;  // of the decays from the chunk's start; thread n keeps key feature n's, N <= 4 C threads

for (uint tile = 0; tile < uint(C); tile += TILE) {
  TG_BARRIER();
  for (uint i = simd_id; i < uint(TILE); i += threads / 32) {
    const size_t t = group.x * C + tile + i;
    const size_t token = size_t(group.y) * length + t;
    const bool exists = t < length;
    const uint mark = exists ? (MARKS ? uint(marks[token]) : 1u) : 0u;
    gate_token<N>(
        qkgt + token * (4 * N), gate_bias + 0, norm_floor[0], exists, mark, lane,
        q_tile + i * N, k_tile + i * N, a_tile + i * N);
  }
  TG_BARRIER();
  if (tid < uint(N)) {
    for (uint i = 0; i < uint(TILE); i++) {
      product *= a_tile[i * N + tid];
      q_decayed[(chunk * C + tile + i) * N + tid] = q_tile[i * N + tid] * product;
    }
  }
  for (uint i = 0; i < uint(TILE); i++) {
    const uint t = tile + i;
    float dot = 0.0f;
    for (int j = 0; j < EACH; j++) {
      const uint n = 4 * j + part;
      if (n < uint(N)) {
        k[j] = s == t ? k_tile[i * N + n] : k[j] * a_tile[i * N + n];  // 0 as long as t < s
        dot += q_tile[i * N + n] * k[j];
      }
    }
    dot += simd_shuffle_xor(dot, 1);
    dot += simd_shuffle_xor(dot, 2);
    if (part == 0) {
      A[(chunk * C + t) * C + s] = dot;
    }
  }
}
for (int j = 0; j < EACH; j++) {
  const uint n = 4 * j + part;
  if (n < uint(N)) {
    k_decayed[(chunk * C + s) * N + n] = k[j];
  }
}
if (tid < uint(N)) {
  total[chunk * N + tid] = product;
}
