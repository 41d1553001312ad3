// Attention without a matrix of [length x length]: FlashAttention (arXiv:2205.14135) for a CPU's caches.
//
// A task is a block of queries that share a key-value head: some positions, and all query heads of the group. It goes
// through keys and values in blocks of kKeys, and corrects the softmax's maximum and sum when larger scores appear. The
// products are the tiles of `matmul.h`, with the keys of a block transposed so that each lane is a key.
//
// From kManyRows positions on, a position gets the same numbers bit for bit, whatever others are processed with it: keys
// are cut into spans at fixed places.

#pragma once

#include <cmath>
#include <utility>
#include <vector>

#include "matmul.h"

namespace openelm {

// Keys or values [batch, heads, total, dim], plain or packed: a matrix for each head.
struct Past {
  Matrix matrix;  // of row 0 and head 0
  int64_t batch[3], head[3];  // strides in bytes, of data, scales and biases

  Matrix at(int64_t b, int64_t h) const {
    Matrix m = matrix;
    auto move = [&](const void*& pointer, int part) {
      if (pointer) pointer = static_cast<const char*>(pointer) + b * batch[part] + h * head[part];
    };
    move(m.data, 0), move(m.scales, 1), move(m.biases, 2);
    return m;
  }
};

struct Attention {
  int64_t batch, length, total, heads, kv, dim;  // rows, new positions, all positions, query and key-value heads
  const float* queries;       // [batch, length, heads, dim] with these strides
  int64_t query_strides[3];
  Past keys, values;
  float scale;
  bool causal;                // position l sees the first total - length + l + 1
  const float* mask;          // numbers to add [batch or 1, length, total], or null
  int64_t mask_stride;        // from one row of the batch to the next
  int64_t group() const { return heads / kv; }
  int64_t work() const { return batch * length * heads * total * dim; }  // multiplications with keys
  // Rows of tiles are padded to whole panels.
  int64_t width() const { return (dim + kPanel - 1) / kPanel * kPanel; }
  int64_t visible(int64_t end) const { return causal ? total - length + end : total; }
};

constexpr int64_t kKeys = 64;
constexpr int64_t kQueryRows = 64;
constexpr int64_t kFewQueries = 8;          // with fewer rows transposing the keys costs more than it saves
constexpr int64_t kSpan = 512;              // keys of a prompt in a part of a task
constexpr int64_t kTasks = 64;              // enough to keep all threads busy
constexpr int64_t kWorthAThread = 1 << 16;  // multiplications

// Queries (or another array of their shape) of positions [first, last) as rows (position, head of the group) of `width`
// floats, padded with zeros.
inline void gather(const Attention& a, const float* from, const int64_t* strides, int64_t b, int64_t kv, int64_t first,
                   int64_t last, float* to) {
  for (int64_t l = first; l < last; l++) {
    for (int64_t g = 0; g < a.group(); g++, to += a.width()) {
      std::memcpy(to, from + b * strides[0] + l * strides[1] + (kv * a.group() + g) * strides[2], a.dim * sizeof *to);
      std::memset(to + a.dim, 0, (a.width() - a.dim) * sizeof *to);
    }
  }
}

// Rows [first, first + count) of keys or values as floats, and the distance between them: in place if they can be used
// there, else copied to `memory`, padded to whole panels if `padded`.
INLINE const float* some_rows(const Matrix& m, int64_t first, int64_t count, int64_t width, bool padded, float* memory,
                              int64_t& stride) {
  if (!m.bits && m.type == Type::float32 && !(padded && width != m.columns)) {
    stride = m.stride;
    return m.values<float>(first);
  }
  stride = width;
  if (width != m.columns) std::memset(memory, 0, count * width * sizeof(float));
  open(m, first, count, 0, m.columns, memory, width);
  return memory;
}

// scores[row][key] = rows of a [rows, width] times rows of b [count, dim], for one block of keys. `length`, the number of
// new positions, decides how.
inline void block_products(const float* a, int64_t rows, int64_t length, const float* b, int64_t stride, int64_t count,
                           int64_t dim, int64_t width, float* turned, float* scores) {
  if (length < kManyRows && rows <= kFewQueries && dim % kLanes == 0) {
    int64_t key = 0;
    for (; key + kLanes <= count; key += kLanes) {
      for (int64_t r = 0; r < rows; r++) {
        Float totals[kLanes] = {};
        for (int64_t i = 0; i < dim; i += kLanes) {
          Float query = load(a + r * width + i);
          for (int k = 0; k < kLanes; k++) totals[k] += query * load(b + (key + k) * stride + i);
        }
        write(scores + r * kKeys + key, sums<kLanes>(totals));
      }
    }
    for (; key < count; key++) {
      for (int64_t r = 0; r < rows; r++) {
        Float total{};
        for (int64_t i = 0; i < dim; i += kLanes) total += load(a + r * width + i) * load(b + key * stride + i);
        scores[r * kKeys + key] = sum(total);
      }
    }
    return;
  }
  for (int64_t p = 0; p * kPanel < count; p++) {
    pack_panel(b + p * kPanel * stride, stride, count - p * kPanel, dim, turned);
    tiles(rows, dim, a, width, 1, turned, kPanel, scores + p * kPanel, kKeys, false);
  }
}

// Scales a block of scores and applies the mask: rows are (position, head), keys start at `key`.
inline void scale_and_hide(const Attention& a, int64_t b, int64_t position, int64_t rows, int64_t key, int64_t count,
                           float* scores) {
  for (int64_t r = 0; r < rows; r++, scores += kKeys) {
    int64_t l = position + r / a.group(), seen = a.visible(l + 1) - key;
    for (int i = 0; i < kKeys; i += kLanes) write(scores + i, load(scores + i) * a.scale);
    if (a.mask) {
      const float* mask = a.mask + b * a.mask_stride + l * a.total + key;
      for (int64_t i = 0; i < count; i++) scores[i] += mask[i];
    }
    for (int64_t i = seen < 0 ? 0 : seen < count ? seen : count; i < kKeys; i++) scores[i] = -INFINITY;
  }
}

// A task's result for the keys so far: for each row the largest score, the sum of weights relative to it, and the sum
// of weighted values [rows, width].
struct Partial {
  float* top;
  float* sum;
  float* mixed;

  static int64_t size(int64_t rows, int64_t width) { return rows * (width + 2); }
  static Partial in(float* memory, int64_t rows, int64_t width) {
    return {memory + rows * width, memory + rows * (width + 1), memory};
  }
};

// Keys [start, end) for the queries of positions [first, last).
inline void attend(const Attention& a, int64_t b, int64_t kv, int64_t first, int64_t last, int64_t start, int64_t end,
                   Partial to) {
  thread_local Scratch scratch;
  int64_t rows = (last - first) * a.group(), width = a.width();
  float* queries = scratch.get<float>(rows * (width + kKeys) + kKeys * width + kPanel * a.dim);
  float* scores = queries + rows * width;
  float* opened = scores + rows * kKeys;
  float* turned = opened + kKeys * width;
  gather(a, a.queries, a.query_strides, b, kv, first, last, queries);
  for (int64_t r = 0; r < rows; r++) to.top[r] = -INFINITY, to.sum[r] = 0;
  std::memset(to.mixed, 0, rows * width * sizeof(float));
  Matrix keys = a.keys.at(b, kv), values = a.values.at(b, kv);
  for (int64_t key = start; key < end; key += kKeys) {
    int64_t count = end - key < kKeys ? end - key : kKeys, stride;
    const float* block = some_rows(keys, key, count, width, false, opened, stride);
    block_products(queries, rows, a.length, block, stride, count, a.dim, width, turned, scores);
    scale_and_hide(a, b, first, rows, key, count, scores);
    for (int64_t r = 0; r < rows; r++) {
      float* row = scores + r * kKeys;
      Float top = spread(to.top[r]), total{};
      for (int i = 0; i < kKeys; i += kLanes) top = larger(top, load(row + i));
      float highest = largest(top);
      if (highest == -INFINITY) {  // nothing visible so far
        std::memset(row, 0, kKeys * sizeof(float));
        continue;
      }
      for (int i = 0; i < kKeys; i += kLanes) {
        Float weight = exp(load(row + i) - highest);
        total += weight;
        write(row + i, weight);
      }
      if (highest != to.top[r]) {
        float correction = std::exp(to.top[r] - highest);
        to.sum[r] *= correction;
        for (int64_t i = 0; i < width; i += kLanes) {
          float* mixed = to.mixed + r * width + i;
          write(mixed, load(mixed) * correction);
        }
        to.top[r] = highest;
      }
      to.sum[r] += sum(total);
    }
    block = some_rows(values, key, count, width, true, opened, stride);
    for (int64_t i = 0; i < width; i += kPanel)
      tiles(rows, count, scores, kKeys, 1, block + i, stride, to.mixed + i, width, true);
  }
}

// Writes finished rows: y [batch, length, heads, dim], and logsumexp of each row's scores [batch, heads, length].
inline void finish(const Attention& a, int64_t b, int64_t kv, int64_t first, int64_t last, Partial from, float* y,
                   float* sums) {
  for (int64_t l = first, r = 0; l < last; l++) {
    for (int64_t g = 0; g < a.group(); g++, r++) {
      int64_t head = kv * a.group() + g;
      float inverse = 1 / from.sum[r];
      for (int64_t i = 0; i < a.dim; i++)
        y[((b * a.length + l) * a.heads + head) * a.dim + i] = from.mixed[r * a.width() + i] * inverse;
      if (sums) sums[(b * a.heads + head) * a.length + l] = from.top[r] + std::log(from.sum[r]);
    }
  }
}

// Merges `other` into `to`, as if one task had processed the keys of both.
inline void join(Partial to, Partial other, int64_t rows, int64_t width) {
  for (int64_t r = 0; r < rows; r++) {
    if (other.sum[r] == 0) continue;
    float top = to.top[r] > other.top[r] ? to.top[r] : other.top[r];
    float mine = std::exp(to.top[r] - top), its = std::exp(other.top[r] - top);
    to.top[r] = top;
    to.sum[r] = to.sum[r] * mine + other.sum[r] * its;
    for (int64_t i = r * width; i < (r + 1) * width; i++) to.mixed[i] = to.mixed[i] * mine + other.mixed[i] * its;
  }
}

// How attention is cut into tasks: it follows from sizes alone, the same for any number of threads.
struct Plan {
  int64_t positions, blocks, tasks, rows;  // positions in a task, tasks of a head and in all, rows of a task
  int64_t parts = 1, span, size;           // parts of the past, keys in a part, floats of a part's results
  bool alone;                              // too little work for several threads
  bool apart;                              // whether a task's parts are tasks of their own

  explicit Plan(const Attention& a) {
    positions = kQueryRows / a.group() > 1 ? kQueryRows / a.group() : 1;
    positions = positions < a.length ? positions : a.length;
    blocks = (a.length + positions - 1) / positions, tasks = a.batch * a.kv * blocks;
    rows = positions * a.group();
    alone = a.work() < kWorthAThread;
    // Few queries with a long past: the past is split too, and the parts are merged.
    if (a.length >= kManyRows) {
      parts = (a.total + kSpan - 1) / kSpan, span = kSpan;
    } else {
      int64_t least = 2 * kKeys;
      if (!alone && tasks < kTasks) parts = (kTasks + tasks - 1) / tasks;
      if (parts > (a.total + least - 1) / least) parts = (a.total + least - 1) / least;
      span = ((a.total + parts - 1) / parts + kKeys - 1) / kKeys * kKeys;
    }
    apart = parts > 1 && !alone && tasks < kTasks;
    size = (Partial::size(rows, a.width()) + 15) / 16 * 16;
  }
};

// y = softmax(scale * queries keys^T + mask) values.
inline void attention(const Attention& a, float* y, float* sums) {
  thread_local Scratch scratch;
  Plan plan(a);
  int64_t positions = plan.positions, blocks = plan.blocks, tasks = plan.tasks, rows = plan.rows;
  int64_t parts = plan.parts, span = plan.span, size = plan.size;
  float* memory = plan.apart ? scratch.get<float>(tasks * parts * size) : nullptr;

  auto run = [&](int64_t task, int64_t part, float* memory) {
    int64_t first = task % blocks * positions, head = task / blocks;
    int64_t last = first + positions < a.length ? first + positions : a.length;
    Partial partial = Partial::in(memory, rows, a.width());
    int64_t start = part * span, end = a.visible(last) < start + span ? a.visible(last) : start + span;
    attend(a, head / a.kv, head % a.kv, first, last, start, end > start ? end : start, partial);
    return partial;
  };
  auto write_out = [&](int64_t task, Partial partial) {
    int64_t first = task % blocks * positions, head = task / blocks;
    int64_t last = first + positions < a.length ? first + positions : a.length;
    finish(a, head / a.kv, head % a.kv, first, last, partial, y, sums);
  };
  if (!plan.apart) {
    auto whole = [&](int64_t task) {
      thread_local Scratch own;
      float* results = own.get<float>(2 * size);
      Partial all = run(task, 0, results);
      for (int64_t part = 1; part < parts; part++) join(all, run(task, part, results + size), rows, a.width());
      write_out(task, all);
    };
    return for_ranges(tasks, plan.alone ? tasks : 1, [&](int64_t begin, int64_t end) {
      for (int64_t task = begin; task < end; task++) whole(task);
    });
  }
  Pool::shared().run(tasks * parts, [&](int64_t i) { run(i / parts, i % parts, memory + i * size); });
  for (int64_t task = 0; task < tasks; task++) {
    Partial all = Partial::in(memory + task * parts * size, rows, a.width());
    for (int64_t part = 1; part < parts; part++)
      join(all, Partial::in(memory + (task * parts + part) * size, rows, a.width()), rows, a.width());
    write_out(task, all);
  }
}

// The same for several sequences of one position each, whose sizes but `total` are the same; y [count, heads, dim].
inline void attention_of_each(const std::vector<Attention>& all, float* y) {
  thread_local Scratch scratch;
  struct Task {
    int64_t row, head, part;
  };
  std::vector<Task> tasks;
  std::vector<Plan> plans;
  int64_t work = 0;
  for (auto& a : all) {
    auto& plan = plans.emplace_back(a);
    work += a.work();
    for (int64_t head = 0; head < a.kv; head++)
      for (int64_t part = 0; part < plan.parts; part++) tasks.push_back({int64_t(plans.size()) - 1, head, part});
  }
  int64_t width = all[0].width(), rows = plans[0].rows, size = plans[0].size, count = tasks.size();
  float* memory = scratch.get<float>(count * size);
  auto partial = [&](int64_t task) { return Partial::in(memory + task * size, rows, width); };
  // The keys [first, second) of a task.
  auto keys_of = [&](const Task& task) {
    int64_t start = task.part * plans[task.row].span, end = start + plans[task.row].span;
    end = end < all[task.row].total ? end : all[task.row].total;
    return std::pair(start, end > start ? end : start);
  };
  // Each task's keys and values are somewhere else, and too few for the processor to see a pattern.
  auto prefetch = [&](const Task& task) {
    auto [start, end] = keys_of(task);
    for (auto* past : {&all[task.row].keys, &all[task.row].values}) {
      Matrix m = past->at(0, task.head);
      auto *line = m.row(start), *last = m.row(end < start + kKeys ? end : start + kKeys);
      for (; line < last; line += 64) __builtin_prefetch(line, 0, 2);
    }
  };
  for_ranges(count, work < kWorthAThread ? count : 1, [&](int64_t begin, int64_t end) {
    prefetch(tasks[begin]);
    for (int64_t i = begin; i < end; i++) {
      auto [start, last] = keys_of(tasks[i]);
      if (i + 1 < end) prefetch(tasks[i + 1]);
      attend(all[tasks[i].row], 0, tasks[i].head, 0, 1, start, last, partial(i));
    }
  });
  for (int64_t i = 0; i < count;) {
    auto [row, head, part] = tasks[i];
    Partial whole = partial(i++);
    for (; i < count && tasks[i].part; i++) join(whole, partial(i), rows, width);
    finish(all[row], 0, head, 0, 1, whole, y + row * all[row].heads * all[row].dim, nullptr);
  }
}

// The gradients of queries [batch, length, heads, dim], and of keys and values [batch, kv, total, dim], from the output
// y and its gradient dy [batch, length, heads, dim], and the rows' logsumexp. Weights are recomputed, block by block.
inline void attention_gradient(const Attention& a, const float* y, const float* dy, const float* sums, float* dqueries,
                               float* dkeys, float* dvalues) {
  int64_t positions = kQueryRows / a.group() > 1 ? kQueryRows / a.group() : 1;
  int64_t most = positions * a.group(), width = a.width();
  int64_t strides[3] = {a.length * a.heads * a.dim, a.heads * a.dim, a.dim};
  Pool::shared().run(a.batch * a.kv, [&](int64_t task) {
    int64_t b = task / a.kv, kv = task % a.kv;
    thread_local Scratch scratch;
    float* next = scratch.get<float>(2 * a.total * width + most * (4 * width + 2 * kKeys + 1) + 2 * kKeys * width +
                                     kPanel * a.dim);
    auto take = [&](int64_t count) { return std::exchange(next, next + count); };
    float *by_keys = take(a.total * width), *by_values = take(a.total * width);
    float *queries = take(most * width), *outputs = take(most * width), *wanted = take(most * width);
    float *by_queries = take(most * width), *weights = take(most * kKeys), *slopes = take(most * kKeys);
    float *opened = take(kKeys * width), *opened_values = take(kKeys * width), *turned = take(kPanel * a.dim);
    float* shift = take(most);
    std::memset(by_keys, 0, 2 * a.total * width * sizeof(float));
    Matrix keys = a.keys.at(b, kv), values = a.values.at(b, kv);
    for (int64_t first = 0; first < a.length; first += positions) {
      int64_t last = first + positions < a.length ? first + positions : a.length;
      int64_t rows = (last - first) * a.group();
      gather(a, a.queries, a.query_strides, b, kv, first, last, queries);
      gather(a, y, strides, b, kv, first, last, outputs);
      gather(a, dy, strides, b, kv, first, last, wanted);
      // The part of the gradient that comes from the softmax's denominator: the same for a whole row.
      for (int64_t r = 0; r < rows; r++) {
        Float total{};
        for (int64_t i = r * width; i < (r + 1) * width; i += kLanes) total += load(outputs + i) * load(wanted + i);
        shift[r] = sum(total);
      }
      std::memset(by_queries, 0, rows * width * sizeof(float));
      for (int64_t key = 0; key < a.visible(last); key += kKeys) {
        int64_t end = a.visible(last), count = end - key < kKeys ? end - key : kKeys, stride, values_stride;
        const float* k = some_rows(keys, key, count, width, true, opened, stride);
        const float* v = some_rows(values, key, count, width, false, opened_values, values_stride);
        block_products(queries, rows, a.length, k, stride, count, a.dim, width, turned, weights);
        scale_and_hide(a, b, first, rows, key, count, weights);
        block_products(wanted, rows, a.length, v, values_stride, count, a.dim, width, turned, slopes);
        for (int64_t r = 0; r < rows; r++) {
          int64_t head = kv * a.group() + r % a.group(), l = first + r / a.group();
          float logsum = sums[(b * a.heads + head) * a.length + l];
          for (int64_t i = r * kKeys; i < (r + 1) * kKeys; i += kLanes) {
            Float weight = exp(load(weights + i) - logsum);
            write(weights + i, weight);
            write(slopes + i, weight * (load(slopes + i) - shift[r]) * a.scale);
          }
        }
        for (int64_t i = 0; i < width; i += kPanel) {
          tiles(count, rows, weights, 1, kKeys, wanted + i, width, by_values + key * width + i, width, true);
          tiles(count, rows, slopes, 1, kKeys, queries + i, width, by_keys + key * width + i, width, true);
          tiles(rows, count, slopes, kKeys, 1, k + i, stride, by_queries + i, width, true);
        }
      }
      for (int64_t r = 0; r < rows; r++)
        std::memcpy(dqueries + b * strides[0] + (first + r / a.group()) * strides[1] +
                        (kv * a.group() + r % a.group()) * strides[2],
                    by_queries + r * width, a.dim * sizeof(float));
    }
    for (int64_t t = 0; t < a.total; t++) {
      int64_t at = ((b * a.kv + kv) * a.total + t) * a.dim;
      std::memcpy(dkeys + at, by_keys + t * width, a.dim * sizeof(float));
      std::memcpy(dvalues + at, by_values + t * width, a.dim * sizeof(float));
    }
  });
}

}  // namespace openelm
