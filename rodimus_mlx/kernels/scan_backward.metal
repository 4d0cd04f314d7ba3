// The scan's gradients, chunks in reverse: with G the gradient of the state after chunk c,
//   d_written[c] = G    d_total[c] = sum_d G * before[c]    G <- total[c] * G + d_before[c]
//
// Inputs   d_before [B, chunks, N, D]   before [B, chunks, N, D]   total [B, chunks, N]   d_after [B, N, D]
// Outputs  d_written [B, chunks, N, D]   d_total [B, chunks, N, PARTS], to be summed over PARTS
//          d_state [B, N, D]; in and out all float
// Template N   D   PARTS: simdgroups over D
// Grid     (D / threads, N, B), rounded up; one thread an element of the state

const uint d = group.x * threads + tid;
const bool inside = d < uint(D);
const uint chunks = uint(total_shape[1]);
const size_t element = size_t(group.y) * D + d;
const uint part = d / 32;
float g = inside ? d_after[size_t(group.z) * N * D + element] : 0.0f;
for (uint i = 0; i < chunks; i++) {
  const size_t chunk = size_t(group.z) * chunks + (chunks - 1 - i);
  const size_t at = chunk * N * D + element;
  float product = 0.0f;
  if (inside) {
    d_written[at] = g;
    product = g * before[at];
  }
  product = simd_sum(product);
  if (lane == 0 && part < uint(PARTS)) {
    d_total[(chunk * N + group.y) * PARTS + part] = product;
  }
  if (inside) {
    g = total[chunk * N + group.y] * g + d_before[at];
  }
}
if (inside) {
  d_state[size_t(group.z) * N * D + element] = g;
}
