// A weight matrix, or a cache's keys, as stored: plain floats of three types, or MLX's affine packing.

#pragma once

#include <bit>
#include <type_traits>

#include "unpack.h"

namespace openelm {

enum class Type { float32, bfloat16, float16 };

// Calls `body` for a stored type that is chosen at run time: its argument is a null pointer to the type.
template <class Body>
INLINE auto with_type(Type type, const Body& body) {
  if (type == Type::bfloat16) return body(static_cast<const BFloat16*>(nullptr));
  if (type == Type::float16) return body(static_cast<const Float16*>(nullptr));
  return body(static_cast<const float*>(nullptr));
}

template <int number>
struct Constant {
  static constexpr int value = number;
};

template <class Body>
INLINE auto with_bits(int bits, const Body& body) {
  switch (bits) {
    case 2: return body(Constant<2>{});
    case 3: return body(Constant<3>{});
    case 4: return body(Constant<4>{});
    case 5: return body(Constant<5>{});
    case 6: return body(Constant<6>{});
    default: return body(Constant<8>{});
  }
}

struct Matrix {
  const void* data = nullptr;    // plain values of `type`, or packed weights
  const void* scales = nullptr;  // of `type`, like biases: [rows, columns / group]
  const void* biases = nullptr;
  Type type = Type::float32;
  int bits = 0;  // 0: plain
  int group = 0;
  int64_t rows = 0, columns = 0;
  int64_t stride = 0;  // plain: from row to row, in values
  const void* following = nullptr;  // what is read next, if that is known: a hint for prefetching

  int64_t row_bytes() const {
    if (bits) return columns * bits / 8;
    return stride * (type == Type::float32 ? 4 : 2);
  }
  const uint8_t* row(int64_t index) const { return static_cast<const uint8_t*>(data) + index * row_bytes(); }
  template <class T>
  const T* values(int64_t row) const {
    return static_cast<const T*>(data) + row * stride;
  }
  int64_t groups() const { return columns / group; }
};

// Not inlined: it runs only at the very end of a matrix, and inlining would compile it a thousand times.
template <int N, class T>
__attribute__((noinline)) Vector<float, N> load_last(const T* from, int count) {
  return load_some<N>(from, count);
}

// `count` scales or biases of a type from position `at` of `all`, then zeros. At the end of a row, those of the next
// row are read as well and dropped.
template <int N>
INLINE Vector<float, N> load_scales(const void* scales, Type type, int64_t at, int count, int64_t all) {
  return with_type(type, [&](auto* t) INLINE_LAMBDA {
    auto* from = static_cast<decltype(t)>(scales) + at;
    if (count == N) return load<N>(from);
    if (at + N > all) return load_last<N>(from, count);
    Vector<int32_t, N> lanes;
    for (int i = 0; i < N; i++) lanes[i] = i;
    return bits_of<Vector<float, N>>(bits_of<Vector<int32_t, N>>(load<N>(from)) & (lanes < count));
  });
}

INLINE float load_scale(const void* scales, Type type, int64_t at) {
  return with_type(type, [&](auto* t) INLINE_LAMBDA { return load_one(static_cast<decltype(t)>(scales) + at); });
}

// A rectangle of the matrix as floats: rows [row, row + rows), columns [column, column + columns), to `to` with
// `stride` floats from row to row. Of packed matrices, column and columns are multiples of 32.
inline void open(const Matrix& m, int64_t row, int64_t rows, int64_t column, int64_t columns, float* to,
                 int64_t stride) {
  if (!m.bits) {
    with_type(m.type, [&](auto* t) {
      for (int64_t r = 0; r < rows; r++) {
        auto* from = m.values<std::remove_cvref_t<decltype(*t)>>(row + r) + column;
        float* out = to + r * stride;
        int64_t c = 0;
        for (; c + kLanes <= columns; c += kLanes) write(out + c, load(from + c));
        for (; c < columns; c++) out[c] = load_one(from + c);
      }
    });
    return;
  }
  int64_t groups = m.groups(), within = m.group - 1;
  int shift = std::countr_zero(unsigned(m.group));  // a power of two; a division would take longer than all the rest
  with_bits(m.bits, [&](auto b) {
    constexpr int bits = b.value;
    for (int64_t r = 0; r < rows; r++) {
      const uint8_t* packed = m.row(row + r) + column * bits / 8;
      float* out = to + r * stride;
      float scale = 0, bias = 0;
      for (int64_t c = column; c < column + columns; c += 32, packed += 4 * bits, out += 32) {
        if (c == column || (c & within) == 0) {
          int64_t at = (row + r) * groups + (c >> shift);
          scale = load_scale(m.scales, m.type, at), bias = load_scale(m.biases, m.type, at);
        }
        uint8_t weights[32];
        write(weights, unpack_in_order<bits>(packed));
        for (int i = 0; i < 32; i += kLanes) write(out + i, load(weights + i) * scale + bias);
      }
    }
  });
}

}  // namespace openelm
