// Templates on the pointer's type, which is device or constant as MLX decides by size.
template <typename P>
FN float decayed(P g, uint t, float state) {
  return expf(g[t]) * state;
}
