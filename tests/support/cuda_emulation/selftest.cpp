// g++ -std=c++20 -O2 -I <toolkit>/include selftest.cpp -o selftest && ./selftest
// With -DSELFTEST_TOOLKIT_FIRST the toolkit's headers come before emulation.h, else after it.

#ifdef SELFTEST_TOOLKIT_FIRST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>
#endif
#include "emulation.h"
#ifndef SELFTEST_TOOLKIT_FIRST
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <vector_types.h>
#endif

#undef NDEBUG
#include <sys/wait.h>

#include <cassert>
#include <chrono>
#include <limits>
#include <string>
#include <thread>
#include <vector>

namespace {

constexpr unsigned full = 0xffffffffu;

void set_order(const char* order) { setenv("LF_EMULATION_ORDER", order, 1); }

// What the child process running `action` prints, having ended by abort.
template <class Action>
std::string message_of_abort(Action action) {
  int ends[2];
  assert(pipe(ends) == 0);
  std::fflush(nullptr);
  const pid_t child = fork();
  assert(child >= 0);
  if (child == 0) {
    dup2(ends[1], STDERR_FILENO);
    close(ends[0]);
    close(ends[1]);
    action();
    _exit(0);
  }
  close(ends[1]);
  std::string message;
  char buffer[512];
  for (ssize_t got; (got = read(ends[0], buffer, sizeof buffer)) > 0;)
    message.append(buffer, static_cast<std::size_t>(got));
  close(ends[0]);
  int status = 0;
  assert(waitpid(child, &status, 0) == child);
  if (!WIFSIGNALED(status) || WTERMSIG(status) != SIGABRT)
    std::fprintf(stderr, "no abort: %s\n", message.c_str());
  assert(WIFSIGNALED(status) && WTERMSIG(status) == SIGABRT);
  return message;
}

template <class Action>
void expect_abort(const char* expected, Action action) {
  const std::string message = message_of_abort(action);
  if (message.find(expected) == std::string::npos)
    std::fprintf(stderr, "expected '%s', got '%s'\n", expected, message.c_str());
  assert(message.find(expected) != std::string::npos);
}

__device__ __forceinline__ unsigned linear_thread() {
  return threadIdx.x + blockDim.x * (threadIdx.y + blockDim.y * threadIdx.z);
}

__device__ unsigned linear_block() { return blockIdx.x + gridDim.x * (blockIdx.y + gridDim.y * blockIdx.z); }

struct __align__(16) Packet {
  float values[4];
};

__global__ void __launch_bounds__(256, 2)
    write_indices(int* __restrict__ out, Packet packet, const void* null) {
  const unsigned threads = blockDim.x * blockDim.y * blockDim.z;
  const unsigned position = linear_block() * threads + linear_thread();
  packet.values[0] += 1.0f;  // a thread's own copy
  assert(packet.values[0] == 3.0f && null == nullptr && warpSize == 32);
  out[position] = static_cast<int>(position);
}

void test_indices() {
  const dim3 grid(3, 2, 4), block(5, 4, 3);
  std::vector<int> out(3 * 2 * 4 * 5 * 4 * 3, -1);
  emulation::launch(write_indices, grid, block, 0, out.data(), Packet{{2.0f}}, nullptr);
  for (std::size_t i = 0; i < out.size(); ++i) assert(out[i] == static_cast<int>(i));
}

// Every block must find its dynamic shared memory unwritten; threads then read each other's values.
__global__ void reverse_through_shared(float* out, int* fresh) {
  float* values = reinterpret_cast<float*>(emulation::shared_memory());
  assert(reinterpret_cast<std::uintptr_t>(values) % 128 == 0);
  const unsigned i = threadIdx.x, n = blockDim.x;
  fresh[blockIdx.x * n + i] = std::isnan(values[i]) && __float_as_uint(values[i]) == full;
  values[i] = static_cast<float>(i + blockIdx.x);
  __syncthreads();
  out[blockIdx.x * n + i] = values[n - 1 - i];
}

void test_dynamic_shared_memory() {
  for (const unsigned n : {1u, 37u, 256u, 1024u}) {
    std::vector<float> out(3 * n);
    std::vector<int> fresh(3 * n);
    emulation::launch(reverse_through_shared, 3, n, n * sizeof(float), out.data(), fresh.data());
    for (unsigned b = 0; b < 3; ++b) {
      for (unsigned i = 0; i < n; ++i) {
        assert(fresh[b * n + i]);
        assert(out[b * n + i] == static_cast<float>(n - 1 - i + b));
      }
    }
  }
}

template <class T>
__device__ __forceinline__ T warp_sum(T value) {
  for (int offset = 16; offset; offset /= 2) value += __shfl_xor_sync(full, value, offset);
  return value;
}

template <class T, int Threads>
__global__ void block_sum(const T* in, T* out) {
  __shared__ __align__(16) T partial[Threads / 32];
  const unsigned warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  for (int round = 0; round < 3; ++round) {
    const T sum = warp_sum(__ldg(in + blockIdx.x * Threads + threadIdx.x));
    if (lane == 0) partial[warp] = sum;
    __syncthreads();
    T total = 0;
    for (const T& value : partial) total += value;
    if (threadIdx.x == static_cast<unsigned>(round)) out[blockIdx.x * 3 + round] = total;
    __syncthreads();
  }
}

template <class T>
void test_block_sum() {
  constexpr int threads = 192;
  std::vector<T> in(5 * threads), out(5 * 3);
  for (std::size_t i = 0; i < in.size(); ++i) in[i] = static_cast<T>(i % 101);
  emulation::launch(block_sum<T, threads>, 5, threads, 0, in.data(), out.data());
  for (int b = 0; b < 5; ++b) {
    T expected = 0;
    for (int i = 0; i < threads; ++i) expected += in[b * threads + i];
    for (int round = 0; round < 3; ++round) assert(out[b * 3 + round] == expected);
  }
}

template <class T>
__global__ void shuffles(T base, int amount, int width, T* direct, T* exclusive, T* down, T* up) {
  const unsigned i = threadIdx.x;
  const T value = base + static_cast<T>(i);
  direct[i] = __shfl_sync(full, value, amount, width);
  exclusive[i] = __shfl_xor_sync(full, value, amount, width);
  down[i] = __shfl_down_sync(full, value, amount, width);
  up[i] = __shfl_up_sync(full, value, amount, width);
  // Without the width, a whole warp.
  assert(__shfl_sync(full, value, 31) == base + static_cast<T>(i | 31));
  assert(__shfl_xor_sync(full, value, 31) == base + static_cast<T>(i ^ 31));
  assert(__shfl_down_sync(full, value, 31) == base + static_cast<T>(i % 32 ? i : i + 31));
  assert(__shfl_up_sync(full, value, 31) == base + static_cast<T>(i % 32 == 31 ? i - 31 : i));
}

template <class T>
void test_shuffles(T base) {
  std::vector<T> direct(64), exclusive(64), down(64), up(64);
  for (int width = 1; width <= 32; width *= 2) {
    for (int amount = 0; amount < 32; ++amount) {
      emulation::launch(shuffles<T>, 1, 64, 0, base, amount, width, direct.data(), exclusive.data(),
                        down.data(), up.data());
      for (int i = 0; i < 64; ++i) {
        const int first = i / width * width, last = first + width - 1;
        assert(direct[i] == base + static_cast<T>(first + amount % width));
        assert(exclusive[i] == base + static_cast<T>((i ^ amount) <= last ? i ^ amount : i));
        assert(down[i] == base + static_cast<T>(i + amount <= last ? i + amount : i));
        assert(up[i] == base + static_cast<T>(i - amount >= first ? i - amount : i));
      }
    }
  }
}

__global__ void votes(unsigned* ballots, int* any, int* all, float* beyond) {
  const unsigned i = threadIdx.x;
  ballots[i] = __ballot_sync(full, i % 3 == 0 ? -5 : 0);
  any[i] = __any_sync(full, i == 40);
  all[i] = __all_sync(full, i < 40);
  __syncwarp();
  beyond[i] = __shfl_sync(full, 1.0f, 31);
}

void test_votes_and_partial_warp() {
  std::vector<unsigned> ballots(48);
  std::vector<int> any(48), all(48);
  std::vector<float> beyond(48);
  emulation::launch(votes, 1, 48, 0, ballots.data(), any.data(), all.data(), beyond.data());
  for (unsigned i = 0; i < 48; ++i) {
    unsigned expected = 0;
    for (unsigned other = i / 32 * 32; other < std::min(48u, i / 32 * 32 + 32); ++other)
      expected |= (other % 3 == 0) << other % 32;
    assert(ballots[i] == expected);
    assert(any[i] == (i >= 32));
    assert(all[i] == (i < 32));
    assert(i < 32 ? beyond[i] == 1.0f : std::isnan(beyond[i]));  // the second warp has no lane 31
  }
}

__global__ void leave_early(int* out) {
  const unsigned i = threadIdx.x;
  if (i % 4 == 3) return;
  out[i] = static_cast<int>(__ballot_sync(full, 1));
  if (i % 4 == 2) return;
  out[i] += __shfl_down_sync(full, 1, 1);
  __syncwarp();
}

void test_lanes_that_leave() {
  std::vector<int> out(64);
  emulation::launch(leave_early, 1, 64, 0, out.data());
  for (int i = 0; i < 64; ++i) {
    const int voted = static_cast<int>(0x77777777u);
    // Lanes 4n + 1 read from lanes that have left by then.
    const int expected[] = {voted + 1, voted - 1, voted, 0};
    assert(out[i] == expected[i % 4]);
  }
}

// Different values in flight, and only one barrier per operation.
__global__ void chained_shuffles(int* out) {
  int value = static_cast<int>(threadIdx.x);
  for (int step = 0; step < 100; ++step) value = __shfl_sync(full, value, static_cast<int>(threadIdx.x) + 1);
  out[threadIdx.x] = value;
}

void test_chained_shuffles() {
  std::vector<int> out(96);
  emulation::launch(chained_shuffles, 1, 96, 0, out.data());
  for (int i = 0; i < 96; ++i) assert(out[i] == i / 32 * 32 + (i + 100) % 32);
}

__global__ void device_math(int* done) {
  assert(std::abs(__expf(1.0f) - 2.7182818f) < 1e-5f);
  assert(__fdividef(1.0f, 4.0f) == 0.25f);
  assert(rsqrtf(4.0f) == 0.5f && rsqrt(16.0) == 0.25 && rsqrt(16.0f) == 0.25f);
  const float4 four{1.0f, 2.0f, 3.0f, 4.0f};
  assert(__ldg(&four).z == 3.0f);
  const float e = 1.0f + std::numeric_limits<float>::epsilon();
  assert(__fmaf_rn(e, e, -__fmul_rn(e, e)) != 0.0f && fmaf(2.0f, 3.0f, 1.0f) == 7.0f);
  assert(__fadd_rn(__fmul_rn(e, e), -__fmul_rn(e, e)) == 0.0f);
  assert(__saturatef(-1.0f) == 0.0f && __saturatef(2.0f) == 1.0f && __saturatef(0.5f) == 0.5f &&
         __saturatef(NAN) == 0.0f);
  assert(__float_as_int(1.0f) == 0x3f800000 && __int_as_float(0x3f800000) == 1.0f);
  assert(__float_as_uint(-1.0f) == 0xbf800000u && __uint_as_float(0xbf800000u) == -1.0f);
  assert(__double_as_longlong(1.0) == 0x3ff0000000000000 && __longlong_as_double(0x3ff0000000000000) == 1.0);
  static_assert(min(1, 2) == 1 && max(-1, 2u) == full && max(3ll, -4ll) == 3ll && min(7l, 5l) == 5l);
  assert(min(threadIdx.x, 4) == 0u && max(blockDim.x, 4) == 4u);
  static_assert(std::is_same_v<decltype(max(1, 2u)), unsigned> &&
                std::is_same_v<decltype(min(1.0f, 2.0)), double>);
  static_assert(std::is_same_v<decltype(max(1ll, 2ull)), unsigned long long>);
  assert(min(1.0f, 2.0f) == 1.0f && max(NAN, 2.0f) == 2.0f && max(1.0, 2.0f) == 2.0 && min(1.0f, 2.0) == 1.0);
  *done = 1;
}

__global__ void half_formats(const float4* in, __half* halves, __nv_bfloat16* bfloats, float2* back) {
  const unsigned i = threadIdx.x;
  const float4 value = in[i];
  halves[i] = __float2half(value.x + value.y);
  bfloats[i] = __float2bfloat16(value.z + value.w);
  const __half2 pair = __floats2half2_rn(value.x, value.y);
  assert(__low2float(pair) == value.x && __half2float(__high2half(pair)) == value.y);
  back[i] = float2{__half2float(halves[i]), __bfloat162float(bfloats[i])};
}

void test_math_and_types() {
  int done = 0;
  emulation::launch(device_math, 1, 1, 0, &done);
  assert(done == 1);
  static_assert(sizeof(float4) == 16 && alignof(float4) == 16 && sizeof(int4) == 16 && alignof(float2) == 8);
  std::vector<float4> in(32);
  std::vector<float2> back(32);
  std::vector<__half> halves(32);
  std::vector<__nv_bfloat16> bfloats(32);
  for (int i = 0; i < 32; ++i) in[i] = make_float4(i, 0.5f, -i, 0.25f);
  emulation::launch(half_formats, 1, 32, 0, in.data(), halves.data(), bfloats.data(), back.data());
  for (int i = 0; i < 32; ++i) {
    assert(back[i].x == i + 0.5f && back[i].y == -i + 0.25f);
    assert(static_cast<float>(halves[i]) == i + 0.5f);
  }
}

__global__ void fill_shared(unsigned bytes) {
  for (unsigned i = threadIdx.x; i < bytes; i += blockDim.x) emulation::shared_memory()[i] = 7;
}

void test_runtime_functions() {
  const cudaStream_t stream = nullptr;
  (void)stream;
  assert(cudaGetLastError() == cudaSuccess && std::string(cudaGetErrorString(cudaSuccess)) == "no error");
  int value = -1;
  assert(cudaGetDevice(&value) == cudaSuccess && value == 0);
  assert(cudaDeviceGetAttribute(&value, cudaDevAttrMultiProcessorCount, 0) == cudaSuccess && value == 4);
  assert(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess &&
         value == 232448);
  expect_abort("without cudaFuncAttributeMaxDynamicSharedMemorySize",
               [] { emulation::launch(fill_shared, 1, 32, 60000, 60000u); });
  assert(cudaFuncSetAttribute(fill_shared, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448) ==
         cudaSuccess);
  emulation::launch(fill_shared, 2, 32, 232448, 232448u);
  setenv("LF_EMULATION_SHARED_BYTES", "101376", 1);
  assert(cudaDeviceGetAttribute(&value, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0) == cudaSuccess &&
         value == 101376);
  const void* untyped = reinterpret_cast<const void*>(fill_shared);
  assert(cudaFuncSetAttribute(untyped, cudaFuncAttributeMaxDynamicSharedMemorySize, 232448) != cudaSuccess);
  expect_abort("232448 bytes of shared memory, there are 101376",
               [] { emulation::launch(fill_shared, 1, 32, 232448, 232448u); });
  unsetenv("LF_EMULATION_SHARED_BYTES");
  expect_abort("a block of (1025, 1, 1)", [] { emulation::launch(fill_shared, 1, 1025, 0, 0u); });
  expect_abort("a grid of (0, 1, 1)", [] { emulation::launch(fill_shared, 0, 32, 0, 0u); });
  expect_abort("__syncthreads outside a kernel", [] { __syncthreads(); });
}

template <bool Barrier>
__global__ void neighbours(int* out) {
  __shared__ int values[64];
  const unsigned i = threadIdx.x;
  values[i] = 0;
  __syncthreads();
  values[i] = static_cast<int>(i) + 1;
  if (Barrier) __syncthreads();
  out[i] = values[(i + 1) % 64] + values[(i + 63) % 64];
}

template <bool Barrier>
__global__ void neighbours_in_warp(int* out) {
  int* values = reinterpret_cast<int*>(emulation::shared_memory());
  const unsigned i = threadIdx.x;
  values[i] = static_cast<int>(i) + 1;
  if (Barrier) __syncwarp();
  out[i] = values[i ^ 1];
}

template <bool Barrier>
__global__ void reuse_too_early(int* out) {
  __shared__ int value;
  int sum = 0;
  for (int round = 0; round < 4; ++round) {
    if (threadIdx.x == 0) value = 1 << round;
    __syncthreads();
    sum += value;
    if (Barrier) __syncthreads();
  }
  out[threadIdx.x] = sum;
}

__global__ void last_block(int* out) { *out = static_cast<int>(blockIdx.x); }

template <class Kernel>
std::vector<std::vector<int>> results_by_order(Kernel kernel) {
  std::vector<std::vector<int>> results;
  for (const char* order : {"forward", "reverse", "random"}) {
    set_order(order);
    results.emplace_back(64);
    emulation::launch(kernel, 2, 64, 64 * sizeof(int), results.back().data());
  }
  return results;
}

void test_missing_barriers_show() {
  const auto same = [](const auto& results) { return results[0] == results[1] && results[0] == results[2]; };
  const auto all_differ = [](const auto& r) { return r[0] != r[1] && r[0] != r[2] && r[1] != r[2]; };
  assert(same(results_by_order(neighbours<true>)) && all_differ(results_by_order(neighbours<false>)));
  assert(same(results_by_order(neighbours_in_warp<true>)) &&
         all_differ(results_by_order(neighbours_in_warp<false>)));
  assert(same(results_by_order(reuse_too_early<true>)) &&
         all_differ(results_by_order(reuse_too_early<false>)));
  assert(results_by_order(neighbours<false>) ==
         results_by_order(neighbours<false>));  // the random order is a fixed one
  const auto blocks = results_by_order(last_block);
  assert(blocks[0][0] == 1 && blocks[1][0] == 0);
}

__global__ void finish_early(unsigned leaving) {
  if (threadIdx.x == leaving) return;
  __syncthreads();
}

__global__ void barriers_of_two_kinds() {
  if (threadIdx.x < 8) {
    __syncthreads();
  } else {
    __syncwarp();
  }
}

__global__ void two_warp_operations() {
  if (threadIdx.x % 2) {
    __syncwarp();
  } else {
    __shfl_sync(full, 1, 0);
  }
}

__global__ void write_at(int offset) { emulation::shared_memory()[offset] = 1; }

__global__ void half_mask() { __syncwarp(0xffff); }

__global__ void odd_width() { __shfl_sync(full, 1, 0, 12); }

__global__ void nested() { emulation::launch(half_mask, 1, 1, 0); }

__device__ __noinline__ int recurse(int depth) {
  volatile int room[1024] = {};
  room[depth % 1024] = depth;
  return depth ? recurse(depth - 1) + room[depth % 1024] : 0;
}

__global__ void deep_stack(int* out) { out[threadIdx.x] = recurse(12); }

void test_misuse_aborts() {
  for (const char* order : {"forward", "reverse", "random"}) {
    set_order(order);
    for (const unsigned leaving : {0u, 17u, 63u}) {
      expect_abort("barrier diverged in block", [=] { emulation::launch(finish_early, 3, 64, 0, leaving); });
    }
    expect_abort("8 wait at __syncthreads, 24 wait at __syncwarp",
                 [] { emulation::launch(barriers_of_two_kinds, 1, 32, 0); });
    expect_abort("other lanes of its warp at __s", [] { emulation::launch(two_warp_operations, 1, 32, 0); });
    expect_abort("100 bytes of dynamic shared memory, 0 bytes past the end",
                 [] { emulation::launch(write_at, 1, 1, 100, 100); });
    expect_abort("10 bytes past the end", [] { emulation::launch(write_at, 1, 1, 128, 138); });
    expect_abort("4 bytes before the start", [] { emulation::launch(write_at, 1, 1, 64, -4); });
    expect_abort("only masks of the whole warp", [] { emulation::launch(half_mask, 1, 32, 0); });
    expect_abort("launch inside a kernel", [] { emulation::launch(nested, 1, 1, 0); });
    expect_abort("with width 12", [] { emulation::launch(odd_width, 1, 32, 0); });
  }
  set_order("sideways");
  expect_abort("LF_EMULATION_ORDER=sideways", [] { emulation::launch(half_mask, 1, 32, 0); });
  set_order("forward");
  emulation::launch(half_mask, 1, 16, 0);  // the mask of all there are
}

void test_host_threads() {
  std::vector<std::vector<int>> out(4, std::vector<int>(64));
  std::vector<std::thread> threads;
  for (auto& own : out) {
    threads.emplace_back([&own] {
      for (int round = 0; round < 20; ++round) emulation::launch(neighbours<true>, 4, 64, 0, own.data());
    });
  }
  for (auto& thread : threads) thread.join();
  for (const auto& own : out) assert(own == out[0] && own[1] == 1 + 3);
}

__global__ void many_barriers(int* out, int count) {
  __shared__ int value;
  int sum = 0;
  for (int i = 0; i < count; ++i) {
    if (threadIdx.x == static_cast<unsigned>(i) % blockDim.x && i % 2 == 0) value = i;
    __syncthreads();
    sum += value & 1;
  }
  out[threadIdx.x] = sum;
}

void report_speed(const char* order) {
  set_order(order);
  std::vector<int> out(256, -1);
  const auto start = std::chrono::steady_clock::now();
  emulation::launch(many_barriers, 100, 256, 0, out.data(), 100);
  const std::chrono::duration<double> passed = std::chrono::steady_clock::now() - start;
  for (const int value : out) assert(value == 0);
  std::fprintf(stderr, "%-7s 100 blocks x 256 threads x 100 barriers: %.3f s\n", order, passed.count());
}

}  // namespace

int main() {
  for (const char* order : {"forward", "reverse", "random"}) {
    set_order(order);
    test_indices();
    test_dynamic_shared_memory();
    test_block_sum<int>();
    test_block_sum<double>();
    test_shuffles<int>(-7);
    test_shuffles<unsigned>(4000000000u);
    test_shuffles<float>(0.5f);
    test_shuffles<double>(-0.25);
    test_shuffles<long long>(-5000000000ll);
    test_votes_and_partial_warp();
    test_lanes_that_leave();
    test_chained_shuffles();
    test_math_and_types();
    test_host_threads();
    std::vector<int> depth(64);
    emulation::launch(deep_stack, 1, 64, 0, depth.data());
    for (const int value : depth) assert(value == 78);
  }
  unsetenv("LF_EMULATION_ORDER");
  test_indices();
  test_runtime_functions();
  test_missing_barriers_show();
  test_misuse_aborts();
  for (const char* order : {"forward", "reverse", "random"}) report_speed(order);
  std::puts("ok");
}
