// How the tokens of a batch are cut for projections.
#pragma once

#include <algorithm>
#include <cstdint>

#include "layers.h"

namespace lf {

// Items of work for each thread, where there could be fewer: threads are never all free at the same time.
constexpr int64_t kTurns = 4;

// Tokens of one image, and the channels of the result that are computed for them.
struct Panel {
  int64_t image, first, count, first_channel, channels;
};

// The panels of a batch. Where these are few, each is there several times, for some of the channels at a
// time: whole multiples of `unit`.
class Panels {
 public:
  Panels(const Tokens& shape, int64_t unit)
      : shape_(shape),
        unit_(unit),
        units_((shape.channels + unit - 1) / unit),
        each_((shape.each() + kPanel - 1) / kPanel),
        all_(shape.batch * each_),
        parts_(std::clamp<int64_t>(kTurns * pool_threads() / std::max<int64_t>(1, all_), 1, units_)) {}

  // Each once, for all channels.
  explicit Panels(const Tokens& shape) : Panels(shape, std::max<int64_t>(1, shape.channels)) {}

  int64_t count() const { return all_ * parts_; }

  // An empty one for -1.
  Panel operator[](int64_t item) const {
    if (item < 0) return {};
    // Neighbours take other tokens and the same weights.
    const int64_t which = item / all_, first = item % all_ % each_ * kPanel;
    const int64_t channel = part(units_, parts_, which) * unit_;
    return {item % all_ / each_, first, std::min(kPanel, shape_.each() - first), channel,
            std::min(shape_.channels, part(units_, parts_, which + 1) * unit_) - channel};
  }

  // Where a panel's channels are in a tensor of tokens.
  int64_t at(const Panel& panel) const {
    return (panel.image * shape_.each() + panel.first) * shape_.channels;
  }
  int64_t size(const Panel& panel) const { return panel.count * shape_.channels; }

 private:
  const Tokens& shape_;
  int64_t unit_, units_, each_, all_, parts_;
};

}  // namespace lf
