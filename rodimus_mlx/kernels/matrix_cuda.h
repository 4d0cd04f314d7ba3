// CUDA's matrix units: a simdgroup's product of 16 x 16 by 16 x 8 numbers, added to 16 x 8 sums. Factors in TF32.
//
// Which numbers a lane holds is mma.m16n8k8's, twice; of the 16 that are summed over, it takes four neighbours, since
// any order serves that both factors share, and four neighbours are one access.

#define MATRIX_ROUNDS true  // factors, to TF32: what is lost, matrix_rest, can be a factor of its own

FN uint sum_row(uint lane, int i) { return lane / 4 + 8 * (i / 2); }
FN uint sum_column(uint lane, int i) { return 2 * (lane % 4) + i % 2; }

// of the 16 x 16 numbers at p, whose rows lie `stride` apart
template <typename T>
FN void load_left(Left& left, const T* p, uint stride, uint lane) {
  UNROLL
  for (int h = 0; h < 2; h++) {
    load4(p + (lane / 4 + 8 * h) * stride + 4 * (lane % 4), left.x + 4 * h);
  }
}

// of the 16 x 8 numbers at p, whose columns lie `stride` apart
template <typename T>
FN void load_right(Right& right, const T* p, uint stride, uint lane) {
  load4(p + lane / 4 * stride + 4 * (lane % 4), right.x);
}

// The units cut off 13 bits: half of what those can be is added first.
FN float matrix_rounded(float x) { return __uint_as_float(__float_as_uint(x) + 0x1000u); }
FN float matrix_rest(float x) { return x - __uint_as_float((__float_as_uint(x) + 0x1000u) & 0xffffe000u); }

// One half of the product, 0 or 1. One sum's halves wait for each other, so those of several sums go in turn.
// Factors are rounded before, with matrix_rounded, or cut off.
FN void multiply(Sum& sum, const Left& left, const Right& right, int half) {
  const int k = 2 * half;
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sum.x[0]), "+f"(sum.x[1]), "+f"(sum.x[2]), "+f"(sum.x[3])
      : "r"(__float_as_uint(left.x[k])), "r"(__float_as_uint(left.x[k + 4])), "r"(__float_as_uint(left.x[k + 1])),
        "r"(__float_as_uint(left.x[k + 5])), "r"(__float_as_uint(right.x[k])), "r"(__float_as_uint(right.x[k + 1])));
}

// Four neighbours as they are, so that nothing waits for them before they are used.
template <typename T>
FN Four<T> fetch4(const T* p) {
  return *reinterpret_cast<const Four<T>*>(p);
}

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T x[2];
};

template <typename T>
FN void store2(T* p, float a, float b) {
  Two<T> two;
  two.x[0] = static_cast<T>(a);
  two.x[1] = static_cast<T>(b);
  *reinterpret_cast<Two<T>*>(p) = two;
}
