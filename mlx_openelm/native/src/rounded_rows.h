// Products of few rows of rounded activations with a packed matrix: y += x W^T.
//
// Activations are rounded to 8 bits with a scale for each group, so q x is a sum of products of small integers, and the
// processor computes 32 or 64 at once. A vector holds 16 weights of each of kTogether groups: what follows the integers
// (conversion, two scales and an addition) takes as long for one group as for several.

#pragma once

#include <cmath>

#include "packed_sums.h"

namespace openelm {

// Whether weights of this many bits can be multiplied with rounded activations: 16 bits must hold two products.
constexpr bool can_round(int bits) { return bits >= 2 && bits <= 6; }

constexpr int kTogether = kHalves;
constexpr int64_t kManyNumbers = 1 << 13;  // of x, that are rounded by several threads

// A few rows of activations. The groups of a row are padded with zeros to whole sets of kTogether.
struct Rounded {
  int64_t sets;
  const int8_t* values;  // [rows, sets, group / 16, kTogether, 16], within a group in the order of unpacked weights
  const float* scales;   // [rows, sets, kWideLanes], each four times
  const float* sums;     // [rows, groups padded to kWideLanes], each group's sum
};

// Rounds the numbers of a group to whole multiples of a step, which is the result. `sum_of_group` is the sum of the
// rounded numbers, so that scale and bias see the same error and most of it cancels.
template <int group>
INLINE float round_group(const float* from, int32_t (&whole)[group], float& sum_of_group) {
  Float top{}, total{};
  for (int i = 0; i < group; i += kLanes) {
    Float value = load(from + i);
    total += value;
    top = larger(top, larger(value, -value));
  }
  if (!std::isfinite(sum(total))) {  // so the products are not finite either
    std::memset(whole, 0, sizeof whole);
    return sum_of_group = NAN;
  }
  // If the step is too small to invert, the values count as zeros.
  float step = largest(top) / 127, inverse = step > 1e-37f ? 1 / step : 0;
  Int count{};
  for (int i = 0; i < group; i += kLanes) {
    // Adding 1.5 * 2^23 rounds to the nearest whole number.
    Float nearest = load(from + i) * inverse + 12582912.0f - 12582912.0f;
    Int numbers = __builtin_convertvector(nearest, Int);
    count += numbers;
    write(whole + i, numbers);
  }
  sum_of_group = step * sum(__builtin_convertvector(count, Float));
  return step;
}

template <int bits, int group>
Rounded round_rows(const float* x, int64_t rows, int64_t columns, Scratch& scratch) {
  constexpr int block = kBlock<bits, group>, parts = kParts<bits>;
  constexpr int64_t kSet = kTogether * group;
  int64_t groups = columns / group, sets = (groups + kTogether - 1) / kTogether, padded = padded_to(kWideLanes, groups);
  float* scales = scratch.get<float>(rows * (sets * kWideLanes + padded + sets * kSet / 4));
  float* sums = scales + rows * sets * kWideLanes;
  int8_t* values = reinterpret_cast<int8_t*>(sums + rows * padded);
  std::memset(scales, 0, rows * (sets * kWideLanes + padded) * sizeof(float));
  for_ranges(rows, rows * columns < kManyNumbers ? rows : 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      int8_t* row = values + r * sets * kSet;
      if (groups % kTogether) std::memset(row + (sets - 1) * kSet, 0, kSet);
      for (int64_t g = 0; g < groups; g++) {
        int32_t whole[group];
        int8_t in_order[group];
        float step = round_group(x + r * columns + g * group, whole, sums[r * padded + g]);
        write(scales + (r * sets * kTogether + g) * 4, spread<4>(step));
        for (int i = 0; i < group; i += block)
          for (int part = 0; part < parts; part++)
            for (int j = 0; j < block / parts; j++)
              in_order[i + part * (block / parts) + j] = int8_t(whole[i + j * parts + part]);
        int8_t* to = row + g / kTogether * kSet + g % kTogether * 16;
        for (int i = 0; i < group; i += 16) std::memcpy(to + i * kTogether, in_order + i, 16);
      }
    }
  });
  return {sets, values, scales, sums};
}

// The weights of kTogether groups, in vectors of 16 of each as in `Rounded`.
template <int bits, int group>
INLINE void unpack_set(const uint8_t* packed, Wide (&weights)[group / 16]) {
  constexpr int block = kBlock<bits, group>;
#pragma GCC unroll 8
  for (int i = 0; i < group / block; i++) {
    Bytes blocks[kTogether];
    Wide halves[2];
#pragma GCC unroll 8
    for (int g = 0; g < kTogether; g++) {
      const uint8_t* from = packed + (g * group + i * block) * bits / 8;
      if constexpr (block == 64) blocks[g] = read<Bytes>(from);
      else blocks[g] = unpack<bits>(from);
    }
    halves_together(blocks, halves);
    for (int half = 0; half < 2; half++) {
      if constexpr (block == 64) {  // two weights a byte, the even ones in its lower half
        weights[4 * i + half] = halves[half] & 15;
        weights[4 * i + 2 + half] = halves[half] >> 4;
      } else {
        weights[2 * i + half] = halves[half];
      }
    }
  }
}

// totals [N, R], in lanes that are not added up yet: N rows of a packed matrix times R rounded rows from `first` on.
template <int bits, int group, int N, int R>
INLINE void rounded_products(const Matrix& m, Rows rows, const Rounded& x, int64_t first, WideFloat (&totals)[N][R]) {
  constexpr int64_t kBytes = kTogether * group * bits / 8, kSet = kTogether * group;
  int64_t groups = m.groups(), between = rows.apart * m.row_bytes(), set = 0;
  start_with_biases<kWideLanes>(m, rows, x.sums + first * padded_to(kWideLanes, groups), totals);
  const uint8_t* packed = m.row(rows.first);
  const int8_t* values = x.values + first * x.sets * kSet;
  const float* scales = x.scales + first * x.sets * kWideLanes;
  // Adds the products of a set of row n. Of its groups, the matrix has `count`.
  auto add_set = [&](int n, const uint8_t* from, int count) INLINE_LAMBDA {
    Wide weights[group / 16];
    unpack_set<bits, group>(from, weights);
    int64_t at = (rows.first + n * rows.apart) * groups + set * kTogether;
    auto load = [&](auto* t) INLINE_LAMBDA { return load_four_times(static_cast<decltype(t)>(m.scales) + at); };
    WideFloat scale = count == kTogether
                          ? with_type(m.type, load)
                          : four_times(load_scales<kTogether>(m.scales, m.type, at, count, m.rows * groups));
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) {
      Dots<bits> dots;
#pragma GCC unroll 8
      for (int i = 0; i < group / 16; i++) dots.add(weights[i], values + r * x.sets * kSet + i * kTogether * 16);
      totals[n][r] += __builtin_convertvector(dots.finish(), WideFloat) *
                      (scale * read<WideFloat>(scales + r * x.sets * kWideLanes));
    }
  };
  for (; set < groups / kTogether; set++, packed += kBytes, values += kSet, scales += kWideLanes) {
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      for (int i = 0; i < kBytes; i += 64) __builtin_prefetch(packed + n * between + i + kAhead);
      add_set(n, packed + n * between, kTogether);
    }
  }
  if (int left = groups % kTogether) {
    for (int n = 0; n < N; n++) {
      uint8_t last[kBytes] = {};  // nothing is read beyond the end of the matrix
      std::memcpy(last, packed + n * between, left * group * bits / 8);
      add_set(n, last, left);
    }
  }
}

// Rows of W that are read at the same time for R rows of x.
template <int R>
constexpr int kStreamsOfRounded = R < 4 ? 4 / R : 1;

}  // namespace openelm
