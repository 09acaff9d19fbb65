// The inner loops of every CPU operator, on packed tiles; vector_kernels.cpp is compiled once for each
// instruction set.
//
// A tile is kTile tokens. Packed rows are `cols` channels apart, a multiple of kAlign, padded with zeros: a
// channel that is zero on both sides adds nothing to an L1 distance or to a product. Every pointer is aligned
// to 64 bytes.
#pragma once

#include <cstdint>

#include "../dtype.h"

namespace lf {

constexpr int64_t kTile = 32;
constexpr int64_t kAlign = 16;

// Of a row's convolution at once.
constexpr int64_t kChannels = 128;

constexpr int64_t padded(int64_t n) { return (n + kAlign - 1) / kAlign * kAlign; }

// Memory that the steps after this one will read or write: `rows` runs of `bytes`, `stride` bytes apart.
struct Region {
  const char* data;
  int64_t stride, bytes, rows;
};

struct Ahead {
  Region regions[4];
  int count = 0;

  void add(const Region& region) {
    if (region.rows > 0 && region.bytes > 0) regions[count++] = region;
  }
};

template <typename T>
struct Kernels {
  // rows x channels of any strides (in elements) and dtype into rows of `cols`; rows up to `padded_rows`
  // become zero.
  void (*pack)(const void* src, DType dtype, int64_t row_stride, int64_t channel_stride, int64_t rows,
               int64_t padded_rows, int64_t channels, int64_t cols, T* dst);
  // The reverse, rounding once.
  void (*unpack)(const T* src, int64_t rows, int64_t channels, int64_t cols, void* dst, DType dtype,
                 int64_t row_stride, int64_t channel_stride);
  // (rows, cols) into (cols, rows), strides and sizes of any kind; each row of src is readable up to the next
  // multiple of kAlign.
  void (*transpose)(const T* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst, int64_t dst_stride);
  // out[j][i] = exp(-|x_i - y_j|_1 / scale): x (channels, kTile) and y (channels, y_stride) transposed, out
  // (m, kTile). Meanwhile `ahead` comes into the cache.
  void (*kernel_tile)(const T* x, const T* y, int64_t y_stride, int64_t channels, int64_t m, T scale,
                      const Ahead& ahead, T* out);
  // out[r][c] (+)= sum_k a[r * a_row + k * a_k] b[k][c]; cols a multiple of kAlign.
  void (*product)(T* out, int64_t out_stride, const T* a, int64_t a_row, int64_t a_k, const T* b,
                  int64_t b_stride, int64_t rows, int64_t depth, int64_t cols, bool accumulate);
  // out[r][c] = bias[r] + sum_k a[r * a_row + k] b[k][c]; cols a multiple of kAlign.
  void (*linear)(T* out, int64_t out_stride, const T* a, int64_t a_row, const T* bias, const T* b,
                 int64_t b_stride, int64_t rows, int64_t depth, int64_t cols);
  // out[c][i] = GELU of bias[c] and the 3 x 3 neighbours of token i by weight[c][9]: tokens of a map of
  // `width` columns lie in a row, channels `stride` apart, and x, of any alignment, is readable `width` + 1
  // tokens to both sides. `left` and `right` have no bit set where a token has no neighbour on that side,
  // and all bits elsewhere. tokens a multiple of kAlign.
  void (*convolve_gelu)(const T* x, int64_t stride, int64_t width, const T* left, const T* right,
                        const T* weight, const T* bias, int64_t channels, int64_t tokens, T* out,
                        int64_t out_stride);
  // The next three go along one row of a map whose pixels are `stride` apart: a depthwise 3 x 3 convolution
  // of at most kChannels channels, taps[10][kChannels] with the bias last. rows: that above, the row, that
  // below; null outside of the map. taps and sums are aligned and padded, nothing else is.
  //
  // out = convolution.
  void (*conv_row)(const T* const* rows, int64_t stride, int64_t width, const T* taps, int64_t channels,
                   T* out, int64_t out_stride);
  // out = GELU(convolution).
  void (*conv_gelu_row)(const T* const* rows, int64_t stride, int64_t width, const T* taps, int64_t channels,
                        T* out, int64_t out_stride);
  // dz = grad GELU'(convolution), and the taps' gradients are added to sums[10][kChannels] unless null.
  // grad's pixels are `stride` apart too.
  void (*conv_gelu_gradient_row)(const T* const* rows, int64_t stride, int64_t width, const T* taps,
                                 int64_t channels, const T* grad, T* dz, int64_t dz_stride, T* sums);
  // Layer normalisation of tokens over their channels, in a panel (channels, stride). tokens a multiple of
  // kAlign.
  void (*normalize)(T* panel, int64_t stride, int64_t channels, int64_t tokens, const T* weight,
                    const T* bias, T eps);
  // This and the next read and write tokens, which may be narrower (see below).
  // out[i][c] = added[i][c] + bias[c] and the 3 x 3 neighbours, by weight[9][c], of token `first` + i of a
  // map (height, width, channels) with zeros around; out in rows of `cols`, padded with zeros. Nothing here
  // but out is aligned.
  void (*convolve_add)(const T* map, int64_t height, int64_t width, int64_t first, int64_t count,
                       const T* weight, const T* bias, const T* added, int64_t channels, int64_t cols,
                       T* out);
  // out[i][c] = x[i][c] + rows[i][c]: channels of tokens that are `stride` apart, rows of `cols`.
  void (*add)(const T* x, int64_t stride, const T* rows, int64_t count, int64_t channels, int64_t cols,
              T* out);
  // x (channels, tokens) of heads, turned: channels c and c + head_dims / 2 are a pair, tables (head_dims /
  // 2, tokens). tokens a multiple of kAlign.
  void (*rotate)(T* x, const T* cos, const T* sin, int64_t heads, int64_t head_dims, int64_t tokens);
  // sum[i] += x[i]; n a multiple of kAlign.
  void (*accumulate)(T* sum, const T* x, int64_t n);
  // rows[i][c] = rows[i][c] factors[i] + offsets[c]; cols a multiple of kAlign.
  void (*affine)(T* rows, int64_t count, int64_t cols, const T* factors, const T* offsets);
  // t = w[j][i] sign(x_ic - y_jc), sign(0) = 0: dx[i][c] -= t and dy[j][c] += t; x, dx (rows, cols), y, dy
  // (m, cols), w (m, kTile).
  void (*sign_tile)(const T* x, const T* y, const T* w, int64_t rows, int64_t m, int64_t cols, T* dx, T* dy);
  // The floor: `steps` rounds of independent subtract, absolute value and accumulate on a register file of
  // vectors; returns their sum.
  T (*floor_loop)(int64_t steps);
  int64_t pairs_per_step;
};

// Rows of a layer that go through products together.
constexpr int64_t kGroup = 64;

// Layers of bfloat16 weights, computed and summed in float32. Tokens lie in rows of words of two channels:
// channel 2 c is the lower half. A layer's weights are packed: for each group of kGroup rows words of two
// inputs, (inputs / 2, kGroup).
struct NarrowKernels {
  // Floats of a register: the order of the rows in a group (see linear_words).
  int64_t lanes;
  // As above.
  void (*convolve_add)(const BFloat16* map, int64_t height, int64_t width, int64_t first, int64_t count,
                       const float* weight, const float* bias, const BFloat16* added, int64_t channels,
                       int64_t cols, float* out);
  void (*add)(const BFloat16* x, int64_t stride, const float* rows, int64_t count, int64_t channels,
              int64_t cols, BFloat16* out);
  // Words (channels / 2, tokens) into floats (channels, tokens). channels even, tokens a multiple of kAlign.
  void (*unpair)(const uint32_t* words, int64_t stride, int64_t channels, int64_t tokens, float* out,
                 int64_t out_stride);
  // out[i][r] = bias[r] + weight[r] tokens[i], of `depth` words: `count` tokens, `rows` of a group, a
  // multiple of 2 kAlign. Without a bias it adds to what is there.
  void (*linear_rows)(const uint32_t* tokens, int64_t stride, int64_t count, const uint32_t* weight,
                      const float* bias, int64_t depth, int64_t rows, float* out, int64_t out_stride);
  // The same of all of a group, rounded to words: out (count, kGroup / 2). Of each 2 `lanes` rows the even
  // ones come first in the weights and the bias (see paired_row).
  void (*linear_words)(const uint32_t* tokens, int64_t stride, int64_t count, const uint32_t* weight,
                       const float* bias, int64_t depth, uint32_t* out);
  // out[i] = GELU of bias and the 3 x 3 neighbours, to 1e-5: kGroup channels of `count` tokens of a line. Of
  // the lines above, here and below, (count + 2, kGroup / 2) words, the first token is the left neighbour of
  // out's first. taps[9][2][kGroup / 2]: words of even channels, then of odd ones, whose other half is 0;
  // bias[2][kGroup / 2].
  void (*conv_gelu_words)(const uint32_t* const* lines, int64_t count, const uint32_t* taps,
                          const float* bias, uint32_t* out, int64_t out_stride);
  // Layer normalisation of contiguous tokens.
  void (*normalize_wide_rows)(const float* x, int64_t count, int64_t channels, const float* weight,
                              const float* bias, float eps, BFloat16* out);
  void (*normalize_rows)(const BFloat16* x, int64_t count, int64_t channels, const float* weight,
                         const float* bias, float eps, BFloat16* out);
  // Rows of `cols`, a multiple of kAlign, rounded to tokens that are `stride` apart.
  void (*round_rows)(const float* rows, int64_t count, int64_t channels, int64_t cols, BFloat16* out,
                     int64_t stride);
  // The same of heads whose channels turn: those of pair p are p and p + 2 pairs of a head. The first `pairs`
  // of them turn with the map's row, by row[2][pairs], cosines and sines, and the others with a token's
  // column, by columns[count][2][pairs].
  void (*turn_rows)(const float* rows, int64_t count, int64_t cols, const float* row, const float* columns,
                    int64_t heads, int64_t pairs, BFloat16* out, int64_t stride);
};

// Which row of a group of weights is at a position, where products are rounded to words.
constexpr int64_t paired_row(int64_t position, int64_t lanes) {
  return position / (2 * lanes) * 2 * lanes + position % lanes * 2 + position / lanes % 2;
}

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels<float> f32;
  Kernels<double> f64;
  // Copies past the caches, which keep what they have. Such stores need a fence before another thread reads.
  void (*stream)(const void* src, int64_t bytes, void* dst);
  NarrowKernels narrow;
};

// Those compiled in, widest first, ended by a null pointer.
extern const InstructionSet* const compiled_instruction_sets[];

// The widest that this processor runs, or the one that LF_DENSE_INSTRUCTION_SET names; chosen once.
const InstructionSet& instruction_set();

template <typename T>
const Kernels<T>& kernels();
template <>
inline const Kernels<float>& kernels<float>() {
  return instruction_set().f32;
}
template <>
inline const Kernels<double>& kernels<double>() {
  return instruction_set().f64;
}

}  // namespace lf
