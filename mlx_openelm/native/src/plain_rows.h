// Products of few rows with a plain matrix: y += x W^T.
//
// One to three rows of x: each row of W is read once, from memory, and the sums stay in registers. Several rows of W,
// far apart, are read at the same time: a processor prefetches only a limited amount per stream that it recognizes, so
// four streams arrive a quarter faster than one.
//
// More rows: tiles of kTileRows rows of x times kTileOutputs rows of W, whose sums stay in registers. A block of rows of
// W is multiplied with all rows of x while it is in L2, and the next block is prefetched meanwhile, evenly: up to about
// eight rows the memory is slower than the arithmetic, and neither may wait for the other.
//
// Each number of y is the sum of kSums accumulators of kLanes lanes, in the same order for any number of rows.

#pragma once

#include <cstring>
#include <utility>

#include "matrix.h"
#include "threads.h"

namespace openelm {

// Accumulators of a number: independent sums, since an addition takes four cycles. Their number is the same for any
// number of rows: which rows are computed together depends on the number of threads, and results must not.
constexpr int kSums = 2;
constexpr int kStep = kSums * kLanes;  // columns of a step

// The numbers beyond the last whole step belong to the first accumulator alone, so each vector of them is a step that
// ends with zeros: there are at most kSums, and body(i, column, count) is called for each.
template <class Body>
INLINE int last_steps(int64_t columns, const Body& body) {
  int i = 0;
  for (int64_t c = columns / kStep * kStep; c < columns; c += kLanes, i++)
    body(i, c, columns - c < kLanes ? int(columns - c) : kLanes);
  return i;
}

// The first `count` numbers of a vector, then zeros. They are copied rather than chosen: where a branch came between a
// product and its addition the compiler would round twice, and differently for each number of rows.
template <class T>
INLINE Float load_padded(const T* from, int count) {
  T numbers[kLanes] = {};
  std::memcpy(numbers, from, count * sizeof(T));
  return load(numbers);
}

// N rows of a plain matrix, from `row` on at a distance of `apart`, times R rows.
template <class T, int R, int N>
INLINE void plain_rows(const Matrix& m, int64_t row, int64_t apart, const float* x, float* out) {
  Float total[N][R][kSums] = {};
  const T* weights[N];
  for (int n = 0; n < N; n++) weights[n] = m.values<T>(row + n * apart);
  int64_t c = 0;
  for (; c + kStep <= m.columns; c += kStep) {
    for (int s = 0; s < kSums; s++) {
      int64_t at = c + s * kLanes;
      for (int n = 0; n < N; n++) {
        Float weight = load(weights[n] + at);
        for (int r = 0; r < R; r++) total[n][r][s] += weight * load(x + r * m.columns + at);
      }
    }
  }
  last_steps(m.columns, [&](int, int64_t c, int count) INLINE_LAMBDA {
    Float weight[N];
    for (int n = 0; n < N; n++) weight[n] = load_padded(weights[n] + c, count);
    for (int r = 0; r < R; r++) {
      Float number = load_padded(x + r * m.columns + c, count);
      for (int n = 0; n < N; n++) total[n][r][0] += weight[n] * number;
    }
  });
  for (int n = 0; n < N; n++) {
    for (int r = 0; r < R; r++) {
      out[n * apart + r * m.rows] += sum(total[n][r][0] + total[n][r][1]);
    }
  }
}

// Rows of x and of W in a tile: its sums, a column of W and a number of x fit the registers.
constexpr int kTileRows = kRegisters == 32 ? 8 : 4, kTileOutputs = 3;
constexpr int kBlockOutputs = 8 * kTileOutputs;  // rows of W that stay in L2 while all rows of x are multiplied
constexpr int64_t kBlockSteps = 20480 / (kTileRows * kLanes * sizeof(float));  // half of x's numbers take 20 KB of L1

// Half of a step's numbers. Of bfloat16, each pair is 32 bits: halves are the even and the odd numbers, which need one
// instruction each; `in_order` undoes that.
template <class T, int half>
INLINE Float half_step(const T* from) {
  if constexpr (std::is_same_v<T, BFloat16>) {
    auto bits = read<Vector<uint32_t, kLanes>>(from);
    return bits_of<Float>(half ? bits & 0xffff0000u : bits << 16);
  } else {
    return load(from + half * kLanes);
  }
}

// The same half of a step's numbers of x.
template <int half, int... lane>
INLINE Float every_other(Float a, Float b, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(a, b, (2 * lane + half)...);
}
template <class T, int half>
INLINE Float half_of(const float* from) {
  if constexpr (!std::is_same_v<T, BFloat16>) return load(from + half * kLanes);
  return every_other<half>(load(from), load(from + kLanes), std::make_integer_sequence<int, kLanes>{});
}

// The sum of the two accumulators, from the sums of the halves.
template <int... lane>
INLINE Float add_in_order(Float even, Float odd, std::integer_sequence<int, lane...>) {
  return __builtin_shufflevector(even, odd, (lane % 2 * kLanes + lane / 2)...) +
         __builtin_shufflevector(even, odd, (lane % 2 * kLanes + lane / 2 + kLanes / 2)...);
}
template <class T>
INLINE Float add_halves(Float first, Float second) {
  if constexpr (!std::is_same_v<T, BFloat16>) return first + second;
  return add_in_order(first, second, std::make_integer_sequence<int, kLanes>{});
}

// Calls body(begin, count) for blocks of the whole steps of a row of `columns` numbers.
template <class Body>
INLINE void blocks_of_steps(int64_t columns, const Body& body) {
  int64_t steps = columns / kStep, blocks = (steps + kBlockSteps - 1) / kBlockSteps;
  for (int64_t i = 0, begin = 0, end; i < blocks; i++, begin = end) {
    end = steps * (i + 1) / blocks;
    body(begin, end - begin);
  }
}

// R rows of x as tiles read them: for each block of steps and each half of it [steps, R, kLanes], then the last steps.
template <class T, int R>
void pack_rows(const float* x, int64_t columns, float* to) {
  auto pack = [&](const float* from, int64_t r, int64_t steps, int64_t step) INLINE_LAMBDA {
    write(to + (step * R + r) * kLanes, half_of<T, 0>(from));
    write(to + ((steps + step) * R + r) * kLanes, half_of<T, 1>(from));
  };
  blocks_of_steps(columns, [&](int64_t begin, int64_t steps) {
    for (int64_t step = 0; step < steps; step++)
      for (int r = 0; r < R; r++) pack(x + r * columns + (begin + step) * kStep, r, steps, step);
    to += steps * R * kStep;
  });
  int steps = last_steps(columns, [](auto...) {});
  last_steps(columns, [&](int step, int64_t c, int count) {
    for (int r = 0; r < R; r++) {
      float numbers[kStep] = {};
      std::memcpy(numbers, x + r * columns + c, count * sizeof(float));
      pack(numbers, r, steps, step);
    }
  });
}

// What to prefetch at each step: a cache line of each of kStreams parts of the next rows of W, `apart` bytes from each
// other, and by how much to go on. (Memory answers one stream more slowly than several.)
constexpr int kStreams = 4;
struct Ahead {
  const char* line;
  int64_t apart, advance;
};

// totals [N, R] += (or =) a half of `steps` steps: N rows of W, at a distance of `apart`, times R packed rows of x.
template <class T, int half, int R, int N>
INLINE void add_tile(const T* weights, int64_t apart, const float* x, int64_t steps, Ahead& ahead, bool add,
                     float* totals) {
  Float total[N][R];
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) total[n][r] = add ? load(totals + (n * R + r) * kLanes) : Float{};
  for (int64_t s = 0; s < steps; s++) {
    for (int i = 0; i < kStreams; i++) __builtin_prefetch(ahead.line + i * ahead.apart);
    ahead.line += ahead.advance;
    Float weight[N];
    for (int n = 0; n < N; n++) weight[n] = half_step<T, half>(weights + n * apart + s * kStep);
    for (int r = 0; r < R; r++) {
      Float number = load(x + (s * R + r) * kLanes);
      keep(number);
      for (int n = 0; n < N; n++) total[n][r] += weight[n] * number;
    }
  }
  for (int n = 0; n < N; n++)
    for (int r = 0; r < R; r++) write(totals + (n * R + r) * kLanes, total[n][r]);
}

// `outputs` rows of W, at most kBlockOutputs, from `row` on, times R packed rows of x.
template <class T, int R>
void tile_rows(const Matrix& m, int64_t row, int64_t outputs, const float* x, Ahead& ahead, float* out) {
  thread_local Scratch scratch;
  constexpr int64_t kSize = kBlockOutputs * R * kLanes;
  float* totals = scratch.get<float>(kSums * kSize);
  bool add = false;
  // The same half of all rows of W, so that this half of x stays in L1.
  auto add_half = [&](auto half, const T* weights, int64_t apart, int64_t steps) {
    constexpr int kHalf = half.value;
    const float* some = x + kHalf * steps * R * kLanes;
    float* to = totals + kHalf * kSize;
    int64_t n = 0;
    for (; n + kTileOutputs <= outputs; n += kTileOutputs)
      add_tile<T, kHalf, R, kTileOutputs>(weights + n * apart, apart, some, steps, ahead, add, to + n * R * kLanes);
    for (; n < outputs; n++)
      add_tile<T, kHalf, R, 1>(weights + n * apart, apart, some, steps, ahead, add, to + n * R * kLanes);
  };
  auto add_steps = [&](const T* weights, int64_t apart, int64_t steps) {
    add_half(Constant<0>{}, weights, apart, steps);
    add_half(Constant<1>{}, weights, apart, steps);
    x += steps * R * kStep;
    add = true;
  };
  blocks_of_steps(m.columns, [&](int64_t begin, int64_t steps) {
    add_steps(m.values<T>(row) + begin * kStep, m.stride, steps);
  });
  T ends[kBlockOutputs * kSums * kStep] = {};
  int steps = last_steps(m.columns, [&](int i, int64_t c, int count) {
    for (int64_t n = 0; n < outputs; n++)
      std::memcpy(ends + (n * kSums + i) * kStep, m.values<T>(row + n) + c, count * sizeof(T));
  });
  if (steps) add_steps(ends, kSums * kStep, steps);
  for (int64_t first = 0; first < outputs * R; first += kLanes) {
    Float sums[kLanes];
    int count = outputs * R - first < kLanes ? int(outputs * R - first) : kLanes;
    for (int i = 0; i < kLanes; i++) {
      const float* from = totals + (first + (i < count ? i : 0)) * kLanes;
      sums[i] = add_halves<T>(load(from), load(from + kSize));
    }
    Float result = ordered_sums(sums);
    for (int i = 0; i < count; i++) out[(first + i) % R * m.rows + (first + i) / R] += result[lane_of_sum(i)];
  }
}

// Calls body(first, Constant<R>) with R of `most` (8 or 4), 4, 2 and 1 so as to cover [begin, end).
template <int most, class Body>
INLINE void in_groups(int64_t begin, int64_t end, const Body& body) {
  for (; begin + most <= end; begin += most) body(begin, Constant<most>{});
  if (begin + 4 <= end) body(begin, Constant<4>{}), begin += 4;
  if (begin + 2 <= end) body(begin, Constant<2>{}), begin += 2;
  if (begin < end) body(begin, Constant<1>{});
}

// Calls body(row, apart, Constant<N>) so as to cover [begin, end): N rows at a distance of `apart`, or one.
template <int N, class Body>
INLINE void side_by_side(int64_t begin, int64_t end, const Body& body) {
  if constexpr (N > 1) {
    int64_t apart = (end - begin) / N;
    for (int64_t row = begin; row < begin + apart; row++) body(row, apart, Constant<N>{});
    begin += N * apart;
  }
  for (; begin < end; begin++) body(begin, int64_t(0), Constant<1>{});
}

// y [rows, m.rows] += x [rows, m.columns] W^T; a thread takes at least `grain` rows of W at a time.
template <class T>
void plain_few_rows(const Matrix& m, const float* x, int64_t rows, float* y, int64_t grain) {
  constexpr int R = kTileRows;
  int64_t tiled = rows / 4 * 4, room = (m.columns + kSums * kStep) / kLanes * kLanes;
  thread_local Scratch scratch;
  float* packed = tiled ? scratch.get<float>(tiled * room) : nullptr;
  auto tiles = [&](const auto& body) {
    int64_t first = 0;
    for (; first + R <= rows; first += R) body(first, Constant<R>{});
    if (first + 4 <= rows) body(first, Constant<4>{});
  };
  tiles([&](int64_t first, auto count) {
    pack_rows<T, count.value>(x + first * m.columns, m.columns, packed + first * room);
  });
  auto rest = [&](int64_t begin, int64_t end) {
    in_groups<2>(tiled, rows, [&](int64_t first, auto count) {
      constexpr int R = count.value;
      side_by_side<4 / R>(begin, end, [&](int64_t row, int64_t apart, auto n) {
        plain_rows<T, R, n.value>(m, row, apart, x + first * m.columns, y + first * m.rows + row);
      });
    });
  };
  for_ranges(m.rows, grain, [&](int64_t begin, int64_t end) {
    if (!tiled) return rest(begin, end);
    for (int64_t row = begin, outputs; row < end; row += outputs) {
      outputs = end - row < kBlockOutputs ? end - row : kBlockOutputs;
      // The next block is prefetched evenly while this one is multiplied.
      Ahead ahead{reinterpret_cast<const char*>(m.row(row + outputs)), outputs * m.row_bytes() / kStreams, 0};
      ahead.advance = kStep * sizeof(T) * kTileOutputs * R / (kSums * tiled * kStreams);
      tiles([&](int64_t first, auto count) {
        tile_rows<T, count.value>(m, row, outputs, packed + first * room, ahead, y + first * m.rows + row);
      });
      rest(row, row + outputs);
    }
  });
}

}  // namespace openelm
