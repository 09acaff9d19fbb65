// The solver and the attention as torch's operators, and torch's threads for every loop of the library.
#include <algorithm>

#include "../tensor.h"
#include "laplacian_attention.h"
#include "layers.h"
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

void check_layer(const Tensor& weight, const Tensor& bias, const Tensor& like, int64_t rows,
                 int64_t columns) {
  STD_TORCH_CHECK(
      weight.scalar_type() == like.scalar_type() && bias.scalar_type() == like.scalar_type() &&
          weight.is_contiguous() && bias.is_contiguous() && weight.numel() == rows * columns &&
          bias.numel() == rows,
      "lf_dense: a layer's weights are not contiguous, or not of the shapes and dtypes that belong "
      "together: call the layers, which choose the operator.");
}

void check_tokens(const Tensor& x, int64_t dims) {
  STD_TORCH_CHECK(x.dim() == dims && x.is_contiguous() && x.scalar_type() == compute_type(x),
                  "lf_dense: the operators of whole layers take contiguous tokens of float32 or float64.");
}

template <typename T>
Linear<T> layer(const Tensor& weight, const Tensor& bias) {
  return {data<T>(weight), data<T>(bias)};
}

std::tuple<Tensor, Tensor, Tensor> project_heads(const Tensor& x, const Tensor& norm_weight,
                                                 const Tensor& norm_bias, double eps, const Tensor& q_weight,
                                                 const Tensor& q_bias, const Tensor& k_weight,
                                                 const Tensor& k_bias, const Tensor& v_weight,
                                                 const Tensor& v_bias, const Tensor& cos, const Tensor& sin) {
  check_tokens(x, 3);
  const int64_t channels = x.size(2), head_dims = cos.size(-1);
  check_layer(norm_weight, norm_bias, x, channels, 1);
  check_layer(q_weight, q_bias, x, channels, channels);
  check_layer(k_weight, k_bias, x, channels, channels);
  check_layer(v_weight, v_bias, x, channels, channels);
  const bool turns = cos.size(0) > 0;
  for (const Tensor& table : {cos, sin}) {
    check_tokens(table, 3);
    STD_TORCH_CHECK(table.scalar_type() == x.scalar_type() && table.size(0) == (turns ? x.size(1) : 0) &&
                        table.size(1) == 1 && table.size(2) == head_dims && channels % head_dims == 0 &&
                        head_dims % 2 == 0,
                    "lf_dense: the rotary tables do not fit the tokens.");
  }
  Tensor q = torch::stable::empty_like(x), k = torch::stable::empty_like(x), v = torch::stable::empty_like(x);
  with_compute_type(x, [&]<typename T>(T) {
    const LayerNorm<T> norm{data<T>(norm_weight), data<T>(norm_bias), static_cast<T>(eps)};
    heads_of<T>({x.size(0), 1, x.size(1), channels}, data<T>(x), norm,
                {layer<T>(q_weight, q_bias), layer<T>(k_weight, k_bias), layer<T>(v_weight, v_bias)},
                turns ? data<T>(cos) : nullptr, data<T>(sin), channels / head_dims,
                {data<T>(q), data<T>(k), data<T>(v)});
  });
  return {q, k, v};
}

Tensor merge_heads(const Tensor& x, const Tensor& attended, const Tensor& values, const Tensor& conv_weight,
                   const Tensor& conv_bias, const Tensor& proj_weight, const Tensor& proj_bias) {
  check_tokens(values, 4);
  const Tokens shape{values.size(0), values.size(1), values.size(2), values.size(3)};
  for (const Tensor& tokens : {x, attended}) {
    check_tokens(tokens, 3);
    STD_TORCH_CHECK(tokens.scalar_type() == values.scalar_type() && tokens.size(0) == shape.batch &&
                        tokens.size(1) == shape.each() && tokens.size(2) == shape.channels,
                    "lf_dense: the values are not of these tokens.");
  }
  check_layer(conv_weight, conv_bias, values, shape.channels, 9);
  check_layer(proj_weight, proj_bias, values, shape.channels, shape.channels);
  Tensor out = torch::stable::empty_like(x);
  with_compute_type(values, [&]<typename T>(T) {
    tokens_of_heads<T>(shape, data<T>(x), data<T>(attended), data<T>(values),
                       layer<T>(conv_weight, conv_bias), layer<T>(proj_weight, proj_bias), data<T>(out));
  });
  return out;
}

Tensor conv_ffn(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& conv_weight,
                const Tensor& conv_bias, const Tensor& fc2_weight, const Tensor& fc2_bias) {
  check_tokens(x, 4);
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  const int64_t hidden = fc1_weight.size(0);
  check_layer(norm_weight, norm_bias, x, shape.channels, 1);
  check_layer(fc1_weight, fc1_bias, x, hidden, shape.channels);
  check_layer(conv_weight, conv_bias, x, hidden, 9);
  check_layer(fc2_weight, fc2_bias, x, shape.channels, hidden);
  Tensor out = torch::stable::empty_like(x);
  with_compute_type(x, [&]<typename T>(T) {
    const LayerNorm<T> norm{data<T>(norm_weight), data<T>(norm_bias), static_cast<T>(eps)};
    feed_forward<T>(shape, data<T>(x), norm, hidden, layer<T>(fc1_weight, fc1_bias),
                    layer<T>(conv_weight, conv_bias), layer<T>(fc2_weight, fc2_bias), data<T>(out));
  });
  return out;
}

}  // namespace
}  // namespace lf

LF_IMPLEMENT(CPU, m) {
  m.impl("newton_schulz_inverse", TORCH_BOX(&lf::newton_schulz_inverse));
  m.impl("project_heads", TORCH_BOX(&lf::project_heads));
  m.impl("merge_heads", TORCH_BOX(&lf::merge_heads));
  m.impl("conv_ffn", TORCH_BOX(&lf::conv_ffn));
  m.impl("laplacian_attention", TORCH_BOX(&lf::laplacian_attention));
  m.impl("laplacian_attention_backward", TORCH_BOX(&lf::laplacian_attention_backward));
}
