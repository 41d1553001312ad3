// Unpacking weights, 32 at a time.
//
// MLX packs a row as one string of bits, lowest first: weight i of `bits` bits starts at bit i * bits. 32 weights are
// 4 * bits bytes, whatever `bits` is, and a group (32, 64 or 128 weights that share scale and bias) is whole blocks.

#pragma once

#include "simd.h"

namespace openelm {

// The order of a block of unpacked weights: position i holds weight `unpacked_order<bits, block>(i)`. 2 and 4 bits are
// separated by shifting whole registers, so neighbours end up in different parts.
template <int bits>
constexpr int kParts = bits == 4 ? 2 : bits == 2 ? 4 : 1;
template <int bits, int block>
constexpr int unpacked_order(int place) {
  return place % (block / kParts<bits>) * kParts<bits> + place / (block / kParts<bits>);
}

// 32 weights as bytes, in the order that is fastest.
template <int bits>
INLINE Bytes unpack(const uint8_t* packed) {
  if constexpr (bits == 8) {
    return read<Bytes>(packed);
  } else if constexpr (bits == 4 || bits == 2) {
    // Copies of the whole, each shifted further.
    using Words = Vector<uint64_t, 4>;
    Words words = read<uint64_t>(packed) + Words{}, shifts = bits == 4 ? Words{0, 0, 4, 4} : Words{0, 2, 4, 6};
    if constexpr (bits == 4) {
      auto pair = read<Vector<uint64_t, 2>>(packed);
      words = __builtin_shufflevector(pair, pair, 0, 1, 0, 1);
    }
    return bits_of<Bytes>(words >> shifts) & uint8_t((1 << bits) - 1);
  } else {
#if defined(__AVX2__)
    // Each half of the register gets the bytes of 16 weights. 8 at a time are spread to 16 bits each, which always
    // hold the whole weight; a multiplication shifts it to the top, which drops its neighbours.
    constexpr int skipped = bits == 3 ? 6 : 16 - 2 * bits;  // bytes before the second half's first weight
    __m128i first, second;
    if constexpr (bits == 3) {
      first = second = _mm_insert_epi32(_mm_loadl_epi64((const __m128i*)packed), read<int>(packed + 8), 2);
    } else {
      first = read<__m128i>(packed);
      second = read<__m128i>(packed + 4 * bits - 16);
    }
    __m256i bytes = _mm256_set_m128i(second, first);
    Vector<int8_t, 32> spread_low, spread_high;
    Vector<uint16_t, 16> factors;
    for (int i = 0; i < 16; i++) {
      int weight = i % 8, from = weight * bits / 8 + (i < 8 ? 0 : skipped), shift = weight * bits % 8;
      // If a weight ends within its first byte, the second may be out of range.
      bool one = shift + bits <= 8;
      spread_low[2 * i] = int8_t(from), spread_low[2 * i + 1] = int8_t(one ? -1 : from + 1);
      spread_high[2 * i] = int8_t(from + bits), spread_high[2 * i + 1] = int8_t(one ? -1 : from + bits + 1);
      factors[i] = uint16_t(1 << (16 - bits - shift));
    }
    auto opened = [&](Vector<int8_t, 32> places) {
      __m256i wide = _mm256_shuffle_epi8(bytes, bits_of<__m256i>(places));
      return _mm256_srli_epi16(_mm256_mullo_epi16(wide, bits_of<__m256i>(factors)), 16 - bits);
    };
    return bits_of<Bytes>(_mm256_packus_epi16(opened(spread_low), opened(spread_high)));
#else
    // 8 weights are `bits` bytes.
    uint8_t weights[32];
    for (int i = 0; i < 4; i++) {
      uint64_t string = 0;
      std::memcpy(&string, packed + i * bits, bits);
      for (int j = 0; j < 8; j++) weights[8 * i + j] = string >> (bits * j) & ((1 << bits) - 1);
    }
    return read<Bytes>(weights);
#endif
  }
}

// Weights that are best unpacked together: with 4 bits one shift unpacks 64, if a group has that many.
template <int bits, int group>
constexpr int kBlock = bits == 4 && group >= 64 ? 64 : 32;

template <int bits, int block>
INLINE void unpack_block(const uint8_t* packed, Bytes (&weights)[block / 32]) {
  if constexpr (block == 32) {
    weights[0] = unpack<bits>(packed);
  } else {
    static_assert(bits == 4 && block == 64);
    Bytes pairs = read<Bytes>(packed);
    weights[0] = pairs & 15, weights[1] = pairs >> 4;
  }
}

template <int bits, int... i>
INLINE Bytes put_in_order(Bytes weights, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(weights, weights, (i % kParts<bits> * (32 / kParts<bits>) + i / kParts<bits>)...);
}

// 32 weights in the order of the row.
template <int bits>
INLINE Bytes unpack_in_order(const uint8_t* packed) {
  return put_in_order<bits>(unpack<bits>(packed), std::make_integer_sequence<int, 32>{});
}

}  // namespace openelm
