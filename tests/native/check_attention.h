// Checks of `attention.h`.

#pragma once

#include <functional>

#include "attention.h"
#include "checking.h"

namespace {

struct Sizes {
  int64_t batch, length, total, heads, kv, dim;
};
enum Hiding { nothing, causal, masked, masked_and_causal };

// Random queries, keys and values, and the kernel's arguments.
struct Problem {
  Floats queries, mask;
  Stored keys, values;
  Attention a;

  Problem(Sizes s, Kind kind, Hiding hiding, bool heads_first = false)
      : queries(random_floats(s.batch * s.length * s.heads * s.dim, 3)),
        keys(kind, s.batch * s.kv * (s.total + kRoom) - kRoom, s.dim),
        values(kind, s.batch * s.kv * (s.total + kRoom) - kRoom, s.dim) {
    bool is_causal = hiding == causal || hiding == masked_and_causal;
    // Packed values grow with their levels; scores in the hundreds would make float softmax too inaccurate to compare.
    auto scale = float(1 / std::sqrt(s.dim) / (1 << kind.bits));
    a = {s.batch, s.length, s.total, s.heads, s.kv, s.dim, queries.data(), {s.length * s.heads * s.dim, s.heads * s.dim,
         s.dim}, past(keys, s), past(values, s), scale, is_causal, nullptr, 0};
    if (heads_first) a.query_strides[1] = s.dim, a.query_strides[2] = s.length * s.dim;
    if (hiding < masked) return;
    // One mask for the whole batch, or one per row.
    int64_t masks = s.dim % 3 ? s.batch : 1;
    mask = random_floats(masks * s.length * s.total);
    for (auto& number : mask) number = number < -0.5 ? -INFINITY : number;
    for (int64_t i = 0; i < masks * s.length; i++) mask[i * s.total] = 0;  // so that every query sees something
    a.mask = mask.data(), a.mask_stride = masks == 1 ? 0 : s.length * s.total;
  }

  static constexpr int64_t kRoom = 3;  // unused positions of a buffer

  static Past past(const Stored& stored, Sizes s) {
    Past p{stored.matrix, {}, {}};
    int64_t rows = s.total + kRoom, groups = stored.kind.bits ? s.dim / stored.kind.group : 0;
    int64_t size = stored.kind.type == Type::float32 ? 4 : 2;
    p.matrix.rows = s.total;
    p.head[0] = rows * stored.matrix.row_bytes(), p.head[1] = p.head[2] = rows * groups * size;
    for (int i = 0; i < 3; i++) p.batch[i] = s.kv * p.head[i];
    return p;
  }

  const double* row(const Stored& stored, int64_t b, int64_t head, int64_t t) const {
    return &stored.values[((b * a.kv + head / a.group()) * (a.total + kRoom) + t) * a.dim];
  }
  const float* query(int64_t b, int64_t l, int64_t head) const {
    return &queries[b * a.query_strides[0] + l * a.query_strides[1] + head * a.query_strides[2]];
  }
  // The softmax weights of one query, and the log-sum-exp of its scores.
  Doubles weights(int64_t b, int64_t l, int64_t head, double& logsum) const {
    Doubles w(a.total);
    double top = -INFINITY, total = 0;
    for (int64_t t = 0; t < a.total; t++) {
      for (int64_t i = 0; i < a.dim; i++) w[t] += double(query(b, l, head)[i]) * row(keys, b, head, t)[i] * a.scale;
      if (a.mask) w[t] += a.mask[b * a.mask_stride + l * a.total + t];
      if (a.causal && t > a.total - a.length + l) w[t] = -INFINITY;
      top = std::max(top, w[t]);
    }
    for (double& weight : w) total += weight = std::exp(weight - top);
    for (double& weight : w) weight /= total;
    logsum = top + std::log(total);
    return w;
  }

  void for_queries(const std::function<void(int64_t, int64_t, int64_t)>& body) const {
    for (int64_t b = 0; b < a.batch; b++)
      for (int64_t l = 0; l < a.length; l++)
        for (int64_t head = 0; head < a.heads; head++) body(b, l, head);
  }
};

void check_attention_of(Sizes s, Kind kind, Hiding hiding, bool heads_first = false) {
  Problem p(s, kind, hiding, heads_first);
  if (hiding == masked) std::fill_n(p.mask.begin(), s.total, -INFINITY);  // a query that sees nothing
  ExpectedNumbers y(p.queries.size()), sums(s.batch * s.heads * s.length);
  p.for_queries([&](int64_t b, int64_t l, int64_t head) {
    double logsum;
    Doubles weights = p.weights(b, l, head, logsum);
    // A query that sees nothing: NaN weights, and the logarithm of zero.
    Expected& sum = sums[(b * s.heads + head) * s.length + l];
    bool blind = std::isnan(logsum);
    sum = blind ? Expected{-INFINITY, 0} : Expected{logsum, std::abs(logsum) + 8};
    for (int64_t i = 0; i < s.dim; i++) {
      Expected& to = y[((b * s.length + l) * s.heads + head) * s.dim + i];
      for (int64_t t = 0; t < s.total; t++) to.add(weights[t] * p.row(p.values, b, head, t)[i]);
    }
  });
  std::string what = text("attention", kind.name(), "length", s.length, "total", s.total, "heads", s.heads, s.kv, "dim",
                          s.dim, "hiding", hiding, "threads", Pool::shared().threads());
  Floats got(y.size()), got_sums(sums.size());
  attention(p.a, got.data(), got_sums.data());
  // Scores of a few units have errors of about 1e-6, which become relative errors of the weights.
  compare(got, y, 5e-6, what);
  compare(got_sums, sums, 1e-6, what + "logsumexp ");
  attention(p.a, got.data(), nullptr);
  compare(got, y, 5e-6, what + "without logsumexp ");
}

constexpr Hiding kHidings[] = {nothing, causal, masked, masked_and_causal};

void check_attention() {
  for (int threads : {1, 4}) {
    Pool::shared().set_threads(threads);
    for (int dim : {16, 24, 64, 80, 128}) {
      for (Hiding hiding : kHidings) {
        check_attention_of({2, 1, 1, 4, 2, dim}, {}, hiding);
        check_attention_of({2, 1, 70, 4, 2, dim}, {}, hiding);
        check_attention_of({1, 1, 300, 8, 2, dim}, {}, hiding);
        check_attention_of({1, 3, 5, 3, 3, dim}, {}, hiding, true);
        check_attention_of({2, 5, 130, 4, 1, dim}, {}, hiding, true);
        check_attention_of({1, 70, 70, 4, 2, dim}, {}, hiding);
        for (Type type : {Type::bfloat16, Type::float16}) {
          check_attention_of({2, 1, 70, 4, 2, dim}, {type}, hiding);
          check_attention_of({1, 20, 70, 4, 2, dim}, {type}, hiding);
        }
      }
      check_attention_of({1, 1, 1500, 4, 1, dim}, {}, nothing);
      check_attention_of({1, 2, 1000, 4, 1, dim}, {}, causal);
    }
    check_attention_of({1, 65, 200, 4, 1, 64}, {}, causal);
    check_attention_of({1, 3, 10, 100, 1, 16}, {}, causal);  // a group larger than a block of queries
    check_attention_of({1, 40, 200, 4, 4, 64}, {}, masked);
    for (Type type : kTypes) {
      for (int bits : kBits) {
        for (int group : {32, 64, 128}) {
          Kind kind{type, bits, group};
          check_attention_of({2, 1, 70, 4, 2, 128}, kind, nothing);
          check_attention_of({1, 9, 70, 4, 2, 128}, kind, causal);
          if (group == 32) check_attention_of({1, 9, 70, 3, 3, 96}, kind, masked);
        }
        check_attention_of({1, 1, 700, 4, 1, 64}, {type, bits, 64}, nothing);
      }
    }
  }
  Pool::shared().set_threads(1);
}

// Gradients of sum(y * dy): dy . value for a weight, and weight * (that - its average) for a score.
void check_gradient_of(Sizes s, Kind kind, Hiding hiding) {
  Problem p(s, kind, hiding);
  Floats dy = random_floats(p.queries.size());
  ExpectedNumbers dq(dy.size()), dk(s.batch * s.kv * s.total * s.dim), dv(dk.size());
  p.for_queries([&](int64_t b, int64_t l, int64_t head) {
    double logsum, average = 0;
    int64_t at = ((b * s.length + l) * s.heads + head) * s.dim, kv = head / p.a.group();
    Doubles weights = p.weights(b, l, head, logsum), slopes(s.total);
    for (int64_t t = 0; t < s.total; t++) {
      for (int64_t i = 0; i < s.dim; i++) slopes[t] += dy[at + i] * p.row(p.values, b, head, t)[i];
      average += weights[t] * slopes[t];
    }
    for (int64_t t = 0; t < s.total; t++) {
      double slope = weights[t] * (slopes[t] - average) * p.a.scale;
      double size = weights[t] * (std::abs(slopes[t]) + std::abs(average) + 1) * p.a.scale;
      for (int64_t i = 0; i < s.dim; i++) {
        int64_t to = ((b * s.kv + kv) * s.total + t) * s.dim + i;
        double key = p.row(p.keys, b, head, t)[i], query = p.query(b, l, head)[i];
        dv[to].add(weights[t] * dy[at + i]);
        dk[to].value += slope * query, dk[to].size += size * std::abs(query);
        dq[at + i].value += slope * key, dq[at + i].size += size * std::abs(key);
      }
    }
  });
  Floats y(dy.size()), sums(s.batch * s.heads * s.length), got_dq(dq.size()), got_dk(dk.size()), got_dv(dv.size());
  attention(p.a, y.data(), sums.data());
  attention_gradient(p.a, y.data(), dy.data(), sums.data(), got_dq.data(), got_dk.data(), got_dv.data());
  std::string what = text("attention_gradient", kind.name(), "length", s.length, "total", s.total, "heads", s.heads,
                          s.kv, "dim", s.dim, "hiding", hiding);
  compare(got_dq, dq, 5e-6, what + "queries ");
  compare(got_dk, dk, 5e-6, what + "keys ");
  compare(got_dv, dv, 5e-6, what + "values ");
}

void check_attention_gradient() {
  for (int dim : {16, 24, 64, 80, 128}) {
    for (Hiding hiding : kHidings) {
      check_gradient_of({2, 1, 1, 4, 2, dim}, {}, hiding);
      check_gradient_of({1, 2, 70, 4, 2, dim}, {}, hiding);
      check_gradient_of({2, 20, 20, 3, 3, dim}, {}, hiding);
      check_gradient_of({1, 70, 70, 4, 2, dim}, {}, hiding);
      check_gradient_of({1, 9, 70, 4, 1, dim}, {Type::bfloat16}, hiding);
    }
  }
}

}  // namespace
