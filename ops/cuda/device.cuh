// Launching, and tensors' elements on the device.
#pragma once

// The tests run these sources on the CPU, one fibre per thread, through a stand-in for the CUDA runtime.
#if defined(LF_CUDA_EMULATION)
#include "emulation.h"
#define LF_SHARED_MEMORY(name) unsigned char* name = emulation::shared_memory()
#else
#include <cuda_runtime.h>
#define LF_SHARED_MEMORY(name) extern __shared__ __align__(128) unsigned char name[]
#endif
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <algorithm>
#include <initializer_list>
#include <map>
#include <mutex>
#include <type_traits>
#include <utility>

#include "../tensor.h"

namespace lf {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;
// The default grid has code of its own, with loops and addresses known to the compiler.
constexpr int kUsualLandmarks = 7 * 7;

inline void check(cudaError_t status) {
  STD_TORCH_CHECK(status == cudaSuccess, "lf_dense: a CUDA operator failed: ", cudaGetErrorString(status));
}

// Bytes of shared memory that a block may ask for on the current device.
inline int64_t shared_memory_limit() {
  int device = 0, bytes = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device));
  return bytes;
}

// Lets a kernel have as much shared memory as the current device gives; asks the runtime once a device.
inline void allow_shared_memory(const void* kernel, int64_t bytes) {
  static std::mutex mutex;
  static std::map<std::pair<const void*, int>, int64_t> allowed;
  int device = 0;
  check(cudaGetDevice(&device));
  const std::lock_guard lock(mutex);
  int64_t& most = allowed[{kernel, device}];
  if (bytes <= most) return;
  const int64_t limit = shared_memory_limit();
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(limit)));
  most = limit;
}

// Memory laid out once for the host, which asks for `bytes`, and for who takes the pieces: shared memory, or
// what a pass allocates.
template <typename T>
struct Piece {
  int64_t offset;
  LF_HOST_DEVICE T* in(unsigned char* memory) const { return reinterpret_cast<T*>(memory + offset); }
};

struct Layout {
  int64_t bytes = 0;

  template <typename T>
  LF_HOST_DEVICE constexpr Piece<T> add(int64_t count) {
    const Piece<T> piece{bytes};
    bytes += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return piece;
  }
};

// The memory of a pass beside its results, in one allocation.
struct Workspace {
  Tensor memory;

  Workspace(const Layout& layout, const Tensor& like)
      : memory(empty({std::max<int64_t>(1, layout.bytes)}, ScalarType::Byte, like)) {}
  template <typename T>
  T* at(const Piece<T>& piece) const {
    return piece.in(data<unsigned char>(memory));
  }
};

// On the current device and the current stream of `like`'s device; returns without waiting.
template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, int64_t threads, int64_t shared_bytes,
            const Tensor& like, const Arguments&... arguments) {
  if (blocks == 0) return;
  STD_TORCH_CHECK(blocks < (int64_t{1} << 31), "lf_dense: a CUDA operator was asked for ", blocks,
                  " blocks; split the batch.");
  if (shared_bytes > 48 * 1024) allow_shared_memory(reinterpret_cast<const void*>(kernel), shared_bytes);
#if defined(LF_CUDA_EMULATION)
  (void)like;
  emulation::launch(kernel, dim3(blocks), dim3(threads), shared_bytes, Parameters(arguments)...);
#else
  void* stream = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
  kernel<<<dim3(blocks), dim3(threads), shared_bytes, static_cast<cudaStream_t>(stream)>>>(arguments...);
#endif
  check(cudaGetLastError());
}

// The device of the operator's tensors, current while it lives.
#if defined(LF_CUDA_EMULATION)
struct OnDeviceOf {
  explicit OnDeviceOf(const Tensor&) {}
};
#else
struct OnDeviceOf {
  torch::stable::accelerator::DeviceGuard guard;
  explicit OnDeviceOf(const Tensor& tensor) : guard(tensor.get_device_index()) {}
};
#endif

// N neighbours in memory, read and written in one access where they are 16 bytes or less.
template <typename T, int N>
struct alignas(N * sizeof(T) < 16 ? N * sizeof(T) : 16) Vector {
  T at[N];
};
template <typename T>
using Four = Vector<T, 4>;
template <typename T>
using Two = Vector<T, 2>;

template <int N, typename T>
__device__ inline Vector<T, N>& vector_at(T* address) {
  return *reinterpret_cast<Vector<T, N>*>(address);
}
template <int N, typename T>
__device__ inline const Vector<T, N>& vector_at(const T* address) {
  return *reinterpret_cast<const Vector<T, N>*>(address);
}

template <typename T>
__device__ inline T load(const char* address, DType dtype) {
  switch (dtype) {
    case DType::kFloat64:
      return static_cast<T>(*reinterpret_cast<const double*>(address));
    case DType::kFloat32:
      return static_cast<T>(*reinterpret_cast<const float*>(address));
    case DType::kBFloat16:
      return static_cast<T>(__bfloat162float(*reinterpret_cast<const __nv_bfloat16*>(address)));
    default:
      return static_cast<T>(__half2float(*reinterpret_cast<const __half*>(address)));
  }
}

template <typename T>
__device__ inline void store(char* address, DType dtype, T value) {
  switch (dtype) {
    case DType::kFloat64:
      *reinterpret_cast<double*>(address) = static_cast<double>(value);
      break;
    case DType::kFloat32:
      *reinterpret_cast<float*>(address) = static_cast<float>(value);
      break;
    case DType::kBFloat16:
      *reinterpret_cast<__nv_bfloat16*>(address) = __float2bfloat16(static_cast<float>(value));
      break;
    default:
      *reinterpret_cast<__half*>(address) = __float2half(static_cast<float>(value));
      break;
  }
}

// The same, of which the compiler is not told: what follows from it is computed where it is needed, and not
// kept in registers throughout a loop.
template <typename U>
__device__ inline U again(U number) {
#if !defined(LF_CUDA_EMULATION)
  asm volatile("" : "+r"(number));
#endif
  return number;
}
// An address in global memory.
template <typename U>
__device__ inline U* again(U* address) {
#if !defined(LF_CUDA_EMULATION)
  asm volatile("" : "+l"(address));
  __builtin_assume(__isGlobal(address));
#endif
  return address;
}

// A head of batch x heads, and of which image it is which: the division is done once, and in 32 bits.
struct Head {
  unsigned index, image, number;

  __device__ Head(const View& view, int64_t head)
      : index(static_cast<unsigned>(head)),
        image(index / static_cast<unsigned>(view.size[1])),
        number(index % static_cast<unsigned>(view.size[1])) {}
  // Where its rows begin, in elements.
  __device__ int64_t offset(const View& view) const {
    return image * view.stride[0] + number * view.stride[1];
  }
  // Where the head's part of a contiguous array begins.
  __device__ int64_t start(int64_t size) const { return index * size; }
};

__device__ inline void widen(const float* from, Four<float>& to) {
  const float4 all = *reinterpret_cast<const float4*>(from);
  to = {all.x, all.y, all.z, all.w};
}
__device__ inline void widen(const __nv_bfloat16* from, Four<float>& to) {
  const uint2 all = *reinterpret_cast<const uint2*>(from);
  to = {__uint_as_float(all.x << 16), __uint_as_float(all.x & 0xffff0000u), __uint_as_float(all.y << 16),
        __uint_as_float(all.y & 0xffff0000u)};
}
__device__ inline void widen(const __half* from, Four<float>& to) {
  const uint2 all = *reinterpret_cast<const uint2*>(from);
#pragma unroll
  for (int u = 0; u < 4; ++u) {
    const unsigned word = u < 2 ? all.x : all.y;
    to.at[u] = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> (16 * (u % 2)))));
  }
}

// Rows of one head, or of a matrix of T, of any dtype and strides.
struct Rows {
  char* data;
  int64_t row_stride, channel_stride;  // in elements
  int channels;
  DType dtype;

  __device__ static int channels_of(const View& view) { return static_cast<int>(view.size[3]); }
  __device__ static Rows of(const View& view, int64_t head) { return of(view, Head(view, head)); }
  __device__ static Rows of(const View& view, const Head& head) {
    return {view.data + head.offset(view) * item_size(view.dtype), view.stride[2], view.stride[3],
            static_cast<int>(view.size[3]), view.dtype};
  }
  template <typename T>
  __device__ static Rows of(const T* matrix, int channels) {
    return {reinterpret_cast<char*>(const_cast<T*>(matrix)), channels, 1, channels,
            sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32};
  }
  __device__ char* at(int64_t row, int channel) const {
    return data + (row * row_stride + channel * channel_stride) * item_size(dtype);
  }
  __device__ Rows from(int64_t row) const {
    return {at(row, 0), row_stride, channel_stride, channels, dtype};
  }
  // Up to `most` channels from one on.
  __device__ Rows slab(int channel, int most) const {
    return {at(0, channel), row_stride, channel_stride, min(most, channels - channel), dtype};
  }
  // Four channels from a multiple of four, zero beyond the last: in one access where the memory allows it.
  template <typename T>
  __device__ Four<T> four(int row, int channel) const {
    Four<T> result;
    if constexpr (sizeof(T) == 4) {
      const char* address = at(row, channel);
      if (channel_stride == 1 && channel + 4 <= channels &&
          reinterpret_cast<uintptr_t>(address) % (4 * item_size(dtype)) == 0) {
        if (dtype == DType::kFloat32) {
          widen(reinterpret_cast<const float*>(address), result);
        } else if (dtype == DType::kBFloat16) {
          widen(reinterpret_cast<const __nv_bfloat16*>(address), result);
        } else {
          widen(reinterpret_cast<const __half*>(address), result);
        }
        return result;
      }
    }
#pragma unroll
    for (int u = 0; u < 4; ++u)
      result.at[u] = channel + u < channels ? load<T>(at(row, channel + u), dtype) : T{0};
    return result;
  }
  template <typename T, int N>
  __device__ void put(int row, int channel, const Vector<T, N>& values) const {
#pragma unroll
    for (int u = 0; u < N; ++u) {
      if (channel + u < channels) store<T>(at(row, channel + u), dtype, values.at[u]);
    }
  }
};

__device__ inline void narrow(float value, float& to) { to = value; }
__device__ inline void narrow(float value, __nv_bfloat16& to) { to = __float2bfloat16(value); }
__device__ inline void narrow(float value, __half& to) { to = __float2half(value); }

// Rows of one head whose channels, 32 DK, are `S` side by side, in quads that one access reads.
template <typename S, int DK>
struct Quads {
  static constexpr int channels = DK * kWarp;
  __device__ static constexpr int channels_of(const View&) { return channels; }
  S* data;
  int row_stride;

  __device__ static Quads of(const View& view, const Head& head) {
    return {reinterpret_cast<S*>(view.data) + head.offset(view), static_cast<int>(view.stride[2])};
  }
  __device__ static Quads of(const S* matrix, int) { return {const_cast<S*>(matrix), channels}; }
  // The compiler is not told where they come from: it would add up 64 bits for each row.
  __device__ Quads from(int64_t row) const { return {again(data + row * row_stride), row_stride}; }
  template <typename T>
  __device__ Four<T> four(int row, int channel) const {
    Four<T> result;
    widen(data + (row * row_stride + channel), result);
    return result;
  }
  template <typename T, int N>
  __device__ void put(int row, int channel, const Vector<T, N>& values) const {
    Vector<S, N> narrowed;
#pragma unroll
    for (int u = 0; u < N; ++u) narrow(values.at[u], narrowed.at[u]);
    if constexpr (sizeof narrowed == 4) {
      *reinterpret_cast<unsigned*>(data + (row * row_stride + channel)) =
          *reinterpret_cast<const unsigned*>(&narrowed);
    } else if constexpr (sizeof narrowed == 8) {
      *reinterpret_cast<uint2*>(data + (row * row_stride + channel)) =
          *reinterpret_cast<const uint2*>(&narrowed);
    } else {
      *reinterpret_cast<uint4*>(data + (row * row_stride + channel)) =
          *reinterpret_cast<const uint4*>(&narrowed);
    }
  }
};

// A tensor's element that is known at run time alone, with any strides.
struct Any {};

template <typename S, int DK>
using RowsOf = std::conditional_t<std::is_same_v<S, Any>, Rows, Quads<S, DK>>;
// Of a contiguous matrix in the compute type, beside tensors of S.
template <typename T, typename S, int DK>
using MatrixOf = std::conditional_t<std::is_same_v<S, Any>, Rows, Quads<T, DK>>;

// Whether Quads can read a tensor. A tile's offsets must fit in 32 bits, too.
template <int DK>
bool in_quads(const View& view) {
  bool aligned = reinterpret_cast<uintptr_t>(view.data) % (4 * item_size(view.dtype)) == 0;
  for (int i = 0; i < 3; ++i) aligned = aligned && (view.size[i] <= 1 || view.stride[i] % 4 == 0);
  return aligned && view.stride[3] == 1 && view.size[3] == DK * kWarp && view.stride[2] >= 0 &&
         view.stride[2] < (int64_t{1} << 20);
}

// Calls run<S>() with the element that the tensors of a call share, where all of them lie in quads; else with
// Any. Heads of 64 channels alone, those of the presets, have kernels of their own for each element.
template <typename T, int DK, typename Run>
void with_elements(std::initializer_list<View> views, const Run& run) {
  if constexpr (sizeof(T) == 4 && DK == 2) {
    if (std::all_of(views.begin(), views.end(), in_quads<DK>)) {
      switch (views.begin()->dtype) {
        case DType::kFloat32:
          return run.template operator()<float>();
        case DType::kBFloat16:
          return run.template operator()<__nv_bfloat16>();
        default:
          return run.template operator()<__half>();
      }
    }
  }
  run.template operator()<Any>();
}

// put(i, read(i)) for each i below `size`, by the whole block. Several are read before any is put, since each
// comes from far away.
template <int kAtOnce, typename Read, typename Put>
__device__ inline void read_and_put(int size, const Read& read, const Put& put) {
  for (int first = threadIdx.x; first < size; first += kAtOnce * kThreads) {
    decltype(read(0)) values[kAtOnce];
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * kThreads < size) values[u] = read(first + u * kThreads);
    }
#pragma unroll
    for (int u = 0; u < kAtOnce; ++u) {
      if (first + u * kThreads < size) put(first + u * kThreads, values[u]);
    }
  }
}

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
// Below 2^-126 it is 0, which takes three instructions less than numbers that are smaller.
__device__ inline float power_of_two(float x) {
#if defined(LF_CUDA_EMULATION)
  return exp2f(x);
#else
  float power;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(power) : "f"(x));
  return power;
#endif
}
__device__ inline double power_of_two(double x) { return exp2(x); }
__device__ inline float absolute(float x) { return fabsf(x); }
__device__ inline double absolute(double x) { return fabs(x); }

// 1, 1/2 or 0 where the difference is positive, 0 or negative: a sum of w times this, doubled, less the sum
// of w, is the sum of w sign(difference), in one instruction a step in place of three. All float32
// differences from 2^-128 on are told from 0; what two numbers below 2^-104 may differ by and is smaller,
// lies between. NaN gives 0 (1/2 in float64): the w beside it is NaN then.
__device__ inline float step_of(float difference) { return __saturatef(difference * 0x1p127f + 0.5f); }
__device__ inline double step_of(double difference) {
  return difference > 0.0 ? 1.0 : difference < 0.0 ? 0.0 : 0.5;
}

}  // namespace lf
