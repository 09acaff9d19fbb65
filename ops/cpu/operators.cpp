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
  check_devices(q, {&inverse, &sums, &mass, &mean_value});
  Tensor dq = empty_tokens(q), dk = empty_tokens(k), dv = empty_tokens(v),
         dlandmarks = empty_tokens(landmarks);
  with_compute_type(q, [&]<typename T>(T) {
    attention_backward<T>(
        view(grad), view(q), view(k), view(v), view(landmarks), saved<T>(inverse, sums, mass, mean_value),
        {static_cast<T>(scale), static_cast<T>(tau)}, view(dq), view(dk), view(dv), view(dlandmarks));
  });
  return {dq, dk, dv, dlandmarks};
}

void check_layer(const Tensor& weight, const Tensor& bias, ScalarType weight_type, ScalarType bias_type,
                 int64_t rows, int64_t columns) {
  STD_TORCH_CHECK(
      weight.scalar_type() == weight_type && bias.scalar_type() == bias_type && weight.is_contiguous() &&
          bias.is_contiguous() && weight.numel() == rows * columns && bias.numel() == rows,
      "lf_dense: a layer's weights are not contiguous, or not of the shapes and dtypes that belong "
      "together: call the layers, which choose the operator.");
}

// What products' weights may be beside these tokens; everything else is of the compute type.
ScalarType check_product(const Tensor& x, const Tensor& weight) {
  const ScalarType tokens = x.scalar_type(), type = weight.scalar_type();
  const bool narrow = type == ScalarType::BFloat16 && (tokens == ScalarType::Float || tokens == type);
  STD_TORCH_CHECK(narrow || (tokens == type && type == compute_type(x)),
                  "lf_dense: the operators of whole layers take tokens and weights of float32 or float64, or "
                  "weights of bfloat16 beside tokens of float32 or bfloat16.");
  STD_TORCH_CHECK(!narrow || weight.size(-1) % 2 == 0,
                  "lf_dense: bfloat16 products take an even number of channels, and here are ",
                  weight.size(-1), ".");
  return type;
}

void check_tokens(const Tensor& x, int64_t dims, ScalarType type) {
  STD_TORCH_CHECK(x.dim() == dims && x.is_contiguous() && x.scalar_type() == type,
                  "lf_dense: the operators of whole layers take contiguous tokens of the dtypes that belong "
                  "together: call the layers, which choose the operator.");
}

template <typename T, typename W = T>
Linear<T, W> layer(const Tensor& weight, const Tensor& bias) {
  return {data<W>(weight), data<T>(bias)};
}

// Calls `run` with a T and an X (see layers.h).
template <typename Run>
void with_token_types(const Tensor& x, Run run) {
  if (x.scalar_type() == ScalarType::Double) {
    run(double{}, double{});
  } else if (x.scalar_type() == ScalarType::Float) {
    run(float{}, float{});
  } else {
    run(float{}, BFloat16{});
  }
}

// Calls `run` with a T, an X and a W (see layers.h).
template <typename Run>
void with_layer_types(const Tensor& x, const Tensor& weight, Run run) {
  if (x.scalar_type() == ScalarType::Double) {
    run(double{}, double{}, double{});
  } else if (weight.scalar_type() == ScalarType::Float) {
    run(float{}, float{}, float{});
  } else if (x.scalar_type() == ScalarType::Float) {
    run(float{}, float{}, BFloat16{});
  } else {
    run(float{}, BFloat16{}, BFloat16{});
  }
}

std::tuple<Tensor, Tensor, Tensor> project_heads(const Tensor& x, const Tensor& norm_weight,
                                                 const Tensor& norm_bias, double eps, const Tensor& q_weight,
                                                 const Tensor& q_bias, const Tensor& k_weight,
                                                 const Tensor& k_bias, const Tensor& v_weight,
                                                 const Tensor& v_bias, const Tensor& rows,
                                                 const Tensor& columns) {
  const ScalarType wide = compute_type(x), type = check_product(x, q_weight);
  check_tokens(x, 4, x.scalar_type());
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  const int64_t channels = shape.channels;
  check_layer(norm_weight, norm_bias, wide, wide, channels, 1);
  check_layer(q_weight, q_bias, type, wide, channels, channels);
  check_layer(k_weight, k_bias, type, wide, channels, channels);
  check_layer(v_weight, v_bias, type, wide, channels, channels);
  check_tokens(rows, 3, wide);
  check_tokens(columns, 3, wide);
  const int64_t pairs = rows.size(1);
  STD_TORCH_CHECK(rows.size(0) == 2 && rows.size(2) == shape.height && columns.size(0) == 2 &&
                      columns.size(1) == pairs && columns.size(2) == shape.width &&
                      (pairs == 0 || channels % (4 * pairs) == 0),
                  "lf_dense: the rotary tables do not fit the tokens.");
  const auto heads = [&] { return empty({shape.batch, shape.height, shape.width, channels}, type, x); };
  Tensor q = heads(), k = heads(), v = heads();
  with_layer_types(x, q_weight, [&]<typename T, typename X, typename W>(T, X, W) {
    const LayerNorm<T> norm{data<T>(norm_weight), data<T>(norm_bias), static_cast<T>(eps)};
    heads_of(shape, data<X>(x), norm,
             {layer<T, W>(q_weight, q_bias), layer<T, W>(k_weight, k_bias), layer<T, W>(v_weight, v_bias)},
             {data<T>(rows), data<T>(columns), pairs}, {data<W>(q), data<W>(k), data<W>(v)});
  });
  return {q, k, v};
}

Tensor pool_tokens(const Tensor& x, int64_t rows, int64_t columns) {
  const ScalarType type = x.scalar_type();
  STD_TORCH_CHECK(type == compute_type(x) || type == ScalarType::BFloat16,
                  "lf_dense: pooling takes float32, float64 or bfloat16 tokens.");
  check_tokens(x, 4, type);
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  STD_TORCH_CHECK(rows > 0 && columns > 0, "lf_dense: a grid of ", rows, " x ", columns,
                  " has no cells: it needs at least one row and one column.");
  rows = std::min(rows, shape.height);
  columns = std::min(columns, shape.width);
  Tensor out = empty({shape.batch, rows * columns, shape.channels}, type, x);
  with_token_types(
      x, [&]<typename T, typename X>(T, X) { pooled<T>(shape, data<X>(x), rows, columns, data<X>(out)); });
  return out;
}

Tensor merge_heads(const Tensor& x, const Tensor& attended, const Tensor& values, const Tensor& conv_weight,
                   const Tensor& conv_bias, const Tensor& proj_weight, const Tensor& proj_bias) {
  const ScalarType wide = compute_type(x), type = check_product(x, proj_weight);
  check_tokens(x, 4, x.scalar_type());
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  for (const Tensor& heads : {attended, values}) {
    check_tokens(heads, 4, type);
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(heads.size(i) == x.size(i), "lf_dense: the heads are not of these tokens.");
  }
  check_layer(conv_weight, conv_bias, wide, wide, shape.channels, 9);
  check_layer(proj_weight, proj_bias, type, wide, shape.channels, shape.channels);
  Tensor out = torch::stable::empty_like(x);
  with_layer_types(x, proj_weight, [&]<typename T, typename X, typename W>(T, X, W) {
    tokens_of_heads(shape, data<X>(x), data<W>(attended), data<W>(values), layer<T>(conv_weight, conv_bias),
                    layer<T, W>(proj_weight, proj_bias), data<X>(out));
  });
  return out;
}

Tensor conv_ffn(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias, double eps,
                const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& conv_weight,
                const Tensor& conv_bias, const Tensor& fc2_weight, const Tensor& fc2_bias) {
  const ScalarType wide = compute_type(x), type = check_product(x, fc1_weight);
  check_tokens(x, 4, x.scalar_type());
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  const int64_t hidden = fc1_weight.size(0);
  check_product(x, fc2_weight);
  check_layer(norm_weight, norm_bias, wide, wide, shape.channels, 1);
  check_layer(fc1_weight, fc1_bias, type, wide, hidden, shape.channels);
  check_layer(conv_weight, conv_bias, wide, wide, hidden, 9);
  check_layer(fc2_weight, fc2_bias, type, wide, shape.channels, hidden);
  Tensor out = torch::stable::empty_like(x);
  with_layer_types(x, fc1_weight, [&]<typename T, typename X, typename W>(T, X, W) {
    const LayerNorm<T> norm{data<T>(norm_weight), data<T>(norm_bias), static_cast<T>(eps)};
    feed_forward(shape, data<X>(x), norm, hidden, layer<T, W>(fc1_weight, fc1_bias),
                 layer<T>(conv_weight, conv_bias), layer<T, W>(fc2_weight, fc2_bias), data<X>(out));
  });
  return out;
}

void check_conv_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  const ScalarType type = compute_type(x);
  STD_TORCH_CHECK(x.scalar_type() == type, "lf_dense: conv_gelu takes float32 or float64 maps.");
  check_tokens(x, 4, type);
  check_layer(weight, bias, type, type, x.size(3), 9);
}

Tensor conv_gelu(const Tensor& x, const Tensor& weight, const Tensor& bias) {
  check_conv_gelu(x, weight, bias);
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  Tensor out = torch::stable::empty_like(x);
  with_compute_type(
      x, [&]<typename T>(T) { conv_gelu_of<T>(shape, data<T>(x), layer<T>(weight, bias), data<T>(out)); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> conv_gelu_backward(const Tensor& grad, const Tensor& x,
                                                      const Tensor& weight, const Tensor& bias) {
  check_conv_gelu(x, weight, bias);
  check_same(grad, x, 0, 4, "the gradient and the map");
  check_tokens(grad, 4, x.scalar_type());
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  Tensor dx = torch::stable::empty_like(x), dweight = torch::stable::empty_like(weight),
         dbias = torch::stable::empty_like(bias);
  with_compute_type(x, [&]<typename T>(T) {
    conv_gelu_gradients<T>(shape, data<T>(grad), data<T>(x), layer<T>(weight, bias), data<T>(dx),
                           data<T>(dweight), data<T>(dbias));
  });
  return {dx, dweight, dbias};
}

// Tokens (batch, .., heads * channels), contiguous, as heads.
View heads_view(const Tensor& tokens, int64_t heads) {
  const int64_t channels = tokens.size(-1);
  int64_t rows = 1;
  for (int64_t i = 1; i + 1 < tokens.dim(); ++i) rows *= tokens.size(i);
  return {static_cast<char*>(tokens.data_ptr()),
          {tokens.size(0), heads, rows, channels / heads},
          {rows * channels, channels / heads, channels, 1},
          dtype_of(tokens)};
}

// A small map's layers take less time than their calls from Python do, so one call makes them all.
Tensor attention_block(const Tensor& x, const Tensor& norm1_weight, const Tensor& norm1_bias,
                       double norm1_eps, const Tensor& q_weight, const Tensor& q_bias, const Tensor& k_weight,
                       const Tensor& k_bias, const Tensor& v_weight, const Tensor& v_bias, const Tensor& rows,
                       const Tensor& columns, int64_t num_heads, int64_t grid_rows, int64_t grid_columns,
                       double scale, int64_t iters, double eps, double tau, const Tensor& conv_weight,
                       const Tensor& conv_bias, const Tensor& proj_weight, const Tensor& proj_bias,
                       const Tensor& norm2_weight, const Tensor& norm2_bias, double norm2_eps,
                       const Tensor& fc1_weight, const Tensor& fc1_bias, const Tensor& ffn_conv_weight,
                       const Tensor& ffn_conv_bias, const Tensor& fc2_weight, const Tensor& fc2_bias) {
  const auto attend = [&] {
    const auto [q, k, v] = project_heads(x, norm1_weight, norm1_bias, norm1_eps, q_weight, q_bias, k_weight,
                                         k_bias, v_weight, v_bias, rows, columns);
    STD_TORCH_CHECK(num_heads > 0 && x.size(3) % num_heads == 0, "lf_dense: ", num_heads,
                    " heads do not divide ", x.size(3), " channels.");
    const Tensor landmarks = pool_tokens(q, grid_rows, grid_columns), out = torch::stable::empty_like(q);
    const View points = heads_view(landmarks, num_heads);
    const int64_t heads = points.heads(), m = points.rows(), channels = points.channels();
    with_compute_type(x, [&]<typename T>(T) {
      const Scratch<T> inverse(heads * m * m), sums(heads * m * channels), mass(heads * m),
          mean(heads * channels);
      attention_forward<T>(heads_view(q, num_heads), heads_view(k, num_heads), heads_view(v, num_heads),
                           points, {static_cast<T>(scale), static_cast<T>(tau)}, iters, eps,
                           heads_view(out, num_heads), {inverse, sums, mass, mean});
    });
    return merge_heads(x, out, v, conv_weight, conv_bias, proj_weight, proj_bias);
  };
  return conv_ffn(attend(), norm2_weight, norm2_bias, norm2_eps, fc1_weight, fc1_bias, ffn_conv_weight,
                  ffn_conv_bias, fc2_weight, fc2_bias);
}

std::tuple<Tensor, Tensor> norm_to_map(const Tensor& x, const Tensor& norm_weight, const Tensor& norm_bias,
                                       double eps, bool with_map) {
  const ScalarType wide = compute_type(x), type = x.scalar_type();
  STD_TORCH_CHECK(type == wide || type == ScalarType::BFloat16,
                  "lf_dense: the norm takes float32, float64 or bfloat16 tokens.");
  check_tokens(x, 4, type);
  const Tokens shape{x.size(0), x.size(1), x.size(2), x.size(3)};
  check_layer(norm_weight, norm_bias, wide, wide, shape.channels, 1);
  Tensor tokens = torch::stable::empty_like(x),
         map = empty({with_map ? shape.batch : 0, shape.channels, shape.height, shape.width}, type, x);
  STD_TORCH_CHECK(type == wide || shape.channels % 2 == 0,
                  "lf_dense: bfloat16 tokens take an even number of channels, and here are ", shape.channels,
                  ".");
  with_token_types(x, [&]<typename T, typename X>(T, X) {
    map_of_tokens(shape, data<X>(x), {data<T>(norm_weight), data<T>(norm_bias), static_cast<T>(eps)},
                  data<X>(tokens), with_map ? data<X>(map) : nullptr);
  });
  return {tokens, map};
}

}  // namespace
}  // namespace lf

LF_IMPLEMENT(CPU, m) {
  m.impl("newton_schulz_inverse", TORCH_BOX(&lf::newton_schulz_inverse));
  m.impl("project_heads", TORCH_BOX(&lf::project_heads));
  m.impl("pool_tokens", TORCH_BOX(&lf::pool_tokens));
  m.impl("merge_heads", TORCH_BOX(&lf::merge_heads));
  m.impl("conv_ffn", TORCH_BOX(&lf::conv_ffn));
  m.impl("conv_gelu", TORCH_BOX(&lf::conv_gelu));
  m.impl("conv_gelu_backward", TORCH_BOX(&lf::conv_gelu_backward));
  m.impl("attention_block", TORCH_BOX(&lf::attention_block));
  m.impl("norm_to_map", TORCH_BOX(&lf::norm_to_map));
  m.impl("laplacian_attention", TORCH_BOX(&lf::laplacian_attention));
  m.impl("laplacian_attention_backward", TORCH_BOX(&lf::laplacian_attention_backward));
}
