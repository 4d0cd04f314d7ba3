// Copies four elements a thread, a float function applied; N is a multiple of 4.
//   in: x [N] of T    out: y [N] of T
//   templates: T, N
//   grid: N / 4 threads, rounded up
const uint start = (group.x * threads + tid) * 4;
if (start < N) {
  float values[4];
  load4(x + start, values);
  for (uint i = 0; i < 4; i++) {
    values[i] = 2.0f * values[i];
  }
  store4(y + start, values);
}
