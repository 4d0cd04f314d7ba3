// The recurrence over the D-wide values, chunk after chunk, from what prepare makes of each:
//
//   o = A v + q_decayed S        S <- total S + k_decayed v
//
// Products on the matrix units. S stays in registers, in float32; the simdgroups that make o get it through threadgroup
// memory, a chunk later. k_decayed is multiplied in two parts where the units round it, so S is as exact as in float32:
// v, of 16 bits, needs no rounding.
//
// Inputs   A [B, chunks, C, C]   q_decayed [B, chunks, C, N]   k_decayed [B, chunks, N, C]   total [B, chunks, N]
//          (the first three in squares of 16 x 16, as prepare makes them)   state [B, N, D], all float
//          v [B, T, D], float16 or bfloat16
// Outputs  o [B, T, D] in the type of v   after [B, N, D] float
// Template T: of v   C: tokens a chunk   N: key features, both multiples of 16   D   W: columns of a threadgroup, a
//          multiple of 8 that divides D   FRESH: state is zeros, and not read
// Grid     (D / W, 1, B) of C / 16 simdgroups, each for 16 rows of o, and N / 16, each for 16 rows of S

constexpr int BLOCKS = W / 8;
constexpr int V_STRIDE = C + 12;  // columns apart in threadgroup memory, such that loads and stores meet many banks
constexpr int S_STRIDE = N + 4;
constexpr int QUADS = C * W / 4;
constexpr int SIMDGROUPS = (C + N) / 16;
constexpr int FETCHES = (QUADS + 32 * SIMDGROUPS - 1) / (32 * SIMDGROUPS);
TG_ARRAY(T, values, 2 * W * V_STRIDE);
TG_ARRAY(float, states, 2 * W * S_STRIDE);

const uint length = uint(v_shape[1]);
const uint chunks = uint(total_shape[1]);
const uint column = group.x * W;
const bool makes_o = simd_id < uint(C / 16);
const uint m = 16 * (makes_o ? simd_id : simd_id - C / 16);  // the first of the simdgroup's rows
const auto v_row = v + size_t(group.z) * length * D + column;
const auto a_row = A + size_t(group.z) * chunks * C * C + m * C;
const auto q_row = q_decayed + size_t(group.z) * chunks * C * N + m * N;
const auto k_row = k_decayed + size_t(group.z) * chunks * C * N + m * C;
const auto total_row = total + size_t(group.z) * chunks * N + m;

Four<T> ahead[FETCHES];  // v of the next chunk
Left a[C / 16];          // A, or k_decayed
Left q[N / 16];
Sum sum[BLOCKS];
float decay[2];  // of a lane's two rows of S

// what the first chunk needs; from then on everything is loaded a chunk before it is used
UNROLL
for (int i = 0; i < FETCHES; i++) {
  const uint quad = tid + i * threads;
  const uint t = quad / (W / 4);
  if (quad < uint(QUADS)) {
    if (t < length) {
      ahead[i] = fetch4(v_row + size_t(t) * D + quad % (W / 4) * 4);
    }
    UNROLL
    for (int j = 0; j < 4; j++) {
      values[(quad % (W / 4) * 4 + j) * V_STRIDE + t] = t < length ? ahead[i].x[j] : static_cast<T>(0.0f);
    }
  }
}
if (makes_o) {
  UNROLL
  for (int k = 0; k < C / 16; k++) {
    load_left(a[k], a_row + 256 * k, 16, lane);
  }
  UNROLL
  for (int k = 0; k < N / 16; k++) {
    load_left(q[k], q_row + 256 * k, 16, lane);
  }
} else {
  UNROLL
  for (int k = 0; k < C / 16; k++) {
    load_left(a[k], k_row + 256 * k, 16, lane);
  }
  const auto state_row = state + (size_t(group.z) * N + m) * D + column;
  UNROLL
  for (int b = 0; b < BLOCKS; b++) {
    UNROLL
    for (int i = 0; i < 4; i++) {
      sum[b].x[i] = FRESH ? 0.0f : state_row[size_t(sum_row(lane, i)) * D + 8 * b + sum_column(lane, i)];
      states[(8 * b + sum_column(lane, i)) * S_STRIDE + m + sum_row(lane, i)] = matrix_rounded(sum[b].x[i]);
    }
  }
  decay[0] = total_row[sum_row(lane, 0)];
  decay[1] = total_row[sum_row(lane, 2)];
}
TG_BARRIER();

for (uint chunk = 0; chunk < chunks; chunk++) {
  const uint now = chunk % 2;
  const uint next = chunk + 1 < chunks ? chunk + 1 : chunk;
  const auto v_now = values + now * W * V_STRIDE;
  const auto s_now = states + now * W * S_STRIDE;
  Right right[BLOCKS];
  UNROLL
  for (int i = 0; i < FETCHES; i++) {
    const uint quad = tid + i * threads;
    const uint t = next * C + quad / (W / 4);
    if (quad < uint(QUADS) && t < length) {
      ahead[i] = fetch4(v_row + size_t(t) * D + quad % (W / 4) * 4);
    }
  }
  if (makes_o) {
    UNROLL
    for (int b = 0; b < BLOCKS; b++) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        sum[b].x[i] = 0.0f;
      }
    }
    UNROLL
    for (int k = 0; k < C / 16; k++) {
      if (uint(16 * k) <= m) {  // A is 0 above its diagonal
        UNROLL
        for (int i = 0; i < 8; i++) {
          a[k].x[i] = matrix_rounded(a[k].x[i]);
        }
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
          load_right(right[b], v_now + 8 * b * V_STRIDE + 16 * k, V_STRIDE, lane);
        }
        UNROLL
        for (int i = 0; i < 2 * BLOCKS; i++) {
          multiply(sum[i % BLOCKS], a[k], right[i % BLOCKS], i / BLOCKS);
        }
        load_left(a[k], a_row + size_t(next) * (C * C) + 256 * k, 16, lane);
      }
    }
    UNROLL
    for (int k = 0; k < N / 16; k++) {
      UNROLL
      for (int i = 0; i < 8; i++) {
        q[k].x[i] = matrix_rounded(q[k].x[i]);
      }
      UNROLL
      for (int b = 0; b < BLOCKS; b++) {
        load_right(right[b], s_now + 8 * b * S_STRIDE + 16 * k, S_STRIDE, lane);
      }
      UNROLL
      for (int i = 0; i < 2 * BLOCKS; i++) {
        multiply(sum[i % BLOCKS], q[k], right[i % BLOCKS], i / BLOCKS);
      }
      load_left(q[k], q_row + size_t(next) * (C * N) + 256 * k, 16, lane);
    }
    UNROLL
    for (int i = 0; i < 4; i += 2) {
      const uint t = chunk * C + m + sum_row(lane, i);
      if (t < length) {
        const auto o_row = o + (size_t(group.z) * length + t) * D + column + sum_column(lane, i);
        UNROLL
        for (int b = 0; b < BLOCKS; b++) {
          store2(o_row + 8 * b, sum[b].x[i], sum[b].x[i + 1]);
        }
      }
    }
  } else {
    UNROLL
    for (int b = 0; b < BLOCKS; b++) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        sum[b].x[i] *= decay[i / 2];
      }
    }
    decay[0] = total_row[size_t(next) * N + sum_row(lane, 0)];
    decay[1] = total_row[size_t(next) * N + sum_row(lane, 2)];
    UNROLL
    for (int k = 0; k < C / 16; k++) {
      Left rest;
      UNROLL
      for (int i = 0; i < 8; i++) {
        rest.x[i] = matrix_rest(a[k].x[i]);
        a[k].x[i] = matrix_rounded(a[k].x[i]);
      }
      UNROLL
      for (int b = 0; b < BLOCKS; b++) {
        load_right(right[b], v_now + 8 * b * V_STRIDE + 16 * k, V_STRIDE, lane);
      }
      UNROLL
      for (int i = 0; i < 2 * BLOCKS; i++) {
        multiply(sum[i % BLOCKS], a[k], right[i % BLOCKS], i / BLOCKS);
      }
      UNROLL
      for (int i = 0; i < 2 * BLOCKS && MATRIX_ROUNDS; i++) {
        multiply(sum[i % BLOCKS], rest, right[i % BLOCKS], i / BLOCKS);
      }
      load_left(a[k], k_row + size_t(next) * (C * N) + 256 * k, 16, lane);
    }
    UNROLL
    for (int b = 0; b < BLOCKS; b++) {
      UNROLL
      for (int i = 0; i < 4; i++) {
        const uint at = ((1 - now) * W + 8 * b + sum_column(lane, i)) * S_STRIDE + m + sum_row(lane, i);
        states[at] = matrix_rounded(sum[b].x[i]);
      }
    }
  }
  UNROLL
  for (int i = 0; i < FETCHES; i++) {
    const uint quad = tid + i * threads;
    const uint t = quad / (W / 4);
    if (quad < uint(QUADS)) {
      UNROLL
      for (int j = 0; j < 4; j++) {
        values[((1 - now) * W + quad % (W / 4) * 4 + j) * V_STRIDE + t] =
            next * C + t < length ? ahead[i].x[j] : static_cast<T>(0.0f);
      }
    }
  }
  TG_BARRIER();
}

if (!makes_o) {
  const auto after_row = after + (size_t(group.z) * N + m) * D + column;
  UNROLL
  for (int b = 0; b < BLOCKS; b++) {
    UNROLL
    for (int i = 0; i < 4; i++) {
      after_row[size_t(sum_row(lane, i)) * D + 8 * b + sum_column(lane, i)] = sum[b].x[i];
    }
  }
}
