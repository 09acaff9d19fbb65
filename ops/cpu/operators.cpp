// The solver and the attention as torch's operators, and torch's threads for every loop of the library.
#include <algorithm>

#include "../tensor.h"
#include "laplacian_attention.h"
#include "newton_schulz_inverse.h"
#include "parallel.h"

namespace lf {

int64_t pool_threads() { return torch::stable::get_num_threads(); }

void run_on_pool(int64_t times, void (*run)(void*), void* state) {
  torch::stable::parallel_for(0, times, 1, [&](int64_t, int64_t) { run(state); });
}

namespace {

template <typename T>
void inverses(const T* w, int64_t matrices, int64_t m, int64_t iters, double eps, T* out) {
  kernels<T>();
  const int64_t cols = padded(m);
  const bool shared = invert_shared(matrices, m);
  const auto one = [&](int64_t index) {
    Scratch<T> packed(m * cols), inverse(m * cols);
    packed.zeroed(m * cols);
    for (int64_t i = 0; i < m; ++i) std::copy_n(w + (index * m + i) * m, m, packed + i * cols);
    invert<T>(packed, m, iters, eps, shared, inverse);
    for (int64_t i = 0; i < m; ++i) std::copy_n(inverse + i * cols, m, out + (index * m + i) * m);
  };
  if (shared) {
    for (int64_t index = 0; index < matrices; ++index) one(index);
  } else {
    parallel(matrices, one);
  }
}

Tensor newton_schulz_inverse(const Tensor& w, int64_t iters, double eps) {
  check_matrices(w);
  Tensor packed = torch::stable::contiguous(w), out = torch::stable::empty_like(packed);
  const int64_t m = w.size(-1), matrices = m ? w.numel() / (m * m) : 0;
  with_compute_type(
      w, [&]<typename T>(T) { inverses<T>(data<T>(packed), matrices, m, iters, eps, data<T>(out)); });
  return out;
}

template <typename T>
Saved<T> saved(const Tensor& inverse, const Tensor& sums, const Tensor& mass, const Tensor& mean_value) {
  return {data<T>(inverse), data<T>(sums), data<T>(mass), data<T>(mean_value)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> laplacian_attention(const Tensor& q, const Tensor& k,
                                                                       const Tensor& v,
                                                                       const Tensor& landmarks, double scale,
                                                                       int64_t iters, double eps,
                                                                       double tau) {
  check_attention(q, k, v, landmarks);
  const AttentionResults results(q, landmarks);
  with_compute_type(q, [&]<typename T>(T) {
    attention_forward<T>(view(q), view(k), view(v), view(landmarks),
                         {static_cast<T>(scale), static_cast<T>(tau)}, iters, eps, view(results.out),
                         saved<T>(results.inverse, results.sums, results.mass, results.mean_value));
  });
  return results.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> laplacian_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks,
    const Tensor& inverse, const Tensor& sums, const Tensor& mass, const Tensor& mean_value, double scale,
    double tau) {
  check_attention(q, k, v, landmarks);
  check_same(grad, q, 0, 4, "the gradient and q");
  Tensor dq = empty_tokens(q), dk = empty_tokens(k), dv = empty_tokens(v),
         dlandmarks = empty_tokens(landmarks);
  with_compute_type(q, [&]<typename T>(T) {
    attention_backward<T>(
        view(grad), view(q), view(k), view(v), view(landmarks), saved<T>(inverse, sums, mass, mean_value),
        {static_cast<T>(scale), static_cast<T>(tau)}, view(dq), view(dk), view(dv), view(dlandmarks));
  });
  return {dq, dk, dv, dlandmarks};
}

}  // namespace
}  // namespace lf

LF_IMPLEMENT(CPU, m) {
  m.impl("newton_schulz_inverse", TORCH_BOX(&lf::newton_schulz_inverse));
  m.impl("laplacian_attention", TORCH_BOX(&lf::laplacian_attention));
  m.impl("laplacian_attention_backward", TORCH_BOX(&lf::laplacian_attention_backward));
}
