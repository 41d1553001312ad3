// AVX-512 for machines without it: the few instructions that `simd.h` uses, as loops by their definitions in Intel's
// Intrinsics Guide. Vectors of 16 floats need no emulation, since compilers split them.

#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>

namespace emulated_avx512 {

typedef int32_t Ints __attribute__((vector_size(64)));
typedef float Floats __attribute__((vector_size(64)));

template <class Number, class Register>
Ints widen(Register narrow) {
  static_assert(sizeof narrow == 16 * sizeof(Number));
  Number numbers[16];
  std::memcpy(numbers, &narrow, sizeof numbers);
  Ints wide;
  for (int i = 0; i < 16; i++) wide[i] = numbers[i];
  return wide;
}

inline Floats halves_to_floats(__m256i halves) {
  __m128i low = _mm256_castsi256_si128(halves), high = _mm256_extracti128_si256(halves, 1);
  __m256 parts[2] = {_mm256_cvtph_ps(low), _mm256_cvtph_ps(high)};
  Floats floats;
  std::memcpy(&floats, parts, sizeof floats);
  return floats;
}

// Four products of unsigned and signed bytes are added to each 32-bit number. The register is a type of this file:
// compilers do not return a 512-bit one without AVX-512.
inline Ints dot(Ints total, Ints unsigned_bytes, Ints signed_bytes) {
  uint8_t a[64];
  int8_t b[64];
  std::memcpy(a, &unsigned_bytes, 64), std::memcpy(b, &signed_bytes, 64);
  for (int i = 0; i < 64; i++) total[i / 4] += a[i] * b[i];
  return total;
}

}  // namespace emulated_avx512

#define _mm512_cvtepu8_epi32 emulated_avx512::widen<uint8_t>
#define _mm512_cvtepu16_epi32 emulated_avx512::widen<uint16_t>
#define _mm512_cvtph_ps emulated_avx512::halves_to_floats
#define _mm512_dpbusd_epi32 emulated_avx512::dot
#define __m512i emulated_avx512::Ints
