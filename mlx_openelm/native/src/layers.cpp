// What lies between products: norms, gates, and the way from projections to heads, as operations of MLX.

#include "elementwise.h"
#include "kernel.h"

namespace openelm {

namespace {

class RMSNorm : public Kernel {
 public:
  RMSNorm(mx::Stream stream, float eps)
      : Kernel(stream,
               [=](const Arrays& in) -> Arrays { return {mx::fast::rms_norm(in[0], in[1], eps, cpu_stream())}; }),
        eps_(eps) {}

  const char* name() const override { return "RMSNorm"; }
  bool is_equivalent(const Primitive& other) const override { return eps_ == static_cast<const RMSNorm&>(other).eps_; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto x = dense(inputs[0]), weight = dense(inputs[1]);
    int64_t dims = weight.size(), rows = dims ? x.size() / dims : 0;
    dispatch([=, y = allocate(outputs[0]), from = x.data<float>(), w = weight.data<float>(), eps = eps_] {
      if (rows) rms_norm(from, w, rows, dims, eps, y);
    });
  }

 private:
  float eps_;
};

class LogSoftmax : public Kernel {
 public:
  explicit LogSoftmax(mx::Stream stream)
      : Kernel(stream, [](const Arrays& in) -> Arrays {
          auto s = cpu_stream();
          return {mx::subtract(in[0], mx::logsumexp(in[0], -1, true, s), s)};
        }) {}

  const char* name() const override { return "LogSoftmax"; }
  bool is_equivalent(const Primitive&) const override { return true; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto x = dense(inputs[0]);
    int64_t dims = x.shape(-1), rows = dims ? x.size() / dims : 0;
    dispatch([=, y = allocate(outputs[0]), from = x.data<float>()] {
      if (rows) log_softmax(from, rows, dims, y);
    });
  }
};

mx::array swiglu_in_mlx(const mx::array& x) {
  auto stream = cpu_stream();
  auto parts = mx::split(x, 2, -1, stream);
  return mx::multiply(mx::multiply(parts[0], mx::sigmoid(parts[0], stream), stream), parts[1], stream);
}

// With one input the value, with two (x and the output's gradient) the gradient of x.
class SwiGLU : public Kernel {
 public:
  explicit SwiGLU(mx::Stream stream)
      : Kernel(stream, [](const Arrays& in) -> Arrays {
          if (in.size() == 1) return {swiglu_in_mlx(in[0])};
          return mx::vjp([](const Arrays& x) -> Arrays { return {swiglu_in_mlx(x[0])}; }, {in[0]}, {in[1]}).second;
        }) {}

  const char* name() const override { return "SwiGLU"; }
  bool is_equivalent(const Primitive&) const override { return true; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto x = dense(inputs[0]);
    int64_t inner = x.shape(-1) / 2, rows = inner ? x.size() / (2 * inner) : 0;
    float* y = allocate(outputs[0]);
    if (inputs.size() == 1) {
      dispatch([=, from = x.data<float>()] {
        if (rows) swiglu(from, rows, inner, y);
      });
    } else {
      auto dy = dense(inputs[1]);
      dispatch([=, from = x.data<float>(), d = dy.data<float>()] {
        if (rows) swiglu_gradient(from, d, rows, inner, y);
      });
    }
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    if (primals.size() == 2) return Kernel::vjp(primals, cotangents, argnums, outputs);
    return {
        mx::array(primals[0].shape(), mx::float32, std::make_shared<SwiGLU>(stream()), {primals[0], cotangents[0]})};
  }
};

struct HeadsOptions {
  int queries, kv, start;
  float eps;
  bool norms, buffers;
};

Arrays split_heads_in_mlx(const Arrays& in, HeadsOptions o) {
  auto s = cpu_stream();
  auto &qkv = in[0], &table = in[1];
  int length = table.shape(1), dim = table.shape(2), batch = qkv.shape(0) / length;
  auto heads = mx::reshape(qkv, {batch, length, o.queries + 2 * o.kv, dim}, s);
  auto parts = mx::split(heads, mx::Shape{o.queries, o.queries + o.kv}, 2, s);
  auto angles = mx::split(mx::expand_dims(table, 2, s), 2, -1, s);
  auto turn = [&](mx::array x, int weight) {
    if (o.norms) x = mx::fast::rms_norm(x, in[weight], o.eps, s);
    auto h = mx::split(x, 2, -1, s);
    auto a = mx::subtract(mx::multiply(h[0], angles[0], s), mx::multiply(h[1], angles[1], s), s);
    auto b = mx::add(mx::multiply(h[1], angles[0], s), mx::multiply(h[0], angles[1], s), s);
    return mx::concatenate({a, b}, -1, s);
  };
  Arrays out = {turn(parts[0], 2), mx::swapaxes(turn(parts[1], 3), 1, 2, s), mx::swapaxes(parts[2], 1, 2, s)};
  if (o.buffers) {
    for (int i : {1, 2}) {
      auto& buffer = in[in.size() - 3 + i];
      out[i] =
          mx::slice_update(buffer, out[i], {0, 0, o.start, 0}, {batch, o.kv, o.start + length, dim}, {1, 1, 1, 1}, s);
    }
  }
  return out;
}

// Inputs: qkv, table, the norms' two weights if there are norms, the two buffers if there are buffers.
class SplitHeads : public Kernel {
 public:
  SplitHeads(mx::Stream stream, HeadsOptions options)
      : Kernel(stream, [=](const Arrays& in) { return split_heads_in_mlx(in, options); }), o_(options) {}

  const char* name() const override { return "SplitHeads"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    // Each output refers to the inputs, which MLX clears only afterwards: the buffers would seem to be needed thrice.
    bool is_traced = std::any_of(outputs.begin(), outputs.end(), [](auto& out) { return out.is_tracer(); });
    for (auto& out : outputs)
      if (!is_traced && &out.inputs() != &inputs) out.inputs().clear();
    auto qkv = dense(inputs[0]), table = dense(inputs[1]);
    Heads h{outputs[0].shape(0), outputs[0].shape(1), o_.queries, o_.kv, outputs[0].shape(3), o_.eps};
    if (o_.norms) h.query_weight = dense(inputs[2]).data<float>(), h.key_weight = dense(inputs[3]).data<float>();
    h.table = table.data<float>();
    h.table_stride = table.shape(0) == 1 ? 0 : h.length * h.dim;
    float* queries = allocate(outputs[0]);
    for (int i : {1, 2}) {
      if (o_.buffers) {
        keep(inputs[inputs.size() - 3 + i], outputs[i]);
      } else {
        allocate(outputs[i]);
      }
    }
    dispatch([=, from = qkv.data<float>(), keys = outputs[1].data<float>(), values = outputs[2].data<float>(),
              room = int64_t(outputs[1].shape(2)),
              start = o_.start] { split_heads(h, from, queries, keys, values, room, start); });
  }

 private:
  // `out` is the buffer itself if nobody else holds it, else a copy.
  void keep(const mx::array& buffer, mx::array& out) {
    // The last token's attention may not have run yet, and holds the buffer until it has: waiting for that costs less
    // than a copy. Should somebody else hold it, the wait ends soon.
    for (int i = 0; i < kPatience && !buffer.is_donatable(); i++) pause_briefly();
    if (buffer.is_donatable() && buffer.flags().row_contiguous) return out.copy_shared_buffer(buffer);
    auto from = dense(buffer);
    dispatch([to = allocate(out), from = from.data<float>(), bytes = out.nbytes()] { std::memcpy(to, from, bytes); });
  }

  static constexpr int kPatience = 4000;  // pauses: some 50 microseconds
  HeadsOptions o_;
};

}  // namespace

mx::array log_softmax(const mx::array& x) {
  require(x.ndim() >= 1, "log_softmax takes at least one dimension.");
  return mx::array(x.shape(), mx::float32, std::make_shared<LogSoftmax>(cpu_stream()), {as_float(x)});
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  require(x.ndim() >= 1 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0), "x and the norm's weight do not fit.");
  auto stream = cpu_stream();
  Arrays inputs = {as_float(x), as_float(weight)};
  mx::array y(x.shape(), mx::float32, std::make_shared<RMSNorm>(stream, eps), std::move(inputs));
  return mx::astype(y, x.dtype(), stream);
}

mx::array swiglu(const mx::array& x) {
  require(x.ndim() >= 1 && x.shape(-1) % 2 == 0, "SwiGLU takes gate and up side by side.");
  auto stream = cpu_stream();
  auto shape = x.shape();
  shape.back() /= 2;
  mx::array y(std::move(shape), mx::float32, std::make_shared<SwiGLU>(stream), {as_float(x)});
  return mx::astype(y, x.dtype(), stream);
}

std::vector<mx::array> split_heads(const mx::array& qkv, const mx::array& table, const Optional& query_weight,
                                   const Optional& key_weight, const Optional& keys, const Optional& values,
                                   int queries, int kv, float eps, int start) {
  require(qkv.ndim() == 2 && table.ndim() == 3 && table.dtype() == mx::float32,
          "projections have two dimensions, tables three.");
  int length = table.shape(1), dim = table.shape(2);
  require(length > 0 && dim % 2 == 0 && qkv.shape(0) % length == 0 && qkv.shape(1) == (queries + 2 * kv) * dim,
          "projections and heads do not fit.");
  int batch = qkv.shape(0) / length, room = length;
  require(table.shape(0) == 1 || table.shape(0) == batch, "the table does not fit the rows.");
  Arrays inputs = {as_float(qkv), table};
  require(query_weight.has_value() == key_weight.has_value() && keys.has_value() == values.has_value(),
          "weights and buffers come in pairs.");
  if (query_weight) {
    require(query_weight->shape() == mx::Shape{dim} && key_weight->shape() == mx::Shape{dim},
            "a norm's weight does not fit.");
    inputs.insert(inputs.end(), {as_float(*query_weight), as_float(*key_weight)});
  }
  if (keys) {
    room = keys->ndim() == 4 ? keys->shape(2) : 0;
    require(start >= 0 && start + length <= room && keys->shape() == mx::Shape{batch, kv, room, dim} &&
                values->shape() == keys->shape() && keys->dtype() == mx::float32 && values->dtype() == mx::float32,
            "the buffers do not fit.");
    inputs.insert(inputs.end(), {*keys, *values});
  }
  auto stream = cpu_stream();
  HeadsOptions options{queries, kv, keys ? start : 0, eps, query_weight.has_value(), keys.has_value()};
  mx::Shape past{batch, kv, room, dim};
  auto outputs =
      mx::array::make_arrays({{batch, length, queries, dim}, past, past}, {mx::float32, mx::float32, mx::float32},
                             std::make_shared<SplitHeads>(stream, options), inputs);
  for (auto& output : outputs) output = mx::astype(output, qkv.dtype(), stream);
  return outputs;
}

}  // namespace openelm
