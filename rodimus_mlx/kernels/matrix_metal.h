// Metal's simdgroup matrices: a simdgroup's product of 16 x 16 by 16 x 8 numbers, added to 16 x 8 sums. All float32.
//
// Made of 8 x 8 matrices, of which a lane holds two neighbours in a row: where, is what MLX's own products rely on.

#define MATRIX_ROUNDS false

typedef simdgroup_matrix<float, 8, 8> Matrix8;

FN uint matrix_row(uint lane) { return lane / 16 * 4 + lane / 2 % 4; }
FN uint matrix_column(uint lane) { return lane / 8 % 2 * 4 + lane % 2 * 2; }
FN uint sum_row(uint lane, int i) { return matrix_row(lane) + 8 * (i / 2); }
FN uint sum_column(uint lane, int i) { return matrix_column(lane) + i % 2; }

// of the 16 x 16 numbers at p, whose rows lie `stride` apart
template <typename P>
FN void load_left(THREAD Left& left, P p, uint stride, uint lane) {
  UNROLL
  for (int i = 0; i < 8; i++) {
    const uint column = matrix_column(lane) + 8 * (i / 2 % 2) + i % 2;
    left.x[i] = static_cast<float>(p[(matrix_row(lane) + 8 * (i / 4)) * stride + column]);
  }
}

// of the 16 x 8 numbers at p, whose columns lie `stride` apart
template <typename P>
FN void load_right(THREAD Right& right, P p, uint stride, uint lane) {
  UNROLL
  for (int i = 0; i < 4; i++) {
    right.x[i] = static_cast<float>(p[(matrix_column(lane) + i % 2) * stride + matrix_row(lane) + 8 * (i / 2)]);
  }
}

FN float matrix_rounded(float x) { return x; }
FN float matrix_rest(float) { return 0.0f; }

FN Matrix8 matrix8(float a, float b) {
  Matrix8 m;
  m.thread_elements()[0] = a;
  m.thread_elements()[1] = b;
  return m;
}

// One half of the product, 0 or 1. One sum's halves wait for each other, so those of several sums go in turn.
FN void multiply(THREAD Sum& sum, const THREAD Left& left, const THREAD Right& right, int half) {
  Matrix8 b = matrix8(right.x[2 * half], right.x[2 * half + 1]);
  UNROLL
  for (int h = 0; h < 2; h++) {
    Matrix8 total = matrix8(sum.x[2 * h], sum.x[2 * h + 1]);
    Matrix8 a = matrix8(left.x[4 * h + 2 * half], left.x[4 * h + 2 * half + 1]);
    simdgroup_multiply_accumulate(total, a, b, total);
    sum.x[2 * h] = total.thread_elements()[0];
    sum.x[2 * h + 1] = total.thread_elements()[1];
  }
}

// Four neighbours as they are, so that nothing waits for them before they are used.
template <typename T>
struct Four {
  T x[4];
};

template <typename T>
FN Four<T> fetch4(const DEVICE T* p) {
  const vec<T, 4> v = *reinterpret_cast<const DEVICE vec<T, 4>*>(p);
  Four<T> four;
  four.x[0] = v.x;
  four.x[1] = v.y;
  four.x[2] = v.z;
  four.x[3] = v.w;
  return four;
}

template <typename T>
FN void store2(DEVICE T* p, float a, float b) {
  vec<T, 2> v;
  v.x = static_cast<T>(a);
  v.y = static_cast<T>(b);
  *reinterpret_cast<DEVICE vec<T, 2>*>(p) = v;
}
