// A whole transformer layer as one MLX operation.
//
// A token of a small model takes milliseconds, so overhead matters: each operation costs MLX and Python about ten
// microseconds, on a thread that competes with those that multiply.

#include "attention.h"
#include "elementwise.h"
#include "kernel.h"

namespace openelm {

namespace {

struct LayerOptions {
  int queries, kv, start, norms;
  float eps, scale;
  Packing packings[4];
};

// Inputs: x, table, keys, values; norms; projections.
constexpr size_t kNorms = 4;

std::vector<Projection> projections_of(const Arrays& in, const LayerOptions& o) {
  std::vector<Projection> all;
  size_t next = kNorms + o.norms;
  for (Packing packing : o.packings) {
    all.push_back(projection_at(in, next, packing));
    next += packing.bits ? 3 : 1;
  }
  return all;
}

// The same in separate operations, which have gradients.
Arrays layer_in_steps(const Arrays& in, const LayerOptions& o) {
  auto projections = projections_of(in, o);
  auto norm = [&](int i) { return i < o.norms ? Optional(in[kNorms + i]) : Optional(); };
  auto qkv = product(rms_norm(in[0], *norm(0), o.eps), projections[0]);
  auto heads = split_heads(qkv, in[1], norm(2), norm(3), in[2], in[3], o.queries, o.kv, o.eps, o.start);
  AttentionOptions options{o.scale, true, o.start + in[1].shape(1), {}};
  auto mixed = attention(heads[0], {heads[1]}, {heads[2]}, {}, options)[0];
  auto x = mx::add(in[0], product(mixed, projections[1]), cpu_stream());
  auto gated = swiglu(product(rms_norm(x, *norm(1), o.eps), projections[2]));
  return {mx::add(x, product(gated, projections[3]), cpu_stream()), heads[1], heads[2]};
}

class Layer : public Kernel {
 public:
  Layer(mx::Stream stream, const LayerOptions& options)
      : Kernel(stream, [=](const Arrays& in) { return layer_in_steps(in, options); }), o_(options) {}

  const char* name() const override { return "Layer"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    forget_inputs(inputs, outputs);
    auto x = dense(inputs[0]), table = dense(inputs[1]);
    for (int i : {1, 2}) append_to(inputs[i + 1], outputs[i]);
    auto projections = projections_of(inputs, o_);
    auto qkv = matrix(projections[0]), out = matrix(projections[1]), gate_and_up = matrix(projections[2]),
         down = matrix(projections[3]);
    auto norm = [&](int i) { return i < o_.norms ? dense(inputs[kNorms + i]).data<float>() : nullptr; };

    int64_t batch = outputs[1].shape(0), length = table.shape(1), rows = batch * length, dim = x.shape(1);
    Heads h{batch, length, o_.queries, o_.kv, table.shape(2), o_.eps, norm(2), norm(3), table.data<float>()};
    int64_t mixed = h.queries * h.dim;
    Attention a{batch, length, o_.start + length, h.queries, h.kv, h.dim, nullptr, {length * mixed, mixed, h.dim}};
    a.keys = past(outputs[1]), a.values = past(outputs[2]), a.scale = o_.scale, a.causal = true;
    dispatch([=, o = o_, from = x.data<float>(), norm = norm(0), ffn_norm = norm(1),
              room = int64_t(outputs[1].shape(2)), keys = outputs[1].data<float>(), values = outputs[2].data<float>(),
              y = allocate(outputs[0])]() mutable {
      int64_t wide = std::max(qkv.rows, gate_and_up.rows), narrow = std::max(mixed, down.columns);
      thread_local Scratch scratch;
      float* normed = scratch.get<float>(rows * (dim + wide + narrow + mixed));
      float *projected = normed + rows * dim, *joined = projected + rows * wide, *queries = joined + rows * narrow;

      rms_norm(from, norm, rows, dim, h.eps, normed);
      std::memset(projected, 0, rows * qkv.rows * sizeof(float));
      multiply(qkv, normed, rows, projected, o.packings[0].round);
      split_heads(h, projected, queries, keys, values, room, o.start);
      a.queries = queries;
      attention(a, joined, nullptr);
      std::memcpy(y, from, rows * dim * sizeof(float));
      multiply(out, joined, rows, y, o.packings[1].round);

      rms_norm(y, ffn_norm, rows, dim, h.eps, normed);
      std::memset(projected, 0, rows * gate_and_up.rows * sizeof(float));
      multiply(gate_and_up, normed, rows, projected, o.packings[2].round);
      swiglu(projected, rows, down.columns, joined);
      multiply(down, joined, rows, y, o.packings[3].round);
    });
  }

 private:
  // A buffer [batch, kv, room, dim] in the form that attention takes.
  static Past past(const mx::array& buffer) {
    Matrix m = as_matrix({buffer, {}, {}, {}});
    int64_t head = m.rows * m.row_bytes();
    return {m, {buffer.shape(1) * head}, {head}};
  }

  LayerOptions o_;
};

}  // namespace

std::vector<mx::array> layer(const mx::array& x, const mx::array& table, const mx::array& keys, const mx::array& values,
                             int start, int queries, int kv, float eps, float scale,
                             const std::vector<mx::array>& norms, const std::vector<Projection>& projections) {
  require(x.ndim() == 2 && table.ndim() == 3 && keys.ndim() == 4 && keys.shape() == values.shape(),
          "a layer takes x of two dimensions, a table of three, and two buffers of four.");
  int dim = x.shape(1), batch = keys.shape(0), length = table.shape(1), head_dim = table.shape(2);
  require(queries > 0 && kv > 0 && queries % kv == 0 && keys.shape(1) == kv && keys.shape(3) == head_dim &&
              head_dim > 0 && head_dim % 2 == 0 && batch > 0 && length > 0 && x.shape(0) == batch * length &&
              table.shape(0) == 1 && start >= 0 && start + length <= keys.shape(2),
          "heads, positions and buffers do not fit.");
  require((norms.size() == 2 || norms.size() == 4) && projections.size() == 4,
          "a layer has two or four norms and four projections.");
  Arrays inputs = {x, table, keys, values};
  for (size_t i = 0; i < norms.size(); i++) {
    require(norms[i].shape() == mx::Shape{i < 2 ? dim : head_dim}, "a norm does not fit.");
    inputs.push_back(as_float(norms[i]));
  }
  for (auto& a : inputs) require(a.dtype() == mx::float32, "a layer's activations and buffers are float32.");
  LayerOptions options{queries, kv, start, int(norms.size()), eps, scale, {}};
  int64_t inner = projections[2].weight.shape(0) / 2, mixed = queries * head_dim;
  int64_t shapes[4][2] = {{mixed + 2 * kv * head_dim, dim}, {dim, mixed}, {2 * inner, dim}, {dim, inner}};
  for (int i = 0; i < 4; i++) {
    bool fits = add_projection(projections[i], inputs) == shapes[i][1] && shapes[i][0] * shapes[i][1] > 0;
    require(fits && projections[i].weight.shape(0) == shapes[i][0], "a projection does not fit.");
    options.packings[i] = projections[i].packing;
  }
  return mx::array::make_arrays({x.shape(), keys.shape(), keys.shape()}, {mx::float32, mx::float32, mx::float32},
                                std::make_shared<Layer>(cpu_stream(), options), inputs);
}

}  // namespace openelm
