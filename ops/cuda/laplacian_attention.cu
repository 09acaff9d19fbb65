// Normalization "mass": one launch streams keys and values while its first blocks run the solver, one adds
// the chunks' sums up, one streams queries; backward the two streams again, with the landmarks' small
// matrices between them. Kernel columns are recomputed, never stored. docs/operators.md has the floor and the
// reasons.
#include "landmarks.cuh"
#include "laplacian_kernel.cuh"
#include "matrix.cuh"

namespace lf {
namespace {

// Forward, keys and values. A chunk's partial sums: sum_i C_ij (v_i - shift) of (m, channels), its shift and
// the sum of v_i - shift, both of (channels), and sum_i C_ij of (m). The shift is the mean of the chunk's
// first tile: near the mean, so that nothing cancels.
template <typename T>
struct KeyArguments {
  View k, v, landmarks;
  Scale<T> scale;
  int groups_per_round, rounds;
  Cut cut;
  T* partials;
  int64_t partial_size;
  int solver_blocks;  // heads, or 0 where the solver has launches of its own
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

// (kappa(L, L) + eps I)^-1 of one head, whose landmarks are R.
template <typename R, int Fixed, typename T>
__device__ inline void solve_head(const KeyArguments<T>& a, int64_t head, unsigned char* memory) {
  const R landmarks = R::of(a.landmarks, Head(a.landmarks, head));
  const int m = Fixed ? Fixed : static_cast<int>(a.landmarks.size[2]), side = padded_to_four(m),
            channels = R::channels_of(a.landmarks), quads = (channels + 3) / 4;
  const Points points(m, channels);
  const SolverLayout<T> layout(m, a.iters, 4 * points.count);
  Four<T>* from = reinterpret_cast<Four<T>*>(layout.buffers.in(memory));
  read_and_put<kOneByOne<R> ? 1 : 4>(
      side * quads,
      [&](int index) {
        return index < m * quads ? landmarks.template four<T>(index / quads, 4 * (index % quads)) : Four<T>{};
      },
      [&](int index, const Four<T>& value) { from[index / quads * points.stride + index % quads] = value; });
  __syncthreads();
  T* matrix = layout.matrix.in(memory);
  Tiles<4, true, Fixed>(side).each([&](const PairTile<4>& tile) {
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
    add_pair<4>(sum);
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
struct KeyMemory {
  Place* place;
  Four<T>*keys, *values, *parts, *shift, *deviation, *landmarks;
  T* columns;
  int64_t bytes;

  template <typename L>
  __host__ __device__ constexpr KeyMemory(L layout, int groups, bool) {
    place = layout.template take<Place>(1);
    keys = layout.template tokens<T, DK>(), values = layout.template tokens<T, DK>();
    parts = layout.template take<Four<T>>(kWarps * kQuads<DK>);
    shift = layout.template take<Four<T>>(kQuads<DK>), deviation = layout.template take<Four<T>>(kWarp);
    landmarks = layout.template landmarks<T, DK>(groups);
    columns = layout.template columns<T>(groups);
    bytes = layout.bytes;
  }
};
static_assert(kTwoBlocksFit<KeyMemory<float, 2>>);

template <typename T, int DK, typename S>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>) stream_keys(const KeyArguments<T> a) {
  using Read = RowsOf<S, DK>;
  LF_SHARED_MEMORY(memory);
  // A solver is every other block until all heads have theirs: of few heads they start at once, and many do
  // not keep the stream waiting.
  const int block = static_cast<int>(blockIdx.x), solvers_before = min(a.solver_blocks, (block + 1) / 2);
  if (block % 2 == 0 && block / 2 < a.solver_blocks) {
    const bool usual = a.landmarks.size[2] == kUsualLandmarks;
    usual ? solve_head<Read, kUsualLandmarks>(a, block / 2, memory)
          : solve_head<Read, 0>(a, block / 2, memory);
    return;
  }
  const KeyMemory<T, DK> shared(SharedMemory{memory}, a.groups_per_round, a.rounds > 1);
  put_place(a.k, a.cut, block - solvers_before, shared.place);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = Read::channels_of(a.k),
            per_round = a.groups_per_round * kGroup;
  Four<T> sum[kGroup] = {};
  T kernel_sum[kGroup] = {};
  // Of the only round into the partial sums, or a round's and a tile's added to them.
  const auto write = [&](const Group& group, bool set) {
    T* sums = a.partials + shared.place->chunk * a.partial_size;
    add_rows<T, DK, Read>(sum, group, channels, channels, set, sums);
    add_numbers<T>(sums_by_landmark<T>(kernel_sum), group, set,
                   sums + static_cast<int64_t>(m + 2) * channels);
  };
  for (int done = 0; done < shared.place->tokens; done += kTokens<T>) {
    const auto [first, count, begins, head] = tile_of<T>(shared.place, done);
    __syncthreads();
    const auto load_round = [&](int round) {
      const LandmarkRows<T, DK, Read> landmarks(Read::of(a.landmarks, head),
                                                {round * per_round, per_round, m}, kFar<T>);
      landmarks.put(shared.landmarks);
    };
    {
      OwnQuads<T, DK> keys, values;
      read_tokens<T, DK>(Read::of(a.k, head).from(first), count, -kFar<T>, shared.keys, keys);
      read_tokens<T, DK>(Read::of(a.v, head).from(first), count, T{0}, shared.values, values);
      if (begins || a.rounds > 1) load_round(0);
      if constexpr (!kOneByOne<Read>) put_tokens<T, DK>(keys, shared.keys);
      if (begins) mean_of_tokens<T, DK>(values, count, shared.parts, shared.shift);
      subtract<T, DK>(shared.shift[own_quad<DK>()], count, values);
      put_tokens<T, DK>(values, shared.values);
    }
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (round > 0) __syncthreads(), load_round(round);
      __syncthreads();
      if (round == 0) add_tokens<T, DK>(shared.values, begins, shared.deviation);
      if (group.count == 0) continue;
      Columns<T> kernel;
      kernel_columns<T, DK>(shared.keys, shared.landmarks + group.row * kQuads<DK>, channels,
                            a.scale.exponent, kernel);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) kernel_sum[j] += kernel[j][i];
      }
      T* own = shared.columns + group.row * kColumnStride<T>;
      put_columns<T>(kernel, own);
      __syncwarp();
      sum_over_tokens<T, DK>(own, shared.values, sum);
      __syncwarp();
      if (a.rounds > 1) {
        write(group, begins);
        clear(sum), clear(kernel_sum);
      }
    }
  }
  if (a.rounds == 1) write(Group(0, a.groups_per_round, m), true);
  T* shift_sums = a.partials + shared.place->chunk * a.partial_size + static_cast<int64_t>(m) * channels;
  if (threadIdx.x < kQuads<DK>) put_quad<Read>(shared.shift[threadIdx.x], threadIdx.x, channels, shift_sums);
  put_sum<T, DK, Read>(shared.deviation, channels, shift_sums + channels);
}

// The chunks' sums added up, four channels of one head a block and one more block a head for the mass: the
// mean of V, P, p, U = A P, t = A p. Every 64 threads take a slice of the chunks.
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
struct FinishLayout {
  Layout layout;
  Piece<double> wide;     // a warp's share of the mean, (warps, 4)
  Piece<Four<T>> mean;    // one
  Piece<Four<T>> slices;  // one a thread
  Piece<T> result;        // (m, 4)
  Piece<T> inverse;

  LF_HOST_DEVICE constexpr FinishLayout(int m, int threads)
      : wide(layout.add<double>(4 * threads / kWarp)),
        mean(layout.add<Four<T>>(1)),
        slices(layout.add<Four<T>>(threads)),
        result(layout.add<T>(4 * m)),
        inverse(layout.add<T>(kept_inverse(m))) {}
};

template <typename T, int kSlices>
__global__ void __launch_bounds__(64 * kSlices) finish_keys(const FinishArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  constexpr int threads = 64 * kSlices;
  const FinishLayout<T> at(a.m, threads);
  double* wide = at.wide.in(memory);
  Four<T>*slices = at.slices.in(memory), &mean = *at.mean.in(memory);
  T* result = at.result.in(memory);
  const int quads = (a.channels + 3) / 4, quad = blockIdx.x % (quads + 1), channel = 4 * quad;
  const int64_t head = blockIdx.x / (quads + 1), n = a.cut.tokens;
  const bool for_mass = quad == quads;
  const int width = for_mass ? 1 : min(4, a.channels - channel), chunks = a.cut.chunks;
  const T* partials = a.partials + head * chunks * a.partial_size;
  const int64_t shift_at = static_cast<int64_t>(a.m) * a.channels + channel,
                deviation_at = shift_at + a.channels, mass_at = static_cast<int64_t>(a.m + 2) * a.channels;
  const T* inverse = a.inverse + head * a.m * a.m;
  const auto read = [&](const T* four) {
    return a.channels % 4 == 0 ? vector_at<4>(four) : read_quad<Rows>(four, 0, width);
  };
  const KeptInverse<threads, T> all(inverse, a.m);
  if (!for_mass) {
    double own[4] = {};
    for (int chunk = threadIdx.x; chunk < chunks; chunk += threads) {
      const double tokens = static_cast<double>(a.cut.chunk_tokens(chunk));
      const T* from = partials + chunk * a.partial_size;
      const Four<T> shift = read(from + shift_at), deviation = read(from + deviation_at);
#pragma unroll
      for (int c = 0; c < 4; ++c) own[c] += tokens * shift.at[c] + deviation.at[c];
    }
#pragma unroll
    for (int c = 0; c < 4; ++c) {
      own[c] = warp_sum(own[c]);
      if (threadIdx.x % kWarp == 0) wide[threadIdx.x / kWarp * 4 + c] = own[c];
    }
    __syncthreads();
    if (static_cast<int>(threadIdx.x) < 4) {
      double total = 0;
      for (int w = 0; w < threads / kWarp; ++w) total += wide[4 * w + threadIdx.x];
      mean.at[threadIdx.x] = static_cast<T>(total / n);
      if (static_cast<int>(threadIdx.x) < width)
        a.mean_value[head * a.channels + channel + threadIdx.x] = mean.at[threadIdx.x];
    }
  }
  all.put(at.inverse.in(memory));
  const int slice = threadIdx.x / 64;
  for (int first = 0; first < a.m; first += 64) {
    // The last landmark again where there are no more.
    const int j = min(first + static_cast<int>(threadIdx.x) % 64, a.m - 1);
    Four<T> sum = {};
    const T* from = partials + slice * a.partial_size;
    const int64_t step = kSlices * a.partial_size;
    const auto add_chunks = [&](auto read) {
      const Four<T> whole_mean = mean;
      const int64_t own_at = static_cast<int64_t>(j) * a.channels + channel;
#pragma unroll 2
      for (int chunk = slice; chunk < chunks; chunk += kSlices, from += step) {
        const T chunk_mass = from[mass_at + j];
        const Four<T> own = read(from + own_at), shift = read(from + shift_at);
#pragma unroll
        for (int c = 0; c < 4; ++c) sum.at[c] += own.at[c] + chunk_mass * (shift.at[c] - whole_mean.at[c]);
      }
    };
    if (for_mass) {
#pragma unroll 4
      for (int chunk = slice; chunk < chunks; chunk += kSlices, from += step) sum.at[0] += from[mass_at + j];
    } else if (a.channels % 4 == 0) {
      add_chunks([](const T* quad) { return vector_at<4>(quad); });
    } else {
      add_chunks([width](const T* quad) { return read_quad<Rows>(quad, 0, width); });
    }
    __syncthreads();
    slices[threadIdx.x] = sum;
    __syncthreads();
    // Four threads of each landmark take a channel each.
    if (threadIdx.x < 4 * 64) {
      const int row = threadIdx.x / 4, c = threadIdx.x % 4, landmark = first + row;
      if (landmark < a.m && c < width) {
        T total = 0;
#pragma unroll
        for (int s = 0; s < kSlices; ++s) total += slices[64 * s + row].at[c];
        const T value = total / static_cast<T>(n);
        result[4 * landmark + c] = value;
        T* saved = for_mass ? a.mass + head * a.m + landmark
                            : a.sums + (head * a.m + landmark) * a.channels + channel + c;
        *saved = value;
      }
    }
  }
  __syncthreads();
  T* out = for_mass ? a.pooled_mass + head * a.m : a.pooled_values + head * a.m * a.channels + channel;
  const int stride = for_mass ? 1 : a.channels;
  if (kept_inverse(a.m)) {
    times_inverse<T>(at.inverse.in(memory), false, a.m, result, width, out, stride);
  } else {
    times_inverse<T>(inverse, false, a.m, result, width, out, stride);
  }
}

// Forward, queries.
template <typename T>
struct QueryArguments {
  View q, landmarks, out;
  Scale<T> scale;
  T tau;
  int groups_per_round, rounds;
  Cut cut;
  const T *pooled_values, *pooled_mass, *mean_value;
};

// One over the mass under a query; NaN stays NaN.
template <typename T>
__device__ inline T reciprocal_mass(T mass, T tau) {
  return 1 / ((mass <= 0 ? T{0} : mass) + tau);
}

template <typename T, int DK>
struct QueryMemory {
  Place* place;
  Four<T>*queries, *landmarks, *pooled;
  T *columns, *pooled_mass, *parts;
  int64_t bytes;

  template <typename L>
  __host__ __device__ constexpr QueryMemory(L layout, int groups, bool) {
    place = layout.template take<Place>(1);
    queries = layout.template tokens<T, DK>();
    parts = layout.template take<T>(kWarps * kTokens<T>);
    columns = layout.template columns<T>(groups), pooled_mass = layout.template take<T>(groups * kGroup);
    landmarks = layout.template landmarks<T, DK>(groups), pooled = layout.template landmarks<T, DK>(groups);
    bytes = layout.bytes;
  }
};
static_assert(kTwoBlocksFit<QueryMemory<float, 2>>);

// A round's landmarks with their U and t, for the passes over the queries.
template <typename T, int DK, typename S, typename Arguments, typename Memory>
__device__ inline void load_pooled(const Arguments& a, const Head& head, const Landmarks& which, int channels,
                                   const Memory& shared) {
  using Read = RowsOf<S, DK>;
  using Matrix = MatrixOf<T, S, DK>;
  const LandmarkRows<T, DK, Read> landmarks(Read::of(a.landmarks, head), which, kFar<T>);
  const LandmarkRows<T, DK, Matrix> pooled(
      Matrix::of(a.pooled_values + head.start(which.end * channels), channels), which, T{0});
  const LandmarkNumbers<T> pooled_mass(a.pooled_mass + head.start(which.end), which);
  landmarks.put(shared.landmarks), pooled.put(shared.pooled), pooled_mass.put(shared.pooled_mass);
}

template <typename T, int DK, typename S>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>)
    stream_queries(const QueryArguments<T> a) {
  using Read = RowsOf<S, DK>;
  LF_SHARED_MEMORY(memory);
  const QueryMemory<T, DK> shared(SharedMemory{memory}, a.groups_per_round, a.rounds > 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  put_place(a.q, a.cut, blockIdx.x, shared.place);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = Read::channels_of(a.q),
            per_round = a.groups_per_round * kGroup;
  for (int done = 0; done < shared.place->tokens; done += kTokens<T>) {
    const auto [first, count, begins, head] = tile_of<T>(shared.place, done);
    __syncthreads();
    const auto load_round = [&](int round) {
      load_pooled<T, DK, S>(a, head, {round * per_round, per_round, m}, channels, shared);
    };
    {
      OwnQuads<T, DK> queries;
      read_tokens<T, DK>(Read::of(a.q, head).from(first), count, -kFar<T>, shared.queries, queries);
      if (begins || a.rounds > 1) load_round(0);
      if constexpr (!kOneByOne<Read>) put_tokens<T, DK>(queries, shared.queries);
    }
    T mass[kPerLane<T>] = {};
    Four<T> sum[kOwnOfShare<T, DK>] = {};
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (round > 0) __syncthreads(), load_round(round);
      __syncthreads();
      if (group.count > 0) {
        Columns<T> kernel;
        kernel_columns<T, DK>(shared.queries, shared.landmarks + group.row * kQuads<DK>, channels,
                              a.scale.exponent, kernel);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
          for (int i = 0; i < kPerLane<T>; ++i) mass[i] += kernel[j][i] * shared.pooled_mass[group.row + j];
        }
        put_columns<T>(kernel, shared.columns + group.row * kColumnStride<T>);
      }
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) shared.parts[warp * kTokens<T> + lane + i * kWarp] = mass[i];
      __syncthreads();
      sum_over_landmarks<T, DK>(shared.columns, shared.pooled,
                                groups_of(min(per_round, m - round * per_round)), sum);
    }
    // Lane i has the mass of the warp's token i, the lanes kOwn apart a share of it each.
    T row_mass = 0;
#pragma unroll
    for (int w = lane / kOwn<T>; w < kWarps; w += kWarp / kOwn<T>)
      row_mass += shared.parts[w * kTokens<T> + warp * kOwn<T> + lane % kOwn<T>];
#pragma unroll
    for (int offset = kOwn<T>; offset < kWarp; offset *= 2)
      row_mass += __shfl_xor_sync(0xffffffffu, row_mass, offset);
    const T own_reciprocal = reciprocal_mass(row_mass, a.tau);
    const Four<T> mean = read_quad<Read>(a.mean_value + head.start(channels), own_quad<DK>(), channels);
#pragma unroll
    for (int i = 0; i < kOwnOfShare<T, DK>; ++i) {
      const T reciprocal = __shfl_sync(0xffffffffu, own_reciprocal, own_share<DK>() * kOwnOfShare<T, DK> + i);
#pragma unroll
      for (int u = 0; u < 4; ++u) sum[i].at[u] = sum[i].at[u] * reciprocal + mean.at[u];
    }
    put_rows<T, DK>(sum, Read::of(a.out, head).from(first), first_own_token<T, DK>(), count, shared.queries);
  }
}

// Backward, queries. A chunk's partial sums: gradients of U and, through the kernel, of the landmarks, both
// (m, channels), the sum of the upstream gradient (channels), and the gradient of t (m).
template <typename T>
struct QueryGradientArguments {
  View grad, q, landmarks, dq;
  Scale<T> scale;
  T tau;
  int groups_per_round, rounds;
  Cut cut;
  const T *pooled_values, *pooled_mass;
  T* partials;
  int64_t partial_size;
};

template <typename T, int DK>
struct QueryGradientMemory {
  Place* place;
  Four<T>*queries, *grads, *dqueries, *grad_sum, *landmarks, *pooled;
  T *columns, *totals, *pooled_mass, *mass_parts, *dmass_parts, *reciprocals, *dmasses;
  int64_t bytes;

  // With one round the queries' gradients take the place of the upstream ones, which then have been used.
  template <typename L>
  __host__ __device__ constexpr QueryGradientMemory(L layout, int groups, bool several_rounds) {
    place = layout.template take<Place>(1);
    queries = layout.template tokens<T, DK>(), grads = layout.template tokens<T, DK>();
    grad_sum = layout.template take<Four<T>>(kWarp);
    mass_parts = layout.template take<T>(kWarps * kTokens<T>),
    dmass_parts = layout.template take<T>(kWarps * kTokens<T>);
    reciprocals = layout.template take<T>(kTokens<T>), dmasses = layout.template take<T>(kTokens<T>);
    columns = layout.template columns<T>(groups), totals = layout.template totals<T>(groups);
    pooled_mass = layout.template take<T>(groups * kGroup);
    landmarks = layout.template landmarks<T, DK>(groups), pooled = layout.template landmarks<T, DK>(groups);
    dqueries = several_rounds ? layout.template tokens<T, DK>() : grads;
    bytes = layout.bytes;
  }
};
static_assert(kTwoBlocksFit<QueryGradientMemory<float, 2>>);

template <typename T, int DK, typename S>
__global__ void __launch_bounds__(kThreads, kGradientBlocksTogether<T, DK, S>)
    query_gradients(const QueryGradientArguments<T> a) {
  using Read = RowsOf<S, DK>;
  LF_SHARED_MEMORY(memory);
  const QueryGradientMemory<T, DK> shared(SharedMemory{memory}, a.groups_per_round, a.rounds > 1);
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  put_place(a.q, a.cut, blockIdx.x, shared.place);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = Read::channels_of(a.q),
            per_round = a.groups_per_round * kGroup;
  Vector<T, DK> value_sum[kGroup] = {};
  T mass_sum = 0;
  LandmarkGradients<T, DK> gradients;
  // Of the only round into the partial sums, or a round's and a tile's added to them.
  const auto write = [&](const Group& group, bool set) {
    T* dvalues = a.partials + shared.place->chunk * a.partial_size;
    T* dlandmarks = dvalues + static_cast<int64_t>(m) * channels;
    Vector<T, DK> sums[kGroup];
    gradients.finish(sums);
    add_rows<T, DK, Read>(value_sum, group, channels, channels, set, dvalues);
    add_rows<T, DK, Read>(sums, group, channels, channels, set, dlandmarks);
    add_numbers<T>(mass_sum, group, set, dlandmarks + static_cast<int64_t>(m + 1) * channels);
  };
  for (int done = 0; done < shared.place->tokens; done += kTokens<T>) {
    const auto [first, count, begins, head] = tile_of<T>(shared.place, done);
    __syncthreads();
    load_tokens<T, DK>(Read::of(a.q, head).from(first), count, -kFar<T>, shared.queries);
    load_tokens<T, DK>(Read::of(a.grad, head).from(first), count, T{0}, shared.grads);

    // Once over the landmarks for the mass under each query and its gradient; with one round its columns stay
    // in registers.
    Columns<T> kernel, dkernel;
    unsigned pairs = 0;
    T mass[kPerLane<T>] = {}, dmass[kPerLane<T>] = {};
    const auto load_round = [&](int round) {
      load_pooled<T, DK, S>(a, head, {round * per_round, per_round, m}, channels, shared);
    };
    const auto compute_columns = [&](const Group& group) {
      pairs = kernel_columns<T, DK>(shared.queries, shared.landmarks + again(group.row) * kQuads<DK>,
                                    channels, a.scale.exponent, kernel);
      product_columns<T, DK>(shared.grads, shared.pooled + group.row * kQuads<DK>, channels, dkernel);
    };
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (round > 0) __syncthreads();
      if (begins || a.rounds > 1) load_round(round);
      __syncthreads();
      if (round == 0) add_tokens<T, DK>(shared.grads, begins, shared.grad_sum);
      if (group.count == 0) continue;
      compute_columns(group);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
        const T t = shared.pooled_mass[group.row + j];
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) {
          mass[i] += kernel[j][i] * t;
          dmass[i] += kernel[j][i] * dkernel[j][i];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) {
      shared.mass_parts[warp * kTokens<T> + lane + i * kWarp] = mass[i];
      shared.dmass_parts[warp * kTokens<T> + lane + i * kWarp] = dmass[i];
    }
    __syncthreads();
    if (threadIdx.x < kTokens<T>) {
      T all_mass = 0, all_dmass = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        all_mass += shared.mass_parts[w * kTokens<T> + threadIdx.x];
        all_dmass += shared.dmass_parts[w * kTokens<T> + threadIdx.x];
      }
      const T reciprocal = reciprocal_mass(all_mass, a.tau);
      const bool real = static_cast<int>(threadIdx.x) < count;
      shared.reciprocals[threadIdx.x] = real ? reciprocal : T{0};
      shared.dmasses[threadIdx.x] = real && !(all_mass < 0) ? -reciprocal * reciprocal * all_dmass : T{0};
    }
    __syncthreads();

    // Again for what needs them.
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (a.rounds > 1) {
        load_round(round);
        __syncthreads();
      }
      T *own = shared.columns + group.row * kColumnStride<T>,
        *totals = shared.totals + group.row / kGroup * kColumnStride<T>;
      Columns<T> weights;
      if (group.count > 0) {
        if (a.rounds > 1) compute_columns(group);
        T reciprocal[kPerLane<T>], dmass[kPerLane<T>], kernel_dmass[kGroup] = {};
#pragma unroll
        for (int i = 0; i < kPerLane<T>; ++i) {
          reciprocal[i] = shared.reciprocals[lane + i * kWarp], dmass[i] = shared.dmasses[lane + i * kWarp];
        }
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const T t = shared.pooled_mass[group.row + j];
#pragma unroll
          for (int i = 0; i < kPerLane<T>; ++i) {
            kernel_dmass[j] += kernel[j][i] * dmass[i];
            weights[j][i] =
                kernel[j][i] * (reciprocal[i] * dkernel[j][i] + dmass[i] * t) * a.scale.twice_inverse;
            kernel[j][i] *= reciprocal[i];
          }
        }
        mass_sum += sums_by_landmark<T>(kernel_dmass);
        put_columns<T>(kernel, own);
        __syncwarp();
        sum_over_tokens<T, DK>(own, shared.grads, value_sum);
        __syncwarp();
        drop_coinciding<T>(pairs, weights);
        put_columns<T>(weights, own);
        put_totals<T>(weights, totals);
      }
      __syncthreads();
      sign_gradients<T, DK>(own, totals, shared.queries, shared.landmarks + group.row * kQuads<DK>,
                            group.count > 0, round == 0, shared.dqueries, gradients);
      if (a.rounds > 1) {
        write(group, begins);
        gradients = {}, clear(value_sum), mass_sum = 0;
      }
    }
    const QueryGradientMemory<T, DK> same(SharedMemory{memory}, again(a.groups_per_round), a.rounds > 1);
    store_tokens<T, DK>(same.dqueries, Read::of(a.dq, head).from(first), count);
  }
  if (a.rounds == 1) write(Group(0, a.groups_per_round, m), true);
  put_sum<T, DK, Read>(
      shared.grad_sum, channels,
      a.partials + shared.place->chunk * a.partial_size + 2 * static_cast<int64_t>(m) * channels);
}

// Backward, keys and values. A chunk's partial sums: the landmarks' gradient (m, channels).
template <typename T>
struct KeyGradientArguments {
  View k, v, landmarks, dk, dv;
  Scale<T> scale;
  int groups_per_round, rounds;
  Cut cut;
  const T *dsums, *dmass;      // dP (heads, m, channels) and dp (heads, m)
  const T *mass, *mean_value;  // p and the mean of V
  const T* grad_sum;           // the sum of the upstream gradient, heads `total_size` apart
  int64_t total_size;
  T* partials;
  LandmarkGradient<T> through_inverse;  // in the blocks behind the stream's
  unsigned stream_blocks;
  T share, weight_share;  // 1 / N and 2 / (N scale)
};

template <typename T, int DK>
struct KeyGradientMemory {
  Place* place;
  Four<T>*keys, *values, *dkeys, *dvalues, *landmarks, *dsums;
  T *columns, *totals, *mass, *dmass;
  int64_t bytes;

  // With one round the keys' gradients take the place of the values, which then have been used, and those of
  // the values stay in registers.
  template <typename L>
  __host__ __device__ constexpr KeyGradientMemory(L layout, int groups, bool several_rounds) {
    place = layout.template take<Place>(1);
    keys = layout.template tokens<T, DK>(), values = layout.template tokens<T, DK>();
    columns = layout.template columns<T>(groups), totals = layout.template totals<T>(groups);
    mass = layout.template take<T>(groups * kGroup), dmass = layout.template take<T>(groups * kGroup);
    landmarks = layout.template landmarks<T, DK>(groups), dsums = layout.template landmarks<T, DK>(groups);
    dkeys = several_rounds ? layout.template tokens<T, DK>() : values;
    dvalues = several_rounds ? layout.template tokens<T, DK>() : nullptr;
    bytes = layout.bytes;
  }
};
static_assert(kTwoBlocksFit<KeyGradientMemory<float, 2>>);

template <typename T, int DK, typename S>
__global__ void __launch_bounds__(kThreads, kGradientBlocksTogether<T, DK, S>)
    key_gradients(const KeyGradientArguments<T> a) {
  using Read = RowsOf<S, DK>;
  LF_SHARED_MEMORY(memory);
  if (blockIdx.x >= a.stream_blocks) [[unlikely]] {
    landmark_gradient<T, DK>(a.through_inverse, blockIdx.x - a.stream_blocks, memory);
    return;
  }
  const KeyGradientMemory<T, DK> shared(SharedMemory{memory}, a.groups_per_round, a.rounds > 1);
  put_place(a.k, a.cut, blockIdx.x, shared.place);
  const int m = static_cast<int>(a.landmarks.size[2]), channels = Read::channels_of(a.k),
            per_round = a.groups_per_round * kGroup;
  LandmarkGradients<T, DK> gradients;
  // Of the only round into the partial sums, or a round's and a tile's added to them.
  const auto write = [&](const Group& group, bool set) {
    Vector<T, DK> sums[kGroup];
    gradients.finish(sums);
    add_rows<T, DK, Read>(sums, group, channels, channels, set,
                          a.partials + shared.place->chunk * m * channels);
  };
  for (int done = 0; done < shared.place->tokens; done += kTokens<T>) {
    const auto [first, count, begins, head] = tile_of<T>(shared.place, done);
    __syncthreads();
    load_tokens<T, DK>(Read::of(a.k, head).from(first), count, -kFar<T>, shared.keys);
    {
      OwnQuads<T, DK> values;
      read_tokens<T, DK>(Read::of(a.v, head).from(first), count, T{0}, shared.values, values);
      subtract<T, DK>(read_quad<Read>(a.mean_value + head.start(channels), own_quad<DK>(), channels), count,
                      values);
      put_tokens<T, DK>(values, shared.values);
    }
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      if (begins || a.rounds > 1) {
        const Landmarks which{round * per_round, per_round, m};
        const LandmarkRows<T, DK, Read> landmarks(Read::of(a.landmarks, head), which, kFar<T>);
        using Matrix = MatrixOf<T, S, DK>;
        const LandmarkRows<T, DK, Matrix> dsums(Matrix::of(a.dsums + head.start(m * channels), channels),
                                                which, T{0});
        const LandmarkNumbers<T> mass(a.mass + head.start(m), which), dmass(a.dmass + head.start(m), which);
        landmarks.put(shared.landmarks), dsums.put(shared.dsums);
        mass.put(shared.mass), dmass.put(shared.dmass);
      }
      __syncthreads();
      T *own = shared.columns + group.row * kColumnStride<T>,
        *totals = shared.totals + group.row / kGroup * kColumnStride<T>;
      Columns<T> weights;
      if (group.count > 0) {
        Columns<T> kernel;
        const unsigned pairs = kernel_columns<T, DK>(shared.keys, shared.landmarks + group.row * kQuads<DK>,
                                                     channels, a.scale.exponent, kernel);
        product_columns<T, DK>(shared.values, shared.dsums + group.row * kQuads<DK>, channels, weights);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
          const T mass = shared.mass[group.row + j], dmass = shared.dmass[group.row + j];
#pragma unroll
          for (int i = 0; i < kPerLane<T>; ++i) {
            weights[j][i] = kernel[j][i] * (weights[j][i] + dmass) * a.weight_share;
            // The mean of dV leaves before the product: on close tokens the difference after it would cancel
            // to nothing.
            kernel[j][i] = (kernel[j][i] - mass) * a.share;
          }
        }
        put_columns<T>(kernel, own);
        drop_coinciding<T>(pairs, weights);
      }
      __syncthreads();
      {
        Four<T> dvalues[kOwnOfShare<T, DK>] = {};
        Four<T>* kept = shared.dvalues + own_quad<DK>() * kTokenStride<T> + first_own_token<T, DK>();
        if (round > 0) {
#pragma unroll
          for (int i = 0; i < kOwnOfShare<T, DK>; ++i) dvalues[i] = kept[i];
        }
        sum_over_landmarks<T, DK>(shared.columns, shared.dsums,
                                  groups_of(min(per_round, m - round * per_round)), dvalues);
        if (round + 1 < a.rounds) {
#pragma unroll
          for (int i = 0; i < kOwnOfShare<T, DK>; ++i) kept[i] = dvalues[i];
        } else {
          // The mean of dV is the same for all tokens.
          const Four<T> grad_sum =
              read_quad<Read>(a.grad_sum + head.start(a.total_size), own_quad<DK>(), channels);
#pragma unroll
          for (int i = 0; i < kOwnOfShare<T, DK>; ++i) {
#pragma unroll
            for (int u = 0; u < 4; ++u) dvalues[i].at[u] += grad_sum.at[u] * a.share;
          }
          put_rows<T, DK>(dvalues, Read::of(a.dv, head).from(first), first_own_token<T, DK>(), count,
                          shared.values);
        }
      }
      __syncthreads();
      if (group.count > 0) {
        put_columns<T>(weights, own);
        put_totals<T>(weights, totals);
        __syncwarp();
      }
      sign_gradients<T, DK>(own, totals, shared.keys, shared.landmarks + group.row * kQuads<DK>,
                            group.count > 0, round == 0, shared.dkeys, gradients);
      if (a.rounds > 1) {
        write(group, begins);
        gradients = {};
      }
    }
    const KeyGradientMemory<T, DK> same(SharedMemory{memory}, again(a.groups_per_round), a.rounds > 1);
    store_tokens<T, DK>(same.dkeys, Read::of(a.dk, head).from(first), count);
  }
  if (a.rounds == 1) write(Group(0, a.groups_per_round, m), true);
}

template <typename T, int DK>
void forward(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks, double scale,
             int64_t iters, double eps, double tau, const AttentionResults& results) {
  const int64_t heads = q.size(0) * q.size(1), channels = q.size(3), m = landmarks.size(2);
  const Cut cut = cut_of<T>(q);

  KeyArguments<T> keys{view(k), view(v), view(landmarks), static_cast<T>(scale), 0, 0, cut};
  keys.partial_size = padded_to_four((m + 2) * channels + m);
  Layout layout;
  const auto partials_at = layout.add<T>(heads * cut.chunks * keys.partial_size),
             pooled_values_at = layout.add<T>(heads * m * channels),
             pooled_mass_at = layout.add<T>(heads * m);
  const Workspace workspace(layout, q);
  keys.partials = workspace.at(partials_at);
  T *pooled_values = workspace.at(pooled_values_at), *pooled_mass = workspace.at(pooled_mass_at);
  const int64_t stream_bytes = plan_rounds<KeyMemory<T, DK>>(m, keys);
  const Points points(static_cast<int>(m), static_cast<int>(channels));
  const int64_t solve_bytes =
      SolverLayout<T>(static_cast<int>(m), static_cast<int>(iters), 4 * points.count).layout.bytes;
  keys.iters = static_cast<int>(iters), keys.eps = eps, keys.inverse = data<T>(results.inverse);
  // Beside the stream where its blocks' shared memory has room; a solver that needs more would cost the
  // stream its occupancy.
  keys.solver_blocks = solve_bytes <= stream_bytes ? static_cast<int>(heads) : 0;
  if (keys.solver_blocks == 0) {
    Tensor gram = empty({q.size(0), q.size(1), m, m}, compute_type(q), q);
    kernel_matrix(landmarks, landmarks, scale, gram);
    invert<T>(data<T>(gram), heads, m, iters, eps, data<T>(results.inverse), q);
  }
  with_elements<T, DK>({keys.k, keys.v, keys.landmarks}, [&]<typename S>() {
    launch(stream_keys<T, DK, S>, keys.solver_blocks + heads * cut.chunks, kThreads, stream_bytes, q, keys);
  });

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
  const auto launch_finish = [&]<int kSlices>() {
    const int64_t bytes = FinishLayout<T>(static_cast<int>(m), 64 * kSlices).layout.bytes;
    launch(finish_keys<T, kSlices>, heads * ((channels + 3) / 4 + 1), 64 * kSlices, bytes, q, finish);
  };
  // Of few chunks, small blocks: several fit a multiprocessor.
  cut.chunks <= 16 ? launch_finish.template operator()<4>() : launch_finish.template operator()<16>();

  QueryArguments<T> queries{
      view(q), view(landmarks), view(results.out), static_cast<T>(scale),      static_cast<T>(tau), 0, 0,
      cut,     pooled_values,   pooled_mass,       data<T>(results.mean_value)};
  const int64_t query_bytes = plan_rounds<QueryMemory<T, DK>>(m, queries);
  with_elements<T, DK>({queries.q, queries.landmarks, queries.out}, [&]<typename S>() {
    launch(stream_queries<T, DK, S>, heads * cut.chunks, kThreads, query_bytes, q, queries);
  });
}

template <typename T, int DK>
void backward(const Tensor& grad, const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& landmarks,
              const Tensor& inverse, const Tensor& sums, const Tensor& mass, const Tensor& mean_value,
              double scale, double tau, const Tensor& dq, const Tensor& dk, const Tensor& dv,
              const Tensor& dlandmarks) {
  const int64_t heads = q.size(0) * q.size(1), channels = q.size(3), m = landmarks.size(2),
                size = m * channels, used = 2 * size + channels + m, total_size = padded_to_four(used);
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

  {
    QueryGradientArguments<T> a{view(grad),         view(q), view(landmarks), view(dq), static_cast<T>(scale),
                                static_cast<T>(tau)};
    const int64_t bytes = plan_rounds<QueryGradientMemory<T, DK>>(m, a);
    a.cut = cut, a.pooled_values = pooled_values, a.pooled_mass = pooled_mass;
    a.partials = partials, a.partial_size = total_size;
    with_elements<T, DK>({a.q, a.grad, a.landmarks, a.dq}, [&]<typename S>() {
      launch(query_gradients<T, DK, S>, heads * cut.chunks, kThreads, bytes, q, a);
    });
  }
  reduce<T>({.partials = partials,
             .heads = heads,
             .chunks = cut.chunks,
             .stride = total_size,
             .size = used,
             .sums = totals},
            q);
  const T *dvalues = totals, *query_dlandmarks = dvalues + size, *grad_sum = query_dlandmarks + size,
          *dpooled_mass = grad_sum + channels;
  product.transposed = true;
  product.matrix = dvalues, product.column = dpooled_mass;
  product.matrix_stride = product.column_stride = total_size;
  product.matrix_out = dsums, product.column_out = dmass;
  launch_product(product, heads, q);
  {
    KeyGradientArguments<T> keys{view(k),  view(v),  view(landmarks),
                                 view(dk), view(dv), static_cast<T>(scale)};
    const int64_t stream_bytes = plan_rounds<KeyGradientMemory<T, DK>>(m, keys);
    keys.cut = cut, keys.dsums = dsums, keys.dmass = dmass, keys.mass = data<T>(mass),
    keys.mean_value = data<T>(mean_value);
    keys.grad_sum = grad_sum, keys.total_size = total_size;
    keys.partials = partials;
    keys.share = static_cast<T>(1.0 / cut.tokens),
    keys.weight_share = static_cast<T>(2 / (cut.tokens * scale));
    keys.stream_blocks = static_cast<unsigned>(heads * cut.chunks);
    keys.through_inverse = {view(landmarks), static_cast<T>(scale), dsums, dmass, pooled_values,
                            pooled_mass,     workspace.at(share_at)};
    const int64_t blocks = heads * (cut.chunks + LandmarkGradient<T>::blocks_a_head(m));
    const int64_t bytes = std::max<int64_t>(stream_bytes, LandmarkGradientLayout<T, DK>().layout.bytes);
    with_elements<T, DK>({keys.k, keys.v, keys.landmarks, keys.dk, keys.dv}, [&]<typename S>() {
      launch(key_gradients<T, DK, S>, blocks, kThreads, bytes, q, keys);
    });
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
