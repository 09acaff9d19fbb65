// Matrices between landmarks: the solver of one matrix in shared memory, and batched products for those that
// do not fit.
#pragma once

#include <cmath>

#include "device.cuh"

namespace lf {

template <typename N>
__host__ __device__ constexpr N padded_to_four(N number) {
  return (number + 3) / 4 * 4;
}

// The solver's shared memory: the matrix, three buffers of its size (before the iteration they hold the
// landmarks), the rows' sums and the steps' factors. Rows and columns are padded to fours.
template <typename T>
struct SolverLayout {
  int side;
  Layout layout;
  Piece<T> matrix, buffers, sums, factors;

  LF_HOST_DEVICE constexpr SolverLayout(int m, int iters, int64_t points = 0)
      : side(padded_to_four(m)),
        matrix(layout.add<T>(int64_t{side} * side)),
        buffers(layout.add<T>(larger(int64_t{3} * side * side, points))),
        sums(layout.add<T>(side)),
        factors(layout.add<T>(iters + 1)) {}

 private:
  LF_HOST_DEVICE static constexpr int64_t larger(int64_t a, int64_t b) { return a < b ? b : a; }
};

// The factor of a step, see lf_dense.reference: 1 + 1 / cosh(2^step a) with a = 2 artanh(sqrt(eps / bound)).
// `excess` is that cosine less 1, which doubling the angle leaves exact where the cosine would cancel.
template <typename T>
__device__ inline T step_factor(T bound, double eps, int step) {
  const double largest = bound;
  double excess = 2 * eps / (largest - eps);
  for (int i = 0; i < step; ++i) excess *= 4 + 2 * excess;
  return static_cast<T>(0 <= eps && eps <= largest ? 1 + 1 / (1 + excess) : NAN);
}

// Of the default grid's products a thread takes more rows, so that shared memory keeps up with the
// arithmetic.
template <int Fixed>
constexpr int kTileRows = Fixed == kUsualLandmarks ? 7 : 4;

// R x 4 results of a product, for a pair of neighbouring lanes that take half of its depth each. Each lane
// writes half of the rows; the middle one of an odd number is the first lane's.
template <int R>
struct PairTile {
  static constexpr int kOwn = R / 2, kKept = R - R / 2;
  int row, column, half;
  bool active;  // inactive lanes only take part in shuffles

  // The row of the pair's sum u: each lane's own come first, then the middle one, then the other lane's.
  __device__ int row_of(int u) const {
    const int across = kKept * half;
    return row + (u < kOwn ? u + across : u < kKept ? u : u - across);
  }
  __device__ bool writes(int u) const { return active && (u < kOwn || half == 0); }
};

// A thread's share of a matrix' tiles, row by row; kUpper: of those on and above the diagonal. Fixed: the
// matrix' rows, or 0 for any. Where they are known, a thread has one tile, found once.
template <int R, bool kUpper, int Fixed>
class Tiles {
 public:
  __device__ explicit Tiles(int side)
      : across_((Fixed ? padded_to_four(Fixed) : side) / 4),
        items_(kUpper ? across_ * (across_ + 1) : (Fixed ? 2 * kDown : 2 * across_) * across_),
        tile_(of(static_cast<int>(threadIdx.x))) {
    static_assert(!Fixed || kItems <= kThreads);
  }

  // Calls visit(tile) for each, by whole warps.
  template <typename Visit>
  __device__ void each(Visit visit) const {
    if constexpr (Fixed != 0) {
      if (static_cast<int>(threadIdx.x) / kWarp * kWarp < kItems) visit(tile_);
    } else {
      for (int first = threadIdx.x / kWarp * kWarp; first < items_; first += kThreads)
        visit(of(first + static_cast<int>(threadIdx.x) % kWarp));
    }
  }

 private:
  static_assert(Fixed || R == 4);
  static constexpr int kDown = (Fixed + R - 1) / R, kAcross = padded_to_four(Fixed) / 4,
                       kItems = kUpper ? kAcross * (kAcross + 1) : 2 * kDown * kAcross;

  __device__ PairTile<R> of(int item) const {
    const int tile = min(item, items_ - 1) / 2;
    int row = tile / across_, column = tile % across_;
    if (kUpper) {
      const auto first_of = [&](int r) { return r * across_ - r * (r - 1) / 2; };
      row = 0;
      for (int r = 1; r < across_; ++r) row += tile >= first_of(r);
      column = tile - first_of(row);
    }
    // Every other row backwards: lanes on both sides of a row's end then read the same columns.
    if (row % 2) column = across_ - 1 - (kUpper ? row : 0) - column;
    if (kUpper) column += row;
    return {R * row, 4 * column, item % 2, item < items_};
  }

  int across_, items_;
  PairTile<R> tile_;
};

// Adds the sums of a pair of lanes; the first ones, those that the lane keeps, are then complete.
template <int R, typename Sum>
__device__ inline void add_pair(Sum (&sum)[R][4]) {
  constexpr int kept = PairTile<R>::kKept;
#pragma unroll
  for (int u = 0; u < kept; ++u) {
    const int other = u < PairTile<R>::kOwn ? u + kept : u;
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[u][c] += __shfl_xor_sync(0xffffffffu, sum[other][c], 1);
  }
}

// The rows that a lane keeps into a matrix, and where that is symmetric, mirrored at the diagonal.
template <bool kSymmetric, int R, typename T>
__device__ inline void put_tile(const PairTile<R>& tile, const Four<T> (&rows)[PairTile<R>::kKept], int side,
                                T* out) {
#pragma unroll
  for (int u = 0; u < PairTile<R>::kKept; ++u) {
    if (tile.writes(u)) vector_at<4>(out + tile.row_of(u) * side + tile.column) = rows[u];
  }
  if constexpr (kSymmetric) {
    static_assert(R == 4);
    if (!tile.active || tile.row == tile.column) return;
    T* to = out + tile.column * side + tile.row_of(0);
#pragma unroll
    for (int c = 0; c < 4; ++c) vector_at<2>(to + c * side) = Two<T>{rows[0].at[c], rows[1].at[c]};
  }
}

// What becomes of a product's sums: alpha sum + diagonal I + plus.
template <typename T>
struct After {
  T alpha, diagonal;
  const T* plus;
};

// out = alpha a b + diagonal I + plus, of m x m matrices with rows padded to fours; one barrier at the end.
// Sums are of type Sum. With tiles of the upper half the lower one is its copy. Of b, columns beyond m are
// zero, and of `out` too; rows beyond m of a and of `out` may be anything.
template <typename Sum, int R, bool kUpper, int Fixed, typename Left, typename T>
__device__ inline void multiply_shared(const Tiles<R, kUpper, Fixed>& tiles, const Left* a, const T* b,
                                       T* out, int any_m, const After<T>& after) {
  const int m = Fixed ? Fixed : any_m, side = padded_to_four(m);
  // Sums in float64 take the registers that left rows in fours would.
  const int whole = sizeof(Sum) == 4 ? m / 4 * 4 : 0;
  tiles.each([&](const PairTile<R>& tile) {
    constexpr int own_rows = PairTile<R>::kOwn, kept = PairTile<R>::kKept;
    Sum sum[R][4] = {};
    // Pointers of their own, since the distance between a lane's own rows and the others depends on the lane.
    const Left *own = a + tile.row_of(0) * side, *middle = a + (tile.row + own_rows) * side,
               *other = a + tile.row_of(kept) * side;
    const T* columns = b + tile.column;
    const auto left_row = [&](int u) {
      return u < own_rows ? own + u * side : u < kept ? middle : other + (u - kept) * side;
    };
    // The lanes take every other four of the depth; of the usual 48, every other twelve, which keeps the rows
    // that they read out of each other's banks.
    static_assert(Fixed == 0 || Fixed / 4 == 12);
    const int steps = Fixed ? whole / 8 : (whole / 4 + 1 - tile.half) / 2;
#pragma unroll(Fixed ? 6 : 1)
    for (int step = 0; step < steps; ++step) {
      const int k = Fixed ? 24 * (step / 3) + 4 * (step % 3) + 12 * tile.half : 8 * step + 4 * tile.half;
      Four<Left> left[R];
      Four<T> right[4];
#pragma unroll
      for (int u = 0; u < R; ++u) left[u] = vector_at<4>(left_row(u) + k);
#pragma unroll
      for (int u = 0; u < 4; ++u) right[u] = vector_at<4>(columns + (k + u) * side);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int r = 0; r < R; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c)
            sum[r][c] += static_cast<Sum>(left[r].at[u]) * static_cast<Sum>(right[u].at[c]);
        }
      }
    }
    own += whole + tile.half, middle += whole + tile.half, other += whole + tile.half;
    columns += (whole + tile.half) * side;
#pragma unroll 1
    for (int k = whole + tile.half; k < m; k += 2, own += 2, middle += 2, other += 2, columns += 2 * side) {
      const Four<T> right = vector_at<4>(columns);
#pragma unroll
      for (int r = 0; r < R; ++r) {
        const Sum left = static_cast<Sum>(*left_row(r));
#pragma unroll
        for (int c = 0; c < 4; ++c) sum[r][c] += left * static_cast<Sum>(right.at[c]);
      }
    }
    add_pair<R>(sum);
    Four<T> rows[kept];
#pragma unroll
    for (int u = 0; u < kept; ++u) {
      const int row = tile.row_of(u);
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        Sum value = static_cast<Sum>(after.alpha) * sum[u][c];
        if (after.diagonal != T{0} && row == tile.column + c && row < m)
          value += static_cast<Sum>(after.diagonal);
        if (after.plus) value += static_cast<Sum>(after.plus[row * side + tile.column + c]);
        rows[u].at[c] = static_cast<T>(value);
      }
    }
    put_tile<kUpper>(tile, rows, side, out);
  });
  __syncthreads();
}

// Steps of which both products are taken as symmetric. W X is so only up to rounding, and later steps would
// let what that leaves grow; the first ones are followed by enough others that take it off again.
constexpr int kSymmetricSteps = 3;

// NaN where either is.
template <typename T>
__device__ inline T larger_of(T a, T b) {
  return a > b || a != a ? a : b;
}

// (w + eps I)^-1 by the whole block. The layout's matrix is w, zero beyond m, complete at a barrier.
// kSymmetric: so is w, to the last bit.
template <typename T, bool kSymmetric, int Fixed>
__device__ inline void invert_shared(unsigned char* memory, const SolverLayout<T>& layout, int any_m,
                                     int iters, double eps, T* inverse) {
  const int m = Fixed ? Fixed : any_m, side = padded_to_four(m), size = side * side;
  T *w = layout.matrix.in(memory), *x = layout.buffers.in(memory), *y = x + size, *next = y + size;
  T *sums = layout.sums.in(memory), *factors = layout.factors.in(memory);
  using All = Tiles<kTileRows<Fixed>, false, Fixed>;
  const All all(side);
  const std::conditional_t<kSymmetric, Tiles<4, true, Fixed>, All> half(side);
  // Four lanes a row.
  for (int first = 0; first < m; first += kThreads / 4) {
    const int row = first + static_cast<int>(threadIdx.x) / 4;
    T sum = 0;
    for (int column = threadIdx.x % 4 * 4; row < m && column < side; column += 16) {
      const Four<T> four = vector_at<4>(w + row * side + column);
      sum += (four.at[0] + four.at[1]) + (four.at[2] + four.at[3]);
    }
    sum += __shfl_xor_sync(0xffffffffu, sum, 1);
    sum += __shfl_xor_sync(0xffffffffu, sum, 2);
    if (threadIdx.x % 4 == 0 && row < m)
      sums[row] = sum + static_cast<T>(eps), w[row * side + row] += static_cast<T>(eps);
  }
  __syncthreads();
  T bound = 0;
  for (int row = threadIdx.x % kWarp; row < m; row += kWarp) bound = larger_of(bound, sums[row]);
#pragma unroll
  for (int offset = kWarp / 2; offset > 0; offset /= 2)
    bound = larger_of(bound, __shfl_xor_sync(0xffffffffu, bound, offset));
  for (int step = threadIdx.x; step <= iters; step += kThreads)
    factors[step] = step_factor<T>(bound, eps, step);
  __syncthreads();
  // The start is c I, so the first step needs no product.
  const T start = factors[0] / bound, first = iters > 0 ? factors[1] * start : start;
  for (int index = threadIdx.x; index < size; index += kThreads) {
    const int row = index / side, column = index % side;
    const T one = row == column && row < m ? T{1} : T{0};
    x[index] = first * (iters > 0 ? 2 * one - start * w[index] : one);
  }
  __syncthreads();
  for (int step = 2; step <= iters; ++step) {
    const After<T> residual{T{-1}, T{2}, nullptr};
    if (kSymmetric && step <= kSymmetricSteps) {
      multiply_shared<T>(half, w, x, y, m, residual);
    } else {
      multiply_shared<T>(all, w, x, y, m, residual);
    }
    multiply_shared<T>(half, x, y, next, m, After<T>{factors[step], T{0}, nullptr});
    T* swapped = x;
    x = next;
    next = swapped;
  }
  // One plain step with the residual in float64 takes off the rounding that the iteration gathered.
  const After<T> residual{T{-1}, T{1}, nullptr};
  if constexpr (sizeof(T) == 4) {
    // The two buffers that are free lie together and hold w in float64; the residual takes its place.
    double* wide = reinterpret_cast<double*>(y < next ? y : next);
    for (int index = threadIdx.x; index < size; index += kThreads) wide[index] = w[index];
    __syncthreads();
    multiply_shared<double>(all, wide, x, w, m, residual);
    multiply_shared<T>(half, x, w, y, m, After<T>{T{1}, T{0}, x});
  } else {
    multiply_shared<T>(all, w, x, next, m, residual);
    multiply_shared<T>(half, x, next, y, m, After<T>{T{1}, T{0}, x});
  }
  for (int index = threadIdx.x; index < m * m; index += kThreads)
    inverse[index] = y[index / m * side + index % m];
}

constexpr int kBlock = 64;  // rows and columns of a block's result, 4 x 4 of them a thread

// Batched out = alpha a b + diagonal I + plus of contiguous m x m matrices.
template <typename T>
struct Product {
  const T *a, *b;
  T* out;
  int64_t m;
  T alpha = 1, diagonal = 0;
  const T* plus = nullptr;
  // Where `bound` is given, alpha is multiplied by the factor of the solver's step.
  const T* bound = nullptr;
  double eps = 0;
  int step = 0;

  __host__ __device__ int64_t blocks_a_side() const { return (m + kBlock - 1) / kBlock; }
};

constexpr int kDepth = 16;

template <typename T, typename Sum>
__global__ void __launch_bounds__(kThreads) batched_product(const Product<T> p) {
  __shared__ T left[kDepth][kBlock + 4];
  __shared__ T right[kDepth][kBlock + 4];
  const int64_t side = p.blocks_a_side(), batch = blockIdx.x / (side * side), offset = batch * p.m * p.m;
  const int64_t first_row = blockIdx.x / side % side * kBlock, first_column = blockIdx.x % side * kBlock;
  const int row_in_block = threadIdx.x / 16 * 4, column_in_block = threadIdx.x % 16 * 4;
  Sum sum[4][4] = {};
  for (int64_t first = 0; first < p.m; first += kDepth) {
    for (int index = threadIdx.x; index < kDepth * kBlock; index += kThreads) {
      // Neighbouring threads take neighbouring addresses of either operand.
      const int a_k = index % kDepth, a_r = index / kDepth, b_k = index / kBlock, b_c = index % kBlock;
      const bool a_inside = first + a_k < p.m && first_row + a_r < p.m;
      const bool b_inside = first + b_k < p.m && first_column + b_c < p.m;
      left[a_k][a_r] = a_inside ? p.a[offset + (first_row + a_r) * p.m + first + a_k] : T{0};
      right[b_k][b_c] = b_inside ? p.b[offset + (first + b_k) * p.m + first_column + b_c] : T{0};
    }
    __syncthreads();
#pragma unroll
    for (int k = 0; k < kDepth; ++k) {
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          sum[r][c] +=
              static_cast<Sum>(left[k][row_in_block + r]) * static_cast<Sum>(right[k][column_in_block + c]);
        }
      }
    }
    __syncthreads();
  }
  T alpha = p.alpha;
  if (p.bound) alpha *= step_factor<T>(p.bound[batch], p.eps, p.step);
#pragma unroll
  for (int r = 0; r < 4; ++r) {
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      const int64_t row = first_row + row_in_block + r, column = first_column + column_in_block + c;
      if (row >= p.m || column >= p.m) continue;
      const int64_t at = offset + row * p.m + column;
      Sum value =
          static_cast<Sum>(alpha) * sum[r][c] + (row == column ? static_cast<Sum>(p.diagonal) : Sum{0});
      if (p.plus) value += static_cast<Sum>(p.plus[at]);
      p.out[at] = static_cast<T>(value);
    }
  }
}

template <typename T, typename Sum = T>
void multiply(const Product<T>& product, int64_t batch, const Tensor& like) {
  launch(batched_product<T, Sum>, batch * product.blocks_a_side() * product.blocks_a_side(), kThreads, 0,
         like, product);
}

// (w + eps I)^-1 of `batch` contiguous matrices: one launch where one fits in shared memory, else by batched
// products.
template <typename T>
void invert(const T* w, int64_t batch, int64_t m, int64_t iters, double eps, T* inverse, const Tensor& like);

}  // namespace lf
