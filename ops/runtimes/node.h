// The node LaplacianAttention of the ONNX domain lf_dense, version 1, without any runtime:
//
//   q, k, v (B, N, heads, d), landmarks (B, heads, m, d) -> (B, N, heads, d)
//
// q, k and v lie as a projection leaves them, so that a graph needs no transposes around the node. What it
// computes is the attention of ../cpu with the normalization "mass", in float32 whatever comes in.
#pragma once

#include <cmath>
#include <stdexcept>
#include <string>
#include <vector>

#include "../cpu/laplacian_attention.h"
#include "../cpu/parallel.h"

namespace lf {

constexpr char kDomain[] = "lf_dense";
constexpr char kNode[] = "LaplacianAttention";

// A size that is not known yet is negative.
using Dims = std::vector<int64_t>;

struct NodeAttributes {
  float scale = 0, eps = 0, tau = 0;
  int64_t iters = 0;
};

[[noreturn]] inline void refuse(const std::string& why) {
  throw std::invalid_argument(std::string("lf_dense's ") + kNode + ": " + why);
}

inline void check_attributes(const NodeAttributes& node) {
  const auto positive = [](float value) { return value > 0 && std::isfinite(value); };
  if (!positive(node.scale) || !positive(node.eps) || !(positive(node.tau) || node.tau == 0) ||
      node.iters < 1) {
    refuse("scale is " + std::to_string(node.scale) + ", eps " + std::to_string(node.eps) + ", tau " +
           std::to_string(node.tau) + " and iters " + std::to_string(node.iters) +
           ": scale and eps have to be positive finite numbers, tau 0 or larger and iters at least 1.");
  }
}

inline std::string as_text(const Dims& dims) {
  std::string text;
  for (const int64_t size : dims)
    text += (text.empty() ? "" : ", ") + (size < 0 ? "?" : std::to_string(size));
  return "(" + text + ")";
}

inline void check_shapes(const Dims& q, const Dims& k, const Dims& v, const Dims& landmarks) {
  const auto agree = [](int64_t a, int64_t b) { return a < 0 || b < 0 || a == b; };
  bool same = q.size() == 4 && k.size() == 4 && v.size() == 4;
  for (int i = 0; same && i < 4; ++i) same = agree(q[i], k[i]) && agree(q[i], v[i]) && agree(k[i], v[i]);
  if (!same || q[1] == 0) {
    refuse("q, k and v have shapes " + as_text(q) + ", " + as_text(k) + " and " + as_text(v) +
           ": they have to be (B, N, heads, d), all three the same, with N at least 1.");
  }
  if (landmarks.size() != 4 || !agree(landmarks[0], q[0]) || !agree(landmarks[1], q[2]) ||
      !agree(landmarks[3], q[3]) || landmarks[2] == 0) {
    refuse("landmarks have shape " + as_text(landmarks) + " beside q of " + as_text(q) +
           ": they have to be (B, heads, m, d) with the same B, heads and d, and m at least 1.");
  }
}

// (B, N, heads, d), contiguous.
inline View token_view(const void* data, const Dims& size, DType dtype) {
  const int64_t row = size[2] * size[3];
  return {static_cast<char*>(const_cast<void*>(data)),
          {size[0], size[2], size[1], size[3]},
          {size[1] * row, size[3], row, 1},
          dtype};
}

// (B, heads, m, d), contiguous.
inline View landmark_view(const void* data, const Dims& size, DType dtype) {
  const int64_t head = size[2] * size[3];
  return {static_cast<char*>(const_cast<void*>(data)),
          {size[0], size[1], size[2], size[3]},
          {size[1] * head, head, size[3], 1},
          dtype};
}

inline void run_node(const NodeAttributes& node, const View& q, const View& k, const View& v,
                     const View& landmarks, const View& out) {
  const int64_t heads = q.heads(), m = landmarks.rows(), channels = q.channels();
  if (heads * channels == 0) return;
  // A backward pass would need these; all are small.
  const Scratch<float> inverse(heads * m * m), sums(heads * m * channels), mass(heads * m),
      mean_value(heads * channels);
  attention_forward<float>(q, k, v, landmarks, {node.scale, node.tau}, node.iters, node.eps, out,
                           {inverse, sums, mass, mean_value});
}

}  // namespace lf
