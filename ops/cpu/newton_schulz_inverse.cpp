#include "newton_schulz_inverse.h"

#include <algorithm>
#include <cmath>

#include "parallel.h"

namespace lf {
namespace {

constexpr int64_t kRowBlock = 24;

// out = a b, rows padded(m) apart.
template <typename T>
void multiply(T* out, const T* a, const T* b, int64_t m, bool shared) {
  const int64_t cols = padded(m), blocks = shared ? (m + kRowBlock - 1) / kRowBlock : 1,
                length = shared ? kRowBlock : m;
  const auto block = [&](int64_t index) {
    const int64_t first = index * length, rows = std::min(length, m - first);
    kernels<T>().product(out + first * cols, cols, a + first * cols, cols, 1, b, cols, rows, m, cols, false);
  };
  if (shared) {
    parallel(blocks, block);
  } else {
    block(0);
  }
}

// x = 2 I - x
template <typename T>
void reflect(T* x, int64_t m) {
  const int64_t cols = padded(m);
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t j = 0; j < m; ++j) x[i * cols + j] = (i == j ? T{2} : T{0}) - x[i * cols + j];
  }
}

template <typename T>
T largest_row_sum(const T* w, int64_t m) {
  T largest = 0;
  for (int64_t i = 0; i < m; ++i) {
    T sum = 0;
    for (int64_t j = 0; j < m; ++j) sum += w[i * padded(m) + j];
    if (!(sum <= largest)) largest = sum;
    if (std::isnan(largest)) break;
  }
  return largest;
}

}  // namespace

bool invert_shared(int64_t matrices, int64_t m) { return m >= 128 && matrices < pool_threads(); }

// The paper's iteration with the project's start and scaling, see lf_dense.reference: the factor of step k is
// 1 + 1 / cosh(2^k a).
template <typename T>
void invert(const T* w, int64_t m, int64_t iters, double eps, bool shared, T* inverse) {
  const int64_t cols = padded(m), size = m * cols;
  Scratch<T> ridged(size), residual(size), next(size);
  std::copy_n(w, size, ridged.get());
  for (int64_t i = 0; i < m; ++i) ridged[i * cols + i] += static_cast<T>(eps);
  const double bound = largest_row_sum<T>(ridged, m);
  const double angle = 2 * std::atanh(std::sqrt(eps / bound));
  // The start is c I: the first step's products are multiples.
  const T start = static_cast<T>((1 + 1 / std::cosh(angle)) / bound);
  for (int64_t i = 0; i < size; ++i) residual[i] = start * ridged[i];
  for (int64_t step = 1; step <= iters; ++step) {
    if (step > 1) multiply<T>(residual, ridged, inverse, m, shared);
    reflect<T>(residual, m);
    if (step > 1) {
      multiply<T>(next, inverse, residual, m, shared);
    } else {
      for (int64_t i = 0; i < size; ++i) next[i] = start * residual[i];
    }
    const T factor =
        static_cast<T>(1 + 1 / std::cosh(std::ldexp(angle, static_cast<int>(std::min<int64_t>(step, 1000)))));
    for (int64_t i = 0; i < size; ++i) inverse[i] = factor * next[i];
  }
  // One plain step in float64 takes off the rounding that the iteration gathered.
  Scratch<double> wide_w(size), wide(size), wide_residual(size), result(size);
  std::copy_n(ridged.get(), size, wide_w.get());
  std::copy_n(inverse, size, wide.get());
  multiply<double>(wide_residual, wide_w, wide, m, shared);
  reflect<double>(wide_residual, m);
  multiply<double>(result, wide, wide_residual, m, shared);
  std::copy_n(result.get(), size, inverse);
}

template void invert<float>(const float*, int64_t, int64_t, double, bool, float*);
template void invert<double>(const double*, int64_t, int64_t, double, bool, double*);

}  // namespace lf
