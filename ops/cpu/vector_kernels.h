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
  // and all bits elsewhere. out (channels, tokens); tokens a multiple of kAlign.
  void (*convolve_gelu)(const T* x, int64_t stride, int64_t width, const T* left, const T* right,
                        const T* weight, const T* bias, int64_t channels, int64_t tokens, T* out);
  // Layer normalisation of `rows` contiguous rows of channels into rows of `cols`, padded with zeros; out
  // alone is aligned.
  void (*normalize)(const T* x, int64_t rows, int64_t channels, int64_t cols, const T* weight, const T* bias,
                    T eps, T* out);
  // x (channels, tokens) of heads, turned: x[c] cos[c] + x[c +- head_dims / 2] sin[c], tables (head_dims,
  // tokens). tokens a multiple of kAlign.
  void (*rotate)(T* x, const T* cos, const T* sin, int64_t heads, int64_t head_dims, int64_t tokens);
  // out[i][c] = added[i][c] + bias[c] and the 3 x 3 neighbours, by weight[9][c], of token `first` + i of a
  // map (height, width, channels) with zeros around; out in rows of `cols`, padded with zeros. Nothing here
  // but out is aligned.
  void (*convolve_add)(const T* map, int64_t height, int64_t width, int64_t first, int64_t count,
                       const T* weight, const T* bias, const T* added, int64_t channels, int64_t cols,
                       T* out);
  // t = w[j][i] sign(x_ic - y_jc), sign(0) = 0: dx[i][c] -= t and dy[j][c] += t; x, dx (rows, cols), y, dy
  // (m, cols), w (m, kTile).
  void (*sign_tile)(const T* x, const T* y, const T* w, int64_t rows, int64_t m, int64_t cols, T* dx, T* dy);
  // The floor: `steps` rounds of independent subtract, absolute value and accumulate on a register file of
  // vectors; returns their sum.
  T (*floor_loop)(int64_t steps);
  int64_t pairs_per_step;
};

struct InstructionSet {
  const char* name;
  bool (*supported)();
  Kernels<float> f32;
  Kernels<double> f64;
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
