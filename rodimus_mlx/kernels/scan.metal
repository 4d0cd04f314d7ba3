// The states between chunks: before[c] = state at chunk c's start; state <- total[c] * state + written[c].
//
// Inputs   written [B, chunks, N, D]   total [B, chunks, N]   state [B, N, D], all float
// Outputs  before [B, chunks, N, D]   after [B, N, D], float
// Template N   D
// Grid     (D / threads, N, B), rounded up; one thread an element of the state

const uint d = group.x * threads + tid;
if (d < uint(D)) {
  const uint chunks = uint(total_shape[1]);
  const size_t element = size_t(group.y) * D + d;
  float s = state[size_t(group.z) * N * D + element];
  for (uint c = 0; c < chunks; c++) {
    const size_t chunk = size_t(group.z) * chunks + c;
    const size_t at = chunk * N * D + element;
    before[at] = s;
    s = total[chunk * N + group.y] * s + written[at];
  }
  after[size_t(group.z) * N * D + element] = s;
}
