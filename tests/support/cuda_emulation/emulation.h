#pragma once

// Executes CUDA kernel sources on the CPU: a kernel source compiled with g++ -x c++ -std=c++20 includes this
// header in place of the CUDA runtime and is started with emulation::launch. The blocks of a grid run one
// after another; every CUDA thread of a block is a fibre with a stack of its own, switched at barriers and
// warp operations only. The toolkit's headers supply the types; libcudart is not needed.
//
// Environment:
//   LF_EMULATION_ORDER         forward (default), reverse or random: the order in which blocks, and the
//   threads that can go on, are
//                              visited. A kernel that lacks a barrier gives different results in different
//                              orders.
//   LF_EMULATION_SHARED_BYTES  the most shared memory a block may ask for (default 232448).

#include <cuda_runtime.h>

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstdarg>
#include <cstddef>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string_view>
#include <type_traits>
#include <unordered_map>
#include <vector>

#if !defined(__x86_64__) || defined(LF_EMULATION_UCONTEXT)
#include <ucontext.h>
#define LF_EMULATION_USES_UCONTEXT 1
#endif

#if defined(__SANITIZE_ADDRESS__)
#define LF_EMULATION_ASAN 1
#elif defined(__has_feature)
#if __has_feature(address_sanitizer)
#define LF_EMULATION_ASAN 1
#endif
#endif
#ifdef LF_EMULATION_ASAN
#include <sanitizer/common_interface_defs.h>
#endif

#ifndef __global__
#define __global__
#endif
#ifndef __device__
#define __device__
#endif
#ifndef __host__
#define __host__
#endif
#ifndef __constant__
#define __constant__
#endif
#ifndef __forceinline__
#define __forceinline__ inline
#endif
#ifndef __launch_bounds__
#define __launch_bounds__(...)
#endif
#ifndef __align__
#define __align__(n) __attribute__((aligned(n)))
#endif
// Empty, because standard headers write __attribute__((__noinline__)).
#ifndef __noinline__
#define __noinline__
#endif
// The toolkit's host headers leave it empty, which would give every thread a copy. One block runs at a time,
// so static storage serves; unlike dynamic shared memory it keeps what the block before left there.
#undef __shared__
#define __shared__ static

// Hidden, so that each shared library has functions and a state of its own, whatever else the process has
// loaded.
#pragma GCC visibility push(hidden)

namespace emulation {

namespace detail {

inline constexpr unsigned warp_lanes = 32;
inline constexpr unsigned max_threads = 1024;
inline constexpr unsigned max_warps = max_threads / warp_lanes;
inline constexpr unsigned full_mask = 0xffffffffu;
inline constexpr std::size_t stack_bytes = 256 * 1024;
inline constexpr std::size_t guard_bytes = 4096;
inline constexpr std::size_t shared_alignment = 128;
inline constexpr std::size_t shared_bytes_without_opt_in = 48 * 1024;

inline uint3 thread_index{};
inline uint3 block_index{};
inline dim3 block_shape{};
inline dim3 grid_shape{};

[[noreturn, gnu::format(printf, 1, 2)]] inline void fail(const char* format, ...) {
  std::va_list arguments;
  va_start(arguments, format);
  std::fputs("emulation: ", stderr);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  std::fflush(stderr);
  va_end(arguments);
  std::abort();
}

#ifdef LF_EMULATION_USES_UCONTEXT

using Context = ucontext_t;

inline void switch_context(Context& from, Context& to) { swapcontext(&from, &to); }

inline void prepare_context(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = bytes;
  context.uc_link = nullptr;
  makecontext(&context, entry, 0);
}

#else

struct Context {
  void* stack_pointer = nullptr;
};

#ifdef __clang__
#define LF_EMULATION_OPAQUE gnu::noinline
#else
#define LF_EMULATION_OPAQUE gnu::noipa
#endif

// Opaque to the optimiser, which must not conclude from the few instructions here that a call leaves other
// registers and memory as they were.
[[gnu::naked, LF_EMULATION_OPAQUE]] inline void switch_stack(void** /* save */, void* /* load */) {
  asm("pushq %rbp\n\t"
      "pushq %rbx\n\t"
      "pushq %r12\n\t"
      "pushq %r13\n\t"
      "pushq %r14\n\t"
      "pushq %r15\n\t"
      "movq %rsp, (%rdi)\n\t"
      "movq %rsi, %rsp\n\t"
      "popq %r15\n\t"
      "popq %r14\n\t"
      "popq %r13\n\t"
      "popq %r12\n\t"
      "popq %rbx\n\t"
      "popq %rbp\n\t"
      "popq %rcx\n\t"
      "jmp *%rcx");
}

#undef LF_EMULATION_OPAQUE

inline void switch_context(Context& from, Context& to) {
  switch_stack(&from.stack_pointer, to.stack_pointer);
}

inline void prepare_context(Context& context, unsigned char* stack, std::size_t bytes, void (*entry)()) {
  // As switch_stack leaves it: six registers, where to go on, and a null return address, which ends a
  // backtrace.
  auto* top = reinterpret_cast<std::uintptr_t*>(stack + bytes);
  auto* pointer = top - 8;
  std::fill(pointer, top, 0);
  pointer[6] = reinterpret_cast<std::uintptr_t>(entry);
  context.stack_pointer = pointer;
}

#endif

enum class State : unsigned char { ready, at_block_barrier, at_warp_operation, finished };

enum class Operation : unsigned char { syncwarp, shfl, shfl_xor, shfl_down, shfl_up, ballot, any, all };

inline const char* name(Operation operation) {
  constexpr const char* names[] = {"__syncwarp",     "__shfl_sync",   "__shfl_xor_sync", "__shfl_down_sync",
                                   "__shfl_up_sync", "__ballot_sync", "__any_sync",      "__all_sync"};
  return names[static_cast<int>(operation)];
}

struct Fibre {
  Context context;
  unsigned char* stack = nullptr;
  void* fake_stack = nullptr;
  uint3 thread{};
  unsigned rank = 0;
  State state = State::finished;

  Fibre() = default;
  Fibre(const Fibre&) = delete;
  Fibre& operator=(const Fibre&) = delete;
  ~Fibre() {
    if (stack) munmap(mapping(), page_bytes() + stack_bytes);
  }

  static std::size_t page_bytes() { return static_cast<std::size_t>(sysconf(_SC_PAGESIZE)); }
  void* mapping() const { return stack - page_bytes(); }

  void create(unsigned own_rank, void (*entry)()) {
    const std::size_t page = page_bytes();
    void* memory = mmap(nullptr, page + stack_bytes, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) fail("no memory for the stack of thread %u", own_rank);
    mprotect(memory, page, PROT_NONE);  // a stack that overflows ends in a fault, not in its neighbour
    stack = static_cast<unsigned char*>(memory) + page;
    rank = own_rank;
    // Staggered, or the tops of all stacks would compete for the same few cache sets.
    prepare_context(context, stack, stack_bytes - rank % 16 * 256, entry);
  }
};

// Values are exchanged through two buffers in turn: a lane can write a buffer again only after an operation
// that all lanes reached, and so after all lanes have read it.
struct Warp {
  unsigned existing = 0;
  unsigned alive = 0;
  unsigned waiting = 0;
  unsigned phase = 0;
  Operation operation = Operation::syncwarp;
  std::array<unsigned, 2> participants{};
  std::array<std::array<std::uint64_t, warp_lanes>, 2> values{};
};

class Visits {
 public:
  Visits() {
    const char* setting = std::getenv("LF_EMULATION_ORDER");
    const std::string_view order = setting && *setting ? setting : "forward";
    reverse_ = order == "reverse";
    random_ = order == "random";
    if (!reverse_ && !random_ && order != "forward")
      fail("LF_EMULATION_ORDER=%s is not forward, reverse or random", setting);
  }

  std::vector<unsigned> sequence(std::size_t count) const {
    std::vector<unsigned> result(count);
    std::iota(result.begin(), result.end(), 0u);
    if (reverse_) std::reverse(result.begin(), result.end());
    return result;
  }

  void next_round(std::vector<unsigned>& sequence) {
    if (random_) std::shuffle(sequence.begin(), sequence.end(), generator_);
  }

 private:
  bool reverse_;
  bool random_;
  std::mt19937 generator_{20240229};
};

struct Engine {
  std::mutex mutex;
  std::array<Fibre, max_threads> fibres;
  std::array<Warp, max_warps> warps;
  Context scheduler;
  Fibre* current = nullptr;
  void (*body)(void*) = nullptr;
  void* argument = nullptr;
  unsigned threads = 0;
  unsigned at_block_barrier = 0;
  unsigned finished = 0;
  std::vector<unsigned char> shared_storage;
  unsigned char* shared = nullptr;
  std::size_t shared_bytes = 0;
  std::unordered_map<const void*, std::size_t> granted_shared_bytes;
  long launches = 0;
  long attribute_calls = 0;
  void* scheduler_fake_stack = nullptr;
  const void* scheduler_stack = nullptr;
  std::size_t scheduler_stack_bytes = 0;
};

inline Engine engine;
inline thread_local bool launching = false;

inline Fibre& current_fibre(const char* caller) {
  if (!engine.current) fail("%s outside a kernel", caller);
  return *engine.current;
}

[[noreturn]] inline void diverged() {
  unsigned ready = 0, at_operation = 0;
  const Fibre* example = nullptr;
  for (unsigned rank = 0; rank < engine.threads; ++rank) {
    const Fibre& fibre = engine.fibres[rank];
    ready += fibre.state == State::ready;
    if (fibre.state == State::at_warp_operation) {
      ++at_operation;
      example = &fibre;
    }
  }
  const char* operation =
      example ? name(engine.warps[example->rank / warp_lanes].operation) : "a warp operation";
  fail(
      "barrier diverged in block (%u, %u, %u): of %u threads %u have finished, %u wait at __syncthreads, %u "
      "wait at %s, %u are on "
      "their way",
      block_index.x, block_index.y, block_index.z, engine.threads, engine.finished, engine.at_block_barrier,
      at_operation, operation, ready);
}

inline void resume(Fibre& fibre) {
  engine.current = &fibre;
  thread_index = fibre.thread;
#ifdef LF_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&engine.scheduler_fake_stack, fibre.stack, stack_bytes);
#endif
  switch_context(engine.scheduler, fibre.context);
#ifdef LF_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(engine.scheduler_fake_stack, nullptr, nullptr);
#endif
  engine.current = nullptr;
}

inline void suspend(Fibre& fibre) {
#ifdef LF_EMULATION_ASAN
  __sanitizer_start_switch_fiber(&fibre.fake_stack, engine.scheduler_stack, engine.scheduler_stack_bytes);
#endif
  switch_context(fibre.context, engine.scheduler);
#ifdef LF_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(fibre.fake_stack, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
}

inline void release(Warp& warp) {
  Fibre* lanes = &engine.fibres[static_cast<std::size_t>(&warp - engine.warps.data()) * warp_lanes];
  for (unsigned left = warp.waiting; left; left &= left - 1)
    lanes[std::countr_zero(left)].state = State::ready;
  warp.participants[warp.phase % 2] = warp.waiting;
  warp.waiting = 0;
  ++warp.phase;
}

inline void finish(Fibre& fibre) {
  fibre.state = State::finished;
  ++engine.finished;
  if (engine.at_block_barrier) diverged();
  Warp& warp = engine.warps[fibre.rank / warp_lanes];
  warp.alive &= ~(1u << fibre.rank % warp_lanes);
  if (warp.waiting && warp.waiting == warp.alive) release(warp);
}

// A fibre outlives its kernel and takes the same rank in the next block.
[[noreturn]] inline void fibre_main() noexcept {
#ifdef LF_EMULATION_ASAN
  __sanitizer_finish_switch_fiber(nullptr, &engine.scheduler_stack, &engine.scheduler_stack_bytes);
#endif
  Fibre& self = *engine.current;
  for (;;) {
    engine.body(engine.argument);
    finish(self);
    suspend(self);
  }
}

inline void block_barrier() {
  Fibre& self = current_fibre("__syncthreads");
  self.state = State::at_block_barrier;
  ++engine.at_block_barrier;
  if (engine.finished) diverged();
  if (engine.at_block_barrier < engine.threads) return suspend(self);
  engine.at_block_barrier = 0;
  for (unsigned rank = 0; rank < engine.threads; ++rank) engine.fibres[rank].state = State::ready;
}

struct Exchange {
  const std::array<std::uint64_t, warp_lanes>& values;
  unsigned participants;
  unsigned lane;
};

// Waits for all lanes of the warp that are alive and shows each what the others brought.
inline Exchange exchange(Operation operation, unsigned mask, std::uint64_t value) {
  Fibre& self = current_fibre(name(operation));
  Warp& warp = engine.warps[self.rank / warp_lanes];
  const unsigned lane = self.rank % warp_lanes;
  if ((mask & warp.existing) != warp.existing)
    fail("%s with mask 0x%08x: only masks of the whole warp are known", name(operation), mask);
  if (warp.waiting && warp.operation != operation) {
    fail(
        "barrier diverged in block (%u, %u, %u): thread (%u, %u, %u) is at %s, other lanes of its warp at %s",
        block_index.x, block_index.y, block_index.z, self.thread.x, self.thread.y, self.thread.z,
        name(operation), name(warp.operation));
  }
  const unsigned buffer = warp.phase % 2;
  warp.operation = operation;
  warp.values[buffer][lane] = value;
  warp.waiting |= 1u << lane;
  self.state = State::at_warp_operation;
  if (warp.waiting == warp.alive) {
    release(warp);
  } else {
    suspend(self);
  }
  return {warp.values[buffer], warp.participants[buffer], lane};
}

inline unsigned ballot(Operation operation, unsigned mask, int predicate) {
  const Exchange result = exchange(operation, mask, predicate != 0);
  unsigned votes = 0;
  for (unsigned left = result.participants; left; left &= left - 1) {
    const int lane = std::countr_zero(left);
    votes |= static_cast<unsigned>(result.values[lane]) << lane;
  }
  return votes;
}

template <class T>
concept Shuffled = std::is_trivially_copyable_v<T> && sizeof(T) <= sizeof(std::uint64_t);

// source(lane, first, last) is the lane to read from, first and last being those of the lane's segment.
template <Shuffled T, class Source>
T shuffle(Operation operation, unsigned mask, const T& value, int width, Source source) {
  if (width < 1 || width > static_cast<int>(warp_lanes) || (width & (width - 1)))
    fail("%s with width %d", name(operation), width);
  std::uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  const Exchange result = exchange(operation, mask, bits);
  const unsigned first = result.lane & ~(static_cast<unsigned>(width) - 1);
  const unsigned from = source(result.lane, first, first + static_cast<unsigned>(width) - 1);
  // Undefined on the device; a NaN shows.
  bits = result.participants >> from & 1 ? result.values[from] : ~std::uint64_t{0};
  T received = value;
  std::memcpy(&received, &bits, sizeof(T));
  return received;
}

inline std::size_t max_shared_bytes() {
  const char* setting = std::getenv("LF_EMULATION_SHARED_BYTES");
  return setting && *setting ? std::strtoul(setting, nullptr, 10) : 232448;
}

// The guards hold a pattern that reads as NaN in every floating-point format, yet differs from unwritten
// shared memory.
inline unsigned char guard_value(const unsigned char* address) {
  return reinterpret_cast<std::uintptr_t>(address) % 2 ? 0xff : 0xfe;
}

inline void place_shared_memory(std::size_t bytes) {
  engine.shared_storage.resize(shared_alignment + guard_bytes + bytes + guard_bytes);
  void* start = engine.shared_storage.data() + guard_bytes;
  std::size_t space = bytes + shared_alignment;
  engine.shared = static_cast<unsigned char*>(std::align(shared_alignment, bytes, start, space));
  engine.shared_bytes = bytes;
  for (std::size_t i = 0; i < guard_bytes; ++i) {
    unsigned char* before = engine.shared - guard_bytes + i;
    unsigned char* behind = engine.shared + bytes + i;
    *before = guard_value(before);
    *behind = guard_value(behind);
  }
}

inline void check_guards() {
  const unsigned char* end = engine.shared + engine.shared_bytes;
  for (std::size_t i = 0; i < guard_bytes; ++i) {
    const unsigned char* before = engine.shared - 1 - i;
    const unsigned char* behind = end + i;
    const bool wrong_before = *before != guard_value(before);
    if (!wrong_before && *behind == guard_value(behind)) continue;
    fail("block (%u, %u, %u) wrote outside its %zu bytes of dynamic shared memory, %zu bytes %s",
         block_index.x, block_index.y, block_index.z, engine.shared_bytes, i + wrong_before,
         wrong_before ? "before the start" : "past the end");
  }
}

inline void run_block(Visits& visits, std::vector<unsigned>& sequence) {
  if (engine.shared_bytes) std::memset(engine.shared, 0xff, engine.shared_bytes);
  engine.finished = 0;
  for (unsigned rank = 0; rank < engine.threads; ++rank) engine.fibres[rank].state = State::ready;
  for (unsigned first = 0; first < engine.threads; first += warp_lanes) {
    Warp& warp = engine.warps[first / warp_lanes];
    warp.existing = full_mask >> (warp_lanes - std::min(warp_lanes, engine.threads - first));
    warp.alive = warp.existing;
  }
  while (engine.finished < engine.threads) {
    visits.next_round(sequence);
    bool progress = false;
    for (const unsigned rank : sequence) {
      if (engine.fibres[rank].state != State::ready) continue;
      resume(engine.fibres[rank]);
      progress = true;
    }
    if (!progress) diverged();
  }
  check_guards();
}

inline void run_grid(dim3 grid, dim3 block, std::size_t shared_bytes, const void* kernel, void (*body)(void*),
                     void* argument) {
  if (launching) fail("launch inside a kernel");
  const std::lock_guard lock(engine.mutex);
  const std::size_t threads = std::size_t{block.x} * block.y * block.z;
  if (threads == 0 || threads > max_threads || block.z > 64) {
    fail("cannot launch a block of (%u, %u, %u) threads", block.x, block.y, block.z);
  }
  const std::size_t blocks = std::size_t{grid.x} * grid.y * grid.z;
  if (blocks == 0 || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    fail("cannot launch a grid of (%u, %u, %u) blocks", grid.x, grid.y, grid.z);
  }
  if (shared_bytes > max_shared_bytes()) {
    fail("cannot launch with %zu bytes of shared memory, there are %zu", shared_bytes, max_shared_bytes());
  }
  if (kernel && shared_bytes > shared_bytes_without_opt_in) {
    const auto granted = engine.granted_shared_bytes.find(kernel);
    if (granted == engine.granted_shared_bytes.end() || granted->second < shared_bytes) {
      fail(
          "cannot launch with %zu bytes of shared memory without cudaFuncAttributeMaxDynamicSharedMemorySize",
          shared_bytes);
    }
  }

  launching = true;
  ++engine.launches;
  Visits visits;
  engine.body = body;
  engine.argument = argument;
  engine.threads = static_cast<unsigned>(threads);
  grid_shape = grid;
  block_shape = block;
  for (unsigned rank = 0; rank < engine.threads; ++rank) {
    Fibre& fibre = engine.fibres[rank];
    if (!fibre.stack) fibre.create(rank, fibre_main);
    fibre.thread = {rank % block.x, rank / block.x % block.y, rank / block.x / block.y};
  }
  place_shared_memory(shared_bytes);

  std::vector<unsigned> thread_sequence = visits.sequence(threads);
  std::vector<unsigned> block_sequence = visits.sequence(blocks);
  visits.next_round(block_sequence);
  for (const unsigned index : block_sequence) {
    block_index = {index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y};
    run_block(visits, thread_sequence);
  }
  launching = false;
}

inline cudaError_t grant_shared_bytes(const void* kernel, cudaFuncAttribute attribute, int bytes) {
  if (attribute != cudaFuncAttributeMaxDynamicSharedMemorySize) return cudaSuccess;
  if (bytes < 0 || static_cast<std::size_t>(bytes) > max_shared_bytes()) return cudaErrorInvalidValue;
  const std::lock_guard lock(engine.mutex);
  ++engine.attribute_calls;
  engine.granted_shared_bytes[kernel] = static_cast<std::size_t>(bytes);
  return cudaSuccess;
}

}  // namespace detail

// Runs kernel(args...) for the whole grid and returns when it is done. Every thread gets copies of the
// arguments.
template <class Kernel, class... Args>
void launch(Kernel kernel, dim3 grid, dim3 block, std::size_t shared_bytes, Args... args) {
  const void* identity = nullptr;
  if constexpr (std::is_pointer_v<Kernel>) identity = reinterpret_cast<const void*>(kernel);
  auto call = [&] { kernel(args...); };
  detail::run_grid(
      grid, block, shared_bytes, identity,
      [](void* argument) { (*static_cast<decltype(call)*>(argument))(); }, &call);
}

// The dynamic shared memory of the running block, aligned to 128 bytes; all bytes are 0xff when the block
// starts.
inline unsigned char* shared_memory() { return detail::engine.shared; }

}  // namespace emulation

// What the process has asked of the runtime so far, for tests that load the library.
extern "C" {
[[gnu::used, gnu::visibility("default")]] inline long lf_emulation_launches() {
  return emulation::detail::engine.launches;
}
[[gnu::used, gnu::visibility("default")]] inline long lf_emulation_attribute_calls() {
  return emulation::detail::engine.attribute_calls;
}
}

inline constexpr const uint3& threadIdx = emulation::detail::thread_index;
inline constexpr const uint3& blockIdx = emulation::detail::block_index;
inline constexpr const dim3& blockDim = emulation::detail::block_shape;
inline constexpr const dim3& gridDim = emulation::detail::grid_shape;
inline constexpr int warpSize = static_cast<int>(emulation::detail::warp_lanes);

inline void __syncthreads() { emulation::detail::block_barrier(); }

inline void __syncwarp(unsigned mask = emulation::detail::full_mask) {
  emulation::detail::exchange(emulation::detail::Operation::syncwarp, mask, 0);
}

template <emulation::detail::Shuffled T>
T __shfl_sync(unsigned mask, T value, int source, int width = warpSize) {
  return emulation::detail::shuffle(
      emulation::detail::Operation::shfl, mask, value, width,
      [=](unsigned, unsigned first, unsigned) { return first + (source & (width - 1)); });
}

template <emulation::detail::Shuffled T>
T __shfl_xor_sync(unsigned mask, T value, int lane_mask, int width = warpSize) {
  return emulation::detail::shuffle(emulation::detail::Operation::shfl_xor, mask, value, width,
                                    [=](unsigned lane, unsigned, unsigned last) {
                                      const unsigned from = lane ^ static_cast<unsigned>(lane_mask);
                                      return from <= last ? from : lane;
                                    });
}

template <emulation::detail::Shuffled T>
T __shfl_down_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return emulation::detail::shuffle(
      emulation::detail::Operation::shfl_down, mask, value, width,
      [=](unsigned lane, unsigned, unsigned last) { return delta <= last - lane ? lane + delta : lane; });
}

template <emulation::detail::Shuffled T>
T __shfl_up_sync(unsigned mask, T value, unsigned delta, int width = warpSize) {
  return emulation::detail::shuffle(
      emulation::detail::Operation::shfl_up, mask, value, width,
      [=](unsigned lane, unsigned first, unsigned) { return delta <= lane - first ? lane - delta : lane; });
}

inline unsigned __ballot_sync(unsigned mask, int predicate) {
  return emulation::detail::ballot(emulation::detail::Operation::ballot, mask, predicate);
}

inline int __any_sync(unsigned mask, int predicate) {
  return emulation::detail::ballot(emulation::detail::Operation::any, mask, predicate) != 0;
}

inline int __all_sync(unsigned mask, int predicate) {
  return emulation::detail::ballot(emulation::detail::Operation::all, mask, !predicate) == 0;
}

template <class T>
T __ldg(const T* address) {
  return *address;
}

// glibc declares a __expf without exporting it; noexcept as there.
[[gnu::visibility("hidden")]] inline float __expf(float x) noexcept { return std::exp(x); }

// glibc has these from 2.42 on.
#if !defined(__GLIBC_PREREQ)
#define LF_EMULATION_DEFINES_RSQRT 1
#elif !__GLIBC_PREREQ(2, 42)
#define LF_EMULATION_DEFINES_RSQRT 1
#endif
#ifdef LF_EMULATION_DEFINES_RSQRT
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline double rsqrt(double x) { return 1.0 / std::sqrt(x); }
#endif
inline float rsqrt(float x) { return 1.0f / std::sqrt(x); }

inline float __fdividef(float x, float y) { return x / y; }
inline float __fmaf_rn(float x, float y, float z) { return std::fma(x, y, z); }
inline float __saturatef(float x) { return std::fmin(std::fmax(x, 0.0f), 1.0f); }

// Kept from being contracted into a fused multiply-add, as on the device.
inline float __fmul_rn(float x, float y) {
  volatile float product = x * y;
  return product;
}
inline float __fadd_rn(float x, float y) {
  volatile float left = x, right = y;
  return left + right;
}

inline int __float_as_int(float x) { return std::bit_cast<int>(x); }
inline float __int_as_float(int x) { return std::bit_cast<float>(x); }
inline unsigned __float_as_uint(float x) { return std::bit_cast<unsigned>(x); }
inline float __uint_as_float(unsigned x) { return std::bit_cast<float>(x); }
inline long long __double_as_longlong(double x) { return std::bit_cast<long long>(x); }
inline double __longlong_as_double(long long x) { return std::bit_cast<double>(x); }

// The overloads of the device: what is ambiguous there is ambiguous here.
#define LF_EMULATION_MIN_MAX(Result, First, Second)                  \
  constexpr Result min(First a, Second b) {                          \
    return std::min(static_cast<Result>(a), static_cast<Result>(b)); \
  }                                                                  \
  constexpr Result max(First a, Second b) { return std::max(static_cast<Result>(a), static_cast<Result>(b)); }
#define LF_EMULATION_MIN_MAX_SIGNED_AND_UNSIGNED(Integer)                    \
  LF_EMULATION_MIN_MAX(Integer, Integer, Integer)                            \
  LF_EMULATION_MIN_MAX(unsigned Integer, unsigned Integer, unsigned Integer) \
  LF_EMULATION_MIN_MAX(unsigned Integer, unsigned Integer, Integer)          \
  LF_EMULATION_MIN_MAX(unsigned Integer, Integer, unsigned Integer)
LF_EMULATION_MIN_MAX_SIGNED_AND_UNSIGNED(int)
LF_EMULATION_MIN_MAX_SIGNED_AND_UNSIGNED(long)
LF_EMULATION_MIN_MAX_SIGNED_AND_UNSIGNED(long long)
#undef LF_EMULATION_MIN_MAX_SIGNED_AND_UNSIGNED
#undef LF_EMULATION_MIN_MAX

inline float min(float a, float b) { return std::fmin(a, b); }
inline float max(float a, float b) { return std::fmax(a, b); }
inline double min(double a, double b) { return std::fmin(a, b); }
inline double max(double a, double b) { return std::fmax(a, b); }
inline double min(float a, double b) { return std::fmin(static_cast<double>(a), b); }
inline double max(float a, double b) { return std::fmax(static_cast<double>(a), b); }
inline double min(double a, float b) { return std::fmin(a, static_cast<double>(b)); }
inline double max(double a, float b) { return std::fmax(a, static_cast<double>(b)); }

// The runtime functions that cuda_runtime.h declares; hidden by attribute, as the pragma does not change what
// is declared already. A libcudart in the process is neither called nor replaced.
[[gnu::visibility("hidden")]] inline cudaError_t cudaGetLastError() { return cudaSuccess; }

[[gnu::visibility("hidden")]] inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "error of the emulated CUDA runtime";
}

[[gnu::visibility("hidden")]] inline cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}

[[gnu::visibility("hidden")]] inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute,
                                                                        int) {
  switch (attribute) {
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = static_cast<int>(emulation::detail::max_shared_bytes());
      break;
    case cudaDevAttrMaxSharedMemoryPerBlock:
      *value = static_cast<int>(emulation::detail::shared_bytes_without_opt_in);
      break;
    case cudaDevAttrMultiProcessorCount:
      *value = 4;
      break;
    case cudaDevAttrMaxThreadsPerBlock:
      *value = static_cast<int>(emulation::detail::max_threads);
      break;
    case cudaDevAttrWarpSize:
      *value = warpSize;
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaSuccess;
}

[[gnu::visibility("hidden")]] inline cudaError_t cudaFuncSetAttribute(const void* kernel,
                                                                      cudaFuncAttribute attribute,
                                                                      int value) {
  return emulation::detail::grant_shared_bytes(kernel, attribute, value);
}

template <class... Args>
inline cudaError_t cudaFuncSetAttribute(void (*kernel)(Args...), cudaFuncAttribute attribute, int value) {
  return emulation::detail::grant_shared_bytes(reinterpret_cast<const void*>(kernel), attribute, value);
}

#pragma GCC visibility pop
