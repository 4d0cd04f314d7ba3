// Queries and keys with rotary positions, and values, each by itself, of what one product made of them; behind keys and
// values of tokens before, and padded with zeros, where the grid has rows for them.
//
// Features i and i + R / 2 of a head turn by position * base^(-2i / R); those behind R stay.
//
// Inputs   qkv [B, T, (H + HK + HV) F]   offset [1] or (with EACH) [B] int: the first token's position   base [1] float:
//          log2 of it   old_k [B, 1, S, HK F], old_v [B, 1, S, HV F] (with WINDOW): of the tokens before
// Outputs  q [B, P, H, F]   k [B, 1, M + P, HK F]   v [B, 1, M + P, HV F], P >= T, M = min(S, WINDOW)
// Template H, HK, HV: heads   F: features of each, a multiple of 4   R: of them, a multiple of 8   EACH   WIDTH: threads
//          WINDOW: rows of old_k and old_v at most, their last; 0: none are given
// Grid     (M + P, 1, B) of WIDTH threads

constexpr int QUADS = R / 8;
constexpr int TURNS = ((H + HK) * QUADS + WIDTH - 1) / WIDTH;
constexpr int COPIES = (HV * F / 4 + WIDTH - 1) / WIDTH;
constexpr int STAY = F > R ? F - R : 1;
TG_ARRAY(float, cosine, R / 2);
TG_ARRAY(float, sine, R / 2);
const uint length = uint(qkv_shape[1]);
const uint old = WINDOW > 0 ? uint(old_k_shape[2]) : 0;
const uint before = old < uint(WINDOW) ? old : uint(WINDOW);
const auto to_k = k + (size_t(group.z) * group_count.x + group.x) * (HK * F);
const auto to_v = v + (size_t(group.z) * group_count.x + group.x) * (HV * F);
if (group.x < before) {
  const size_t row = size_t(group.z) * old + old - before + group.x;
  for (uint i = 4 * tid; i < uint(HK * F); i += 4 * WIDTH) {
    float x[4];
    load4(old_k + row * (HK * F) + i, x);
    store4(to_k + i, x);
  }
  for (uint i = 4 * tid; i < uint(HV * F); i += 4 * WIDTH) {
    float x[4];
    load4(old_v + row * (HV * F) + i, x);
    store4(to_v + i, x);
  }
} else {
  const uint t = group.x - before;
  const bool exists = t < length;
  const auto from = qkv + (size_t(group.z) * length + t) * ((H + HK + HV) * F);
  const auto to_q = q + (size_t(group.z) * (group_count.x - before) + t) * (H * F);
  const float position = static_cast<float>(int(offset[EACH ? group.z : 0]) + int(t));
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
    UNROLL
    for (int e = 0; e < 8; e++) {
      turned[8 * j + e] = 0.0f;
    }
    if (exists && i < uint((H + HK) * QUADS)) {
      load4(from + i / QUADS * F + 4 * (i % QUADS), turned + 8 * j);
      load4(from + i / QUADS * F + 4 * (i % QUADS) + R / 2, turned + 8 * j + 4);
    }
  }
  UNROLL
  for (int j = 0; j < COPIES; j++) {
    const uint i = 4 * (tid + j * WIDTH);
    UNROLL
    for (int e = 0; e < 4; e++) {
      copied[4 * j + e] = 0.0f;
    }
    if (exists && i < uint(HV * F)) {
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
      store4(to_v + i, copied + 4 * j);
    }
  }
  for (uint i = 4 * tid; i < uint((H + HK) * (F - R)); i += 4 * WIDTH) {
    const uint head = i / STAY;
    const uint feature = R + i % STAY;
    const auto to = head < uint(H) ? to_q + head * F : to_k + (head - H) * F;
    float x[4] = {0.0f, 0.0f, 0.0f, 0.0f};
    if (exists) {
      load4(from + head * F + feature, x);
    }
    store4(to + feature, x);
  }
}
