// Attention and its gradient as MLX operations.

#include "attention.h"

#include "kernel.h"

namespace openelm {

namespace {

Arrays attention_in_mlx(const Arrays& in, AttentionOptions o, bool masked) {
  auto s = cpu_stream();
  auto past = [&](int first) {
    Arrays parts;
    for (int i = first; i < first + o.parts(); i++) {
      auto end = in[i].shape();
      end[2] = o.total;
      parts.push_back(mx::slice(in[i], {0, 0, 0, 0}, end, s));
    }
    auto full = parts[0];
    if (o.packing.bits)
      full = mx::dequantize(parts[0], as_float(parts[1]), as_float(parts[2]), o.packing.group, o.packing.bits, "affine",
                            std::nullopt, std::nullopt, s);
    return mx::repeat(as_float(full), in[0].shape(2) / in[first].shape(1), 1, s);
  };
  int batch = in[0].shape(0), length = in[0].shape(1);
  auto keys = mx::swapaxes(past(1), -1, -2, s), queries = mx::swapaxes(in[0], 1, 2, s);
  auto scores = mx::multiply(mx::matmul(queries, keys, s), mx::array(o.scale), s);
  if (masked) scores = mx::add(scores, mx::expand_dims(in.back(), 1, s), s);
  if (o.causal) {
    auto rows = mx::expand_dims(mx::arange(o.total - length, o.total, s), 1, s);
    scores = mx::where(mx::greater_equal(rows, mx::arange(o.total, s), s), scores, mx::array(-INFINITY), s);
  }
  auto mixed = mx::matmul(mx::softmax(scores, -1, true, s), past(1 + o.parts()), s);
  return {mx::reshape(mx::swapaxes(mixed, 1, 2, s), {batch * length, in[0].shape(2) * in[0].shape(3)}, s),
          mx::logsumexp(scores, -1, false, s)};
}

// Inputs: queries, keys, values (each three arrays if packed), the mask if there is one; for the gradient also the
// mixed values, logsumexp, and the gradient of the mixed values. Outputs as `attention` and `attention_gradient` return
// them.
class AttentionKernel : public Kernel {
 public:
  AttentionKernel(mx::Stream stream, AttentionOptions options, bool masked, bool gradient)
      : Kernel(stream,
               [=](const Arrays& in) -> Arrays {
                 if (gradient) throw std::runtime_error("mlx_openelm.native: attention has no second derivatives.");
                 return attention_in_mlx(in, options, masked);
               }),
        o_(options),
        masked_(masked),
        gradient_(gradient) {}

  const char* name() const override { return gradient_ ? "AttentionGradient" : "Attention"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& q = inputs[0];
    Attention a{};
    auto queries = q.strides(3) == 1 || q.shape(3) == 1 ? q : dense(q);
    a.queries = queries.data<float>();
    for (int i = 0; i < 3; i++) a.query_strides[i] = queries.strides(i);
    a.batch = q.shape(0), a.length = q.shape(1), a.heads = q.shape(2), a.dim = q.shape(3);
    a.total = o_.total, a.kv = inputs[1].shape(1), a.scale = o_.scale, a.causal = o_.causal;
    a.keys = past(inputs, 1), a.values = past(inputs, 1 + o_.parts());
    if (masked_) {
      auto mask = dense(inputs[2 * o_.parts() + 1]);
      a.mask = mask.data<float>();
      a.mask_stride = mask.shape(0) == 1 ? 0 : a.length * a.total;
    }
    if (!gradient_) {
      dispatch([=, y = allocate(outputs[0]), sums = allocate(outputs[1])] { attention(a, y, sums); });
      return;
    }
    // After the inputs of the forward pass: its outputs, and the gradient of the first.
    size_t count = inputs.size();
    auto y = dense(inputs[count - 3]), sums = dense(inputs[count - 2]), dy = dense(inputs[count - 1]);
    dispatch([=, y = y.data<float>(), sums = sums.data<float>(), dy = dy.data<float>(), dq = allocate(outputs[0]),
              dk = allocate(outputs[1]),
              dv = allocate(outputs[2])] { attention_gradient(a, y, dy, sums, dq, dk, dv); });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    bool is_native = !gradient_ && !o_.packing.bits && primals[1].shape(2) == o_.total;
    for (int i : argnums) is_native = is_native && i < 3 && primals[1].dtype() == mx::float32;
    if (!is_native) return Kernel::vjp(primals, cotangents, argnums, outputs);
    Optional mask;
    if (masked_) mask = mx::expand_dims(primals[3], 1, stream());
    auto gradients =
        attention_gradient(primals[0], primals[1], primals[2], outputs[0], outputs[1], cotangents[0], mask, o_);
    Arrays wanted;
    for (int i : argnums) wanted.push_back(gradients[i]);
    return wanted;
  }

 private:
  // Keys or values, whose first array is inputs[first].
  Past past(const Arrays& inputs, int first) {
    Arrays parts;
    for (int i = first; i < first + o_.parts(); i++) {
      auto& a = inputs[i];
      // Strides of heads and of the batch may be anything; the rows of a packed head must be contiguous.
      bool usable = a.strides(3) == 1 && (!o_.packing.bits || a.strides(2) == a.shape(3));
      parts.push_back(usable ? a : dense(a));
    }
    Past past{};
    past.matrix = as_matrix(projection_at(parts, 0, o_.packing));
    if (!o_.packing.bits) past.matrix.stride = parts[0].strides(2);
    for (size_t i = 0; i < parts.size(); i++) {
      past.batch[i] = parts[i].strides(0) * int64_t(parts[i].itemsize());
      past.head[i] = parts[i].strides(1) * int64_t(parts[i].itemsize());
    }
    return past;
  }

  AttentionOptions o_;
  bool masked_, gradient_;
};

// A mask in the form the kernel takes: [batch or 1, length, total].
mx::array flat_mask(const mx::array& mask, int batch, int length, int total) {
  auto stream = cpu_stream();
  require(
      mask.ndim() == 2 || (mask.ndim() == 4 && mask.shape(1) == 1 && (mask.shape(0) == 1 || mask.shape(0) == batch)),
      "a mask is [length, total] or [batch or 1, 1, length, total].");
  auto flat = mask.ndim() == 4 ? mx::squeeze(mask, 1, stream) : mask;
  return as_float(mx::broadcast_to(flat, {flat.ndim() == 3 ? flat.shape(0) : 1, length, total}, stream));
}

}  // namespace

std::vector<mx::array> attention(const mx::array& queries, const std::vector<mx::array>& keys,
                                 const std::vector<mx::array>& values, const Optional& mask, AttentionOptions options) {
  auto [scale, causal, total, packing] = options;
  require(queries.ndim() == 4 && keys.size() == size_t(options.parts()) && values.size() == keys.size(),
          "attention takes queries of four dimensions, and as many arrays of keys as of values.");
  int batch = queries.shape(0), length = queries.shape(1), heads = queries.shape(2), dim = queries.shape(3);
  Arrays inputs = {as_float(queries)};
  for (auto* past : {&keys, &values}) {
    for (auto& part : *past) {
      require(part.ndim() == 4 && part.shape(0) == batch && part.shape(1) == keys[0].shape(1) && part.shape(2) >= total,
              "keys or values do not fit.");
      inputs.push_back(part);
    }
    int64_t width = past->at(0).shape(3);
    if (packing.bits) {
      check_packing(past->at(0), past->at(1), past->at(2), packing);
      width = width * 32 / packing.bits;
    } else {
      type_of(past->at(0));
    }
    require(width == dim, "keys or values do not fit the queries.");
  }
  int kv = keys[0].shape(1);
  require(batch > 0 && length > 0 && kv > 0 && heads > 0 && heads % kv == 0 && dim > 0 && total > 0 &&
              (!causal || total >= length),
          "heads or positions do not fit.");
  if (mask) inputs.push_back(flat_mask(*mask, batch, length, total));
  auto stream = cpu_stream();
  auto outputs =
      mx::array::make_arrays({{batch * length, heads * dim}, {batch, heads, length}}, {mx::float32, mx::float32},
                             std::make_shared<AttentionKernel>(stream, options, mask.has_value(), false), inputs);
  outputs[0] = mx::astype(outputs[0], queries.dtype(), stream);
  return outputs;
}

std::vector<mx::array> attention_gradient(const mx::array& queries, const mx::array& keys, const mx::array& values,
                                          const mx::array& mixed, const mx::array& sums, const mx::array& gradient,
                                          const Optional& mask, AttentionOptions options) {
  for (auto& a : {queries, keys, values, mixed, sums, gradient})
    require(a.dtype() == mx::float32, "gradients of attention are for float32.");
  require(queries.ndim() == 4 && keys.ndim() == 4 && keys.shape() == values.shape() && keys.shape(2) == options.total &&
              keys.shape(0) == queries.shape(0) && keys.shape(3) == queries.shape(3) &&
              mixed.size() == queries.size() && gradient.size() == queries.size() && keys.size() > 0 &&
              queries.size() > 0 && queries.shape(2) % keys.shape(1) == 0 &&
              sums.size() * queries.shape(3) == queries.size(),
          "attention's results do not fit its inputs.");
  Arrays inputs = {queries, keys, values};
  if (mask) inputs.push_back(flat_mask(*mask, queries.shape(0), queries.shape(1), options.total));
  inputs.insert(inputs.end(), {mixed, sums, gradient});
  return mx::array::make_arrays(
      {queries.shape(), keys.shape(), values.shape()}, {mx::float32, mx::float32, mx::float32},
      std::make_shared<AttentionKernel>(cpu_stream(), options, mask.has_value(), true), inputs);
}

}  // namespace openelm
