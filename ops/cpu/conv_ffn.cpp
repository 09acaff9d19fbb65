#include <cstring>

#include "layers.h"
#include "parallel.h"

namespace lf {

namespace {

// Panels until what the next ones still need moves to the front of the hidden activations.
constexpr int64_t kPanels = 4;
// Hidden channels between convolution and product: their panel stays in a core's first cache.
constexpr int64_t kHidden = 64;
// A wider map is cut into strips of about this many columns, so that few hidden rows fill the cache.
constexpr int64_t kColumns = 62;
constexpr int64_t kWholeColumns = 96;

// Some rows and columns of one image's result.
struct Piece {
  int64_t image, first_row, rows, first_column, columns;
};

// Parts of `size` as equal as can be: where part `index` of `count` begins.
int64_t part(int64_t size, int64_t count, int64_t index) { return size * index / count; }

// How a batch is cut for some threads. Results do not depend on it.
class Pieces {
 public:
  Pieces(int64_t images, int64_t height, int64_t width, int64_t threads) : height_(height), width_(width) {
    strips_ = width <= kWholeColumns ? 1 : (width + kColumns - 1) / kColumns;
    int64_t least = INT64_MAX;
    for (int64_t segments = 1; segments <= std::max<int64_t>(1, height / 2); ++segments) {
      // Of the rows above and below a piece the first layer alone is computed: half of a row's work each.
      const int64_t rows = (height + segments - 1) / segments;
      const int64_t turns = (images * strips_ * segments + threads - 1) / threads;
      if (turns * (rows + 1) < least) {
        least = turns * (rows + 1);
        segments_ = segments;
      }
    }
    count_ = images * strips_ * segments_;
  }

  int64_t count() const { return count_; }
  // The most columns of a piece, neighbours included.
  int64_t widest() const { return strips_ == 1 ? width_ : kColumns + 2; }

  Piece operator[](int64_t index) const {
    const int64_t strip = index % strips_, segment = index / strips_ % segments_;
    const int64_t row = part(height_, segments_, segment), column = part(width_, strips_, strip);
    return {index / (strips_ * segments_), row, part(height_, segments_, segment + 1) - row, column,
            part(width_, strips_, strip + 1) - column};
  }

 private:
  int64_t height_, width_, strips_ = 1, segments_ = 1, count_ = 0;
};

// One thread's memory and one piece after another. A piece has its neighbours around it, and its tokens lie
// in a row, `wide_` to a line: position 0 is the first one above the piece. Hidden activations of the last
// positions are held, channels `stride_` apart, and move on like a belt.
template <typename T>
class Worker {
 public:
  Worker(const Tokens& shape, const T* x, const LayerNorm<T>& norm, int64_t hidden, const Linear<T>& fc1,
         const Linear<T>& conv, const Linear<T>& fc2, int64_t widest, T* out)
      : shape_(shape),
        x_(x),
        norm_(norm),
        inner_(hidden),
        fc1_(fc1),
        conv_(conv),
        fc2_(fc2),
        out_(out),
        cols_(padded(shape.channels)),
        behind_(padded(2 * (widest + 1))),
        stride_(behind_ + kPanels * kPanel),
        hidden_(hidden * stride_),
        rows_(kPanel * cols_),
        transposed_(kPanel * cols_),
        active_(kPanel * kHidden),
        left_(kPanel),
        right_(kPanel) {}

  void run(const Piece& piece) {
    piece_ = piece;
    first_column_ = piece.first_column - (piece.first_column > 0);
    wide_ = std::min(shape_.width, piece.first_column + piece.columns + 1) - first_column_;
    const int64_t end = (piece.rows + 2) * wide_;
    inside_ = piece.first_row > 0 ? 0 : wide_;
    inside_end_ = piece.first_row + piece.rows < shape_.height ? end : end - wide_;
    for (int64_t n = 0; n < inner_; ++n) std::fill_n(hidden_ + n * stride_, behind_, T{0});
    for (int64_t first = 0, slot = 0; first - wide_ - 1 < end - wide_; first += kPanel, ++slot) {
      if (slot == kPanels) {
        for (int64_t n = 0; n < inner_; ++n) {
          T* channel = hidden_ + n * stride_;
          std::memmove(channel, channel + kPanels * kPanel, behind_ * sizeof(T));
        }
        slot = 0;
      }
      T* panel = hidden_ + behind_ + slot * kPanel;
      expand(first, panel);
      contract(first - wide_ - 1, panel - wide_ - 1);
    }
  }

 private:
  template <typename P>
  P* at(P* tokens, int64_t token) const {
    return tokens + (piece_.image * shape_.each() + token) * shape_.channels;
  }

  // Calls `run(position, token, count)` for the runs of neighbours in memory among positions first .. end
  // - 1.
  template <typename Run>
  void in_rows(int64_t first, int64_t end, Run run) const {
    for (int64_t position = first; position < end;) {
      const int64_t row = position / wide_, column = position % wide_;
      const int64_t count = std::min(end - position, wide_ - column);
      run(position, (piece_.first_row - 1 + row) * shape_.width + first_column_ + column, count);
      position += count;
    }
  }

  // The first layer: positions `first` and on into a panel. Outside the image hidden activations are zero.
  void expand(int64_t first, T* panel) {
    const int64_t begin = std::max(first, inside_), end = std::min(first + kPanel, inside_end_);
    if (begin < end) {
      in_rows(begin, end, [&](int64_t position, int64_t token, int64_t count) {
        kernels<T>().normalize(at(x_, token), count, shape_.channels, cols_, norm_.weight, norm_.bias,
                               norm_.eps, rows_ + (position - begin) * cols_);
      });
      const int64_t count = end - begin, tokens = padded(count);
      panel_of_rows<T>(rows_, count, cols_, transposed_);
      if (begin == first) {
        kernels<T>().linear(panel, stride_, fc1_.weight, shape_.channels, fc1_.bias, transposed_, kPanel,
                            inner_, shape_.channels, tokens);
      } else {
        expand_late(begin - first, count, tokens, panel);
      }
    }
    const int64_t before = std::clamp<int64_t>(begin - first, 0, kPanel);
    const int64_t after = begin < end ? end - first : before;
    if (before == 0 && after == kPanel) return;
    for (int64_t n = 0; n < inner_; ++n) {
      std::fill_n(panel + n * stride_, before, T{0});
      std::fill_n(panel + n * stride_ + after, kPanel - after, T{0});
    }
  }

  // A panel that begins outside the image: by way of a buffer, since products are stored aligned.
  void expand_late(int64_t offset, int64_t count, int64_t tokens, T* panel) {
    for (int64_t n = 0; n < inner_; n += kHidden) {
      const int64_t channels = std::min(kHidden, inner_ - n);
      kernels<T>().linear(active_, kPanel, fc1_.weight + n * shape_.channels, shape_.channels, fc1_.bias + n,
                          transposed_, kPanel, channels, shape_.channels, tokens);
      for (int64_t c = 0; c < channels; ++c)
        std::copy_n(active_ + c * kPanel, count, panel + (n + c) * stride_ + offset);
    }
  }

  // Convolution, GELU and the second layer: the result's positions `first` and on; `middle` are their hidden
  // activations.
  void contract(int64_t first, const T* middle) {
    const int64_t begin = std::max(first, wide_), end = std::min(first + kPanel, (piece_.rows + 1) * wide_);
    if (begin >= end) return;
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t column = (first + i + 2 * wide_) % wide_;
      std::memset(left_ + i, column > 0 ? 0xFF : 0, sizeof(T));
      std::memset(right_ + i, column < wide_ - 1 ? 0xFF : 0, sizeof(T));
    }
    const int64_t tokens = padded(end - first);
    for (int64_t n = 0; n < inner_; n += kHidden) {
      const int64_t channels = std::min(kHidden, inner_ - n);
      kernels<T>().convolve_gelu(middle + n * stride_, stride_, wide_, left_, right_, conv_.weight + n * 9,
                                 conv_.bias + n, channels, tokens, active_);
      if (n == 0) {
        kernels<T>().linear(transposed_, kPanel, fc2_.weight, inner_, fc2_.bias, active_, tokens,
                            shape_.channels, channels, tokens);
      } else {
        kernels<T>().product(transposed_, kPanel, fc2_.weight + n, inner_, 1, active_, tokens,
                             shape_.channels, channels, tokens, true);
      }
    }
    kernels<T>().transpose(transposed_, kPanel, shape_.channels, tokens, rows_, cols_);
    in_rows(begin, end, [&](int64_t position, int64_t token, int64_t count) {
      // The neighbours at the sides are not of this piece.
      const int64_t column = position % wide_ + first_column_;
      const int64_t skipped = std::max<int64_t>(0, piece_.first_column - column);
      const int64_t kept = std::min(column + count, piece_.first_column + piece_.columns) - column - skipped;
      if (kept <= 0) return;
      for (int64_t i = skipped; i < skipped + kept; ++i) {
        const T *row = rows_ + (position - first + i) * cols_, *before = at(x_, token + i);
        T* after = at(out_, token + i);
        for (int64_t c = 0; c < shape_.channels; ++c) after[c] = before[c] + row[c];
      }
    });
  }

  const Tokens& shape_;
  const T* x_;
  const LayerNorm<T>& norm_;
  int64_t inner_;  // channels of the hidden map
  const Linear<T>&fc1_, &conv_, &fc2_;
  T* out_;
  int64_t cols_, behind_, stride_;
  Scratch<T> hidden_, rows_, transposed_, active_, left_, right_;
  Piece piece_{};
  int64_t first_column_ = 0, wide_ = 0, inside_ = 0, inside_end_ = 0;
};

}  // namespace

template <typename T>
void feed_forward(const Tokens& shape, const T* x, const LayerNorm<T>& norm, int64_t hidden,
                  const Linear<T>& fc1, const Linear<T>& conv, const Linear<T>& fc2, T* out) {
  const Pieces pieces(shape.batch, shape.height, shape.width, pool_threads());
  share_out(pieces.count(), [&](const auto& take) {
    Worker<T> worker(shape, x, norm, hidden, fc1, conv, fc2, pieces.widest(), out);
    for (int64_t i = take(); i >= 0; i = take()) worker.run(pieces[i]);
  });
}

#define LF_INSTANTIATE(T)                                                                             \
  template void feed_forward(const Tokens&, const T*, const LayerNorm<T>&, int64_t, const Linear<T>&, \
                             const Linear<T>&, const Linear<T>&, T*);
LF_INSTANTIATE(float)
LF_INSTANTIATE(double)
#undef LF_INSTANTIATE

}  // namespace lf
