// CUDA's side of the common subset: Metal's words, as far as bodies use them. MLX includes cuda_fp16.h and cuda_bf16.h
// before this text; C's float functions (expf, log1pf, powf, ...) are CUDA's own, and precise without --use_fast_math.

typedef unsigned int uint;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

// Not Metal's own words: CUDA's __device__ and __constant__ are macros made of them.
#define DEVICE
#define CONSTANT
#define THREADGROUP
#define THREAD

#define FN __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define TG_ARRAY(type, name, size) __shared__ alignas(16) type name[size]
#define TG_BARRIER() __syncthreads()
#define SIMD_BARRIER() __syncwarp()

// All 32 lanes must take part in each of these; so must all lanes in Metal whose result is used.
#define ALL_LANES 0xffffffffu

// Some units in the last place off; where the denominator is above 2^126, the quotient is 0.
FN float exp_fast(float x) { return __expf(x); }
FN float divide_fast(float x, float y) { return __fdividef(x, y); }

FN float simd_sum(float x) {
  UNROLL
  for (int step = 16; step > 0; step /= 2) {
    x += __shfl_xor_sync(ALL_LANES, x, step);
  }
  return x;
}

FN float simd_max(float x) {
  UNROLL
  for (int step = 16; step > 0; step /= 2) {
    x = fmaxf(x, __shfl_xor_sync(ALL_LANES, x, step));
  }
  return x;
}

FN float simd_shuffle(float x, uint lane) { return __shfl_sync(ALL_LANES, x, lane); }
FN float simd_broadcast(float x, uint lane) { return __shfl_sync(ALL_LANES, x, lane); }
FN float simd_shuffle_xor(float x, uint mask) { return __shfl_xor_sync(ALL_LANES, x, mask); }
FN float simd_shuffle_up(float x, uint delta) { return __shfl_up_sync(ALL_LANES, x, delta); }
FN float simd_shuffle_down(float x, uint delta) { return __shfl_down_sync(ALL_LANES, x, delta); }

template <typename T>
struct alignas(4 * sizeof(T)) Four {
  T x[4];
};

// Four neighbours in one access; p is a multiple of four elements into an array whose memory starts where MLX put it.
template <typename T>
FN void load4(const T* p, float* values) {
  const Four<T> four = *reinterpret_cast<const Four<T>*>(p);
  UNROLL
  for (int i = 0; i < 4; i++) {
    values[i] = static_cast<float>(four.x[i]);
  }
}

template <typename T>
FN void store4(T* p, const float* values) {
  Four<T> four;
  UNROLL
  for (int i = 0; i < 4; i++) {
    four.x[i] = static_cast<T>(values[i]);
  }
  *reinterpret_cast<Four<T>*>(p) = four;
}
