// Gates, decays, and all of a chunk that is not D wide, so that the rest of the recurrence is matrix products.
//
// With a_t the decay of a token, per key feature:
//   A[t, s] = sum_n q_t k_s a_(s+1) ... a_t  for s <= t, 0 above      q_decayed[t] = q_t a_0 ... a_t
//   k_decayed[s] = k_s a_(s+1) ... a_(C-1)                            total = a_0 ... a_(C-1)
// Products of decays, never quotients or differences of logs: exact at any decay.
//
// Inputs   qkgt [B, T, 4N]: q | k | g | tau before their gates    gate_bias [2N]: of g | tau    norm_floor [1] float
//          marks [B, T] uint8 (with MARKS): 0 padding, which leaves the state, 1 token, 2 first of a document
// Outputs  A [B, chunks, C, C]   q_decayed [B, chunks, C, N]   k_decayed [B, chunks, N, C]   total [B, chunks, N], all
//          float
//          with TILED, each of A, q_decayed and k_decayed in squares of 16 x 16, row by row in and of squares
// Template C: tokens a chunk   S: tokens s a threadgroup, which divide TILE, which divides C
//          TILE: tokens t in threadgroup memory at once   PARTS: threads a token, of a simdgroup   N: key features   MARKS
//          TILED: C and N are multiples of 16
// Grid     (C / S, chunks, B) of PARTS S threads: each keeps a token s and every PARTS-th key feature, while t moves on

constexpr int EACH = (N + PARTS - 1) / PARTS;
constexpr int TOGETHER = 4;
constexpr int COLUMNS = (N + PARTS * S - 1) / (PARTS * S);
TG_ARRAY(float, q_tile, TILE * N);
TG_ARRAY(float, a_tile, TILE * N);

const size_t length = uint(qkgt_shape[1]);
const size_t chunk = size_t(group.z) * group_count.y + group.y;
const uint first = group.x * S;  // of the threadgroup's tokens
const uint s = first + tid / PARTS;
const uint part = tid % PARTS;
float q[EACH];
float k[EACH];
float a[EACH];
float key[EACH];  // k_s, decayed as t moves on
float product[COLUMNS];  // of the decays from the chunk's start: a thread keeps key feature tid, tid + PARTS S, ...
for (int j = 0; j < EACH; j++) {
  key[j] = 0.0f;
}
for (int j = 0; j < COLUMNS; j++) {
  product[j] = 1.0f;
}

// the first threadgroup also makes q_decayed and total, so it goes through all tiles; the others start at their own
for (uint tile = first / TILE * TILE; tile < uint(C); tile += TILE) {
  TG_BARRIER();
  for (uint i = tid / PARTS; i < uint(TILE); i += S) {
    const size_t position = size_t(group.y) * C + tile + i;
    const size_t token = size_t(group.z) * length + position;
    const bool exists = position < length;
    const uint mark = exists ? (MARKS ? uint(marks[token]) : 1u) : 0u;
    gate_part<N, PARTS>(qkgt + token * (4 * N), gate_bias + 0, norm_floor[0], exists, mark, part, q, k, a);
    for (int j = 0; j < EACH; j++) {
      const uint n = PARTS * j + part;
      if (n < uint(N)) {
        q_tile[i * N + n] = q[j];
        a_tile[i * N + n] = a[j];
        key[j] = tile + i == s ? k[j] : key[j];
      }
    }
  }
  TG_BARRIER();
  if (first == 0) {
    for (int j = 0; j < COLUMNS; j++) {
      const uint n = tid + j * PARTS * S;
      for (uint i = 0; n < uint(N) && i < uint(TILE); i++) {
        product[j] *= a_tile[i * N + n];
        q_decayed[chunk * (C * N) + place<TILED, N>(tile + i, n)] = q_tile[i * N + n] * product[j];
      }
    }
  }
  for (uint i = first > tile ? first - tile : 0; i < uint(TILE); i += TOGETHER) {
    float dot[TOGETHER];  // together, so that their sums over threads overlap
    for (uint e = 0; e < uint(TOGETHER); e++) {
      dot[e] = 0.0f;
      for (int j = 0; j < EACH; j++) {
        const uint n = PARTS * j + part;
        if (n < uint(N)) {
          key[j] = tile + i + e > s ? key[j] * a_tile[(i + e) * N + n] : key[j];
          dot[e] += q_tile[(i + e) * N + n] * key[j];
        }
      }
    }
    for (uint e = 0; e < uint(TOGETHER); e++) {
      dot[e] = sum_parts<PARTS>(dot[e]);
    }
    for (uint e = 0; e < uint(TOGETHER); e++) {
      const uint t = tile + i + e;
      if (part == e) {
        A[chunk * (C * C) + place<TILED, C>(t, s)] = t >= s ? dot[e] : 0.0f;
      }
    }
  }
}
for (uint t = tid / PARTS; t < first; t += S) {  // above the threadgroup's first token
  for (uint i = part; i < uint(S); i += PARTS) {
    A[chunk * (C * C) + place<TILED, C>(t, first + i)] = 0.0f;
  }
}
for (int j = 0; j < EACH; j++) {
  const uint n = PARTS * j + part;
  if (n < uint(N)) {
    k_decayed[chunk * (C * N) + place<TILED, C>(n, s)] = key[j];
  }
}
if (first == 0) {
  for (int j = 0; j < COLUMNS; j++) {
    const uint n = tid + j * PARTS * S;
    if (n < uint(N)) {
      total[chunk * N + n] = product[j];
    }
  }
}
