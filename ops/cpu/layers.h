// Whole layers of a block without gradients: each reads its tokens once.
//
// T is what is computed in, float or double; W is the type of the products' weights, and of queries, keys and
// values: T, or BFloat16 beside float. X is the type of the residual tokens: T, or BFloat16 beside its
// weights.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "parallel.h"
#include "vector_kernels.h"

namespace lf {

// Tokens that go through a layer together: four vectors of AVX-512's floats, a block of the product.
constexpr int64_t kPanel = 64;

// A linear layer of torch's, or a depthwise 3 x 3 convolution, contiguous: weight (rows, columns), bias
// (rows).
template <typename T, typename W = T>
struct Linear {
  const W* weight;
  const T* bias;
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

// How the pairs of a head's channels turn over a map: the first half of them with the row, by (2, pairs,
// height), the second with the column, by (2, pairs, width); cosines, then sines. Nothing turns where there
// are none.
template <typename T>
struct Rotation {
  const T *rows, *columns;
  int64_t pairs;
};

// Queries, keys and values of norm(x), each laid out as x; queries and keys turned.
template <typename T, typename X = T, typename W = T>
void heads_of(const Tokens& shape, const X* x, const LayerNorm<T>& norm, const Linear<T, W> (&layers)[3],
              const Rotation<T>& rotation, W* const (&out)[3]);

// Tokens averaged over a grid of cells, which no map has fewer rows or columns than: cell i of n covers
// floor(i size / n) to ceil((i + 1) size / n). out (batch, rows * columns, channels).
template <typename T, typename W = T>
void pooled(const Tokens& shape, const W* x, int64_t rows, int64_t columns, W* out);

// x + proj(attended + conv(values)).
template <typename T, typename X = T, typename W = T>
void tokens_of_heads(const Tokens& shape, const X* x, const W* attended, const W* values,
                     const Linear<T>& conv, const Linear<T, W>& proj, X* out);

// x + fc2(GELU(conv(fc1(norm(x))))), `hidden` channels wide inside. Nothing of that width is there as a
// whole.
template <typename T, typename X = T, typename W = T>
void feed_forward(const Tokens& shape, const X* x, const LayerNorm<T>& norm, int64_t hidden,
                  const Linear<T, W>& fc1, const Linear<T>& conv, const Linear<T, W>& fc2, X* out);

// GELU(conv(x)) of a map, for training, and the gradients; a weight's are in its own order.
template <typename T>
void conv_gelu_of(const Tokens& shape, const T* x, const Linear<T>& conv, T* out);
template <typename T>
void conv_gelu_gradients(const Tokens& shape, const T* grad, const T* x, const Linear<T>& conv, T* dx,
                         T* dweight, T* dbias);

// norm(x): as tokens, and as a map (batch, channels, height, width) unless that is null.
template <typename T, typename X = T>
void map_of_tokens(const Tokens& shape, const X* x, const LayerNorm<T>& norm, X* tokens, X* map);

// Parts of `size` as equal as can be: where part `index` of `count` begins.
inline int64_t part(int64_t size, int64_t count, int64_t index) { return size * index / count; }

// The kernels that read and write tokens of type X.
template <typename T, typename X>
const auto& token_kernels() {
  if constexpr (std::is_same_v<T, X>) {
    return kernels<T>();
  } else {
    return instruction_set().narrow;
  }
}

template <typename W>
constexpr DType dtype_named = std::is_same_v<W, double>  ? DType::kFloat64
                              : std::is_same_v<W, float> ? DType::kFloat32
                                                         : DType::kBFloat16;

// Packed rows into (cols, kPanel); the last vector of tokens is filled up with zeros.
template <typename T>
void panel_of_rows(T* rows, int64_t count, int64_t cols, T* panel) {
  const int64_t tokens = padded(count);
  std::fill_n(rows + count * cols, (tokens - count) * cols, T{0});
  kernels<T>().transpose(rows, cols, tokens, cols, panel, kPanel);
}

// Tokens on their way into a panel: gathered as rows.
template <typename T, typename X>
class Gathered {
 public:
  explicit Gathered(int64_t channels) : channels_(channels), cols_(padded(channels)), rows_(kPanel * cols_) {}

  // `count` contiguous tokens, as rows `first` and on.
  void set(const X* x, int64_t first, int64_t count) {
    kernels<T>().pack(x, dtype_named<X>, channels_, 1, count, count, channels_, cols_, rows_ + first * cols_);
  }

  // The first `count` rows, as a panel (channels, kPanel) and zeros to fill up the last vector.
  void to_panel(int64_t count, T* panel) { panel_of_rows<T>(rows_, count, cols_, panel); }

 private:
  int64_t channels_, cols_;
  Scratch<T> rows_;
};

// Words of two channels are half as many to transpose.
template <>
class Gathered<float, BFloat16> {
 public:
  explicit Gathered(int64_t channels)
      : words_(channels / 2), cols_(padded(words_)), rows_(kPanel * cols_), transposed_(cols_ * kPanel) {
    rows_.zeroed(kPanel * cols_);
  }

  void set(const BFloat16* x, int64_t first, int64_t count) {
    for (int64_t i = 0; i < count; ++i)
      std::memcpy(rows_ + (first + i) * cols_, x + i * 2 * words_, words_ * sizeof(float));
  }

  void to_panel(int64_t count, float* panel) {
    panel_of_rows<float>(rows_, count, cols_, transposed_);
    instruction_set().narrow.unpair(reinterpret_cast<const uint32_t*>(transposed_.get()), kPanel, 2 * words_,
                                    padded(count), panel, kPanel);
  }

 private:
  int64_t words_, cols_;
  Scratch<float> rows_, transposed_;  // never computed with
};

// A panel of tokens as products with weights of type W take it.
template <typename T, typename W>
class Factor {
 public:
  // Activations between two layers, of so many channels each.
  using Held = T;
  static constexpr int64_t kHeld = 1;

  // `most_channels` is 0 where every panel comes by set().
  explicit Factor(int64_t most_channels) : active_(most_channels * kPanel) {}

  // A panel (channels, kPanel), which has to stay.
  void set(const T* panel, int64_t channels, int64_t tokens) {
    panel_ = panel;
    channels_ = channels;
    tokens_ = tokens;
  }

  // GELU of a convolution, see vector_kernels.h.
  void set_active(const Held* x, int64_t stride, int64_t width, const T* left, const T* right,
                  const Linear<T>& conv, int64_t channels, int64_t tokens) {
    kernels<T>().convolve_gelu(x, stride, width, left, right, conv.weight, conv.bias, channels, tokens,
                               active_, kPanel);
    set(active_, channels, tokens);
  }

  // out (rows, tokens) = bias + weight panel; without a bias it adds to what is there.
  void product(const T* weight, int64_t weight_row, const T* bias, int64_t rows, T* out,
               int64_t out_stride) const {
    if (bias) {
      kernels<T>().linear(out, out_stride, weight, weight_row, bias, panel_, kPanel, rows, channels_,
                          tokens_);
    } else {
      kernels<T>().product(out, out_stride, weight, weight_row, 1, panel_, kPanel, rows, channels_, tokens_,
                           true);
    }
  }

  void held_product(const T* weight, int64_t weight_row, const T* bias, int64_t rows, Held* out,
                    int64_t out_stride) const {
    product(weight, weight_row, bias, rows, out, out_stride);
  }

 private:
  Scratch<T> active_;
  const T* panel_ = nullptr;
  int64_t channels_ = 0, tokens_ = 0;
};

// Rounded to words of two channels; their number is even.
template <>
class Factor<float, BFloat16> {
 public:
  using Held = uint32_t;
  static constexpr int64_t kHeld = 2;

  explicit Factor(int64_t most_channels) : words_(most_channels / 2 * kPanel) {}

  void set(const float* panel, int64_t channels, int64_t tokens) {
    instruction_set().narrow.pair(panel, kPanel, channels, tokens, words_, kPanel);
    channels_ = channels;
    tokens_ = tokens;
  }

  void set_active(const Held* x, int64_t stride, int64_t width, const float* left, const float* right,
                  const Linear<float>& conv, int64_t channels, int64_t tokens) {
    instruction_set().narrow.convolve_gelu(x, stride, width, left, right, conv.weight, conv.bias, channels,
                                           tokens, words_, kPanel);
    channels_ = channels;
    tokens_ = tokens;
  }

  void product(const BFloat16* weight, int64_t weight_row, const float* bias, int64_t rows, float* out,
               int64_t out_stride) const {
    instruction_set().narrow.linear(out, out_stride, weight, weight_row, bias, words_, kPanel, rows,
                                    channels_, tokens_);
  }

  void held_product(const BFloat16* weight, int64_t weight_row, const float* bias, int64_t rows, Held* out,
                    int64_t out_stride) const {
    instruction_set().narrow.linear_pairs(out, out_stride, weight, weight_row, bias, words_, kPanel, rows,
                                          channels_, tokens_);
  }

 private:
  Scratch<uint32_t> words_;
  int64_t channels_ = 0, tokens_ = 0;
};

// Instantiates `define(T, X, W)` for every combination that there is.
#define LF_FOR_LAYER_TYPES(define)                                                          \
  define(float, float, float) define(double, double, double) define(float, float, BFloat16) \
      define(float, BFloat16, BFloat16)

}  // namespace lf
