#include <algorithm>
#include <array>

#include "layers.h"

namespace lf {

namespace {

// Rows of a part of the work. The backward pass computes one more on either side.
constexpr int64_t kRows = 16;

// Weights and biases of some channels, as vector_kernels.h takes them and sums their gradients.
constexpr int64_t kTaps = 10 * kChannels;

// Those of each kChannels channels, or without a bias those of the convolution's transpose.
template <typename T>
Scratch<T> taps_of(const Linear<T>& conv, int64_t channels, int64_t blocks, bool transposed) {
  Scratch<T> taps(blocks * kTaps);
  taps.zeroed(blocks * kTaps);
  for (int64_t c = 0; c < channels; ++c) {
    T* to = taps + c / kChannels * kTaps + c % kChannels;
    for (int64_t tap = 0; tap < 9; ++tap)
      to[(transposed ? 8 - tap : tap) * kChannels] = conv.weight[c * 9 + tap];
    if (!transposed) to[9 * kChannels] = conv.bias[c];
  }
  return taps;
}

// Some rows and channels of one image, whatever the number of threads.
struct Parts {
  const Tokens& shape;
  int64_t segments = (shape.height + kRows - 1) / kRows;
  int64_t blocks = (shape.channels + kChannels - 1) / kChannels;
  int64_t count = shape.batch * segments * blocks;

  struct Part {
    int64_t image, first_row, end_row, block, first_channel, channels;
  };
  // Those of the same channels are `blocks` apart.
  Part operator[](int64_t index) const {
    const int64_t block = index % blocks, first_channel = block * kChannels;
    const int64_t segment = index / blocks % segments;
    return {index / (blocks * segments),
            segment * kRows,
            std::min(shape.height, (segment + 1) * kRows),
            block,
            first_channel,
            std::min(kChannels, shape.channels - first_channel)};
  }
};

// The row of a map; null outside.
template <typename T>
T* row_of(T* map, const Tokens& shape, const Parts::Part& part, int64_t row) {
  if (row < 0 || row >= shape.height) return nullptr;
  return map + (part.image * shape.height + row) * shape.width * shape.channels + part.first_channel;
}

// A row and its neighbours.
template <typename T>
std::array<const T*, 3> rows_of(const T* map, const Tokens& shape, const Parts::Part& part, int64_t row) {
  return {row_of(map, shape, part, row - 1), row_of(map, shape, part, row),
          row_of(map, shape, part, row + 1)};
}

}  // namespace

template <typename T>
void conv_gelu_of(const Tokens& shape, const T* x, const Linear<T>& conv, T* out) {
  const Kernels<T>& ops = kernels<T>();
  const Parts parts{shape};
  const Scratch<T> taps = taps_of(conv, shape.channels, parts.blocks, false);
  parallel(parts.count, [&](int64_t index) {
    const Parts::Part part = parts[index];
    for (int64_t y = part.first_row; y < part.end_row; ++y) {
      ops.conv_gelu_row(rows_of(x, shape, part, y).data(), shape.channels, shape.width,
                        taps + part.block * kTaps, part.channels, row_of(out, shape, part, y),
                        shape.channels);
    }
  });
}

template <typename T>
void conv_gelu_gradients(const Tokens& shape, const T* grad, const T* x, const Linear<T>& conv, T* dx,
                         T* dweight, T* dbias) {
  const Kernels<T>& ops = kernels<T>();
  const Parts parts{shape};
  const Scratch<T> taps = taps_of(conv, shape.channels, parts.blocks, false);
  const Scratch<T> transposed = taps_of(conv, shape.channels, parts.blocks, true);
  const Scratch<T> partials(parts.count * kTaps);
  share_out(parts.count, [&](Items& items) {
    // Of the gradient before the GELU three rows are enough.
    const int64_t ring_row = shape.width * kChannels;
    const Scratch<T> ring(3 * ring_row);
    const auto slot = [&](int64_t y) -> T* {
      return y < 0 || y >= shape.height ? nullptr : ring + y % 3 * ring_row;
    };
    for (int64_t index = items(); index >= 0; index = items()) {
      const Parts::Part part = parts[index];
      T* sums = partials + index * kTaps;
      std::fill_n(sums, kTaps, T{0});
      for (int64_t y = part.first_row - 1; y <= part.end_row; ++y) {
        if (slot(y)) {
          const bool own = y >= part.first_row && y < part.end_row;
          ops.conv_gelu_gradient_row(rows_of(x, shape, part, y).data(), shape.channels, shape.width,
                                     taps + part.block * kTaps, part.channels, row_of(grad, shape, part, y),
                                     slot(y), kChannels, own ? sums : nullptr);
        }
        const int64_t above = y - 1;
        if (above < part.first_row) continue;
        const T* rows[3] = {slot(above - 1), slot(above), slot(y)};
        ops.conv_row(rows, kChannels, shape.width, transposed + part.block * kTaps, part.channels,
                     row_of(dx, shape, part, above), shape.channels);
      }
    }
  });
  const Scratch<double> totals =
      add_partials<T>(partials, 1, parts.count / parts.blocks, parts.blocks * kTaps);
  parallel(parts.blocks, [&](int64_t block) {
    const double* total = totals + block * kTaps;
    const Parts::Part part = parts[block];
    for (int64_t c = 0; c < part.channels; ++c) {
      for (int64_t tap = 0; tap < 9; ++tap)
        dweight[(part.first_channel + c) * 9 + tap] = static_cast<T>(total[tap * kChannels + c]);
      dbias[part.first_channel + c] = static_cast<T>(total[9 * kChannels + c]);
    }
  });
}

#define LF_INSTANTIATE(T)                                                    \
  template void conv_gelu_of(const Tokens&, const T*, const Linear<T>&, T*); \
  template void conv_gelu_gradients(const Tokens&, const T*, const T*, const Linear<T>&, T*, T*, T*);
LF_INSTANTIATE(float)
LF_INSTANTIATE(double)
#undef LF_INSTANTIATE

}  // namespace lf
