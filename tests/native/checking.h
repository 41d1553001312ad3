// What all checks use: counting, comparing, random numbers and matrices.

#pragma once

#include <algorithm>
#include <cmath>
#include <cstdio>
#include <random>
#include <sstream>
#include <string>
#include <vector>

#include "matrix.h"

namespace {

using namespace openelm;
using Doubles = std::vector<double>;
using Floats = std::vector<float>;

std::mt19937 generator;
int passed = 0, failed = 0;

template <class... Parts>
std::string text(const Parts&... parts) {
  std::ostringstream out;
  ((out << parts << ' '), ...);
  return out.str();
}

void check(bool right, const std::string& what) {
  (right ? passed : failed)++;
  if (!right && failed <= 20) std::printf("  FAILED: %s\n", what.c_str());
}

// An expected number, with the sum of the magnitudes of its terms, which rounding errors are proportional to.
struct Expected {
  double value = 0, size = 0;
  void add(double term) { value += term, size += std::abs(term); }
};
using ExpectedNumbers = std::vector<Expected>;

bool is_close(double got, Expected expected, double tolerance) {
  if (std::isnan(expected.value)) return std::isnan(got);
  if (std::isinf(expected.value)) return got == expected.value;
  return std::abs(got - expected.value) <= tolerance * expected.size + 1e-35;
}

void compare(const Floats& got, const ExpectedNumbers& expected, double tolerance, const std::string& what) {
  for (size_t i = 0; i < expected.size(); i++) {
    if (is_close(got[i], expected[i], tolerance)) continue;
    return check(false, what + text("at", i, "got", got[i], "expected", expected[i].value, "size", expected[i].size));
  }
  check(got.size() == expected.size(), what);
}

int random_int(int low, int high) { return std::uniform_int_distribution<>(low, high)(generator); }
double random_number(double most = 1) { return std::uniform_real_distribution<>(-most, most)(generator); }

Floats random_floats(int64_t count, double most = 1) {
  Floats values(count);
  for (auto& value : values) value = float(random_number(most));
  return values;
}

// A 16-bit float: sign, exponent, and that many bits of fraction.
double short_to_double(uint16_t bits, int fraction_bits) {
  int one = 1 << fraction_bits, most = (1 << (15 - fraction_bits)) - 1, shift = most / 2 + fraction_bits;
  int exponent = bits >> fraction_bits & most, fraction = bits & (one - 1);
  double magnitude = exponent == most ? (fraction ? NAN : INFINITY)
                     : exponent       ? std::ldexp(one + fraction, exponent - shift)
                                      : std::ldexp(fraction, 1 - shift);
  return bits & 0x8000 ? -magnitude : magnitude;
}
double half_to_double(uint16_t bits) { return short_to_double(bits, 10); }
double bfloat_to_double(uint16_t bits) { return short_to_double(bits, 7); }

// Random numbers below 1 in a stored type: their bytes and values.
struct Numbers {
  std::vector<uint8_t> bytes;
  Doubles values;

  Numbers(Type type, int64_t count) : bytes(count * (type == Type::float32 ? 4 : 2)), values(count) {
    for (int64_t i = 0; i < count; i++) {
      if (type == Type::float32) {
        float value = float(random_number());
        values[i] = value;
        std::memcpy(&bytes[4 * i], &value, 4);
        continue;
      }
      // Any sign and fraction, and an exponent for magnitudes from 2^-5 to 1.
      bool half = type == Type::float16;
      int exponent = (half ? 15 : 127) - random_int(1, 5), width = half ? 10 : 7;
      auto bits = uint16_t(random_int(0, 1) << 15 | exponent << width | random_int(0, (1 << width) - 1));
      values[i] = half ? half_to_double(bits) : bfloat_to_double(bits);
      std::memcpy(&bytes[2 * i], &bits, 2);
    }
  }
};

constexpr Type kTypes[] = {Type::float32, Type::bfloat16, Type::float16};
constexpr int kBits[] = {2, 3, 4, 5, 6, 8};

// How a matrix is stored: plain for 0 bits.
struct Kind {
  Type type = Type::float32;
  int bits = 0, group = 0;
  std::string name() const { return text("type", int(type), "bits", bits, "group", group); }
};

// Weight `index` of a bit string.
int read_bits(const uint8_t* bytes, int64_t index, int bits) {
  int value = 0;
  for (int i = 0; i < bits; i++) {
    int64_t at = index * bits + i;
    value |= (bytes[at / 8] >> at % 8 & 1) << i;
  }
  return value;
}

// A random matrix as the kernels see it, and its values.
struct Stored {
  Kind kind;
  std::vector<uint8_t> data;
  Numbers scales, biases;
  Doubles values;             // [rows, columns]
  std::vector<int> weights;   // packed: [rows, columns]
  Matrix matrix;

  Stored(Kind kind, int64_t rows, int64_t columns, int64_t gap = 0)
      : kind(kind),
        scales(kind.type, kind.bits ? rows * columns / kind.group : 0),
        biases(kind.type, kind.bits ? rows * columns / kind.group : 0),
        values(rows * columns) {
    matrix.type = kind.type, matrix.bits = kind.bits, matrix.group = kind.group;
    matrix.rows = rows, matrix.columns = columns;
    if (!kind.bits) {
      // `gap` numbers lie between rows, none after the last.
      matrix.stride = columns + gap;
      Numbers numbers(kind.type, (rows - 1) * matrix.stride + columns);
      for (int64_t i = 0; i < rows * columns; i++)
        values[i] = numbers.values[i / columns * matrix.stride + i % columns];
      data = numbers.bytes;
    } else {
      data.resize(rows * columns * kind.bits / 8);
      for (auto& byte : data) byte = uint8_t(random_int(0, 255));
      weights.resize(rows * columns);
      for (int64_t i = 0; i < rows * columns; i++) {
        weights[i] = read_bits(data.data(), i, kind.bits);
        values[i] = scales.values[i / kind.group] * weights[i] + biases.values[i / kind.group];
      }
      matrix.scales = scales.bytes.data(), matrix.biases = biases.bytes.data();
    }
    matrix.data = data.data();
  }
  Stored(const Stored&) = delete;
};

}  // namespace
