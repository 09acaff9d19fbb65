// How the tokens of an attention are cut into chunks, one a block: by the tensors' shape alone, so that the
// bits do not depend on the device.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../dtype.h"

namespace lf {

// One block's share of a head.
struct Chunk {
  int64_t index;  // of the partial sums, head by head
  int64_t first;  // token
  int head, tokens;
};

// Batches up to this many images are cut as one image is: an image's bits are the same in all of them.
constexpr int64_t kBatchesCutAlike = 16;

// A head's chunks in the order of their blocks: first long ones, for few partial sums, then shorter and
// shorter ones, which fill what the long ones leave of the multiprocessors, however many there are.
struct Cut {
  static constexpr int kLevels = 6;
  struct Level {
    int first_chunk, first_tile, tiles;  // chunks of `tiles` tiles from these on
  };

  int64_t tokens;
  int heads, tile_tokens, chunks;  // chunks of a head
  Level level[kLevels];

  // Where a head's chunk begins, and its tokens.
  LF_HOST_DEVICE int64_t first_token(int chunk) const {
    const Level at = level_of(chunk);
    return int64_t{at.first_tile + (chunk - at.first_chunk) * at.tiles} * tile_tokens;
  }
  LF_HOST_DEVICE int chunk_tokens(int chunk) const {
    const int64_t left = tokens - first_token(chunk), whole = int64_t{level_of(chunk).tiles} * tile_tokens;
    return static_cast<int>(left < whole ? left : whole);
  }
  // Blocks take a chunk of every head before the next chunk, so that the shorter ones come last.
  LF_HOST_DEVICE Chunk of_block(int block) const {
    const int head = block % heads, chunk = block / heads;
    return {int64_t{head} * chunks + chunk, first_token(chunk), head, chunk_tokens(chunk)};
  }

  static Cut of(int64_t batch, int64_t heads, int64_t tokens, int tile_tokens) {
    Cut cut{tokens, static_cast<int>(batch * heads), tile_tokens, 0, {}};
    const int64_t tiles = (tokens + tile_tokens - 1) / tile_tokens;
    const bool alike = batch <= kBatchesCutAlike;
    const int64_t together = std::max<int64_t>(1, alike ? heads : batch * heads), work = tiles * together;
    // A block gets a 240th of the work that is left, about the share of one of two blocks on a
    // multiprocessor of 108 to 132, and half of that work goes in blocks of one length. The shortest are so
    // short that none of them matters; of many heads longer, since each has partial sums.
    const int64_t shortest = std::max<int64_t>(1, work / (alike ? 4000 : 1500));
    int64_t first_chunk = 0, first_tile = 0;
    for (int i = 0; i < kLevels; ++i) {
      const int64_t left = tiles - first_tile;
      int64_t length = std::min(left, (left * together + 120) / 240), count = 0;
      if (length <= shortest || i == kLevels - 1) {
        count = std::max<int64_t>(1, (left + shortest / 2) / shortest);
        length = (left + count - 1) / count;
        count = length ? (left + length - 1) / length : 0;
      } else {
        count = std::max<int64_t>(1, (left + length) / (2 * length));
      }
      cut.level[i] = {static_cast<int>(first_chunk), static_cast<int>(first_tile), static_cast<int>(length)};
      first_chunk += count, first_tile += std::min(left, count * length);
    }
    cut.chunks = static_cast<int>(first_chunk);
    return cut;
  }

 private:
  LF_HOST_DEVICE Level level_of(int chunk) const {
    Level last = level[0];
    for (int i = 1; i < kLevels; ++i) {
      if (chunk >= level[i].first_chunk) last = level[i];
    }
    return last;
  }
};

}  // namespace lf
