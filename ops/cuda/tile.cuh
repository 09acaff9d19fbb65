// A block of 8 warps on a tile of tokens: each warp takes kGroup landmarks, each lane kPerLane tokens (for
// what lies between tokens and landmarks) or DK channels (for sums over tokens). docs/operators.md
// derives the sizes from the instruction floor.
#pragma once

#include <limits>

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

// Gradients of rows of any strides need more registers than half of them.
template <typename T, int DK, typename S>
constexpr int kGradientBlocksTogether = std::is_same_v<S, Any> ? 1 : kBlocksTogether<T, DK>;

// Channels come in DK vectors of 32; `kQuads` Fours of them.
template <int DK>
constexpr int kQuads = 8 * DK;

// Rows that no token or landmark has lie as far away as numbers reach, tokens on the other side than
// landmarks: their kernel is 0 without a comparison. At infinity an infinite token would give NaN.
template <typename T>
constexpr T kFar = std::numeric_limits<T>::max();

// In sums over tokens and over landmarks a lane has V neighbouring channels, and the lanes with the same ones
// a share of the tokens each: V = 4 takes the fewest reads, V = DK the fewest registers.
template <int DK, int V = 4>
constexpr int kShares = V / DK;

template <int DK, int V = 4>
__device__ inline int own_channel() {
  return V * (static_cast<int>(threadIdx.x % (kWarp * DK / V)));
}
template <int DK>
__device__ inline int own_quad() {
  return static_cast<int>(threadIdx.x % kQuads<DK>);
}
template <int DK, int V = 4>
__device__ inline int own_share() {
  return static_cast<int>(threadIdx.x % kWarp / (kWarp * DK / V));
}

// The shares' sums added up, in every lane.
template <typename T, int DK, int V = 4>
__device__ inline T sum_of_shares(T value) {
#pragma unroll
  for (int offset = kWarp * DK / V; offset < kWarp; offset *= 2)
    value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// The lane's channels of a tile's first token; those of token i are 4 i numbers on.
template <typename T, int DK, int V>
__device__ inline T* lane_channels(Four<T>* tokens) {
  return tokens[own_channel<DK, V>() / 4 * kTokenStride<T>].at + own_channel<DK, V>() % 4;
}

// Of each tile a thread has one quad of channels and every kApart-th token: what belongs to channels stays in
// its registers.
template <int DK>
constexpr int kApart = kThreads / kQuads<DK>;
template <typename T, int DK>
using OwnQuads = Four<T>[kTokens<T> / kApart<DK>];

// Rows of any strides take registers for addresses: one quad of a thread after another goes through shared
// memory. Others go through registers, all at once.
template <typename R>
constexpr bool kOneByOne = std::is_same_v<R, Rows>;

// The thread's quads of a tile whose first token is the first row. Quads lie apart: tokens[quad *
// kTokenStride + token]; `tokens` may be used on the way.
template <typename T, int DK, typename R>
__device__ inline void read_tokens(const R& rows, int count, T beyond, Four<T>* tokens,
                                   OwnQuads<T, DK>& own) {
  constexpr int quads = kTokens<T> / kApart<DK>;
  const int quad = own_quad<DK>(), token = threadIdx.x / kQuads<DK>;
  if constexpr (kOneByOne<R>) {
    tokens += quad * kTokenStride<T>;
#pragma unroll 1
    for (int t = token; t < kTokens<T>; t += kApart<DK>) {
      const T empty = t < count ? T{0} : beyond;
      tokens[t] = {empty, empty, empty, empty};
      if (t < count && 4 * quad < rows.channels) tokens[t] = rows.template four<T>(t, 4 * quad);
    }
#pragma unroll
    for (int i = 0; i < quads; ++i) own[i] = tokens[token + i * kApart<DK>];
  } else if (count == kTokens<T>) {
#pragma unroll
    for (int i = 0; i < quads; ++i) own[i] = rows.template four<T>(token + i * kApart<DK>, 4 * quad);
  } else {
#pragma unroll
    for (int i = 0; i < quads; ++i) {
      own[i] = {beyond, beyond, beyond, beyond};
      if (token + i * kApart<DK> < count) own[i] = rows.template four<T>(token + i * kApart<DK>, 4 * quad);
    }
  }
}

template <typename T, int DK>
__device__ inline void put_tokens(const OwnQuads<T, DK>& own, Four<T>* tokens) {
  const int quad = own_quad<DK>(), token = threadIdx.x / kQuads<DK>;
#pragma unroll
  for (int i = 0; i < kTokens<T> / kApart<DK>; ++i)
    tokens[quad * kTokenStride<T> + token + i * kApart<DK>] = own[i];
}

template <typename T, int DK, typename R>
__device__ inline void load_tokens(const R& rows, int count, T beyond, Four<T>* to) {
  OwnQuads<T, DK> own;
  read_tokens<T, DK>(rows, count, beyond, to, own);
  if constexpr (!kOneByOne<R>) put_tokens<T, DK>(own, to);
}

// Some tokens' rows, from `first` on, of the thread's quad; `tokens` may be used on the way.
template <typename T, int DK, int N, typename R>
__device__ inline void put_rows(const Four<T> (&values)[N], const R& rows, int first, int count,
                                Four<T>* tokens) {
  const int quad = own_quad<DK>();
  if constexpr (kOneByOne<R>) {
    tokens += quad * kTokenStride<T> + first;
#pragma unroll
    for (int i = 0; i < N; ++i) tokens[i] = values[i];
#pragma unroll 1
    for (int i = 0; i < N && first + i < count; ++i) rows.put(first + i, 4 * quad, tokens[i]);
  } else {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      if (first + i < count) rows.put(first + i, 4 * quad, values[i]);
    }
  }
}

// From the real tokens; the others stay 0.
template <typename T, int DK>
__device__ inline void subtract(const Four<T>& shift, int count, OwnQuads<T, DK>& own) {
#pragma unroll
  for (int i = 0; i < kTokens<T> / kApart<DK>; ++i) {
#pragma unroll
    for (int u = 0; u < 4; ++u) own[i].at[u] -= shift.at[u];
  }
  if (count == kTokens<T>) return;
#pragma unroll
  for (int i = 0; i < kTokens<T> / kApart<DK>; ++i) {
    if (static_cast<int>(threadIdx.x / kQuads<DK>) + i * kApart<DK> >= count) own[i] = {};
  }
}

// The mean over a tile's tokens, quad by quad; `parts` holds a row of quads a warp. Two barriers inside.
template <typename T, int DK>
__device__ inline void mean_of_tokens(const OwnQuads<T, DK>& own, int count, Four<T>* parts, Four<T>* mean) {
  Four<T> sum = {};
#pragma unroll
  for (int u = 0; u < 4; ++u) {
#pragma unroll
    for (int i = 0; i < kTokens<T> / kApart<DK>; ++i) sum.at[u] += own[i].at[u];
    sum.at[u] = sum_of_shares<T, DK>(sum.at[u]);
  }
  if (threadIdx.x % kWarp < kQuads<DK>) parts[threadIdx.x / kWarp * kQuads<DK> + own_quad<DK>()] = sum;
  __syncthreads();
  constexpr int channels = 4 * kQuads<DK>;
  if (static_cast<int>(threadIdx.x) < channels) {
    const T* part = reinterpret_cast<const T*>(parts) + threadIdx.x;
    T all = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) all += part[w * channels];
    reinterpret_cast<T*>(mean)[threadIdx.x] = all / static_cast<T>(count);
  }
  __syncthreads();
}

// Some of the landmarks: rows `first` and on of which those from `end` on do not exist.
struct Landmarks {
  int first, count, end;
};

// Per-landmark rows on their way into shared memory: all that a kernel needs is read before any of it is put
// there, since it comes from far away. Rows of any strides are read one by one when they are put.
template <typename T, int DK, typename R>
class LandmarkRows {
 public:
  // Rows that do not exist are `beyond`.
  __device__ LandmarkRows(const R& rows, const Landmarks& which, T beyond)
      : rows_(rows), which_(which), beyond_(beyond) {
    if constexpr (!kOneByOne<R>) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) own_[i] = at(i);
    }
  }

  // As they are: to[row * kQuads + quad].
  __device__ void put(Four<T>* to) const {
    const auto put = [&](int i, const Four<T>& value) { to[row(i) * kQuads<DK> + own_quad<DK>()] = value; };
    if constexpr (kOneByOne<R>) {
#pragma unroll 1
      for (int i = 0; row(i) < which_.count; ++i) put(i, at(i));
    } else {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (row(i) < which_.count) put(i, own_[i]);
      }
    }
  }

 private:
  static constexpr int kOwn = (kWarps * kGroup + kApart<DK> - 1) / kApart<DK>;

  __device__ static int row(int i) { return threadIdx.x / kQuads<DK> + i * kApart<DK>; }
  __device__ Four<T> at(int i) const {
    const int landmark = which_.first + row(i), channel = 4 * own_quad<DK>();
    const bool real = row(i) < which_.count && landmark < which_.end;
    const T empty = real ? T{0} : beyond_;
    Four<T> value = {empty, empty, empty, empty};
    if (real && channel < rows_.channels) value = rows_.template four<T>(landmark, channel);
    return value;
  }

  R rows_;
  Landmarks which_;
  T beyond_;
  Four<T> own_[kOneByOne<R> ? 1 : kOwn];
};

// A number a landmark, in the same way; 0 for those that do not exist.
template <typename T>
class LandmarkNumbers {
 public:
  __device__ LandmarkNumbers(const T* from, const Landmarks& which)
      : count_(which.count),
        own_(own() < count_ && which.first + own() < which.end ? from[which.first + own()] : T{0}) {}
  __device__ void put(T* to) const {
    if (own() < count_) to[own()] = own_;
  }

 private:
  static_assert(kWarps * kGroup <= kThreads);
  __device__ static int own() { return static_cast<int>(threadIdx.x); }
  int count_;
  T own_;
};

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

__host__ __device__ inline int groups_of(int landmarks) { return (landmarks + kGroup - 1) / kGroup; }

// Channel quads added up before their sum joins the rest: long chains of additions would gather rounding
// errors.
constexpr int kSummedQuads = 8;

template <typename T>
using Columns = T[kGroup][kPerLane<T>];

// sum[j][i] += term(token's channel, landmark's channel) over `quads` quads of channels, an even number, from
// those that the pointers show, for the lanes' tokens and the warp's landmarks.
template <typename T, int DK, int Together, typename Term>
__device__ inline void add_channels(const Four<T>* tokens, const Four<T>* landmarks, int quads, Term term,
                                    Columns<T>& sum) {
  tokens += threadIdx.x % kWarp;
  const Four<T>* end = landmarks + quads;
#pragma unroll 1
  for (; landmarks < end; landmarks += Together, tokens += Together * kTokenStride<T>) {
#pragma unroll
    for (int quad = 0; quad < Together; ++quad) {
      Four<T> here[kPerLane<T>];
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) here[i] = tokens[quad * kTokenStride<T> + i * kWarp];
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
}

template <typename T, int N>
__device__ inline void clear(T (&numbers)[N]) {
#pragma unroll
  for (int i = 0; i < N; ++i) numbers[i] = T{};
}

// Quads of channels to add up, to an even number; beyond the channels they are 0.
__device__ inline int even_quads(int channels) { return (channels + 7) / 8 * 2; }

// The kernel's scale, and the quotients by it that kernels would spend instructions and registers on.
template <typename T>
struct Scale {
  T value, exponent, twice_inverse;

  Scale(T scale)
      : value(scale), exponent(static_cast<T>(-1.4426950408889634) / scale), twice_inverse(2 / scale) {}
  __host__ __device__ operator T() const { return value; }
};

// Which of a lane's pairs of token and landmark coincide: bit j kPerLane + i.
template <typename T>
__device__ inline unsigned coinciding(const Columns<T>& distance) {
  T least = distance[0][0];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) least = min(least, distance[j][i]);
  }
  unsigned pairs = 0;
  if (least == 0) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) {
        const bool met = distance[j][i] == 0;  // inside of the shift, GCC 12 takes it wrongly with UBSan
        pairs |= (met ? 1u : 0u) << (j * kPerLane<T> + i);
      }
    }
  }
  return pairs;
}

// No weight where the points coincide: their signs are all 0, and a weight that takes part in sums only to be
// subtracted again would leave its rounding there, however small the others are.
template <typename T>
__device__ inline void drop_coinciding(unsigned pairs, Columns<T>& weights) {
  if (pairs == 0) return;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) {
      if (pairs >> (j * kPerLane<T> + i) & 1u) weights[j][i] = 0;
    }
  }
}

template <typename T, int DK>
__device__ inline void add_absolute(const Four<T>* tokens, const Four<T>* landmarks, int quads,
                                    Columns<T>& sum) {
  add_channels<T, DK, 2>(tokens, landmarks, quads, [](T x, T y) { return absolute(x - y); }, sum);
}

// out[j][i] += the L1 distance between the lanes' tokens and the warp's landmarks in these channels.
template <typename T, int DK>
__device__ inline void add_distances(const Four<T>* tokens, const Four<T>* landmarks, int channels,
                                     Columns<T>& out) {
  const int quads = even_quads(channels);
  for (int first = 0; first < quads; first += kSummedQuads) {
    Columns<T> sum = {};
    add_absolute<T, DK>(tokens + first * kTokenStride<T>, landmarks + first, min(quads - first, kSummedQuads),
                        sum);
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
#pragma unroll
      for (int i = 0; i < kPerLane<T>; ++i) out[j][i] += sum[j][i];
    }
  }
}

// Distances become kappa, 2 to the power of the distance times `exponent`; gives the pairs that coincide.
template <typename T>
__device__ inline unsigned kernel_of_distances(T exponent, Columns<T>& columns) {
  const unsigned pairs = coinciding<T>(columns);
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) columns[j][i] = power_of_two(columns[j][i] * exponent);
  }
  return pairs;
}

// Both of all channels.
template <typename T, int DK>
__device__ inline unsigned kernel_columns(const Four<T>* tokens, const Four<T>* landmarks, int channels,
                                          T exponent, Columns<T>& out) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) clear(out[j]);
  constexpr int first = kSummedQuads;
  add_absolute<T, DK>(tokens, landmarks, min(even_quads(channels), first), out);
  if constexpr (kQuads<DK> > first)
    add_distances<T, DK>(tokens + first * kTokenStride<T>, landmarks + first, channels - 4 * first, out);
  return kernel_of_distances<T>(exponent, out);
}

// Inner products of the lanes' tokens with the warp's landmark rows.
template <typename T, int DK>
__device__ inline void product_columns(const Four<T>* tokens, const Four<T>* landmarks, int channels,
                                       Columns<T>& out) {
#pragma unroll
  for (int j = 0; j < kGroup; ++j) clear(out[j]);
  add_channels<T, DK, 1>(tokens, landmarks, even_quads(channels), [](T x, T y) { return x * y; }, out);
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

template <typename T>
__device__ inline void get_columns(const T* columns, Columns<T>& values) {
  const int lane = threadIdx.x % kWarp;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int i = 0; i < kPerLane<T>; ++i) values[j][i] = columns[j * kColumnStride<T> + lane + i * kWarp];
  }
}

// sum[j] += sum over the share's tokens of column j times the lane's channels.
template <typename T, int DK, int V>
__device__ inline void sum_over_tokens(const T* columns, Four<T>* tokens, Vector<T, V> (&sum)[kGroup]) {
  columns += 4 * own_share<DK, V>();
  const T* own = lane_channels<T, DK, V>(tokens) + 16 * own_share<DK, V>();
  const T* end = columns + kTokens<T>;
#pragma unroll 1
  for (; columns < end; columns += 4 * kShares<DK, V>, own += 16 * kShares<DK, V>) {
    Four<T> weights[kGroup];
#pragma unroll
    for (int j = 0; j < kGroup; ++j) weights[j] = vector_at<4>(columns + j * kColumnStride<T>);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const Vector<T, V> value = vector_at<V>(own + 4 * i);
#pragma unroll
      for (int j = 0; j < kGroup; ++j) {
#pragma unroll
        for (int u = 0; u < V; ++u) sum[j].at[u] += weights[j].at[i] * value.at[u];
      }
    }
  }
}

// Tokens of a tile that a warp takes in what is written per token, and a share of lanes.
template <typename T>
constexpr int kOwn = kTokens<T> / kWarps;
template <typename T, int DK>
constexpr int kOwnOfShare = kOwn<T> / kShares<DK>;

template <typename T, int DK>
__device__ inline int first_own_token() {
  return static_cast<int>(threadIdx.x / kWarp) * kOwn<T> + own_share<DK>() * kOwnOfShare<T, DK>;
}

// Sums over tokens of the lanes' quads, for the last warp: the default grid leaves it without landmarks. They
// stay in shared memory, a quad a lane; the first tile sets them.
template <typename T, int DK>
__device__ inline void add_tokens(const Four<T>* tokens, bool set, Four<T>* sums) {
  if (threadIdx.x < kThreads - kWarp) return;
  tokens += own_quad<DK>() * kTokenStride<T> + own_share<DK>() * (kTokens<T> / kShares<DK>);
  Four<T> part = {};
#pragma unroll 4
  for (int i = 0; i < kTokens<T> / kShares<DK>; ++i) {
#pragma unroll
    for (int u = 0; u < 4; ++u) part.at[u] += tokens[i].at[u];
  }
  Four<T>& sum = sums[threadIdx.x % kWarp];
#pragma unroll
  for (int u = 0; u < 4; ++u) sum.at[u] = set ? part.at[u] : sum.at[u] + part.at[u];
}

// A quad of channels of a row, 0 beyond the last. Beside rows R in quads a row has all of them.
template <typename R, typename T>
__device__ inline Four<T> read_quad(const T* row, int quad, int channels) {
  if constexpr (!kOneByOne<R>) return vector_at<4>(row + 4 * quad);
  Four<T> values;
#pragma unroll
  for (int u = 0; u < 4; ++u) values.at[u] = 4 * quad + u < channels ? row[4 * quad + u] : T{0};
  return values;
}
template <typename R, typename T>
__device__ inline void put_quad(const Four<T>& values, int quad, int channels, T* row) {
  if constexpr (kOneByOne<R>) {
#pragma unroll
    for (int u = 0; u < 4; ++u) {
      if (4 * quad + u < channels) row[4 * quad + u] = values.at[u];
    }
  } else {
    vector_at<4>(row + 4 * quad) = values;
  }
}

// What add_tokens gathered.
template <typename T, int DK, typename R>
__device__ inline void put_sum(const Four<T>* sums, int channels, T* row) {
  if (threadIdx.x < kThreads - kWarp) return;
  const Four<T> sum = sums[threadIdx.x % kWarp];
  Four<T> all;
#pragma unroll
  for (int u = 0; u < 4; ++u) all.at[u] = sum_of_shares<T, DK>(sum.at[u]);
  if (own_share<DK>() == 0) put_quad<R>(all, own_quad<DK>(), channels, row);
}

// out[i] += sum over some groups of landmarks of column times the landmark's values at the lane's quad of
// channels, for the share's tokens.
template <typename T, int DK>
__device__ inline void sum_over_landmarks(const T* columns, const Four<T>* landmarks, int groups,
                                          Four<T> (&out)[kOwnOfShare<T, DK>]) {
  constexpr int together = kOwnOfShare<T, DK> < 4 ? kOwnOfShare<T, DK> : 4;
  columns += first_own_token<T, DK>();
  landmarks += own_quad<DK>();
  const T* end = columns + groups * kGroup * kColumnStride<T>;
#pragma unroll 1
  for (; columns < end; columns += kGroup * kColumnStride<T>, landmarks += kGroup * kQuads<DK>) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const Four<T> value = landmarks[j * kQuads<DK>];
#pragma unroll
      for (int i = 0; i < kOwnOfShare<T, DK>; i += together) {
        const Vector<T, together> weight = vector_at<together>(columns + j * kColumnStride<T> + i);
#pragma unroll
        for (int v = 0; v < together; ++v) {
#pragma unroll
          for (int u = 0; u < 4; ++u) out[i + v].at[u] += weight.at[v] * value.at[u];
        }
      }
    }
  }
}

// What a warp gathers of its landmarks' gradients over tiles: sums of 2 w times the step, and in lane j the
// sum of landmark j's 2 w, in the same order. Where all points coincide the gradient is thus 0 to the last
// bit.
template <typename T, int DK>
struct LandmarkGradients {
  Vector<T, DK> stepped[kGroup] = {};
  T weight = 0;

  __device__ void finish(Vector<T, DK> (&out)[kGroup]) const {
#pragma unroll
    for (int j = 0; j < kGroup; ++j) {
      const T all = T{0.5} * __shfl_sync(0xffffffffu, weight, j);
#pragma unroll
      for (int k = 0; k < DK; ++k) out[j].at[k] = stepped[j].at[k] - all;
    }
  }
};

// Sums over the warp, that of landmark j in lanes 4 j to 4 j + 3.
template <typename T>
__device__ inline T sums_by_landmark(const T (&lane_values)[kGroup]) {
  const int lane = threadIdx.x % kWarp;
  T values[kGroup + 1];
#pragma unroll
  for (int j = 0; j <= kGroup; ++j) values[j] = j < kGroup ? lane_values[j] : T{0};
#pragma unroll
  for (int half = (kGroup + 1) / 2; half > 0; half /= 2) {
    // Lanes of one kind keep the first half and give the second away, the others the other way round.
    const bool second = lane & (4 * half);
#pragma unroll
    for (int j = 0; j < half; ++j) {
      const T given = second ? values[j] : values[j + half], kept = second ? values[j + half] : values[j];
      values[j] = kept + __shfl_xor_sync(0xffffffffu, given, 4 * half);
    }
  }
  T sum = values[0];
#pragma unroll
  for (int offset = 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// Half the warp's sums over its landmarks of 2 w.
template <typename T>
__device__ inline void put_totals(const Columns<T>& doubled, T* totals) {
#pragma unroll
  for (int i = 0; i < kPerLane<T>; ++i) {
    T total = 0;
#pragma unroll
    for (int j = 0; j < kGroup; ++j) total += doubled[j][i];
    totals[threadIdx.x % kWarp + i * kWarp] = T{0.5} * total;
  }
}

// Gradients of an L1 distance: with t = w_ij sign(x_ic - y_jc), token i loses t and landmark j gains it. Each
// warp has put its weights in `columns` and `totals`; the warps take turns on eighths of the tokens, so that
// no two write one token at a time, in an order that is always the same. All warps of the block must come
// here. The first round sets the tokens' gradients, the others add to them.
template <typename T, int DK>
__device__ inline void sign_gradients(const T* columns, const T* totals, Four<T>* tokens,
                                      const Four<T>* landmarks, bool active, bool set, Four<T>* dtokens,
                                      LandmarkGradients<T, DK>& gradients) {
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const T* own = lane_channels<T, DK, DK>(tokens);
  T* lost = lane_channels<T, DK, DK>(dtokens);
  const T* weighed = columns + min(lane, kGroup - 1) * kColumnStride<T>;
  Vector<T, DK> there[kGroup] = {};
  if (active) {
#pragma unroll
    for (int j = 0; j < kGroup; ++j)
      there[j] =
          vector_at<DK>(reinterpret_cast<const T*>(landmarks + j * kQuads<DK>) + own_channel<DK, DK>());
  }
  if (set) {
#pragma unroll
    for (int i = 0; i < kOwn<T>; ++i) vector_at<DK>(lost + 4 * (warp * kOwn<T> + i)) = {};
  }
#pragma unroll 1
  for (int turn = 0; turn < kWarps; ++turn) {
    const int first = (warp + turn) % kWarps * kOwn<T>;
    if (active) {
#pragma unroll
      for (int i = 0; i < kOwn<T>; i += 4) {
        const Four<T> some = vector_at<4>(weighed + first + i);
#pragma unroll
        for (int u = 0; u < 4; ++u) gradients.weight += some.at[u];
      }
      // Two tokens at a time: four would not leave registers for the landmarks. Of many or wide channels the
      // loop stays one.
      const T *weights_here = columns + first, *totals_here = totals + first, *own_here = own + 4 * first;
      T* lost_here = lost + 4 * first;
#pragma unroll(sizeof(T) * DK > 8 ? 1 : kOwn<T> / 2)
      for (int i = 0; i < kOwn<T>; i += 2) {
        Two<T> weights[kGroup];
#pragma unroll
        for (int j = 0; j < kGroup; ++j) weights[j] = vector_at<2>(weights_here + j * kColumnStride<T> + i);
        const Two<T> total = vector_at<2>(totals_here + i);
#pragma unroll
        for (int u = 0; u < 2; ++u) {
          const Vector<T, DK> here = vector_at<DK>(own_here + 4 * (i + u));
          Vector<T, DK> loss = vector_at<DK>(lost_here + 4 * (i + u));
#pragma unroll
          for (int k = 0; k < DK; ++k) {
            T stepped = 0;
#pragma unroll
            for (int j = 0; j < kGroup; ++j) {
              const T step = step_of(here.at[k] - there[j].at[k]);
              stepped += weights[j].at[u] * step;
              gradients.stepped[j].at[k] += weights[j].at[u] * step;
            }
            loss.at[k] -= stepped - total.at[u];
          }
          vector_at<DK>(lost_here + 4 * (i + u)) = loss;
        }
      }
    }
    __syncthreads();
  }
}

// A tile's tokens into a tensor's rows, rounding once.
template <typename T, int DK, typename R>
__device__ inline void store_tokens(const Four<T>* tokens, const R& rows, int count) {
  const int quad = own_quad<DK>();
  tokens += quad * kTokenStride<T>;
#pragma unroll(kOneByOne<R> ? 1 : kTokens<T> / kApart<DK>)
  for (int i = 0; i < kTokens<T> / kApart<DK>; ++i) {
    const int token = static_cast<int>(threadIdx.x / kQuads<DK>) + i * kApart<DK>;
    if (token < count) rows.put(token, 4 * quad, tokens[token]);
  }
}

template <typename T>
__device__ inline void add_to(T* to, bool set, T sum) {
  *to = set ? sum : *to + sum;
}

// The warp's per-landmark sums into the chunk's partial sums, rows of `stride`, or added to them. Rows of R
// in quads have all their channels, and so have these.
template <typename T, int DK, typename R, int V>
__device__ inline void add_rows(const Vector<T, V> (&sum)[kGroup], const Group& group, int channels,
                                int stride, bool set, T* partial) {
  Vector<T, V> all[kGroup];
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
#pragma unroll
    for (int u = 0; u < V; ++u) all[j].at[u] = sum_of_shares<T, DK, V>(sum[j].at[u]);
  }
  if (own_share<DK, V>() != 0) return;
  const int channel = own_channel<DK, V>();
  partial += static_cast<int64_t>(group.first) * stride + channel;
#pragma unroll
  for (int j = 0; j < kGroup; ++j) {
    T* row = partial + j * stride;
    if (j >= group.count) break;
    if constexpr (kOneByOne<R>) {
#pragma unroll
      for (int u = 0; u < V; ++u) {
        if (channel + u < channels) add_to(row + u, set, all[j].at[u]);
      }
    } else {
      Vector<T, V>& to = vector_at<V>(row);
      if (!set) {
        const Vector<T, V> before = to;
#pragma unroll
        for (int u = 0; u < V; ++u) all[j].at[u] += before.at[u];
      }
      to = all[j];
    }
  }
}

// The same for one number a landmark, as sums_by_landmark gives it.
template <typename T>
__device__ inline void add_numbers(T sum, const Group& group, bool set, T* partial) {
  const int lane = threadIdx.x % kWarp;
  if (lane % 4 == 0 && lane / 4 < group.count) add_to(partial + group.first + lane / 4, set, sum);
}

// Where a block reads and writes. In shared memory it is read again for each tile, and takes no registers.
struct Place {
  Head head;
  int64_t chunk, first;
  int tokens;
};

// One thread divides for all.
__device__ inline void put_place(const View& view, const Cut& cut, int block, Place* place) {
  if (threadIdx.x == 0) {
    const Chunk chunk = cut.of_block(block);
    *place = {Head(view, chunk.head), chunk.index, chunk.first, chunk.tokens};
  }
  __syncthreads();
}

// The tile after `done` of a chunk's tokens.
struct Tile {
  int64_t first;
  int count;
  bool begins;
  Head head;
};

template <typename T>
__device__ inline Tile tile_of(const Place* place, int done) {
  return {place->first + done, min(place->tokens - done, kTokens<T>), done == 0, place->head};
}

// The chunks of (batch, heads, tokens, channels).
template <typename T>
Cut cut_of(const Tensor& tokens) {
  return Cut::of(tokens.size(0), tokens.size(1), tokens.size(2), kTokens<T>);
}

// A kernel's shared memory, one array after another. The description that a kernel takes its arrays from
// tells the host how many bytes there are, and the compiler whether two blocks fit.
template <bool kMeasured>
struct SharedMemoryOf {
  unsigned char* memory = nullptr;
  int64_t bytes = 0;

  template <typename U>
  __host__ __device__ constexpr U* take(int64_t count) {
    const int64_t at = bytes;
    bytes += (count * static_cast<int64_t>(sizeof(U)) + 15) / 16 * 16;
    if constexpr (kMeasured) {
      return nullptr;
    } else {
      return reinterpret_cast<U*>(memory + at);
    }
  }
  template <typename T, int DK>
  __host__ __device__ constexpr Four<T>* tokens() {
    return take<Four<T>>(kQuads<DK> * kTokenStride<T>);
  }
  template <typename T, int DK>
  __host__ __device__ constexpr Four<T>* landmarks(int groups) {
    return take<Four<T>>(groups * kGroup * kQuads<DK>);
  }
  template <typename T>
  __host__ __device__ constexpr T* columns(int groups) {
    return take<T>(groups * kGroup * kColumnStride<T>);
  }
  template <typename T>
  __host__ __device__ constexpr T* totals(int groups) {
    return take<T>(groups * kColumnStride<T>);
  }
};

using SharedMemory = SharedMemoryOf<false>;
using Measure = SharedMemoryOf<true>;  // for the bytes alone

// With the default grid two blocks share the 164 KB of a multiprocessor (compute capability 8.0), of which
// each block takes 1 KB more than it asks for.
template <typename Memory>
constexpr bool kTwoBlocksFit = Memory(Measure{}, 7, false).bytes <= 164 / 2 * 1024 - 1024;

// Sets the rounds over the landmarks, one if warps and shared memory allow it, else as few as they allow with
// as many groups in each; gives the bytes that a block needs.
template <typename Memory, typename Arguments>
int64_t plan_rounds(int64_t m, Arguments& arguments) {
  const auto bytes = [](int64_t groups, bool several) {
    return Memory(Measure{}, static_cast<int>(groups), several).bytes;
  };
  const int64_t groups = std::max<int64_t>(1, (m + kGroup - 1) / kGroup), limit = shared_memory_limit();
  int64_t rounds = 1;
  if (groups > kWarps || bytes(groups, false) > limit) {
    const int64_t fixed = bytes(0, true), per_group = bytes(1, true) - fixed,
                  fit = std::min<int64_t>((limit - fixed) / per_group, kWarps);
    STD_TORCH_CHECK(fit >= 1, "lf_dense: this GPU has too little shared memory for so many channels a head.");
    rounds = (groups + fit - 1) / fit;
  }
  const int64_t together = (groups + rounds - 1) / rounds;
  arguments.groups_per_round = static_cast<int>(together);
  arguments.rounds = static_cast<int>((groups + together - 1) / together);
  return bytes(together, arguments.rounds > 1);
}

// Calls run<T, DK>() for the tensors' compute type and channels, all of which a block has at once.
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

// The same for kernels that take one slab of 32 DK channels after another, however many there are.
template <typename Run>
void with_slabs(const Tensor& points, const Run& run) {
  if (points.scalar_type() == ScalarType::Double) {
    run.template operator()<double, 2>();
  } else if (points.size(3) <= kWarp) {
    run.template operator()<float, 1>();
  } else {
    run.template operator()<float, 2>();
  }
}

template <int DK>
constexpr int kSlab = kWarp * DK;

}  // namespace lf
