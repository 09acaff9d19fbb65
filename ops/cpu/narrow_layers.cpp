// The layers of bfloat16 weights. Tokens, and hidden activations, stay in rows of channels: one instruction
// multiplies two channels, and what is convolved is aligned. So products take packed weights, which every
// call packs anew.
#include <algorithm>
#include <cstring>
#include <numeric>

#include "layers.h"
#include "panels.h"
#include "pieces.h"

namespace lf {

namespace {

constexpr int64_t kWords = kGroup / 2;
// Tokens that go through the feed-forward network together, where lines are short.
constexpr int64_t kTokens = 96;
// Groups of hidden channels between convolution and product. One alone would have the product's sums read and
// written twice as often (2 % of it); of more, tokens and weights leave a core's first cache.
constexpr int64_t kGroups = 2;

const NarrowKernels& narrow() { return instruction_set().narrow; }

int64_t groups_of(int64_t rows) { return (rows + kGroup - 1) / kGroup; }

const uint32_t* as_words(const BFloat16* tokens) { return reinterpret_cast<const uint32_t*>(tokens); }

// One group of a layer, (depth, kGroup) words: of at most kGroup rows that are `stride` apart the first
// `words`. What is missing is zero. `paired` is the order that linear_words takes.
void pack_group(const BFloat16* weight, int64_t stride, int64_t rows, int64_t words, int64_t depth,
                bool paired, uint32_t* out) {
  const int64_t cols = padded(depth);
  const Scratch<float> gathered(kGroup * cols);  // never computed with
  gathered.zeroed(kGroup * cols);
  for (int64_t position = 0; position < kGroup; ++position) {
    const int64_t row = paired ? paired_row(position, narrow().lanes) : position;
    if (row < rows) std::memcpy(gathered + position * cols, weight + row * stride, words * sizeof(float));
  }
  kernels<float>().transpose(gathered, cols, kGroup, depth, reinterpret_cast<float*>(out), kGroup);
}

void normalize(const float* x, int64_t count, int64_t channels, const LayerNorm<float>& norm, BFloat16* out) {
  narrow().normalize_wide_rows(x, count, channels, norm.weight, norm.bias, norm.eps, out);
}
void normalize(const BFloat16* x, int64_t count, int64_t channels, const LayerNorm<float>& norm,
               BFloat16* out) {
  narrow().normalize_rows(x, count, channels, norm.weight, norm.bias, norm.eps, out);
}

// A linear layer whose results are floats.
class Packed {
 public:
  Packed(const Linear<float, BFloat16>& layer, int64_t channels)
      : channels_(channels),
        depth_(channels / 2),
        weight_(groups_of(channels) * depth_ * kGroup),
        bias_(groups_of(channels) * kGroup) {
    bias_.zeroed(groups_of(channels) * kGroup);
    std::copy_n(layer.bias, channels, bias_.get());
    parallel(groups_of(channels), [&](int64_t group) {
      const int64_t first = group * kGroup;
      pack_group(layer.weight + first * channels, channels, std::min(kGroup, channels - first), depth_,
                 depth_, false, weight_ + group * depth_ * kGroup);
    });
  }

  // Some rows of the layer's result, the first a multiple of kGroup, into rows of `cols`.
  void operator()(const uint32_t* tokens, int64_t count, int64_t first, int64_t rows, float* out,
                  int64_t cols) const {
    for (int64_t done = 0; done < rows; done += kGroup) {
      const int64_t group = (first + done) / kGroup;
      narrow().linear_rows(tokens, depth_, count, weight_ + group * depth_ * kGroup, bias_ + group * kGroup,
                           depth_, std::min(kGroup, cols - done), out + done, cols);
    }
  }

 private:
  int64_t channels_, depth_;
  Scratch<uint32_t> weight_;
  Scratch<float> bias_;
};

// The feed-forward network's layers, by groups of hidden channels.
struct Network {
  int64_t groups, out_groups;
  // (groups, channels / 2, kGroup), (groups, 9, 2, kWords) and (out_groups, groups, kWords, kGroup).
  Scratch<uint32_t> fc1, taps, fc2;
  Scratch<float> fc1_bias, taps_bias, fc2_bias, no_bias;

  Network(int64_t channels, int64_t hidden, const Linear<float, BFloat16>& first, const Linear<float>& conv,
          const Linear<float, BFloat16>& second)
      : groups(groups_of(hidden)),
        out_groups(groups_of(channels)),
        fc1(groups * channels / 2 * kGroup),
        taps(groups * 9 * kGroup),
        fc2(groups * out_groups * kWords * kGroup),
        fc1_bias(groups * kGroup),
        taps_bias(groups * kGroup),
        fc2_bias(out_groups * kGroup),
        no_bias(out_groups * kGroup) {
    no_bias.zeroed(out_groups * kGroup);
    fc2_bias.zeroed(out_groups * kGroup);
    std::copy_n(second.bias, channels, fc2_bias.get());
    parallel(groups, [&](int64_t group) {
      const int64_t at = group * kGroup, here = std::min(kGroup, hidden - at);
      pack_group(first.weight + at * channels, channels, here, channels / 2, channels / 2, true,
                 fc1 + at * channels / 2);
      for (int64_t out = 0; out < out_groups; ++out) {
        const int64_t row = out * kGroup;
        pack_group(second.weight + row * hidden + at, hidden, std::min(kGroup, channels - row), here / 2,
                   kWords, false, fc2 + (out * groups + group) * kWords * kGroup);
      }
      for (int64_t position = 0; position < kGroup; ++position) {
        const int64_t row = paired_row(position, narrow().lanes);
        fc1_bias[at + position] = row < here ? first.bias[at + row] : 0;
      }
      alignas(64) float wide[9 * kGroup] = {};
      BFloat16 rounded[9 * kGroup];
      for (int64_t channel = 0; channel < kGroup; ++channel) {
        const int64_t place = channel % 2 * kWords + channel / 2;
        taps_bias[at + place] = channel < here ? conv.bias[at + channel] : 0;
        for (int64_t tap = 0; tap < 9 && channel < here; ++tap)
          wide[tap * kGroup + place] = conv.weight[(at + channel) * 9 + tap];
      }
      narrow().round_rows(wide, 9, kGroup, kGroup, rounded, kGroup);
      for (int64_t i = 0; i < 9 * kGroup; ++i)
        taps[at * 9 + i] = static_cast<uint32_t>(rounded[i].bits) << (i / kWords % 2 * 16);
    });
  }
};

// One thread's memory and one piece after another, line by line of hidden activations: the last ones are held
// in a ring, (groups, slots, tokens, kWords), each with a zero at either end.
template <typename X>
class Worker {
 public:
  Worker(const Tokens& shape, const X* x, const LayerNorm<float>& norm, const Network& network,
         const Pieces& pieces, X* out, const Partials<float>& partials)
      : shape_(shape),
        x_(x),
        norm_(norm),
        network_(network),
        out_(out),
        partials_(partials),
        cols_(padded(shape.channels)),
        widest_(pieces.widest()),
        lines_(std::clamp<int64_t>(kTokens / widest_, 1, shape.height)),
        slots_(lines_ + 2),
        hidden_(pieces.most_channels() / kGroup * slots_ * (widest_ + 2) * kWords),
        active_(lines_ * widest_ * kGroups * kWords),
        tokens_(lines_ * widest_ * shape.channels),
        rows_(lines_ * widest_ * cols_) {}

  void run(const Piece& piece) {
    piece_ = piece;
    // Line 0 is the one above the piece, and a line of the result takes three.
    int64_t done = 0;
    for (int64_t line = 0; line < piece.rows + 2; line += lines_) {
      const int64_t count = std::min(lines_, piece.rows + 2 - line), ready = line + count - 2;
      expand(line, count);
      if (ready <= done) continue;
      contract(done, ready - done);
      done = ready;
    }
  }

 private:
  int64_t groups() const { return piece_.channels / kGroup; }
  // Of all groups of the network.
  int64_t group_at(int64_t group) const { return piece_.first_channel / kGroup + group; }

  int64_t token_at(int64_t row, int64_t column) const {
    return piece_.image * shape_.each() + row * shape_.width + column;
  }
  uint32_t* line_at(int64_t group, int64_t line) const {
    return hidden_ + (group * slots_ + line % slots_) * (widest_ + 2) * kWords;
  }

  // The first layer. Outside of the image hidden activations are zero.
  void expand(int64_t first, int64_t count) {
    const int64_t channels = shape_.channels, size = widest_ * channels;
    const auto inside = [&](int64_t line) {
      const int64_t row = piece_.first_row - 1 + line;
      return row >= 0 && row < shape_.height;
    };
    for (int64_t line = first; line < first + count; ++line) {
      if (!inside(line)) continue;
      const int64_t token = token_at(piece_.first_row - 1 + line, piece_.wide_column);
      normalize(x_ + token * channels, piece_.wide, channels, norm_, tokens_ + (line - first) * size);
    }
    for (int64_t group = 0; group < groups(); ++group) {
      const int64_t here = group_at(group);
      for (int64_t line = first + count; line < std::min(first + 2 * count, piece_.rows + 2); ++line) {
        if (!inside(line)) continue;
        const int64_t token = token_at(piece_.first_row - 1 + line, piece_.wide_column);
        prefetch_part(x_ + token * channels, piece_.wide * channels, groups(), group);
      }
      for (int64_t line = first; line < first + count; ++line) {
        uint32_t* to = line_at(group, line);
        if (!inside(line)) {
          std::fill_n(to, (piece_.wide + 2) * kWords, 0);
          continue;
        }
        std::fill_n(to, kWords, 0);
        narrow().linear_words(as_words(tokens_ + (line - first) * size), channels / 2, piece_.wide,
                              network_.fc1 + here * channels / 2 * kGroup, network_.fc1_bias + here * kGroup,
                              channels / 2, to + kWords);
        std::fill_n(to + (piece_.wide + 1) * kWords, kWords, 0);
      }
    }
  }

  // Convolution, GELU and the second layer: lines `first` and on of the result.
  void contract(int64_t first, int64_t count) {
    const int64_t columns = piece_.columns, left = (piece_.first_column - piece_.wide_column) * kWords;
    const float* bias = piece_.part == 0 ? network_.fc2_bias : network_.no_bias;
    for (int64_t group = 0; group < groups(); group += kGroups) {
      const int64_t together = std::min(kGroups, groups() - group), stride = together * kWords;
      for (int64_t i = 0; i < together; ++i) {
        const int64_t here = group_at(group + i);
        for (int64_t line = 0; line < count; ++line) {
          const uint32_t* lines[3];
          for (int64_t l = 0; l < 3; ++l) lines[l] = line_at(group + i, first + line + l) + left;
          narrow().conv_gelu_words(lines, columns, network_.taps + here * 9 * kGroup,
                                   network_.taps_bias + here * kGroup,
                                   active_ + line * columns * stride + i * kWords, stride);
        }
      }
      for (int64_t out = 0; out < network_.out_groups; ++out) {
        const int64_t channel = out * kGroup;
        narrow().linear_rows(active_, stride, count * columns,
                             network_.fc2 + (out * network_.groups + group_at(group)) * kWords * kGroup,
                             group == 0 ? bias + channel : nullptr, stride, std::min(kGroup, cols_ - channel),
                             rows_ + channel, cols_);
      }
    }
    for (int64_t line = 0; line < count; ++line) {
      const int64_t token = token_at(piece_.first_row + first + line, piece_.first_column);
      const float* rows = rows_ + line * columns * cols_;
      if (float* partial = partials_.of(piece_)) {
        std::copy_n(rows, columns * cols_, partial + token * cols_);
      } else {
        token_kernels<float, X>().add(x_ + token * shape_.channels, shape_.channels, rows, columns,
                                      shape_.channels, cols_, out_ + token * shape_.channels);
      }
    }
  }

  const Tokens& shape_;
  const X* x_;
  const LayerNorm<float>& norm_;
  const Network& network_;
  X* out_;
  const Partials<float>& partials_;
  int64_t cols_, widest_, lines_, slots_;
  Scratch<uint32_t> hidden_, active_;
  Scratch<BFloat16> tokens_;
  Scratch<float> rows_;
  Piece piece_{};
};

// (2, pairs, size) as (size, 2, pairs).
Scratch<float> by_place(const float* table, int64_t pairs, int64_t size) {
  Scratch<float> turns(size * 2 * pairs);
  for (int64_t i = 0; i < size; ++i) {
    for (int64_t pair = 0; pair < 2 * pairs; ++pair) turns[i * 2 * pairs + pair] = table[pair * size + i];
  }
  return turns;
}

}  // namespace

template <typename X>
void heads_of(const Tokens& shape, const X* x, const LayerNorm<float>& norm,
              const Linear<float, BFloat16> (&layers)[3], const Rotation<float>& rotation,
              BFloat16* const (&out)[3]) {
  const int64_t channels = shape.channels, pairs = rotation.pairs, head_dims = 4 * pairs;
  const Packed packed[3] = {{layers[0], channels}, {layers[1], channels}, {layers[2], channels}};
  const Scratch<float> row_turns = by_place(rotation.rows, pairs, shape.height),
                       column_turns = by_place(rotation.columns, pairs, shape.width);
  const Panels panels(shape, pairs ? std::lcm(head_dims, kGroup) : kGroup);
  share_out(panels.count(), [&](Items& items) {
    const Scratch<BFloat16> tokens(kPanel * channels);
    const Scratch<float> rows(kPanel * padded(channels));
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const Panel panel = panels[turn.item], next = panels[turn.next];
      const int64_t at = panels.at(panel), cols = padded(panel.channels);
      normalize(x + at, panel.count, channels, norm, tokens.get());
      for (int i = 0; i < 3; ++i) {
        prefetch_part(x + panels.at(next), panels.size(next), 3, i);
        packed[i](as_words(tokens), panel.count, panel.first_channel, panel.channels, rows, cols);
        BFloat16* to = out[i] + at + panel.first_channel;
        if (!pairs || i == 2) {
          narrow().round_rows(rows, panel.count, panel.channels, cols, to, channels);
          continue;
        }
        for (int64_t done = 0; done < panel.count;) {
          const int64_t row = (panel.first + done) / shape.width, column = (panel.first + done) % shape.width;
          const int64_t count = std::min(panel.count - done, shape.width - column);
          narrow().turn_rows(rows + done * cols, count, cols, row_turns + row * 2 * pairs,
                             column_turns + column * 2 * pairs, panel.channels / head_dims, pairs,
                             to + done * channels, channels);
          done += count;
        }
      }
    }
  });
}

template <typename X>
void tokens_of_heads(const Tokens& shape, const X* x, const BFloat16* attended, const BFloat16* values,
                     const Linear<float>& conv, const Linear<float, BFloat16>& proj, X* out) {
  const int64_t channels = shape.channels, cols = padded(channels);
  const Packed packed(proj, channels);
  const Scratch<float> taps = by_tap(conv, channels);
  const Panels panels(shape, kGroup);
  share_out(panels.count(), [&](Items& items) {
    const Scratch<BFloat16> tokens(kPanel * channels);
    const Scratch<float> rows(kPanel * cols);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const Panel panel = panels[turn.item], next = panels[turn.next];
      const int64_t start = panel.image * shape.each() * channels, at = panels.at(panel);
      const int64_t channel = panel.first_channel, here = padded(panel.channels);
      narrow().convolve_add(values + start, shape.height, shape.width, panel.first, panel.count, taps,
                            conv.bias, attended + at, channels, cols, rows);
      narrow().round_rows(rows, panel.count, channels, cols, tokens.get(), channels);
      prefetch_part(attended + panels.at(next), panels.size(next), 1, 0);
      packed(as_words(tokens), panel.count, channel, panel.channels, rows, here);
      token_kernels<float, X>().add(x + at + channel, channels, rows, panel.count, panel.channels, here,
                                    out + at + channel);
    }
  });
}

template <typename X>
void feed_forward(const Tokens& shape, const X* x, const LayerNorm<float>& norm, int64_t hidden,
                  const Linear<float, BFloat16>& fc1, const Linear<float>& conv,
                  const Linear<float, BFloat16>& fc2, X* out) {
  const Network network(shape.channels, hidden, fc1, conv, fc2);
  const Pieces pieces(shape, network.groups * kGroup, kGroup);
  const Partials<float> partials(shape, pieces);
  share_out(pieces.count(), [&](Items& items) {
    Worker<X> worker(shape, x, norm, network, pieces, out, partials);
    for (int64_t i = items(); i >= 0; i = items()) worker.run(pieces[i]);
  });
  partials.add_to(x, out);
}

void map_of_tokens(const Tokens& shape, const BFloat16* x, const LayerNorm<float>& norm, BFloat16* tokens,
                   BFloat16* map) {
  const int64_t channels = shape.channels, depth = channels / 2, cols = padded(depth);
  const Panels panels(shape);
  share_out(panels.count(), [&](Items& items) {
    const Scratch<float> rows(map ? kPanel * cols : 0), words(map ? cols * kPanel : 0),  // of two channels
        wide(map ? channels * kPanel : 0);
    if (map) rows.zeroed(kPanel * cols);
    for (int64_t item = items(); item >= 0; item = items()) {
      const Panel panel = panels[item];
      BFloat16* to = tokens + panels.at(panel);
      normalize(x + panels.at(panel), panel.count, channels, norm, to);
      if (!map) continue;
      for (int64_t i = 0; i < panel.count; ++i)
        std::memcpy(rows + i * cols, to + i * channels, depth * sizeof(float));
      panel_of_rows<float>(rows, panel.count, cols, words);
      narrow().unpair(reinterpret_cast<const uint32_t*>(words.get()), kPanel, channels, padded(panel.count),
                      wide, kPanel);
      narrow().round_rows(wide, channels, panel.count, kPanel,
                          map + panel.image * channels * shape.each() + panel.first, shape.each());
    }
  });
}

#define LF_INSTANTIATE(X)                                                                  \
  template void heads_of(const Tokens&, const X*, const LayerNorm<float>&,                 \
                         const Linear<float, BFloat16>(&)[3], const Rotation<float>&,      \
                         BFloat16* const(&)[3]);                                           \
  template void tokens_of_heads(const Tokens&, const X*, const BFloat16*, const BFloat16*, \
                                const Linear<float>&, const Linear<float, BFloat16>&, X*); \
  template void feed_forward(const Tokens&, const X*, const LayerNorm<float>&, int64_t,    \
                             const Linear<float, BFloat16>&, const Linear<float>&,         \
                             const Linear<float, BFloat16>&, X*);
LF_INSTANTIATE(float)
LF_INSTANTIATE(BFloat16)
#undef LF_INSTANTIATE

}  // namespace lf
