// Products of many rows, after Goto and van de Geijn, "Anatomy of High-Performance Matrix Multiplication" (2008).
//
// The innermost kernel keeps a tile of results in registers: kTile rows of one matrix times kPanel columns of the
// other, each step one broadcast number times a few vectors. Blocks are chosen so that data that is read repeatedly
// stays in the nearest cache. Vectors run along the rows of activations (one lane per token), so weights are only
// broadcast: packed ones are unpacked in the order they are stored, a block at a time, and only the small results are
// transposed.

#pragma once

#include "matrix.h"
#include "threads.h"

namespace openelm {

constexpr int kVectors = 2;
constexpr int kPanel = kVectors * kLanes;
constexpr int kTile = kRegisters == 32 ? 12 : 6;

// c[r][0 .. kPanel) += (or =) sum over k of a[r * row + k * step] * b[k * b_stride + 0 .. kPanel), for R rows.
template <int R>
INLINE void tile(int64_t depth, const float* a, int64_t row, int64_t step, const float* b, int64_t b_stride, float* c,
                 int64_t c_stride, bool add) {
  Float total[R][kVectors];
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kVectors; v++) total[r][v] = add ? load(c + r * c_stride + v * kLanes) : Float{};
  for (int64_t k = 0; k < depth; k++) {
    Float column[kVectors];
    for (int v = 0; v < kVectors; v++) column[v] = load(b + k * b_stride + v * kLanes);
    for (int r = 0; r < R; r++) {
      Float number = spread(a[r * row + k * step]);
      for (int v = 0; v < kVectors; v++) total[r][v] += number * column[v];
    }
  }
  for (int r = 0; r < R; r++)
    for (int v = 0; v < kVectors; v++) write(c + r * c_stride + v * kLanes, total[r][v]);
}

// The same for any number of rows: whole tiles, then the rest.
inline void tiles(int64_t rows, int64_t depth, const float* a, int64_t row, int64_t step, const float* b,
                  int64_t b_stride, float* c, int64_t c_stride, bool add) {
  int64_t r = 0;
  auto run = [&](auto count) {
    tile<count.value>(depth, a + r * row, row, step, b, b_stride, c + r * c_stride, c_stride, add);
    r += count.value;
  };
  while (r + kTile <= rows) run(Constant<kTile>{});
  while (r + 4 <= rows) run(Constant<4>{});
  while (r < rows) run(Constant<1>{});
}

// Panels of kPanel rows of x [rows, depth], column by column: to[panel][k][lane], zeros in lanes beyond the rows.
inline void pack_panel(const float* x, int64_t stride, int64_t rows, int64_t depth, float* to) {
  for (int64_t k = 0; k < depth; k += kLanes) {
    // A square block fits in registers, so that both sides are read and written in whole cache lines.
    int64_t count = depth - k < kLanes ? depth - k : kLanes;
    for (int lane = 0; lane < kPanel; lane++) {
      if (lane >= rows) {
        for (int64_t i = 0; i < count; i++) to[(k + i) * kPanel + lane] = 0;
      } else {
        for (int64_t i = 0; i < count; i++) to[(k + i) * kPanel + lane] = x[lane * stride + k + i];
      }
    }
  }
}

constexpr int64_t kBlockRows = 96;    // of weights: a multiple of 32, of both tiles, and with kBlockDepth half of L2
constexpr int64_t kBlockDepth = 256;  // a panel of this depth fits L1
constexpr int64_t kMostRows = 512;    // of x at a time, so that panels stay in the outer caches

// y [rows, outputs] += x [rows, depth] W^T, W being [outputs, depth]; with `transposed` x W, W being [depth, outputs].
inline void many_rows(const Matrix& m, int64_t outputs, int64_t depth, const float* x, int64_t rows, float* y,
                      bool transposed) {
  thread_local Scratch panels_memory;
  for (int64_t first = 0; first < rows; first += kMostRows) {
    int64_t some = rows - first < kMostRows ? rows - first : kMostRows;
    int64_t panels = (some + kPanel - 1) / kPanel, width = panels * kPanel;
    float* packed = panels_memory.get<float>(width * depth);
    Pool::shared().run(panels, [&](int64_t p) {
      int64_t row = first + p * kPanel;
      pack_panel(x + row * depth, depth, first + some - row, depth, packed + p * kPanel * depth);
    });
    Pool::shared().run((outputs + kBlockRows - 1) / kBlockRows, [&](int64_t task) {
      thread_local Scratch memory;
      float* results = memory.get<float>(kBlockRows * (width + kBlockDepth));
      float* weights = results + kBlockRows * width;
      int64_t n = task * kBlockRows, count = outputs - n < kBlockRows ? outputs - n : kBlockRows;
      for (int64_t k = 0; k < depth; k += kBlockDepth) {
        int64_t deep = depth - k < kBlockDepth ? depth - k : kBlockDepth;
        const float* block = weights;
        int64_t row = deep, step = 1;
        if (transposed) {
          row = 1, step = kBlockRows;
          open(m, k, deep, n, count, weights, step);
        } else if (!m.bits && m.type == Type::float32) {
          block = m.values<float>(n) + k, row = m.stride;
        } else {
          open(m, n, count, k, deep, weights, row);
        }
        for (int64_t p = 0; p < panels; p++)
          tiles(count, deep, block, row, step, packed + (p * depth + k) * kPanel, kPanel, results + p * kPanel, width,
                k > 0);
      }
      add_transposed(results, width, count, some, y + first * outputs + n, outputs);
    });
  }
}

// From this many positions of a sequence on, its rows are multiplied as those of a prompt: the weights are unpacked
// first, and activations not rounded.
constexpr int64_t kManyRows = 12;

}  // namespace openelm
