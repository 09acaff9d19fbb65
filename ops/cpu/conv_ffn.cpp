#include <cstring>

#include "layers.h"
#include "pieces.h"

namespace lf {

namespace {

// Panels until what the next ones still need moves to the front of the hidden activations.
constexpr int64_t kPanels = 2;
// Hidden channels between convolution and product: their panel stays in a core's first cache.
constexpr int64_t kHidden = 64;
// One thread's memory and one piece after another. A piece has its neighbours around it, and its tokens lie
// in a row, `wide_` to a line: position 0 is the first one above the piece. Hidden activations of the last
// positions are held, in rows `stride_` apart, and move on like a belt.
template <typename T>
class Worker {
 public:
  Worker(const Tokens& shape, const T* x, const LayerNorm<T>& norm, int64_t hidden, const Linear<T>& fc1,
         const Linear<T>& conv, const Linear<T>& fc2, const Pieces& pieces, T* out,
         const Partials<T>& partials)
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
        hidden_(pieces.most_channels() * stride_),
        rows_(kPanel * cols_),
        transposed_(kPanel * cols_),
        left_(kPanel),
        right_(kPanel),
        no_bias_(shape.channels),
        gathered_(shape.channels),
        active_(kHidden * kPanel) {
    no_bias_.zeroed(shape.channels);
  }

  void run(const Piece& piece) {
    piece_ = piece;
    const int64_t channel = piece.first_channel;
    fc1_now_ = {fc1_.weight + channel * shape_.channels, fc1_.bias + channel};
    conv_now_ = {conv_.weight + channel * 9, conv_.bias + channel};
    fc2_now_ = {fc2_.weight + channel, channel == 0 ? fc2_.bias : no_bias_.get()};
    partial_ = partials_.of(piece);
    wide_ = piece.wide;
    const int64_t end = (piece.rows + 2) * wide_;
    inside_ = piece.first_row > 0 ? 0 : wide_;
    inside_end_ = piece.first_row + piece.rows < shape_.height ? end : end - wide_;
    for (int64_t n = 0; n < piece_.channels; ++n) std::fill_n(hidden_ + n * stride_, behind_, T{0});
    // What lies above the image is zero, and stands there already.
    for (int64_t first = inside_, slot = 0; first < end + 1; first += kPanel, ++slot) {
      if (slot == kPanels) {
        for (int64_t n = 0; n < piece_.channels; ++n) {
          T* row = hidden_ + n * stride_;
          std::memmove(row, row + kPanels * kPanel, behind_ * sizeof(T));
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
      run(position, (piece_.first_row - 1 + row) * shape_.width + piece_.wide_column + column, count);
      position += count;
    }
  }

  // The first layer: positions `first` and on into a panel. Below the image hidden activations are zero.
  void expand(int64_t first, T* panel) {
    const int64_t count = std::clamp<int64_t>(inside_end_ - first, 0, kPanel);
    if (count > 0) {
      in_rows(first, first + count, [&](int64_t position, int64_t token, int64_t run) {
        gathered_.set(at(x_, token), position - first, run);
      });
      const int64_t tokens = padded(count);
      gathered_.to_panel(count, transposed_);
      kernels<T>().normalize(transposed_, kPanel, shape_.channels, tokens, norm_.weight, norm_.bias,
                             norm_.eps);
      kernels<T>().linear(panel, stride_, fc1_now_.weight, shape_.channels, fc1_now_.bias, transposed_,
                          kPanel, piece_.channels, shape_.channels, tokens);
    }
    if (count == kPanel) return;
    for (int64_t n = 0; n < piece_.channels; ++n)
      std::fill_n(panel + n * stride_ + count, kPanel - count, T{0});
  }

  // Convolution, GELU and the second layer: the result's positions `first` and on; `middle` are their hidden
  // activations.
  void contract(int64_t first, const T* middle) {
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
      kernels<T>().convolve_gelu(middle + n * stride_, stride_, wide_, left_, right_,
                                 conv_now_.weight + n * 9, conv_now_.bias + n, channels, tokens, active_,
                                 kPanel);
      const T* weight = fc2_now_.weight + n;
      if (n == 0) {
        kernels<T>().linear(transposed_, kPanel, weight, hidden_channels_, fc2_now_.bias, active_, kPanel,
                            shape_.channels, channels, tokens);
      } else {
        kernels<T>().product(transposed_, kPanel, weight, hidden_channels_, 1, active_, kPanel,
                             shape_.channels, channels, tokens, true);
      }
    }
    kernels<T>().transpose(transposed_, kPanel, shape_.channels, tokens, rows_, cols_);
    in_rows(begin, end, [&](int64_t position, int64_t token, int64_t count) {
      // The neighbours at the sides are not of this piece.
      const int64_t column = position % wide_ + piece_.wide_column;
      const int64_t skipped = std::max<int64_t>(0, piece_.first_column - column);
      const int64_t kept = std::min(column + count, piece_.first_column + piece_.columns) - column - skipped;
      if (kept <= 0) return;
      const T* rows = rows_ + (position - begin + skipped) * cols_;
      if (partial_) {
        std::copy_n(rows, kept * cols_, partial_ + (piece_.image * shape_.each() + token + skipped) * cols_);
      } else {
        kernels<T>().add(at(x_, token + skipped), shape_.channels, rows, kept, shape_.channels, cols_,
                         at(out_, token + skipped));
      }
    });
  }

  const Tokens& shape_;
  const T* x_;
  const LayerNorm<T>& norm_;
  int64_t hidden_channels_;
  const Linear<T>& fc1_;
  const Linear<T>& conv_;
  const Linear<T>& fc2_;
  T* out_;
  const Partials<T>& partials_;
  int64_t cols_, behind_, stride_;
  Scratch<T> hidden_, rows_, transposed_, left_, right_, no_bias_;
  Gathered<T> gathered_;
  Scratch<T> active_;
  // What belongs to the piece.
  Piece piece_{};
  int64_t wide_ = 0, inside_ = 0, inside_end_ = 0;
  Linear<T> fc1_now_{}, fc2_now_{};
  Linear<T> conv_now_{};
  T* partial_ = nullptr;
};

}  // namespace

template <typename T>
void feed_forward(const Tokens& shape, const T* x, const LayerNorm<T>& norm, int64_t hidden,
                  const Linear<T>& fc1, const Linear<T>& conv, const Linear<T>& fc2, T* out) {
  const Pieces pieces(shape, hidden, kAlign);
  const Partials<T> partials(shape, pieces);
  share_out(pieces.count(), [&](Items& items) {
    Worker<T> worker(shape, x, norm, hidden, fc1, conv, fc2, pieces, out, partials);
    for (int64_t i = items(); i >= 0; i = items()) worker.run(pieces[i]);
  });
  partials.add_to(x, out);
}

template void feed_forward(const Tokens&, const float*, const LayerNorm<float>&, int64_t,
                           const Linear<float>&, const Linear<float>&, const Linear<float>&, float*);
template void feed_forward(const Tokens&, const double*, const LayerNorm<double>&, int64_t,
                           const Linear<double>&, const Linear<double>&, const Linear<double>&, double*);

}  // namespace lf
