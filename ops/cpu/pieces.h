// How the feed-forward network of a map is cut.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layers.h"

namespace lf {

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
  // Its columns with the neighbours at its sides, where these are in the map.
  int64_t wide_column, wide;
};

// How a batch is cut for some threads. Results do not depend on their number.
class Pieces {
 public:
  // Parts of the hidden channels are multiples of `unit`, all but the last.
  Pieces(const Tokens& shape, int64_t hidden, int64_t unit)
      : images_(shape.batch), height_(shape.height), width_(shape.width), hidden_(hidden), unit_(unit) {
    if (height_ * width_ <= kSmallMap) {
      parts_ = std::clamp<int64_t>(hidden_ / std::max(kLeastChannels, unit_), 1, kParts);
      count_ = images_ * parts_;
      return;
    }
    strips_ = width_ <= kWholeColumns ? 1 : (width_ + kColumns - 1) / kColumns;
    int64_t least = INT64_MAX;
    const int64_t threads = pool_threads();
    for (int64_t segments = 1; segments <= std::max<int64_t>(1, height_ / 2); ++segments) {
      // Of the rows above and below a piece the first layer alone is computed: half of a row's work each.
      const int64_t rows = (height_ + segments - 1) / segments;
      const int64_t turns = (images_ * strips_ * segments + threads - 1) / threads;
      if (turns * (rows + 1) < least) {
        least = turns * (rows + 1);
        segments_ = segments;
      }
    }
    count_ = images_ * strips_ * segments_;
  }

  int64_t count() const { return count_; }
  // Into how many parts the hidden channels are cut.
  int64_t parts() const { return parts_; }
  // No piece has more hidden channels: a part is rounded up, and the last one has what is left over.
  int64_t most_channels() const { return parts_ == 1 ? hidden_ : hidden_ / parts_ + 2 * unit_; }
  // The most columns of a piece, neighbours included.
  int64_t widest() const { return strips_ == 1 ? width_ : kColumns + 2; }

  Piece operator[](int64_t index) const {
    // Neighbours take other images and the same weights.
    const int64_t each = strips_ * segments_, part_of_hidden = index / (images_ * each);
    const int64_t channel = channel_of(part_of_hidden);
    const int64_t strip = index % strips_, segment = index / strips_ % segments_;
    const int64_t row = part(height_, segments_, segment), column = part(width_, strips_, strip),
                  end = part(width_, strips_, strip + 1), wide_column = std::max<int64_t>(0, column - 1);
    return {index / each % images_,
            row,
            part(height_, segments_, segment + 1) - row,
            column,
            end - column,
            part_of_hidden,
            channel,
            channel_of(part_of_hidden + 1) - channel,
            wide_column,
            std::min(width_, end + 1) - wide_column};
  }

 private:
  // Where a part of the hidden channels begins.
  int64_t channel_of(int64_t index) const {
    return index == parts_ ? hidden_ : part(hidden_ / unit_, parts_, index) * unit_;
  }

  int64_t images_, height_, width_, hidden_, unit_, strips_ = 1, segments_ = 1, parts_ = 1, count_ = 0;
};

// What each part of the hidden channels adds to the tokens, (parts, tokens, padded channels), where these are
// cut.
template <typename T>
class Partials {
 public:
  Partials(const Tokens& shape, const Pieces& pieces)
      : shape_(shape),
        parts_(pieces.parts() > 1 ? pieces.parts() : 0),
        each_(shape.batch * shape.each() * padded(shape.channels)),
        sums_(parts_ * each_) {}

  // Of all tokens; null where nothing is cut.
  T* of(const Piece& piece) const { return parts_ ? sums_ + piece.part * each_ : nullptr; }

  // x and what all of them add, in order.
  template <typename X>
  void add_to(const X* x, X* out) const {
    if (!parts_) return;
    const int64_t tokens = shape_.batch * shape_.each(), channels = shape_.channels, cols = padded(channels);
    parallel((tokens + kPanel - 1) / kPanel, [&](int64_t panel) {
      const int64_t first = panel * kPanel, count = std::min(kPanel, tokens - first);
      const Scratch<T> sum(count * cols);
      std::copy_n(sums_ + first * cols, count * cols, sum.get());
      for (int64_t part = 1; part < parts_; ++part)
        kernels<T>().accumulate(sum, sums_ + part * each_ + first * cols, count * cols);
      token_kernels<T, X>().add(x + first * channels, channels, sum, count, channels, cols,
                                out + first * channels);
    });
  }

 private:
  const Tokens& shape_;
  int64_t parts_, each_;
  Scratch<T> sums_;
};

}  // namespace lf
