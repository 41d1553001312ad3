// Products of few rows of exact activations with a packed matrix: y += x W^T.

#pragma once

#include "packed_sums.h"

namespace openelm {

// A few rows of activations, prepared for a packed matrix.
struct Prepared {
  const float* values;  // [rows, columns], within a block in the order of unpacked weights
  const float* sums;    // [rows, groups padded to kLanes], each group's sum
};

template <int bits, int group>
Prepared prepare(const float* x, int64_t rows, int64_t columns, Scratch& scratch) {
  constexpr int block = kBlock<bits, group>;
  int64_t groups = columns / group, padded = padded_to(kLanes, groups);
  float* sums = scratch.get<float>(rows * (padded + columns));
  float* values = sums + rows * padded;
  std::memset(sums, 0, rows * padded * sizeof(float));
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t g = 0; g < groups; g++) {
      int64_t at = r * columns + g * group;
      Float total{};
      for (int i = 0; i < group; i += kLanes) total += load(x + at + i);
      sums[r * padded + g] = sum(total);
      for (int i = 0; i < group; i += block)
        for (int j = 0; j < block; j++) values[at + i + j] = x[at + i + unpacked_order<bits, block>(j)];
    }
  }
  return {values, sums};
}

// totals [N, R], in lanes that are not added up yet: N rows of a packed matrix times R prepared rows from `first` on.
template <int bits, int group, int N, int R>
INLINE void exact_products(const Matrix& m, Rows rows, const Prepared& x, int64_t first, Float (&totals)[N][R]) {
  constexpr int block = kBlock<bits, group>;
  int64_t groups = m.groups();
  start_with_biases<kLanes>(m, rows, x.sums + first * padded_to(kLanes, groups), totals);
  const uint8_t* packed[N];
  for (int n = 0; n < N; n++) packed[n] = m.row(rows.first + n * rows.apart);
  for (int64_t g = 0; g < groups; g++) {
    const float* values = x.values + first * m.columns + g * group;
    for (int n = 0; n < N; n++) {
      if (group * bits > 256 || g % 2 == 0) __builtin_prefetch(packed[n] + kAhead);  // 64 bytes at a time
      Bytes weights[block / 32];
      Float part[R] = {};
      for (int i = 0; i < group; i += block, packed[n] += block * bits / 8) {
        const uint8_t* opened = packed[n];
        if constexpr (bits != 8) {
          unpack_block<bits, block>(packed[n], weights);
          opened = reinterpret_cast<const uint8_t*>(weights);
        }
        for (int k = 0; k < block; k += kLanes) {
          Float weight = load(opened + k);
          for (int r = 0; r < R; r++) part[r] += weight * load(values + r * m.columns + i + k);
        }
      }
      float scale = load_scale(m.scales, m.type, (rows.first + n * rows.apart) * groups + g);
      for (int r = 0; r < R; r++) totals[n][r] += part[r] * scale;
    }
  }
}

// Rows of W that are read at the same time for R rows of x.
template <int bits, int R>
constexpr int kStreamsOfExact = bits == 8 && R == 1 ? 2 : 1;

}  // namespace openelm
