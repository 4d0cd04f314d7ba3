// Running sums along rows, a decay from row to row as the recurrence has it: s[t] = exp(g[t]) s[t-1] + x[t].
//   in: x [T, D] of T, g [G] of float (G = T; small ones become `constant`)    out: y [T, D] of T, last [D] of float
//   templates: T, LENGTH
//   grid: D threads, in threadgroups of any size; the last one runs past D
const uint d = group.x * threads + tid;
if (d < WIDTH) {
  float state = 0.0f;
  for (uint t = 0; t < LENGTH; t++) {
    state = decayed(g, t, state) + static_cast<float>(x[t * WIDTH + d]);
    y[t * WIDTH + d] = static_cast<T>(state);
  }
  last[d] = state;
}
