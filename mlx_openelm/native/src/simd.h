// Vectors: the only file, with `amx.h`, that depends on the instruction set.
//
// `Float` holds as many floats as the widest register (16, 8 or 4). Sums, products and comparisons are the compiler's
// vector arithmetic (`vector_size` of GCC and Clang works on every machine), which fuses a * b + c into one rounding;
// intrinsics appear only for instructions that it cannot express.

#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#if defined(__AVX2__) || defined(__AVX512F__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

#if defined(OPENELM_EMULATE_AVX512)  // tests run the AVX-512 code on machines without it
#include "emulated_avx512.h"
#endif
#if defined(__AVX512F__) || defined(OPENELM_EMULATE_AVX512)
#define OPENELM_AVX512
#endif
#if (defined(__AVX512VNNI__) && defined(__AVX512VL__)) || defined(OPENELM_EMULATE_AVX512)
#define OPENELM_VNNI
#endif

#define INLINE inline __attribute__((always_inline))
#define INLINE_LAMBDA __attribute__((always_inline))

namespace openelm {

#if defined(OPENELM_AVX512)
constexpr int kLanes = 16;
constexpr int kRegisters = 32;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
constexpr int kRegisters = 16;
#else
constexpr int kLanes = 4;
constexpr int kRegisters = 32;
#endif

// Half precision as stored: bits without arithmetic.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};

template <class T, int N>
struct VectorOf {
  typedef T type __attribute__((vector_size(N * sizeof(T))));
};
template <class T, int N>
using Vector = typename VectorOf<T, N>::type;

using Float = Vector<float, kLanes>;
using Int = Vector<int32_t, kLanes>;

// A vector from any address: in C++ an unaligned load is a memcpy.
template <class V, class T>
INLINE V read(const T* from) {
  V value;
  std::memcpy(&value, from, sizeof value);
  return value;
}

template <class V, class T>
INLINE void write(T* to, V value) {
  std::memcpy(to, &value, sizeof value);
}

template <class V>
INLINE V bits_of(const auto& value) {
  static_assert(sizeof(V) == sizeof value);
  V bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

template <int N = kLanes>
INLINE Vector<float, N> spread(float value) {
  return value - Vector<float, N>{};
}

// N small integers in 32 bits each. (GCC 12 does not choose these instructions by itself.)
template <int N>
INLINE Vector<int32_t, N> widen(const uint8_t* from) {
#if defined(__AVX2__)
  if constexpr (N == 8) return bits_of<Vector<int32_t, 8>>(_mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)from)));
#endif
#if defined(OPENELM_AVX512)
  if constexpr (N == 16) return bits_of<Vector<int32_t, 16>>(_mm512_cvtepu8_epi32(read<__m128i>(from)));
#endif
  return __builtin_convertvector(read<Vector<uint8_t, N>>(from), Vector<int32_t, N>);
}

template <int N>
INLINE Vector<int32_t, N> widen(const uint16_t* from) {
#if defined(__AVX2__)
  if constexpr (N == 8) return bits_of<Vector<int32_t, 8>>(_mm256_cvtepu16_epi32(read<__m128i>(from)));
#endif
#if defined(OPENELM_AVX512)
  if constexpr (N == 16) return bits_of<Vector<int32_t, 16>>(_mm512_cvtepu16_epi32(read<__m256i>(from)));
#endif
  return __builtin_convertvector(read<Vector<uint16_t, N>>(from), Vector<int32_t, N>);
}

// N numbers of a type as floats.
template <int N = kLanes>
INLINE Vector<float, N> load(const float* from) {
  return read<Vector<float, N>>(from);
}

// bfloat16 is the upper half of a float.
template <int N = kLanes>
INLINE Vector<float, N> load(const BFloat16* from) {
  return bits_of<Vector<float, N>>(widen<N>(&from->bits) << 16);
}

INLINE float half_to_float(uint16_t half) {
  // The exponent's bias differs by 112; a multiplication by 2^112 also makes subnormal halves right.
  uint32_t magnitude = uint32_t(half & 0x7fff) << 13, sign = uint32_t(half & 0x8000) << 16;
  float value = bits_of<float>(magnitude) * 0x1p112f;
  uint32_t bits = bits_of<uint32_t>(value);
  if ((half & 0x7c00) == 0x7c00) bits = 0x7f800000 | (magnitude & 0x7fffff);  // infinities and NaN
  return bits_of<float>(bits | sign);
}

template <int N = kLanes>
INLINE Vector<float, N> load(const Float16* from) {
#if defined(__F16C__)
  if constexpr (N == 8) return bits_of<Vector<float, 8>>(_mm256_cvtph_ps(read<__m128i>(from)));
#endif
#if defined(OPENELM_AVX512)
  if constexpr (N == 16) return bits_of<Vector<float, 16>>(_mm512_cvtph_ps(read<__m256i>(from)));
#endif
#if defined(__ARM_NEON)
  if constexpr (N == 4) return bits_of<Vector<float, 4>>(vcvt_f32_f16(read<float16x4_t>(from)));
#endif
  Vector<float, N> value{};
  for (int i = 0; i < N; i++) value[i] = half_to_float(from[i].bits);
  return value;
}

template <int N = kLanes>
INLINE Vector<float, N> load(const uint8_t* from) {
  return __builtin_convertvector(widen<N>(from), Vector<float, N>);
}

INLINE float load_one(const float* from) { return *from; }
INLINE float load_one(const BFloat16* from) { return bits_of<float>(uint32_t(from->bits) << 16); }
INLINE float load_one(const Float16* from) { return half_to_float(from->bits); }

// The first `count` numbers of a vector, then zeros: for the ends of rows.
template <int N = kLanes, class T>
INLINE Vector<float, N> load_some(const T* from, int count) {
  if (count >= N) return load<N>(from);
  Vector<float, N> value{};
  for (int i = 0; i < count; i++) value[i] = load_one(from + i);
  return value;
}

// N lanes as M: the second half is added to the first until they are as few.
template <int N, int M>
INLINE Vector<float, M> fold(Vector<float, N> value) {
  if constexpr (N == M) {
    return value;
  } else {
    Vector<float, N / 2> halves[2];
    std::memcpy(halves, &value, sizeof value);
    return fold<N / 2, M>(halves[0] + halves[1]);
  }
}

template <int N>
INLINE float sum(Vector<float, N> value) {
  auto four = fold<N, 4>(value);
  return (four[0] + four[2]) + (four[1] + four[3]);
}
INLINE float sum(Float value) { return sum<kLanes>(value); }

// Adds up pairs of neighbouring blocks of `step` lanes, a's in the first and b's in the second block of each pair.
template <int step, class V, int... lane>
INLINE V add_blocks(V a, V b, std::integer_sequence<int, lane...>) {
  constexpr int lanes = sizeof...(lane);
  auto first = __builtin_shufflevector(
      a, b, (lane % (2 * step) < step ? lane : lanes + lane - step)...);
  auto second = __builtin_shufflevector(
      a, b, (lane % (2 * step) < step ? lane + step : lanes + lane)...);
  return first + second;
}

// Turns the rows of a square of 32-bit numbers into its columns, in log2 rounds: each exchanges the blocks of `step`
// numbers beside the diagonal.
template <int step, class V, int... lane>
INLINE void transpose(V* rows, std::integer_sequence<int, lane...> lanes) {
  constexpr int count = sizeof...(lane);
#pragma GCC unroll 16
  for (int i = 0; i < count; i++) {
    if (i & step) continue;
    V a = rows[i], b = rows[i + step];
    rows[i] = __builtin_shufflevector(a, b, (lane & step ? count + lane - step : lane)...);
    rows[i + step] = __builtin_shufflevector(a, b, (lane & step ? count + lane : lane + step)...);
  }
  if constexpr (2 * step < count) transpose<2 * step>(rows, lanes);
}
template <class V>
INLINE void transpose(V* rows) {
  transpose<1>(rows, std::make_integer_sequence<int, sizeof(V) / 4>{});
}

// to [columns, rows] += the transposed from [rows, columns]. Whole vectors of `from` are read, also beyond the columns.
inline void add_transposed(const float* from, int64_t from_stride, int64_t rows, int64_t columns, float* to,
                           int64_t to_stride) {
  int64_t whole = rows / kLanes * kLanes;
  for (int64_t c = 0, count; c < columns; c += count) {
    count = columns - c < kLanes ? columns - c : kLanes;
    for (int64_t r = 0; r < whole; r += kLanes) {
      Float block[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; i++) block[i] = load(from + (r + i) * from_stride + c);
      transpose(block);
      for (int i = 0; i < count; i++) {
        float* at = to + (c + i) * to_stride + r;
        write(at, load(at) + block[i]);
      }
    }
    for (int64_t r = whole; r < rows; r++)
      for (int64_t i = c; i < c + count; i++) to[i * to_stride + r] += from[r * from_stride + i];
  }
}

// The sums of N vectors of N lanes, one per lane, in log2(N) rounds for all of them.
template <int N, int step = 1>
INLINE Vector<float, N> sums(Vector<float, N>* vectors) {
  for (int i = 0; i < N / step / 2; i++)
    vectors[i] = add_blocks<step>(vectors[2 * i], vectors[2 * i + 1], std::make_integer_sequence<int, N>{});
  if constexpr (2 * step < N) return sums<N, 2 * step>(vectors);
  return vectors[0];
}

// The same for kLanes vectors, each sum in the order of `sum`: that of vector v is in lane `lane_of_sum(v)`.
template <int count = kLanes>
INLINE Float ordered_sums(Float* vectors) {
  for (int i = 0; i < count / 2; i++)
    vectors[i] = add_blocks<count / 2>(vectors[2 * i], vectors[2 * i + 1], std::make_integer_sequence<int, kLanes>{});
  if constexpr (count > 2) return ordered_sums<count / 2>(vectors);
  return vectors[0];
}

// The bits of v in reverse.
constexpr int lane_of_sum(int v) {
  int lane = 0;
  for (int bit = 1; bit < kLanes; bit *= 2, v /= 2) lane = 2 * lane + v % 2;
  return lane;
}

// Keeps a number that was loaded in a register: a compiler may prefer to load it again for each use, but a processor
// loads only two vectors a cycle.
INLINE void keep(Float& value) {
#if defined(__AVX512F__)
  asm("" : "+v"(value));
#elif defined(__AVX2__) && !defined(OPENELM_AVX512)
  asm("" : "+x"(value));
#else
  (void)value;
#endif
}

// Lane by lane.
template <class V>
INLINE V larger(V a, V b) {
  return a > b ? a : b;
}

template <int N>
INLINE float largest(Vector<float, N> value) {
  if constexpr (N == 1) {
    return value[0];
  } else {
    Vector<float, N / 2> halves[2];
    std::memcpy(halves, &value, sizeof value);
    return largest<N / 2>(larger(halves[0], halves[1]));
  }
}
INLINE float largest(Float value) { return largest<kLanes>(value); }

// e^x: 2^n as bits of the exponent, times 2^f by a polynomial for f in [-1/2, 1/2] (relative error 2e-7).
// Below -87.3 it is 0, since subnormal numbers would make sums slow; NaN stays NaN.
INLINE Float exp(Float x) {
  constexpr float kLowest = -87.3f, kHighest = 88.7f;
  Float in_range = x > kHighest ? spread(kHighest) : x;
  in_range = in_range < kLowest ? spread(kLowest) : in_range;
  // Adding 1.5 * 2^23 rounds to a whole number; ln 2 in two parts keeps the remainder exact.
  Float rounded = in_range * 1.44269504f + 12582912.0f, whole = rounded - 12582912.0f;
  Float f = in_range - whole * 0.693359375f - whole * -2.12194440e-4f;
  Float p = spread(1.9875691500e-4f);
  p = p * f + 1.3981999507e-3f;
  p = p * f + 8.3334519073e-3f;
  p = p * f + 4.1665795894e-2f;
  p = p * f + 1.6666665459e-1f;
  p = p * f + 5.0000001201e-1f;
  p = p * f * f + f + 1.0f;
  Int power = __builtin_convertvector(whole, Int) << 23;
  Float value = bits_of<Float>(bits_of<Int>(p) + power);
  return x < kLowest ? Float{} : x != x ? x : value;
}

// 32 bytes: the unit in which weights are unpacked, for any register width.
using Bytes = Vector<uint8_t, 32>;

// The bytes that one instruction multiplies, and lanes for sums of four of their products each.
#if defined(OPENELM_VNNI)
using Wide = Vector<uint8_t, 64>;
#else
using Wide = Vector<uint8_t, 32>;
#endif
constexpr int kWideLanes = sizeof(Wide) / 4;
using WideInt = Vector<int32_t, kWideLanes>;
using WideFloat = Vector<float, kWideLanes>;

// The first and the second halves of as many blocks as fill them.
constexpr int kHalves = sizeof(Wide) / 16;
INLINE void halves_together(const Bytes (&blocks)[kHalves], Wide (&halves)[2]) {
  using Block = Vector<int64_t, 4>;
#if defined(OPENELM_VNNI)
  auto pair = [&](int i) INLINE_LAMBDA {
    return __builtin_shufflevector(Block(blocks[i]), Block(blocks[i + 1]), 0, 1, 2, 3, 4, 5, 6, 7);
  };
  auto a = pair(0), b = pair(2);
  halves[0] = Wide(__builtin_shufflevector(a, b, 0, 1, 4, 5, 8, 9, 12, 13));
  halves[1] = Wide(__builtin_shufflevector(a, b, 2, 3, 6, 7, 10, 11, 14, 15));
#else
  auto a = Block(blocks[0]), b = Block(blocks[1]);
  halves[0] = Wide(__builtin_shufflevector(a, b, 0, 1, 4, 5));
  halves[1] = Wide(__builtin_shufflevector(a, b, 2, 3, 6, 7));
#endif
}

// Each lane of a vector four times. (For numbers in memory there is a way that compilers do not find.)
INLINE WideFloat four_times(Vector<float, kHalves> value) {
#if defined(OPENELM_VNNI)
  return __builtin_shufflevector(value, value, 0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
#else
  return __builtin_shufflevector(value, value, 0, 0, 0, 0, 1, 1, 1, 1);
#endif
}

// Where the bytes of numbers in half precision go, each number four times: alone, or as the upper halves of floats.
INLINE Vector<int8_t, 2 * kWideLanes> half_four_times() {
  Vector<int8_t, 2 * kWideLanes> bytes{};
  for (int i = 0; i < 2 * kWideLanes; i++) bytes[i] = int8_t(i / 8 * 2 + i % 2);
  return bytes;
}
INLINE Vector<int8_t, 4 * kWideLanes> upper_half_four_times() {
  Vector<int8_t, 4 * kWideLanes> bytes{};
  for (int i = 0; i < 4 * kWideLanes; i++) bytes[i] = int8_t(i % 4 < 2 ? -1 : i / 16 * 2 + i % 2);
  return bytes;
}

// kHalves numbers of a type, each four times.
INLINE WideFloat load_four_times(const float* from) {
#if defined(OPENELM_VNNI) && defined(__AVX512F__)
  constexpr Vector<int32_t, 16> places = {0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3};
  return bits_of<WideFloat>(
      _mm512_permutevar_ps(_mm512_broadcast_f32x4(read<__m128>(from)), bits_of<__m512i>(places)));
#elif defined(__AVX2__) && !defined(OPENELM_VNNI)
  constexpr Vector<int32_t, 8> places = {0, 0, 0, 0, 1, 1, 1, 1};
  auto pairs = _mm256_castpd_ps(_mm256_set1_pd(read<double>(from)));
  return bits_of<WideFloat>(_mm256_permutevar_ps(pairs, bits_of<__m256i>(places)));
#else
  return four_times(load<kHalves>(from));
#endif
}

INLINE WideFloat load_four_times(const BFloat16* from) {
#if defined(OPENELM_VNNI) && defined(__AVX512BW__)
  auto all = _mm512_set1_epi64(read<int64_t>(from));
  return bits_of<WideFloat>(_mm512_shuffle_epi8(all, bits_of<__m512i>(upper_half_four_times())));
#elif defined(__AVX2__) && !defined(OPENELM_VNNI)
  auto all = _mm256_set1_epi32(read<int32_t>(from));
  return bits_of<WideFloat>(_mm256_shuffle_epi8(all, bits_of<__m256i>(upper_half_four_times())));
#else
  return four_times(load<kHalves>(from));
#endif
}

INLINE WideFloat load_four_times(const Float16* from) {
#if defined(OPENELM_VNNI) && defined(__AVX512BW__)
  auto all = _mm256_set1_epi64x(read<int64_t>(from));
  return bits_of<WideFloat>(_mm512_cvtph_ps(_mm256_shuffle_epi8(all, bits_of<__m256i>(half_four_times()))));
#elif defined(__AVX2__) && defined(__F16C__) && !defined(OPENELM_VNNI)
  auto all = _mm_set1_epi32(read<int32_t>(from));
  return bits_of<WideFloat>(_mm256_cvtph_ps(_mm_shuffle_epi8(all, bits_of<__m128i>(half_four_times()))));
#else
  return four_times(load<kHalves>(from));
#endif
}

// Sums of products of unsigned weights below 64 and signed activations, four products to a lane.
//
// AVX2 adds pairs of products in 16 bits, which can hold `kHeld` such sums for weights of `bits` bits before they must
// be widened. VNNI and ARM's dot products use 32 bits from the start.
template <int bits>
class Dots {
 public:
  INLINE void add(Wide weights, const int8_t* x) {
#if defined(OPENELM_VNNI)
    total_ = bits_of<WideInt>(_mm512_dpbusd_epi32(
        bits_of<__m512i>(total_), bits_of<__m512i>(weights), read<__m512i>(x)));
#elif defined(__AVX2__)
    if (held_ == kHeld) flush();
    __m256i pairs = _mm256_maddubs_epi16(bits_of<__m256i>(weights), read<__m256i>(x));
    short_ = held_++ ? _mm256_add_epi16(short_, pairs) : pairs;
#elif defined(__ARM_FEATURE_DOTPROD)
    int8x16_t w[2];
    std::memcpy(w, &weights, sizeof w);
    int32x4_t parts[2];
    std::memcpy(parts, &total_, sizeof parts);
    parts[0] = vdotq_s32(parts[0], w[0], vld1q_s8(x));
    parts[1] = vdotq_s32(parts[1], w[1], vld1q_s8(x + 16));
    std::memcpy(&total_, parts, sizeof parts);
#else
    for (int i = 0; i < int(sizeof weights); i++) total_[i / 4] += int32_t(weights[i]) * x[i];
#endif
  }

  INLINE WideInt finish() {
#if defined(__AVX2__) && !defined(OPENELM_VNNI)
    flush();
#endif
    return total_;
  }

 private:
  WideInt total_{};
#if defined(__AVX2__) && !defined(OPENELM_VNNI)
  static constexpr int kHeld = 32767 / (2 * 127 * ((1 << bits) - 1));
  INLINE void flush() {
    total_ += bits_of<WideInt>(_mm256_madd_epi16(short_, _mm256_set1_epi16(1)));
    held_ = 0;
  }
  __m256i short_;
  int held_ = 0;
#endif
};

}  // namespace openelm
