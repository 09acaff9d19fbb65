#include "layers.h"
#include "parallel.h"

namespace lf {

namespace {

// Tokens of one image.
struct Panel {
  int64_t image, first, count;
};

// Calls `worker(take)` on each thread; take(panel) hands out the panels of the batch until it is false.
template <typename Worker>
void share_panels(const Tokens& shape, const Worker& worker) {
  const int64_t panels = (shape.each() + kPanel - 1) / kPanel;
  share_out(shape.batch * panels, [&](const auto& take) {
    worker([&](Panel& panel) {
      const int64_t item = take();
      if (item < 0) return false;
      const int64_t first = item % panels * kPanel;
      panel = {item / panels, first, std::min(kPanel, shape.each() - first)};
      return true;
    });
  });
}

// Rows of `channels` into a panel, by way of packed ones where they do not lie so already.
template <typename T>
void transpose_in(const T* from, int64_t count, int64_t channels, T* rows, T* to) {
  const int64_t cols = padded(channels);
  if (cols == channels && padded(count) == count) {
    kernels<T>().transpose(from, channels, count, channels, to, kPanel);
    return;
  }
  std::fill_n(rows, count * cols, T{0});
  for (int64_t i = 0; i < count; ++i) std::copy_n(from + i * channels, channels, rows + i * cols);
  panel_of_rows<T>(rows, count, cols, to);
}

// The reverse.
template <typename T>
void transpose_out(const T* from, int64_t count, int64_t channels, T* to) {
  kernels<T>().transpose(from, kPanel, channels, count, to, channels);
}

}  // namespace

template <typename T>
void heads_of(const Tokens& shape, const T* x, const LayerNorm<T>& norm, const Linear<T> (&layers)[3],
              const T* cos, const T* sin, int64_t heads, T* const (&out)[3]) {
  const int64_t channels = shape.channels, head_dims = channels / heads, cols = padded(channels);
  share_panels(shape, [&](const auto& take) {
    const Scratch<T> rows(kPanel * cols), from(kPanel * cols), to(kPanel * cols),
        cosines(kPanel * padded(head_dims)), sines(kPanel * padded(head_dims));
    for (Panel panel; take(panel);) {
      const int64_t at = (panel.image * shape.each() + panel.first) * channels, tokens = padded(panel.count);
      kernels<T>().normalize(x + at, panel.count, channels, cols, norm.weight, norm.bias, norm.eps, rows);
      panel_of_rows<T>(rows, panel.count, cols, from);
      if (cos) {
        transpose_in<T>(cos + panel.first * head_dims, panel.count, head_dims, rows, cosines);
        transpose_in<T>(sin + panel.first * head_dims, panel.count, head_dims, rows, sines);
      }
      for (int i = 0; i < 3; ++i) {
        kernels<T>().linear(to, kPanel, layers[i].weight, channels, layers[i].bias, from, kPanel, channels,
                            channels, tokens);
        if (cos && i < 2) kernels<T>().rotate(to, cosines, sines, heads, head_dims, kPanel);
        transpose_out<T>(to, panel.count, channels, out[i] + at);
      }
    }
  });
}

template <typename T>
void tokens_of_heads(const Tokens& shape, const T* x, const T* attended, const T* values,
                     const Linear<T>& conv, const Linear<T>& proj, T* out) {
  const int64_t channels = shape.channels, cols = padded(channels);
  const Scratch<T> taps(9 * channels);
  for (int64_t c = 0; c < channels; ++c) {
    for (int64_t tap = 0; tap < 9; ++tap) taps[tap * channels + c] = conv.weight[c * 9 + tap];
  }
  share_panels(shape, [&](const auto& take) {
    const Scratch<T> rows(kPanel * cols), from(kPanel * cols), to(kPanel * cols);
    for (Panel panel; take(panel);) {
      const int64_t start = panel.image * shape.each() * channels, at = start + panel.first * channels;
      const int64_t tokens = padded(panel.count);
      kernels<T>().convolve_add(values + start, shape.height, shape.width, panel.first, panel.count, taps,
                                conv.bias, attended + at, channels, cols, rows);
      panel_of_rows<T>(rows, panel.count, cols, from);
      kernels<T>().linear(to, kPanel, proj.weight, channels, proj.bias, from, kPanel, channels, channels,
                          tokens);
      transpose_out<T>(to, panel.count, channels, out + at);
      for (int64_t i = at; i < at + panel.count * channels; ++i) out[i] += x[i];
    }
  });
}

#define LF_INSTANTIATE(T)                                                                               \
  template void heads_of(const Tokens&, const T*, const LayerNorm<T>&, const Linear<T>(&)[3], const T*, \
                         const T*, int64_t, T* const(&)[3]);                                            \
  template void tokens_of_heads(const Tokens&, const T*, const T*, const T*, const Linear<T>&,          \
                                const Linear<T>&, T*);
LF_INSTANTIATE(float)
LF_INSTANTIATE(double)
#undef LF_INSTANTIATE

}  // namespace lf
