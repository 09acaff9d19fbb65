#include <bit>

#include "layers.h"

namespace lf {

namespace {

// Items of work for each thread, where there could be fewer: threads are never all free at the same time.
constexpr int64_t kTurns = 4;

// Tokens of one image, and the channels of the result that are computed for them.
struct Panel {
  int64_t image, first, count, first_channel, channels;
};

// Calls `worker(take)` on each thread; take(panel) hands out the panels of the batch until it is false. Where
// these are few, each is handed out several times, for some of the channels at a time: whole multiples of
// `unit`.
template <typename Worker>
void share_panels(const Tokens& shape, int64_t unit, const Worker& worker) {
  const int64_t panels = (shape.each() + kPanel - 1) / kPanel,
                all = std::max<int64_t>(1, shape.batch * panels);
  const int64_t units = (shape.channels + unit - 1) / unit;
  const int64_t parts = std::clamp<int64_t>(kTurns * pool_threads() / all, 1, units);
  share_out(shape.batch * panels * parts, [&](Items& items) {
    worker([&](Panel& panel) {
      const int64_t item = items();
      if (item < 0) return false;
      // Neighbours take other tokens and the same weights.
      const int64_t which = item / all, first = item % all % panels * kPanel;
      const int64_t channel = part(units, parts, which) * unit;
      panel = {item % all / panels, first, std::min(kPanel, shape.each() - first), channel,
               std::min(shape.channels, part(units, parts, which + 1) * unit) - channel};
      return true;
    });
  });
}

// A panel's cosines and sines, (2 pairs, kPanel) each.
template <typename T>
void turns_of(const Tokens& shape, const Panel& panel, const Rotation<T>& rotation, T* cos, T* sin) {
  const int64_t pairs = rotation.pairs;
  for (int64_t i = 0; i < panel.count;) {
    const int64_t row = (panel.first + i) / shape.width, column = (panel.first + i) % shape.width;
    const int64_t count = std::min(panel.count - i, shape.width - column);
    for (int64_t pair = 0; pair < pairs; ++pair) {
      const T *by_row = rotation.rows + pair * shape.height + row,
              *by_column = rotation.columns + pair * shape.width + column;
      std::fill_n(cos + pair * kPanel + i, count, by_row[0]);
      std::fill_n(sin + pair * kPanel + i, count, by_row[pairs * shape.height]);
      std::copy_n(by_column, count, cos + (pairs + pair) * kPanel + i);
      std::copy_n(by_column + pairs * shape.width, count, sin + (pairs + pair) * kPanel + i);
    }
    i += count;
  }
}

inline float widened(BFloat16 x) { return std::bit_cast<float>(static_cast<uint32_t>(x.bits) << 16); }
template <typename T>
T widened(T x) {
  return x;
}

// The mean of `count` runs of `size` numbers, `stride` apart.
template <typename T, typename W>
void average(const W* x, int64_t count, int64_t stride, int64_t size, T* mean) {
  for (int64_t c = 0; c < size; ++c) mean[c] = widened(x[c]);
  for (int64_t i = 1; i < count; ++i) {
    for (int64_t c = 0; c < size; ++c) mean[c] += widened(x[i * stride + c]);
  }
  for (int64_t c = 0; c < size; ++c) mean[c] /= count;
}

// Channels of a panel into tokens `stride` apart. Narrower ones are transposed as words of two, by way of
// `words` (channels / 2, kPanel).
template <typename T, typename W>
void transpose_out(const T* from, int64_t count, int64_t channels, T* words, W* to, int64_t stride) {
  if constexpr (std::is_same_v<T, W>) {
    kernels<T>().transpose(from, kPanel, channels, count, to, stride);
  } else {
    instruction_set().narrow.pair(from, kPanel, channels, padded(count), reinterpret_cast<uint32_t*>(words),
                                  kPanel);
    kernels<T>().transpose(words, kPanel, channels / 2, count, reinterpret_cast<T*>(to), stride / 2);
  }
}

}  // namespace

template <typename T, typename X, typename W>
void heads_of(const Tokens& shape, const X* x, const LayerNorm<T>& norm, const Linear<T, W> (&layers)[3],
              const Rotation<T>& rotation, W* const (&out)[3]) {
  const int64_t channels = shape.channels, cols = padded(channels), head_dims = 4 * rotation.pairs;
  share_panels(shape, head_dims ? head_dims : kAlign, [&](const auto& take) {
    const Scratch<T> rows(kPanel * cols), from(kPanel * cols), to(kPanel * cols), cos(kPanel * head_dims / 2),
        sin(kPanel * head_dims / 2);
    // What a short panel leaves unset is multiplied too.
    cos.zeroed(kPanel * head_dims / 2);
    sin.zeroed(kPanel * head_dims / 2);
    Gathered<T, X> gathered(channels);
    Factor<T, W> factor(channels);
    for (Panel panel; take(panel);) {
      const int64_t at = (panel.image * shape.each() + panel.first) * channels, tokens = padded(panel.count);
      gathered.set(x + at, 0, panel.count);
      gathered.to_panel(panel.count, from);
      kernels<T>().normalize(from, kPanel, channels, tokens, norm.weight, norm.bias, norm.eps);
      factor.set(from, channels, tokens);
      turns_of(shape, panel, rotation, cos.get(), sin.get());
      for (int i = 0; i < 3; ++i) {
        const int64_t channel = panel.first_channel;
        factor.product(layers[i].weight + channel * channels, channels, layers[i].bias + channel,
                       panel.channels, to, kPanel);
        if (head_dims && i < 2)
          kernels<T>().rotate(to, cos, sin, panel.channels / head_dims, head_dims, kPanel);
        transpose_out<T, W>(to, panel.count, panel.channels, rows, out[i] + at + channel, channels);
      }
    }
  });
}

template <typename T, typename W>
void pooled(const Tokens& shape, const W* x, int64_t rows, int64_t columns, W* out) {
  const int64_t channels = shape.channels;
  const auto begin = [](int64_t size, int64_t cells, int64_t cell) { return cell * size / cells; };
  const auto end = [](int64_t size, int64_t cells, int64_t cell) {
    return ((cell + 1) * size + cells - 1) / cells;
  };
  // Every row of the maps over the cells' columns, then these over their rows.
  const Scratch<T> means(shape.batch * shape.height * columns * channels);
  parallel(shape.batch * shape.height, [&](int64_t row) {
    T* mean = means + row * columns * channels;
    for (int64_t cell = 0; cell < columns; ++cell, mean += channels) {
      const int64_t first = begin(shape.width, columns, cell), last = end(shape.width, columns, cell);
      average<T>(x + (row * shape.width + first) * channels, last - first, channels, channels, mean);
    }
  });
  parallel(shape.batch * rows, [&](int64_t index) {
    const Scratch<T> mean(columns * channels);
    const int64_t image = index / rows, cell = index % rows;
    const int64_t first = begin(shape.height, rows, cell), last = end(shape.height, rows, cell);
    average<T>(means + (image * shape.height + first) * columns * channels, last - first, columns * channels,
               columns * channels, mean.get());
    kernels<T>().unpack(mean, 1, columns * channels, columns * channels, out + index * columns * channels,
                        dtype_named<W>, columns * channels, 1);
  });
}

template <typename T, typename X, typename W>
void tokens_of_heads(const Tokens& shape, const X* x, const W* attended, const W* values,
                     const Linear<T>& conv, const Linear<T, W>& proj, X* out) {
  const int64_t channels = shape.channels, cols = padded(channels);
  const Scratch<T> taps(9 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap * channels + c] = conv.weight[c * 9 + tap];
  }
  share_panels(shape, kAlign, [&](const auto& take) {
    const Scratch<T> rows(kPanel * cols), from(kPanel * cols), to(kPanel * cols);
    Factor<T, W> factor(channels);
    for (Panel panel; take(panel);) {
      const int64_t start = panel.image * shape.each() * channels, at = start + panel.first * channels;
      const int64_t tokens = padded(panel.count);
      token_kernels<T, W>().convolve_add(values + start, shape.height, shape.width, panel.first, panel.count,
                                         taps, conv.bias, attended + at, channels, cols, rows);
      panel_of_rows<T>(rows, panel.count, cols, from);
      factor.set(from, channels, tokens);
      const int64_t channel = panel.first_channel, here = padded(panel.channels);
      factor.product(proj.weight + channel * channels, channels, proj.bias + channel, panel.channels, to,
                     kPanel);
      kernels<T>().transpose(to, kPanel, panel.channels, tokens, rows, here);
      token_kernels<T, X>().add(x + at + channel, channels, rows, panel.count, panel.channels, here,
                                out + at + channel);
    }
  });
}

template <typename T, typename X>
void map_of_tokens(const Tokens& shape, const X* x, const LayerNorm<T>& norm, X* tokens, X* map) {
  const int64_t channels = shape.channels, cols = padded(channels);
  const int64_t panels = (shape.each() + kPanel - 1) / kPanel;
  share_out(shape.batch * panels, [&](Items& items) {
    const Scratch<T> words(kPanel * cols), panel(kPanel * cols);
    Gathered<T, X> gathered(channels);
    for (int64_t item = items(); item >= 0; item = items()) {
      const int64_t image = item / panels, first = item % panels * kPanel;
      const int64_t count = std::min(kPanel, shape.each() - first);
      const int64_t at = (image * shape.each() + first) * channels;
      gathered.set(x + at, 0, count);
      gathered.to_panel(count, panel);
      kernels<T>().normalize(panel, kPanel, channels, padded(count), norm.weight, norm.bias, norm.eps);
      if (map) {
        kernels<T>().unpack(panel, channels, count, kPanel, map + image * channels * shape.each() + first,
                            dtype_named<X>, shape.each(), 1);
      }
      transpose_out<T, X>(panel, count, channels, words, tokens + at, channels);
    }
  });
}

#define LF_INSTANTIATE(T, X, W)                                                                  \
  template void heads_of(const Tokens&, const X*, const LayerNorm<T>&, const Linear<T, W>(&)[3], \
                         const Rotation<T>&, W* const(&)[3]);                                    \
  template void tokens_of_heads(const Tokens&, const X*, const W*, const W*, const Linear<T>&,   \
                                const Linear<T, W>&, X*);
LF_FOR_LAYER_TYPES(LF_INSTANTIATE)
#undef LF_INSTANTIATE
template void pooled<float>(const Tokens&, const float*, int64_t, int64_t, float*);
template void pooled<double>(const Tokens&, const double*, int64_t, int64_t, double*);
template void pooled<float>(const Tokens&, const BFloat16*, int64_t, int64_t, BFloat16*);
template void map_of_tokens(const Tokens&, const float*, const LayerNorm<float>&, float*, float*);
template void map_of_tokens(const Tokens&, const double*, const LayerNorm<double>&, double*, double*);
template void map_of_tokens(const Tokens&, const BFloat16*, const LayerNorm<float>&, BFloat16*, BFloat16*);

}  // namespace lf
