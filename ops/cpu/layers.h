// Whole layers of a block without gradients, in float32 or float64: each reads its tokens once.
#pragma once

#include <algorithm>
#include <cstdint>

#include "vector_kernels.h"

namespace lf {

// Tokens that go through a layer together: four vectors of AVX-512's floats, a block of the product.
constexpr int64_t kPanel = 64;

// A linear layer of torch's, or a depthwise 3 x 3 convolution, contiguous: weight (rows, columns), bias
// (rows).
template <typename T>
struct Linear {
  const T *weight, *bias;
};

template <typename T>
struct LayerNorm {
  const T *weight, *bias;
  T eps;
};

// Tokens (batch, height * width, channels), contiguous.
struct Tokens {
  int64_t batch, height, width, channels;
  int64_t each() const { return height * width; }
};

// Queries, keys and values of norm(x), each laid out as x; queries and keys turned by tables (tokens,
// head_dims), or left alone where there are none.
template <typename T>
void heads_of(const Tokens& shape, const T* x, const LayerNorm<T>& norm, const Linear<T> (&layers)[3],
              const T* cos, const T* sin, int64_t heads, T* const (&out)[3]);

// x + proj(attended + conv(values)).
template <typename T>
void tokens_of_heads(const Tokens& shape, const T* x, const T* attended, const T* values,
                     const Linear<T>& conv, const Linear<T>& proj, T* out);

// x + fc2(GELU(conv(fc1(norm(x))))), `hidden` channels wide inside. Nothing of that width is there as a
// whole.
template <typename T>
void feed_forward(const Tokens& shape, const T* x, const LayerNorm<T>& norm, int64_t hidden,
                  const Linear<T>& fc1, const Linear<T>& conv, const Linear<T>& fc2, T* out);

// Packed rows into (cols, kPanel); the last vector of tokens is filled up with zeros.
template <typename T>
void panel_of_rows(T* rows, int64_t count, int64_t cols, T* panel) {
  const int64_t tokens = padded(count);
  std::fill_n(rows + count * cols, (tokens - count) * cols, T{0});
  kernels<T>().transpose(rows, cols, tokens, cols, panel, kPanel);
}

}  // namespace lf
