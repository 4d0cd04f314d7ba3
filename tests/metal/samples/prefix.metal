// Inclusive prefix sums of one row within a threadgroup, by shuffles and a shared array.
//   in: x [N] of float    out: y [N] of float
//   templates: N (at most threads)
//   grid: one threadgroup
TG_ARRAY(float, sums, 32);
float value = tid < N ? x[tid] : 0.0f;
UNROLL
for (uint step = 1; step < 32; step *= 2) {
  const float other = simd_shuffle_up(value, step);
  value += lane >= step ? other : 0.0f;
}
if (lane == 31) {
  sums[simd_id] = value;
}
TG_BARRIER();
for (uint i = 0; i < simd_id; i++) {
  value += sums[i];
}
if (tid < N) {
  y[tid] = value;
}
