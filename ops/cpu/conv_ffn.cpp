#include <cstring>

#include "layers.h"

namespace lf {

namespace {

// Panels until what the next ones still need moves to the front of the hidden activations.
constexpr int64_t kPanels = 2;
// Hidden channels between convolution and product: their panel stays in a core's first cache.
constexpr int64_t kHidden = 64;
// A wider map is cut into strips of about this many columns, so that few hidden rows fill the cache.
constexpr int64_t kColumns = 62;
constexpr int64_t kWholeColumns = 96;

// Of a small map the hidden channels are cut rather than the rows: no row is computed twice, and each part of
// the weights is read once.
constexpr int64_t kSmallMap = 512;
constexpr int64_t kParts = 8;
constexpr int64_t kLeastChannels = 32;

// Some rows and columns of one image's result, or what some hidden channels add to it.
struct Piece {
  int64_t image, first_row, rows, first_column, columns, part, first_channel, channels;
};

// How a batch is cut for some threads. Results do not depend on their number.
class Pieces {
 public:
  Pieces(int64_t images, int64_t height, int64_t width, int64_t hidden, int64_t threads)
      : images_(images), height_(height), width_(width), hidden_(hidden) {
    if (height * width <= kSmallMap) {
      parts_ = std::clamp<int64_t>(hidden / kLeastChannels, 1, kParts);
      count_ = images * parts_;
      return;
    }
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
  // Into how many parts the hidden channels are cut.
  int64_t parts() const { return parts_; }
  // No piece has more hidden channels: a part is rounded up, and the last one has what is left over.
  int64_t most_channels() const { return parts_ == 1 ? hidden_ : hidden_ / parts_ + 2 * kAlign; }
  // The most columns of a piece, neighbours included.
  int64_t widest() const { return strips_ == 1 ? width_ : kColumns + 2; }

  Piece operator[](int64_t index) const {
    // Neighbours take other images and the same weights.
    const int64_t each = strips_ * segments_, part_of_hidden = index / (images_ * each);
    const int64_t channel = channel_of(part_of_hidden);
    const int64_t strip = index % strips_, segment = index / strips_ % segments_;
    const int64_t row = part(height_, segments_, segment), column = part(width_, strips_, strip);
    return {index / each % images_,
            row,
            part(height_, segments_, segment + 1) - row,
            column,
            part(width_, strips_, strip + 1) - column,
            part_of_hidden,
            channel,
            channel_of(part_of_hidden + 1) - channel};
  }

 private:
  // Where a part of the hidden channels begins; all but the last have a multiple of kAlign.
  int64_t channel_of(int64_t index) const {
    return index == parts_ ? hidden_ : part(hidden_ / kAlign, parts_, index) * kAlign;
  }

  int64_t images_, height_, width_, hidden_, strips_ = 1, segments_ = 1, parts_ = 1, count_ = 0;
};

// One thread's memory and one piece after another. A piece has its neighbours around it, and its tokens lie
// in a row, `wide_` to a line: position 0 is the first one above the piece. Hidden activations of the last
// positions are held, in rows `stride_` apart, and move on like a belt.
template <typename T, typename X, typename W>
class Worker {
 public:
  // `partials` (parts, tokens, padded channels) takes what parts of the hidden channels add, if they are cut.
  Worker(const Tokens& shape, const X* x, const LayerNorm<T>& norm, int64_t hidden, const Linear<T, W>& fc1,
         const Linear<T>& conv, const Linear<T, W>& fc2, const Pieces& pieces, X* out, T* partials)
      : shape_(shape),
        x_(x),
        norm_(norm),
        hidden_channels_(hidden),
        fc1_(fc1),
        conv_(conv),
        fc2_(fc2),
        out_(out),
        partials_(partials),
        cols_(padded(shape.channels)),
        behind_(padded(2 * (pieces.widest() + 1))),
        stride_(behind_ + kPanels * kPanel),
        hidden_(pieces.most_channels() / kHeld * stride_),
        rows_(kPanel * cols_),
        transposed_(kPanel * cols_),
        left_(kPanel),
        right_(kPanel),
        no_bias_(shape.channels),
        gathered_(shape.channels),
        tokens_(shape.channels),
        activations_(kHidden) {
    no_bias_.zeroed(shape.channels);
  }

  void run(const Piece& piece) {
    piece_ = piece;
    const int64_t channel = piece.first_channel;
    fc1_now_ = {fc1_.weight + channel * shape_.channels, fc1_.bias + channel};
    conv_now_ = {conv_.weight + channel * 9, conv_.bias + channel};
    fc2_now_ = {fc2_.weight + channel, channel == 0 ? fc2_.bias : no_bias_.get()};
    partial_ = partials_ ? partials_ + piece.part * shape_.batch * shape_.each() * cols_ : nullptr;
    first_column_ = piece.first_column - (piece.first_column > 0);
    wide_ = std::min(shape_.width, piece.first_column + piece.columns + 1) - first_column_;
    const int64_t end = (piece.rows + 2) * wide_;
    inside_ = piece.first_row > 0 ? 0 : wide_;
    inside_end_ = piece.first_row + piece.rows < shape_.height ? end : end - wide_;
    for (int64_t n = 0; n < held(); ++n) std::fill_n(hidden_ + n * stride_, behind_, Held{0});
    // What lies above the image is zero, and stands there already.
    for (int64_t first = inside_, slot = 0; first < end + 1; first += kPanel, ++slot) {
      if (slot == kPanels) {
        for (int64_t n = 0; n < held(); ++n) {
          Held* row = hidden_ + n * stride_;
          std::memmove(row, row + kPanels * kPanel, behind_ * sizeof(Held));
        }
        slot = 0;
      }
      Held* panel = hidden_ + behind_ + slot * kPanel;
      expand(first, panel);
      contract(first - wide_ - 1, panel - wide_ - 1);
    }
  }

 private:
  using Held = typename Factor<T, W>::Held;
  static constexpr int64_t kHeld = Factor<T, W>::kHeld;

  // Rows of hidden activations.
  int64_t held() const { return piece_.channels / kHeld; }

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

  // The first layer: positions `first` and on into a panel. Below the image hidden activations are zero.
  void expand(int64_t first, Held* panel) {
    const int64_t count = std::clamp<int64_t>(inside_end_ - first, 0, kPanel);
    if (count > 0) {
      in_rows(first, first + count, [&](int64_t position, int64_t token, int64_t run) {
        gathered_.set(at(x_, token), position - first, run);
      });
      const int64_t tokens = padded(count);
      gathered_.to_panel(count, transposed_);
      kernels<T>().normalize(transposed_, kPanel, shape_.channels, tokens, norm_.weight, norm_.bias,
                             norm_.eps);
      tokens_.set(transposed_, shape_.channels, tokens);
      tokens_.held_product(fc1_now_.weight, shape_.channels, fc1_now_.bias, piece_.channels, panel, stride_);
    }
    if (count == kPanel) return;
    for (int64_t n = 0; n < held(); ++n) std::fill_n(panel + n * stride_ + count, kPanel - count, Held{0});
  }

  // Convolution, GELU and the second layer: the result's positions `first` and on; `middle` are their hidden
  // activations.
  void contract(int64_t first, const Held* middle) {
    const int64_t begin = std::max(first, wide_), end = std::min(first + kPanel, (piece_.rows + 1) * wide_);
    if (begin >= end) return;
    middle += begin - first;
    for (int64_t i = 0; i < kPanel; ++i) {
      const int64_t column = (begin + i) % wide_;
      std::memset(left_ + i, column > 0 ? 0xFF : 0, sizeof(T));
      std::memset(right_ + i, column < wide_ - 1 ? 0xFF : 0, sizeof(T));
    }
    const int64_t tokens = padded(end - begin);
    for (int64_t n = 0; n < piece_.channels; n += kHidden) {
      const int64_t channels = std::min(kHidden, piece_.channels - n);
      activations_.set_active(middle + n / kHeld * stride_, stride_, wide_, left_, right_,
                              {conv_now_.weight + n * 9, conv_now_.bias + n}, channels, tokens);
      activations_.product(fc2_now_.weight + n, hidden_channels_, n == 0 ? fc2_now_.bias : nullptr,
                           shape_.channels, transposed_, kPanel);
    }
    kernels<T>().transpose(transposed_, kPanel, shape_.channels, tokens, rows_, cols_);
    in_rows(begin, end, [&](int64_t position, int64_t token, int64_t count) {
      // The neighbours at the sides are not of this piece.
      const int64_t column = position % wide_ + first_column_;
      const int64_t skipped = std::max<int64_t>(0, piece_.first_column - column);
      const int64_t kept = std::min(column + count, piece_.first_column + piece_.columns) - column - skipped;
      if (kept <= 0) return;
      const T* rows = rows_ + (position - begin + skipped) * cols_;
      if (partial_) {
        std::copy_n(rows, kept * cols_, partial_ + (piece_.image * shape_.each() + token + skipped) * cols_);
      } else {
        token_kernels<T, X>().add(at(x_, token + skipped), shape_.channels, rows, kept, shape_.channels,
                                  cols_, at(out_, token + skipped));
      }
    });
  }

  const Tokens& shape_;
  const X* x_;
  const LayerNorm<T>& norm_;
  int64_t hidden_channels_;
  const Linear<T, W>& fc1_;
  const Linear<T>& conv_;
  const Linear<T, W>& fc2_;
  X* out_;
  T* partials_;
  int64_t cols_, behind_, stride_;
  Scratch<Held> hidden_;
  Scratch<T> rows_, transposed_, left_, right_, no_bias_;
  Gathered<T, X> gathered_;
  Factor<T, W> tokens_, activations_;
  // What belongs to the piece.
  Piece piece_{};
  int64_t first_column_ = 0, wide_ = 0, inside_ = 0, inside_end_ = 0;
  Linear<T, W> fc1_now_{}, fc2_now_{};
  Linear<T> conv_now_{};
  T* partial_ = nullptr;
};

// x and what each part of the hidden channels adds to it, in order.
template <typename T, typename X>
void add_parts(const Tokens& shape, const X* x, const T* partials, int64_t parts, X* out) {
  const int64_t tokens = shape.batch * shape.each(), cols = padded(shape.channels);
  parallel((tokens + kPanel - 1) / kPanel, [&](int64_t panel) {
    const int64_t first = panel * kPanel, count = std::min(kPanel, tokens - first);
    const Scratch<T> sum(count * cols);
    std::copy_n(partials + first * cols, count * cols, sum.get());
    for (int64_t part = 1; part < parts; ++part)
      kernels<T>().accumulate(sum, partials + (part * tokens + first) * cols, count * cols);
    token_kernels<T, X>().add(x + first * shape.channels, shape.channels, sum, count, shape.channels, cols,
                              out + first * shape.channels);
  });
}

}  // namespace

template <typename T, typename X, typename W>
void feed_forward(const Tokens& shape, const X* x, const LayerNorm<T>& norm, int64_t hidden,
                  const Linear<T, W>& fc1, const Linear<T>& conv, const Linear<T, W>& fc2, X* out) {
  const Pieces pieces(shape.batch, shape.height, shape.width, hidden, pool_threads());
  const bool cut = pieces.parts() > 1;
  const Scratch<T> partials(cut ? pieces.parts() * shape.batch * shape.each() * padded(shape.channels) : 0);
  share_out(pieces.count(), [&](Items& items) {
    Worker<T, X, W> worker(shape, x, norm, hidden, fc1, conv, fc2, pieces, out,
                           cut ? partials.get() : nullptr);
    for (int64_t i = items(); i >= 0; i = items()) worker.run(pieces[i]);
  });
  if (cut) add_parts<T>(shape, x, partials, pieces.parts(), out);
}

#define LF_INSTANTIATE(T, X, W)                                                                          \
  template void feed_forward(const Tokens&, const X*, const LayerNorm<T>&, int64_t, const Linear<T, W>&, \
                             const Linear<T>&, const Linear<T, W>&, X*);
LF_FOR_LAYER_TYPES(LF_INSTANTIATE)
#undef LF_INSTANTIATE

}  // namespace lf
