// Metal's side of the common subset: bodies use Metal's names where CUDA can be given them, else these macros.
// MLX puts its own kernels/utils.h (metal_stdlib, bfloat16_t, log1p) before this text.
// Never write the name of a thread attribute here: MLX declares those that it finds in the body alone.

#define DEVICE device
#define CONSTANT constant
#define THREADGROUP threadgroup
#define THREAD thread

#define FN METAL_FUNC
#define UNROLL _Pragma("clang loop unroll(full)")
#define TG_ARRAY(type, name, size) threadgroup type name[size]
#define TG_BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)
#define SIMD_BARRIER() simdgroup_barrier(mem_flags::mem_threadgroup)

// C's names for float functions, precise whatever the math mode.
FN float expf(float x) { return metal::precise::exp(x); }
FN float exp2f(float x) { return metal::precise::exp2(x); }
FN float logf(float x) { return metal::precise::log(x); }
FN float log2f(float x) { return metal::precise::log2(x); }
FN float log1pf(float x) { return log1p(x); }
FN float powf(float x, float y) { return metal::precise::pow(x, y); }
FN float sqrtf(float x) { return metal::precise::sqrt(x); }
FN float rsqrtf(float x) { return metal::precise::rsqrt(x); }
FN float cosf(float x) { return metal::precise::cos(x); }
FN float sinf(float x) { return metal::precise::sin(x); }
FN float fabsf(float x) { return metal::abs(x); }
FN float fmaxf(float x, float y) { return metal::max(x, y); }
FN float fminf(float x, float y) { return metal::min(x, y); }

// Where CUDA has something faster: a Mac's loads and stores take longer than these.
FN float exp_fast(float x) { return expf(x); }
FN float divide_fast(float x, float y) { return x / y; }

// Four neighbours in one access; p is a multiple of four elements into an array whose memory starts where MLX put it.
template <typename T>
FN void load4(const DEVICE T* p, THREAD float* values) {
  const vec<T, 4> v = *reinterpret_cast<const DEVICE vec<T, 4>*>(p);
  values[0] = static_cast<float>(v.x);
  values[1] = static_cast<float>(v.y);
  values[2] = static_cast<float>(v.z);
  values[3] = static_cast<float>(v.w);
}

template <typename T>
FN void store4(DEVICE T* p, const THREAD float* values) {
  vec<T, 4> v;
  v.x = static_cast<T>(values[0]);
  v.y = static_cast<T>(values[1]);
  v.z = static_cast<T>(values[2]);
  v.w = static_cast<T>(values[3]);
  *reinterpret_cast<DEVICE vec<T, 4>*>(p) = v;
}
