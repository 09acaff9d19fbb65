// The dtypes of the operators' tensors.
#pragma once

#include <cstdint>

#if defined(__CUDACC__) || defined(LF_CUDA_EMULATION)
#define LF_HOST_DEVICE __host__ __device__
#else
#define LF_HOST_DEVICE
#endif

namespace lf {

struct BFloat16 {
  uint16_t bits;
};

enum class DType { kFloat64, kFloat32, kBFloat16, kFloat16 };

LF_HOST_DEVICE constexpr int64_t item_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

}  // namespace lf
