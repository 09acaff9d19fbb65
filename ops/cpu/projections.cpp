#include <bit>

#include "layers.h"
#include "panels.h"

namespace lf {

namespace {

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

}  // namespace

template <typename T>
void heads_of(const Tokens& shape, const T* x, const LayerNorm<T>& norm, const Linear<T> (&layers)[3],
              const Rotation<T>& rotation, T* const (&out)[3]) {
  const int64_t channels = shape.channels, cols = padded(channels), head_dims = 4 * rotation.pairs;
  const Panels panels(shape, head_dims ? head_dims : kAlign);
  share_out(panels.count(), [&](Items& items) {
    const Scratch<T> from(kPanel * cols), to(kPanel * cols), cos(kPanel * head_dims / 2),
        sin(kPanel * head_dims / 2);
    // What a short panel leaves unset is multiplied too.
    cos.zeroed(kPanel * head_dims / 2);
    sin.zeroed(kPanel * head_dims / 2);
    Gathered<T> gathered(channels);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const Panel panel = panels[turn.item], next = panels[turn.next];
      const int64_t at = panels.at(panel), tokens = padded(panel.count);
      gathered.set(x + at, 0, panel.count);
      gathered.to_panel(panel.count, from);
      kernels<T>().normalize(from, kPanel, channels, tokens, norm.weight, norm.bias, norm.eps);
      turns_of(shape, panel, rotation, cos.get(), sin.get());
      for (int i = 0; i < 3; ++i) {
        const int64_t channel = panel.first_channel;
        prefetch_part(x + panels.at(next), panels.size(next), 3, i);
        kernels<T>().linear(to, kPanel, layers[i].weight + channel * channels, channels,
                            layers[i].bias + channel, from, kPanel, panel.channels, channels, tokens);
        if (head_dims && i < 2)
          kernels<T>().rotate(to, cos, sin, panel.channels / head_dims, head_dims, kPanel);
        kernels<T>().transpose(to, kPanel, panel.channels, panel.count, out[i] + at + channel, channels);
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

template <typename T>
void tokens_of_heads(const Tokens& shape, const T* x, const T* attended, const T* values,
                     const Linear<T>& conv, const Linear<T>& proj, T* out) {
  const int64_t channels = shape.channels, cols = padded(channels);
  const Scratch<T> taps = by_tap(conv, channels);
  const Panels panels(shape, kAlign);
  share_out(panels.count(), [&](Items& items) {
    const Scratch<T> rows(kPanel * cols), from(kPanel * cols), to(kPanel * cols);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const Panel panel = panels[turn.item], next = panels[turn.next];
      const int64_t start = panel.image * shape.each() * channels, at = panels.at(panel);
      const int64_t tokens = padded(panel.count);
      kernels<T>().convolve_add(values + start, shape.height, shape.width, panel.first, panel.count, taps,
                                conv.bias, attended + at, channels, cols, rows);
      panel_of_rows<T>(rows, panel.count, cols, from);
      prefetch_part(attended + panels.at(next), panels.size(next), 1, 0);
      const int64_t channel = panel.first_channel, here = padded(panel.channels);
      kernels<T>().linear(to, kPanel, proj.weight + channel * channels, channels, proj.bias + channel, from,
                          kPanel, panel.channels, channels, tokens);
      kernels<T>().transpose(to, kPanel, panel.channels, tokens, rows, here);
      kernels<T>().add(x + at + channel, channels, rows, panel.count, panel.channels, here,
                       out + at + channel);
    }
  });
}

template <typename T>
void map_of_tokens(const Tokens& shape, const T* x, const LayerNorm<T>& norm, T* tokens, T* map) {
  const int64_t channels = shape.channels;
  const Panels panels(shape);
  share_out(panels.count(), [&](Items& items) {
    const Scratch<T> normed(kPanel * padded(channels));
    Gathered<T> gathered(channels);
    for (int64_t item = items(); item >= 0; item = items()) {
      const Panel panel = panels[item];
      const int64_t at = panels.at(panel);
      gathered.set(x + at, 0, panel.count);
      gathered.to_panel(panel.count, normed);
      kernels<T>().normalize(normed, kPanel, channels, padded(panel.count), norm.weight, norm.bias, norm.eps);
      if (map) {
        kernels<T>().unpack(normed, channels, panel.count, kPanel,
                            map + panel.image * channels * shape.each() + panel.first, dtype_named<T>,
                            shape.each(), 1);
      }
      kernels<T>().transpose(normed, kPanel, channels, panel.count, tokens + at, channels);
    }
  });
}

#define LF_INSTANTIATE(T)                                                                      \
  template void heads_of(const Tokens&, const T*, const LayerNorm<T>&, const Linear<T>(&)[3],  \
                         const Rotation<T>&, T* const(&)[3]);                                  \
  template void tokens_of_heads(const Tokens&, const T*, const T*, const T*, const Linear<T>&, \
                                const Linear<T>&, T*);                                         \
  template void map_of_tokens(const Tokens&, const T*, const LayerNorm<T>&, T*, T*);           \
  template void pooled<T>(const Tokens&, const T*, int64_t, int64_t, T*);
LF_INSTANTIATE(float)
LF_INSTANTIATE(double)
#undef LF_INSTANTIATE
template void pooled<float>(const Tokens&, const BFloat16*, int64_t, int64_t, BFloat16*);

}  // namespace lf
