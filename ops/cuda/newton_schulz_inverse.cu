#include "matrix.cuh"

namespace lf {
namespace {

template <typename T>
__global__ void __launch_bounds__(kThreads)
    invert_small(const T* w, int m, int iters, double eps, T* inverse) {
  LF_SHARED_MEMORY(memory);
  const SolverLayout<T> layout(m, iters);
  const int side = layout.side;
  T* packed = layout.matrix.in(memory);
  const int64_t offset = static_cast<int64_t>(blockIdx.x) * m * m;
  for (int index = threadIdx.x; index < side * side; index += kThreads) {
    const int row = index / side, column = index % side;
    packed[index] = row < m && column < m ? w[offset + row * m + column] : T{0};
  }
  __syncthreads();
  if (m == kUsualLandmarks) {
    invert_shared<T, false, kUsualLandmarks>(memory, layout, m, iters, eps, inverse + offset);
  } else {
    invert_shared<T, false, 0>(memory, layout, m, iters, eps, inverse + offset);
  }
}

// One block a matrix: w + eps I, its largest row sum, and the start of the iteration.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    start_large(const T* w, int64_t m, double eps, T* ridged, T* bound, T* x) {
  __shared__ T largest[kThreads];
  const int64_t offset = blockIdx.x * m * m;
  T own = 0;
  for (int64_t row = threadIdx.x; row < m; row += kThreads) {
    T sum = static_cast<T>(eps);
    for (int64_t column = 0; column < m; ++column) sum += w[offset + row * m + column];
    own = sum > own || sum != sum ? sum : own;
  }
  largest[threadIdx.x] = own;
  __syncthreads();
  T all = largest[0];
  for (int i = 1; i < kThreads; ++i) all = largest[i] > all || largest[i] != largest[i] ? largest[i] : all;
  if (threadIdx.x == 0) bound[blockIdx.x] = all;
  const T start = step_factor<T>(all, eps, 0) / all;
  for (int64_t index = threadIdx.x; index < m * m; index += kThreads) {
    const bool diagonal = index / m == index % m;
    ridged[offset + index] = w[offset + index] + (diagonal ? static_cast<T>(eps) : T{0});
    x[offset + index] = diagonal ? start : T{0};
  }
}

template <typename T>
void invert_large(const T* w, int64_t batch, int64_t m, int64_t iters, double eps, T* inverse,
                  const Tensor& like) {
  Layout layout;
  const auto ridged_at = layout.add<T>(batch * m * m), residual_at = layout.add<T>(batch * m * m),
             first_at = layout.add<T>(batch * m * m), second_at = layout.add<T>(batch * m * m),
             bound_at = layout.add<T>(batch);
  const Workspace workspace(layout, like);
  T *ridged = workspace.at(ridged_at), *residual = workspace.at(residual_at), *bound = workspace.at(bound_at);
  T *x = workspace.at(first_at), *next = workspace.at(second_at);
  launch(start_large<T>, batch, kThreads, 0, like, w, m, eps, ridged, bound, x);
  for (int step = 1; step <= iters; ++step) {
    multiply<T>({.a = ridged, .b = x, .out = residual, .m = m, .alpha = -1, .diagonal = 2}, batch, like);
    multiply<T>({.a = x, .b = residual, .out = next, .m = m, .bound = bound, .eps = eps, .step = step}, batch,
                like);
    std::swap(x, next);
  }
  multiply<T, double>({.a = ridged, .b = x, .out = residual, .m = m, .alpha = -1, .diagonal = 1}, batch,
                      like);
  multiply<T>({.a = x, .b = residual, .out = inverse, .m = m, .plus = x}, batch, like);
}

Tensor newton_schulz_inverse(const Tensor& w, int64_t iters, double eps) {
  check_matrices(w);
  const OnDeviceOf guard(w);
  Tensor packed = torch::stable::contiguous(w), out = torch::stable::empty_like(packed);
  const int64_t m = w.size(-1), batch = m ? w.numel() / (m * m) : 0;
  with_compute_type(
      w, [&]<typename T>(T) { invert<T>(data<T>(packed), batch, m, iters, eps, data<T>(out), w); });
  return out;
}

}  // namespace

template <typename T>
void invert(const T* w, int64_t batch, int64_t m, int64_t iters, double eps, T* inverse, const Tensor& like) {
  const int64_t bytes = SolverLayout<T>(static_cast<int>(m), static_cast<int>(iters)).layout.bytes;
  if (bytes <= shared_memory_limit()) {
    launch(invert_small<T>, batch, kThreads, bytes, like, w, m, iters, eps, inverse);
  } else {
    invert_large<T>(w, batch, m, iters, eps, inverse, like);
  }
}

template void invert<float>(const float*, int64_t, int64_t, int64_t, double, float*, const Tensor&);
template void invert<double>(const double*, int64_t, int64_t, int64_t, double, double*, const Tensor&);

}  // namespace lf

LF_IMPLEMENT(LF_CUDA_KEY, m) { m.impl("newton_schulz_inverse", TORCH_BOX(&lf::newton_schulz_inverse)); }
