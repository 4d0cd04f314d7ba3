// Queries and keys with rotary positions, and values, each by itself, of what one product made of them.
//
// Features i and i + R / 2 of a head turn by position * base^(-2i / R); those behind R stay.
//
// Inputs   qkv [B, T, (H + HK + HV) F]   offset [1] or (with EACH) [B] int: the first token's position   base [1] float:
//          log2 of it
// Outputs  q [B, T, H, F]   k [B, 1, T, HK F]   v [B, 1, T, HV F]
// Template H, HK, HV: heads   F: features of each, a multiple of 4   R: of them, a multiple of 8   EACH   WIDTH: threads
// Grid     (T, 1, B) of WIDTH threads

constexpr int QUADS = R / 8;
constexpr int TURNS = ((H + HK) * QUADS + WIDTH - 1) / WIDTH;
constexpr int COPIES = (HV * F / 4 + WIDTH - 1) / WIDTH;
constexpr int STAY = F > R ? F - R : 1;
TG_ARRAY(float, cosine, R / 2);
TG_ARRAY(float, sine, R / 2);
const uint length = uint(qkv_shape[1]);
const size_t token = size_t(group.z) * length + group.x;
const auto from = qkv + token * ((H + HK + HV) * F);
const auto to_q = q + token * (H * F);
const auto to_k = k + token * (HK * F);

const float position = static_cast<float>(int(offset[EACH ? group.z : 0]) + int(group.x));
for (uint i = tid; i < uint(R / 2); i += WIDTH) {
  const float angle = position * exp2f(-(static_cast<float>(i) / static_cast<float>(R / 2)) * base[0]);
  cosine[i] = cosf(angle);
  sine[i] = sinf(angle);
}
float turned[8 * TURNS];  // all loads come before the first store, which the compiler may not move them over
float copied[4 * COPIES];
UNROLL
for (int j = 0; j < TURNS; j++) {
  const uint i = tid + j * WIDTH;
  if (i < uint((H + HK) * QUADS)) {
    load4(from + i / QUADS * F + 4 * (i % QUADS), turned + 8 * j);
    load4(from + i / QUADS * F + 4 * (i % QUADS) + R / 2, turned + 8 * j + 4);
  }
}
UNROLL
for (int j = 0; j < COPIES; j++) {
  const uint i = 4 * (tid + j * WIDTH);
  if (i < uint(HV * F)) {
    load4(from + (H + HK) * F + i, copied + 4 * j);
  }
}
TG_BARRIER();
UNROLL
for (int j = 0; j < TURNS; j++) {
  const uint i = tid + j * WIDTH;
  if (i < uint((H + HK) * QUADS)) {
    const uint head = i / QUADS;
    const uint first = 4 * (i % QUADS);
    THREAD float* a = turned + 8 * j;
    THREAD float* b = a + 4;
    for (int e = 0; e < 4; e++) {
      const float x = a[e] * cosine[first + e] - b[e] * sine[first + e];
      b[e] = a[e] * sine[first + e] + b[e] * cosine[first + e];
      a[e] = x;
    }
    const auto to = head < uint(H) ? to_q + head * F : to_k + (head - H) * F;
    store4(to + first, a);
    store4(to + first + R / 2, b);
  }
}
UNROLL
for (int j = 0; j < COPIES; j++) {
  const uint i = 4 * (tid + j * WIDTH);
  if (i < uint(HV * F)) {
    store4(v + token * (HV * F) + i, copied + 4 * j);
  }
}
for (uint i = 4 * tid; i < uint((H + HK) * (F - R)); i += 4 * WIDTH) {
  const uint head = i / STAY;
  const uint feature = R + i % STAY;
  const auto to = head < uint(H) ? to_q + head * F : to_k + (head - H) * F;
  float x[4];
  load4(from + head * F + feature, x);
  store4(to + feature, x);
}
