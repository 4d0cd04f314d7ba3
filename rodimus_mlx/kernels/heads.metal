// Queries and keys with rotary positions, and values, each by itself, of what one product made of them.
//
// Features i and i + R / 2 of a head turn by position * base^(-2i / R); those behind R stay.
//
// Inputs   qkv [B, T, (H + HK + HV) F]   offset [1] or (with EACH) [B] int: the first token's position   base [1] float:
//          log2 of it
// Outputs  q [B, T, H, F]   k [B, 1, T, HK F]   v [B, 1, T, HV F]
// Template H, HK, HV: heads   F: features of each, a multiple of 4   R: of them, a multiple of 8   EACH
// Grid     (T, 1, B); the threads are a multiple of R / 8, so that each keeps to four pairs of features

constexpr int QUADS = R / 8;
constexpr int STAY = F > R ? F - R : 1;
const uint length = uint(qkv_shape[1]);
const size_t token = size_t(group.z) * length + group.x;
const auto from = qkv + token * ((H + HK + HV) * F);
const auto to_q = q + token * (H * F);
const auto to_k = k + token * (HK * F);

const float position = static_cast<float>(int(offset[EACH ? group.z : 0]) + int(group.x));
const uint first = 4 * (tid % QUADS);
float cosine[4];
float sine[4];
for (int e = 0; e < 4; e++) {
  const float angle = position * exp2f(-(static_cast<float>(first + e) / static_cast<float>(R / 2)) * base[0]);
  cosine[e] = cosf(angle);
  sine[e] = sinf(angle);
}
for (uint head = tid / QUADS; head < uint(H + HK); head += threads / QUADS) {
  const auto to = head < uint(H) ? to_q + head * F : to_k + (head - H) * F;
  float a[4];
  float b[4];
  load4(from + head * F + first, a);
  load4(from + head * F + first + R / 2, b);
  for (int e = 0; e < 4; e++) {
    const float turned = a[e] * cosine[e] - b[e] * sine[e];
    b[e] = a[e] * sine[e] + b[e] * cosine[e];
    a[e] = turned;
  }
  store4(to + first, a);
  store4(to + first + R / 2, b);
}
for (uint i = 4 * tid; i < uint((H + HK) * (F - R)); i += 4 * threads) {
  const uint head = i / STAY;
  const uint feature = R + i % STAY;
  const auto to = head < uint(H) ? to_q + head * F : to_k + (head - H) * F;
  float x[4];
  load4(from + head * F + feature, x);
  store4(to + feature, x);
}
for (uint i = 4 * tid; i < uint(HV * F); i += 4 * threads) {
  float x[4];
  load4(from + (H + HK) * F + i, x);
  store4(v + token * (HV * F) + i, x);
}
