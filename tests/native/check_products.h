// Checks of `rows.h` and `matmul.h`.

#pragma once

#include "check_instructions.h"
#include "matmul.h"
#include "packed_rows.h"

namespace {

// y + x W^T, or with `transposed` y + x W.
ExpectedNumbers product(const Stored& w, const Floats& x, int64_t rows, const Floats& y, bool transposed) {
  int64_t outputs = y.size() / rows, depth = x.size() / rows, columns = w.matrix.columns;
  ExpectedNumbers expected(y.size());
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t n = 0; n < outputs; n++) {
      Expected& to = expected[r * outputs + n];
      to.add(y[r * outputs + n]);
      for (int64_t k = 0; k < depth; k++) {
        int64_t at = transposed ? k * columns + n : n * columns + k;
        to.add(x[r * depth + k] * w.values[at]);
        // A packed weight is a sum of two terms, which the kernels may add up separately.
        if (w.kind.bits) to.size += 2 * std::abs(x[r * depth + k] * w.biases.values[at / w.kind.group]);
      }
    }
  }
  return expected;
}

// The same for activations rounded to multiples of 1/127 of each group's largest. Changes numbers so close to the
// middle of two multiples that a fused multiplication could round them the other way.
ExpectedNumbers rounded_product(const Stored& w, Floats& x, int64_t rows, const Floats& y) {
  int64_t outputs = y.size() / rows, depth = w.matrix.columns, group = w.kind.group;
  ExpectedNumbers expected(y.size());
  for (size_t i = 0; i < y.size(); i++) expected[i].add(y[i]);
  for (int64_t r = 0; r < rows; r++) {
    for (int64_t g = 0; g < depth / group; g++) {
      float* numbers = &x[r * depth + g * group];
      float top = 0;
      for (int64_t i = 0; i < group; i++) top = std::max(top, std::abs(numbers[i]));
      double step = top / 127;
      std::vector<int> whole(group);
      for (int64_t i = 0; i < group; i++) {
        while (std::abs(std::abs(numbers[i] / step - std::floor(numbers[i] / step)) - 0.5) < 1e-3) numbers[i] *= 0.999f;
        whole[i] = top ? int(std::nearbyint(numbers[i] / step)) : 0;
      }
      for (int64_t n = 0; n < outputs; n++) {
        int64_t at = n * depth / group + g;
        for (int64_t i = 0; i < group; i++) {
          expected[r * outputs + n].add(step * whole[i] * w.scales.values[at] * w.weights[n * depth + g * group + i]);
          expected[r * outputs + n].add(step * whole[i] * w.biases.values[at]);
        }
      }
    }
  }
  return expected;
}

void check_few(Kind kind, int64_t outputs, int64_t columns, int64_t rows, bool round, int64_t gap = 0) {
  Stored w(kind, outputs, columns, gap);
  Floats x = random_floats(rows * columns), y = random_floats(rows * outputs);
  // In a group of zeros the largest number is zero, which cannot be divided by.
  if (kind.bits) std::fill_n(x.end() - kind.group, kind.group, 0.0f);
  ExpectedNumbers expected =
      round && can_round(kind.bits) ? rounded_product(w, x, rows, y) : product(w, x, rows, y, false);
  few_rows(w.matrix, x.data(), rows, y.data(), round);
  compare(y, expected, 1e-6,
          text("few_rows", kind.name(), "outputs", outputs, "columns", columns, "rows", rows, "round", round));
}

// Each row of many gets, bit for bit, what it gets alone.
void check_independent(Kind kind, int64_t outputs, int64_t columns, bool round) {
  Stored w(kind, outputs, columns);
  constexpr int64_t kMost = 33;
  Floats x = random_floats(kMost * columns), alone(kMost * outputs);
  for (int64_t r = 0; r < kMost; r++) few_rows(w.matrix, x.data() + r * columns, 1, alone.data() + r * outputs, round);
  for (int64_t rows : {2, 3, 7, 8, 11, 12, 16, 33}) {
    Floats y(rows * outputs);
    few_rows(w.matrix, x.data(), rows, y.data(), round);
    check(std::equal(y.begin(), y.end(), alone.begin()),
          text("few_rows alone", kind.name(), "outputs", outputs, "columns", columns, "rows", rows, "round", round));
  }
}

void check_few_rows() {
  for (Type type : kTypes) {
    for (int columns : {7, 64, 200, 4500})
      for (int outputs : {1, 5, 33}) check_independent({type}, outputs, columns, false);
    for (int bits : kBits)
      for (int group : {32, 64, 128})
        for (bool round : {false, true})
          for (int groups : {3, 12}) check_independent({type, bits, group}, 5, groups * group, round);
  }
  for (Type type : kTypes)
    for (int rows = 1; rows <= 9; rows++)
      for (int columns : {1, 7, 63, 64, 200})
        for (int outputs : {1, 5, 33}) check_few({type}, outputs, columns, rows, false, columns == 63 ? 3 : 0);
  for (Type type : kTypes)
    for (int bits : kBits)
      for (int group : {32, 64, 128})
        for (int rows = 1; rows <= 9; rows++)
          for (bool round : {false, true})
            for (int groups : {1, 4, 8, 11, 12}) check_few({type, bits, group}, 5, groups * group, rows, round);
}

// Groups that rounding must handle specially: tiny numbers, whose step has no finite inverse, NaN and infinity.
void check_extreme_rows() {
  for (bool round : {false, true}) {
    for (float most : {1e-44f, 1e-40f, 1e-38f, 1e-36f, 1e30f}) {
      Stored w({Type::float32, 4, 32}, 3, 64);
      Floats x = random_floats(64, most), y(3);
      ExpectedNumbers expected = product(w, x, 1, y, false);
      few_rows(w.matrix, x.data(), 1, y.data(), round);
      // Numbers too small to be rounded count as zeros.
      for (auto& number : expected) number.size += 1e-32;
      compare(y, expected, round ? 1e-2 : 1e-6, text("few_rows of numbers up to", most, "round", round));
    }
    for (float nothing : {NAN, INFINITY}) {
      for (int place : {0, 1, 5, 31, 40}) {
        Stored w({Type::float32, 4, 32}, 3, 64);
        Floats x = random_floats(64), y(3);
        x[place] = nothing;
        few_rows(w.matrix, x.data(), 1, y.data(), round);
        for (float got : y)
          check(!std::isfinite(got), text("few_rows of", nothing, "at", place, "round", round, "got", got));
      }
    }
  }
}

// Plain weights: tiny and huge numbers, infinity, and NaN, one of which has no bits where bfloat16 has them.
void check_extreme_plain_rows() {
  const float nan = bits_of<float>(0x7f800001u);
  for (Type type : kTypes) {
    for (float most : {1e-44f, 1e-38f, 1e-30f, 1e30f}) {
      Stored w({type}, 3, 64);
      Floats x = random_floats(64, most), y(3);
      ExpectedNumbers expected = product(w, x, 1, y, false);
      few_rows(w.matrix, x.data(), 1, y.data(), false);
      for (auto& number : expected) number.size += 1e-31;  // subnormal numbers may count as zeros
      compare(y, expected, 1e-6, text("few_rows of plain weights, numbers up to", most));
    }
    for (float number : {NAN, nan, INFINITY, -INFINITY}) {
      for (int place : {0, 1, 31, 40}) {
        Stored w({type}, 3, 64);
        Floats x = random_floats(2 * 64), y(2 * 3), alone(3);
        few_rows(w.matrix, x.data(), 1, alone.data(), false);
        x[64 + place] = number;
        few_rows(w.matrix, x.data(), 2, y.data(), false);
        check(std::equal(alone.begin(), alone.end(), y.begin()), text("few_rows beside", number));
        for (int n = 0; n < 3; n++)
          check(is_same(y[3 + n], number * w.values[n * 64 + place]),
                text("few_rows of plain weights, type", int(type), "of", number, "at", place, "got", y[3 + n]));
      }
    }
  }
}

void check_many(Kind kind, int64_t outputs, int64_t depth, int64_t rows, bool transposed, int64_t gap = 0) {
  Stored w(kind, transposed ? depth : outputs, transposed ? outputs : depth, gap);
  Floats x = random_floats(rows * depth), y = random_floats(rows * outputs);
  ExpectedNumbers expected = product(w, x, rows, y, transposed);
  many_rows(w.matrix, outputs, depth, x.data(), rows, y.data(), transposed);
  compare(y, expected, 1e-6,
          text("many_rows", kind.name(), "outputs", outputs, "depth", depth, "rows", rows, "transposed", transposed));
}

void check_many_rows() {
  for (bool transposed : {false, true}) {
    for (Type type : kTypes) {
      for (int rows : {1, 7, 16, 33})
        for (int outputs : {1, 5, 97})
          for (int depth : {1, 7, 257}) check_many({type}, outputs, depth, rows, transposed, depth == 7 ? 3 : 0);
      for (int rows : {512, 513, 600}) check_many({type}, 19, 70, rows, transposed);
      for (int bits : kBits) {
        for (int group : {32, 64, 128})
          for (int rows : {1, 33})
            check_many({type, bits, group}, transposed ? 128 : 13, transposed ? 13 : 384, rows, transposed);
        check_many({type, bits, 32}, transposed ? 32 : 19, transposed ? 19 : 32, 600, transposed);
      }
    }
  }
}

}  // namespace
