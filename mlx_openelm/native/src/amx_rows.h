// Products of few rows with a matrix in bfloat16, by AMX: y += x W^T.
//
// A float is exactly the sum of three numbers in bfloat16, and the product of two such numbers is exactly a float. With each
// number of x split into three, nothing is lost that floats would keep. That is three times the arithmetic, and still
// faster than memory: most of the time is that of reading W, up to sixteen rows.
//
// Each number of y is the sum of the same products in the same order for any number of rows.
//
// Tiles of W are read as they are stored. A block of rows of W is multiplied with all rows of x while the next one is
// prefetched, evenly. A thread takes its next block before it multiplies one, so that it knows what to prefetch; after
// its last one it will begin with a block of the matrix that follows.

#pragma once

#include <atomic>

#include "amx.h"
#include "matrix.h"
#include "threads.h"

#if defined(OPENELM_AMX)
namespace openelm {

constexpr int kSplit = 3;                      // parts of a float
constexpr int kPairs = kTileDepth / 2;         // in a row of a tile
constexpr int kBlockHeight = 2 * kTileHeight;  // rows of W in a block

// Rows of x as tiles, in groups of `width` rows, the last one with zeros: for each 32 columns and each part of their
// numbers, beginning with the highest bits, [16, width] pairs.
struct SplitRows {
  int64_t rows, groups, width, steps;
  uint32_t* pairs;

  SplitRows(int64_t rows, int64_t columns, Scratch& scratch) : rows(rows) {
    groups = (rows + kTileHeight - 1) / kTileHeight, width = (rows + groups - 1) / groups;
    steps = (columns + kTileDepth - 1) / kTileDepth;
    pairs = scratch.get<uint32_t>(groups * group_size());
  }
  static constexpr int64_t step_size(int64_t width) { return kSplit * kPairs * width; }
  int64_t group_size() const { return steps * step_size(width); }
  uint32_t* group(int64_t index) const { return pairs + index * group_size(); }
  int64_t rows_of(int64_t group) const { return rows - group * width < width ? rows - group * width : width; }
};

template <class T>
using Sixteen = Vector<T, kTileHeight>;

// The upper half of the bits of a number, which is a number in bfloat16, and what is left of it in `rest`.
INLINE Sixteen<uint32_t> take_upper(Sixteen<float>& rest) {
  auto nothing = bits_of<Sixteen<uint32_t>>(rest != rest) & 0x00400000u;  // NaN stays NaN
  auto upper = (bits_of<Sixteen<uint32_t>>(rest) | nothing) & 0xffff0000u;
  auto lower = rest - bits_of<Sixteen<float>>(upper);
  rest = lower == lower ? lower : Sixteen<float>{};  // of infinity and NaN nothing is left
  return upper;
}

// The pairs of 32 numbers, for each part: pairs[part * kTileHeight].
template <int... lane>
INLINE void split_numbers(const float* numbers, Sixteen<uint32_t>* pairs, std::integer_sequence<int, lane...>) {
  auto a = read<Sixteen<float>>(numbers), b = read<Sixteen<float>>(numbers + kPairs);
  Sixteen<float> even = __builtin_shufflevector(a, b, (2 * lane)...);
  Sixteen<float> odd = __builtin_shufflevector(a, b, (2 * lane + 1)...);
  for (int part = 0; part < kSplit; part++) pairs[part * kTileHeight] = take_upper(even) >> 16 | take_upper(odd);
}

inline void split_rows(const float* x, int64_t columns, const SplitRows& to) {
  int64_t size = to.step_size(to.width);
  for_ranges(to.steps, 64, [&](int64_t begin, int64_t end) {
    for (int64_t step = begin; step < end; step++) {
      int64_t column = step * kTileDepth, count = columns - column < kTileDepth ? columns - column : kTileDepth;
      for (int64_t g = 0; g < to.groups; g++) {
        Sixteen<uint32_t> parts[kSplit][kTileHeight] = {};
        for (int64_t r = 0; r < to.rows_of(g); r++) {
          const float* from = x + (g * to.width + r) * columns + column;
          float numbers[kTileDepth] = {};
          if (count < kTileDepth) from = static_cast<float*>(std::memcpy(numbers, from, count * sizeof(float)));
          split_numbers(from, &parts[0][r], std::make_integer_sequence<int, kPairs>{});
        }
        // Each vector overwrites what the one before has beyond the width.
        uint32_t packed[(kSplit * kPairs + 1) * kTileHeight], *next = packed;
        for (auto& part : parts) {
          if (to.width > 1) transpose(part);
          for (int i = 0; i < (to.width > 1 ? kPairs : 1); i++) write(next + i * to.width, part[i]);
          next += kPairs * to.width;
        }
        std::memcpy(to.group(g) + step * size, packed, size * sizeof(uint32_t));
      }
    }
  });
}

// The next block of W, which is prefetched into L2 from kParallel places of it in turn. (Memory answers one stream more
// slowly than several.)
constexpr int kParallel = 4;
struct Prefetch {
  const char* line;
  int64_t apart;
  INLINE void tile() {  // as many bytes as a tile has
    for (int i = 0; i < kTileHeight / kParallel; i++, line += kTileBytes)
      for (int part = 0; part < kParallel; part++) __builtin_prefetch(line + part * apart, 0, 2);
  }
};

// results [kBlockHeight, width] = a block of W, whose rows are `stride` bytes apart, times split rows of x.
INLINE void multiply_block(const char* w, int64_t stride, int64_t steps, const uint32_t* x, int64_t width,
                           Prefetch& next, float* results) {
  int64_t row = width * sizeof(float);
  _tile_zero(6);
  _tile_zero(7);
  for (int64_t step = 0; step < steps; step++, w += kTileBytes) {
    _tile_loadd(0, w, stride);
    next.tile();
    _tile_loadd(1, w + kTileHeight * stride, stride);
    next.tile();
    for (int part = 0; part < kSplit; part++, x += kPairs * width) {
      _tile_loadd(2, x, row);
      _tile_dpbf16ps(6, 0, 2);
      _tile_dpbf16ps(7, 1, 2);
    }
  }
  _tile_stored(6, results, row);
  _tile_stored(7, results + kTileHeight * width, row);
}

// A block of W for tiles: itself, or if it is not whole, a copy with zeros for what is missing. `apart`: from row to row.
inline const char* whole_block(const Matrix& m, int64_t row, int64_t outputs, Scratch& scratch, int64_t& apart) {
  apart = m.row_bytes();
  if (outputs == kBlockHeight && m.columns % kTileDepth == 0) return reinterpret_cast<const char*>(m.row(row));
  apart = (m.columns + kTileDepth - 1) / kTileDepth * kTileBytes;
  char* copy = scratch.get<char>(kBlockHeight * apart);
  std::memset(copy, 0, kBlockHeight * apart);
  for (int64_t i = 0; i < outputs; i++) std::memcpy(copy + i * apart, m.row(row + i), m.columns * sizeof(BFloat16));
  settle(copy);
  return copy;
}

// y [rows, m.rows] += x [rows, m.columns] W^T; alone: on this thread only.
inline void amx_few_rows(const Matrix& m, const float* x, int64_t rows, float* y, bool alone) {
  thread_local Scratch scratch;
  SplitRows split(rows, m.columns, scratch);
  split_rows(x, m.columns, split);
  int64_t blocks = (m.rows + kBlockHeight - 1) / kBlockHeight;
  std::atomic<int64_t> untaken{0};
  auto take = [&] { return untaken.fetch_add(1, std::memory_order_relaxed); };
  Pool::shared().run(alone ? 1 : Pool::shared().threads(), [&](int64_t) {
    thread_local Scratch scratch;
    Tiles tiles(int(split.width));
    settle(split.pairs);
    for (int64_t block = take(), after; block < blocks; block = after) {
      after = take();
      int64_t row = block * kBlockHeight, outputs = m.rows - row < kBlockHeight ? m.rows - row : kBlockHeight;
      int64_t apart;
      const char* w = whole_block(m, row, outputs, scratch, apart);
      const void* next = m.row(row);  // it is in the cache: prefetching it costs nothing
      if (after < blocks) next = m.row(after * kBlockHeight);
      else if (m.following) next = static_cast<const char*>(m.following) + (after - blocks) * kBlockHeight * m.row_bytes();
      for (int64_t g = 0; g < split.groups; g++) {
        Prefetch ahead{static_cast<const char*>(next), kBlockHeight * m.row_bytes() / kParallel};
        float results[(kBlockHeight + 1) * kTileHeight];
        multiply_block(w, apart, split.steps, split.group(g), split.width, ahead, results);
        float* to = y + g * split.width * m.rows + row;
        add_transposed(results, split.width, outputs, split.rows_of(g), to, m.rows);
      }
    }
  });
}

}  // namespace openelm
#endif
