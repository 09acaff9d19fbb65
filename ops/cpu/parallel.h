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

// 0 .. count - 1, handed out to threads each once and in order.
class Items {
 public:
  Items(int64_t count, int64_t threads) : count_(count), threads_(threads) {}
  // -1 when all are taken.
  int64_t operator()() {
    const int64_t item = next_.fetch_add(1, std::memory_order_relaxed);
    return item < count_ ? item : -1;
  }
  // For a thread that is still at work: -1 too where another one could go without.
  int64_t ahead() { return left() >= threads_ ? (*this)() : -1; }
  int64_t left() const { return count_ - next_.load(std::memory_order_relaxed); }

 private:
  std::atomic<int64_t> next_{0};
  const int64_t count_, threads_;
};

// Runs `worker(items)` on each thread. Threads that are slower, or busy elsewhere, take fewer.
template <typename Worker>
void share_out(int64_t count, const Worker& worker) {
  Items items(count, std::min(count, pool_threads()));
  // A pool may be smaller than it said: a call that comes when all is taken must not make scratch memory.
  auto run = [&] {
    if (items.left() > 0) worker(items);
  };
  run_on_pool(
      std::min(count, pool_threads()), [](void* state) { (*static_cast<decltype(run)*>(state))(); }, &run);
}

// What a thread works on, until it is -1, and what it works on after that, whose memory it can ask for in
// time: -1 where it does not know. It drives a loop: a callback would have the compiler load all that it
// captures again after every store.
class Turn {
 public:
  explicit Turn(Items& items) : item(items()), next(item < 0 ? -1 : items.ahead()), items_(items) {}
  void advance() {
    item = next >= 0 ? next : items_();
    next = item < 0 ? -1 : items_.ahead();
  }

  int64_t item, next;

 private:
  Items& items_;
};

template <typename Run>
void parallel(int64_t count, const Run& run) {
  share_out(count, [&](Items& items) {
    for (int64_t i = items(); i >= 0; i = items()) run(i);
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

  // A head's chunk, by its number among those of all heads; empty for -1.
  struct Stretch {
    int64_t head, first, end;
  };
  Stretch at(int64_t item) const {
    if (item < 0) return {0, 0, 0};
    return {item / count, first(item % count), end(item % count)};
  }
};

// Each head's partial arrays (count, size), added up in order: (heads, size). Threads share the entries. The
// next array's are asked for in time, since another thread's cache has half of them.
template <typename T>
Scratch<double> add_partials(const T* partials, int64_t heads, int64_t count, int64_t size) {
  constexpr int64_t kSlice = 256, kLine = 64 / sizeof(T);
  Scratch<double> sums(heads * size);
  const int64_t slices = (size + kSlice - 1) / kSlice;
  parallel(heads * slices, [&](int64_t index) {
    const int64_t head = index / slices, first = index % slices * kSlice, n = std::min(kSlice, size - first);
    const T* from = partials + head * count * size + first;
    double sum[kSlice] = {};
    for (int64_t p = 0; p < count; ++p, from += size) {
      for (int64_t i = 0; p + 1 < count && i < n; i += kLine) __builtin_prefetch(from + size + i);
      for (int64_t i = 0; i < n; ++i) sum[i] += from[i];
    }
    std::copy_n(sum, n, sums + head * size + first);
  });
  return sums;
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

// The tile after that at `first`, in this stretch or at the beginning of the next.
inline Region tile_after(const View& view, const Chunks::Stretch& here, int64_t first,
                         const Chunks::Stretch& next) {
  if (first + kTile < here.end) return rows_ahead(view, here.head, first + kTile, kTile);
  return rows_ahead(view, next.head, next.first, std::min(kTile, next.end - next.first));
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
