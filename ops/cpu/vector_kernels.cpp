// Compiled once for each instruction set: LF_ISA names it, LF_VECTOR_BYTES is its register. Nothing of the
// standard library's templates may be used here: the linker keeps one copy of an inline function, and it
// could be the one that this machine lacks.
#include "vector_kernels.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#define LF_STRING_OF(x) #x
#define LF_STRING(x) LF_STRING_OF(x)
// The compiler may assume nothing of the register's value from here on.
#if defined(__x86_64__)
#define LF_HIDE(x) asm volatile("" : "+v"(x))
#else
#define LF_HIDE(x) asm volatile("" : "+w"(x))
#endif

namespace lf {
namespace LF_ISA {
namespace {

template <typename T>
struct Bits;
template <>
struct Bits<float> {
  using type = int32_t;
};
template <>
struct Bits<double> {
  using type = int64_t;
};

template <typename T>
struct Vector {
  typedef T type __attribute__((vector_size(LF_VECTOR_BYTES), may_alias));
  typedef T unaligned __attribute__((vector_size(LF_VECTOR_BYTES), may_alias, aligned(alignof(T))));
  typedef typename Bits<T>::type bits __attribute__((vector_size(LF_VECTOR_BYTES), may_alias));
  static constexpr int64_t lanes = LF_VECTOR_BYTES / sizeof(T);
  static constexpr typename Bits<T>::type sign_bit = static_cast<typename Bits<T>::type>(1)
                                                     << (8 * sizeof(T) - 1);
};

template <typename T>
using vec = typename Vector<T>::type;

template <typename T>
inline vec<T> load(const T* p) {
  return *reinterpret_cast<const vec<T>*>(p);
}

template <typename T>
inline void store(T* p, vec<T> v) {
  *reinterpret_cast<vec<T>*>(p) = v;
}

template <typename T>
inline vec<T> load_unaligned(const T* p) {
  return *reinterpret_cast<const typename Vector<T>::unaligned*>(p);
}

template <typename T>
inline void store_unaligned(T* p, vec<T> v) {
  *reinterpret_cast<typename Vector<T>::unaligned*>(p) = v;
}

// The number in every lane: x - 0 is x, where x + 0 would make a positive zero of -0.
template <typename T>
inline vec<T> filled(T x) {
  return x - vec<T>{};
}

template <typename T>
inline vec<T> absolute(vec<T> v) {
  using bits = typename Vector<T>::bits;
  return (vec<T>)((bits)v & ~Vector<T>::sign_bit);
}

// w with the sign of v, and 0 where v is 0.
template <typename T>
inline vec<T> signed_by(vec<T> v, T w) {
  using bits = typename Vector<T>::bits;
  const vec<T> wide = filled(w);
  const bits nonzero = v != vec<T>{};
  return (vec<T>)((((bits)v & Vector<T>::sign_bit) ^ (bits)wide) & nonzero);
}

// exp(x) / 2^n for the n nearest to x / log 2.
inline vec<float> reduced_exponential(vec<float> x, vec<float> n) {
  const vec<float> r = (x - n * 0.693359375f) + n * 2.12194440e-4f;
  vec<float> p = r * 1.9875691500e-4f + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  return p * (r * r) + r + 1.0f;
}

#if defined(__AVX512F__)
// exp of a number that is at most 0, to about an ulp, denormal results included. NaN stays NaN; scalef makes
// 0 of -inf.
inline vec<float> exponential(vec<float> x) {
  const __m512 power = (__m512)(x * 1.44269504088896341f);
  const vec<float> n =
      (vec<float>)_mm512_maskz_roundscale_ps(0xFFFF, power, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  return (vec<float>)_mm512_maskz_scalef_ps(0xFFFF, (__m512)reduced_exponential(x, n), (__m512)n);
}
#else
// exp of a number that is at most 0, to about an ulp; below the smallest normal number it is 0. NaN stays
// NaN.
inline vec<float> exponential(vec<float> x) {
  using bits = Vector<float>::bits;
  const float round = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  const bits underflow = x < -87.33654f;
  x = underflow ? vec<float>{} - 87.33654f : x;
  const vec<float> shifted = x * 1.44269504088896341f + round;
  const vec<float> n = shifted - round;
  const bits power = ((bits)shifted - 0x4B400000 + 127) << 23;
  const vec<float> result = reduced_exponential(x, n) * (vec<float>)power;
  return underflow ? vec<float>{} : result;
}
#endif

// float64 serves gradient checks: exactness before speed.
inline vec<double> exponential(vec<double> x) {
  for (int lane = 0; lane < Vector<double>::lanes; ++lane) x[lane] = __builtin_exp(x[lane]);
  return x;
}

#if defined(__aarch64__)
using float16 = __fp16;  // GCC knows _Float16 in C++ from release 13 on there
#else
using float16 = _Float16;
#endif

inline float from_bfloat16(uint16_t x) { return __builtin_bit_cast(float, static_cast<uint32_t>(x) << 16); }

inline uint16_t to_bfloat16(float x) {
  const uint32_t u = __builtin_bit_cast(uint32_t, x);
  const uint32_t rounded = (u + 0x7FFF + ((u >> 16) & 1)) >> 16;
  return static_cast<uint16_t>((u & 0x7FFFFFFF) > 0x7F800000 ? 0x7FC0 : rounded);
}

// Vectors of tokens of any type, which need not be aligned.
template <typename T>
inline vec<T> load_wide(const T* p) {
  return load_unaligned(p);
}

template <typename T>
inline void store_wide(T* p, vec<T> v) {
  store_unaligned(p, v);
}

using words = uint32_t __attribute__((vector_size(LF_VECTOR_BYTES), may_alias));
using halves = uint16_t __attribute__((vector_size(LF_VECTOR_BYTES / 2), may_alias, aligned(2)));

inline vec<float> load_wide(const BFloat16* p) {
  return (vec<float>)(__builtin_convertvector(*reinterpret_cast<const halves*>(p), words) << 16);
}

// A constant in every lane, read where it is used: in a register throughout a product it would push a sum out
// of its own.
inline words fetched(const uint32_t& constant) {
  const uint32_t* from = &constant;
  asm volatile("" : "+r"(from));
  return words{} + *from;
}

// Rounded to bfloat16, which is the upper half of a word; the lower is anything.
inline words rounded(vec<float> x) {
  static constexpr uint32_t kHalf = 0x7FFF, kOne = 1, kNaN = 0x7FC00000;
  const words u = (words)x;
  return x == x ? u + fetched(kHalf) + ((u >> 16) & fetched(kOne)) : fetched(kNaN);
}

inline void store_wide(BFloat16* p, vec<float> v) {
#if defined(__AVX512BF16__)
  *reinterpret_cast<halves*>(p) = (halves)_mm512_cvtneps_pbh((__m512)v);
#else
  *reinterpret_cast<halves*>(p) = __builtin_convertvector(rounded(v) >> 16, halves);
#endif
}

template <typename T>
inline T widened(T x) {
  return x;
}
inline float widened(BFloat16 x) { return from_bfloat16(x.bits); }

inline void narrow_to(float x, float& out) { out = x; }
inline void narrow_to(double x, double& out) { out = x; }
inline void narrow_to(float x, BFloat16& out) { out.bits = to_bfloat16(x); }

// Converts rows x channels from one layout to another; strides in elements.
template <typename From, typename To, typename Convert>
inline void copy_rows(const From* src, int64_t src_row, int64_t src_channel, To* dst, int64_t dst_row,
                      int64_t dst_channel, int64_t rows, int64_t channels, Convert convert) {
  for (int64_t i = 0; i < rows; ++i) {
    const From* from = src + i * src_row;
    To* to = dst + i * dst_row;
    if (src_channel == 1 && dst_channel == 1) {
      for (int64_t c = 0; c < channels; ++c) to[c] = convert(from[c]);
    } else {
      for (int64_t c = 0; c < channels; ++c) to[c * dst_channel] = convert(from[c * src_channel]);
    }
  }
}

template <typename T>
void pack(const void* src, DType dtype, int64_t row_stride, int64_t channel_stride, int64_t rows,
          int64_t padded_rows, int64_t channels, int64_t cols, T* dst) {
  const auto copy = [&](auto* from, auto convert) {
    copy_rows(from, row_stride, channel_stride, dst, cols, 1, rows, channels, convert);
  };
  switch (dtype) {
    case DType::kFloat64:
      copy(static_cast<const double*>(src), [](double x) { return static_cast<T>(x); });
      break;
    case DType::kFloat32:
      copy(static_cast<const float*>(src), [](float x) { return static_cast<T>(x); });
      break;
    case DType::kBFloat16:
      copy(static_cast<const uint16_t*>(src), [](uint16_t x) { return static_cast<T>(from_bfloat16(x)); });
      break;
    case DType::kFloat16:
      copy(static_cast<const float16*>(src), [](float16 x) { return static_cast<T>(static_cast<float>(x)); });
      break;
  }
  for (int64_t i = 0; channels < cols && i < rows; ++i) {
    for (int64_t c = channels; c < cols; ++c) dst[i * cols + c] = 0;
  }
  for (int64_t i = rows * cols; i < padded_rows * cols; ++i) dst[i] = 0;
}

template <typename T>
void unpack(const T* src, int64_t rows, int64_t channels, int64_t cols, void* dst, DType dtype,
            int64_t row_stride, int64_t channel_stride) {
  const auto copy = [&](auto* to, auto convert) {
    copy_rows(src, cols, 1, to, row_stride, channel_stride, rows, channels, convert);
  };
  switch (dtype) {
    case DType::kFloat64:
      copy(static_cast<double*>(dst), [](T x) { return static_cast<double>(x); });
      break;
    case DType::kFloat32:
      copy(static_cast<float*>(dst), [](T x) { return static_cast<float>(x); });
      break;
    case DType::kBFloat16:
      copy(static_cast<uint16_t*>(dst), [](T x) { return to_bfloat16(static_cast<float>(x)); });
      break;
    case DType::kFloat16:
      copy(static_cast<float16*>(dst), [](T x) { return static_cast<float16>(static_cast<float>(x)); });
      break;
  }
}

// Copies past the caches where the instruction set can. Their lines are 64 bytes: what lies before the first
// whole one, and behind the last, goes through them.
void stream(const void* src, int64_t bytes, void* dst) {
  const char* from = static_cast<const char*>(src);
  char* to = static_cast<char*>(dst);
#if defined(__x86_64__)
  const int64_t before = -reinterpret_cast<uintptr_t>(to) % 64;
  if (before < bytes) {
    __builtin_memcpy(to, from, before);
    from += before, to += before, bytes -= before;
    for (; bytes >= 64; from += 64, to += 64, bytes -= 64) {
#if defined(__AVX512F__)
      _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
#elif defined(__AVX2__)
      for (int i = 0; i < 64; i += 32)
        _mm256_stream_si256(reinterpret_cast<__m256i*>(to + i),
                            _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from + i)));
#else
      for (int i = 0; i < 64; i += 16)
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + i),
                         _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i)));
#endif
    }
  }
#endif
  __builtin_memcpy(to, from, bytes);
}

// Of every 128 bits the lower or the upper half: an element of a, one of b, and so on.
template <typename T, bool upper>
inline vec<T> interleaved(vec<T> a, vec<T> b) {
  constexpr int64_t lanes = Vector<T>::lanes, quad = 16 / sizeof(T);
  typename Vector<T>::bits index;
  for (int64_t l = 0; l < lanes; ++l)
    index[l] = l / quad * quad + l % quad / 2 + (upper ? quad / 2 : 0) + l % 2 * lanes;
  return __builtin_shuffle(a, b, index);
}

// The even or the odd 128 bits of a, then those of b.
template <typename T, bool odd>
inline vec<T> every_other(vec<T> a, vec<T> b) {
  constexpr int64_t lanes = Vector<T>::lanes, quad = 16 / sizeof(T);
  typename Vector<T>::bits index;
  for (int64_t l = 0; l < lanes; ++l) {
    const int64_t from = l / quad * 2 + odd;
    index[l] = from * quad + l % quad;  // counts on through b
  }
  return __builtin_shuffle(a, b, index);
}

// As many rows as lanes, in place: first inside of 128 bits, where processors shuffle at twice the rate, then
// these as wholes.
template <typename T>
inline void transpose_block(vec<T>* rows) {
  constexpr int64_t lanes = Vector<T>::lanes, quad = 16 / sizeof(T), quads = lanes / quad;
#pragma GCC unroll 16
  for (int64_t r = 0; r < lanes; r += quad) {
    vec<T>* v = rows + r;
#pragma GCC unroll 2
    for (int64_t step = 1; step < quad; step *= 2) {
      vec<T> next[quad];
#pragma GCC unroll 2
      for (int64_t i = 0; i < quad / 2; ++i) {
        next[2 * i] = interleaved<T, false>(v[i], v[i + quad / 2]);
        next[2 * i + 1] = interleaved<T, true>(v[i], v[i + quad / 2]);
      }
#pragma GCC unroll 4
      for (int64_t i = 0; i < quad; ++i) v[i] = next[i];
    }
  }
#pragma GCC unroll 4
  for (int64_t c = 0; c < quad; ++c) {
#pragma GCC unroll 2
    for (int64_t step = 1; step < quads; step *= 2) {
      vec<T> next[quads];
#pragma GCC unroll 4
      for (int64_t i = 0; i < quads / 2; ++i) {
        const vec<T> a = rows[2 * i * quad + c], b = rows[(2 * i + 1) * quad + c];
        next[i] = every_other<T, false>(a, b);
        next[i + quads / 2] = every_other<T, true>(a, b);
      }
#pragma GCC unroll 8
      for (int64_t i = 0; i < quads; ++i) rows[i * quad + c] = next[i];
    }
  }
}

template <typename T>
void transpose(const T* src, int64_t src_stride, int64_t rows, int64_t cols, T* dst, int64_t dst_stride) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t r = 0; r < rows; r += lanes) {
    const int64_t rows_here = rows - r < lanes ? rows - r : lanes;
    if (rows_here <= 2) {
      for (int64_t i = r; i < rows; ++i) {
        for (int64_t c = 0; c < cols; ++c) dst[c * dst_stride + i] = src[i * src_stride + c];
      }
      continue;
    }
    for (int64_t c = 0; c < cols; c += lanes) {
      const int64_t cols_here = cols - c < lanes ? cols - c : lanes;
      vec<T> block[lanes];
      if (rows_here == lanes) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) block[l] = load_unaligned(src + (r + l) * src_stride + c);
      } else {
        for (int64_t l = 0; l < lanes; ++l)
          block[l] = l < rows_here ? load_unaligned(src + (r + l) * src_stride + c) : vec<T>{};
      }
      transpose_block<T>(block);
      if (rows_here == lanes && cols_here == lanes) {
#pragma GCC unroll 16
        for (int64_t l = 0; l < lanes; ++l) store_unaligned(dst + (c + l) * dst_stride + r, block[l]);
      } else {
        for (int64_t l = 0; l < cols_here; ++l) {
          T row[lanes];
          store_unaligned(row, block[l]);
          for (int64_t i = 0; i < rows_here; ++i) dst[(c + l) * dst_stride + r + i] = row[i];
        }
      }
    }
  }
}

// Channels added up before their sum joins the rest: long chains of additions would gather rounding errors.
constexpr int64_t kSummed = 32;
// The same of a product, where that costs more.
constexpr int64_t kMultiplied = 64;

// Register tiles: as many accumulators as leave room for the operands.
constexpr int kRegisters = LF_VECTOR_BYTES == 64 ? 32 : 16;
constexpr int kKernelWidth = 2;
#if defined(__FMA__)
constexpr bool kFused = true;
#else
constexpr bool kFused = false;
#endif
// With 16 registers the multiplier below leaves room for fewer rows.
constexpr int kKernelRows = kRegisters == 32 ? 12 : kFused ? 3 : 5;
constexpr int kSignRows = kRegisters == 32 ? 12 : 5;
constexpr int kProductRows = kRegisters == 32 ? 6 : 3;
constexpr int kPairVectors = kRegisters == 32 ? 4 : 2;
constexpr int kPairTokens = kRegisters == 32 ? 6 : 4;
constexpr int kNormTokens = 8;
constexpr int kConvTokens = kRegisters == 32 ? 6 : 3;

// Prefetches at most one cache line at each call: spread over all of the arithmetic, memory costs next to
// nothing; in one burst it stalls.
class Prefetcher {
 public:
  Prefetcher(const Ahead& ahead, int64_t calls) : region_(ahead.regions), end_(ahead.regions + ahead.count) {
    int64_t lines = 0;
    for (const Region* r = region_; r != end_; ++r) lines += r->rows * ((r->bytes + 63) / 64);
    if (lines > 0 && lines < calls) every_ = calls / lines;
  }
  inline void step() {
    if (region_ == end_ || --wait_ > 0) return;
    wait_ = every_;
    __builtin_prefetch(region_->data + row_ * region_->stride + byte_);
    byte_ += 64;
    if (byte_ < region_->bytes) return;
    byte_ = 0;
    if (++row_ < region_->rows) return;
    row_ = 0;
    ++region_;
  }

 private:
  const Region *region_, *end_;
  int64_t every_ = 1, wait_ = 0, row_ = 0, byte_ = 0;
};

// x * 1 - y is x - y to the bit, but where multipliers are ports of their own it runs beside the additions
// rather than before them (7 % of the tile on Zen 4, 17 % on Zen 3). Of every two differences one is taken so
// and one by an adder: one multiplication and three additions leave all ports the same work, with the two
// absolute values, which any takes (5 % more on Zen 5). The compiler must not see that it is a 1.
template <typename T>
inline vec<T> difference(vec<T> x, T y, vec<T> one, bool by_multiplier) {
  return kFused && by_multiplier ? x * one - y : x - y;
}

template <typename T, int J>
inline void kernel_rows(const T* x, const T* y, int64_t y_stride, int64_t channels, T scale,
                        Prefetcher& ahead, T* out) {
  constexpr int64_t lanes = Vector<T>::lanes;
  vec<T> one = vec<T>{} + 1;
  LF_HIDE(one);
  for (int64_t i = 0; i < kTile; i += kKernelWidth * lanes) {
    for (int64_t first = 0; first == 0 || first < channels; first += kSummed) {
      const int64_t end = channels - first < kSummed ? channels : first + kSummed;
      vec<T> sum[J][kKernelWidth] = {};
      for (int64_t c = first; c < end; ++c) {
        ahead.step();
        vec<T> here[kKernelWidth];
#pragma GCC unroll 2
        for (int u = 0; u < kKernelWidth; ++u) here[u] = load(x + c * kTile + i + u * lanes);
#pragma GCC unroll 16
        for (int j = 0; j < J; ++j) {
          const T there = y[c * y_stride + j];
#pragma GCC unroll 2
          for (int u = 0; u < kKernelWidth; ++u)
            sum[j][u] += absolute<T>(difference<T>(here[u], there, one, u % 2 == 0));
        }
      }
      const T factor = -1 / scale;
      const bool last = end == channels;
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
#pragma GCC unroll 2
        for (int u = 0; u < kKernelWidth; ++u) {
          T* to = out + j * kTile + i + u * lanes;
          const vec<T> total = first == 0 ? sum[j][u] : load(to) + sum[j][u];
          store(to, last ? exponential(total * factor) : total);
        }
      }
    }
  }
}

// Calls `run` with the fewest groups of at most Max that cover `count`, as equal as can be.
template <int Max, typename Run>
inline void in_groups(int64_t count, Run run) {
  const int64_t groups = (count + Max - 1) / Max;
  for (int64_t g = 0, first = 0; g < groups; ++g) {
    const int64_t size = count / groups + (g < count % groups);
    run(first, size);
    first += size;
  }
}

template <int N>
struct Constant {};

// Calls `run` with `size`, between 1 and Max, as a compile-time constant.
template <int Max, typename Run>
inline void with_constant(int64_t size, Run run) {
  if constexpr (Max > 0) {
    if (size == Max) {
      run(Constant<Max>{});
    } else {
      with_constant<Max - 1>(size, run);
    }
  }
}

// Calls `run` for the blocks of a product, at most MaxRows by MaxVectors, with where a block begins and its
// size.
template <int MaxRows, int MaxVectors, typename Run>
inline void in_blocks(int64_t rows, int64_t vectors, Run run) {
  in_groups<MaxVectors>(vectors, [&](int64_t vector, int64_t wide) {
    with_constant<MaxVectors>(wide, [&]<int C>(Constant<C>) {
      in_groups<MaxRows>(rows, [&](int64_t row, int64_t high) {
        with_constant<MaxRows>(high, [&]<int R>(Constant<R>) { run.template operator()<R, C>(row, vector); });
      });
    });
  });
}

template <typename T>
void kernel_tile(const T* x, const T* y, int64_t y_stride, int64_t channels, int64_t m, T scale,
                 const Ahead& regions, T* out) {
  const int64_t groups = (m + kKernelRows - 1) / kKernelRows;
  Prefetcher ahead(regions, groups * channels * (kTile / (kKernelWidth * Vector<T>::lanes)));
  in_groups<kKernelRows>(m, [&](int64_t first, int64_t size) {
    with_constant<kKernelRows>(size, [&]<int J>(Constant<J>) {
      kernel_rows<T, J>(x, y + first, y_stride, channels, scale, ahead, out + first * kTile);
    });
  });
}

// What a product adds to: a number for each row, what is there already, or nothing.
template <typename T>
struct Start {
  const T* bias;
  bool accumulate;
};

template <typename T, int R, int C>
inline void product_block(T* out, int64_t out_stride, const T* a, int64_t a_row, int64_t a_k, const T* b,
                          int64_t b_stride, int64_t depth, Start<T> start) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t first = 0; first == 0 || first < depth; first += kMultiplied) {
    const int64_t end = depth - first < kMultiplied ? depth : first + kMultiplied;
    vec<T> sum[R][C] = {};
    for (int64_t k = first; k < end; ++k) {
      vec<T> row[C];
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) row[c] = load(b + k * b_stride + c * lanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const T factor = a[r * a_row + k * a_k];
#pragma GCC unroll 4
        for (int c = 0; c < C; ++c) sum[r][c] += factor * row[c];
      }
    }
    const bool add = first > 0 || start.accumulate;
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) {
        T* to = out + r * out_stride + c * lanes;
        if (add) {
          store(to, sum[r][c] + load(to));
        } else if (start.bias) {
          store(to, sum[r][c] + start.bias[r]);
        } else {
          store(to, sum[r][c]);
        }
      }
    }
  }
}

template <typename T>
inline void product_from(T* out, int64_t out_stride, const T* a, int64_t a_row, int64_t a_k, const T* b,
                         int64_t b_stride, int64_t rows, int64_t depth, int64_t cols, Start<T> start) {
  constexpr int64_t lanes = Vector<T>::lanes;
  in_blocks<kProductRows, 4>(rows, cols / lanes, [&]<int R, int C>(int64_t row, int64_t vector) {
    const Start<T> here{start.bias ? start.bias + row : nullptr, start.accumulate};
    product_block<T, R, C>(out + row * out_stride + vector * lanes, out_stride, a + row * a_row, a_row, a_k,
                           b + vector * lanes, b_stride, depth, here);
  });
}

template <typename T>
void product(T* out, int64_t out_stride, const T* a, int64_t a_row, int64_t a_k, const T* b, int64_t b_stride,
             int64_t rows, int64_t depth, int64_t cols, bool accumulate) {
  product_from<T>(out, out_stride, a, a_row, a_k, b, b_stride, rows, depth, cols, {nullptr, accumulate});
}

template <typename T>
void linear(T* out, int64_t out_stride, const T* a, int64_t a_row, const T* bias, const T* b,
            int64_t b_stride, int64_t rows, int64_t depth, int64_t cols) {
  product_from<T>(out, out_stride, a, a_row, 1, b, b_stride, rows, depth, cols, {bias, false});
}

// p / q to about an ulp, for q of moderate size.
inline vec<float> quotient(vec<float> p, vec<float> q) {
#if defined(__AVX512F__)
  // A step of Newton's method takes the estimate's 14 bits to 28.
  const vec<float> estimate = (vec<float>)_mm512_maskz_rcp14_ps(0xFFFF, (__m512)q);
  return p * (estimate * (2.0f - q * estimate));
#else
  return p / q;
#endif
}

// Coefficients of P and Q, highest first, of Phi(x) = 1/2 + x P(x^2) / Q(x^2) on [-limit, limit]. Q ends
// in 1.
template <int degree>
struct NormalDistribution {
  float limit, p[degree + 1], q[degree];
};

// Fitted to 1e-8.
constexpr NormalDistribution<5> kNormal = {
    5.6f,
    {2.2145283298e-8f, 6.3565237137e-6f, 1.7385056383e-4f, 4.7072584873e-3f, 3.4376097408e-2f,
     3.9894222157e-1f},
    {1.1802104818e-6f, 7.5101829459e-5f, 1.9129773683e-3f, 2.8940081261e-2f, 2.5283381088e-1f},
};
// x within [-limit, limit]; NaN stays NaN.
inline vec<float> clamped(vec<float> x, float limit) {
#if defined(__AVX512F__)
  // Of a number and NaN these take the second one.
  const __m512 most = (__m512)filled(limit), least = (__m512)filled(-limit);
  return (vec<float>)_mm512_maskz_max_ps(0xFFFF, least, _mm512_maskz_min_ps(0xFFFF, most, (__m512)x));
#else
  const vec<float> z = x > limit ? filled(limit) : x;
  return z < -limit ? filled(-limit) : z;
#endif
}

// Phi(x), and beyond the fit what it is at the end of it.
template <int degree>
inline vec<float> distribution(vec<float> x, const NormalDistribution<degree>& normal) {
  const vec<float> z = clamped(x, normal.limit);
  const vec<float> u = z * z;
  vec<float> p = u * normal.p[0] + normal.p[1], q = u * normal.q[0] + normal.q[1];
#pragma GCC unroll 8
  for (int i = 2; i <= degree; ++i) {
    p = p * u + normal.p[i];
    q = q * u + (i < degree ? normal.q[i] : 1.0f);
  }
  return z * quotient(p, q) + 0.5f;
}

// x Phi(x). Further left than the fit it is 0, which is right to 6e-8, or to 1e-5 by the rough one.
template <int degree>
inline vec<float> gelu(vec<float> x, const NormalDistribution<degree>& normal) {
  const vec<float> result = x * distribution(x, normal);
  return x < -normal.limit ? vec<float>{} : result;
}

inline vec<float> gelu(vec<float> x) { return gelu(x, kNormal); }

#if defined(__AVX512F__)
// GELU(x) is max(x, 0) less |x| Phi(-|x|), which is 0 beyond kEnd. A cubic for each of 16 segments of it lies
// in registers: a shuffle looks coefficients up.
struct Cubics {
  static constexpr int kSegments = 16;
  static constexpr double kEnd = 4.65, kWidth = kEnd / (kSegments - 1);
  alignas(64) float power[4][kSegments] = {};

  constexpr Cubics() {
    for (int segment = 0; segment < kSegments; ++segment) {
      const bool last = segment == kSegments - 1;
      const double from = segment == 0 ? 0 : (segment - 0.5) * kWidth,
                   to = last ? kEnd : (segment + 0.5) * kWidth;
      // Chebyshev's points, but at both ends the values are those beyond: 0.
      constexpr double kPoints[4] = {-0.92387953251128674, -0.38268343236508977, 0.38268343236508977,
                                     0.92387953251128674};
      double x[4] = {}, slope[4] = {}, sum[4] = {};
      for (int n = 0; n < 4; ++n) x[n] = (from + to) / 2 + (to - from) / 2 * kPoints[n];
      if (segment == 0) x[0] = 0;
      if (last) x[3] = kEnd;
      for (int n = 0; n < 4; ++n) slope[n] = last && n == 3 ? 0 : tail(x[n]);
      // Newton's interpolation, multiplied out.
      for (int order = 1; order < 4; ++order) {
        for (int n = 3; n >= order; --n) slope[n] = (slope[n] - slope[n - 1]) / (x[n] - x[n - order]);
      }
      for (int n = 3; n >= 0; --n) {
        for (int k = 3; k > 0; --k) sum[k] = sum[k - 1] - x[n] * sum[k];
        sum[0] = slope[n] - x[n] * sum[0];
      }
      for (int k = 0; k < 4; ++k) power[k][segment] = static_cast<float>(sum[k]);
    }
  }

  // t Phi(-t), by the series of Phi.
  static constexpr double tail(double t) {
    double term = t, sum = t;
    for (int n = 1; n < 80; ++n) {
      term *= -t * t / (2 * n);
      sum += term / (2 * n + 1);
    }
    return t * (0.5 - 0.39894228040143267794 * sum);
  }
};
constexpr Cubics kCubics;

// To 1e-5, for what is rounded to bfloat16 next. NaN stays NaN.
inline vec<float> rough_gelu(vec<float> x) {
  const __m512 t = _mm512_maskz_min_ps(0xFFFF, _mm512_set1_ps(Cubics::kEnd), (__m512)absolute<float>(x));
  // Adding 1.5 * 2^23 leaves the nearest integer in the low bits, and the shuffle takes four of them.
  const __m512i segment = (__m512i)((vec<float>)t * static_cast<float>(1 / Cubics::kWidth) + 12582912.0f);
  const auto power = [&](int k) {
    return (vec<float>)_mm512_maskz_permutexvar_ps(0xFFFF, segment, (__m512)load(kCubics.power[k]));
  };
  const vec<float> u = (vec<float>)t, below = ((power(3) * u + power(2)) * u + power(1)) * u + power(0);
  return (vec<float>)_mm512_maskz_max_ps(0xFFFF, (__m512)x, (__m512)vec<float>{}) - below;
}
#else
// To 3e-6.
constexpr NormalDistribution<3> kRoughNormal = {
    4.6f,
    {3.2756193244e-05f, 3.8170435711e-03f, 2.7672715297e-02f, 3.9892538544e-01f},
    {1.1542078104e-03f, 2.3914156919e-02f, 2.3596743347e-01f},
};

inline vec<float> rough_gelu(vec<float> x) { return gelu(x, kRoughNormal); }
#endif

inline vec<double> gelu(vec<double> x) {
  for (int lane = 0; lane < Vector<double>::lanes; ++lane)
    x[lane] *= 0.5 * __builtin_erfc(-x[lane] * 0.70710678118654752440);
  return x;
}

// Phi(x) + x phi(x).
inline vec<float> gelu_slope(vec<float> x) {
  const vec<float> density = exponential(x * x * -0.5f) * 0.39894228040143267794f;
  return x * density + distribution(x, kNormal);
}

inline vec<double> gelu_slope(vec<double> x) {
  for (int lane = 0; lane < Vector<double>::lanes; ++lane) {
    x[lane] = 0.5 * __builtin_erfc(-x[lane] * 0.70710678118654752440) +
              x[lane] * __builtin_exp(-0.5 * x[lane] * x[lane]) * 0.39894228040143267794;
  }
  return x;
}

template <typename T>
inline vec<T> where_set(vec<T> v, const T* mask) {
  using bits = typename Vector<T>::bits;
  return (vec<T>)((bits)v & (bits)load(mask));
}

// Loads are cheaper than shuffles of what is in registers (3 % of the operator, Zen 4).
template <typename T>
void convolve_gelu(const T* x, int64_t stride, int64_t width, const T* left, const T* right, const T* weight,
                   const T* bias, int64_t channels, int64_t tokens, T* out, int64_t out_stride) {
  for (int64_t c = 0; c < channels; ++c, x += stride, out += out_stride, weight += 9) {
    vec<T> w[9];
#pragma GCC unroll 9
    for (int tap = 0; tap < 9; ++tap) w[tap] = filled(weight[tap]);
    const vec<T> start = filled(bias[c]);
    for (int64_t i = 0; i < tokens; i += Vector<T>::lanes) {
      vec<T> side[3];
#pragma GCC unroll 3
      for (int dx = 0; dx < 3; ++dx) {
        const T* middle = x + i + dx - 1;
        side[dx] = w[dx] * load_unaligned(middle - width) + w[3 + dx] * load_unaligned(middle) +
                   w[6 + dx] * load_unaligned(middle + width);
      }
      store(out + i,
            gelu(start + side[1] + where_set<T>(side[0], left + i) + where_set<T>(side[2], right + i)));
    }
  }
}

// Some lanes of memory that need not be aligned; all of them where `full`, and zeros beyond `count`
// elsewhere.
template <typename T, bool full>
struct Lanes {
  int64_t count;
  vec<T> load(const T* p) const {
    if constexpr (full) {
      return load_unaligned(p);
    } else {
      vec<T> v = {};
      __builtin_memcpy(&v, p, count * sizeof(T));
      return v;
    }
  }
  void store(T* p, vec<T> v) const {
    if constexpr (full) {
      store_unaligned(p, v);
    } else {
      __builtin_memcpy(p, &v, count * sizeof(T));
    }
  }
  void store_narrow(BFloat16* p, vec<T> v) const {
    if constexpr (full) {
      store_wide(p, v);
    } else {
      for (int64_t lane = 0; lane < count; ++lane) narrow_to(v[lane], p[lane]);
    }
  }
};

// Pixels that share what they load.
constexpr int kPixels = 4;
constexpr int64_t kPixelsAhead = 8;

// Pixels lie too far apart for the processor to foresee them. Beyond a row's end this is of no use and does
// no harm.
template <typename T>
inline void prefetch_pixel(const T* channel, int64_t stride) {
  __builtin_prefetch(channel + kPixelsAhead * stride);
}

template <typename T, int P>
struct Neighbours {
  const T* at[3][P + 2];

  Neighbours(const T* const* rows, int64_t stride, int64_t width, int64_t first) {
    alignas(64) static constexpr T outside[kChannels] = {};
    for (int row = 0; row < 3; ++row) {
      for (int i = 0; i < P + 2; ++i) {
        const int64_t column = first + i - 1;
        at[row][i] = rows[row] && column >= 0 && column < width ? rows[row] + column * stride : outside;
      }
    }
  }
};

// The convolution of a row of pixels: calls `emit(neighbours, first pixel, first channel, lanes, sums)`.
template <typename T, typename Emit>
inline void along_row(const T* const* rows, int64_t stride, int64_t width, const T* taps, int64_t channels,
                      Emit emit) {
  constexpr int64_t lanes = Vector<T>::lanes;
  in_groups<kPixels>(width, [&](int64_t first, int64_t pixels) {
    with_constant<kPixels>(pixels, [&]<int P>(Constant<P>) {
      const Neighbours<T, P> near(rows, stride, width, first);
      const auto convolved = [&]<bool full>(int64_t c, Lanes<T, full> part) {
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) prefetch_pixel(near.at[2][p + 1] + c, stride);  // the others were there
        vec<T> sum[P];
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[p] = load(taps + 9 * kChannels + c);
#pragma GCC unroll 3
        for (int row = 0; row < 3; ++row) {
          vec<T> w[3];
#pragma GCC unroll 3
          for (int tap = 0; tap < 3; ++tap) w[tap] = load(taps + (row * 3 + tap) * kChannels + c);
#pragma GCC unroll 6
          for (int i = 0; i < P + 2; ++i) {
            const vec<T> here = part.load(near.at[row][i] + c);
#pragma GCC unroll 3
            for (int tap = 0; tap < 3; ++tap) {
              if (i - tap >= 0 && i - tap < P) sum[i - tap] += w[tap] * here;
            }
          }
        }
        emit(near, first, c, part, sum);
      };
      int64_t c = 0;
      for (; c + lanes <= channels; c += lanes) convolved(c, Lanes<T, true>{lanes});
      if (c < channels) convolved(c, Lanes<T, false>{channels - c});
    });
  });
}

template <typename T, typename Map>
inline void write_row(const T* const* rows, int64_t stride, int64_t width, const T* taps, int64_t channels,
                      T* out, int64_t out_stride, Map map) {
  along_row(rows, stride, width, taps, channels,
            [&]<int P, bool full>(const Neighbours<T, P>&, int64_t first, int64_t c, Lanes<T, full> part,
                                  vec<T>(&sum)[P]) {
              for (int p = 0; p < P; ++p) {
                T* to = out + (first + p) * out_stride + c;
                prefetch_pixel(to, out_stride);
                part.store(to, map(sum[p]));
              }
            });
}

template <typename T>
void conv_row(const T* const* rows, int64_t stride, int64_t width, const T* taps, int64_t channels, T* out,
              int64_t out_stride) {
  write_row(rows, stride, width, taps, channels, out, out_stride, [](vec<T> sum) { return sum; });
}

template <typename T>
void conv_gelu_row(const T* const* rows, int64_t stride, int64_t width, const T* taps, int64_t channels,
                   T* out, int64_t out_stride) {
  write_row(rows, stride, width, taps, channels, out, out_stride, [](vec<T> sum) { return gelu(sum); });
}

template <typename T>
void conv_gelu_gradient_row(const T* const* rows, int64_t stride, int64_t width, const T* taps,
                            int64_t channels, const T* grad, T* dz, int64_t dz_stride, T* sums) {
  along_row(rows, stride, width, taps, channels,
            [&]<int P, bool full>(const Neighbours<T, P>& near, int64_t first, int64_t c, Lanes<T, full> part,
                                  vec<T>(&sum)[P]) {
              vec<T> all = {};
#pragma GCC unroll 4
              for (int p = 0; p < P; ++p) {
                sum[p] = gelu_slope(sum[p]) * part.load(grad + (first + p) * stride + c);
                prefetch_pixel(grad + (first + p) * stride + c, stride);
                part.store(dz + (first + p) * dz_stride + c, sum[p]);
                all += sum[p];
              }
              if (!sums) return;
#pragma GCC unroll 9
              for (int tap = 0; tap < 9; ++tap) {
                T* to = sums + tap * kChannels + c;
                vec<T> total = load(to);
#pragma GCC unroll 4
                for (int p = 0; p < P; ++p) total += part.load(near.at[tap / 3][p + tap % 3] + c) * sum[p];
                store(to, total);
              }
              T* to = sums + 9 * kChannels + c;
              store(to, load(to) + all);
            });
}

// 1 / sqrt(x).
inline vec<float> reciprocal_root(vec<float> x) {
#if defined(__AVX512F__)
  return 1.0f / (vec<float>)_mm512_maskz_sqrt_ps(0xFFFF, (__m512)x);
#else
  for (int lane = 0; lane < Vector<float>::lanes; ++lane) x[lane] = 1 / __builtin_sqrtf(x[lane]);
  return x;
#endif
}

inline vec<double> reciprocal_root(vec<double> x) {
  for (int lane = 0; lane < Vector<double>::lanes; ++lane) x[lane] = 1 / __builtin_sqrt(x[lane]);
  return x;
}

template <typename T>
void normalize(T* panel, int64_t stride, int64_t channels, int64_t tokens, const T* weight, const T* bias,
               T eps) {
  for (int64_t i = 0; i < tokens; i += Vector<T>::lanes) {
    // Two chains, so that additions do not wait for each other.
    vec<T> even = {}, odd = {};
    for (int64_t c = 0; c + 1 < channels; c += 2) {
      even += load(panel + c * stride + i);
      odd += load(panel + (c + 1) * stride + i);
    }
    if (channels % 2) even += load(panel + (channels - 1) * stride + i);
    const vec<T> mean = (even + odd) / static_cast<T>(channels);
    even = odd = vec<T>{};
    for (int64_t c = 0; c < channels; ++c) {
      const vec<T> centred = load(panel + c * stride + i) - mean;
      (c % 2 ? odd : even) += centred * centred;
    }
    const vec<T> factor = reciprocal_root((even + odd) / static_cast<T>(channels) + eps);
    for (int64_t c = 0; c < channels; ++c) {
      T* to = panel + c * stride + i;
      store(to, (load(to) - mean) * factor * weight[c] + bias[c]);
    }
  }
}

// A token's channels from `begin` on, with whatever neighbours it has; see vector_kernels.h.
template <typename T, typename X>
inline void convolve_add_token(const X* map, int64_t height, int64_t width, int64_t row, int64_t column,
                               const T* weight, const T* bias, const X* added, int64_t begin,
                               int64_t channels, int64_t cols, T* out) {
  constexpr int64_t lanes = Vector<T>::lanes;
  const X* near[9];
  const T* by[9];
  int taps = 0;
  for (int64_t y = row - 1; y <= row + 1; ++y) {
    for (int64_t x = column - 1; x <= column + 1; ++x) {
      if (y < 0 || y >= height || x < 0 || x >= width) continue;
      near[taps] = map + (y * width + x) * channels;
      by[taps++] = weight + ((y - row + 1) * 3 + x - column + 1) * channels;
    }
  }
  int64_t c = begin;
  for (; c + lanes <= channels; c += lanes) {
    vec<T> sum = load_wide(added + c) + load_unaligned(bias + c);
    for (int tap = 0; tap < taps; ++tap) sum += load_unaligned(by[tap] + c) * load_wide(near[tap] + c);
    store(out + c, sum);
  }
  for (; c < channels; ++c) {
    T sum = widened(added[c]) + bias[c];
    for (int tap = 0; tap < taps; ++tap) sum += by[tap][c] * widened(near[tap][c]);
    out[c] = sum;
  }
  for (; c < cols; ++c) out[c] = 0;
}

// P tokens with neighbours at both sides share what they load: whole vectors of their channels. A line is
// null outside of the map; returns where the rest begins.
template <typename T, typename X, int P>
inline int64_t convolve_add_tokens(const X* const (&lines)[3], const T* weight, const T* bias, const X* added,
                                   int64_t channels, int64_t cols, T* out) {
  constexpr int64_t lanes = Vector<T>::lanes;
  int64_t c = 0;
  for (; c + lanes <= channels; c += lanes) {
    const vec<T> start = load_unaligned(bias + c);
    vec<T> sum[P];
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[p] = load_wide(added + p * channels + c) + start;
#pragma GCC unroll 3
    for (int line = 0; line < 3; ++line) {
      if (!lines[line]) continue;
      vec<T> w[3];
#pragma GCC unroll 3
      for (int tap = 0; tap < 3; ++tap) w[tap] = load_unaligned(weight + (line * 3 + tap) * channels + c);
#pragma GCC unroll 6
      for (int i = 0; i < P + 2; ++i) {
        const vec<T> here = load_wide(lines[line] + (i - 1) * channels + c);
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
          if (i - tap >= 0 && i - tap < P) sum[i - tap] += w[tap] * here;
        }
      }
    }
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) store(out + p * cols + c, sum[p]);
  }
  return c;
}

template <typename T, typename X>
void convolve_add(const X* map, int64_t height, int64_t width, int64_t first, int64_t count, const T* weight,
                  const T* bias, const X* added, int64_t channels, int64_t cols, T* out) {
  const auto one = [&](int64_t i, int64_t begin) {
    convolve_add_token<T, X>(map, height, width, (first + i) / width, (first + i) % width, weight, bias,
                             added + i * channels, begin, channels, cols, out + i * cols);
  };
  for (int64_t i = 0; i < count;) {
    const int64_t row = (first + i) / width, column = (first + i) % width;
    const int64_t inner = column == 0 || column == width - 1 ? 0
                          : width - 1 - column < count - i   ? width - 1 - column
                                                             : count - i;
    if (inner == 0) one(i++, 0);
    in_groups<kPixels>(inner, [&](int64_t at, int64_t size) {
      with_constant<kPixels>(size, [&]<int P>(Constant<P>) {
        const X* here = map + (first + i + at) * channels;
        const X* const lines[3] = {row > 0 ? here - width * channels : nullptr, here,
                                   row < height - 1 ? here + width * channels : nullptr};
        const int64_t whole = convolve_add_tokens<T, X, P>(lines, weight, bias, added + (i + at) * channels,
                                                           channels, cols, out + (i + at) * cols);
        for (int64_t p = 0; whole < cols && p < P; ++p) one(i + at + p, whole);
      });
    });
    i += inner;
  }
}

template <typename T, typename X>
void add(const X* x, int64_t stride, const T* rows, int64_t count, int64_t channels, int64_t cols, X* out) {
  constexpr int64_t lanes = Vector<T>::lanes;
  for (int64_t i = 0; i < count; ++i, x += stride, rows += cols, out += stride) {
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) store_wide(out + c, load_wide(x + c) + load(rows + c));
    for (; c < channels; ++c) narrow_to(widened(x[c]) + rows[c], out[c]);
  }
}

// Rounded, each beside its own.
inline words paired(vec<float> low, vec<float> high) {
#if defined(__AVX512BF16__)
  // 16 low ones, then 16 high ones.
  const __m512i both = (__m512i)_mm512_cvtne2ps_pbh((__m512)high, (__m512)low);
  const words order = 0x100000 + 0x10001 * words{0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
  return (words)_mm512_permutexvar_epi16((__m512i)order, both);
#else
  static constexpr uint32_t kUpper = 0xFFFF0000;
  return (rounded(high) & fetched(kUpper)) | (rounded(low) >> 16);
#endif
}

inline words load_words(const uint32_t* p) { return *reinterpret_cast<const words*>(p); }
inline vec<float> lower(words both) { return (vec<float>)(both << 16); }
inline vec<float> upper(words both) { return (vec<float>)(both & 0xFFFF0000); }
inline void store_words(uint32_t* p, words v) { *reinterpret_cast<words*>(p) = v; }

void unpair(const uint32_t* words_of_two, int64_t stride, int64_t channels, int64_t tokens, float* out,
            int64_t out_stride) {
  for (int64_t c = 0; c < channels; c += 2, words_of_two += stride, out += 2 * out_stride) {
    for (int64_t i = 0; i < tokens; i += Vector<float>::lanes) {
      const words both = load_words(words_of_two + i);
      store(out + i, lower(both));
      store(out + out_stride + i, upper(both));
    }
  }
}

// sum + a b of both halves of each word.
inline vec<float> add_pairs(vec<float> sum, words a, words b) {
#if defined(__AVX512BF16__)
  return (vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)a, (__m512bh)b);
#else
  sum += lower(a) * lower(b);
  return sum + upper(a) * upper(b);
#endif
}

// The same of one half, where the other one of b is 0.
template <bool high>
inline vec<float> add_half(vec<float> sum, words a, words b) {
#if defined(__AVX512BF16__)
  return add_pairs(sum, a, b);
#else
  return high ? sum + upper(a) * upper(b) : sum + lower(a) * lower(b);
#endif
}

// R tokens times C vectors of a layer's rows.
template <int R, int C>
inline void add_pairs_block(vec<float> (&sum)[R][C], const uint32_t* tokens, int64_t stride,
                            const uint32_t* weight, int64_t depth) {
  constexpr int64_t lanes = Vector<float>::lanes;
  for (int64_t k = 0; k < depth; ++k, weight += kGroup) {
    words row[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) row[c] = load_words(weight + c * lanes);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = add_pairs(sum[r][c], words{} + tokens[r * stride + k], row[c]);
    }
  }
}

void linear_rows(const uint32_t* tokens, int64_t stride, int64_t count, const uint32_t* weight,
                 const float* bias, int64_t depth, int64_t rows, float* out, int64_t out_stride) {
  constexpr int64_t lanes = Vector<float>::lanes;
  in_blocks<kPairTokens, kPairVectors>(count, rows / lanes, [&]<int R, int C>(int64_t token, int64_t vector) {
    float* to = out + token * out_stride + vector * lanes;
    vec<float> sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c)
        sum[r][c] = load(bias ? bias + (vector + c) * lanes : to + r * out_stride + c * lanes);
    }
    add_pairs_block(sum, tokens + token * stride, stride, weight + vector * lanes, depth);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) store(to + r * out_stride + c * lanes, sum[r][c]);
    }
  });
}

void linear_words(const uint32_t* tokens, int64_t stride, int64_t count, const uint32_t* weight,
                  const float* bias, int64_t depth, uint32_t* out) {
  constexpr int64_t lanes = Vector<float>::lanes;
  in_blocks<kPairTokens, kPairVectors / 2>(
      count, kGroup / (2 * lanes), [&]<int R, int P>(int64_t token, int64_t pair) {
        vec<float> sum[R][2 * P];
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 4
          for (int c = 0; c < 2 * P; ++c) sum[r][c] = load(bias + (2 * pair + c) * lanes);
        }
        add_pairs_block(sum, tokens + token * stride, stride, weight + 2 * pair * lanes, depth);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
#pragma GCC unroll 2
          for (int p = 0; p < P; ++p)
            store_words(out + (token + r) * kGroup / 2 + (pair + p) * lanes,
                        paired(sum[r][2 * p], sum[r][2 * p + 1]));
        }
      });
}

// P tokens next to each other share what they load.
template <int P>
inline void conv_gelu_words_block(const uint32_t* const* lines, int64_t first, const uint32_t* taps,
                                  const float* bias, uint32_t* out, int64_t out_stride) {
  constexpr int64_t size = kGroup / 2;
  for (int64_t c = 0; c < size; c += Vector<float>::lanes) {
    vec<float> low[P], high[P];
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      low[p] = load(bias + c);
      high[p] = load(bias + size + c);
    }
#pragma GCC unroll 3
    for (int line = 0; line < 3; ++line) {
      words w[3][2];
#pragma GCC unroll 3
      for (int tap = 0; tap < 3; ++tap) {
#pragma GCC unroll 2
        for (int half = 0; half < 2; ++half)
          w[tap][half] = load_words(taps + ((line * 3 + tap) * 2 + half) * size + c);
      }
#pragma GCC unroll 8
      for (int i = 0; i < P + 2; ++i) {
        const words here = load_words(lines[line] + (first + i) * size + c);
#pragma GCC unroll 3
        for (int tap = 0; tap < 3; ++tap) {
          if (i - tap < 0 || i - tap >= P) continue;
          low[i - tap] = add_half<false>(low[i - tap], here, w[tap][0]);
          high[i - tap] = add_half<true>(high[i - tap], here, w[tap][1]);
        }
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p)
      store_words(out + (first + p) * out_stride + c, paired(rough_gelu(low[p]), rough_gelu(high[p])));
  }
}

void conv_gelu_words(const uint32_t* const* lines, int64_t count, const uint32_t* taps, const float* bias,
                     uint32_t* out, int64_t out_stride) {
  in_groups<kConvTokens>(count, [&](int64_t first, int64_t size) {
    with_constant<kConvTokens>(size, [&]<int P>(Constant<P>) {
      conv_gelu_words_block<P>(lines, first, taps, bias, out, out_stride);
    });
  });
}

// The sum of all lanes.
inline float total(vec<float> v) {
#pragma GCC unroll 4
  for (int64_t step = Vector<float>::lanes / 2; step > 0; step /= 2) {
    Vector<float>::bits other;
    for (int64_t lane = 0; lane < Vector<float>::lanes; ++lane) other[lane] = lane ^ step;
    v += __builtin_shuffle(v, other);
  }
  return v[0];
}

// T tokens next to each other: their sums do not wait for one another's.
template <typename X, int T>
inline void normalize_tokens(const X* x, int64_t channels, const float* weight, const float* bias, float eps,
                             BFloat16* out) {
  constexpr int64_t lanes = Vector<float>::lanes;
  const int64_t whole = channels / lanes * lanes;
  float mean[T], factor[T];
  // The means of `term` over each token's channels.
  const auto averaged = [&](float (&means)[T], auto term) {
    vec<float> sum[T] = {};
    for (int64_t c = 0; c < whole; c += lanes) {
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) sum[t] += term(t, load_wide(x + t * channels + c));
    }
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t) {
      float rest = 0;
      for (int64_t c = whole; c < channels; ++c) rest += term(t, widened(x[t * channels + c]));
      means[t] = (total(sum[t]) + rest) / channels;
    }
  };
  averaged(mean, [](int, auto v) { return v; });
  averaged(factor, [&](int t, auto v) { return (v - mean[t]) * (v - mean[t]); });
  for (int t = 0; t < T; ++t) factor[t] = 1 / __builtin_sqrtf(factor[t] + eps);
  for (int64_t c = 0; c < whole; c += lanes) {
    const vec<float> w = load_unaligned(weight + c), b = load_unaligned(bias + c);
#pragma GCC unroll 8
    for (int t = 0; t < T; ++t)
      store_wide(out + t * channels + c, (load_wide(x + t * channels + c) - mean[t]) * (factor[t] * w) + b);
  }
  for (int64_t c = whole; c < channels; ++c) {
    for (int t = 0; t < T; ++t)
      narrow_to((widened(x[t * channels + c]) - mean[t]) * (factor[t] * weight[c]) + bias[c],
                out[t * channels + c]);
  }
}

template <typename X>
void normalize_rows(const X* x, int64_t count, int64_t channels, const float* weight, const float* bias,
                    float eps, BFloat16* out) {
  in_groups<kNormTokens>(count, [&](int64_t first, int64_t size) {
    with_constant<kNormTokens>(size, [&]<int T>(Constant<T>) {
      normalize_tokens<X, T>(x + first * channels, channels, weight, bias, eps, out + first * channels);
    });
  });
}

void round_rows(const float* rows, int64_t count, int64_t channels, int64_t cols, BFloat16* out,
                int64_t stride) {
  constexpr int64_t lanes = Vector<float>::lanes;
  for (int64_t i = 0; i < count; ++i, rows += cols, out += stride) {
    int64_t c = 0;
    for (; c + lanes <= channels; c += lanes) store_wide(out + c, load(rows + c));
    for (; c < channels; ++c) narrow_to(rows[c], out[c]);
  }
}

void turn_rows(const float* rows, int64_t count, int64_t cols, const float* row, const float* columns,
               int64_t heads, int64_t pairs, BFloat16* out, int64_t stride) {
  constexpr int64_t lanes = Vector<float>::lanes;
  // Some pairs of a token's heads: `table` has their cosines, and their sines `pairs` further on.
  const auto turn = [&]<bool full>(const float* from, BFloat16* to, const float* table,
                                   Lanes<float, full> part) {
    const vec<float> cos = part.load(table), sin = part.load(table + pairs);
    for (int64_t head = 0; head < heads; ++head, from += 4 * pairs, to += 4 * pairs) {
      const vec<float> low = part.load(from), high = part.load(from + 2 * pairs);
      part.store_narrow(to, low * cos - high * sin);
      part.store_narrow(to + 2 * pairs, high * cos + low * sin);
    }
  };
  for (int64_t i = 0; i < count; ++i, rows += cols, columns += 2 * pairs, out += stride) {
    int64_t c = 0;
    for (; c + lanes <= pairs; c += lanes) {
      turn(rows + c, out + c, row + c, Lanes<float, true>{lanes});
      turn(rows + pairs + c, out + pairs + c, columns + c, Lanes<float, true>{lanes});
    }
    if (c < pairs) {
      turn(rows + c, out + c, row + c, Lanes<float, false>{pairs - c});
      turn(rows + pairs + c, out + pairs + c, columns + c, Lanes<float, false>{pairs - c});
    }
  }
}

template <typename T>
void rotate(T* x, const T* cos, const T* sin, int64_t heads, int64_t head_dims, int64_t tokens) {
  const int64_t half = head_dims / 2 * tokens;
  for (int64_t head = 0; head < heads; ++head, x += 2 * half) {
    for (int64_t i = 0; i < half; i += Vector<T>::lanes) {
      const vec<T> a = load(x + i), b = load(x + half + i);
      store(x + i, a * load(cos + i) - b * load(sin + i));
      store(x + half + i, b * load(cos + i) + a * load(sin + i));
    }
  }
}

template <typename T>
void accumulate(T* sum, const T* x, int64_t n) {
  for (int64_t i = 0; i < n; i += Vector<T>::lanes) store(sum + i, load(sum + i) + load(x + i));
}

template <typename T>
void affine(T* rows, int64_t count, int64_t cols, const T* factors, const T* offsets) {
  for (int64_t i = 0; i < count; ++i, rows += cols) {
    for (int64_t c = 0; c < cols; c += Vector<T>::lanes)
      store(rows + c, load(rows + c) * factors[i] + load(offsets + c));
  }
}

template <typename T, int J>
inline void sign_rows(const T* x, const T* y, const T* w, int64_t rows, int64_t cols, T* dx, T* dy) {
  for (int64_t c = 0; c < cols; c += Vector<T>::lanes) {
    vec<T> there[J], sum[J];
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) {
      there[j] = load(y + j * cols + c);
      sum[j] = load(dy + j * cols + c);
    }
    for (int64_t i = 0; i < rows; ++i) {
      const vec<T> here = load(x + i * cols + c);
      vec<T> own = load(dx + i * cols + c);
#pragma GCC unroll 16
      for (int j = 0; j < J; ++j) {
        const vec<T> t = signed_by<T>(here - there[j], w[j * kTile + i]);
        own -= t;
        sum[j] += t;
      }
      store(dx + i * cols + c, own);
    }
#pragma GCC unroll 16
    for (int j = 0; j < J; ++j) store(dy + j * cols + c, sum[j]);
  }
}

template <typename T>
void sign_tile(const T* x, const T* y, const T* w, int64_t rows, int64_t m, int64_t cols, T* dx, T* dy) {
  in_groups<kSignRows>(m, [&](int64_t first, int64_t size) {
    with_constant<kSignRows>(size, [&]<int J>(Constant<J>) {
      sign_rows<T, J>(x, y + first * cols, w + first * kTile, rows, cols, dx, dy + first * cols);
    });
  });
}

// As many chains as the registers hold.
constexpr int kFloorSums = 2 * kSignRows;

template <typename T>
T floor_loop(int64_t steps) {
  constexpr int count = kFloorSums;
  vec<T> sum[count] = {};
  vec<T> here = vec<T>{} + static_cast<T>(0.5);
  for (int64_t s = 0; s < steps; ++s) {
    const T there = static_cast<T>(s & 7);
#pragma GCC unroll 32
    for (int j = 0; j < count; ++j) {
      sum[j] += absolute<T>(here - there);
      LF_HIDE(here);  // keeps the subtraction from being shared between the sums
    }
  }
  T total = 0;
  for (int j = 0; j < count; ++j)
    for (int64_t l = 0; l < Vector<T>::lanes; ++l) total += sum[j][l];
  return total;
}

template <typename T>
constexpr Kernels<T> table() {
  return {pack<T>,
          unpack<T>,
          transpose<T>,
          kernel_tile<T>,
          product<T>,
          linear<T>,
          convolve_gelu<T>,
          conv_row<T>,
          conv_gelu_row<T>,
          conv_gelu_gradient_row<T>,
          normalize<T>,
          convolve_add<T, T>,
          add<T, T>,
          rotate<T>,
          accumulate<T>,
          affine<T>,
          sign_tile<T>,
          floor_loop<T>,
          kFloorSums * Vector<T>::lanes};
}

bool supported() {
#if defined(__AVX512BF16__)
  if (!__builtin_cpu_supports("avx512bf16")) return false;
#endif
#if defined(__AVX512F__)
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("fma");
#elif defined(__AVX2__)
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#else
  return true;
#endif
}

}  // namespace

extern const InstructionSet instructions;
const InstructionSet instructions = {
    LF_STRING(LF_ISA),
    supported,
    table<float>(),
    table<double>(),
    stream,
    {Vector<float>::lanes, convolve_add<float, BFloat16>, add<float, BFloat16>, unpair, linear_rows,
     linear_words, conv_gelu_words, normalize_rows<float>, normalize_rows<BFloat16>, round_rows, turn_rows},
};

}  // namespace LF_ISA
}  // namespace lf
