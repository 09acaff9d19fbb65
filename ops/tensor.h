// What every operator needs of a tensor, through torch's stable ABI alone, so that one binary serves every
// torch from 2.11 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include "view.h"

// A second library of the same sources under another name (the tests' emulation of the CUDA ones) defines
// these itself.
#ifndef LF_LIBRARY
#define LF_LIBRARY lf_dense
#endif
#ifndef LF_CUDA_KEY
#define LF_CUDA_KEY CUDA
#endif
#define LF_DEFINE_(library, m) STABLE_TORCH_LIBRARY(library, m)
#define LF_DEFINE(m) LF_DEFINE_(LF_LIBRARY, m)
#define LF_IMPLEMENT_(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)
#define LF_IMPLEMENT(key, m) LF_IMPLEMENT_(LF_LIBRARY, key, m)

namespace lf {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return DType::kFloat64;
    case ScalarType::Float:
      return DType::kFloat32;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kFloat16;
    default:
      STD_TORCH_CHECK(false,
                      "lf_dense's operators take float64, float32, bfloat16 and float16 tensors, and this "
                      "one is none of them.");
  }
}

// Kernels, solver and sums run in float32, float64 inputs in float64.
inline ScalarType compute_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

inline View view(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.dim() == 4,
                  "lf_dense's operators take (batch, heads, rows, channels) tensors, and this one has ",
                  tensor.dim(), " dimensions: call them through lf_dense.functional.");
  View result{static_cast<char*>(tensor.data_ptr()), {}, {}, dtype_of(tensor)};
  for (int i = 0; i < 4; ++i) {
    result.size[i] = tensor.size(i);
    result.stride[i] = tensor.stride(i);
  }
  return result;
}

// A kernel of one device would follow pointers into another's memory.
inline void check_devices(const Tensor& first, std::initializer_list<const Tensor*> others) {
  for (const Tensor* other : others) {
    STD_TORCH_CHECK(first.device() == other->device(),
                    "lf_dense: the tensors of this call are on different devices: move them to one.");
  }
}

inline void check_same(const Tensor& a, const Tensor& b, int first_dim, int last_dim, const char* what) {
  check_devices(a, {&b});
  bool same = a.dim() == 4 && b.dim() == 4 && a.scalar_type() == b.scalar_type();
  for (int i = first_dim; same && i < last_dim; ++i) same = a.size(i) == b.size(i);
  STD_TORCH_CHECK(
      same, "lf_dense: ", what,
      " do not have the shapes or dtypes that belong together: call lf_dense.functional, which says which.");
}

// Two sets of points: the same batch, heads and channels.
inline void check_points(const Tensor& x, const Tensor& y, const char* what) {
  check_same(x, y, 0, 2, what);
  check_same(x, y, 3, 4, what);
}

inline void check_kernel_gradient(const Tensor& grad, const Tensor& x, const Tensor& y) {
  check_points(x, y, "x and y");
  check_same(grad, x, 0, 3, "the gradient and x");
  STD_TORCH_CHECK(grad.size(3) == y.size(2), "lf_dense: the gradient of the kernel has ", grad.size(3),
                  " columns for ", y.size(2), " points.");
}

inline void check_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks) {
  check_same(q, k, 0, 4, "q and k");
  check_same(q, v, 0, 4, "q and v");
  check_points(q, landmarks, "q and the landmarks");
  STD_TORCH_CHECK(q.size(2) > 0 && landmarks.size(2) > 0,
                  "lf_dense: the attention needs at least one token and one landmark.");
}

inline void check_matrices(const Tensor& w) {
  STD_TORCH_CHECK(w.dim() >= 2 && w.size(-1) == w.size(-2), "lf_dense: the solver takes square matrices.");
  STD_TORCH_CHECK(w.scalar_type() == compute_type(w),
                  "lf_dense: the solver runs in float32 or float64: widen its input.");
}

inline Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype, const Tensor& like) {
  return torch::stable::empty(torch::headeronly::IntHeaderOnlyArrayRef(size.begin(), size.size()), dtype,
                              std::nullopt, like.device());
}

// (batch, heads, rows, channels) in the memory order of a projection, (batch, rows, heads, channels): no copy
// on either side.
inline Tensor empty_tokens(const Tensor& like) {
  Tensor memory = empty({like.size(0), like.size(2), like.size(1), like.size(3)}, like.scalar_type(), like);
  return torch::stable::transpose(memory, 1, 2);
}

// What the attention's forward pass returns, see schemas.cpp; all but `out` in the compute type and
// contiguous.
struct AttentionResults {
  Tensor out, inverse, sums, mass, mean_value;

  AttentionResults(const Tensor& q, const Tensor& landmarks)
      : out(empty_tokens(q)),
        inverse(empty({q.size(0), q.size(1), landmarks.size(2), landmarks.size(2)}, compute_type(q), q)),
        sums(empty({q.size(0), q.size(1), landmarks.size(2), q.size(3)}, compute_type(q), q)),
        mass(empty({q.size(0), q.size(1), landmarks.size(2)}, compute_type(q), q)),
        mean_value(empty({q.size(0), q.size(1), q.size(3)}, compute_type(q), q)) {}

  std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> tuple() const {
    return {out, inverse, sums, mass, mean_value};
  }
};

template <typename T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

// Calls `run` with a float or a double, by what `tensor` is computed in.
template <typename Run>
auto with_compute_type(const Tensor& tensor, Run run) {
  return tensor.scalar_type() == ScalarType::Double ? run(double{}) : run(float{});
}

}  // namespace lf
