// u = (x @ down.T) @ up.T for sixteen rows, on the matrix units; the inner product is rounded to x's type, as two layers
// would leave it.
//
// Inputs   xz [rows, 2D]: x | z   down [R, D]   up [D, R], float16 or bfloat16
// Outputs  u [rows, D]
// Template T: their type   D: a multiple of 16   R: a multiple of 16, at most 64   WIDTH: threads
// Grid     (rows / 16, 1, 1), rounded up, of WIDTH threads; 16 rows at least: the last threadgroup's may be another's too

constexpr int AHEAD = 4;  // loads in flight, which a simdgroup alone would wait for
constexpr int SIMDGROUPS = WIDTH / 32;
constexpr int EACH = (16 * R + WIDTH - 1) / WIDTH;
TG_ARRAY(float, low, SIMDGROUPS * 16 * R);  // each simdgroup's part of the inner product, then its sum

const uint rows = uint(xz_shape[0]);
const uint row = group.x * 16 + 16 <= rows ? group.x * 16 : rows - 16;
Sum sum[R / 8];
UNROLL
for (int b = 0; b < R / 8; b++) {
  UNROLL
  for (int i = 0; i < 4; i++) {
    sum[b].x[i] = 0.0f;
  }
}
for (uint d = 16 * simd_id; d < uint(D); d += 16 * SIMDGROUPS * AHEAD) {
  Left left[AHEAD];
  Right right[AHEAD * R / 8];
  UNROLL
  for (int j = 0; j < AHEAD; j++) {
    const uint at = d + 16 * SIMDGROUPS * j;
    if (at < uint(D)) {
      load_left(left[j], xz + size_t(row) * (2 * D) + at, 2 * D, lane);
      UNROLL
      for (int b = 0; b < R / 8; b++) {
        load_right(right[j * R / 8 + b], down + 8 * b * D + at, D, lane);
      }
    }
  }
  UNROLL
  for (int j = 0; j < AHEAD; j++) {
    if (d + 16 * SIMDGROUPS * j < uint(D)) {
      UNROLL
      for (int i = 0; i < R / 4; i++) {
        multiply(sum[i % (R / 8)], left[j], right[j * R / 8 + i % (R / 8)], i / (R / 8));
      }
    }
  }
}
UNROLL
for (int b = 0; b < R / 8; b++) {
  UNROLL
  for (int i = 0; i < 4; i++) {
    low[(simd_id * 16 + sum_row(lane, i)) * R + 8 * b + sum_column(lane, i)] = sum[b].x[i];
  }
}
TG_BARRIER();
float total[EACH];
for (int j = 0; j < EACH; j++) {
  const uint i = tid + j * WIDTH;
  total[j] = 0.0f;
  for (int part = 0; i < uint(16 * R) && part < SIMDGROUPS; part++) {
    total[j] += low[part * (16 * R) + i];
  }
}
TG_BARRIER();
for (int j = 0; j < EACH; j++) {
  const uint i = tid + j * WIDTH;
  if (i < uint(16 * R)) {
    low[i] = static_cast<float>(static_cast<T>(total[j]));
  }
}
TG_BARRIER();

Left inner[R / 16];
UNROLL
for (int k = 0; k < R / 16; k++) {
  load_left(inner[k], low + 16 * k, R, lane);
}
for (uint d = 8 * simd_id; d < uint(D); d += 8 * SIMDGROUPS * AHEAD) {
  Right right[AHEAD * R / 16];
  UNROLL
  for (int j = 0; j < AHEAD; j++) {
    const uint at = d + 8 * SIMDGROUPS * j;
    UNROLL
    for (int k = 0; k < R / 16 && at < uint(D); k++) {
      load_right(right[j * R / 16 + k], up + at * R + 16 * k, R, lane);
    }
  }
  UNROLL
  for (int j = 0; j < AHEAD; j++) {
    const uint at = d + 8 * SIMDGROUPS * j;
    if (at < uint(D)) {
      Sum out;
      UNROLL
      for (int i = 0; i < 4; i++) {
        out.x[i] = 0.0f;
      }
      UNROLL
      for (int k = 0; k < R / 8; k++) {
        multiply(out, inner[k / 2], right[j * R / 16 + k / 2], k % 2);
      }
      UNROLL
      for (int i = 0; i < 4; i += 2) {
        store2(u + size_t(row + sum_row(lane, i)) * D + at + sum_column(lane, i), out.x[i], out.x[i + 1]);
      }
    }
  }
}
