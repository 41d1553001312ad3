// Products of few rows with a matrix: y = x W^T, where reading W is all the work.
//
// Each row of W is read once, for up to four rows of x at a time, and opened in registers. For packed matrices
// w = scale * q + bias within a group, so a group adds scale * sum(q x) + bias * sum(x), and the second sum is the same
// for every row of W. Activations may be rounded to 8 bits, each group with a scale of its own: then q x is a product of
// small integers, of which the machine does 32 or more at once.

#pragma once

#include <cmath>

#include "matrix.h"
#include "threads.h"

namespace openelm {

// Whether weights of so many bits can be multiplied with rounded activations: 16 bits hold two products.
constexpr bool can_round(int bits) { return bits >= 2 && bits <= 6; }

// A few rows of activations [rows, columns], prepared for a packed matrix. Groups are padded to whole vectors of 8.
struct Prepared {
  int64_t columns, groups, padded;
  const float* values;   // exact: [rows, columns], within a block in the order `unpack` gives weights
  const int8_t* rounded;  // rounded: the same
  const float* scales;   // rounded: [rows, padded]
  const float* sums;     // [rows, padded], each group's sum
};

template <int bits>
Prepared prepare(const float* x, int64_t rows, const Matrix& m, bool round, Scratch& scratch) {
  int64_t groups = m.groups(), padded = (groups + 7) / 8 * 8;
  float* scales = scratch.get<float>(2 * rows * padded + rows * m.columns);
  float* sums = scales + rows * padded;
  float* values = sums + rows * padded;
  int8_t* rounded = reinterpret_cast<int8_t*>(values);
  std::memset(scales, 0, 2 * rows * padded * sizeof(float));
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t g = 0; g < groups; g++) {
      const float* from = x + r * m.columns + g * m.group;
      Float top{}, total{};
      for (int i = 0; i < m.group; i += kLanes) {
        Float value = load(from + i);
        total += value;
        top = larger(top, larger(value, -value));
      }
      float& sum_of_group = sums[r * padded + g];
      sum_of_group = sum(total);
      int64_t at = r * m.columns + g * m.group;
      if (!round) {
        for (int i = 0; i < m.group; i++) values[at + i] = from[i / 32 * 32 + unpacked_order<bits>(i % 32)];
        continue;
      }
      if (!std::isfinite(sum_of_group)) {  // and so are the products
        std::memset(rounded + at, 0, m.group);
        scales[r * padded + g] = sum_of_group = NAN;
        continue;
      }
      // A step that is too small for an inverse stands for zeros.
      float step = largest(top) / 127, inverse = step > 1e-37f ? 1 / step : 0;
      int32_t whole[128], count = 0;
      for (int i = 0; i < m.group; i += kLanes) {
        // Adding 1.5 * 2^23 rounds to the nearest whole number.
        Float nearest = load(from + i) * inverse + 12582912.0f - 12582912.0f;
        write(whole + i, __builtin_convertvector(nearest, Int));
      }
      for (int i = 0; i < m.group; i++) {
        count += whole[i];
        rounded[at + i] = int8_t(whole[i / 32 * 32 + unpacked_order<bits>(i % 32)]);
      }
      scales[r * padded + g] = step;
      // Of the rounded values, so that scale and bias meet the same error and most of it cancels.
      sum_of_group = step * float(count);
    }
  }
  return {m.columns, groups, padded, values, rounded, scales, sums};
}

// Bytes ahead of what is opened that are asked from memory: opening takes so many instructions that the processor by
// itself would not look far enough. (Plain values are read faster without.)
constexpr int64_t kAhead = 2048;

// One row of a packed matrix times R prepared rows.
template <int bits, int group, bool round, int R>
INLINE void packed_row(const Matrix& m, int64_t row, const Prepared& x, int64_t first, float* out, int64_t stride) {
  constexpr int lanes = round ? 8 : kLanes;
  using Lane = Vector<float, lanes>;
  Lane total[R][2] = {};
  Vector<float, 8> by_bias[R] = {};
  const uint8_t* packed = m.row(row);
  for (int64_t g = 0; g < x.groups; g += 8) {
    int count = x.groups - g < 8 ? int(x.groups - g) : 8;
    auto scales = load_scales(m, m.scales, row * x.groups + g, count);
    auto biases = load_scales(m, m.biases, row * x.groups + g, count);
    alignas(32) float factors[R][8];
    for (int r = 0; r < R; r++) {
      int64_t at = (first + r) * x.padded + g;
      by_bias[r] += biases * load<8>(x.sums + at);
      write(factors[r], round ? scales * load<8>(x.scales + at) : scales);
    }
    auto one_group = [&](int j) INLINE_LAMBDA {
      int64_t column = (g + j) * group;
      __builtin_prefetch(packed + kAhead);
      if constexpr (round) {
        Dot<bits> dots[R];
        for (int i = 0; i < group; i += 32, packed += 4 * bits) {
          Bytes weights = unpack<bits>(packed);
          for (int r = 0; r < R; r++) dots[r].add(weights, x.rounded + (first + r) * x.columns + column + i);
        }
        for (int r = 0; r < R; r++)
          total[r][j % 2] += __builtin_convertvector(dots[r].finish(), Lane) * factors[r][j];
      } else {
        Lane part[R] = {};
        for (int i = 0; i < group; i += 32, packed += 4 * bits) {
          alignas(32) uint8_t opened[32];
          const uint8_t* weights = packed;
          if constexpr (bits != 8) write(opened, unpack<bits>(packed)), weights = opened;
          for (int k = 0; k < 32; k += lanes) {
            Lane weight = load(weights + k);
            for (int r = 0; r < R; r++) part[r] += weight * load(x.values + (first + r) * x.columns + column + i + k);
          }
        }
        for (int r = 0; r < R; r++) total[r][j % 2] += part[r] * factors[r][j];
      }
    };
    if (count == 8) {
      for (int j = 0; j < 8; j++) one_group(j);
    } else {
      for (int j = 0; j < count; j++) one_group(j);
    }
  }
  for (int r = 0; r < R; r++) out[r * stride] += sum<lanes>(total[r][0] + total[r][1]) + sum<8>(by_bias[r]);
}

// One row of a plain matrix times R rows.
template <class T, int R>
INLINE void plain_row(const T* weights, const float* x, int64_t columns, float* out, int64_t stride) {
  constexpr int kSums = R == 1 ? 4 : 2;  // independent sums, since an addition takes four cycles
  Float total[R][kSums] = {};
  int64_t c = 0;
  for (; c + kSums * kLanes <= columns; c += kSums * kLanes) {
    for (int s = 0; s < kSums; s++) {
      Float weight = load(weights + c + s * kLanes);
      for (int r = 0; r < R; r++) total[r][s] += weight * load(x + r * columns + c + s * kLanes);
    }
  }
  for (; c < columns; c += kLanes) {
    int count = columns - c < kLanes ? int(columns - c) : kLanes;
    Float weight = load_some(weights + c, count);
    for (int r = 0; r < R; r++) total[r][0] += weight * load_some(x + r * columns + c, count);
  }
  for (int r = 0; r < R; r++) {
    Float all = total[r][0];
    for (int s = 1; s < kSums; s++) all += total[r][s];
    out[r * stride] += sum(all);
  }
}

// body(first, Constant<R>) for R of 4, 2 and 1 that cover the rows.
template <class Body>
INLINE void in_fours(int64_t rows, const Body& body) {
  int64_t r = 0;
  for (; r + 4 <= rows; r += 4) body(r, Constant<4>{});
  if (r + 2 <= rows) body(r, Constant<2>{}), r += 2;
  if (r < rows) body(r, Constant<1>{});
}

// Of weights: what a thread takes at a time, and the least for which other threads are called.
constexpr int64_t kBytesAtATime = 24 << 10, kBytesWorthHelp = 256 << 10;

// y [rows, outputs] += x [rows, columns] W^T for few rows.
inline void few_rows(const Matrix& m, int64_t outputs, const float* x, int64_t rows, float* y, bool round) {
  int64_t grain = (kBytesAtATime + m.row_bytes() - 1) / m.row_bytes();
  if (outputs * m.row_bytes() * rows < kBytesWorthHelp) grain = outputs;
  if (!m.bits) {
    with_type(m.type, [&](auto* t) {
      using T = std::remove_cvref_t<decltype(*t)>;
      for_ranges(outputs, grain, [&](int64_t begin, int64_t end) {
        in_fours(rows, [&](int64_t first, auto count) {
          for (int64_t n = begin; n < end; n++)
            plain_row<T, count.value>(m.values<T>(n), x + first * m.columns, m.columns, y + first * outputs + n,
                                      outputs);
        });
      });
    });
    return;
  }
  thread_local Scratch scratch;
  auto run = [&](auto bits, auto group, auto rounded) {
    constexpr int kBits = bits.value, kGroup = group.value;
    constexpr bool kRound = rounded.value;
    Prepared prepared = prepare<kBits>(x, rows, m, kRound, scratch);
    for_ranges(outputs, grain, [&](int64_t begin, int64_t end) {
      in_fours(rows, [&](int64_t first, auto count) {
        for (int64_t n = begin; n < end; n++)
          packed_row<kBits, kGroup, kRound, count.value>(m, n, prepared, first, y + first * outputs + n, outputs);
      });
    });
  };
  with_bits(m.bits, [&](auto bits) {
    auto with_rounding = [&](auto group) {
      if constexpr (can_round(decltype(bits)::value)) {
        if (round) return run(bits, group, Constant<1>{});
      }
      run(bits, group, Constant<0>{});
    };
    if (m.group == 32) with_rounding(Constant<32>{});
    else if (m.group == 64) with_rounding(Constant<64>{});
    else with_rounding(Constant<128>{});
  });
}

}  // namespace openelm
