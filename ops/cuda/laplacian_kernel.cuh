#pragma once

#include "tile.cuh"

namespace lf {

// kappa(x, y) into `out`, of any dtype.
void kernel_matrix(const Tensor& x, const Tensor& y, double scale, const Tensor& out);

// dx and dy of kappa(x, y) for the gradient `grad`, all (batch, heads, rows, channels); partial sums in
// between.
void kernel_gradients(const Tensor& grad, const Tensor& x, const Tensor& y, double scale, const Tensor& dx,
                      const Tensor& dy);

// Sums `chunks` partial arrays of `size` per head, and up to two more arrays, into `out` of the same (heads,
// rows, channels): the partials are `stride` apart.
template <typename T>
struct Reduction {
  const T* partials;
  int64_t heads, chunks, stride, size;
  const T *more = nullptr, *and_more = nullptr;  // (heads, size), heads this far apart
  int64_t more_stride = 0, and_more_stride = 0;
  T* sums = nullptr;  // (heads, size), heads `stride` apart, or null for `out`
  View out = {};      // whose rows x channels are `size`
};

template <typename T>
void reduce(const Reduction<T>& reduction, const Tensor& like);

}  // namespace lf
