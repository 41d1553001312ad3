// The elementwise parts between products as MLX operations: norms, gates, and splitting projections into heads.

#include "elementwise.h"
#include "kernel.h"

namespace openelm {

namespace {

// A kernel that maps each row [dims] of its first input to a row of its output: body(inputs, rows, dims, y).
class RowByRow : public Kernel {
 public:
  using Body = std::function<void(const std::vector<const float*>&, int64_t, int64_t, float*)>;

  // gradient: computes the gradient of the first input from that input and the gradient of the output; if empty, MLX
  // differentiates `fallback`.
  RowByRow(const char* name, Fallback fallback, Body body, Fallback gradient)
      : Kernel(cpu_stream(), fallback), name_(name), body_(body), gradient_(gradient) {}

  const char* name() const override { return name_; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    std::vector<const float*> from;
    for (auto& input : inputs) from.push_back(dense(input).data<float>());
    int64_t dims = inputs[0].shape(-1), rows = dims ? inputs[0].size() / dims : 0;
    dispatch([=, y = allocate(outputs[0]), body = body_] {
      if (rows) body(from, rows, dims, y);
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    if (!gradient_) return Kernel::vjp(primals, cotangents, argnums, outputs);
    return gradient_({primals[0], cotangents[0]});
  }

 private:
  const char* name_;
  Body body_;
  Fallback gradient_;
};

mx::array row_by_row(const char* name, mx::Shape shape, Arrays inputs, Fallback fallback, RowByRow::Body body,
                     Fallback gradient = {}) {
  auto kernel = std::make_shared<RowByRow>(name, fallback, body, gradient);
  return mx::array(std::move(shape), mx::float32, kernel, std::move(inputs));
}

Arrays swiglu_in_mlx(const Arrays& in) {
  auto stream = cpu_stream();
  auto parts = mx::split(in[0], 2, -1, stream);
  return {mx::multiply(mx::multiply(parts[0], mx::sigmoid(parts[0], stream), stream), parts[1], stream)};
}

// From x and the gradient of the output.
Arrays gradient_of_swiglu(const Arrays& in) {
  auto fallback = [](const Arrays& in) { return mx::vjp(swiglu_in_mlx, {in[0]}, {in[1]}).second; };
  auto body = [](auto& from, int64_t rows, int64_t dims, float* dx) {
    swiglu_gradient(from[0], from[1], rows, dims / 2, dx);
  };
  return {row_by_row("SwiGLUGradient", in[0].shape(), in, fallback, body)};
}

struct HeadsOptions {
  int queries, kv, start;
  float eps;
  bool norms, buffers;
};

Arrays split_heads_in_mlx(const Arrays& in, HeadsOptions o) {
  auto s = cpu_stream();
  auto &qkv = in[0], &table = in[1];
  int length = table.shape(1), dim = table.shape(2), batch = int(qkv.size() / qkv.shape(-1)) / length;
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
    forget_inputs(inputs, outputs);
    auto qkv = dense(inputs[0]), table = dense(inputs[1]);
    Heads h{outputs[0].shape(0), outputs[0].shape(1), o_.queries, o_.kv, outputs[0].shape(3), o_.eps};
    if (o_.norms) h.query_weight = dense(inputs[2]).data<float>(), h.key_weight = dense(inputs[3]).data<float>();
    h.table = table.data<float>();
    h.table_stride = table.shape(0) == 1 ? 0 : h.length * h.dim;
    float* queries = allocate(outputs[0]);
    for (int i : {1, 2}) {
      if (o_.buffers) append_to(inputs[inputs.size() - 3 + i], outputs[i]);
      else allocate(outputs[i]);
    }
    dispatch([=, from = qkv.data<float>(), keys = outputs[1].data<float>(), values = outputs[2].data<float>(),
              room = int64_t(outputs[1].shape(2)),
              start = o_.start] { split_heads(h, from, queries, keys, values, room, start); });
  }

 private:
  HeadsOptions o_;
};

}  // namespace

mx::array log_softmax(const mx::array& x) {
  require(x.ndim() >= 1, "log_softmax takes at least one dimension.");
  auto fallback = [](const Arrays& in) -> Arrays {
    return {mx::subtract(in[0], mx::logsumexp(in[0], -1, true, cpu_stream()), cpu_stream())};
  };
  auto body = [](auto& from, int64_t rows, int64_t dims, float* y) { log_softmax(from[0], rows, dims, y); };
  return row_by_row("LogSoftmax", x.shape(), {as_float(x)}, fallback, body);
}

mx::array rms_norm(const mx::array& x, const mx::array& weight, float eps) {
  require(x.ndim() >= 1 && weight.ndim() == 1 && x.shape(-1) == weight.shape(0), "x and the norm's weight do not fit.");
  auto fallback = [=](const Arrays& in) -> Arrays { return {mx::fast::rms_norm(in[0], in[1], eps, cpu_stream())}; };
  auto body = [=](auto& from, int64_t rows, int64_t dims, float* y) { rms_norm(from[0], from[1], rows, dims, eps, y); };
  auto y = row_by_row("RMSNorm", x.shape(), {as_float(x), as_float(weight)}, fallback, body);
  return mx::astype(y, x.dtype(), cpu_stream());
}

mx::array swiglu(const mx::array& x) {
  require(x.ndim() >= 1 && x.shape(-1) % 2 == 0, "SwiGLU takes gate and up side by side.");
  auto shape = x.shape();
  shape.back() /= 2;
  auto body = [](auto& from, int64_t rows, int64_t dims, float* y) { swiglu(from[0], rows, dims / 2, y); };
  auto y = row_by_row("SwiGLU", shape, {as_float(x)}, swiglu_in_mlx, body, gradient_of_swiglu);
  return mx::astype(y, x.dtype(), cpu_stream());
}

std::vector<mx::array> split_heads(const mx::array& qkv, const mx::array& table, const Optional& query_weight,
                                   const Optional& key_weight, const Optional& keys, const Optional& values,
                                   int queries, int kv, float eps, int start) {
  require(qkv.ndim() >= 2 && table.ndim() == 3 && table.dtype() == mx::float32,
          "projections have two dimensions or more, tables three.");
  int length = table.shape(1), dim = table.shape(2), width = (queries + 2 * kv) * dim;
  require(length > 0 && dim % 2 == 0 && qkv.shape(-1) == width && width > 0 && qkv.size() / width % length == 0,
          "projections and heads do not fit.");
  int batch = int(qkv.size() / width) / length, room = length;
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
