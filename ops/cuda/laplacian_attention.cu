// Normalization "mass": one launch streams keys and values while its first blocks run the solver, one adds
// the chunks' sums up, one streams queries; backward the two streams again, with the landmarks' small
// matrices between them. Kernel columns are recomputed, never stored. docs/operators.md has the floor and the
// reasons.
#include "landmarks.cuh"
#include "laplacian_kernel.cuh"
#include "matrix.cuh"

namespace lf {
namespace {

// Forward, keys and values. A chunk's partial sums: sum_i C_ij (v_i - shift) of (m, channels), sum_i C_ij of
// (m), its shift and the sum of v_i - shift, both of (channels). The shift is the mean of the chunk's first
// tile: near the mean, so that nothing cancels.
template <typename T>
struct KeyArguments {
  View k, v, landmarks;
  T scale;
  int groups_per_round, rounds;
  Cut cut;
  T* partials;
  int64_t partial_size;
  int64_t solver_blocks;  // heads, or 0 where the solver has launches of its own
  int iters;
  double eps;
  T* inverse;
};

// Landmarks in fours of channels; an odd number of fours a row keeps shared memory free of bank conflicts.
struct Points {
  int stride, count;  // in fours

  LF_HOST_DEVICE constexpr Points(int m, int channels)
      : stride((channels + 3) / 4 | 1), count((m + 3) / 4 * 4 * stride) {}
};

// (kappa(L, L) + eps I)^-1 of one head.
template <typename T, int Fixed>
__device__ inline void solve_head(const KeyArguments<T>& a, int64_t head, unsigned char* memory) {
  const Rows landmarks = Rows::of(a.landmarks, head);
  const int m = Fixed ? Fixed : static_cast<int>(a.landmarks.size[2]), side = padded_to_four(m),
            quads = (landmarks.channels + 3) / 4;
  const Points points(m, landmarks.channels);
  const SolverLayout<T> layout(m, a.iters, 4 * points.count);
  Four<T>* from = reinterpret_cast<Four<T>*>(layout.buffers.in(memory));
  for (int index = threadIdx.x; index < side * quads; index += kThreads) {
    const int row = index / quads, quad = index % quads;
    Four<T> value = {};
    if (row < m) value = landmarks.four<T>(row, 4 * quad);
    from[row * points.stride + quad] = value;
  }
  __syncthreads();
  T* matrix = layout.matrix.in(memory);
  for_each_tile<true>(side, [&](const PairTile& tile, bool active) {
    T sum[4][4] = {};
#pragma unroll 1
    for (int quad = tile.half; quad < quads; quad += 2) {
      Four<T> left[4], right[4];
#pragma unroll
      for (int u = 0; u < 4; ++u) {
        left[u] = from[tile.row_of(u) * points.stride + quad];
        right[u] = from[(tile.column + u) * points.stride + quad];
      }
#pragma unroll
      for (int r = 0; r < 4; ++r) {
#pragma unroll
        for (int c = 0; c < 4; ++c) {
#pragma unroll
          for (int u = 0; u < 4; ++u) sum[r][c] += absolute(left[r].at[u] - right[c].at[u]);
        }
      }
    }
    add_pair(sum);
    if (!active) return;
    Four<T> rows[2];
#pragma unroll
    for (int u = 0; u < 2; ++u) {
#pragma unroll
      for (int c = 0; c < 4; ++c) {
        const bool real = tile.row_of(u) < m && tile.column + c < m;
        rows[u].at[c] = real ? exponential(sum[u][c] * (-1 / a.scale)) : T{0};
      }
    }
    put_tile<true>(tile, rows, side, matrix);
  });
  __syncthreads();
  invert_shared<T, true, Fixed>(memory, layout, m, a.iters, a.eps, a.inverse + head * m * m);
}

template <typename T, int DK>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>) stream_keys(const KeyArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  // A solver is every other block until all heads have theirs: of few heads they start at once, and many do
  // not keep the stream waiting.
  const int64_t solvers_before = min(a.solver_blocks, (static_cast<int64_t>(blockIdx.x) + 1) / 2);
  if (blockIdx.x % 2 == 0 && blockIdx.x / 2 < a.solver_blocks) {
    const bool usual = a.landmarks.size[2] == kUsualLandmarks;
    usual ? solve_head<T, kUsualLandmarks>(a, blockIdx.x / 2, memory)
          : solve_head<T, 0>(a, blockIdx.x / 2, memory);
    return;
  }
  Four<T>* keys = reinterpret_cast<Four<T>*>(memory);
  Four<T>* values = keys + kQuads<DK> * kTokenStride<T>;
  Four<T>* landmarks = values + kQuads<DK> * kTokenStride<T>;
  T* columns = reinterpret_cast<T*>(landmarks + a.groups_per_round * kGroup * kQuads<DK>);
  T* parts = columns + a.groups_per_round * kGroup * kColumnStride<T>;
  T* shift = parts + kWarps * DK * kWarp;
  const Chunk chunk = a.cut.of_block(blockIdx.x - solvers_before);
  const int64_t head = chunk.head;
  const Rows k = Rows::of(a.k, head), v = Rows::of(a.v, head), l = Rows::of(a.landmarks, head);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = k.channels,
            per_round = a.groups_per_round * kGroup;
  T* sums = a.partials + chunk.index * a.partial_size;
  T* mass = sums + static_cast<int64_t>(m) * channels;
  T deviation = 0;
  for (int tile = 0;; ++tile) {
    const auto [first, count] = chunk.tile<kTokens<T>>(tile);
    if (count <= 0) break;
    __syncthreads();
    load_tokens<T, DK>(k, first, count, keys);
    load_tokens<T, DK>(v, first, count, values);
    __syncthreads();
    const T total = channel_sum<T, DK>(values, parts);
    if (threadIdx.x < DK * kWarp) {
      if (tile == 0) shift[threadIdx.x] = total / count;
      deviation += total - count * shift[threadIdx.x];
    }
    __syncthreads();
    for (int index = threadIdx.x; index < count * DK * kWarp; index += kThreads) {
      token_channel(values, index / (DK * kWarp), index % (DK * kWarp)) -= shift[index % (DK * kWarp)];
    }
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (tile == 0 || a.rounds > 1) {
        __syncthreads();
        load_landmarks<T, DK>(l, round * per_round, per_round, m, landmarks);
      }
      __syncthreads();
      if (group.count == 0) continue;
      Columns<T> kernel;
      kernel_columns<T, DK>(keys, landmarks + group.row * kQuads<DK>, channels, count, group.count, a.scale,
                            kernel);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        T sum = 0;
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) sum += kernel[j][i];
        if (j < group.count) add_scalar<T>(sum, tile == 0, mass + group.first + j);
      }
      T* own = columns + group.row * kColumnStride<T>;
      put_columns<T>(kernel, own);
      __syncwarp();
      T sum[kGroup][DK];
      sum_over_tokens<T, DK>(own, values, sum);
      add_rows<T, DK>(sum, group, channels, tile == 0, sums);
      __syncwarp();
    }
  }
  if (threadIdx.x < channels) {
    mass[m + threadIdx.x] = shift[threadIdx.x];
    mass[m + channels + threadIdx.x] = deviation;
  }
}

constexpr int kFinishThreads = 512;
constexpr int kFinishSlices = kFinishThreads / 64;

// The chunks' sums added up, four channels of one head a block and one more block a head for the mass: the
// mean of V, P, p, U = A P, t = A p.
template <typename T>
struct FinishArguments {
  const T *partials, *inverse;
  int64_t partial_size;
  Cut cut;
  int m, channels;
  T *sums, *mass, *mean_value;     // saved for the backward pass
  T *pooled_values, *pooled_mass;  // U and t
};

template <typename T>
__global__ void __launch_bounds__(kFinishThreads) finish_keys(const FinishArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  double* wide = reinterpret_cast<double*>(memory);             // (kFinishThreads, 4)
  T* slices = reinterpret_cast<T*>(wide + 4 * kFinishThreads);  // (kFinishThreads, 4)
  T* result = slices + 4 * kFinishThreads;                      // (m, 4)
  const int quads = (a.channels + 3) / 4, quad = blockIdx.x % (quads + 1), channel = 4 * quad;
  const int64_t head = blockIdx.x / (quads + 1), n = a.cut.tokens;
  const bool for_mass = quad == quads;
  const int width = for_mass ? 1 : min(4, a.channels - channel);
  const T* partials = a.partials + head * a.cut.chunks * a.partial_size;
  const int64_t mass_at = static_cast<int64_t>(a.m) * a.channels, shift_at = mass_at + a.m,
                deviation_at = shift_at + a.channels;
  T mean[4] = {};
  if (!for_mass) {
    for (int c = 0; c < 4; ++c) wide[4 * threadIdx.x + c] = 0;
    for (int64_t chunk = threadIdx.x; chunk < a.cut.chunks; chunk += kFinishThreads) {
      const double tokens = static_cast<double>(a.cut.chunk_tokens(chunk));
      const T* from = partials + chunk * a.partial_size + channel;
      for (int c = 0; c < width; ++c)
        wide[4 * threadIdx.x + c] += tokens * from[shift_at + c] + from[deviation_at + c];
    }
    __syncthreads();
    for (int step = kFinishThreads / 2; step > 0; step /= 2) {
      if (static_cast<int>(threadIdx.x) < step) {
        for (int c = 0; c < 4; ++c) wide[4 * threadIdx.x + c] += wide[4 * (threadIdx.x + step) + c];
      }
      __syncthreads();
    }
    for (int c = 0; c < width; ++c) mean[c] = static_cast<T>(wide[c] / n);
    if (static_cast<int>(threadIdx.x) < width)
      a.mean_value[head * a.channels + channel + threadIdx.x] = mean[threadIdx.x];
  }
  const int slice = threadIdx.x / 64;
  for (int first = 0; first < a.m; first += 64) {
    const int j = first + threadIdx.x % 64;
    T sum[4] = {};
    for (int64_t chunk = slice; j < a.m && chunk < a.cut.chunks; chunk += kFinishSlices) {
      const T* from = partials + chunk * a.partial_size;
      const T chunk_mass = from[mass_at + j];
      if (for_mass) {
        sum[0] += chunk_mass;
      } else {
        for (int c = 0; c < width; ++c) {
          sum[c] += from[static_cast<int64_t>(j) * a.channels + channel + c] +
                    chunk_mass * (from[shift_at + channel + c] - mean[c]);
        }
      }
    }
    __syncthreads();
    for (int c = 0; c < 4; ++c) slices[4 * threadIdx.x + c] = sum[c];
    __syncthreads();
    if (slice == 0 && j < a.m) {
      for (int c = 0; c < width; ++c) {
        for (int s = 1; s < kFinishSlices; ++s) sum[c] += slices[4 * (64 * s + threadIdx.x) + c];
        const T value = sum[c] / static_cast<T>(n);
        result[4 * j + c] = value;
        if (for_mass) {
          a.mass[head * a.m + j] = value;
        } else {
          a.sums[(head * a.m + j) * a.channels + channel + c] = value;
        }
      }
    }
  }
  __syncthreads();
  T* out = for_mass ? a.pooled_mass + head * a.m : a.pooled_values + head * a.m * a.channels + channel;
  times_inverse<T>(a.inverse + head * a.m * a.m, false, a.m, result, width, out, for_mass ? 1 : a.channels);
}

// Forward, queries: one tile a block.
template <typename T>
struct QueryArguments {
  View q, landmarks, out;
  T scale, tau;
  int groups_per_round, rounds;
  int64_t tiles;
  const T *pooled_values, *pooled_mass, *mean_value;
};

// One over the mass under a query; NaN stays NaN.
template <typename T>
__device__ inline T reciprocal_mass(T mass, T tau) {
  return 1 / ((mass <= 0 ? T{0} : mass) + tau);
}

template <typename T, int DK>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>)
    stream_queries(const QueryArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  Four<T>* queries = reinterpret_cast<Four<T>*>(memory);
  Four<T>* landmarks = queries + kQuads<DK> * kTokenStride<T>;
  Four<T>* pooled = landmarks + a.groups_per_round * kGroup * kQuads<DK>;
  T* columns = reinterpret_cast<T*>(pooled + a.groups_per_round * kGroup * kQuads<DK>);
  T* parts = columns + a.groups_per_round * kGroup * kColumnStride<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int64_t head = blockIdx.x / a.tiles, first = blockIdx.x % a.tiles * kTokens<T>;
  const Rows q = Rows::of(a.q, head), l = Rows::of(a.landmarks, head), out = Rows::of(a.out, head);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = q.channels,
            per_round = a.groups_per_round * kGroup;
  const int count = static_cast<int>(min(static_cast<int64_t>(kTokens<T>), a.q.size[2] - first));
  const Rows u = Rows::of<T>(a.pooled_values + head * m * channels, channels);
  load_tokens<T, DK>(q, first, count, queries);
  T mass[kPerLane<T>] = {}, sum[kOwn<T>][DK] = {};
  for (int round = 0; round < a.rounds; ++round) {
    const Group group(round, a.groups_per_round, m);
    load_landmarks<T, DK>(l, round * per_round, per_round, m, landmarks);
    load_landmarks<T, DK>(u, round * per_round, per_round, m, pooled);
    __syncthreads();
    if (group.count > 0) {
      Columns<T> kernel;
      kernel_columns<T, DK>(queries, landmarks + group.row * kQuads<DK>, channels, count, group.count,
                            a.scale, kernel);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const T t = j < group.count ? a.pooled_mass[head * m + group.first + j] : T{0};
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) mass[i] += kernel[j][i] * t;
      }
      put_columns<T>(kernel, columns + group.row * kColumnStride<T>);
    }
    __syncthreads();
    sum_over_landmarks<T, DK>(columns, pooled, min(per_round, m - round * per_round), sum);
    __syncthreads();
  }
#pragma unroll
  for (int i = 0; i < kPerLane<T>; ++i) parts[warp * kTokens<T> + lane + i * kWarp] = mass[i];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < kOwn<T>; ++i) {
    const int token = warp * kOwn<T> + i;
    T row_mass = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) row_mass += parts[w * kTokens<T> + token];
    const T reciprocal = reciprocal_mass(row_mass, a.tau);
#pragma unroll
    for (int k = 0; k < DK; ++k) {
      const int channel = lane + k * kWarp;
      if (token < count && channel < channels) {
        store<T>(out.at(first + token, channel), out.dtype,
                 sum[i][k] * reciprocal + a.mean_value[head * channels + channel]);
      }
    }
  }
}

// Backward, queries. A chunk's partial sums: gradients of U and, through the kernel, of the landmarks, both
// (m, channels), of t (m), and the sum of the upstream gradient (channels).
template <typename T>
struct QueryGradientArguments {
  View grad, q, landmarks, dq;
  T scale, tau;
  int groups_per_round, rounds;
  Cut cut;
  const T *pooled_values, *pooled_mass;
  T* partials;
  int64_t partial_size;
};

template <typename T, int DK>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>)
    query_gradients(const QueryGradientArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  Four<T>* queries = reinterpret_cast<Four<T>*>(memory);
  Four<T>* grads = queries + kQuads<DK> * kTokenStride<T>;
  Four<T>* dqueries = grads + kQuads<DK> * kTokenStride<T>;
  Four<T>* landmarks = dqueries + kQuads<DK> * kTokenStride<T>;
  Four<T>* pooled = landmarks + a.groups_per_round * kGroup * kQuads<DK>;
  T* columns = reinterpret_cast<T*>(pooled + a.groups_per_round * kGroup * kQuads<DK>);
  T* mass_parts = columns + a.groups_per_round * kGroup * kColumnStride<T>;
  T* dmass_parts = mass_parts + kWarps * max(kTokens<T>, DK * kWarp);
  T* reciprocals = dmass_parts + kWarps * kTokens<T>;
  T* dmasses = reciprocals + kTokens<T>;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Chunk chunk = a.cut.of_block(blockIdx.x);
  const int64_t head = chunk.head;
  const Rows grad = Rows::of(a.grad, head), q = Rows::of(a.q, head), l = Rows::of(a.landmarks, head),
             dq = Rows::of(a.dq, head);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = q.channels,
            per_round = a.groups_per_round * kGroup;
  const Rows u = Rows::of<T>(a.pooled_values + head * m * channels, channels);
  T* dvalues = a.partials + chunk.index * a.partial_size;
  T* dlandmarks = dvalues + static_cast<int64_t>(m) * channels;
  T* dpooled_mass = dlandmarks + static_cast<int64_t>(m) * channels;
  T grad_sum = 0;
  for (int tile = 0;; ++tile) {
    const auto [first, count] = chunk.tile<kTokens<T>>(tile);
    if (count <= 0) break;
    __syncthreads();
    load_tokens<T, DK>(q, first, count, queries);
    load_tokens<T, DK>(grad, first, count, grads);
    clear_tokens<T, DK>(dqueries);
    __syncthreads();
    grad_sum += channel_sum<T, DK>(grads, mass_parts);

    // Once over the landmarks for the mass under each query and its gradient; with one round its columns stay
    // in registers.
    Columns<T> kernel, dkernel;
    T mass[kPerLane<T>] = {}, dmass[kPerLane<T>] = {};
    const auto load_round = [&](int round) {
      load_landmarks<T, DK>(l, round * per_round, per_round, m, landmarks);
      load_landmarks<T, DK>(u, round * per_round, per_round, m, pooled);
      __syncthreads();
    };
    const auto compute_columns = [&](const Group& group) {
      kernel_columns<T, DK>(queries, landmarks + group.row * kQuads<DK>, channels, count, group.count,
                            a.scale, kernel);
      product_columns<T, DK>(grads, pooled + group.row * kQuads<DK>, channels, dkernel);
    };
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (round > 0) __syncthreads();
      if (tile == 0 || a.rounds > 1) load_round(round);
      if (group.count == 0) continue;
      compute_columns(group);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const T t = j < group.count ? a.pooled_mass[head * m + group.first + j] : T{0};
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) {
          mass[i] += kernel[j][i] * t;
          dmass[i] += kernel[j][i] * dkernel[j][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) {
      mass_parts[warp * kTokens<T> + lane + i * kWarp] = mass[i];
      dmass_parts[warp * kTokens<T> + lane + i * kWarp] = dmass[i];
    }
    __syncthreads();
    if (threadIdx.x < kTokens<T>) {
      T all_mass = 0, all_dmass = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        all_mass += mass_parts[w * kTokens<T> + threadIdx.x];
        all_dmass += dmass_parts[w * kTokens<T> + threadIdx.x];
      }
      const T reciprocal = reciprocal_mass(all_mass, a.tau);
      reciprocals[threadIdx.x] = reciprocal;
      dmasses[threadIdx.x] = all_mass < 0 ? T{0} : -reciprocal * reciprocal * all_dmass;
    }
    __syncthreads();

    // Again for what needs them.
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (a.rounds > 1) load_round(round);
      T* own = columns + group.row * kColumnStride<T>;
      if (group.count > 0) {
        if (a.rounds > 1) compute_columns(group);
        T weights[kGroup][kPerLane<T>];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const T t = j < group.count ? a.pooled_mass[head * m + group.first + j] : T{0};
          T dt = 0;
#pragma unroll
          for (int i = 0; i < kPerLane<T>; ++i) {
            const int token = lane + i * kWarp;
            dt += kernel[j][i] * dmasses[token];
            weights[j][i] =
                kernel[j][i] * (reciprocals[token] * dkernel[j][i] + dmasses[token] * t) / a.scale;
            kernel[j][i] *= reciprocals[token];
          }
          if (j < group.count) add_scalar<T>(dt, tile == 0, dpooled_mass + group.first + j);
        }
        put_columns<T>(kernel, own);
        __syncwarp();
        T sum[kGroup][DK];
        sum_over_tokens<T, DK>(own, grads, sum);
        add_rows<T, DK>(sum, group, channels, tile == 0, dvalues);
        __syncwarp();
        put_columns<T>(weights, own);
        __syncwarp();
      }
      T sum[kGroup][DK];
      sign_gradients<T, DK>(own, queries, landmarks + group.row * kQuads<DK>, group.count > 0, dqueries, sum);
      if (group.count > 0) add_rows<T, DK>(sum, group, channels, tile == 0, dlandmarks);
    }
    store_tokens<T, DK>(dqueries, dq, first, count);
  }
  if (threadIdx.x < channels) dpooled_mass[m + threadIdx.x] = grad_sum;
}

// Backward, keys and values. A chunk's partial sums: the landmarks' gradient (m, channels).
template <typename T>
struct KeyGradientArguments {
  View k, v, landmarks, dk, dv;
  T scale;
  int groups_per_round, rounds;
  Cut cut;
  const T *dsums, *dmass;      // dP (heads, m, channels) and dp (heads, m)
  const T *mass, *mean_value;  // p and the mean of V
  const T* totals;             // the query pass's sums, the upstream gradient's from `grad_sum_at`
  int64_t total_size, grad_sum_at;
  T* partials;
  LandmarkGradient<T> through_inverse;  // in the blocks behind the stream's
  unsigned stream_blocks;
  T per_token, per_distance;  // 1 / N and 1 / (N scale)
};

template <typename T, int DK>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>)
    key_gradients(const KeyGradientArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  if (blockIdx.x >= a.stream_blocks) [[unlikely]] {
    landmark_gradient<T, DK>(a.through_inverse, blockIdx.x - a.stream_blocks, memory);
    return;
  }
  Four<T>* keys = reinterpret_cast<Four<T>*>(memory);
  Four<T>* values = keys + kQuads<DK> * kTokenStride<T>;
  Four<T>* dkeys = values + kQuads<DK> * kTokenStride<T>;
  Four<T>* landmarks = dkeys + kQuads<DK> * kTokenStride<T>;
  Four<T>* dsums = landmarks + a.groups_per_round * kGroup * kQuads<DK>;
  T* columns = reinterpret_cast<T*>(dsums + a.groups_per_round * kGroup * kQuads<DK>);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const Chunk chunk = a.cut.of_block(blockIdx.x);
  const int64_t head = chunk.head;
  const int m = static_cast<int>(a.landmarks.size[2]), channels = static_cast<int>(a.k.size[3]),
            per_round = a.groups_per_round * kGroup;
  T* dlandmarks = a.partials + chunk.index * m * channels;
  for (int tile = 0;; ++tile) {
    const auto [first, count] = chunk.tile<kTokens<T>>(tile);
    if (count <= 0) break;
    __syncthreads();
    load_tokens<T, DK>(Rows::of(a.k, head), first, count, keys);
    load_tokens<T, DK>(Rows::of(a.v, head), first, count, values);
    clear_tokens<T, DK>(dkeys);
    __syncthreads();
#pragma unroll 1
    for (int index = threadIdx.x; index < count * channels; index += kThreads) {
      token_channel(values, index / channels, index % channels) -=
          a.mean_value[head * channels + index % channels];
    }
    T own_dvalues[kOwn<T>][DK] = {};
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (tile == 0 || a.rounds > 1) {
        load_landmarks<T, DK>(Rows::of(a.landmarks, head), round * per_round, per_round, m, landmarks);
        load_landmarks<T, DK>(Rows::of<T>(a.dsums + head * m * channels, channels), round * per_round,
                              per_round, m, dsums);
      }
      __syncthreads();
      T* own = columns + group.row * kColumnStride<T>;
      Columns<T> weights;
      if (group.count > 0) {
        Columns<T> kernel;
        kernel_columns<T, DK>(keys, landmarks + group.row * kQuads<DK>, channels, count, group.count, a.scale,
                              kernel);
        product_columns<T, DK>(values, dsums + group.row * kQuads<DK>, channels, weights);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const bool real = j < group.count;
          const T dmass = real ? a.dmass[head * m + group.first + j] : T{0},
                  mass = real ? a.mass[head * m + group.first + j] : T{0};
#pragma unroll
          for (int i = 0; i < kPerLane<T>; ++i) {
            weights[j][i] = kernel[j][i] * (weights[j][i] + dmass) * a.per_distance;
            // The mean of dV leaves before the product: on close tokens the difference after it would cancel
            // to nothing.
            kernel[j][i] = (kernel[j][i] - mass) * a.per_token;
          }
        }
        put_columns<T>(kernel, own);
      }
      __syncthreads();
      sum_over_landmarks<T, DK>(columns, dsums, min(per_round, m - round * per_round), own_dvalues);
      __syncthreads();
      if (group.count > 0) {
        put_columns<T>(weights, own);
        __syncwarp();
      }
      T sum[kGroup][DK];
      sign_gradients<T, DK>(own, keys, landmarks + group.row * kQuads<DK>, group.count > 0, dkeys, sum);
      if (group.count > 0) add_rows<T, DK>(sum, group, channels, tile == 0, dlandmarks);
    }
    store_tokens<T, DK>(dkeys, Rows::of(a.dk, head), first, count);
    const Rows dv = Rows::of(a.dv, head);
#pragma unroll
    for (int i = 0; i < kOwn<T>; ++i) {
      const int token = warp * kOwn<T> + i;
#pragma unroll
      for (int c = 0; c < DK; ++c) {
        const int channel = lane + c * kWarp;
        if (token < count && channel < channels) {
          const T mean = a.totals[head * a.total_size + a.grad_sum_at + channel] * a.per_token;
          store<T>(dv.at(first + token, channel), dv.dtype, own_dvalues[i][c] + mean);
        }
      }
    }
  }
}

template <typename T, int DK>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks, double scale,
             int64_t iters, double eps, double tau, const AttentionResults& results) {
  const int64_t heads = q.size(0) * q.size(1), channels = q.size(3), m = landmarks.size(2);
  const Cut cut = cut_of<T>(q);

  KeyArguments<T> keys{view(k), view(v), view(landmarks), static_cast<T>(scale), 0, 0, cut};
  keys.partial_size = m * channels + m + 2 * channels;
  Layout layout;
  const auto partials_at = layout.add<T>(heads * cut.chunks * keys.partial_size),
             pooled_values_at = layout.add<T>(heads * m * channels),
             pooled_mass_at = layout.add<T>(heads * m);
  const Workspace workspace(layout, q);
  keys.partials = workspace.at(partials_at);
  T *pooled_values = workspace.at(pooled_values_at), *pooled_mass = workspace.at(pooled_mass_at);
  int64_t fixed = 2 * kTokenBytes<T, DK> + (kWarps + 1) * DK * kWarp * sizeof(T),
          per_group = kLandmarkBytes<T, DK> + kColumnBytes<T>;
  keys.groups_per_round = groups_that_fit(m, fixed, per_group);
  keys.rounds = rounds_of(m, keys.groups_per_round);
  const int64_t stream_bytes = fixed + keys.groups_per_round * per_group;
  const Points points(static_cast<int>(m), static_cast<int>(channels));
  const int64_t solve_bytes =
      SolverLayout<T>(static_cast<int>(m), static_cast<int>(iters), 4 * points.count).layout.bytes;
  keys.iters = static_cast<int>(iters), keys.eps = eps, keys.inverse = data<T>(results.inverse);
  // Beside the stream where its blocks' shared memory has room; a solver that needs more would cost the
  // stream its occupancy.
  keys.solver_blocks = solve_bytes <= stream_bytes ? heads : 0;
  if (keys.solver_blocks == 0) {
    Tensor gram = empty({q.size(0), q.size(1), m, m}, compute_type(q), q);
    kernel_matrix(landmarks, landmarks, scale, gram);
    invert<T>(data<T>(gram), heads, m, iters, eps, data<T>(results.inverse), q);
  }
  launch(stream_keys<T, DK>, keys.solver_blocks + heads * cut.chunks, kThreads, stream_bytes, q, keys);

  const FinishArguments<T> finish{keys.partials,
                                  data<T>(results.inverse),
                                  keys.partial_size,
                                  cut,
                                  static_cast<int>(m),
                                  static_cast<int>(channels),
                                  data<T>(results.sums),
                                  data<T>(results.mass),
                                  data<T>(results.mean_value),
                                  pooled_values,
                                  pooled_mass};
  const int64_t finish_bytes = 4 * kFinishThreads * (sizeof(double) + sizeof(T)) + 4 * m * sizeof(T);
  launch(finish_keys<T>, heads * ((channels + 3) / 4 + 1), kFinishThreads, finish_bytes, q, finish);

  QueryArguments<T> queries{view(q),
                            view(landmarks),
                            view(results.out),
                            static_cast<T>(scale),
                            static_cast<T>(tau),
                            0,
                            0,
                            (q.size(2) + kTokens<T> - 1) / kTokens<T>,
                            pooled_values,
                            pooled_mass,
                            data<T>(results.mean_value)};
  fixed = kTokenBytes<T, DK> + kWarps * kTokens<T> * sizeof(T),
  per_group = 2 * kLandmarkBytes<T, DK> + kColumnBytes<T>;
  queries.groups_per_round = groups_that_fit(m, fixed, per_group);
  queries.rounds = rounds_of(m, queries.groups_per_round);
  launch(stream_queries<T, DK>, heads * queries.tiles, kThreads, fixed + queries.groups_per_round * per_group,
         q, queries);
}

template <typename T, int DK>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks,
              const Tensor& inverse, const Tensor& sums, const Tensor& mass, const Tensor& mean_value,
              double scale, double tau, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              const Tensor& dlandmarks) {
  const int64_t heads = q.size(0) * q.size(1), channels = q.size(3), m = landmarks.size(2),
                size = m * channels, total_size = 2 * size + m + channels;
  const Cut cut = cut_of<T>(q);
  Layout layout;
  // The key pass writes its partial sums where the query pass's were.
  const auto partials_at = layout.add<T>(heads * cut.chunks * total_size),
             totals_at = layout.add<T>(heads * total_size), pooled_values_at = layout.add<T>(heads * size),
             dsums_at = layout.add<T>(heads * size), share_at = layout.add<T>(heads * size),
             pooled_mass_at = layout.add<T>(heads * m), dmass_at = layout.add<T>(heads * m);
  const Workspace workspace(layout, q);
  T *partials = workspace.at(partials_at), *totals = workspace.at(totals_at);
  T *pooled_values = workspace.at(pooled_values_at), *pooled_mass = workspace.at(pooled_mass_at),
    *dsums = workspace.at(dsums_at), *dmass = workspace.at(dmass_at);

  // U = A P and t = A p again, and after the query pass dP = A^T dU and dp = A^T dt.
  InverseProduct<T> product{.inverse = data<T>(inverse),
                            .transposed = false,
                            .m = static_cast<int>(m),
                            .channels = static_cast<int>(channels),
                            .matrix = data<T>(sums),
                            .column = data<T>(mass),
                            .matrix_stride = size,
                            .column_stride = m,
                            .matrix_out = pooled_values,
                            .column_out = pooled_mass};
  launch_product(product, heads, q);

  const int64_t per_group = 2 * kLandmarkBytes<T, DK> + kColumnBytes<T>;
  {
    const int64_t fixed = 3 * kTokenBytes<T, DK> +
                          (kWarps * std::max(kTokens<T>, DK * kWarp) + (kWarps + 2) * kTokens<T>)*sizeof(T);
    QueryGradientArguments<T> a{view(grad),         view(q), view(landmarks), view(dq), static_cast<T>(scale),
                                static_cast<T>(tau)};
    a.groups_per_round = groups_that_fit(m, fixed, per_group);
    a.rounds = rounds_of(m, a.groups_per_round);
    a.cut = cut, a.pooled_values = pooled_values, a.pooled_mass = pooled_mass;
    a.partials = partials, a.partial_size = total_size;
    launch(query_gradients<T, DK>, heads * cut.chunks, kThreads, fixed + a.groups_per_round * per_group, q,
           a);
  }
  reduce<T>({.partials = partials,
             .heads = heads,
             .chunks = cut.chunks,
             .stride = total_size,
             .size = total_size,
             .sums = totals},
            q);
  const T *dvalues = totals, *query_dlandmarks = dvalues + size, *dpooled_mass = query_dlandmarks + size;
  product.transposed = true;
  product.matrix = dvalues, product.column = dpooled_mass;
  product.matrix_stride = product.column_stride = total_size;
  product.matrix_out = dsums, product.column_out = dmass;
  launch_product(product, heads, q);
  {
    const int64_t fixed = 3 * kTokenBytes<T, DK>;
    KeyGradientArguments<T> keys{view(k),  view(v),  view(landmarks),
                                 view(dk), view(dv), static_cast<T>(scale)};
    keys.groups_per_round = groups_that_fit(m, fixed, per_group);
    keys.rounds = rounds_of(m, keys.groups_per_round);
    keys.cut = cut, keys.dsums = dsums, keys.dmass = dmass, keys.mass = data<T>(mass),
    keys.mean_value = data<T>(mean_value);
    keys.totals = totals, keys.total_size = total_size, keys.grad_sum_at = 2 * size + m;
    keys.partials = partials;
    keys.per_token = static_cast<T>(1 / static_cast<double>(q.size(2)));
    keys.per_distance = static_cast<T>(1 / (static_cast<double>(q.size(2)) * scale));
    keys.stream_blocks = static_cast<unsigned>(heads * cut.chunks);
    keys.through_inverse = {view(landmarks), static_cast<T>(scale), dsums, dmass, pooled_values,
                            pooled_mass,     workspace.at(share_at)};
    const int64_t blocks = heads * (cut.chunks + LandmarkGradient<T>::blocks_a_head(m));
    const int64_t bytes = std::max<int64_t>(fixed + keys.groups_per_round * per_group,
                                            LandmarkGradientLayout<T, DK>().layout.bytes);
    launch(key_gradients<T, DK>, blocks, kThreads, bytes, q, keys);
  }
  reduce<T>({.partials = partials,
             .heads = heads,
             .chunks = cut.chunks,
             .stride = size,
             .size = size,
             .more = workspace.at(share_at),
             .and_more = query_dlandmarks,
             .more_stride = size,
             .and_more_stride = total_size,
             .out = view(dlandmarks)},
            q);
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> laplacian_attention(const Tensor& q, const Tensor& k,
                                                                       const Tensor& v,
                                                                       const Tensor& landmarks, double scale,
                                                                       int64_t iters, double eps,
                                                                       double tau) {
  check_attention(q, k, v, landmarks);
  const OnDeviceOf guard(q);
  const AttentionResults results(q, landmarks);
  with_tiling(
      q, [&]<typename T, int DK>() { forward<T, DK>(q, k, v, landmarks, scale, iters, eps, tau, results); });
  return results.tuple();
}

std::tuple<Tensor, Tensor, Tensor, Tensor> laplacian_attention_backward(
    const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks,
    const Tensor& inverse, const Tensor& sums, const Tensor& mass, const Tensor& mean_value, double scale,
    double tau) {
  check_attention(q, k, v, landmarks);
  check_same(grad, q, 0, 4, "the gradient and q");
  check_devices(q, {&inverse, &sums, &mass, &mean_value});
  const OnDeviceOf guard(q);
  Tensor dq = empty_tokens(q), dk = empty_tokens(k), dv = empty_tokens(v),
         dlandmarks = empty_tokens(landmarks);
  with_tiling(q, [&]<typename T, int DK>() {
    backward<T, DK>(grad, q, k, v, landmarks, inverse, sums, mass, mean_value, scale, tau, dq, dk, dv,
                    dlandmarks);
  });
  return {dq, dk, dv, dlandmarks};
}

}  // namespace
}  // namespace lf

LF_IMPLEMENT(LF_CUDA_KEY, m) {
  m.impl("laplacian_attention", TORCH_BOX(&lf::laplacian_attention));
  m.impl("laplacian_attention_backward", TORCH_BOX(&lf::laplacian_attention_backward));
}
