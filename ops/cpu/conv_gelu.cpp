#include <algorithm>

#include "layers.h"

namespace lf {

namespace {

// Rows of a part of the work. The backward pass computes one more on either side.
constexpr int64_t kRows = 16;

// The weights (9, kChannels) of each kChannels channels, and those of the convolution's transpose.
template <typename T>
struct Taps {
  Scratch<T> weight, turned, bias;

  Taps(const Linear<T>& conv, int64_t channels, int64_t blocks)
      : weight(blocks * 9 * kChannels), turned(blocks * 9 * kChannels), bias(blocks * kChannels) {
    weight.zeroed(blocks * 9 * kChannels);
    turned.zeroed(blocks * 9 * kChannels);
    bias.zeroed(blocks * kChannels);
    std::copy_n(conv.bias, channels, bias.get());
    for (int64_t c = 0; c < channels; ++c) {
      const int64_t place = c / kChannels * 9 * kChannels + c % kChannels;
      for (int64_t tap = 0; tap < 9; ++tap) {
        weight[place + tap * kChannels] = conv.weight[c * 9 + tap];
        turned[place + (8 - tap) * kChannels] = conv.weight[c * 9 + tap];
      }
    }
  }
};

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

}  // namespace

template <typename T>
void conv_gelu_of(const Tokens& shape, const T* x, const Linear<T>& conv, T* out) {
  const Kernels<T>& ops = kernels<T>();
  const Parts parts{shape};
  const Taps<T> taps(conv, shape.channels, parts.blocks);
  parallel(parts.count, [&](int64_t index) {
    const Parts::Part part = parts[index];
    for (int64_t y = part.first_row; y < part.end_row; ++y) {
      const T* rows[3];
      for (int64_t i = 0; i < 3; ++i) rows[i] = row_of(x, shape, part, y + i - 1);
      ops.conv_gelu_row(rows, shape.channels, shape.width, taps.weight + part.block * 9 * kChannels,
                        taps.bias + part.block * kChannels, part.channels, row_of(out, shape, part, y),
                        shape.channels);
    }
  });
}

template <typename T>
void conv_gelu_gradients(const Tokens& shape, const T* grad, const T* x, const Linear<T>& conv, T* dx,
                         T* dweight, T* dbias) {
  const Kernels<T>& ops = kernels<T>();
  const Parts parts{shape};
  const Taps<T> taps(conv, shape.channels, parts.blocks);
  constexpr int64_t sums_size = 10 * kChannels;
  const Scratch<T> partials(parts.count * sums_size);
  share_out(parts.count, [&](const auto& take) {
    // Of the gradient before the GELU three rows are enough.
    const int64_t ring_row = shape.width * kChannels;
    const Scratch<T> ring(3 * ring_row);
    for (int64_t index = take(); index >= 0; index = take()) {
      const Parts::Part part = parts[index];
      const T *weight = taps.weight + part.block * 9 * kChannels,
              *turned = taps.turned + part.block * 9 * kChannels;
      T* sums = partials + index * sums_size;
      std::fill_n(sums, sums_size, T{0});
      const auto slot = [&](int64_t y) -> T* {
        return y < 0 || y >= shape.height ? nullptr : ring + y % 3 * ring_row;
      };
      for (int64_t y = part.first_row - 1; y <= part.end_row; ++y) {
        if (slot(y)) {
          const T* rows[3];
          for (int64_t i = 0; i < 3; ++i) rows[i] = row_of(x, shape, part, y + i - 1);
          const bool own = y >= part.first_row && y < part.end_row;
          ops.conv_gelu_gradient_row(rows, shape.channels, shape.width, weight,
                                     taps.bias + part.block * kChannels, part.channels,
                                     row_of(grad, shape, part, y), slot(y), kChannels, own ? sums : nullptr);
        }
        const int64_t above = y - 1;
        if (above < part.first_row) continue;
        const T* rows[3] = {slot(above - 1), slot(above), slot(y)};
        ops.conv_row(rows, kChannels, shape.width, turned, part.channels, row_of(dx, shape, part, above),
                     shape.channels);
      }
    }
  });
  parallel(parts.blocks, [&](int64_t block) {
    const Scratch<double> total(sums_size);
    add_partials<T>(partials + block * sums_size, parts.count / parts.blocks, parts.blocks * sums_size,
                    sums_size, total);
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
