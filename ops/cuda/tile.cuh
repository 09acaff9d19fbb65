// A block of 8 warps on a tile of tokens: each warp takes kGroup landmarks, each lane kPerLane tokens (for
// what lies between tokens and landmarks) or every 32nd channel (for sums over tokens). docs/operators.md
// derives the sizes from the instruction floor.
#pragma once

#include "device.cuh"

#include "cut.h"

namespace lf {

constexpr int kGroup = 7;  // 7 x 7 = 49 landmarks, the default, fill 7 warps without a remainder

template <typename T>
constexpr int kPerLane = sizeof(T) == 4 ? 2 : 1;
template <typename T>
constexpr int kTokens = kWarp * kPerLane<T>;
// Strides that keep shared memory free of bank conflicts: one Four more than the tokens, one Four more than a
// row of columns.
template <typename T>
constexpr int kTokenStride = kTokens<T> + 1;
template <typename T>
constexpr int kColumnStride = kTokens<T> + 4;

// Two blocks share a multiprocessor where shared memory lets them; else one may have all the registers.
template <typename T, int DK>
constexpr int kBlocksTogether = sizeof(T) == 4 && DK <= 2 ? 2 : 1;

// Channels come in DK vectors of 32; `kQuads` Fours of them.
template <int DK>
constexpr int kQuads = 8 * DK;

// Tokens of a tile, channel quads apart: quads[quad * kTokenStride + token].
template <typename T, int DK>
__device__ inline void load_tokens(const Rows& rows, int64_t first, int count, Four<T>* to) {
#pragma unroll 1
  for (int index = threadIdx.x; index < kTokens<T> * kQuads<DK>; index += kThreads) {
    const int quad = index % kQuads<DK>, token = index / kQuads<DK>;
    Four<T> value = {};
    if (token < count && 4 * quad < rows.channels) value = rows.four<T>(first + token, 4 * quad);
    to[quad * kTokenStride<T> + token] = value;
  }
}

template <typename T>
__device__ inline T& token_channel(Four<T>* tokens, int token, int channel) {
  return tokens[(channel / 4) * kTokenStride<T> + token].at[channel % 4];
}

// Per-landmark rows, as they are: to[row * kQuads + quad]; rows from `end` on are zero.
template <typename T, int DK>
__device__ inline void load_landmarks(const Rows& rows, int first, int count, int end, Four<T>* to) {
#pragma unroll 1
  for (int index = threadIdx.x; index < count * kQuads<DK>; index += kThreads) {
    const int quad = index % kQuads<DK>, row = index / kQuads<DK>;
    Four<T> value = {};
    if (first + row < end && 4 * quad < rows.channels) value = rows.four<T>(first + row, 4 * quad);
    to[index] = value;
  }
}

// Which landmarks a warp has in a round: rows of the round's arrays, of all landmarks, and how many are real.
struct Group {
  int row, first, count;

  __device__ Group(int round, int groups_per_round, int m) {
    const int warp = threadIdx.x / kWarp;
    row = warp * kGroup;
    first = (round * groups_per_round + warp) * kGroup;
    count = warp < groups_per_round ? max(0, min(kGroup, m - first)) : 0;
  }
};

// Channel quads added up before their sum joins the rest: long chains of additions would gather rounding
// errors.
constexpr int kSummedQuads = 8;

template <typename T>
using Columns = T[kGroup][kPerLane<T>];

// sum[j][i] += term(token's channel, landmark's channel) over some quads of channels, for the lanes' tokens
// and the warp's landmarks.
template <typename T, int DK, typename Term>
__device__ inline void add_channels(const Four<T>* tokens, const Four<T>* landmarks, int first_quad,
                                    int end_quad, Term term, Columns<T>& sum) {
  const int lane = threadIdx.x % kWarp;
  for (int quad = first_quad; quad < end_quad; ++quad) {
    Four<T> here[kPerLane<T>];
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) here[i] = tokens[quad * kTokenStride<T> + lane + i * kWarp];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const Four<T> there = landmarks[j * kQuads<DK> + quad];
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) {
#pragma unroll
        for (int u = 0; u < 4; ++u) sum[j][i] += term(here[i].at[u], there.at[u]);
      }
    }
  }
}

template <typename T>
__device__ inline void clear_columns(Columns<T>& columns) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) columns[j][i] = 0;
  }
}

// kappa between the lanes' tokens and the warp's landmarks, 0 beyond the real ones.
template <typename T, int DK>
__device__ inline void kernel_columns(const Four<T>* tokens, const Four<T>* landmarks, int channels,
                                      int token_count, int group_count, T scale, Columns<T>& out) {
  const int lane = threadIdx.x % kWarp, quads = (channels + 3) / 4;
  clear_columns<T>(out);
  for (int first = 0; first < quads; first += kSummedQuads) {
    Columns<T> sum = {};
    add_channels<T, DK>(
        tokens, landmarks, first, min(quads, first + kSummedQuads), [](T x, T y) { return absolute(x - y); },
        sum);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) out[j][i] += sum[j][i];
    }
  }
  const T factor = -1 / scale;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) {
      const bool real = j < group_count && lane + i * kWarp < token_count;
      out[j][i] = real ? exponential(out[j][i] * factor) : T{0};
    }
  }
}

// Inner products of the lanes' tokens with the warp's landmark rows.
template <typename T, int DK>
__device__ inline void product_columns(const Four<T>* tokens, const Four<T>* landmarks, int channels,
                                       Columns<T>& out) {
  clear_columns<T>(out);
  add_channels<T, DK>(tokens, landmarks, 0, (channels + 3) / 4, [](T x, T y) { return x * y; }, out);
}

// The warp's columns into its rows of shared memory; only this warp reads them until a barrier.
template <typename T>
__device__ inline void put_columns(const Columns<T>& values, T* columns) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) columns[j * kColumnStride<T> + lane + i * kWarp] = values[j][i];
  }
}

// sum[j][k] = sum over the tile's tokens of column j times channel lane + 32 k.
template <typename T, int DK>
__device__ inline void sum_over_tokens(const T* columns, Four<T>* tokens, T (&sum)[kGroup][DK]) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int k = 0; k < DK; ++k) sum[j][k] = 0;
  }
#pragma unroll 1
  for (int token = 0; token < kTokens<T>; token += 4) {
    Four<T> weights[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      weights[j] = *reinterpret_cast<const Four<T>*>(columns + j * kColumnStride<T> + token);
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      T value[DK];
#pragma unroll
      for (int k = 0; k < DK; ++k) value[k] = token_channel(tokens, token + u, lane + k * kWarp);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int k = 0; k < DK; ++k) sum[j][k] += weights[j].at[u] * value[k];
      }
    }
  }
}

// Tokens of a tile that a warp takes in what is written per token.
template <typename T>
constexpr int kOwn = kTokens<T> / kWarps;

// out[i][k] += sum over a round's landmarks of column times the landmark's channel lane + 32 k, for the
// warp's own tokens.
template <typename T, int DK>
__device__ inline void sum_over_landmarks(const T* columns, const Four<T>* landmarks, int rows,
                                          T (&out)[kOwn<T>][DK]) {
  const int lane = threadIdx.x % kWarp, first = threadIdx.x / kWarp * kOwn<T>;
  const T* channels = reinterpret_cast<const T*>(landmarks);
#pragma unroll 1  // Unrolled loops would take registers that the sums need.
  for (int row = 0; row < rows; ++row) {
    T value[DK];
#pragma unroll
    for (int k = 0; k < DK; ++k) value[k] = channels[row * 4 * kQuads<DK> + lane + k * kWarp];
#pragma unroll
    for (int i = 0; i < kOwn<T>; i += 4) {
      const Four<T> weights = *reinterpret_cast<const Four<T>*>(columns + row * kColumnStride<T> + first + i);
#pragma unroll
      for (int u = 0; u < 4; ++u) {
#pragma unroll
        for (int k = 0; k < DK; ++k) out[i + u][k] += weights.at[u] * value[k];
      }
    }
  }
}

// Per channel, the sum over the tile's tokens; `parts` holds kWarps rows of 32 DK, thread c gets channel c's
// sum. Two barriers inside.
template <typename T, int DK>
__device__ inline T channel_sum(Four<T>* tokens, T* parts) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
#pragma unroll
  for (int k = 0; k < DK; ++k) {
    T sum = 0;
#pragma unroll
    for (int i = 0; i < kOwn<T>; ++i) sum += token_channel(tokens, warp * kOwn<T> + i, lane + k * kWarp);
    parts[(warp * DK + k) * kWarp + lane] = sum;
  }
  __syncthreads();
  T total = 0;
  if (threadIdx.x < DK * kWarp) {
#pragma unroll
    for (int w = 0; w < kWarps; ++w) total += parts[w * DK * kWarp + threadIdx.x];
  }
  __syncthreads();
  return total;
}

// Gradients of an L1 distance: with t = w_ij sign(x_ic - y_jc), token i loses t and landmark j gains it. Each
// warp has its landmarks' rows of `columns` (w); the warps take turns on eighths of the tokens, so that no
// two write one token at a time, in an order that is always the same. All warps of the block must come here.
template <typename T, int DK>
__device__ inline void sign_gradients(const T* columns, Four<T>* tokens, const Four<T>* landmarks,
                                      bool active, Four<T>* dtokens, T (&dlandmarks)[kGroup][DK]) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* channels = reinterpret_cast<const T*>(landmarks);
  T there[kGroup][DK];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int k = 0; k < DK; ++k) {
      there[j][k] = active ? channels[j * 4 * kQuads<DK> + lane + k * kWarp] : T{0};
      dlandmarks[j][k] = 0;
    }
  }
  for (int turn = 0; turn < kWarps; ++turn) {
    const int first = (warp + turn) % kWarps * kOwn<T>;
    if (active) {
      // Two tokens at a time: four would not leave registers for the landmarks.
#pragma unroll 1
      for (int i = 0; i < kOwn<T>; i += 2) {
        Two<T> weights[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j)
          weights[j] = *reinterpret_cast<const Two<T>*>(columns + j * kColumnStride<T> + first + i);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
#pragma unroll
          for (int k = 0; k < DK; ++k) {
            const T here = token_channel(tokens, first + i + u, lane + k * kWarp);
            T own = 0;
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
              const T t = signed_by(here - there[j][k], weights[j].at[u]);
              own += t;
              dlandmarks[j][k] += t;
            }
            token_channel(dtokens, first + i + u, lane + k * kWarp) -= own;
          }
        }
      }
    }
    __syncthreads();
  }
}

template <typename T, int DK>
__device__ inline void clear_tokens(Four<T>* tokens) {
#pragma unroll 1
  for (int index = threadIdx.x; index < kQuads<DK> * kTokenStride<T>; index += kThreads) tokens[index] = {};
}

// A tile's tokens into a tensor, rounding once.
template <typename T, int DK>
__device__ inline void store_tokens(Four<T>* tokens, const Rows& rows, int64_t first, int count) {
#pragma unroll 1
  for (int index = threadIdx.x; index < count * DK * kWarp; index += kThreads) {
    const int channel = index % (DK * kWarp), token = index / (DK * kWarp);
    if (channel < rows.channels)
      store<T>(rows.at(first + token, channel), rows.dtype, token_channel(tokens, token, channel));
  }
}

// The warp's per-landmark sums into the chunk's partial sums (stride `channels`): set by the chunk's first
// tile, added to by the others.
template <typename T, int DK>
__device__ inline void add_rows(const T (&sum)[kGroup][DK], const Group& group, int channels, bool set,
                                T* partial) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int k = 0; k < DK; ++k) {
      const int channel = lane + k * kWarp;
      if (j < group.count && channel < channels) {
        T* to = partial + static_cast<int64_t>(group.first + j) * channels + channel;
        *to = set ? sum[j][k] : *to + sum[j][k];
      }
    }
  }
}

template <typename T>
__device__ inline void add_scalar(T lane_value, bool set, T* to) {
  const T sum = warp_sum(lane_value);
  if (threadIdx.x % kWarp == 0) *to = set ? sum : *to + sum;
}

// The chunks of (batch, heads, tokens, channels).
template <typename T>
Cut cut_of(const Tensor& tokens) {
  return Cut::of(tokens.size(0), tokens.size(1), tokens.size(2), kTokens<T>);
}

// Landmark groups in a round: as many as warps, or as shared memory has room for.
inline int groups_that_fit(int64_t m, int64_t fixed_bytes, int64_t bytes_per_group) {
  const int64_t groups = std::max<int64_t>(1, (m + kGroup - 1) / kGroup);
  const int64_t fit = std::min<int64_t>((shared_memory_limit() - fixed_bytes) / bytes_per_group, kWarps);
  STD_TORCH_CHECK(fit >= 1,
                  "lf_dense: this GPU has too little shared memory for so many channels a head; use the "
                  "backend 'reference'.");
  const int64_t rounds = (groups + fit - 1) / fit;
  return static_cast<int>((groups + rounds - 1) / rounds);
}

template <typename T, int DK>
constexpr int64_t kTokenBytes = sizeof(Four<T>) * kQuads<DK> * kTokenStride<T>;
template <typename T, int DK>
constexpr int64_t kLandmarkBytes = sizeof(Four<T>) * kQuads<DK> * kGroup;
template <typename T>
constexpr int64_t kColumnBytes = sizeof(T) * kColumnStride<T> * kGroup;

inline int rounds_of(int64_t m, int groups_per_round) {
  const int64_t groups = std::max<int64_t>(1, (m + kGroup - 1) / kGroup);
  return static_cast<int>((groups + groups_per_round - 1) / groups_per_round);
}

// Calls run<T, DK>() for the tensors' compute type and channels.
template <typename Run>
void with_tiling(const Tensor& points, const Run& run) {
  const int64_t channels = points.size(3), vectors = (channels + kWarp - 1) / kWarp;
  STD_TORCH_CHECK(vectors <= 4,
                  "lf_dense: the CUDA operators take up to 128 channels a head, and these have ", channels,
                  ".");
  if (points.scalar_type() == ScalarType::Double) {
    vectors <= 2 ? run.template operator()<double, 2>() : run.template operator()<double, 4>();
  } else if (vectors <= 1) {
    run.template operator()<float, 1>();
  } else if (vectors == 2) {
    run.template operator()<float, 2>();
  } else {
    run.template operator()<float, 4>();
  }
}

}  // namespace lf
