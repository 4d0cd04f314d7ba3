// CUDA's side of the common subset: Metal's words, as far as bodies use them. MLX includes cuda_fp16.h and cuda_bf16.h
// before this text; C's float functions (expf, log1pf, powf, ...) are CUDA's own, and precise without --use_fast_math.

typedef unsigned int uint;
typedef __half float16_t;
typedef __nv_bfloat16 bfloat16_t;

#define device
#define constant
#define thread

#define FN __device__ __forceinline__
#define UNROLL _Pragma("unroll")
#define TG_ARRAY(type, name, size) __shared__ type name[size]
#define TG_BARRIER() __syncthreads()

// All 32 lanes must take part in each of these; so must all lanes in Metal whose result is used.
#define ALL_LANES 0xffffffffu

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
