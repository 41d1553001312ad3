// The kernels as MLX operations: lazy, on the CPU stream, with gradients.

#pragma once

#include <optional>
#include <utility>
#include <vector>

#include "mlx/mlx.h"
#include "mlx/primitives.h"

namespace openelm {

namespace mx = mlx::core;
using Optional = std::optional<mx::array>;

// How a weight matrix is packed; bits 0 for plain values. `round`: products of few rows may round x to 8 bits.
struct Packing {
  int bits = 0, group = 0;
  bool round = false;
};

// A weight matrix [out, in] as stored.
struct Projection {
  mx::array weight;
  Optional scales, biases;  // of a packed one
  Packing packing;
};

// x [..., in] times a matrix [out, in] transposed: [..., out], of x's type.
mx::array product(const mx::array& x, const Projection& projection);

// Rows of a packed embedding [vocab, dim] for tokens [...], which are integers: [..., dim].
mx::array lookup(const mx::array& tokens, const Projection& embedding);

// x [..., n] minus logsumexp(x): float32.
mx::array log_softmax(const mx::array& x);

// x [..., dim] over its root mean square, times weight [dim].
mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps);

// silu(gate) * up for x [..., 2 * inner], gate first.
mx::array swiglu(const mx::array& x);

// Projections qkv [batch * length, (queries + 2 kv) * dim] to queries [batch, length, queries, dim] and keys and values
// [batch, kv, length, dim], queries and keys normalized (with weights [dim], if given) and rotated by
// table [1 or batch, length, dim]: cosines, then sines, of each position's angles.
//
// With buffers [batch, kv, room, dim], keys and values are written there from position `start` on, and the buffers
// returned: in place if nothing else references them.
std::vector<mx::array> split_heads(const mx::array& qkv, const mx::array& table, const Optional& query_weight,
                                   const Optional& key_weight, const Optional& keys, const Optional& values,
                                   int queries, int kv, float eps, int start);

// The options of attention.
struct AttentionOptions {
  float scale;
  bool causal;      // a position sees those up to itself, the last `length` being the new ones
  int total;        // positions of keys and values in use, out of `room`
  Packing packing;  // of keys and values
  int parts() const { return packing.bits ? 3 : 1; }
};

// Attention of queries [batch, length, heads, dim] to keys and values [batch, kv, room, dim], each an array, or
// (packed, scales, biases). mask: numbers to add to scores, [length, total] or [batch or 1, 1, length, total].
//
// Returns the mixed values [batch * length, heads * dim], and logsumexp of each query's scores [batch, heads, length].
std::vector<mx::array> attention(const mx::array& queries, const std::vector<mx::array>& keys,
                                 const std::vector<mx::array>& values, const Optional& mask, AttentionOptions options);

// The gradients of queries, keys and values, which are float32, from the results of `attention` and the gradient of the
// mixed values; `total` must equal `room`.
std::vector<mx::array> attention_gradient(const mx::array& queries, const mx::array& keys, const mx::array& values,
                                          const mx::array& mixed, const mx::array& sums, const mx::array& gradient,
                                          const Optional& mask, AttentionOptions options);

// A whole transformer layer for x [batch * length, ..., dim] of float32: its output, and the buffers. Table,
// buffers and `start` are as for `split_heads`; a position sees all before it. norms: the weights of the norms of
// attention and feed-forward, and then of queries and keys, if there are any. projections: qkv_proj, out_proj, proj_1
// (gate first) and proj_2.
std::vector<mx::array> layer(const mx::array& x, const mx::array& table, const mx::array& keys, const mx::array& values,
                             int start, int queries, int kv, float eps, float scale,
                             const std::vector<mx::array>& norms, const std::vector<Projection>& projections);

// The sequences of a decoding step: each one's buffers [1, kv, room, dim], which its new keys and values are written
// into, its first new position, and how many there are; and arrays to be computed before, such as earlier steps.
//
// The step has a row for each new position, N in all; each sees the positions before it in its own sequence. The buffers
// are written in place although they are inputs: the caller must own them, with no other references to them.
struct StepRows {
  std::vector<mx::array> keys, values;
  std::vector<int> starts, lengths;
  std::vector<mx::array> after;
  StepRows without_arrays() const { return {{}, {}, starts, lengths, {}}; }
};

// Attention of a step for projections qkv [N, ..., (queries + 2 kv) * dim]: [N, ..., queries * dim]. table [N, 1, dim]
// is as for `split_heads`; norms are none, or the weights of those of queries and keys.
mx::array step_attention(const mx::array& qkv, const mx::array& table, const StepRows& rows, int queries, int kv,
                         float eps, float scale, const std::vector<mx::array>& norms);

// A whole layer of a step for x [N, ..., dim]; norms and projections are as for `layer`.
mx::array step_layer(const mx::array& x, const mx::array& table, const StepRows& rows, int queries, int kv, float eps,
                     float scale, const std::vector<mx::array>& norms, const std::vector<Projection>& projections);

}  // namespace openelm
