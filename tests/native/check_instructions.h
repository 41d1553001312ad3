// Checks of `simd.h` and `unpack.h`.

#pragma once

#include <limits>

#include "checking.h"
#include "packed_rows.h"

namespace {

bool is_same(float got, double expected) { return std::isnan(expected) ? std::isnan(got) : got == float(expected); }

template <class T, int N>
void check_load(const char* name, int count, double (*meaning)(uint16_t)) {
  int wrong = 0;
  for (int first = 0; first < count; first += N) {
    std::vector<T> stored(N);
    for (int i = 0; i < N; i++) {
      if constexpr (std::is_integral_v<T>) stored[i] = T(first + i);
      else stored[i].bits = uint16_t(first + i);
    }
    auto loaded = load<N>(stored.data());
    for (int i = 0; i < N; i++) {
      wrong += !is_same(loaded[i], meaning(uint16_t(first + i)));
      if constexpr (!std::is_integral_v<T>) wrong += !is_same(load_one(&stored[i]), meaning(uint16_t(first + i)));
    }
  }
  check(wrong == 0, text(name, "in vectors of", N, ":", wrong, "wrong"));
}

void check_loads() {
  auto loads = [](auto n) {
    constexpr int N = decltype(n)::value;
    check_load<Float16, N>("float16", 65536, half_to_double);
    check_load<BFloat16, N>("bfloat16", 65536, bfloat_to_double);
    check_load<uint8_t, N>("uint8", 256, [](uint16_t value) { return double(value); });
  };
  loads(Constant<2>{}), loads(Constant<4>{}), loads(Constant<8>{}), loads(Constant<kLanes>{});
  for (Type type : kTypes) {
    for (int count = 0; count <= kLanes; count++) {
      Numbers numbers(type, count);
      with_type(type, [&](auto* t) {
        Float some = load_some(reinterpret_cast<decltype(t)>(numbers.bytes.data()), count);
        for (int i = 0; i < kLanes; i++)
          check(some[i] == (i < count ? numbers.values[i] : 0), text("load_some", int(type), count));
      });
    }
  }
}

// Bit for bit those of `sum`.
void check_ordered_sums(const Float* vectors) {
  Float some[kLanes];
  std::copy_n(vectors, kLanes, some);
  Float all = ordered_sums(some);
  for (int v = 0; v < kLanes; v++) check(all[lane_of_sum(v)] == sum(vectors[v]), text("ordered_sums", v));
}

void check_arithmetic() {
  double worst = 0;
  for (int n = 0; n < 40000; n += kLanes) {
    Float x{};
    for (int i = 0; i < kLanes; i++) x[i] = float(-87.3 + 176.0 * (n + i) / 40000);
    Float y = exp(x);
    for (int i = 0; i < kLanes; i++) worst = std::max(worst, std::abs(y[i] / std::exp(double(x[i])) - 1));
  }
  check(worst < 3e-7, text("exp's relative error", worst));
  const float lowest = std::numeric_limits<float>::lowest();
  for (float low : {-87.31f, -88.f, -104.f, -1e10f, lowest, -INFINITY})
    check(exp(spread(low))[0] == 0, text("exp", low));
  check(exp(Float{})[0] == 1, "exp 0");
  check(std::isnan(exp(spread(NAN))[kLanes - 1]), "exp NaN");
  for (int n = 0; n < 100; n++) {
    Float vectors[kLanes];
    ExpectedNumbers expected(kLanes);
    double top = -INFINITY;
    for (int v = 0; v < kLanes; v++) {
      for (int i = 0; i < kLanes; i++) vectors[v][i] = float(random_number()), expected[v].add(vectors[v][i]);
      check(is_close(sum(vectors[v]), expected[v], 3e-7), "sum");
    }
    for (int i = 0; i < kLanes; i++) top = std::max(top, double(vectors[0][i]));
    check(largest(vectors[0]) == top, "largest");
    check_ordered_sums(vectors);
    Float turned[kLanes];
    std::copy_n(vectors, kLanes, turned);
    transpose(turned);
    for (int v = 0; v < kLanes; v++)
      for (int i = 0; i < kLanes; i++) check(turned[v][i] == vectors[i][v], "transpose");
    Float all = sums<kLanes>(vectors);
    for (int v = 0; v < kLanes; v++) check(is_close(all[v], expected[v], 3e-7), "sums");
  }
}

template <int bits>
void check_dots() {
  for (int n = 0; n < 60; n++) {
    // First the largest weights with the most extreme activations, then random ones.
    int blocks = n < 30 ? 1 + n * 5 : random_int(1, 20);
    Dots<bits> dots;
    int64_t expected = 0;
    for (int block = 0; block < blocks; block++) {
      Wide weights;
      std::vector<int8_t> x(sizeof weights);
      for (size_t i = 0; i < sizeof weights; i++) {
        weights[i] = uint8_t(n < 30 ? (1 << bits) - 1 : random_int(0, (1 << bits) - 1));
        x[i] = int8_t(n < 10 ? 127 : n < 20 ? -127 : n < 30 ? random_int(0, 1) * 254 - 127 : random_int(-127, 127));
        expected += int(weights[i]) * x[i];
      }
      dots.add(weights, x.data());
    }
    WideInt parts = dots.finish();
    int64_t got = 0;
    for (int i = 0; i < kWideLanes; i++) got += parts[i];
    check(got == expected, text("dots of", bits, "bits,", blocks, "blocks: got", got, "expected", expected));
  }
}

template <int bits, int block>
void check_unpack() {
  for (int n = 0; n < 500; n++) {
    std::vector<uint8_t> packed(block * bits / 8);
    for (auto& byte : packed) byte = uint8_t(n ? random_int(0, 255) : 255);
    Bytes quick[block / 32], in_order = unpack_in_order<bits>(packed.data());
    unpack_block<bits, block>(packed.data(), quick);
    bool right = true;
    for (int i = 0; i < 32; i++) right = right && in_order[i] == read_bits(packed.data(), i, bits);
    for (int i = 0; i < block; i++)
      right = right && quick[i / 32][i % 32] == read_bits(packed.data(), unpacked_order<bits, block>(i), bits);
    check(right, text("unpack", bits, "bits in blocks of", block));
  }
}

void check_halves_together() {
  Bytes blocks[kHalves];
  Wide halves[2];
  for (int b = 0; b < kHalves; b++)
    for (int i = 0; i < 32; i++) blocks[b][i] = uint8_t(32 * b + i);
  halves_together(blocks, halves);
  for (int half = 0; half < 2; half++)
    for (int i = 0; i < 16 * kHalves; i++)
      check(halves[half][i] == i / 16 * 32 + 16 * half + i % 16, text("halves_together at", half, i));
}

void check_four_times() {
  for (Type type : kTypes) {
    Numbers numbers(type, kHalves);
    WideFloat all = with_type(
        type, [&](auto* t) { return load_four_times(reinterpret_cast<decltype(t)>(numbers.bytes.data())); });
    Vector<float, kHalves> value;
    for (int i = 0; i < kHalves; i++) value[i] = float(numbers.values[i]);
    WideFloat same = four_times(value);
    for (int i = 0; i < 4 * kHalves; i++)
      check(all[i] == value[i / 4] && same[i] == value[i / 4], text("four times, type", int(type), "at", i));
  }
}

void check_packing() {
  check_halves_together();
  check_four_times();
  for (int bits : kBits) {
    with_bits(bits, [](auto b) {
      check_unpack<b.value, kBlock<b.value, 32>>();
      check_unpack<b.value, kBlock<b.value, 128>>();
      if constexpr (can_round(b.value)) check_dots<b.value>();
    });
  }
}

}  // namespace
