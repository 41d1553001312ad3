// Checks of `elementwise.h`.

#pragma once

#include "checking.h"
#include "elementwise.h"

namespace {

void check_norms() {
  for (int dims : {1, 3, 7, 16, 31, 64, 100, 1280}) {
    for (int rows : {1, 3, 50}) {
      Floats x = random_floats(rows * dims, 3), weight = random_floats(dims), y(x.size());
      ExpectedNumbers expected(x.size());
      for (int r = 0; r < rows; r++) {
        double squares = 0;
        for (int i = 0; i < dims; i++) squares += std::pow(x[r * dims + i], 2);
        double rms = std::sqrt(squares / dims + 1e-6);
        for (int i = 0; i < dims; i++) expected[r * dims + i].add(x[r * dims + i] / rms * weight[i]);
      }
      rms_norm(x.data(), weight.data(), rows, dims, 1e-6f, y.data());
      compare(y, expected, 1e-6, text("rms_norm", rows, dims));
      rms_norm(x.data(), weight.data(), rows, dims, 1e-6f, x.data());
      compare(x, expected, 1e-6, text("rms_norm in place", rows, dims));
    }
  }
}

void check_log_softmax() {
  for (int dims : {1, 3, 7, 16, 31, 100, 1000}) {
    for (int rows : {1, 3, 50}) {
      Floats x = random_floats(rows * dims, 20), y(x.size());
      x[0] = -INFINITY;  // with a single number, everything is masked
      if (rows > 1) x[dims] = 1e4f, x[2 * dims + dims / 2] = -1e30f;
      ExpectedNumbers expected(x.size());
      for (int r = 0; r < rows; r++) {
        double top = -INFINITY, total = 0;
        for (int i = 0; i < dims; i++) top = std::max(top, double(x[r * dims + i]));
        for (int i = 0; i < dims; i++) total += std::exp(x[r * dims + i] - top);
        for (int i = 0; i < dims; i++) {
          expected[r * dims + i].add(x[r * dims + i]);
          expected[r * dims + i].add(-top - std::log(total));
        }
      }
      log_softmax(x.data(), rows, dims, y.data());
      compare(y, expected, 5e-7, text("log_softmax", rows, dims));
    }
  }
}

void check_swiglu() {
  for (int inner : {1, 3, 8, 16, 31, 100, 768}) {
    for (int rows : {1, 3, 20}) {
      Floats x = random_floats(rows * 2 * inner, 20), dy = random_floats(rows * inner), y(dy.size()), dx(x.size());
      if (rows > 1) x[0] = 100, x[2 * inner] = -100, x[4 * inner] = 0;
      ExpectedNumbers expected(y.size()), gradient(x.size());
      for (int r = 0; r < rows; r++) {
        for (int i = 0; i < inner; i++) {
          int at = r * inner + i;
          double gate = x[r * 2 * inner + i], up = x[r * 2 * inner + inner + i], sigmoid = 1 / (1 + std::exp(-gate));
          expected[at].add(gate * sigmoid * up);
          gradient[r * 2 * inner + i].add(dy[at] * up * sigmoid);
          gradient[r * 2 * inner + i].add(dy[at] * up * gate * sigmoid * (1 - sigmoid));
          // In floats, 1 - sigmoid has only absolute accuracy.
          gradient[r * 2 * inner + i].size += std::abs(dy[at] * up * gate) * sigmoid;
          gradient[r * 2 * inner + inner + i].add(dy[at] * gate * sigmoid);
        }
      }
      swiglu(x.data(), rows, inner, y.data());
      compare(y, expected, 1e-6, text("swiglu", rows, inner));
      swiglu_gradient(x.data(), dy.data(), rows, inner, dx.data());
      compare(dx, gradient, 1e-6, text("swiglu_gradient", rows, inner));
    }
  }
}

void check_heads(int64_t dim, bool normed, bool shared) {
  int64_t batch = 2, length = 3, heads = 4, kv = 2, room = 9, start = 4, all = heads + 2 * kv;
  Floats qkv = random_floats(batch * length * all * dim, 3), table((shared ? 1 : batch) * length * dim);
  Floats query_weight = random_floats(dim), key_weight = random_floats(dim);
  for (size_t i = 0; i < table.size(); i++) {
    double angle = double(i / dim + 1) * double(i % (dim / 2) + 1) / 7;
    table[i] = float(int64_t(i) % dim < dim / 2 ? std::cos(angle) : std::sin(angle));
  }
  Heads h{batch, length, heads, kv, dim, 1e-6f, nullptr, nullptr, table.data(), shared ? 0 : length * dim};
  if (normed) h.query_weight = query_weight.data(), h.key_weight = key_weight.data();
  const float untouched = 12345;
  Floats queries(batch * length * heads * dim), keys(batch * kv * room * dim, untouched), values(keys);
  ExpectedNumbers wanted_queries(queries.size()), wanted_keys(keys.size(), {untouched, 0}), wanted_values(wanted_keys);
  for (int64_t b = 0; b < batch; b++) {
    for (int64_t l = 0; l < length; l++) {
      for (int64_t head = 0; head < all; head++) {
        const float* x = &qkv[((b * length + l) * all + head) * dim];
        bool is_query = head < heads, is_value = head >= heads + kv;
        int64_t row = ((b * kv + (head - heads) % kv) * room + start + l) * dim;
        Expected* to = is_query   ? &wanted_queries[((b * length + l) * heads + head) * dim]
                     : is_value ? &wanted_values[row]
                                : &wanted_keys[row];
        const Floats& weight = is_query ? query_weight : key_weight;
        double squares = 0;
        for (int64_t i = 0; i < dim; i++) squares += double(x[i]) * x[i];
        double rms = std::sqrt(squares / double(dim) + 1e-6);
        auto number = [&](int64_t i) { return normed ? x[i] / rms * weight[i] : x[i]; };
        for (int64_t i = 0; i < dim; i++) {
          const float* cos = &table[((shared ? 0 : b) * length + l) * dim];
          int64_t j = i % (dim / 2);
          double other = i < dim / 2 ? -number(i + dim / 2) : number(j);
          to[i] = {};
          if (is_value) to[i].add(x[i]);
          else to[i].add(number(i) * cos[j]), to[i].add(other * cos[j + dim / 2]);
        }
      }
    }
  }
  split_heads(h, qkv.data(), queries.data(), keys.data(), values.data(), room, start);
  compare(queries, wanted_queries, 1e-6, text("split_heads queries", dim, normed));
  compare(keys, wanted_keys, 1e-6, text("split_heads keys", dim, normed));
  compare(values, wanted_values, 0, text("split_heads values", dim, normed));
}

void check_split_heads() {
  for (int dim : {2, 16, 20, 24, 64, 80, 128})
    for (bool normed : {false, true})
      for (bool shared : {false, true}) check_heads(dim, normed, shared);
}

}  // namespace
