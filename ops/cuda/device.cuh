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
#include <map>
#include <mutex>
#include <utility>

#include "../tensor.h"

namespace lf {

constexpr int kWarp = 32;
constexpr int kWarps = 8;
constexpr int kThreads = kWarp * kWarps;

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

template <typename T>
struct alignas(16) Four {
  T at[4];
};

template <typename T>
struct alignas(2 * sizeof(T)) Two {
  T at[2];
};

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

// Rows of one head, or of a matrix of T.
struct Rows {
  char* data;
  int64_t row_stride, channel_stride;  // in elements
  int channels;
  DType dtype;

  __device__ static Rows of(const View& view, int64_t head) {
    return {view.row(head, 0), view.stride[2], view.stride[3], static_cast<int>(view.size[3]), view.dtype};
  }
  template <typename T>
  __device__ static Rows of(const T* matrix, int channels) {
    return {reinterpret_cast<char*>(const_cast<T*>(matrix)), channels, 1, channels,
            sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32};
  }
  __device__ char* at(int64_t row, int channel) const {
    return data + (row * row_stride + channel * channel_stride) * item_size(dtype);
  }
  // Four channels from a multiple of four, zero beyond the last: in one access where the memory allows it.
  template <typename T>
  __device__ Four<T> four(int64_t row, int channel) const {
    const char* address = at(row, channel);
    Four<T> result;
    const bool together = channel_stride == 1 && channel + 4 <= channels &&
                          reinterpret_cast<uintptr_t>(address) % (4 * item_size(dtype)) == 0;
    if (together && dtype == DType::kFloat32) {
      const float4 all = *reinterpret_cast<const float4*>(address);
      result.at[0] = all.x, result.at[1] = all.y, result.at[2] = all.z, result.at[3] = all.w;
    } else if (together && dtype != DType::kFloat64) {
      const uint2 all = *reinterpret_cast<const uint2*>(address);
      const unsigned words[2] = {all.x, all.y};
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        const unsigned short bits = static_cast<unsigned short>(words[u / 2] >> (16 * (u % 2)));
        const bool wide_range = dtype == DType::kBFloat16;
        result.at[u] = static_cast<T>(wide_range ? __bfloat162float(__ushort_as_bfloat16(bits))
                                                 : __half2float(__ushort_as_half(bits)));
      }
    } else {
#pragma unroll
      for (int u = 0; u < 4; ++u)
        result.at[u] = channel + u < channels ? load<T>(at(row, channel + u), dtype) : T{0};
    }
    return result;
  }
};

template <typename T>
__device__ inline T warp_sum(T value) {
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ inline float exponential(float x) { return expf(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float absolute(float x) { return fabsf(x); }
__device__ inline double absolute(double x) { return fabs(x); }

// w with the sign of `difference`, 0 where that is 0; a NaN difference keeps w, which is NaN then.
__device__ inline float signed_by(float difference, float w) {
  const float turned =
      __int_as_float((__float_as_int(difference) & static_cast<int>(0x80000000u)) ^ __float_as_int(w));
  return difference == 0.0f ? 0.0f : turned;
}
__device__ inline double signed_by(double difference, double w) {
  return difference == 0.0 ? 0.0 : difference < 0.0 ? -w : w;
}

}  // namespace lf
