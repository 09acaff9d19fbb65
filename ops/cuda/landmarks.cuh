// What the attention's passes need between landmarks alone: products with the inverse, and the gradient
// through it.
#pragma once

#include "tile.cuh"

namespace lf {

// Numbers of an inverse that a block keeps in shared memory: all of them, or none where they are many.
LF_HOST_DEVICE constexpr int kept_inverse(int m) { return m <= 64 ? m * m : 0; }

// The inverse on its way into shared memory: that of the usual landmarks waits in registers, and what else
// the block has to read comes meanwhile.
template <int threads, typename T>
class KeptInverse {
 public:
  __device__ KeptInverse(const T* inverse, int m) : inverse_(inverse), size_(kept_inverse(m)) {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (index(i) < size_) own_[i] = inverse_[index(i)];
    }
  }

  // Ends with a barrier, also for what else the block has put.
  __device__ void put(T* kept) const {
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      if (index(i) < size_) kept[index(i)] = own_[i];
    }
    for (int i = kOwn; index(i) < size_; ++i) kept[index(i)] = inverse_[index(i)];
    __syncthreads();
  }

 private:
  static constexpr int kOwn = (kUsualLandmarks * kUsualLandmarks + threads - 1) / threads;
  __device__ static int index(int i) { return static_cast<int>(threadIdx.x) + i * threads; }

  const T* inverse_;
  int size_;
  T own_[kOwn];
};

// out = A x or A^T x, for `width` columns x in shared memory, four apart; the whole block.
template <typename T>
__device__ inline void times_inverse(const T* inverse, bool transposed, int m, const T* x, int width, T* out,
                                     int out_stride) {
  const int row_stride = transposed ? 1 : m, column_stride = transposed ? m : 1;
  for (int index = threadIdx.x; index < m * width; index += blockDim.x) {
    const int row = index / width, c = index % width;
    T sum = 0;
#pragma unroll 4
    for (int j = 0; j < m; ++j) sum += inverse[row * row_stride + j * column_stride] * x[4 * j + c];
    out[row * out_stride + c] = sum;
  }
}

// A matrix (m, channels) and a column (m) a head, both `stride` apart from head to head, times the inverse or
// its transpose: four channels a block, and one more block for the column.
template <typename T>
struct InverseProduct {
  const T* inverse;
  bool transposed;
  int m, channels;
  const T *matrix, *column;
  int64_t matrix_stride, column_stride;
  T *matrix_out, *column_out;  // contiguous

  __host__ __device__ int blocks_a_head() const { return (channels + 3) / 4 + 1; }
};

template <typename T>
struct InverseProductLayout {
  Layout layout;
  Piece<T> x, inverse;  // (m, 4), and what is kept of A

  LF_HOST_DEVICE constexpr explicit InverseProductLayout(int m)
      : x(layout.add<T>(4 * m)), inverse(layout.add<T>(kept_inverse(m))) {}
};

template <typename T>
__global__ void __launch_bounds__(kThreads) multiply_by_inverse(const InverseProduct<T> a) {
  LF_SHARED_MEMORY(memory);
  const InverseProductLayout<T> at(a.m);
  T *x = at.x.in(memory), *kept = at.inverse.in(memory);
  const int64_t head = blockIdx.x / a.blocks_a_head();
  const int quad = blockIdx.x % a.blocks_a_head(), channel = 4 * quad;
  const bool for_column = channel >= a.channels;
  const int width = for_column ? 1 : min(4, a.channels - channel), stride = for_column ? 1 : a.channels;
  const T* from =
      for_column ? a.column + head * a.column_stride : a.matrix + head * a.matrix_stride + channel;
  const T* inverse = a.inverse + head * a.m * a.m;
  const KeptInverse<kThreads, T> all(inverse, a.m);
  for (int index = threadIdx.x; index < a.m * width; index += kThreads)
    x[index / width * 4 + index % width] = from[index / width * stride + index % width];
  all.put(kept);
  T* out = for_column ? a.column_out + head * a.m : a.matrix_out + head * a.m * a.channels + channel;
  if (kept_inverse(a.m)) {
    times_inverse<T>(kept, a.transposed, a.m, x, width, out, stride);
  } else {
    times_inverse<T>(inverse, a.transposed, a.m, x, width, out, stride);
  }
}

template <typename T>
void launch_product(const InverseProduct<T>& product, int64_t heads, const Tensor& like) {
  const int64_t bytes = InverseProductLayout<T>(product.m).layout.bytes;
  launch(multiply_by_inverse<T>, heads * product.blocks_a_head(), kThreads, bytes, like, product);
}

// w with the sign of `difference`, 0 where that is 0; a NaN difference keeps w, which is NaN then.
__device__ inline float signed_by(float difference, float w) {
  const float turned =
      __int_as_float((__float_as_int(difference) & static_cast<int>(0x80000000u)) ^ __float_as_int(w));
  return difference == 0.0f ? 0.0f : turned;
}
__device__ inline double signed_by(double difference, double w) {
  return difference == 0.0 ? 0.0 : difference < 0.0 ? -w : w;
}

// The landmarks' gradient through the inverse A of their kernel matrix W: with U = A P and dP = A^T dU, and t
// and dp in the same way, dW = -A^T (dU P^T + dt p^T) A^T is -(dP U^T + dp t^T), without a product of
// matrices. A warp takes one landmark, a lane one of 32 others at a time.
template <typename T>
struct LandmarkGradient {
  View landmarks;
  T scale;
  const T *dsums, *dmass;                // dP and dp
  const T *pooled_values, *pooled_mass;  // U and t
  T* out;                                // (heads, m, channels)

  __host__ __device__ static int64_t blocks_a_head(int64_t m) { return (m + kWarps - 1) / kWarps; }
};

// Landmarks, dP and U of the block's own and of the other landmarks.
template <typename T, int DK>
struct LandmarkGradientLayout {
  // In fours; odd, so that lanes with a row each do not meet in a bank.
  static constexpr int kStride = kQuads<DK> + 1, kOwnSize = kWarps * kStride, kOtherSize = kWarp * kStride;
  Layout layout;
  Piece<Four<T>> own, others;

  LF_HOST_DEVICE constexpr LandmarkGradientLayout()
      : own(layout.add<Four<T>>(3 * kOwnSize)), others(layout.add<Four<T>>(3 * kOtherSize)) {}
};

template <typename T, int DK>
__device__ inline void landmark_gradient(const LandmarkGradient<T>& a, int64_t block, unsigned char* memory) {
  const LandmarkGradientLayout<T, DK> at;
  constexpr int stride = at.kStride, own_size = at.kOwnSize, other_size = at.kOtherSize;
  Four<T>*own = at.own.in(memory), *others = at.others.in(memory);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = static_cast<int>(a.landmarks.size[3]);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = block / a.blocks_a_head(m), offset = head * m * channels;
  const int first = static_cast<int>(block % a.blocks_a_head(m)) * kWarps, mine = first + warp;
  const auto load_rows = [&](int begin, int count, int size, Four<T>* to) {
#pragma unroll 1
    for (int index = threadIdx.x; index < count * kQuads<DK>; index += kThreads) {
      const int quad = index % kQuads<DK>, row = index / kQuads<DK>;
      const bool real = begin + row < m && 4 * quad < channels;
      Four<T>* place = to + row * stride + quad;
      place[0] = real ? Rows::of(a.landmarks, head).template four<T>(begin + row, 4 * quad) : Four<T>{};
      place[size] =
          real ? Rows::of<T>(a.dsums + offset, channels).template four<T>(begin + row, 4 * quad) : Four<T>{};
      place[2 * size] =
          real ? Rows::of<T>(a.pooled_values + offset, channels).template four<T>(begin + row, 4 * quad)
               : Four<T>{};
    }
  };
  load_rows(first, kWarps, own_size, own);
  T sum[DK] = {};
  for (int begin = 0; begin < m; begin += kWarp) {
    __syncthreads();
    load_rows(begin, kWarp, other_size, others);
    __syncthreads();
    const int other = begin + lane;
    T distance = 0, product = 0;
#pragma unroll 1
    for (int quad = 0; quad < kQuads<DK>; ++quad) {
      const Four<T>*here = own + warp * stride + quad, *there = others + lane * stride + quad;
      const Four<T> point = here[0], dsum = here[own_size], pooled = here[2 * own_size];
      const Four<T> other_point = there[0], other_dsum = there[other_size],
                    other_pooled = there[2 * other_size];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        distance += absolute(point.at[u] - other_point.at[u]);
        product += dsum.at[u] * other_pooled.at[u] + other_dsum.at[u] * pooled.at[u];
      }
    }
    T weight = 0;
    if (mine < m && other < m) {
      const int64_t i = head * m + mine, j = head * m + other;
      product += a.dmass[i] * a.pooled_mass[j] + a.dmass[j] * a.pooled_mass[i];
      weight = product * exponential(distance * (-1 / a.scale)) / a.scale;
    }
    const T *here = reinterpret_cast<const T*>(own + warp * stride) + lane,
            *there = reinterpret_cast<const T*>(others) + lane;
#pragma unroll 4
    for (int j = 0; j < kWarp; ++j) {
      const T from_j = __shfl_sync(0xffffffffu, weight, j);
#pragma unroll
      for (int k = 0; k < DK; ++k)
        sum[k] += signed_by(here[k * kWarp] - there[j * 4 * stride + k * kWarp], from_j);
    }
  }
#pragma unroll
  for (int k = 0; k < DK; ++k) {
    const int channel = lane + k * kWarp;
    if (mine < m && channel < channels)
      a.out[offset + static_cast<int64_t>(mine) * channels + channel] = sum[k];
  }
}

}  // namespace lf
