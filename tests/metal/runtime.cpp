// Runs a kernel that was compiled for the CPU: one fiber for each thread of a threadgroup, switched at simd operations
// and barriers, so that every fault against the common subset is seen and named.
#include <math.h>
#include <setjmp.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <unistd.h>

typedef uint32_t uint;
struct Place {
  uint thread_index, threads, simdgroups;
  uint group[3], group_count[3];
};
enum SimdOp { SIMD_SUM, SIMD_MAX, SIMD_SHUFFLE, SIMD_BROADCAST, SIMD_SHUFFLE_XOR, SIMD_SHUFFLE_UP, SIMD_SHUFFLE_DOWN,
              SIMD_BARRIER, SIMD_MATRIX };
static const char* const op_names[] = {"simd_sum", "simd_max", "simd_shuffle", "simd_broadcast", "simd_shuffle_xor",
                                       "simd_shuffle_up", "simd_shuffle_down", "simdgroup_barrier",
                                       "simdgroup_multiply_accumulate"};

struct Buffer {
  const char* name;
  void* data;  // copied in for an input, copied out for an output
  uint64_t bytes;
  int is_output;
};

struct Launch {
  uint group_count[3];
  uint threads;
  int reverse;        // order of threadgroups, simdgroups and lanes
  uint poison;        // a byte: what outputs hold before the kernel
  Buffer* buffers;
  uint n_buffers;
  void (*kernel)(void* const* buffers);
  char* message;  // what went wrong
  uint message_bytes;
};

// ---- fibers -------------------------------------------------------------------------------------------------------

extern "C" void runtime_switch(void** save, void* load);
#if __APPLE__
#define SYMBOL "_runtime_switch"
#else
#define SYMBOL "runtime_switch"
#endif
#if __x86_64__
constexpr int SAVED_WORDS = 6;
constexpr int RETURN_WORD = 6;
asm(".text\n.globl " SYMBOL "\n" SYMBOL ":\n"
    "pushq %rbp\npushq %rbx\npushq %r12\npushq %r13\npushq %r14\npushq %r15\n"
    "movq %rsp, (%rdi)\nmovq %rsi, %rsp\n"
    "popq %r15\npopq %r14\npopq %r13\npopq %r12\npopq %rbx\npopq %rbp\nret\n");
#elif __aarch64__
constexpr int SAVED_WORDS = 20;
constexpr int RETURN_WORD = 11;  // x30
asm(".text\n.globl " SYMBOL "\n.p2align 2\n" SYMBOL ":\n"
    "sub sp, sp, #160\n"
    "stp x19, x20, [sp, #0]\nstp x21, x22, [sp, #16]\nstp x23, x24, [sp, #32]\nstp x25, x26, [sp, #48]\n"
    "stp x27, x28, [sp, #64]\nstp x29, x30, [sp, #80]\n"
    "stp d8, d9, [sp, #96]\nstp d10, d11, [sp, #112]\nstp d12, d13, [sp, #128]\nstp d14, d15, [sp, #144]\n"
    "mov x9, sp\nstr x9, [x0]\nmov sp, x1\n"
    "ldp x19, x20, [sp, #0]\nldp x21, x22, [sp, #16]\nldp x23, x24, [sp, #32]\nldp x25, x26, [sp, #48]\n"
    "ldp x27, x28, [sp, #64]\nldp x29, x30, [sp, #80]\n"
    "ldp d8, d9, [sp, #96]\nldp d10, d11, [sp, #112]\nldp d12, d13, [sp, #128]\nldp d14, d15, [sp, #144]\n"
    "add sp, sp, #160\nret\n");
#else
#error "fibers are written for x86-64 and arm64"
#endif

constexpr uint MAX_THREADS = 1024, LANES = 32;
constexpr size_t STACK = 256 * 1024, GUARD = 16 << 20;
constexpr size_t THREADGROUP_LIMIT = 32 * 1024, RED_ZONE = 64;
constexpr uint MAX_ARRAYS = 64;

enum State { READY, AT_SIMD, AT_BARRIER, DONE };
struct Fiber {
  void* sp;
  State state;
  int op, line;
  uint argument;
  float value, result;
  float factors[2][2], sums[2];  // of a matrix product: two elements of each
};

extern "C" Place runtime_place;
Place runtime_place;
static Fiber fibers[MAX_THREADS];
static Fiber* current;
static void* scheduler_sp;
static char* stacks;
static void* kernel_buffers[64];
static const Launch* launch;
static uint surroundings;  // another byte: what threadgroup arrays hold, and all around them and the buffers
static sigjmp_buf escape;

static struct {
  const char* name;
  size_t offset, bytes;
} arrays[MAX_ARRAYS];
static size_t arrays_end;
constexpr size_t ARENA = THREADGROUP_LIMIT + MAX_ARRAYS * 2 * RED_ZONE;  // a multiple of any page's size
static uint8_t* arena;
static size_t arrays_bytes;

[[noreturn]] static void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  vsnprintf(launch->message, launch->message_bytes, format, arguments);
  va_end(arguments);
  siglongjmp(escape, 1);
}

static void stop(State state) {
  current->state = state;
  runtime_switch(&current->sp, scheduler_sp);
}

static void fiber_main() {
  launch->kernel(kernel_buffers);
  stop(DONE);
  __builtin_trap();
}

static void prepare(uint index) {
  // Both counts are even, so the stack pointer is where each ABI wants it when fiber_main begins.
  char* top = stacks + (index + 1) * STACK;
  void** frame = reinterpret_cast<void**>(top) - (SAVED_WORDS + 4);
  memset(frame, 0, sizeof(void*) * (SAVED_WORDS + 4));
  frame[RETURN_WORD] = reinterpret_cast<void*>(&fiber_main);
  fibers[index].sp = frame;
  fibers[index].state = READY;
}

// ---- simd operations, barriers, threadgroup arrays: called by the kernel ------------------------------------------

extern "C" float runtime_simd(int op, float x, uint argument, int line) {
  Fiber* self = current;
  self->op = op;
  self->value = x;
  self->argument = argument;
  self->line = line;
  stop(AT_SIMD);
  return self->result;
}

extern "C" void runtime_simd_barrier(int line) { runtime_simd(SIMD_BARRIER, 0, 0, line); }

extern "C" void runtime_matrix(float* d, const float* a, const float* b, const float* c, int line) {
  memcpy(current->factors[0], a, sizeof(current->factors[0]));
  memcpy(current->factors[1], b, sizeof(current->factors[1]));
  memcpy(current->sums, c, sizeof(current->sums));
  Fiber* self = current;
  runtime_simd(SIMD_MATRIX, 0, 0, line);
  memcpy(d, self->sums, sizeof(self->sums));
}

extern "C" void runtime_barrier(int line) {
  current->line = line;
  stop(AT_BARRIER);
}

extern "C" void* runtime_threadgroup_array(uint slot, size_t bytes, const char* name) {
  if (slot >= MAX_ARRAYS) {
    fail("more than %u threadgroup arrays", MAX_ARRAYS);
  }
  auto& array = arrays[slot];
  if (array.name == nullptr) {
    arrays_bytes += (bytes + 15) / 16 * 16;
    if (arrays_bytes > THREADGROUP_LIMIT) {
      fail("threadgroup arrays take %zu bytes with `%s`: more than %zu", arrays_bytes, name, THREADGROUP_LIMIT);
    }
    array = {name, arrays_end + RED_ZONE, bytes};
    arrays_end = (array.offset + bytes + RED_ZONE + 15) / 16 * 16;
  }
  return arena + array.offset;
}

extern "C" void runtime_misaligned(int line) {
  fail("line %d: a pointer cast to a wider type is not aligned to it, in thread %u", line, runtime_place.thread_index);
}

extern "C" float runtime_exp(float x) { return expf(x); }
extern "C" float runtime_exp2(float x) { return exp2f(x); }
extern "C" float runtime_log(float x) { return logf(x); }
extern "C" float runtime_log2(float x) { return log2f(x); }
extern "C" float runtime_pow(float x, float y) { return powf(x, y); }
extern "C" float runtime_cos(float x) { return cosf(x); }
extern "C" float runtime_sin(float x) { return sinf(x); }

// ---- the scheduler ------------------------------------------------------------------------------------------------

static uint matrix_row(uint lane) { return (lane / 4 & 4) + lane / 2 % 4; }
static uint matrix_column(uint lane) { return (lane / 4 & 2) * 2 + lane % 2 * 2; }

static void matrix_product(Fiber* lanes) {
  float a[8][8], b[8][8];
  for (uint i = 0; i < LANES; i++) {
    memcpy(&a[matrix_row(i)][matrix_column(i)], lanes[i].factors[0], sizeof(lanes[i].factors[0]));
    memcpy(&b[matrix_row(i)][matrix_column(i)], lanes[i].factors[1], sizeof(lanes[i].factors[1]));
  }
  for (uint i = 0; i < LANES; i++) {
    for (uint e = 0; e < 2; e++) {
      for (uint k = 0; k < 8; k++) {
        lanes[i].sums[e] += a[matrix_row(i)][k] * b[k][matrix_column(i) + e];
      }
    }
  }
}

static void simd_results(Fiber* lanes) {
  const int op = lanes[0].op;
  if (op == SIMD_MATRIX) {
    matrix_product(lanes);
    return;
  }
  float sums[LANES];
  for (uint i = 0; i < LANES; i++) {
    sums[i] = lanes[i].value;
  }
  if (op == SIMD_SUM || op == SIMD_MAX) {
    for (uint step = LANES / 2; step > 0; step /= 2) {
      for (uint i = 0; i < step; i++) {
        sums[i] = op == SIMD_SUM ? sums[i] + sums[i + step] : fmaxf(sums[i], sums[i + step]);
      }
    }
  }
  for (uint i = 0; i < LANES; i++) {
    uint from = i;
    const uint argument = lanes[i].argument;
    switch (op) {
      case SIMD_SUM:
      case SIMD_MAX:
        lanes[i].result = sums[0];
        continue;
      case SIMD_BROADCAST:
      case SIMD_SHUFFLE_UP:
      case SIMD_SHUFFLE_DOWN:
        if (argument != lanes[0].argument) {
          fail("line %d: %s with another second argument in lane %u than in lane 0", lanes[i].line, op_names[op], i);
        }
        from = op == SIMD_BROADCAST ? argument : op == SIMD_SHUFFLE_UP ? i - argument : i + argument;
        break;
      case SIMD_SHUFFLE:
        from = argument;
        break;
      case SIMD_SHUFFLE_XOR:
        from = i ^ argument;
        break;
    }
    if (from < LANES) {
      lanes[i].result = lanes[from].value;
    } else if (op == SIMD_SHUFFLE_UP || op == SIMD_SHUFFLE_DOWN) {
      lanes[i].result = NAN;  // no lane there: what CUDA and Metal give must not be used
    } else {
      fail("line %d: %s reads lane %u of %u", lanes[i].line, op_names[op], from, LANES);
    }
  }
}

static void run_simdgroup(uint simdgroup) {
  Fiber* lanes = fibers + simdgroup * LANES;
  for (;;) {
    uint mask = 0;
    int first = -1;
    for (uint i = 0; i < LANES; i++) {
      const uint lane = launch->reverse ? LANES - 1 - i : i;
      if (lanes[lane].state == READY) {
        current = lanes + lane;
        runtime_place.thread_index = simdgroup * LANES + lane;
        runtime_switch(&scheduler_sp, current->sp);
      }
    }
    for (uint lane = 0; lane < LANES; lane++) {
      if (lanes[lane].state == AT_SIMD) {
        first = first < 0 ? static_cast<int>(lane) : first;
        if (lanes[lane].line == lanes[first].line && lanes[lane].op == lanes[first].op) {
          mask |= 1u << lane;
        }
      }
    }
    if (first < 0) {
      return;
    }
    if (mask != 0xffffffffu) {
      fail("line %d: %s is reached by %d of 32 lanes (mask %08x) of simdgroup %u in threadgroup (%u, %u, %u)",
           lanes[first].line, op_names[lanes[first].op], __builtin_popcount(mask), mask, simdgroup,
           runtime_place.group[0], runtime_place.group[1], runtime_place.group[2]);
    }
    simd_results(lanes);
    for (uint lane = 0; lane < LANES; lane++) {
      lanes[lane].state = READY;
    }
  }
}

static void run_threadgroup() {
  const uint threads = launch->threads, simdgroups = threads / LANES;
  memset(arena, static_cast<int>(surroundings), ARENA);
  for (uint i = 0; i < threads; i++) {
    prepare(i);
  }
  for (;;) {
    for (uint i = 0; i < simdgroups; i++) {
      run_simdgroup(launch->reverse ? simdgroups - 1 - i : i);
    }
    uint waiting = 0;
    int line = 0, other = 0;
    for (uint i = 0; i < threads; i++) {
      if (fibers[i].state == AT_BARRIER) {
        line = waiting == 0 ? fibers[i].line : line;
        other = fibers[i].line != line ? fibers[i].line : other;
        waiting++;
      }
    }
    if (waiting == 0) {
      break;
    }
    if (waiting < threads) {
      fail("line %d: the barrier is reached by %u of %u threads of threadgroup (%u, %u, %u)", line, waiting, threads,
           runtime_place.group[0], runtime_place.group[1], runtime_place.group[2]);
    }
    if (other != 0) {
      fail("line %d: threads wait here while others wait at the barrier of line %d", line, other);
    }
    for (uint i = 0; i < threads; i++) {
      fibers[i].state = READY;
    }
  }
  // What lies between the arrays must still be poison.
  size_t start = 0;
  for (uint slot = 0; slot <= MAX_ARRAYS; slot++) {
    const bool last = slot == MAX_ARRAYS;
    if (!last && arrays[slot].name == nullptr) {
      continue;
    }
    const size_t end = last ? ARENA : arrays[slot].offset;
    if (arena[start] != surroundings || memcmp(arena + start, arena + start + 1, end - start - 1) != 0) {
      fail("a write outside of the threadgroup arrays, %s `%s`", last ? "after" : "before", arrays[last ? 0 : slot].name);
    }
    start = last ? end : arrays[slot].offset + arrays[slot].bytes;
  }
}

// ---- buffers between guard pages ----------------------------------------------------------------------------------

struct Region {
  char *base, *data;
  size_t reserved, writable;  // guard | page slack and data | guard
};
static Region regions[64];
static size_t page;

static void map_buffer(uint index) {
  const Buffer& buffer = launch->buffers[index];
  const size_t slots = (buffer.bytes + 15) / 16 * 16;  // the data's start stays aligned
  Region& region = regions[index];
  region.writable = (slots + 2 * page - 1) / page * page;
  region.reserved = region.writable + 2 * GUARD;
  region.base = static_cast<char*>(mmap(nullptr, region.reserved, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0));
  if (region.base == MAP_FAILED) {
    region.base = nullptr;
    fail("no memory for `%s`", buffer.name);
  }
  char* start = region.base + GUARD;
  mprotect(start, region.writable, PROT_READ | PROT_WRITE);
  region.data = start + region.writable - slots;
  memset(start, static_cast<int>(surroundings), region.writable);
  if (buffer.is_output) {
    memset(region.data, static_cast<int>(launch->poison), buffer.bytes);
  } else {
    memcpy(region.data, buffer.data, buffer.bytes);
    mprotect(start, region.writable, PROT_READ);
  }
  kernel_buffers[index] = region.data;
}

static void check_and_copy_out(uint index) {
  const Buffer& buffer = launch->buffers[index];
  Region& region = regions[index];
  if (!buffer.is_output) {
    return;
  }
  for (char* p = region.base + GUARD; p < region.base + GUARD + region.writable; p++) {
    if (p == region.data) {
      p += buffer.bytes;
      if (p == region.base + GUARD + region.writable) {
        break;
      }
    }
    if (static_cast<uint8_t>(*p) != surroundings) {
      fail("a write outside of `%s`: byte %ld of %ld", buffer.name, static_cast<long>(p - region.data),
           static_cast<long>(buffer.bytes));
    }
  }
  memcpy(buffer.data, region.data, buffer.bytes);
}

static void on_fault(int signal, siginfo_t* info, void*) {
  if (signal == SIGILL || signal == SIGTRAP) {
    fail("thread %u of threadgroup (%u, %u, %u): undefined behaviour: an index outside of a local or threadgroup "
         "array, an integer overflow, shift or division by 0",
         runtime_place.thread_index, runtime_place.group[0], runtime_place.group[1], runtime_place.group[2]);
  }
  const char* address = static_cast<const char*>(info->si_addr);
  for (uint i = 0; i < launch->n_buffers; i++) {
    const Region& region = regions[i];
    if (region.base != nullptr && address >= region.base && address < region.base + region.reserved) {
      const long offset = static_cast<long>(address - region.data), bytes = static_cast<long>(launch->buffers[i].bytes);
      if (offset >= 0 && offset < bytes) {
        fail("a write to the input `%s`", launch->buffers[i].name);
      }
      fail("out of bounds: byte %ld of `%s`, which has %ld", offset, launch->buffers[i].name, bytes);
    }
  }
  if (address >= stacks && address < stacks + MAX_THREADS * STACK) {
    fail("a thread's local arrays do not fit its stack of %zu bytes", STACK);
  }
  const auto* byte = reinterpret_cast<const uint8_t*>(address);
  if (byte >= arena - GUARD && byte < arena + ARENA + GUARD) {
    fail("out of bounds of the threadgroup arrays");
  }
  fail("out of bounds: an address that belongs to no buffer");
}

static bool map_memory() {
  void* memory = mmap(nullptr, MAX_THREADS * STACK, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
  void* shared = mmap(nullptr, ARENA + 2 * GUARD, PROT_NONE, MAP_PRIVATE | MAP_ANON, -1, 0);
  if (memory == MAP_FAILED || shared == MAP_FAILED) {
    return false;
  }
  stacks = static_cast<char*>(memory);
  for (uint i = 0; i < MAX_THREADS; i++) {
    mprotect(stacks + i * STACK, page, PROT_NONE);
  }
  arena = static_cast<uint8_t*>(shared) + GUARD;
  return mprotect(arena, ARENA, PROT_READ | PROT_WRITE) == 0;
}

extern "C" int runtime_run(const Launch* request) {
  static const int signals[] = {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP};
  constexpr int n_signals = sizeof(signals) / sizeof(signals[0]);
  struct sigaction action = {}, before[n_signals];
  alignas(16) static char handler_stack[64 * 1024];
  stack_t alternate = {}, alternate_before;

  launch = request;
  surroundings = request->poison ^ 1;
  page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
  if (stacks == nullptr && !map_memory()) {
    snprintf(request->message, request->message_bytes, "no memory for the threads' stacks");
    return 1;
  }
  memset(arrays, 0, sizeof(arrays));
  memset(regions, 0, sizeof(regions));
  arrays_end = arrays_bytes = 0;

  alternate.ss_sp = handler_stack;
  alternate.ss_size = sizeof(handler_stack);
  sigaltstack(&alternate, &alternate_before);
  action.sa_sigaction = on_fault;
  action.sa_flags = SA_SIGINFO | SA_ONSTACK;
  sigemptyset(&action.sa_mask);
  for (int i = 0; i < n_signals; i++) {
    sigaction(signals[i], &action, &before[i]);
  }

  const int failed = sigsetjmp(escape, 1);
  if (!failed) {
    for (uint i = 0; i < launch->n_buffers; i++) {
      map_buffer(i);
    }
    const uint* count = launch->group_count;
    const uint64_t total = static_cast<uint64_t>(count[0]) * count[1] * count[2];
    runtime_place.threads = launch->threads;
    runtime_place.simdgroups = launch->threads / LANES;
    memcpy(runtime_place.group_count, count, sizeof(runtime_place.group_count));
    for (uint64_t i = 0; i < total; i++) {
      const uint64_t group = launch->reverse ? total - 1 - i : i;
      runtime_place.group[0] = group % count[0];
      runtime_place.group[1] = group / count[0] % count[1];
      runtime_place.group[2] = group / count[0] / count[1];
      run_threadgroup();
    }
    for (uint i = 0; i < launch->n_buffers; i++) {
      check_and_copy_out(i);
    }
  }

  for (int i = 0; i < n_signals; i++) {
    sigaction(signals[i], &before[i], nullptr);
  }
  sigaltstack(&alternate_before, nullptr);
  for (uint i = 0; i < launch->n_buffers; i++) {
    if (regions[i].base != nullptr) {
      munmap(regions[i].base, regions[i].reserved);
    }
  }
  return failed;
}
