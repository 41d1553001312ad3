// Products of few rows with a packed matrix: y = x W^T, where reading W is most of the work.
//
// Each row of W is read once, for up to kSharing rows of x at a time, and unpacked in registers. For a single row of x
// two rows of W, far apart in memory, are read at the same time where that pays.
//
// For packed matrices w = scale * q + bias within a group, so a group adds scale * sum(q x) + bias * sum(x), and the
// second sum is the same for every row of W. Activations may be rounded to 8 bits, with a scale per group: then q x is
// a product of small integers, and the processor computes 32 or more at once.
//
// There is a function for each number of bits, group size and number of rows. They take the compiler longest, so
// `packed_rows_*.cpp` share them out.

#pragma once

#include <cmath>

#include "rows.h"

namespace openelm {

// Whether weights of this many bits can be multiplied with rounded activations: 16 bits must hold two products.
constexpr bool can_round(int bits) { return bits >= 2 && bits <= 6; }

// A few rows of activations [rows, columns], prepared for a packed matrix. Groups are padded to whole vectors of 8.
struct Prepared {
  int64_t columns, groups, padded;
  const float* values;    // exact: [rows, columns], within a block in the order of unpacked weights
  const int8_t* rounded;  // rounded: the same
  const float* scales;    // rounded: [rows, padded]
  const float* sums;      // [rows, padded], each group's sum
};

template <int bits, int group>
Prepared prepare(const float* x, int64_t rows, int64_t columns, bool round, Scratch& scratch) {
  constexpr int block = kBlock<bits, group>;
  int64_t groups = columns / group, padded = (groups + 7) / 8 * 8;
  float* scales = scratch.get<float>(2 * rows * padded + rows * columns);
  float* sums = scales + rows * padded;
  float* values = sums + rows * padded;
  int8_t* rounded = reinterpret_cast<int8_t*>(values);
  std::memset(scales, 0, 2 * rows * padded * sizeof(float));
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t g = 0; g < groups; g++) {
      int64_t at = r * columns + g * group;
      const float* from = x + at;
      Float top{}, total{};
      for (int i = 0; i < group; i += kLanes) {
        Float value = load(from + i);
        total += value;
        top = larger(top, larger(value, -value));
      }
      float& sum_of_group = sums[r * padded + g];
      sum_of_group = sum(total);
      if (!round) {
        for (int i = 0; i < group; i += block)
          for (int j = 0; j < block; j++) values[at + i + j] = from[i + unpacked_order<bits, block>(j)];
        continue;
      }
      if (!std::isfinite(sum_of_group)) {  // so the products are not finite either
        std::memset(rounded + at, 0, group);
        scales[r * padded + g] = sum_of_group = NAN;
        continue;
      }
      // If the step is too small to invert, the values count as zeros.
      float step = largest(top) / 127, inverse = step > 1e-37f ? 1 / step : 0;
      int32_t whole[group];
      Int count{};
      for (int i = 0; i < group; i += kLanes) {
        // Adding 1.5 * 2^23 rounds to the nearest whole number.
        Float nearest = load(from + i) * inverse + 12582912.0f - 12582912.0f;
        Int numbers = __builtin_convertvector(nearest, Int);
        count += numbers;
        write(whole + i, numbers);
      }
      for (int i = 0; i < group; i += block)
        for (int j = 0; j < block; j++) rounded[at + i + j] = int8_t(whole[i + unpacked_order<bits, block>(j)]);
      scales[r * padded + g] = step;
      // The sum of the rounded values, so that scale and bias see the same error and most of it cancels.
      sum_of_group = step * sum(__builtin_convertvector(count, Float));
    }
  }
  return {columns, groups, padded, values, rounded, scales, sums};
}

// Bytes to prefetch ahead: unpacking takes so many instructions that the processor does not look far enough ahead by
// itself. (Plain values are read faster without.)
constexpr int64_t kAhead = 2048;

// N rows of a packed matrix, from `row` on at a distance of `apart`, times R prepared rows.
template <int bits, int group, bool round, int R, int N>
INLINE void packed_rows(const Matrix& m, int64_t row, int64_t apart, const Prepared& x, int64_t first, float* out) {
  constexpr int lanes = round ? 8 : kLanes, block = kBlock<bits, group>;
  using Lane = Vector<float, lanes>;
  Lane total[N][R] = {};
  Vector<float, 8> by_bias[N][R] = {};
  const uint8_t* packed[N];
  for (int n = 0; n < N; n++) packed[n] = m.row(row + n * apart);
  const float *scales_of_x = x.scales + first * x.padded, *sums_of_x = x.sums + first * x.padded;
  int64_t all = m.rows * x.groups;
  // `count` groups from `g` on; kCount is the same if it is known at compile time.
  auto some_groups = [&](int64_t g, int count, auto known) INLINE_LAMBDA {
    constexpr int kCount = known.value;
    constexpr int kFactors = round ? R : 1;  // exact activations have no scales of their own
    alignas(32) float factors[N][kFactors][8];
    for (int n = 0; n < N; n++) {
      int64_t from = (row + n * apart) * x.groups + g;
      auto scales = load_scales(m.scales, m.type, from, count, all);
      auto biases = load_scales(m.biases, m.type, from, count, all);
      for (int r = 0; r < R; r++) by_bias[n][r] += biases * load<8>(sums_of_x + r * x.padded + g);
      for (int r = 0; r < kFactors; r++)
        write(factors[n][r], round ? scales * load<8>(scales_of_x + r * x.padded + g) : scales);
    }
    for (int j = 0; j < (kCount ? kCount : count); j++) {
      int64_t column = first * x.columns + (g + j) * group;
      for (int n = 0; n < N; n++) {
        if (group * bits > 256 || j % 2 == 0) __builtin_prefetch(packed[n] + kAhead);  // 64 bytes at a time
        Bytes weights[block / 32];
        if constexpr (round) {
          Dot<bits> dots[R];
          for (int i = 0; i < group; i += block, packed[n] += block * bits / 8) {
            unpack_block<bits, block>(packed[n], weights);
            for (int k = 0; k < block; k += 32)
              for (int r = 0; r < R; r++) dots[r].add(weights[k / 32], x.rounded + column + r * x.columns + i + k);
          }
          for (int r = 0; r < R; r++)
            total[n][r] += __builtin_convertvector(dots[r].finish(), Lane) * factors[n][r][j];
        } else {
          Lane part[R] = {};
          for (int i = 0; i < group; i += block, packed[n] += block * bits / 8) {
            const uint8_t* opened = packed[n];
            if constexpr (bits != 8) {
              unpack_block<bits, block>(packed[n], weights);
              opened = reinterpret_cast<const uint8_t*>(weights);
            }
            for (int k = 0; k < block; k += lanes) {
              Lane weight = load(opened + k);
              for (int r = 0; r < R; r++) part[r] += weight * load(x.values + column + r * x.columns + i + k);
            }
          }
          for (int r = 0; r < R; r++) total[n][r] += part[r] * factors[n][0][j];
        }
      }
    }
  };
  int64_t g = 0;
  if constexpr (round) {  // here a loop of unknown length takes a tenth of the time
    for (; g + 8 <= x.groups; g += 8) some_groups(g, 8, Constant<8>{});
    if (g + 4 == x.groups) some_groups(g, 4, Constant<4>{}), g += 4;
  }
  for (; g < x.groups; g += 8) some_groups(g, x.groups - g < 8 ? int(x.groups - g) : 8, Constant<0>{});
  constexpr int kNarrow = lanes < 8 ? lanes : 8;
  Vector<float, kNarrow> sums[N * R];
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++)
      sums[n * R + r] = fold<lanes, kNarrow>(total[n][r]) + fold<8, kNarrow>(by_bias[n][r]);
  if constexpr (R == 1) {
    for (int n = 0; n < N; n++) out[n * apart] += sum<kNarrow>(sums[n]);
  } else {
    auto result = ordered_sums<kNarrow, N * R>(sums);
    for (int n = 0; n < N; n++)
      for (int r = 0; r < R; r++) out[n * apart + r * m.rows] += result[lane_of_sum<kNarrow>(n * R + r)];
  }
}

// Rows of x that share one unpacking of packed weights; AVX-512 has registers for more.
constexpr int kSharing = kLanes == 16 ? 8 : 4;

// y [rows, m.rows] += x [rows, m.columns] W^T; threads take `grain` rows of W at a time.
template <int bits>
void packed_few_rows(const Matrix& m, const float* x, int64_t rows, float* y, int64_t grain, bool round,
                     Scratch& scratch) {
  auto run = [&](auto group, auto rounded) {
    constexpr int kGroup = group.value;
    constexpr bool kRound = rounded.value;
    Prepared prepared = prepare<bits, kGroup>(x, rows, m.columns, kRound, scratch);
    for_ranges(m.rows, grain, [&](int64_t begin, int64_t end) {
      in_groups<kSharing>(0, rows, [&](int64_t first, auto count) {
        constexpr int R = count.value;
        side_by_side<R == 1 && (kRound || bits == 8) ? 2 : 1>(begin, end, [&](int64_t row, int64_t apart, auto n) {
          packed_rows<bits, kGroup, kRound, R, n.value>(m, row, apart, prepared, first, y + first * m.rows + row);
        });
      });
    });
  };
  auto with_rounding = [&](auto group) {
    if constexpr (can_round(bits)) {
      if (round) return run(group, Constant<1>{});
    }
    run(group, Constant<0>{});
  };
  if (m.group == 32) with_rounding(Constant<32>{});
  else if (m.group == 64) with_rounding(Constant<64>{});
  else with_rounding(Constant<128>{});
}

}  // namespace openelm
