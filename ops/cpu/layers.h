// Whole layers of a block without gradients: each reads its tokens once.
//
// T is what is computed in, float or double. Layers of the same type take tokens in panels, (channels,
// kPanel); those of bfloat16 weights take them as they lie, X being float or BFloat16.
#pragma once

#include <algorithm>
#include <cstdint>
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
template <typename T>
void heads_of(const Tokens& shape, const T* x, const LayerNorm<T>& norm, const Linear<T> (&layers)[3],
              const Rotation<T>& rotation, T* const (&out)[3]);
template <typename X>
void heads_of(const Tokens& shape, const X* x, const LayerNorm<float>& norm,
              const Linear<float, BFloat16> (&layers)[3], const Rotation<float>& rotation,
              BFloat16* const (&out)[3]);

// Tokens averaged over a grid of cells, which no map has fewer rows or columns than: cell i of n covers
// floor(i size / n) to ceil((i + 1) size / n). out (batch, rows * columns, channels).
template <typename T, typename W = T>
void pooled(const Tokens& shape, const W* x, int64_t rows, int64_t columns, W* out);

// x + proj(attended + conv(values)).
template <typename T>
void tokens_of_heads(const Tokens& shape, const T* x, const T* attended, const T* values,
                     const Linear<T>& conv, const Linear<T>& proj, T* out);
template <typename X>
void tokens_of_heads(const Tokens& shape, const X* x, const BFloat16* attended, const BFloat16* values,
                     const Linear<float>& conv, const Linear<float, BFloat16>& proj, X* out);

// x + fc2(GELU(conv(fc1(norm(x))))), `hidden` channels wide inside. Nothing of that width is there as a
// whole.
template <typename T>
void feed_forward(const Tokens& shape, const T* x, const LayerNorm<T>& norm, int64_t hidden,
                  const Linear<T>& fc1, const Linear<T>& conv, const Linear<T>& fc2, T* out);
template <typename X>
void feed_forward(const Tokens& shape, const X* x, const LayerNorm<float>& norm, int64_t hidden,
                  const Linear<float, BFloat16>& fc1, const Linear<float>& conv,
                  const Linear<float, BFloat16>& fc2, X* out);

// GELU(conv(x)) of a map, for training, and the gradients; a weight's are in its own order.
template <typename T>
void conv_gelu_of(const Tokens& shape, const T* x, const Linear<T>& conv, T* out);
template <typename T>
void conv_gelu_gradients(const Tokens& shape, const T* grad, const T* x, const Linear<T>& conv, T* dx,
                         T* dweight, T* dbias);

// norm(x): as tokens, and as a map (batch, channels, height, width) unless that is null.
template <typename T>
void map_of_tokens(const Tokens& shape, const T* x, const LayerNorm<T>& norm, T* tokens, T* map);
void map_of_tokens(const Tokens& shape, const BFloat16* x, const LayerNorm<float>& norm, BFloat16* tokens,
                   BFloat16* map);

// Parts of `size` as equal as can be: where part `index` of `count` begins.
inline int64_t part(int64_t size, int64_t count, int64_t index) { return size * index / count; }

// Asks for a part of contiguous memory: for all of much memory at once would hold up what comes between.
template <typename T>
void prefetch_part(const T* data, int64_t size, int64_t count, int64_t index) {
  const char *begin = reinterpret_cast<const char*>(data + part(size, count, index)),
             *end = reinterpret_cast<const char*>(data + part(size, count, index + 1));
  for (; begin < end; begin += 64) __builtin_prefetch(begin, 0, 2);
}

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

// A depthwise convolution's weight (channels, 9) as (9, channels).
template <typename T>
Scratch<T> by_tap(const Linear<T>& conv, int64_t channels) {
  Scratch<T> taps(9 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap * channels + c] = conv.weight[c * 9 + tap];
  }
  return taps;
}

// Packed rows into (cols, kPanel); the last vector of tokens is filled up with zeros.
template <typename T>
void panel_of_rows(T* rows, int64_t count, int64_t cols, T* panel) {
  const int64_t tokens = padded(count);
  std::fill_n(rows + count * cols, (tokens - count) * cols, T{0});
  kernels<T>().transpose(rows, cols, tokens, cols, panel, kPanel);
}

// Tokens on their way into a panel: gathered as rows.
template <typename T>
class Gathered {
 public:
  explicit Gathered(int64_t channels) : channels_(channels), cols_(padded(channels)), rows_(kPanel * cols_) {}

  // `count` contiguous tokens, as rows `first` and on.
  void set(const T* x, int64_t first, int64_t count) {
    kernels<T>().pack(x, dtype_named<T>, channels_, 1, count, count, channels_, cols_, rows_ + first * cols_);
  }

  // The first `count` rows, as a panel (channels, kPanel) and zeros to fill up the last vector.
  void to_panel(int64_t count, T* panel) { panel_of_rows<T>(rows_, count, cols_, panel); }

 private:
  int64_t channels_, cols_;
  Scratch<T> rows_;
};

}  // namespace lf
