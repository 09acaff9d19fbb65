// Every operator's schema, once. Implementations: cpu/ and cuda/; fakes, gradients and autocast:
// lf_dense/native.py.
#include "tensor.h"

LF_DEFINE(m) {
  // (B, h, N, d) and (B, h, M, d) to (B, h, N, M).
  m.def("laplacian_kernel(Tensor x, Tensor y, float scale) -> Tensor");
  m.def("laplacian_kernel_backward(Tensor grad, Tensor x, Tensor y, float scale) -> (Tensor, Tensor)");
  // (..., m, m), float32 or float64.
  m.def("newton_schulz_inverse(Tensor w, int iters, float eps) -> Tensor");
  // Beside the output what the backward pass needs, all small: (W + eps I)^-1, the sums C_k^T (V - mean V) /
  // N, the means of the columns of C_k and the mean of V.
  m.def(
      "laplacian_attention(Tensor q, Tensor k, Tensor v, Tensor landmarks, float scale, int iters, float "
      "eps, float tau)"
      " -> (Tensor out, Tensor inverse, Tensor sums, Tensor mass, Tensor mean_value)");
  m.def(
      "laplacian_attention_backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor landmarks, Tensor "
      "inverse, Tensor sums,"
      " Tensor mass, Tensor mean_value, float scale, float tau) -> (Tensor, Tensor, Tensor, Tensor)");
  // A block's layers without gradients: maps (B, H, W, C), contiguous. Queries, keys and values of norm(x),
  // the first two turned by tables of the map's rows (2, d / 4, H) and columns (2, d / 4, W): cosines and
  // sines, or by none of (2, 0, ..).
  m.def(
      "project_heads(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor q_weight, Tensor "
      "q_bias, Tensor k_weight, Tensor k_bias, Tensor v_weight, Tensor v_bias, Tensor rows, Tensor columns)"
      " -> (Tensor q, Tensor k, Tensor v)");
  // The map averaged over a grid, (B, rows * columns, C); a smaller map has a cell for each token.
  m.def("pool_tokens(Tensor x, int rows, int columns) -> Tensor");
  // x + proj(attended + conv(values)), with conv (C, 1, 3, 3).
  m.def(
      "merge_heads(Tensor x, Tensor attended, Tensor values, Tensor conv_weight, Tensor conv_bias, Tensor "
      "proj_weight, Tensor proj_bias) -> Tensor");
  // x + fc2(GELU(conv(fc1(norm(x))))).
  m.def(
      "conv_ffn(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, Tensor fc1_weight, Tensor "
      "fc1_bias, Tensor conv_weight, Tensor conv_bias, Tensor fc2_weight, Tensor fc2_bias) -> Tensor");
  // GELU(conv(x)), with conv (C, 1, 3, 3), and its gradients.
  m.def("conv_gelu(Tensor x, Tensor weight, Tensor bias) -> Tensor");
  m.def("conv_gelu_backward(Tensor grad, Tensor x, Tensor weight, Tensor bias) -> (Tensor, Tensor, Tensor)");
  // A whole block: the operators above around the attention, whose landmarks are pooled over the grid.
  m.def(
      "attention_block(Tensor x, Tensor norm1_weight, Tensor norm1_bias, float norm1_eps, Tensor q_weight, "
      "Tensor q_bias, Tensor k_weight, Tensor k_bias, Tensor v_weight, Tensor v_bias, Tensor rows, Tensor "
      "columns, int num_heads, int grid_rows, int grid_columns, float scale, int iters, float eps, float "
      "tau, Tensor conv_weight, Tensor conv_bias, Tensor proj_weight, Tensor proj_bias, Tensor "
      "norm2_weight, Tensor norm2_bias, float norm2_eps, Tensor fc1_weight, Tensor fc1_bias, Tensor "
      "ffn_conv_weight, Tensor ffn_conv_bias, Tensor fc2_weight, Tensor fc2_bias) -> Tensor");
  // norm(x), as tokens and, unless that is an empty tensor, as a map (B, C, H, W), both contiguous.
  m.def(
      "norm_to_map(Tensor x, Tensor norm_weight, Tensor norm_bias, float eps, bool with_map) -> (Tensor "
      "tokens, Tensor map)");
  // `pairs` scalar subtract and absolute-accumulate pairs on all of a device, for the benchmark's floor;
  // returns one number.
  m.def("arithmetic_floor(Tensor like, int pairs) -> Tensor");
}
