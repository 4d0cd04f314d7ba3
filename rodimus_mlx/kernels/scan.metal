// The states between chunks: before[c] = state at chunk c's start; state <- total[c] * state + written[c].
//
// Inputs   written [B, chunks, N, D]   total [B, chunks, N]   state [B, N, D], all float
// Outputs  before [B, chunks, N, D]   after [B, N, D], float
// Template N   D
// Grid     (D / threads, N, B), rounded up; one thread an element of the state

constexpr int AHEAD = 4;
const uint d = group.x * threads + tid;
if (d < uint(D)) {
  const uint chunks = uint(total_shape[1]);
  const size_t element = size_t(group.y) * D + d;
  float s = state[size_t(group.z) * N * D + element];
  const size_t stride = size_t(N) * D;
  const auto wrote = written + size_t(group.z) * chunks * stride + element;
  const auto kept = total + size_t(group.z) * chunks * N + group.y;
  const auto out = before + size_t(group.z) * chunks * stride + element;
  for (uint c = 0; c < chunks; c += AHEAD) {
    float more[AHEAD];  // loaded before the stores, which the compiler may not move loads over
    float decay[AHEAD];
    for (uint i = 0; i < uint(AHEAD); i++) {
      more[i] = c + i < chunks ? wrote[(c + i) * stride] : 0.0f;
      decay[i] = c + i < chunks ? kept[(c + i) * N] : 1.0f;
    }
    for (uint i = 0; i < uint(AHEAD); i++) {
      if (c + i < chunks) {
        out[(c + i) * stride] = s;
      }
      s = decay[i] * s + more[i];
    }
  }
  after[size_t(group.z) * N * D + element] = s;
}
