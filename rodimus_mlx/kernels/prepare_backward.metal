// Gradients of prepare: from those of A, q_decayed, k_decayed and total to those of the projections.
//
// Two sweeps over the chunk's pairs s < t: in the first a thread keeps s while t moves on and gathers d_k; in the second
// it keeps t while s moves back and gathers d_q. The gradient of log a_r is the sum over the pairs that straddle r,
// which is sum_(t >= r) (q_t dq_t - k_t dk_t) over the pairs s < t alone: with the diagonal left out, nothing large
// cancels.
//
// Inputs   qkgt [B, T, 4N]   gate_bias [2N]   norm_floor [1] float   marks [B, T] uint8 (with MARKS)
//          d_A [B, chunks, C, C]   d_q_decayed, d_k_decayed [B, chunks, C, N]   d_total [B, chunks, N],
//          of log total: float
// Outputs  d_qkgt [B, T, 4N] float
// Template C: tokens a chunk   TILE: of them in threadgroup memory at once, which divide C
//          PARTS: threads a token, of a simdgroup   N: key features   MARKS
// Grid     (chunks, B, 1) of PARTS C threads: each keeps a token and every PARTS-th key feature

constexpr int EACH = (N + PARTS - 1) / PARTS;
constexpr int TOGETHER = 4;  // pairs whose loads overlap
constexpr int ROOM = 2 * TILE * N > C * N ? 2 * TILE * N : C * N;
TG_ARRAY(float, room, ROOM);  // first a tile of q or k and one of a, then sums over the chunk

const size_t length = uint(qkgt_shape[1]);
const size_t chunk = size_t(group.y) * group_count.x + group.x;
const uint own = tid / PARTS;  // the thread's token
const uint part = tid % PARTS;
const size_t position = size_t(group.x) * C + own;
const size_t token = size_t(group.y) * length + position;
const bool exists = position < length;
const uint mark = exists ? (MARKS ? uint(marks[token]) : 1u) : 0u;
float q[EACH];  // q / sqrt(N), the gated key and the decay of the thread's token
float k[EACH];
float a[EACH];
float d_q[EACH];
float d_k[EACH];
float d_log[EACH];  // of log a
float straddle[EACH];
float decay[EACH];  // first from own to the sweep's token, then from the sweep's token to own
gate_part<N, PARTS>(qkgt + token * (4 * N), gate_bias + 0, norm_floor[0], exists, mark, part, q, k, a);
for (int j = 0; j < EACH; j++) {
  d_q[j] = d_k[j] = d_log[j] = straddle[j] = 0.0f;
}

for (uint sweep = 0; sweep < 2; sweep++) {
  const bool forward = sweep == 0;
  for (int j = 0; j < EACH; j++) {
    decay[j] = forward ? 1.0f : a[j];
  }
  for (uint step = 0; step < uint(C); step += TILE) {
    const uint tile = forward ? step : C - TILE - step;
    TG_BARRIER();
    if (own >= tile && own < tile + TILE) {
      for (int j = 0; j < EACH; j++) {
        const uint n = PARTS * j + part;
        if (n < uint(N)) {
          room[(own - tile) * N + n] = forward ? q[j] : k[j];
          room[(TILE + own - tile) * N + n] = a[j];
        }
      }
    }
    TG_BARRIER();
    for (uint turn = 0; turn < uint(TILE); turn += TOGETHER) {
      float d_pair[TOGETHER];
      for (uint e = 0; e < uint(TOGETHER); e++) {
        const uint other = tile + (forward ? turn + e : TILE - 1 - turn - e);
        const size_t pair = forward ? other * C + own : own * C + other;
        d_pair[e] = (forward ? other > own : other < own) ? d_A[chunk * C * C + pair] : 0.0f;
      }
      for (uint e = 0; e < uint(TOGETHER); e++) {
        const uint i = forward ? turn + e : TILE - 1 - turn - e;
        if (forward ? tile + i > own : tile + i < own) {
          for (int j = 0; j < EACH; j++) {
            const uint n = PARTS * j + part;
            if (n < uint(N)) {
              const float theirs = d_pair[e] * room[i * N + n];
              const float a_other = room[(TILE + i) * N + n];
              if (forward) {
                decay[j] *= a_other;
                d_k[j] += theirs * decay[j];
              } else {
                d_q[j] += theirs * decay[j];
                decay[j] *= a_other;
              }
            }
          }
        }
      }
    }
  }
  TG_BARRIER();
  // decay now spans from after own to the chunk's end, or from the chunk's start through own
  for (int j = 0; j < EACH; j++) {
    const uint n = PARTS * j + part;
    if (n < uint(N)) {
      const size_t at = (chunk * C + own) * N + n;
      if (forward) {
        const float from_end = d_k_decayed[at] * decay[j];
        straddle[j] = -k[j] * d_k[j];
        room[own * N + n] = k[j] * from_end;
        d_k[j] += from_end;
      } else {
        d_q[j] += d_q_decayed[at] * decay[j];
        room[own * N + n] = straddle[j] + q[j] * d_q[j];
      }
    }
  }
  TG_BARRIER();
  for (uint n = tid; n < uint(N); n += threads) {  // k_decayed[s] holds the decays after s; all else sums over t >= r
    float sum = 0.0f;
    for (uint step = 0; step < uint(C); step++) {
      const uint at = (forward ? step : C - 1 - step) * N + n;
      const float term = room[at];
      room[at] = forward ? sum : sum + term;
      sum += term;
    }
  }
  TG_BARRIER();
  for (int j = 0; j < EACH; j++) {
    const uint n = PARTS * j + part;
    if (n < uint(N)) {
      d_log[j] = forward ? room[own * N + n] : d_log[j] + room[own * N + n];
    }
  }
}

const float d_self = d_A[(chunk * C + own) * C + own];
float squares = 0.0f;
float along = 0.0f;  // of d_key along the key
for (int j = 0; j < EACH; j++) {
  const uint n = PARTS * j + part;
  if (n < uint(N) && exists) {
    const float key = static_cast<float>(qkgt[token * (4 * N) + N + n]);
    squares += key * key;
    d_q[j] += d_self * k[j];
    d_k[j] += d_self * q[j];
  }
}
squares = sum_parts<PARTS>(squares);
const float norm = fmaxf(sqrtf(squares), norm_floor[0]);
for (int j = 0; j < EACH; j++) {
  const uint n = PARTS * j + part;
  if (n < uint(N) && exists) {
    const size_t at = token * (4 * N) + n;
    const float x = static_cast<float>(qkgt[at + 2 * N]) + static_cast<float>(gate_bias[n]);
    const float g = fmaxf(softplus(x), 1e-37f);  // where it underflows its log must not be infinite
    const float tau = sigmoid(static_cast<float>(qkgt[at + 3 * N]) + static_cast<float>(gate_bias[n + N]));
    const float input_gate = power(g, tau);
    const float unit = static_cast<float>(qkgt[at + N]) / norm;
    const float d_gate = is_padding(mark) ? 0.0f : d_k[j] * unit * input_gate;  // of log(input gate)
    const float total = d_total[chunk * N + n];
    const float d_decay = is_padding(mark) || is_start(mark) ? 0.0f : d_log[j] + total;  // of log a = -g tau
    d_qkgt[at] = d_q[j] * rsqrtf(float(N));
    d_qkgt[at + 2 * N] = (d_gate * tau / g - d_decay * tau) * sigmoid(x);
    d_qkgt[at + 3 * N] = (d_gate * logf(g) - d_decay * g) * tau * (1.0f - tau);
    d_k[j] = is_padding(mark) ? 0.0f : d_k[j] * input_gate;  // of the unit key
    along += d_k[j] * unit;
  }
}
along = sum_parts<PARTS>(along);
if (sqrtf(squares) <= norm_floor[0]) {
  along = 0.0f;  // a key under the floor is divided by a constant
}
for (int j = 0; j < EACH; j++) {
  const uint n = PARTS * j + part;
  if (n < uint(N) && exists) {
    const float unit = static_cast<float>(qkgt[token * (4 * N) + N + n]) / norm;
    d_qkgt[token * (4 * N) + N + n] = (d_k[j] - unit * along) / norm;
  }
}
