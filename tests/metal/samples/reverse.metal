// Reverses a row through a shared array; each fault leaves out one thing that is needed.
//   in: x [N] of float    out: y [N] of float
//   templates: N (= threads), SIZE of the array, FAULT (0 none, 1 divergent barrier, 2 barriers of two places,
//   3 divergent simd_sum, 4 write after y, 5 write before y, 6 read far after x, 7 unwritten, 8 after the array,
//   9 after the array by a pointer)
//   grid: one threadgroup
TG_ARRAY(float, row, SIZE);
TG_ARRAY(float, behind, 4);
if (FAULT == 1 && tid == 3) {
  return;
}
row[tid] = x[FAULT == 6 ? tid + 4096 * N : tid];
if (FAULT == 8 && tid == 0) {
  row[SIZE] = 1.0f;
}
if (FAULT == 9 && tid == 0) {
  THREADGROUP float* after = row;
  after[SIZE] = 1.0f;
}
if (FAULT == 2 && tid < 32) {
  TG_BARRIER();
} else {
  TG_BARRIER();
}
float value = row[N - 1 - tid];
if (FAULT == 3 && lane > 4) {
  value = simd_sum(value);
}
if (FAULT == 7 && tid == 5) {
  return;
}
if (FAULT == 4) {
  y[tid + 1] = value;
}
if (FAULT == 5) {
  y[static_cast<int>(tid) - 1] = value;
}
y[tid] = value;
if (tid == 0) {
  behind[0] = 0.0f;
}
