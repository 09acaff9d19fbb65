// Matrices between landmarks: the solver of one matrix in shared memory, and batched products for those that
// do not fit.
#pragma once

#include <cmath>

#include "device.cuh"

namespace lf {

__host__ __device__ constexpr int padded_to_four(int m) { return (m + 3) / 4 * 4; }

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
  const double share = eps / static_cast<double>(bound);
  double excess = 2 * share / (1 - share);
  for (int i = 0; i < step; ++i) excess *= 4 + 2 * excess;
  return static_cast<T>(share >= 0 && share <= 1 ? 1 + 1 / (1 + excess) : NAN);
}

// The default grid of 7 x 7 landmarks has code of its own, with loops and addresses known to the compiler.
constexpr int kUsualLandmarks = 49;

// 4 x 4 results of a product, for a pair of neighbouring lanes that take every other four of its depth.
struct PairTile {
  int row, column, half;

  // Tiles row by row, or those on and above the diagonal, column by column.
  template <bool kUpper>
  __device__ static PairTile of(int item, int tiles_a_side) {
    const int tile = item / 2;
    int tile_row = tile / tiles_a_side, tile_column = tile % tiles_a_side;
    if (kUpper) {
      tile_column = static_cast<int>((sqrtf(8.0f * static_cast<float>(tile) + 1.0f) - 1.0f) * 0.5f);
      tile_column += (tile_column + 1) * (tile_column + 2) / 2 <= tile;
      tile_column -= tile_column * (tile_column + 1) / 2 > tile;
      tile_row = tile - tile_column * (tile_column + 1) / 2;
    }
    return {4 * tile_row, 4 * tile_column, item % 2};
  }
  // The row of the pair's sum u: each lane's own two, which it will write, come first.
  __device__ int row_of(int u) const { return row + (u ^ (2 * half)); }
};

// Calls visit(tile, active) for every tile, by whole warps: the inactive lanes only take part in shuffles.
template <bool kUpper, typename Visit>
__device__ inline void for_each_tile(int side, Visit visit) {
  const int tiles = side / 4, items = kUpper ? tiles * (tiles + 1) : 2 * tiles * tiles;
  for (int first = threadIdx.x / kWarp * kWarp; first < items; first += kThreads) {
    const int item = first + static_cast<int>(threadIdx.x) % kWarp;
    visit(PairTile::of<kUpper>(min(item, items - 1), tiles), item < items);
  }
}

// Adds the sums of a pair of lanes; the first two rows, the lane's own, are then complete.
template <typename Sum>
__device__ inline void add_pair(Sum (&sum)[4][4]) {
#pragma unroll
  for (int u = 0; u < 2; ++u) {
#pragma unroll
    for (int c = 0; c < 4; ++c) sum[u][c] += __shfl_xor_sync(0xffffffffu, sum[u + 2][c], 1);
  }
}

// A lane's own rows into a matrix, and where that is symmetric, mirrored at the diagonal.
template <bool kSymmetric, typename T>
__device__ inline void put_tile(const PairTile& tile, const Four<T> (&rows)[2], int side, T* out) {
  T* to = out + tile.row_of(0) * side + tile.column;
#pragma unroll
  for (int u = 0; u < 2; ++u) *reinterpret_cast<Four<T>*>(to + u * side) = rows[u];
  if (!kSymmetric || tile.row == tile.column) return;
  to = out + tile.column * side + tile.row_of(0);
#pragma unroll
  for (int c = 0; c < 4; ++c) *reinterpret_cast<Two<T>*>(to + c * side) = {rows[0].at[c], rows[1].at[c]};
}

// What becomes of a product's sums: alpha sum + diagonal I + plus.
template <typename T>
struct After {
  T alpha, diagonal;
  const T* plus;
};

// out = alpha a b + diagonal I + plus, of m x m matrices with rows padded to fours; one barrier at the end.
// Sums are of type Sum. kSymmetric: the lower half is a copy of the upper one. Fixed: m, or 0 for any.
template <typename Sum, bool kSymmetric, int Fixed, typename T, typename Right>
__device__ inline void multiply_shared(const T* a, const Right* b, T* out, int any_m, const After<T>& after) {
  const int m = Fixed ? Fixed : any_m, side = padded_to_four(m), whole = m / 4 * 4;
  for_each_tile<kSymmetric>(side, [&](const PairTile& tile, bool active) {
    Sum sum[4][4] = {};
    // Two pointers, since the distance between a lane's own rows and the others depends on the lane.
    const T *own = a + tile.row_of(0) * side, *other = a + tile.row_of(2) * side;
    const Right* columns = b + tile.column;
    const auto left_row = [&](int u) { return u < 2 ? own + u * side : other + (u - 2) * side; };
    const int steps = Fixed / 4 % 2 == 0 && Fixed ? Fixed / 8 : (whole / 4 + 1 - tile.half) / 2;
    constexpr int kUnrolled = Fixed && sizeof(Sum) == 4 ? 3 : 1;
#pragma unroll(kUnrolled)
    for (int step = 0; step < steps; ++step) {
      const int k = 8 * step + 4 * tile.half;
      Four<T> left[4];
      Four<Right> right[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) left[u] = *reinterpret_cast<const Four<T>*>(left_row(u) + k);
#pragma unroll
      for (int u = 0; u < 4; ++u) right[u] = *reinterpret_cast<const Four<Right>*>(columns + (k + u) * side);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int r = 0; r < 4; ++r) {
#pragma unroll
          for (int c = 0; c < 4; ++c)
            sum[r][c] += static_cast<Sum>(left[r].at[u]) * static_cast<Sum>(right[u].at[c]);
        }
      }
    }
#pragma unroll 1
    for (int k = whole + tile.half; k < m; k += 2) {
      const Four<Right> right = *reinterpret_cast<const Four<Right>*>(columns + k * side);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c)
          sum[r][c] += static_cast<Sum>(left_row(r)[k]) * static_cast<Sum>(right.at[c]);
      }
    }
    add_pair(sum);
    if (!active) return;
    Four<T> rows[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
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
    put_tile<kSymmetric>(tile, rows, side, out);
  });
  __syncthreads();
}

// Steps of which both products are taken as symmetric. W X is so only up to rounding, and later steps would
// let what that leaves grow; the first ones are followed by enough others that take it off again.
constexpr int kSymmetricSteps = 3;

// (w + eps I)^-1 by the whole block. The layout's matrix is w, zero beyond m, complete at a barrier.
// kSymmetric: so is w, to the last bit.
template <typename T, bool kSymmetric, int Fixed>
__device__ inline void invert_shared(unsigned char* memory, const SolverLayout<T>& layout, int any_m,
                                     int iters, double eps, T* inverse) {
  const int m = Fixed ? Fixed : any_m, side = padded_to_four(m), size = side * side;
  T *w = layout.matrix.in(memory), *x = layout.buffers.in(memory), *y = x + size, *next = y + size;
  T *sums = layout.sums.in(memory), *factors = layout.factors.in(memory);
  const int lane = threadIdx.x % kWarp;
  for (int row = threadIdx.x / kWarp; row < m; row += kWarps) {
    T sum = 0;
    for (int column = lane; column < m; column += kWarp) sum += w[row * side + column];
    sum = warp_sum(sum) + static_cast<T>(eps);
    if (lane == 0) sums[row] = sum, w[row * side + row] += static_cast<T>(eps);
  }
  __syncthreads();
  T bound = sums[0];
  for (int i = 1; i < m; ++i) bound = sums[i] > bound || sums[i] != sums[i] ? sums[i] : bound;
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
      multiply_shared<T, kSymmetric, Fixed>(w, x, y, m, residual);
    } else {
      multiply_shared<T, false, Fixed>(w, x, y, m, residual);
    }
    multiply_shared<T, kSymmetric, Fixed>(x, y, next, m, After<T>{factors[step], T{0}, nullptr});
    T* swapped = x;
    x = next;
    next = swapped;
  }
  // One plain step with the residual in float64 takes off the rounding that the iteration gathered.
  const After<T> residual{T{-1}, T{1}, nullptr};
  if constexpr (sizeof(T) == 4) {
    // The two buffers that are free lie together and hold x in float64; x itself then moves to where w was.
    double* wide = reinterpret_cast<double*>(y < next ? y : next);
    for (int index = threadIdx.x; index < size; index += kThreads) wide[index] = x[index];
    __syncthreads();
    multiply_shared<double, false, Fixed>(w, wide, x, m, residual);
    for (int index = threadIdx.x; index < size; index += kThreads) w[index] = static_cast<T>(wide[index]);
    __syncthreads();
    multiply_shared<T, kSymmetric, Fixed>(w, x, y, m, After<T>{T{1}, T{0}, w});
  } else {
    multiply_shared<T, false, Fixed>(w, x, next, m, residual);
    multiply_shared<T, kSymmetric, Fixed>(x, next, y, m, After<T>{T{1}, T{0}, x});
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
