// Scratch memory, and loops over the threads of whoever called.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <memory>
#include <new>

#include "../view.h"
#include "pool.h"
#include "vector_kernels.h"

namespace lf {

// Uninitialised, aligned to a cache line.
template <typename T>
class Scratch {
 public:
  explicit Scratch(int64_t count)
      : data_(static_cast<T*>(std::aligned_alloc(64, (count * sizeof(T) + 127) / 64 * 64)), std::free) {
    if (!data_) throw std::bad_alloc();
  }
  T* get() const { return data_.get(); }
  T* zeroed(int64_t count) const {
    std::fill_n(data_.get(), count, T{0});
    return data_.get();
  }
  operator T*() const { return data_.get(); }

 private:
  std::unique_ptr<T, decltype(&std::free)> data_;
};

// Runs `worker(take)` on each thread; take() hands out 0 .. count - 1, each once and in order, and then -1.
// Threads that are slower, or busy elsewhere, take fewer.
template <typename Worker>
void share_out(int64_t count, const Worker& worker) {
  std::atomic<int64_t> next{0};
  const auto take = [&] {
    const int64_t item = next.fetch_add(1, std::memory_order_relaxed);
    return item < count ? item : int64_t{-1};
  };
  // A pool may be smaller than it said: a call that comes when all is taken must not make scratch memory.
  auto run = [&] {
    if (next.load(std::memory_order_relaxed) < count) worker(take);
  };
  run_on_pool(
      std::min(count, pool_threads()), [](void* state) { (*static_cast<decltype(run)*>(state))(); }, &run);
}

template <typename Run>
void parallel(int64_t count, const Run& run) {
  share_out(count, [&](const auto& take) {
    for (int64_t i = take(); i >= 0; i = take()) run(i);
  });
}

// Tokens are cut into chunks by their number alone, and partial sums are added in the chunks' order: the same
// bits whatever the number of threads. At most 256 chunks a head while a chunk is at most 1024 tokens, so
// that many cores have work and few partial sums are held.
struct Chunks {
  int64_t rows, length, count;

  explicit Chunks(int64_t rows) : rows(rows) {
    length = (rows + 255) / 256;
    length = std::clamp<int64_t>((length + kTile - 1) / kTile * kTile, 2 * kTile, 1024);
    count = (rows + length - 1) / length;
  }
  int64_t first(int64_t chunk) const { return chunk * length; }
  int64_t end(int64_t chunk) const { return std::min(rows, (chunk + 1) * length); }
};

// Adds `count` partial arrays of `size`, `stride` apart, in order.
template <typename T>
void add_partials(const T* partials, int64_t count, int64_t stride, int64_t size, double* sum) {
  std::fill_n(sum, size, 0.0);
  for (int64_t p = 0; p < count; ++p) {
    for (int64_t i = 0; i < size; ++i) sum[i] += partials[p * stride + i];
  }
}

// Rows of a head of a tensor into packed rows.
template <typename T>
void pack_rows(const View& from, int64_t head, int64_t first, int64_t rows, int64_t padded_rows, T* to) {
  kernels<T>().pack(from.row(head, first), from.dtype, from.stride[2], from.stride[3], rows, padded_rows,
                    from.channels(), padded(from.channels()), to);
}

// Up to `count` rows of a head, to prefetch; rows of scattered channels are left alone.
inline Region rows_ahead(const View& view, int64_t head, int64_t first, int64_t count) {
  const int64_t item = item_size(view.dtype),
                rows = view.stride[3] == 1 ? std::min(count, view.rows() - first) : 0;
  return {view.row(head, first), view.stride[2] * item, view.channels() * item, rows};
}

// Whether values of this dtype are those computed with.
template <typename T>
bool holds(DType dtype) {
  return dtype == (sizeof(T) == 8 ? DType::kFloat64 : DType::kFloat32);
}

// A tile as (kTile, padded channels) and as (padded channels, kTile).
template <typename T>
void pack_tile(const View& from, int64_t head, int64_t first, int64_t count, T* rows, T* transposed) {
  const int64_t cols = padded(from.channels());
  pack_rows<T>(from, head, first, count, kTile, rows);
  kernels<T>().transpose(rows, cols, kTile, cols, transposed, kTile);
}

// Whether rows from this one on are whole vectors of words of two channels of bfloat16: half as many to
// transpose.
template <typename T>
bool has_words(const View& from, const char* row) {
  return holds<T>(DType::kFloat32) && from.dtype == DType::kBFloat16 && from.stride[3] == 1 &&
         from.stride[2] % 2 == 0 && from.channels() % (2 * kAlign) == 0 &&
         reinterpret_cast<uintptr_t>(row) % alignof(T) == 0;
}

// The latter alone: straight from the tensor where its rows lie as packed ones do, else by way of `rows`.
template <typename T>
void transpose_tile(const View& from, int64_t head, int64_t first, int64_t count, T* rows, T* transposed) {
  const int64_t cols = padded(from.channels());
  if (count == kTile && holds<T>(from.dtype) && from.stride[3] == 1 && cols == from.channels()) {
    kernels<T>().transpose(reinterpret_cast<const T*>(from.row(head, first)), from.stride[2], kTile, cols,
                           transposed, kTile);
  } else if (count == kTile && has_words<T>(from, from.row(head, first))) {
    const int64_t words = from.channels() / 2;
    kernels<T>().transpose(reinterpret_cast<const T*>(from.row(head, first)), from.stride[2] / 2, kTile,
                           words, rows, kTile);
    instruction_set().narrow.unpair(reinterpret_cast<const uint32_t*>(rows), kTile, 2 * words, kTile,
                                    reinterpret_cast<float*>(transposed), kTile);
  } else {
    pack_tile<T>(from, head, first, count, rows, transposed);
  }
}

template <typename T>
void unpack_rows(const T* from, const View& to, int64_t head, int64_t first, int64_t rows) {
  kernels<T>().unpack(from, rows, to.channels(), padded(to.channels()), to.row(head, first), to.dtype,
                      to.stride[2], to.stride[3]);
}

}  // namespace lf
