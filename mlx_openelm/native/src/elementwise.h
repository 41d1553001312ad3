// The elementwise parts between matrix products: RMSNorm, SwiGLU, and splitting projections into heads.

#pragma once

#include <cmath>

#include "threads.h"

namespace openelm {

constexpr int64_t kNumbersWorthAThread = 4096;

INLINE float inverse_rms(const float* x, int64_t dims, float eps) {
  Float squares{};
  int64_t i = 0;
  for (; i + kLanes <= dims; i += kLanes) squares += load(x + i) * load(x + i);
  float rest = 0;
  for (; i < dims; i++) rest += x[i] * x[i];
  return 1 / std::sqrt((sum(squares) + rest) / float(dims) + eps);
}

// y = x / rms(x) * weight over rows of `dims`; y may be x.
inline void rms_norm(const float* x, const float* weight, int64_t rows, int64_t dims, float eps, float* y) {
  for_ranges(rows, kNumbersWorthAThread / dims + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* from = x + r * dims;
      float* to = y + r * dims;
      float inverse = inverse_rms(from, dims, eps);
      int64_t i = 0;
      for (; i + kLanes <= dims; i += kLanes) write(to + i, load(from + i) * inverse * load(weight + i));
      for (; i < dims; i++) to[i] = from[i] * inverse * weight[i];
    }
  });
}

// y = x - log(sum(exp(x))) over rows of `dims`.
inline void log_softmax(const float* x, int64_t rows, int64_t dims, float* y) {
  for_ranges(rows, kNumbersWorthAThread / dims + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      const float* from = x + r * dims;
      float top = -INFINITY, total = 0;
      Float tops = spread(top), totals{};
      int64_t whole = dims / kLanes * kLanes;
      for (int64_t i = 0; i < whole; i += kLanes) tops = larger(tops, load(from + i));
      top = largest(tops);
      for (int64_t i = whole; i < dims; i++) top = from[i] > top ? from[i] : top;
      // All are minus infinity: as in MLX, subtracting log 0 from that gives NaN.
      for (int64_t i = 0; i < whole; i += kLanes) totals += exp(load(from + i) - top);
      for (int64_t i = whole; i < dims; i++) total += std::exp(from[i] - top);
      float logsum = top + std::log(total + sum(totals));
      for (int64_t i = 0; i < whole; i += kLanes) write(y + r * dims + i, load(from + i) - logsum);
      for (int64_t i = whole; i < dims; i++) y[r * dims + i] = from[i] - logsum;
    }
  });
}

INLINE Float sigmoid(Float x) { return 1.0f / (1.0f + exp(-x)); }

// Calls body(at, count) for `rows` rows of `dims` numbers, a vector at a time.
template <class Body>
INLINE void vectors(int64_t rows, int64_t dims, const Body& body) {
  for_ranges(rows, kNumbersWorthAThread / dims + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++)
      for (int64_t i = 0; i < dims; i += kLanes) body(r, i, dims - i < kLanes ? int(dims - i) : kLanes);
  });
}

INLINE void write_some(float* to, Float value, int count) {
  if (count == kLanes) return write(to, value);
  for (int i = 0; i < count; i++) to[i] = value[i];
}

// y [rows, inner] = silu(gate) * up for x [rows, 2 * inner], gate first.
inline void swiglu(const float* x, int64_t rows, int64_t inner, float* y) {
  vectors(rows, inner, [&](int64_t r, int64_t i, int count) {
    const float* gate = x + r * 2 * inner + i;
    Float g = load_some(gate, count);
    write_some(y + r * inner + i, g * sigmoid(g) * load_some(gate + inner, count), count);
  });
}

// The gradient of x for a gradient dy of y.
inline void swiglu_gradient(const float* x, const float* dy, int64_t rows, int64_t inner, float* dx) {
  vectors(rows, inner, [&](int64_t r, int64_t i, int count) {
    int64_t at = r * 2 * inner + i;
    Float g = load_some(x + at, count), up = load_some(x + at + inner, count);
    Float d = load_some(dy + r * inner + i, count), s = sigmoid(g), silu = g * s;
    write_some(dx + at, d * up * (s + silu * (1.0f - s)), count);
    write_some(dx + at + inner, d * silu, count);
  });
}

// The layout of queries, keys and values in a projection, and how they are normalized and rotated.
struct Heads {
  int64_t batch, length, queries, kv, dim;  // rows, positions, query heads, key-value heads, head_dim
  float eps;
  const float* query_weight;  // of the norms [dim], or null
  const float* key_weight;
  const float* table;         // [batch or 1, length, dim]: cosines of a position's angles, then sines
  int64_t table_stride;       // stride of the batch, 0 if its rows share positions
};

// RMSNorm over a head, then RoPE in halves: (a, b) becomes (a cos - b sin, b cos + a sin).
INLINE void norm_and_rotate(const float* x, const float* weight, const float* table, int64_t dim, float eps,
                            float* y) {
  float inverse = weight ? inverse_rms(x, dim, eps) : 1;
  int64_t half = dim / 2;
  for (int64_t i = 0; i < half; i += kLanes) {
    int count = half - i < kLanes ? int(half - i) : kLanes;
    Float a = load_some(x + i, count) * inverse, b = load_some(x + half + i, count) * inverse;
    if (weight) a *= load_some(weight + i, count), b *= load_some(weight + half + i, count);
    Float cos = load_some(table + i, count), sin = load_some(table + half + i, count);
    write_some(y + i, a * cos - b * sin, count);
    write_some(y + half + i, b * cos + a * sin, count);
  }
}

// Where the keys and values of a row's first head go, and the distance from head to head.
struct Place {
  float *keys, *values;
  int64_t apart;
};

// From projections qkv [batch * length, (queries + 2 kv) * dim] to queries [batch, length, queries, dim], and keys and
// values, written to place(row).
template <class Where>
void split_heads(const Heads& h, const float* qkv, float* queries, const Where& place) {
  int64_t width = (h.queries + 2 * h.kv) * h.dim;
  for_ranges(h.batch * h.length, kNumbersWorthAThread / width + 1, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; r++) {
      int64_t b = r / h.length, l = r % h.length;
      const float* table = h.table + b * h.table_stride + l * h.dim;
      const float* from = qkv + r * width;
      for (int64_t i = 0; i < h.queries; i++, from += h.dim)
        norm_and_rotate(from, h.query_weight, table, h.dim, h.eps, queries + (r * h.queries + i) * h.dim);
      auto [keys, values, apart] = place(r);
      for (int64_t i = 0; i < h.kv; i++, from += h.dim)
        norm_and_rotate(from, h.key_weight, table, h.dim, h.eps, keys + i * apart);
      for (int64_t i = 0; i < h.kv; i++, from += h.dim)
        std::memcpy(values + i * apart, from, h.dim * sizeof(float));
    }
  });
}

// The same with buffers [batch, kv, room, dim], from position `start` on.
inline void split_heads(const Heads& h, const float* qkv, float* queries, float* keys, float* values, int64_t room,
                        int64_t start) {
  split_heads(h, qkv, queries, [=](int64_t r) {
    int64_t at = (r / h.length * h.kv * room + start + r % h.length) * h.dim;
    return Place{keys + at, values + at, room * h.dim};
  });
}

}  // namespace openelm
