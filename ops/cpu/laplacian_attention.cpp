// Normalization "mass": a stream over keys and values, the solver, a stream over queries; backward the two
// streams again. Kernel columns are recomputed in the backward pass, not stored: docs/operators.md has the
// measurement.
#include "laplacian_attention.h"

#include <algorithm>

#include "newton_schulz_inverse.h"
#include "parallel.h"

namespace lf {
namespace {

// Sizes of one call; m rows of per-landmark arrays are `cols` or `padded_m` apart.
struct Shape {
  int64_t heads, rows, m, channels, cols, padded_m, tiled_m;

  Shape(const View& q, const View& landmarks)
      : heads(q.heads()),
        rows(q.rows()),
        m(landmarks.rows()),
        channels(q.channels()),
        cols(padded(channels)),
        padded_m(padded(m)),
        tiled_m((m + kTile - 1) / kTile * kTile) {}
};

// The landmarks of every head, packed both ways.
template <typename T>
struct Landmarks {
  Shape shape;
  Scratch<T> rows_, columns_;

  Landmarks(const View& landmarks, const Shape& shape)
      : shape(shape),
        rows_(shape.heads * shape.tiled_m * shape.cols),
        columns_(shape.heads * shape.tiled_m * shape.cols) {
    kernels<T>();
    parallel(shape.heads, [&](int64_t head) {
      T* packed = rows_ + head * shape.tiled_m * shape.cols;
      pack_rows<T>(landmarks, head, 0, shape.m, shape.tiled_m, packed);
      kernels<T>().transpose(packed, shape.cols, shape.tiled_m, shape.cols,
                             columns_ + head * shape.tiled_m * shape.cols, shape.tiled_m);
    });
  }
  const T* rows(int64_t head) const { return rows_ + head * shape.tiled_m * shape.cols; }
  // (cols, tiled_m)
  const T* columns(int64_t head) const { return columns_ + head * shape.tiled_m * shape.cols; }

  // The kernel between a transposed tile of `count` points and the landmarks, (m, kTile), zero beyond
  // `count`.
  void tile(int64_t head, const T* transposed, int64_t count, T scale, const Ahead& ahead, T* out) const {
    kernels<T>().kernel_tile(transposed, columns(head), shape.tiled_m, shape.channels, shape.m, scale, ahead,
                             out);
    if (count == kTile) return;
    for (int64_t j = 0; j < shape.m; ++j) std::fill(out + j * kTile + count, out + (j + 1) * kTile, T{0});
  }

  // The kernel of the landmarks with themselves, (m, padded_m).
  void gram(int64_t head, T scale, T* out) const {
    Scratch<T> columns(shape.m * kTile);
    std::fill_n(out, shape.m * shape.padded_m, T{0});
    for (int64_t first = 0; first < shape.m; first += kTile) {
      const int64_t count = std::min(kTile, shape.m - first);
      Scratch<T> transposed(kTile * shape.cols);
      kernels<T>().transpose(rows(head) + first * shape.cols, shape.cols, kTile, shape.cols, transposed,
                             kTile);
      tile(head, transposed, count, scale, {}, columns);
      for (int64_t j = 0; j < shape.m; ++j)
        std::copy_n(columns + j * kTile, count, out + j * shape.padded_m + first);
    }
  }
};

// What the tokens' stream over queries needs of each head: U = A P of (m, cols) and t = A p of (m).
template <typename T>
struct Pooled {
  Scratch<T> values, mass;
  explicit Pooled(const Shape& shape)
      : values(shape.heads * shape.m * shape.cols), mass(shape.heads * shape.m) {}

  // inverse (m, padded_m), sums (m, cols), column_mass (m).
  void set(const Shape& shape, int64_t head, const T* inverse, const T* sums, const T* column_mass) {
    kernels<T>().product(values + head * shape.m * shape.cols, shape.cols, inverse, shape.padded_m, 1, sums,
                         shape.cols, shape.m, shape.m, shape.cols, false);
    for (int64_t i = 0; i < shape.m; ++i) {
      T sum = 0;
      for (int64_t j = 0; j < shape.m; ++j) sum += inverse[i * shape.padded_m + j] * column_mass[j];
      mass[head * shape.m + i] = sum;
    }
  }
};

// Sums over tokens are kept for each place in a tile, where they vectorise, and added up at a chunk's end.
template <typename T>
void sum_lanes(const T* lanes, int64_t m, T* sums) {
  for (int64_t j = 0; j < m; ++j) {
    T sum = 0;
    for (int64_t i = 0; i < kTile; ++i) sum += lanes[j * kTile + i];
    sums[j] = sum;
  }
}

// A head's mass under each query of a tile, and one over it with the floor tau; NaN stays NaN.
template <typename T>
void row_mass(const T* kernel, const T* mass, int64_t m, T tau, T* row, T* reciprocal) {
  kernels<T>().product(row, kTile, mass, m, 1, kernel, kTile, 1, m, kTile, false);
  for (int64_t i = 0; i < kTile; ++i) reciprocal[i] = 1 / ((row[i] <= 0 ? T{0} : row[i]) + tau);
}

template <typename T>
void copy_rows(const T* from, int64_t from_stride, int64_t rows, int64_t count, T* to, int64_t to_stride) {
  for (int64_t i = 0; i < rows; ++i) {
    std::copy_n(from + i * from_stride, count, to + i * to_stride);
    std::fill(to + i * to_stride + count, to + (i + 1) * to_stride, T{0});
  }
}

}  // namespace

template <typename T>
void attention_forward(const View& q, const View& k, const View& v, const View& landmark_view,
                       AttentionConstants<T> constants, int64_t iters, double eps, const View& out,
                       Saved<T> saved) {
  const Kernels<T>& ops = kernels<T>();
  const Shape shape(q, landmark_view);
  const auto [heads, rows, m, channels, cols, padded_m, tiled_m] = shape;
  const Landmarks<T> landmarks(landmark_view, shape);

  const bool shared = invert_shared(heads, m);
  Scratch<T> inverses(heads * m * padded_m);
  const auto solve = [&](int64_t head) {
    Scratch<T> gram(m * padded_m);
    landmarks.gram(head, constants.scale, gram);
    invert<T>(gram, m, iters, eps, shared, inverses + head * m * padded_m);
  };
  // Otherwise threads solve beside those that go through the keys, which need no inverse.
  const int64_t solved_beside = shared ? 0 : heads;
  if (shared) {
    for (int64_t head = 0; head < heads; ++head) solve(head);
  }

  // Each chunk centres its values on its own mean, in the cache, so that keys and values are read once.
  const Chunks chunks(rows);
  Scratch<T> chunk_sums(heads * chunks.count * m * cols), chunk_masses(heads * chunks.count * m),
      chunk_means(heads * chunks.count * cols);
  share_out(solved_beside + heads * chunks.count, [&](Items& items) {
    Scratch<T> values(chunks.length * cols), tile(kTile * cols), transposed(kTile * cols), kernel(m * kTile);
    Scratch<T> lane_mass(m * kTile), negative_mean(cols), ones(chunks.length);
    std::fill_n(ones.get(), chunks.length, T{1});
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      if (turn.item < solved_beside) {
        solve(turn.item);
        continue;
      }
      const int64_t item = turn.item - solved_beside;
      const auto chunk = chunks.at(item), next_chunk = chunks.at(turn.next - solved_beside);
      const int64_t head = chunk.head, first = chunk.first, count = chunk.end - first;
      T* sums = chunk_sums + item * m * cols;
      std::fill_n(sums, m * cols, T{0});
      T* mean = chunk_means + item * cols;
      pack_rows<T>(v, head, first, count, count, values);
      ops.product(mean, cols, ones, count, 1, values, cols, 1, count, cols, false);
      for (int64_t c = 0; c < cols; ++c) {
        mean[c] /= count;
        negative_mean[c] = -mean[c];
      }
      ops.affine(values, count, cols, ones, negative_mean);
      lane_mass.zeroed(m * kTile);
      for (int64_t i = 0; i < count; i += kTile) {
        const int64_t inside = std::min(kTile, count - i);
        transpose_tile<T>(k, head, first + i, inside, tile, transposed);
        Ahead ahead;
        ahead.add(tile_after(k, chunk, first + i, next_chunk));
        ahead.add(rows_ahead(v, next_chunk.head, next_chunk.first + i,
                             std::min(kTile, next_chunk.end - next_chunk.first - i)));
        landmarks.tile(head, transposed, inside, constants.scale, ahead, kernel);
        ops.accumulate(lane_mass, kernel, m * kTile);
        ops.product(sums, cols, kernel, kTile, 1, values + i * cols, cols, m, inside, cols, true);
      }
      sum_lanes<T>(lane_mass, m, chunk_masses + item * m);
    }
  });

  Pooled<T> pooled(shape);
  Scratch<T> sums(heads * m * cols), mean_values(heads * cols);
  parallel(heads, [&](int64_t head) {
    Scratch<double> mean(cols);
    mean.zeroed(cols);
    for (int64_t chunk = 0; chunk < chunks.count; ++chunk) {
      const T* chunk_mean = chunk_means + (head * chunks.count + chunk) * cols;
      const double share = static_cast<double>(chunks.end(chunk) - chunks.first(chunk)) / rows;
      for (int64_t c = 0; c < cols; ++c) mean[c] += share * chunk_mean[c];
    }
    std::copy_n(mean.get(), cols, mean_values + head * cols);
    std::copy_n(mean.get(), channels, saved.mean_value + head * channels);
  });
  const Scratch<double> total_sums = add_partials<T>(chunk_sums, heads, chunks.count, m * cols);
  parallel(heads * m, [&](int64_t row) {
    const int64_t head = row / m, j = row % m;
    // What each chunk's values were centred on, less the mean of all.
    double* sum = total_sums + row * cols;
    double total_mass = 0;
    const T* mean = mean_values + head * cols;
    for (int64_t chunk = head * chunks.count; chunk < (head + 1) * chunks.count; ++chunk) {
      const T mass = chunk_masses[chunk * m + j];
      const T* chunk_mean = chunk_means + chunk * cols;
      total_mass += mass;
      for (int64_t c = 0; c < cols; ++c) sum[c] += mass * (chunk_mean[c] - mean[c]);
    }
    saved.mass[row] = static_cast<T>(total_mass / rows);
    for (int64_t c = 0; c < cols; ++c) sums[row * cols + c] = static_cast<T>(sum[c] / rows);
    std::copy_n(sums + row * cols, channels, saved.sums + row * channels);
  });
  parallel(heads, [&](int64_t head) {
    const T* inverse = inverses + head * m * padded_m;
    pooled.set(shape, head, inverse, sums + head * m * cols, saved.mass + head * m);
    copy_rows<T>(inverse, padded_m, m, m, saved.inverse + head * m * m, m);
  });

  share_out(heads * chunks.count, [&](Items& items) {
    Scratch<T> tile(kTile * cols), transposed(kTile * cols), kernel(m * kTile), mass(kTile),
        reciprocal(kTile);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const auto chunk = chunks.at(turn.item), next_chunk = chunks.at(turn.next);
      const int64_t head = chunk.head;
      const T* values = pooled.values + head * m * cols;
      const T* mean = mean_values + head * cols;
      for (int64_t first = chunk.first; first < chunk.end; first += kTile) {
        const int64_t count = std::min(kTile, chunk.end - first);
        transpose_tile<T>(q, head, first, count, tile, transposed);
        Ahead ahead;
        ahead.add(tile_after(q, chunk, first, next_chunk));
        ahead.add(rows_ahead(out, head, first, kTile));
        landmarks.tile(head, transposed, count, constants.scale, ahead, kernel);
        row_mass<T>(kernel, pooled.mass + head * m, m, constants.tau, mass, reciprocal);
        ops.product(tile, cols, kernel, 1, kTile, values, cols, kTile, m, cols, false);
        ops.affine(tile, count, cols, reciprocal, mean);
        unpack_rows<T>(tile, out, head, first, count);
      }
    }
  });
}

template <typename T>
void attention_backward(const View& grad, const View& q, const View& k, const View& v,
                        const View& landmark_view, Saved<T> saved, AttentionConstants<T> constants,
                        const View& dq, const View& dk, const View& dv, const View& dlandmarks) {
  const Kernels<T>& ops = kernels<T>();
  const Shape shape(q, landmark_view);
  const auto [heads, rows, m, channels, cols, padded_m, tiled_m] = shape;
  const T inverse_n = 1 / static_cast<T>(rows), inverse_scale = 1 / constants.scale;
  const Landmarks<T> landmarks(landmark_view, shape);

  Pooled<T> pooled(shape);
  Scratch<T> inverses(heads * m * padded_m), sums(heads * m * cols), mean_values(heads * cols);
  parallel(heads, [&](int64_t head) {
    copy_rows<T>(saved.inverse + head * m * m, m, m, m, inverses + head * m * padded_m, padded_m);
    copy_rows<T>(saved.sums + head * m * channels, channels, m, channels, sums + head * m * cols, cols);
    copy_rows<T>(saved.mean_value + head * channels, channels, 1, channels, mean_values + head * cols, cols);
    pooled.set(shape, head, inverses + head * m * padded_m, sums + head * m * cols, saved.mass + head * m);
  });

  // Queries: gradients of U, t, the landmarks and, summed, of the output.
  const Chunks chunks(rows);
  const int64_t partial_size = 2 * m * cols + padded_m + cols;
  Scratch<T> partials(heads * chunks.count * partial_size);
  share_out(heads * chunks.count, [&](Items& items) {
    Scratch<T> tile(kTile * cols), transposed(kTile * cols), grads(kTile * cols), dtile(kTile * cols);
    Scratch<T> kernel(m * kTile), dkernel(m * kTile), mass(kTile), reciprocal(kTile), dmass(kTile),
        lane_dmass(m * kTile);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const auto chunk = chunks.at(turn.item), next_chunk = chunks.at(turn.next);
      const int64_t head = chunk.head;
      T* dvalues = partials + turn.item * partial_size;
      T* dlandmark = dvalues + m * cols;
      T* dcolumn_mass = dlandmark + m * cols;
      T* grad_sum = dcolumn_mass + padded_m;
      std::fill_n(dvalues, partial_size, T{0});
      const T* values = pooled.values + head * m * cols;
      const T* column_mass = pooled.mass + head * m;
      lane_dmass.zeroed(m * kTile);
      for (int64_t first = chunk.first; first < chunk.end; first += kTile) {
        const int64_t count = std::min(kTile, chunk.end - first);
        pack_tile<T>(q, head, first, count, tile, transposed);
        Ahead ahead;
        for (const View& wanted : {q, grad}) ahead.add(tile_after(wanted, chunk, first, next_chunk));
        ahead.add(rows_ahead(dq, head, first, kTile));
        landmarks.tile(head, transposed, count, constants.scale, ahead, kernel);
        row_mass<T>(kernel, column_mass, m, constants.tau, mass, reciprocal);
        pack_tile<T>(grad, head, first, count, grads, transposed);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < cols; ++c) grad_sum[c] += grads[i * cols + c];
        }
        ops.product(dkernel, kTile, values, cols, 1, transposed, kTile, m, channels, kTile, false);
        std::fill_n(dmass.get(), kTile, T{0});
        for (int64_t j = 0; j < m; ++j) {
          for (int64_t i = 0; i < kTile; ++i) dmass[i] += kernel[j * kTile + i] * dkernel[j * kTile + i];
        }
        for (int64_t i = 0; i < kTile; ++i)
          dmass[i] = mass[i] < 0 ? T{0} : -reciprocal[i] * reciprocal[i] * dmass[i];
        for (int64_t j = 0; j < m; ++j) {
          for (int64_t i = 0; i < kTile; ++i) {
            T& entry = kernel[j * kTile + i];
            T& dentry = dkernel[j * kTile + i];
            lane_dmass[j * kTile + i] += entry * dmass[i];
            dentry = entry * (reciprocal[i] * dentry + dmass[i] * column_mass[j]) * inverse_scale;
            entry *= reciprocal[i];
          }
        }
        ops.product(dvalues, cols, kernel, kTile, 1, grads, cols, m, count, cols, true);
        ops.sign_tile(tile, landmarks.rows(head), dkernel, count, m, cols, dtile.zeroed(kTile * cols),
                      dlandmark);
        unpack_rows<T>(dtile, dq, head, first, count);
      }
      sum_lanes<T>(lane_dmass, m, dcolumn_mass);
    }
  });

  // Landmarks: through the inverse, in float64, since it amplifies by up to 1 / eps twice.
  Scratch<T> dsums(heads * m * cols), dmass(heads * padded_m), dmean(heads * cols);
  Scratch<double> dlandmark_sums(heads * m * cols);
  const Scratch<double> totals = add_partials<T>(partials, heads, chunks.count, partial_size);
  parallel(heads, [&](int64_t head) {
    const Kernels<double>& wide = kernels<double>();
    Scratch<double> inverse_t(m * padded_m), product(m * padded_m), dgram(m * padded_m);
    Scratch<double> sums_t(cols * padded_m), result(m * cols);
    const double* dvalues = totals + head * partial_size;
    const double* dlandmark = dvalues + m * cols;
    const double* dcolumn_mass = dlandmark + m * cols;
    const double* grad_sum = dcolumn_mass + padded_m;
    inverse_t.zeroed(m * padded_m);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) inverse_t[i * padded_m + j] = inverses[(head * m + j) * padded_m + i];
    }
    // dP = A^T dU, dp = A^T dt.
    wide.product(result, cols, inverse_t, padded_m, 1, dvalues, cols, m, m, cols, false);
    std::copy_n(result.get(), m * cols, dsums + head * m * cols);
    const T* column_mass = saved.mass + head * m;
    for (int64_t i = 0; i < m; ++i) {
      double sum = 0;
      for (int64_t j = 0; j < m; ++j) sum += inverse_t[i * padded_m + j] * dcolumn_mass[j];
      dmass[head * padded_m + i] = static_cast<T>(sum);
    }
    for (int64_t c = 0; c < cols; ++c) dmean[head * cols + c] = static_cast<T>(grad_sum[c] / rows);
    // dA = dU P^T + dt p^T; dW = -A^T dA A^T.
    sums_t.zeroed(cols * padded_m);
    for (int64_t j = 0; j < m; ++j) {
      for (int64_t c = 0; c < cols; ++c) sums_t[c * padded_m + j] = sums[head * m * cols + j * cols + c];
    }
    wide.product(dgram, padded_m, dvalues, cols, 1, sums_t, padded_m, m, cols, padded_m, false);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < m; ++j) dgram[i * padded_m + j] += dcolumn_mass[i] * column_mass[j];
    }
    wide.product(product, padded_m, inverse_t, padded_m, 1, dgram, padded_m, m, m, padded_m, false);
    wide.product(dgram, padded_m, product, padded_m, 1, inverse_t, padded_m, m, m, padded_m, false);
    Scratch<T> gram(m * padded_m), weights(m * kTile), as_rows(m * cols), as_columns(m * cols);
    landmarks.gram(head, constants.scale, gram);
    as_rows.zeroed(m * cols), as_columns.zeroed(m * cols);
    for (int64_t first = 0; first < m; first += kTile) {
      const int64_t count = std::min(kTile, m - first);
      for (int64_t j = 0; j < m; ++j) {
        for (int64_t i = 0; i < count; ++i) {
          weights[j * kTile + i] = static_cast<T>(-dgram[(first + i) * padded_m + j] *
                                                  gram[(first + i) * padded_m + j] / constants.scale);
        }
      }
      ops.sign_tile(landmarks.rows(head) + first * cols, landmarks.rows(head), weights, count, m, cols,
                    as_rows + first * cols, as_columns);
    }
    for (int64_t i = 0; i < m * cols; ++i)
      dlandmark_sums[head * m * cols + i] = dlandmark[i] + as_rows[i] + as_columns[i];
  });

  // Keys and values.
  Scratch<T> key_partials(heads * chunks.count * m * cols);
  share_out(heads * chunks.count, [&](Items& items) {
    Scratch<T> tile(kTile * cols), transposed(kTile * cols), values(kTile * cols), dtile(kTile * cols);
    Scratch<T> kernel(m * kTile), dkernel(m * kTile);
    for (Turn turn(items); turn.item >= 0; turn.advance()) {
      const auto chunk = chunks.at(turn.item), next_chunk = chunks.at(turn.next);
      const int64_t head = chunk.head;
      T* dlandmark = key_partials + turn.item * m * cols;
      std::fill_n(dlandmark, m * cols, T{0});
      const T* head_dsums = dsums + head * m * cols;
      const T* mean = mean_values + head * cols;
      for (int64_t first = chunk.first; first < chunk.end; first += kTile) {
        const int64_t count = std::min(kTile, chunk.end - first);
        pack_tile<T>(k, head, first, count, tile, transposed);
        Ahead ahead;
        for (const View& wanted : {k, v}) ahead.add(tile_after(wanted, chunk, first, next_chunk));
        for (const View& wanted : {dk, dv}) ahead.add(rows_ahead(wanted, head, first, kTile));
        landmarks.tile(head, transposed, count, constants.scale, ahead, kernel);
        pack_rows<T>(v, head, first, count, kTile, values);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < cols; ++c) values[i * cols + c] -= mean[c];
        }
        ops.transpose(values, cols, kTile, cols, transposed, kTile);
        ops.product(dkernel, kTile, head_dsums, cols, 1, transposed, kTile, m, channels, kTile, false);
        for (int64_t j = 0; j < m; ++j) {
          const T own = dmass[head * padded_m + j], column_mass = saved.mass[head * m + j];
          for (int64_t i = 0; i < count; ++i) {
            T& entry = kernel[j * kTile + i];
            T& dentry = dkernel[j * kTile + i];
            dentry = entry * (dentry + own) * (inverse_n * inverse_scale);
            // The mean of dV leaves before the product, not after: on close tokens the difference would
            // cancel to nothing.
            entry = (entry - column_mass) * inverse_n;
          }
        }
        ops.product(values, cols, kernel, 1, kTile, head_dsums, cols, kTile, m, cols, false);
        for (int64_t i = 0; i < count; ++i) {
          for (int64_t c = 0; c < cols; ++c) values[i * cols + c] += dmean[head * cols + c];
        }
        unpack_rows<T>(values, dv, head, first, count);
        ops.sign_tile(tile, landmarks.rows(head), dkernel, count, m, cols, dtile.zeroed(kTile * cols),
                      dlandmark);
        unpack_rows<T>(dtile, dk, head, first, count);
      }
    }
  });
  const Scratch<double> key_totals = add_partials<T>(key_partials, heads, chunks.count, m * cols);
  parallel(heads, [&](int64_t head) {
    const int64_t size = m * cols;
    const double* total = key_totals + head * size;
    Scratch<T> narrow(size);
    for (int64_t i = 0; i < size; ++i) narrow[i] = static_cast<T>(total[i] + dlandmark_sums[head * size + i]);
    unpack_rows<T>(narrow, dlandmarks, head, 0, m);
  });
}

#define LF_ATTENTION(T)                                                                                \
  template void attention_forward<T>(const View&, const View&, const View&, const View&,               \
                                     AttentionConstants<T>, int64_t, double, const View&, Saved<T>);   \
  template void attention_backward<T>(const View&, const View&, const View&, const View&, const View&, \
                                      Saved<T>, AttentionConstants<T>, const View&, const View&,       \
                                      const View&, const View&);
LF_ATTENTION(float)
LF_ATTENTION(double)

}  // namespace lf
