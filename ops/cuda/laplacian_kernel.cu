#include "laplacian_kernel.cuh"

namespace lf {
namespace {

// kappa, or where there is an upstream gradient the weights of the points' gradients: 2 kappa / scale times
// it.
template <typename T>
struct MatrixArguments {
  View x, y, upstream, out;
  Scale<T> scale;
  int groups_per_round, rounds;
  int64_t tiles;
};

template <typename T, int DK>
struct MatrixMemory {
  Four<T>*tokens, *landmarks;
  T* columns;
  int64_t bytes;

  template <typename L>
  __host__ __device__ constexpr MatrixMemory(L layout, int groups, bool) {
    tokens = layout.template tokens<T, DK>();
    landmarks = layout.template landmarks<T, DK>(groups);
    columns = layout.template columns<T>(groups);
    bytes = layout.bytes;
  }
};

// Visits a tile's part of a matrix (tokens, landmarks), one round of landmarks, landmarks fastest.
template <typename Visit>
__device__ inline void each_of_tile(int tokens, int landmarks, const Visit& visit) {
  for (int index = threadIdx.x; index < tokens * landmarks; index += kThreads)
    visit(index / landmarks, index % landmarks);
}

template <typename T, int DK, bool kWeights>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>) matrix(const MatrixArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  const MatrixMemory<T, DK> shared(SharedMemory{memory}, a.groups_per_round, a.rounds > 1);
  const int64_t head = blockIdx.x / a.tiles, first = blockIdx.x % a.tiles * kTokens<T>;
  const Rows x = Rows::of(a.x, head), y = Rows::of(a.y, head), out = Rows::of(a.out, head);
  const int m = static_cast<int>(a.y.size[2]), per_round = a.groups_per_round * kGroup,
            count = static_cast<int>(min(static_cast<int64_t>(kTokens<T>), a.x.size[2] - first));
  for (int round = 0; round < a.rounds; ++round) {
    const Group group(round, a.groups_per_round, m);
    const int before = round * per_round, width = min(per_round, m - before);
    Columns<T> values = {};
    for (int channel = 0; channel < x.channels; channel += kSlab<DK>) {
      const Rows tokens = x.slab(channel, kSlab<DK>), landmarks = y.slab(channel, kSlab<DK>);
      __syncthreads();
      // A head of one slab keeps its tokens throughout the rounds.
      if (round == 0 || x.channels > kSlab<DK>)
        load_tokens<T, DK>(tokens.from(first), count, -kFar<T>, shared.tokens);
      LandmarkRows<T, DK, Rows>(landmarks, {before, per_round, m}, kFar<T>).put(shared.landmarks);
      __syncthreads();
      if (group.count > 0)
        add_distances<T, DK>(shared.tokens, shared.landmarks + group.row * kQuads<DK>, tokens.channels,
                             values);
    }
    if constexpr (kWeights) {
      const Rows upstream = Rows::of(a.upstream, head);
      each_of_tile(count, width, [&](int token, int column) {
        shared.columns[column * kColumnStride<T> + token] =
            load<T>(upstream.at(first + token, before + column), upstream.dtype);
      });
      __syncthreads();
    }
    if (group.count > 0) {
      T* own = shared.columns + group.row * kColumnStride<T>;
      const unsigned pairs = kernel_of_distances<T>(a.scale.exponent, values);
      if constexpr (kWeights) {
        Columns<T> upstream;
        get_columns<T>(own, upstream);
#pragma unroll
        for (int j = 0; j < kGroup; ++j) {
#pragma unroll
          for (int i = 0; i < kPerLane<T>; ++i) values[j][i] *= upstream[j][i] * a.scale.twice_inverse;
        }
        drop_coinciding<T>(pairs, values);
      }
      put_columns<T>(values, own);
    }
    __syncthreads();
    each_of_tile(count, width, [&](int token, int column) {
      store<T>(out.at(first + token, before + column), out.dtype,
               shared.columns[column * kColumnStride<T> + token]);
    });
    __syncthreads();
  }
}

// The points' gradients from their weights, a slab of channels a block.
template <typename T>
struct SignArguments {
  View weights, x, y, dx;
  int groups_per_round, rounds, slabs;
  Cut cut;
  T* partials;  // (heads, chunks, m, channels)
};

template <typename T, int DK>
struct SignMemory {
  Place* place;
  Four<T>*tokens, *dtokens, *landmarks;
  T *columns, *totals;
  int64_t bytes;

  template <typename L>
  __host__ __device__ constexpr SignMemory(L layout, int groups, bool) {
    place = layout.template take<Place>(1);
    tokens = layout.template tokens<T, DK>(), dtokens = layout.template tokens<T, DK>();
    landmarks = layout.template landmarks<T, DK>(groups);
    columns = layout.template columns<T>(groups), totals = layout.template totals<T>(groups);
    bytes = layout.bytes;
  }
};

template <typename T, int DK>
__global__ void __launch_bounds__(kThreads, kBlocksTogether<T, DK>) signs(const SignArguments<T> a) {
  LF_SHARED_MEMORY(memory);
  const SignMemory<T, DK> shared(SharedMemory{memory}, a.groups_per_round, a.rounds > 1);
  put_place(a.x, a.cut, blockIdx.x / a.slabs, shared.place);
  const int m = static_cast<int>(a.y.size[2]), channels = Rows::channels_of(a.x),
            per_round = a.groups_per_round * kGroup, channel = blockIdx.x % a.slabs * kSlab<DK>;
  for (int done = 0; done < shared.place->tokens; done += kTokens<T>) {
    const auto [first, count, begins, head] = tile_of<T>(shared.place, done);
    const Rows tokens = Rows::of(a.x, head).slab(channel, kSlab<DK>);
    __syncthreads();
    load_tokens<T, DK>(tokens.from(first), count, -kFar<T>, shared.tokens);
    for (int round = 0; round < a.rounds; ++round) {
      const Group group(round, a.groups_per_round, m);
      const int before = round * per_round;
      LandmarkRows<T, DK, Rows>(Rows::of(a.y, head).slab(channel, kSlab<DK>), {before, per_round, m}, kFar<T>)
          .put(shared.landmarks);
      const Rows weights = Rows::of(a.weights, head);
      each_of_tile(kTokens<T>, per_round, [&](int token, int column) {
        const bool real = token < count && before + column < m;
        shared.columns[column * kColumnStride<T> + token] =
            real ? load<T>(weights.at(first + token, before + column), weights.dtype) : T{0};
      });
      __syncthreads();
      T *own = shared.columns + group.row * kColumnStride<T>,
        *totals = shared.totals + group.row / kGroup * kColumnStride<T>;
      if (group.count > 0) {
        Columns<T> doubled;
        get_columns<T>(own, doubled);
        put_totals<T>(doubled, totals);
        __syncwarp();
      }
      LandmarkGradients<T, DK> gradients;
      sign_gradients<T, DK>(own, totals, shared.tokens, shared.landmarks + group.row * kQuads<DK>,
                            group.count > 0, round == 0, shared.dtokens, gradients);
      if (group.count > 0) {
        Vector<T, DK> sums[kGroup];
        gradients.finish(sums);
        add_rows<T, DK, Rows>(sums, group, tokens.channels, channels, begins,
                              a.partials + shared.place->chunk * m * channels + channel);
      }
    }
    store_tokens<T, DK>(shared.dtokens, Rows::of(a.dx, head).slab(channel, kSlab<DK>).from(first), count);
  }
}

constexpr int kSlices = 8;

template <typename T>
__global__ void __launch_bounds__(kThreads) reduce_partials(const Reduction<T> a) {
  __shared__ T parts[kSlices][kWarp];
  const int lane = threadIdx.x % kWarp, slice = threadIdx.x / kWarp;
  const int64_t blocks = (a.size + kWarp - 1) / kWarp, head = blockIdx.x / blocks,
                index = blockIdx.x % blocks * kWarp + lane;
  T sum = 0;
  if (index < a.size) {
    const T* from = a.partials + head * a.chunks * a.stride + index;
    for (int64_t chunk = slice; chunk < a.chunks; chunk += kSlices) sum += from[chunk * a.stride];
  }
  parts[slice][lane] = sum;
  __syncthreads();
  if (slice > 0 || index >= a.size) return;
#pragma unroll
  for (int s = 1; s < kSlices; ++s) sum += parts[s][lane];
  if (a.more) sum += a.more[head * a.more_stride + index];
  if (a.and_more) sum += a.and_more[head * a.and_more_stride + index];
  if (a.sums) {
    a.sums[head * a.stride + index] = sum;
  } else {
    const Rows out = Rows::of(a.out, head);
    store<T>(out.at(index / out.channels, static_cast<int>(index % out.channels)), out.dtype, sum);
  }
}

Tensor laplacian_kernel(const Tensor& x, const Tensor& y, double scale) {
  check_points(x, y, "x and y");
  const OnDeviceOf guard(x);
  Tensor out = empty({x.size(0), x.size(1), x.size(2), y.size(2)}, x.scalar_type(), x);
  kernel_matrix(x, y, scale, out);
  return out;
}

std::tuple<Tensor, Tensor> laplacian_kernel_backward(const Tensor& grad, const Tensor& x, const Tensor& y,
                                                     double scale) {
  check_kernel_gradient(grad, x, y);
  const OnDeviceOf guard(x);
  Tensor dx = empty_tokens(x), dy = empty_tokens(y);
  kernel_gradients(grad, x, y, scale, dx, dy);
  return {dx, dy};
}

// Pairs of a thread in one step of the floor's loop.
constexpr int kFloorPairs = 16;

// What a pair of channels costs at the least: a subtraction, and an addition that drops the sign. Each
// difference starts from the one before, so that the compiler can take none out of the loop.
template <typename T>
__global__ void __launch_bounds__(kThreads) floor_loop(int steps, T there, T* out) {
  T sum[kFloorPairs] = {}, difference[kFloorPairs];
#pragma unroll
  for (int j = 0; j < kFloorPairs; ++j) difference[j] = static_cast<T>(threadIdx.x + j);
#pragma unroll 8
  for (int step = 0; step < steps; ++step) {
#pragma unroll
    for (int j = 0; j < kFloorPairs; ++j) {
      difference[j] -= there;
      sum[j] += absolute(difference[j]);
    }
  }
  T total = 0;
#pragma unroll
  for (int j = 0; j < kFloorPairs; ++j) total += sum[j];
  if (total == T{-1} || (blockIdx.x == 0 && threadIdx.x == 0)) *out = total;
}

Tensor arithmetic_floor(const Tensor& like, int64_t pairs) {
  const OnDeviceOf guard(like);
  Tensor out = empty({1}, ScalarType::Float, like);
  int device = 0, processors = 0;
  check(cudaGetDevice(&device));
  check(cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device));
  const int64_t blocks = processors * 4,
                steps = std::max<int64_t>(1, pairs / (kFloorPairs * kThreads * blocks));
  launch(floor_loop<float>, blocks, kThreads, 0, like, static_cast<int>(std::min<int64_t>(steps, INT32_MAX)),
         0.5f, data<float>(out));
  return out;
}

}  // namespace

namespace {

template <bool kWeights>
void launch_matrix(const Tensor& x, const Tensor& y, double scale, const View& upstream, const Tensor& out) {
  with_slabs(x, [&]<typename T, int DK>() {
    const int64_t tiles = (x.size(2) + kTokens<T> - 1) / kTokens<T>;
    MatrixArguments<T> a{view(x), view(y), upstream, view(out), static_cast<T>(scale), 0, 0, tiles};
    const int64_t bytes = plan_rounds<MatrixMemory<T, DK>>(y.size(2), a);
    launch(matrix<T, DK, kWeights>, a.x.heads() * a.tiles, kThreads, bytes, x, a);
  });
}

}  // namespace

void kernel_matrix(const Tensor& x, const Tensor& y, double scale, const Tensor& out) {
  launch_matrix<false>(x, y, scale, {}, out);
}

void kernel_gradients(const Tensor& grad, const Tensor& x, const Tensor& y, double scale, const Tensor& dx,
                      const Tensor& dy) {
  const int64_t heads = x.size(0) * x.size(1), m = y.size(2), channels = x.size(3);
  const Tensor weights = empty({x.size(0), x.size(1), x.size(2), m}, compute_type(x), x);
  launch_matrix<true>(x, y, scale, view(grad), weights);
  with_slabs(x, [&]<typename T, int DK>() {
    const Cut cut = cut_of<T>(x);
    const Tensor partials = empty({heads, cut.chunks, m, channels}, compute_type(x), x);
    const int slabs = static_cast<int>((channels + kSlab<DK> - 1) / kSlab<DK>);
    SignArguments<T> a{view(weights), view(x), view(y), view(dx), 0, 0, slabs, cut, data<T>(partials)};
    const int64_t bytes = plan_rounds<SignMemory<T, DK>>(m, a);
    launch(signs<T, DK>, heads * cut.chunks * slabs, kThreads, bytes, x, a);
    reduce<T>({.partials = data<T>(partials),
               .heads = heads,
               .chunks = cut.chunks,
               .stride = m * channels,
               .size = m * channels,
               .out = view(dy)},
              x);
  });
}

template <typename T>
void reduce(const Reduction<T>& reduction, const Tensor& like) {
  launch(reduce_partials<T>, reduction.heads * ((reduction.size + kWarp - 1) / kWarp), kThreads, 0, like,
         reduction);
}

template void reduce<float>(const Reduction<float>&, const Tensor&);
template void reduce<double>(const Reduction<double>&, const Tensor&);

}  // namespace lf

LF_IMPLEMENT(LF_CUDA_KEY, m) {
  m.impl("laplacian_kernel", TORCH_BOX(&lf::laplacian_kernel));
  m.impl("laplacian_kernel_backward", TORCH_BOX(&lf::laplacian_kernel_backward));
  m.impl("arithmetic_floor", TORCH_BOX(&lf::arithmetic_floor));
}
