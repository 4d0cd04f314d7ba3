// Sums of rows, by simdgroups and then across them.
//   in: x [R, N] of T    out: y [R] of T
//   templates: T, N (row length), BARRIER (false leaves out the barrier that is needed)
//   grid: one threadgroup for each row
TG_ARRAY(float, partial, 32);
float sum = 0.0f;
for (uint i = tid; i < N; i += threads) {
  sum += static_cast<float>(x[group.x * N + i]);
}
sum = simd_sum(sum);
if (lane == 0) {
  partial[simd_id] = sum;
}
if (BARRIER) {
  TG_BARRIER();
}
if (tid == 0) {
  float total = 0.0f;
  for (uint i = 0; i < threads / 32; i++) {
    total += partial[i];
  }
  y[group.x] = static_cast<T>(total);
}
