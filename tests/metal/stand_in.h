// What Metal and MLX's kernels/utils.h give the common subset, for a CPU compiler, and no more: a name that is missing
// here fails to compile. Address spaces are real to the compiler, so a pointer without one fails as it does in Metal.
#pragma once

#define device __attribute__((address_space(1)))
#define constant __attribute__((address_space(2)))
#define threadgroup __attribute__((address_space(3)))
#define thread
#define METAL_FUNC inline __attribute__((always_inline))

typedef __INT8_TYPE__ int8_t;
typedef __INT16_TYPE__ int16_t;
typedef __INT32_TYPE__ int32_t;
typedef __INT64_TYPE__ int64_t;
typedef __UINT8_TYPE__ uint8_t;
typedef __UINT16_TYPE__ uint16_t;
typedef __UINT32_TYPE__ uint32_t;
typedef __UINT64_TYPE__ uint64_t;
typedef __SIZE_TYPE__ size_t;
typedef uint16_t ushort;
typedef uint32_t uint;
typedef _Float16 half;
typedef _Float16 float16_t;
typedef __bf16 bfloat16_t;
typedef uint uint3 __attribute__((ext_vector_type(3)));

#define INFINITY __builtin_inff()
#define NAN __builtin_nanf("")

// The runtime's side, in runtime.cpp.
struct Place {
  uint thread_index, threads, simdgroups;
  uint group[3], group_count[3];
};
enum SimdOp { SIMD_SUM, SIMD_MAX, SIMD_SHUFFLE, SIMD_BROADCAST, SIMD_SHUFFLE_XOR, SIMD_SHUFFLE_UP, SIMD_SHUFFLE_DOWN };
extern "C" {
extern Place runtime_place;
float runtime_simd(int op, float x, uint argument, int line);
void runtime_simd_barrier(int line);
void runtime_matrix(float* d, const float* a, const float* b, const float* c, int line);
void runtime_barrier(int line);
void* runtime_threadgroup_array(uint slot, size_t bytes, const char* name);
float runtime_exp(float);
float runtime_exp2(float);
float runtime_log(float);
float runtime_log2(float);
float runtime_pow(float, float);
float runtime_cos(float);
float runtime_sin(float);
}

namespace metal {
template <typename T, int N>
using vec = T __attribute__((ext_vector_type(N)));

enum class mem_flags { mem_none, mem_device, mem_threadgroup };
inline void threadgroup_barrier(mem_flags, int line = __builtin_LINE()) { runtime_barrier(line); }
inline void simdgroup_barrier(mem_flags, int line = __builtin_LINE()) { runtime_simd_barrier(line); }

// Float alone: CUDA's prologue has no other.
#define SIMD_FUNCTION(name, op)                                                                                  \
  inline float name(float x, uint argument, int line = __builtin_LINE()) { return runtime_simd(op, x, argument, line); } \
  template <typename T>                                                                                          \
  float name(T, uint) = delete;
SIMD_FUNCTION(simd_shuffle, SIMD_SHUFFLE)
SIMD_FUNCTION(simd_broadcast, SIMD_BROADCAST)
SIMD_FUNCTION(simd_shuffle_xor, SIMD_SHUFFLE_XOR)
SIMD_FUNCTION(simd_shuffle_up, SIMD_SHUFFLE_UP)
SIMD_FUNCTION(simd_shuffle_down, SIMD_SHUFFLE_DOWN)
#undef SIMD_FUNCTION
inline float simd_sum(float x, int line = __builtin_LINE()) { return runtime_simd(SIMD_SUM, x, 0, line); }
inline float simd_max(float x, int line = __builtin_LINE()) { return runtime_simd(SIMD_MAX, x, 0, line); }
template <typename T>
float simd_sum(T) = delete;
template <typename T>
float simd_max(T) = delete;

// 8 x 8 floats, two of a row in each lane; runtime.cpp has the places.
template <typename T, int COLUMNS, int ROWS>
struct simdgroup_matrix;
template <>
struct simdgroup_matrix<float, 8, 8> {
  vec<float, 2> elements;
  vec<float, 2>& thread_elements() { return elements; }
};
inline void simdgroup_multiply_accumulate(simdgroup_matrix<float, 8, 8>& d, simdgroup_matrix<float, 8, 8>& a,
                                          simdgroup_matrix<float, 8, 8>& b, simdgroup_matrix<float, 8, 8>& c,
                                          int line = __builtin_LINE()) {
  runtime_matrix((float*)&d.elements, (const float*)&a.elements, (const float*)&b.elements,
                 (const float*)&c.elements, line);
}

inline float abs(float x) { return __builtin_fabsf(x); }
template <typename T>
METAL_FUNC T max(T x, T y) { return x < y ? y : x; }
template <typename T>
METAL_FUNC T min(T x, T y) { return y < x ? y : x; }
template <>
METAL_FUNC float max(float x, float y) { return __builtin_fmaxf(x, y); }
template <>
METAL_FUNC float min(float x, float y) { return __builtin_fminf(x, y); }

namespace precise {
inline float exp(float x) { return runtime_exp(x); }
inline float exp2(float x) { return runtime_exp2(x); }
inline float log(float x) { return runtime_log(x); }
inline float log2(float x) { return runtime_log2(x); }
inline float pow(float x, float y) { return runtime_pow(x, y); }
inline float cos(float x) { return runtime_cos(x); }
inline float sin(float x) { return runtime_sin(x); }
inline float sqrt(float x) { return __builtin_sqrtf(x); }
inline float rsqrt(float x) { return 1.0f / __builtin_sqrtf(x); }
}  // namespace precise
}  // namespace metal

using namespace metal;

// MLX's own, in global scope: the loss of accuracy near 0 and the overflow are part of what is tested.
inline float log1p(float x) {
  const float y = 1.0f + x;
  if (y == 1.0f || y == INFINITY) {
    return y == 1.0f ? x : y;
  }
  return x * (precise::log(y) / (y - 1.0f));
}

// A cast to a wider type says that the address is aligned to it, as load4 and store4 do.
extern "C" void runtime_misaligned(int line);
template <typename T>
struct Pointee;
template <typename T>
struct Pointee<T*> {
  static constexpr size_t alignment = alignof(T);
};
template <typename To, typename From>
METAL_FUNC To aligned_cast(From from, int line = __builtin_LINE()) {
  if ((size_t)from % Pointee<To>::alignment != 0) {
    runtime_misaligned(line);
  }
  return (To)from;
}
#define reinterpret_cast aligned_cast
