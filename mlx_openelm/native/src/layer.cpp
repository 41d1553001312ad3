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
  auto as_x = [&](const mx::array& a) {
    auto shape = in[0].shape();
    shape.back() = a.shape(-1);
    return mx::reshape(a, shape, cpu_stream());
  };
  auto heads = split_heads(qkv, in[1], norm(2), norm(3), in[2], in[3], o.queries, o.kv, o.eps, o.start);
  AttentionOptions options{o.scale, true, o.start + in[1].shape(1), {}};
  auto mixed = attention(heads[0], {heads[1]}, {heads[2]}, {}, options)[0];
  auto x = mx::add(in[0], product(as_x(mixed), projections[1]), cpu_stream());
  auto gated = swiglu(product(rms_norm(x, *norm(1), o.eps), projections[2]));
  return {mx::add(x, product(gated, projections[3]), cpu_stream()), heads[1], heads[2]};
}

// A layer's weights, and what it does around attention.
struct LayerParts {
  Matrix qkv, out, gate_and_up, down;
  const float *norm, *ffn_norm;
  float eps;
  Packing packings[4];

  // y = the layer of x [rows, dim]; `attend` maps projections to the mixed values [rows, out.columns], with `queries`
  // as memory of that size. `length`: of each sequence.
  template <class Attend>
  void run(const float* x, int64_t rows, int64_t length, float* y, Attend&& attend) {
    int64_t dim = out.rows, wide = std::max(qkv.rows, gate_and_up.rows), narrow = std::max(out.columns, down.columns);
    thread_local Scratch scratch;
    qkv.following = out.data, out.following = gate_and_up.data, gate_and_up.following = down.data;
    float* normed = scratch.get<float>(rows * (dim + wide + narrow + out.columns));
    float *projected = normed + rows * dim, *joined = projected + rows * wide, *queries = joined + rows * narrow;

    rms_norm(x, norm, rows, dim, eps, normed);
    std::memset(projected, 0, rows * qkv.rows * sizeof(float));
    multiply(qkv, normed, rows, length, projected, packings[0].round);
    attend(projected, queries, joined);
    std::memcpy(y, x, rows * dim * sizeof(float));
    multiply(out, joined, rows, length, y, packings[1].round);

    rms_norm(y, ffn_norm, rows, dim, eps, normed);
    std::memset(projected, 0, rows * gate_and_up.rows * sizeof(float));
    multiply(gate_and_up, normed, rows, length, projected, packings[2].round);
    swiglu(projected, rows, down.columns, joined);
    multiply(down, joined, rows, length, y, packings[3].round);
  }
};

// A buffer [batch, kv, room, dim] in the form that attention takes.
Past past(const mx::array& buffer) {
  Matrix m = as_matrix({buffer, {}, {}, {}});
  int64_t head = m.rows * m.row_bytes();
  return {m, {buffer.shape(1) * head}, {head}};
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
    auto norm = [&](int i) { return i < o_.norms ? dense(inputs[kNorms + i]).data<float>() : nullptr; };
    LayerParts parts{matrix(projections[0]), matrix(projections[1]), matrix(projections[2]), matrix(projections[3]),
                     norm(0), norm(1), o_.eps, {}};
    std::copy_n(o_.packings, 4, parts.packings);

    int64_t batch = outputs[1].shape(0), length = table.shape(1);
    Heads h{batch, length, o_.queries, o_.kv, table.shape(2), o_.eps, norm(2), norm(3), table.data<float>(), 0};
    int64_t mixed = h.queries * h.dim;
    Attention a{batch, length, o_.start + length, h.queries, h.kv, h.dim, nullptr, {length * mixed, mixed, h.dim}};
    a.keys = past(outputs[1]), a.values = past(outputs[2]), a.scale = o_.scale, a.causal = true;
    dispatch([=, start = o_.start, from = x.data<float>(), room = int64_t(outputs[1].shape(2)),
              keys = outputs[1].data<float>(), values = outputs[2].data<float>(),
              y = allocate(outputs[0])]() mutable {
      parts.run(from, batch * length, length, y, [&](const float* projected, float* queries, float* joined) {
        split_heads(h, projected, queries, keys, values, room, start);
        a.queries = queries;
        attention(a, joined, nullptr);
      });
    });
  }

 private:
  LayerOptions o_;
};

// Inputs: x or projections, table; key buffers, value buffers; then the norms of heads if there are any and only
// attention is computed, else all norms and the projections; then arrays that must be computed before.
class Step : public Kernel {
 public:
  Step(mx::Stream stream, const LayerOptions& options, const StepRows& rows, bool whole)
      : Kernel(stream, [](const Arrays&) -> Arrays { throw std::runtime_error(kNoGradient); }),
        o_(options),
        rows_(rows),
        whole_(whole) {}

  const char* name() const override { return "Step"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto x = dense(inputs[0]), table = dense(inputs[1]);
    size_t count = rows_.starts.size(), next = 2 + 2 * count;
    std::vector<const float*> norms;
    for (int i = 0; i < o_.norms; i++) norms.push_back(dense(inputs[next++]).data<float>());
    const float* const* of_heads = norms.data() + (whole_ ? 2 : 0);
    bool has_norms = o_.norms > (whole_ ? 2 : 0);
    int64_t dim = table.shape(2), mixed = o_.queries * dim;
    Heads h{int64_t(table.shape(0)), 1, o_.queries, o_.kv, dim, o_.eps, has_norms ? of_heads[0] : nullptr,
            has_norms ? of_heads[1] : nullptr, table.data<float>(), dim};
    std::vector<Attention> all;
    std::vector<Place> places;
    for (size_t i = 0; i < count; i++) {
      // In place: the caller owns the buffers (see `step_attention`).
      auto &keys = inputs[2 + i], &values = inputs[2 + count + i];
      require(keys.flags().row_contiguous && values.flags().row_contiguous, "a step's buffers are contiguous.");
      Attention a{1, 1, 0, h.queries, h.kv, dim, nullptr, {mixed, mixed, dim}};
      a.keys = past(keys), a.values = past(values), a.scale = o_.scale;
      int64_t room = keys.shape(2);
      for (int l = 0; l < rows_.lengths[i]; l++) {
        a.total = rows_.starts[i] + l + 1;
        all.push_back(a);
        int64_t at = (a.total - 1) * dim;
        places.push_back({const_cast<float*>(keys.data<float>()) + at, const_cast<float*>(values.data<float>()) + at,
                          room * dim});
      }
    }
    auto attend = [h, all, places, mixed](const float* projected, float* queries, float* joined) mutable {
      split_heads(h, projected, queries, [&](int64_t r) { return places[r]; });
      for (size_t r = 0; r < all.size(); r++) all[r].queries = queries + r * mixed;
      attention_of_each(all, joined);
    };
    if (!whole_) {
      dispatch([=, from = x.data<float>(), y = allocate(outputs[0])]() mutable {
        thread_local Scratch scratch;
        attend(from, scratch.get<float>(h.batch * mixed), y);
      });
      return;
    }
    Matrix matrices[4];
    for (int i = 0; i < 4; i++) {
      matrices[i] = matrix(projection_at(inputs, next, o_.packings[i]));
      next += o_.packings[i].bits ? 3 : 1;
    }
    LayerParts parts{matrices[0], matrices[1], matrices[2], matrices[3], norms[0], norms[1], o_.eps, {}};
    std::copy_n(o_.packings, 4, parts.packings);
    dispatch([=, from = x.data<float>(), y = allocate(outputs[0])]() mutable {
      parts.run(from, h.batch, 1, y, attend);
    });
  }

 private:
  static constexpr const char* kNoGradient = "mlx_openelm.native: a step has no gradient.";

  LayerOptions o_;
  StepRows rows_;
  bool whole_;
};

// Checks a step's table and buffers, and appends them to inputs.
void add_step(const mx::array& table, const StepRows& rows, int kv, Arrays& inputs) {
  size_t count = rows.starts.size();
  require(table.ndim() == 3 && table.shape(1) == 1 && table.dtype() == mx::float32 && table.shape(2) > 0 &&
              table.shape(2) % 2 == 0,
          "a step's table is [N, 1, dim].");
  require(count > 0 && rows.keys.size() == count && rows.values.size() == count && rows.lengths.size() == count,
          "a step takes as many buffers, starts and lengths as sequences.");
  inputs.push_back(table);
  int64_t all = 0;
  for (size_t i = 0; i < count; i++) {
    auto &keys = rows.keys[i], &values = rows.values[i];
    require(keys.ndim() == 4 && keys.shape() == values.shape() && keys.dtype() == mx::float32 &&
                values.dtype() == mx::float32 && keys.shape(0) == 1 && keys.shape(1) == kv &&
                keys.shape(3) == table.shape(2) && rows.lengths[i] > 0 && rows.starts[i] >= 0 &&
                rows.starts[i] + rows.lengths[i] <= keys.shape(2),
            "heads, positions and buffers do not fit.");
    all += rows.lengths[i];
  }
  require(all == table.shape(0), "a step's table does not fit its lengths.");
  inputs.insert(inputs.end(), rows.keys.begin(), rows.keys.end());
  inputs.insert(inputs.end(), rows.values.begin(), rows.values.end());
}

// Checks a layer's projections and appends them to inputs.
void add_projections(const std::vector<Projection>& projections, int dim, int queries, int kv, int head_dim,
                     LayerOptions& options, Arrays& inputs) {
  require(projections.size() == 4, "a layer has four projections.");
  int64_t inner = projections[2].weight.shape(0) / 2, mixed = queries * head_dim;
  int64_t shapes[4][2] = {{mixed + 2 * kv * head_dim, dim}, {dim, mixed}, {2 * inner, dim}, {dim, inner}};
  for (int i = 0; i < 4; i++) {
    bool fits = add_projection(projections[i], inputs) == shapes[i][1] && shapes[i][0] * shapes[i][1] > 0;
    require(fits && projections[i].weight.shape(0) == shapes[i][0], "a projection does not fit.");
    options.packings[i] = projections[i].packing;
  }
}

}  // namespace

std::vector<mx::array> layer(const mx::array& x, const mx::array& table, const mx::array& keys, const mx::array& values,
                             int start, int queries, int kv, float eps, float scale,
                             const std::vector<mx::array>& norms, const std::vector<Projection>& projections) {
  require(x.ndim() >= 2 && table.ndim() == 3 && keys.ndim() == 4 && keys.shape() == values.shape(),
          "a layer takes x of two dimensions or more, a table of three, and two buffers of four.");
  int dim = x.shape(-1), batch = keys.shape(0), length = table.shape(1), head_dim = table.shape(2);
  require(queries > 0 && kv > 0 && queries % kv == 0 && keys.shape(1) == kv && keys.shape(3) == head_dim &&
              head_dim > 0 && head_dim % 2 == 0 && batch > 0 && length > 0 && int64_t(x.size()) == int64_t(batch) * length * dim &&
              table.shape(0) == 1 && start >= 0 && start + length <= keys.shape(2),
          "heads, positions and buffers do not fit.");
  require(norms.size() == 2 || norms.size() == 4, "a layer has two or four norms.");
  Arrays inputs = {x, table, keys, values};
  for (size_t i = 0; i < norms.size(); i++) {
    require(norms[i].shape() == mx::Shape{i < 2 ? dim : head_dim}, "a norm does not fit.");
    inputs.push_back(as_float(norms[i]));
  }
  for (auto& a : inputs) require(a.dtype() == mx::float32, "a layer's activations and buffers are float32.");
  LayerOptions options{queries, kv, start, int(norms.size()), eps, scale, {}};
  add_projections(projections, dim, queries, kv, head_dim, options, inputs);
  return mx::array::make_arrays({x.shape(), keys.shape(), keys.shape()}, {mx::float32, mx::float32, mx::float32},
                                std::make_shared<Layer>(cpu_stream(), options), inputs);
}

mx::array step_attention(const mx::array& qkv, const mx::array& table, const StepRows& rows, int queries, int kv,
                         float eps, float scale, const std::vector<mx::array>& norms) {
  Arrays inputs = {qkv};
  add_step(table, rows, kv, inputs);
  int64_t count = table.shape(0), dim = table.shape(2);
  require(queries > 0 && kv > 0 && queries % kv == 0 && qkv.dtype() == mx::float32 && qkv.ndim() >= 2 &&
              qkv.shape(-1) == (queries + 2 * kv) * dim && int64_t(qkv.size()) == count * qkv.shape(-1),
          "projections and heads do not fit.");
  require(norms.empty() || norms.size() == 2, "attention has two norms or none.");
  for (auto& norm : norms) {
    require(norm.shape() == mx::Shape{int(dim)}, "a norm does not fit.");
    inputs.push_back(as_float(norm));
  }
  inputs.insert(inputs.end(), rows.after.begin(), rows.after.end());
  auto shape = qkv.shape();
  shape.back() = int(queries * dim);
  LayerOptions options{queries, kv, 0, int(norms.size()), eps, scale, {}};
  auto kernel = std::make_shared<Step>(cpu_stream(), options, rows.without_arrays(), false);
  return mx::array(std::move(shape), mx::float32, kernel, std::move(inputs));
}

mx::array step_layer(const mx::array& x, const mx::array& table, const StepRows& rows, int queries, int kv, float eps,
                     float scale, const std::vector<mx::array>& norms, const std::vector<Projection>& projections) {
  Arrays inputs = {x};
  add_step(table, rows, kv, inputs);
  int dim = x.ndim() >= 2 ? x.shape(-1) : 0, head_dim = table.shape(2);
  require(queries > 0 && kv > 0 && queries % kv == 0 && x.dtype() == mx::float32 && dim > 0 &&
              int64_t(x.size()) == int64_t(table.shape(0)) * dim,
          "heads and rows do not fit.");
  require(norms.size() == 2 || norms.size() == 4, "a layer has two or four norms.");
  for (size_t i = 0; i < norms.size(); i++) {
    require(norms[i].shape() == mx::Shape{i < 2 ? dim : head_dim}, "a norm does not fit.");
    inputs.push_back(as_float(norms[i]));
  }
  LayerOptions options{queries, kv, 0, int(norms.size()), eps, scale, {}};
  add_projections(projections, dim, queries, kv, head_dim, options, inputs);
  inputs.insert(inputs.end(), rows.after.begin(), rows.after.end());
  auto kernel = std::make_shared<Step>(cpu_stream(), options, rows.without_arrays(), true);
  return mx::array(x.shape(), mx::float32, kernel, std::move(inputs));
}

}  // namespace openelm
