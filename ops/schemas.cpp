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
  // `pairs` scalar subtract and absolute-accumulate pairs on all of a device, for the benchmark's floor;
  // returns one number.
  m.def("arithmetic_floor(Tensor like, int pairs) -> Tensor");
}
