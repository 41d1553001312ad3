// What products of few rows with a packed matrix share: the part of the biases, and adding up lanes.

#pragma once

#include "matrix.h"
#include "threads.h"

namespace openelm {

constexpr int64_t padded_to(int64_t lanes, int64_t count) { return (count + lanes - 1) / lanes * lanes; }

// Bytes to prefetch ahead: unpacking takes so many instructions that the processor does not look far enough ahead by
// itself. (Plain values are read faster without.)
constexpr int64_t kAhead = 2048;

// Rows of a packed matrix at a distance of `apart`.
struct Rows {
  int64_t first, apart;
};

// totals [N, R] = bias * sum(x) over all groups: N rows of a packed matrix times R rows, whose sums of groups are
// sums [R, groups padded to `lanes`].
template <int lanes, int N, int R>
INLINE void start_with_biases(const Matrix& m, Rows rows, const float* sums, Vector<float, lanes> (&totals)[N][R]) {
  int64_t groups = m.groups(), padded = padded_to(lanes, groups);
#pragma GCC unroll 8
  for (int n = 0; n < N; n++)
#pragma GCC unroll 8
    for (int r = 0; r < R; r++) totals[n][r] = Vector<float, lanes>{};
  for (int64_t g = 0; g < groups; g += lanes) {
    int count = groups - g < lanes ? int(groups - g) : lanes;
#pragma GCC unroll 8
    for (int n = 0; n < N; n++) {
      int64_t at = (rows.first + n * rows.apart) * groups + g;
      auto biases = load_scales<lanes>(m.biases, m.type, at, count, m.rows * groups);
#pragma GCC unroll 8
      for (int r = 0; r < R; r++) totals[n][r] += biases * load<lanes>(sums + r * padded + g);
    }
  }
}

// y [R, outputs] += the products of R rows of x with rows [begin, end) of W, N at a time, which are far apart: several
// streams are read faster than one. `products(rows, totals)` computes them, in lanes that are added up here.
template <int lanes, int R, int N, class Products>
INLINE void add_products(int64_t begin, int64_t end, float* y, int64_t outputs, const Products& products) {
  constexpr int kMany = lanes / N;
  int64_t apart = (end - begin) / N;
  Vector<float, lanes> lines[R][lanes] = {};
  auto add = [&](int64_t row, int count, int64_t apart) {
    for (int i = 0; i < count; i++) {
      Vector<float, lanes> totals[N][R];
      products(Rows{row + i, apart}, totals);
#pragma GCC unroll 8
      for (int n = 0; n < N; n++)
#pragma GCC unroll 8
        for (int r = 0; r < R; r++) lines[r][n * kMany + i] = totals[n][r];
    }
    for (int r = 0; r < R; r++) {
      float* out = y + r * outputs + row;
      auto result = sums<lanes>(lines[r]);
      if (N == 1 && count == lanes) {
        write(out, load<lanes>(out) + result);
      } else {
        for (int n = 0; n < (apart ? N : 1); n++)
          for (int i = 0; i < count; i++) out[n * apart + i] += result[n * kMany + i];
      }
    }
  };
  for (int64_t i = 0; i < apart; i += kMany) add(begin + i, apart - i < kMany ? int(apart - i) : kMany, apart);
  // The rest, fewer than N rows: each is computed N times, which saves functions for one row alone.
  for (int64_t row = begin + N * apart; row < end; row++) add(row, 1, 0);
}

}  // namespace openelm
