#include <algorithm>

#include "../tensor.h"
#include "parallel.h"

namespace lf {
namespace {

// Columns are taken in blocks, so that a tile of the result stays in the first caches however many there are.
constexpr int64_t kBlock = 256;
// A result of more bytes leaves the caches before anybody reads it. It goes past them: they are not read for
// lines that are about to be overwritten, and keep the points.
constexpr int64_t kCached = 8 << 20;

// One head's y, packed and transposed: (padded channels, padded rows).
template <typename T>
void pack_transposed(const View& y, int64_t head, T* rows, T* transposed) {
  pack_rows(y, head, 0, y.rows(), padded(y.rows()), rows);
  kernels<T>().transpose(rows, padded(y.channels()), padded(y.rows()), padded(y.channels()), transposed,
                         padded(y.rows()));
}

template <typename T>
void forward(const View& x, const View& y, T scale, const View& out) {
  const Kernels<T>& k = kernels<T>();
  const int64_t channels = x.channels(), cols = padded(channels), m = y.rows(), padded_m = padded(m);
  const Chunks chunks(x.rows());
  Scratch<T> transposed(x.heads() * padded_m * cols);
  parallel(x.heads(), [&](int64_t head) {
    Scratch<T> rows(padded_m * cols);
    pack_transposed<T>(y, head, rows, transposed + head * padded_m * cols);
  });
  const int64_t item_bytes = item_size(out.dtype), row_bytes = m * item_bytes;
  const bool past_caches = x.heads() * x.rows() * row_bytes > kCached;
  share_out(x.heads() * chunks.count, [&](Items& items) {
    Scratch<T> rows(kTile * cols), here(kTile * cols), columns(kBlock * kTile), wide(kBlock * kTile);
    Scratch<char> packed(kBlock * kTile * item_bytes);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const auto chunk = chunks.at(turn.item), next_chunk = chunks.at(turn.next);
      for (int64_t first = chunk.first; first < chunk.end; first += kTile) {
        const int64_t count = std::min(kTile, chunk.end - first);
        transpose_tile<T>(x, chunk.head, first, count, rows, here);
        for (int64_t j = 0; j < m; j += kBlock) {
          const int64_t block = std::min(kBlock, m - j);
          char* to = out.row(chunk.head, first) + j * item_bytes;
          Ahead ahead;
          ahead.add(tile_after(x, chunk, first, next_chunk));
          if (!past_caches) ahead.add({to, row_bytes, block * item_bytes, count});
          k.kernel_tile(here, transposed + chunk.head * padded_m * cols + j, padded_m, channels, block, scale,
                        ahead, columns);
          char* rows_to = past_caches ? packed.get() : to;
          const int64_t stride = past_caches ? block : m;
          if (holds<T>(out.dtype)) {
            k.transpose(columns, kTile, block, count, reinterpret_cast<T*>(rows_to), stride);
          } else {
            k.transpose(columns, kTile, block, count, wide, padded(block));
            k.unpack(wide, count, block, padded(block), rows_to, out.dtype, stride, 1);
          }
          if (!past_caches) continue;
          const int64_t runs = block == m ? 1 : count, run_bytes = count / runs * block * item_bytes;
          for (int64_t run = 0; run < runs; ++run)
            instruction_set().stream(packed + run * run_bytes, run_bytes, to + run * row_bytes);
        }
      }
    }
    std::atomic_thread_fence(std::memory_order_seq_cst);  // the pool's own order leaves such stores out
  });
}

template <typename T>
void backward(const View& grad, const View& x, const View& y, T scale, const View& dx, const View& dy) {
  const Kernels<T>& k = kernels<T>();
  const int64_t channels = x.channels(), cols = padded(channels), m = y.rows(), padded_m = padded(m),
                heads = x.heads();
  const Chunks chunks(x.rows());
  Scratch<T> there(heads * padded_m * cols), transposed(heads * padded_m * cols);
  parallel(heads, [&](int64_t head) {
    pack_transposed<T>(y, head, there + head * padded_m * cols, transposed + head * padded_m * cols);
  });
  Scratch<T> partials(heads * chunks.count * m * cols);
  share_out(heads * chunks.count, [&](Items& items) {
    Scratch<T> rows(kTile * cols), here(kTile * cols), drows(kTile * cols);
    Scratch<T> columns(kBlock * kTile), grads(kBlock * kTile), weights(kBlock * kTile);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const auto chunk = chunks.at(turn.item), next_chunk = chunks.at(turn.next);
      const int64_t head = chunk.head;
      T* partial = partials + turn.item * m * cols;
      std::fill_n(partial, m * cols, T{0});
      for (int64_t first = chunk.first; first < chunk.end; first += kTile) {
        const int64_t count = std::min(kTile, chunk.end - first);
        pack_tile<T>(x, head, first, count, rows, here);
        drows.zeroed(kTile * cols);
        for (int64_t j = 0; j < m; j += kBlock) {
          const int64_t block = std::min(kBlock, m - j), padded_block = padded(block);
          const int64_t item_bytes = item_size(grad.dtype), row_bytes = grad.stride[2] * item_bytes;
          const char* from = grad.row(head, first) + j * grad.stride[3] * item_bytes;
          Ahead ahead;
          ahead.add(tile_after(x, chunk, first, next_chunk));
          ahead.add({from, row_bytes, grad.stride[3] == 1 ? block * item_bytes : 0, count});
          k.kernel_tile(here, transposed + head * padded_m * cols + j, padded_m, channels, block, scale,
                        ahead, columns);
          k.pack(from, grad.dtype, grad.stride[2], grad.stride[3], count, kTile, block, padded_block, grads);
          k.transpose(grads, padded_block, kTile, padded_block, weights, kTile);
          for (int64_t i = 0; i < block * kTile; ++i) weights[i] *= columns[i] / scale;
          k.sign_tile(rows, there + (head * padded_m + j) * cols, weights, count, block, cols, drows,
                      partial + j * cols);
        }
        unpack_rows<T>(drows, dx, head, first, count);
      }
    }
  });
  const Scratch<double> sums = add_partials<T>(partials, heads, chunks.count, m * cols);
  parallel(heads, [&](int64_t head) {
    Scratch<T> total(m * cols);
    std::copy_n(sums + head * m * cols, m * cols, total.get());
    unpack_rows<T>(total, dy, head, 0, m);
  });
}

Tensor laplacian_kernel(const Tensor& x, const Tensor& y, double scale) {
  check_points(x, y, "x and y");
  Tensor out = empty({x.size(0), x.size(1), x.size(2), y.size(2)}, x.scalar_type(), x);
  with_compute_type(x, [&]<typename T>(T) { forward<T>(view(x), view(y), scale, view(out)); });
  return out;
}

std::tuple<Tensor, Tensor> laplacian_kernel_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                     double scale) {
  check_kernel_gradient(grad, x, y);
  Tensor dx = empty_tokens(x), dy = empty_tokens(y);
  with_compute_type(
      x, [&]<typename T>(T) { backward<T>(view(grad), view(x), view(y), scale, view(dx), view(dy)); });
  return {dx, dy};
}

Tensor arithmetic_floor(const Tensor& like, int64_t pairs) {
  Tensor out = empty({1}, ScalarType::Float, like);
  const Kernels<float>& k = kernels<float>();
  const int64_t parts = 64;
  float sums[parts];
  parallel(parts, [&](int64_t part) { sums[part] = k.floor_loop(pairs / (parts * k.pairs_per_step)); });
  data<float>(out)[0] = sums[0];
  return out;
}

}  // namespace
}  // namespace lf

LF_IMPLEMENT(CPU, m) {
  m.impl("laplacian_kernel", TORCH_BOX(&lf::laplacian_kernel));
  m.impl("laplacian_kernel_backward", TORCH_BOX(&lf::laplacian_kernel_backward));
  m.impl("arithmetic_floor", TORCH_BOX(&lf::arithmetic_floor));
}
