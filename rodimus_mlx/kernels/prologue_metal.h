// Metal's side of the common subset. Bodies are written in plain Metal; where CUDA has another word, both prologues
// give the one that bodies use. MLX puts its own kernels/utils.h (metal_stdlib, bfloat16_t, log1p) before this text.
// Never write the name of a thread attribute here: MLX declares those that it finds in the body alone.

#define FN METAL_FUNC
#define UNROLL _Pragma("clang loop unroll(full)")
#define TG_ARRAY(type, name, size) threadgroup type name[size]
#define TG_BARRIER() threadgroup_barrier(mem_flags::mem_threadgroup)

// C's names for float functions, precise whatever the math mode.
FN float expf(float x) { return metal::precise::exp(x); }
FN float exp2f(float x) { return metal::precise::exp2(x); }
FN float logf(float x) { return metal::precise::log(x); }
FN float log2f(float x) { return metal::precise::log2(x); }
FN float log1pf(float x) { return log1p(x); }
FN float powf(float x, float y) { return metal::precise::pow(x, y); }
FN float sqrtf(float x) { return metal::precise::sqrt(x); }
FN float rsqrtf(float x) { return metal::precise::rsqrt(x); }
FN float fabsf(float x) { return metal::abs(x); }
FN float fmaxf(float x, float y) { return metal::max(x, y); }
FN float fminf(float x, float y) { return metal::min(x, y); }
