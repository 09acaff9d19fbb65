// Matrices between landmarks: the solver of one matrix in shared memory, and batched products for those that
// do not fit.
#pragma once

#include <cmath>

#include "device.cuh"

namespace lf {

constexpr int kBlock = 64;  // rows and columns of a block's result, 4 x 4 of them a thread

__host__ __device__ inline int padded_to_four(int m) { return (m + 3) / 4 * 4; }

// Four buffers of padded rows and columns; two of them hold landmarks while the first matrix is made.
template <typename T>
__host__ __device__ inline int64_t solver_bytes(int64_t m, int iters) {
  const int64_t side = padded_to_four(static_cast<int>(m));
  return (4 * side * side + side + iters + 1) * static_cast<int64_t>(sizeof(T));
}

// The factor of a step, see lf_dense.reference: 1 + 1 / cosh(2^step a) with a = 2 artanh(sqrt(eps / bound)).
template <typename T>
__device__ inline T step_factor(T bound, double eps, int step) {
  const double angle = 2 * atanh(sqrt(eps / static_cast<double>(bound)));
  return static_cast<T>(1 + 1 / cosh(ldexp(angle, step)));
}

// out = alpha a b + diagonal I on `m` rows, all `side` apart, zero beyond m; one barrier at the end. Products
// are summed in Sum.
template <typename T, typename Sum>
__device__ inline void multiply_shared(const T* a, const T* b, T* out, int m, T alpha, T diagonal,
                                       const T* plus) {
  const int side = padded_to_four(m), row_in_block = threadIdx.x / 16 * 4,
            column_in_block = threadIdx.x % 16 * 4;
  for (int block_row = 0; block_row < side; block_row += kBlock) {
    for (int block_column = 0; block_column < side; block_column += kBlock) {
      const int row = block_row + row_in_block, column = block_column + column_in_block;
      if (row >= side || column >= side) continue;
      Sum sum[4][4] = {};
      for (int k = 0; k < side; k += 4) {
        Four<T> left[4], right[4];
#pragma unroll
        for (int u = 0; u < 4; ++u) left[u] = *reinterpret_cast<const Four<T>*>(a + (row + u) * side + k);
#pragma unroll
        for (int u = 0; u < 4; ++u) right[u] = *reinterpret_cast<const Four<T>*>(b + (k + u) * side + column);
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
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          const bool on_diagonal = row + r == column + c && row + r < m;
          const int64_t at = static_cast<int64_t>(row + r) * side + column + c;
          const Sum value =
              static_cast<Sum>(alpha) * sum[r][c] + (on_diagonal ? static_cast<Sum>(diagonal) : Sum{0});
          out[at] = static_cast<T>(plus ? static_cast<Sum>(plus[at]) + value : value);
        }
      }
    }
  }
  __syncthreads();
}

// (w + eps I)^-1 by the whole block. `memory` holds solver_bytes; its first side x side is w, zero beyond m,
// complete at a barrier.
template <typename T>
__device__ inline void invert_shared(T* memory, int m, int iters, double eps, T* inverse) {
  const int side = padded_to_four(m), size = side * side;
  T *w = memory, *x = w + size, *y = x + size, *next = y + size, *sums = next + size, *factors = sums + side;
  for (int i = threadIdx.x; i < m; i += kThreads) {
    w[i * side + i] += static_cast<T>(eps);
    T sum = 0;
    for (int j = 0; j < m; ++j) sum += w[i * side + j];
    sums[i] = sum;
  }
  __syncthreads();
  T bound = sums[0];
  for (int i = 1; i < m; ++i) bound = sums[i] > bound || sums[i] != sums[i] ? sums[i] : bound;
  for (int step = threadIdx.x; step <= iters; step += kThreads)
    factors[step] = step_factor<T>(bound, eps, step);
  __syncthreads();
  for (int index = threadIdx.x; index < size; index += kThreads) {
    const int row = index / side, column = index % side;
    x[index] = row == column && row < m ? factors[0] / bound : T{0};
  }
  __syncthreads();
  for (int step = 1; step <= iters; ++step) {
    multiply_shared<T, T>(w, x, y, m, T{-1}, T{2}, nullptr);
    multiply_shared<T, T>(x, y, next, m, factors[step], T{0}, nullptr);
    T* swapped = x;
    x = next;
    next = swapped;
  }
  // One plain step with the residual in float64 takes off the rounding that the iteration gathered.
  multiply_shared<T, double>(w, x, y, m, T{-1}, T{1}, nullptr);
  multiply_shared<T, T>(x, y, next, m, T{1}, T{0}, x);
  for (int index = threadIdx.x; index < m * m; index += kThreads)
    inverse[index] = next[index / m * side + index % m];
}

// Batched out = alpha a b + diagonal I + plus + u v^T, rows x columns, depth; strides in elements. Where
// `bound` is given, alpha is multiplied by the factor of the solver's step.
template <typename T>
struct Product {
  const T *a, *b;
  T* out;
  int64_t rows, columns, depth;
  int64_t a_batch, a_row, a_depth, b_batch, b_depth, b_column, out_batch, out_row;
  T alpha = 1, diagonal = 0;
  const T* plus = nullptr;  // laid out as out
  const T *u = nullptr, *v = nullptr;
  int64_t u_batch = 0, u_stride = 0, v_batch = 0, v_stride = 0;
  const T* bound = nullptr;
  double eps = 0;
  int step = 0;

  __host__ __device__ int64_t row_blocks() const { return (rows + kBlock - 1) / kBlock; }
  __host__ __device__ int64_t column_blocks() const { return (columns + kBlock - 1) / kBlock; }
};

constexpr int kDepth = 16;

template <typename T, typename Sum>
__global__ void __launch_bounds__(kThreads) batched_product(const Product<T> p) {
  __shared__ T left[kDepth][kBlock + 4];
  __shared__ T right[kDepth][kBlock + 4];
  const int64_t blocks = p.row_blocks() * p.column_blocks(), batch = blockIdx.x / blocks,
                block = blockIdx.x % blocks;
  const int64_t first_row = block / p.column_blocks() * kBlock,
                first_column = block % p.column_blocks() * kBlock;
  const int row_in_block = threadIdx.x / 16 * 4, column_in_block = threadIdx.x % 16 * 4;
  Sum sum[4][4] = {};
  for (int64_t first = 0; first < p.depth; first += kDepth) {
    for (int index = threadIdx.x; index < kDepth * kBlock; index += kThreads) {
      // Neighbouring threads take neighbouring addresses of either operand.
      const bool a_by_depth = p.a_depth == 1, b_by_depth = p.b_depth == 1;
      const int a_k = a_by_depth ? index % kDepth : index / kBlock,
                a_r = a_by_depth ? index / kDepth : index % kBlock;
      const int b_k = b_by_depth ? index % kDepth : index / kBlock,
                b_c = b_by_depth ? index / kDepth : index % kBlock;
      const bool a_inside = first + a_k < p.depth && first_row + a_r < p.rows;
      const bool b_inside = first + b_k < p.depth && first_column + b_c < p.columns;
      left[a_k][a_r] =
          a_inside ? p.a[batch * p.a_batch + (first_row + a_r) * p.a_row + (first + a_k) * p.a_depth] : T{0};
      right[b_k][b_c] =
          b_inside ? p.b[batch * p.b_batch + (first + b_k) * p.b_depth + (first_column + b_c) * p.b_column]
                   : T{0};
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
      if (row >= p.rows || column >= p.columns) continue;
      const int64_t at = batch * p.out_batch + row * p.out_row + column;
      Sum value =
          static_cast<Sum>(alpha) * sum[r][c] + (row == column ? static_cast<Sum>(p.diagonal) : Sum{0});
      if (p.plus) value += static_cast<Sum>(p.plus[at]);
      if (p.u)
        value += static_cast<Sum>(p.u[batch * p.u_batch + row * p.u_stride]) *
                 static_cast<Sum>(p.v[batch * p.v_batch + column * p.v_stride]);
      p.out[at] = static_cast<T>(value);
    }
  }
}

template <typename T, typename Sum = T>
void multiply(const Product<T>& product, int64_t batch, const Tensor& like) {
  launch(batched_product<T, Sum>, batch * product.row_blocks() * product.column_blocks(), kThreads, 0, like,
         product);
}

// A product of square matrices, contiguous.
template <typename T>
Product<T> square_product(const T* a, const T* b, T* out, int64_t m) {
  Product<T> p{a, b, out, m, m, m, m * m, m, 1, m * m, m, 1, m * m, m};
  return p;
}

// (w + eps I)^-1 of `batch` contiguous matrices: one launch where one fits in shared memory, else by batched
// products.
template <typename T>
void invert(const T* w, int64_t batch, int64_t m, int64_t iters, double eps, T* inverse, const Tensor& like);

}  // namespace lf
