#include "primitives.h"

#include "mlx/backend/cpu/encoder.h"

#include "attention.h"
#include "elementwise.h"
#include "matmul.h"
#include "rows.h"

namespace openelm {

namespace {

using Arrays = std::vector<mx::array>;
using Fallback = std::function<Arrays(const Arrays&)>;

// An operation on the CPU. What a kernel has no gradient of its own for, and MLX's other transformations, go through
// `fallback`, the same mathematics in MLX's operations.
class Kernel : public mx::Primitive {
 public:
  Kernel(mx::Stream stream, Fallback fallback) : Primitive(stream), fallback_(std::move(fallback)) {}

  void eval_gpu(const Arrays&, Arrays&) override {
    throw std::runtime_error(std::string(name()) + " of mlx_openelm.native runs on a CPU only.");
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums, const Arrays&) override {
    auto [varied, of_varied] = vary(primals, argnums);
    return mx::vjp(of_varied, varied, cotangents).second;
  }

  Arrays jvp(const Arrays& primals, const Arrays& tangents, const std::vector<int>& argnums) override {
    auto [varied, of_varied] = vary(primals, argnums);
    return mx::jvp(of_varied, varied, tangents).second;
  }

  std::pair<Arrays, std::vector<int>> vmap(const Arrays& inputs, const std::vector<int>& axes) override {
    Arrays outputs = mx::vmap(fallback_, axes)(inputs);
    return {outputs, std::vector<int>(outputs.size(), 0)};
  }

 protected:
  // Runs `kernel` on the stream's thread once its turn has come. MLX keeps inputs and outputs alive until then.
  template <class Call>
  void dispatch(Call&& kernel) {
    mx::cpu::get_command_encoder(stream()).dispatch(std::forward<Call>(kernel));
  }

  // The array itself where its rows follow one another without gaps, else a copy that lives as long as the kernel.
  mx::array dense(const mx::array& a) {
    if (a.flags().row_contiguous) return a;
    mx::array copy(a.shape(), a.dtype(), nullptr, {});
    copy.set_data(mx::allocator::malloc(copy.nbytes()));
    dispatch([to = copy.data<char>(), from = a.data<char>(), shape = a.shape(), strides = a.strides(),
              size = int64_t(a.itemsize()), count = int64_t(a.size())] {
      for (int64_t i = 0; i < count; i++) {
        int64_t rest = i, at = 0;
        for (int axis = int(shape.size()) - 1; axis >= 0; axis--) at += rest % shape[axis] * strides[axis], rest /= shape[axis];
        std::memcpy(to + i * size, from + at * size, size);
      }
    });
    mx::cpu::get_command_encoder(stream()).add_temporary(copy);
    return copy;
  }

  static float* allocate(mx::array& out) {
    out.set_data(mx::allocator::malloc(out.nbytes()));
    return out.data<float>();
  }

 private:
  // The inputs asked for, and what comes of others in their place. Those not asked for may have no gradient, as packed
  // weights.
  std::pair<Arrays, Fallback> vary(const Arrays& primals, const std::vector<int>& argnums) {
    Arrays varied;
    for (int i : argnums) varied.push_back(primals[i]);
    return {varied, [=, fallback = fallback_](const Arrays& some) {
              Arrays all = primals;
              for (size_t i = 0; i < argnums.size(); i++) all[argnums[i]] = some[i];
              return fallback(all);
            }};
  }

  Fallback fallback_;
};

mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

mx::array as_float(const mx::array& a) { return mx::astype(a, mx::float32, cpu_stream()); }

Type type_of(const mx::array& a) {
  if (a.dtype() == mx::bfloat16) return Type::bfloat16;
  if (a.dtype() == mx::float16) return Type::float16;
  if (a.dtype() == mx::float32) return Type::float32;
  throw std::invalid_argument("mlx_openelm.native: numbers are float32, float16 or bfloat16.");
}

void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("mlx_openelm.native: ") + what);
}

// Products.

Matrix as_matrix(const mx::array& weight, const mx::array* scales, const mx::array* biases, Packing packing) {
  Matrix m;
  m.data = weight.data<char>();
  m.bits = packing.bits, m.group = packing.group;
  m.rows = weight.shape(-2), m.columns = m.stride = weight.shape(-1);
  m.type = type_of(scales ? *scales : weight);
  if (scales) {
    m.columns = int64_t(weight.shape(-1)) * 32 / packing.bits;
    m.scales = scales->data<char>(), m.biases = biases->data<char>();
  }
  return m;
}

// Whether packed weights, scales and biases fit each other and are of a packing there is.
void check_packing(const mx::array& weight, const mx::array& scales, const mx::array& biases, Packing packing) {
  static const std::vector<int> bits = {2, 3, 4, 5, 6, 8}, groups = {32, 64, 128};
  auto among = [](const std::vector<int>& all, int one) { return std::find(all.begin(), all.end(), one) != all.end(); };
  require(among(bits, packing.bits) && among(groups, packing.group), "bits are 2, 3, 4, 5, 6 or 8, groups 32, 64 or 128.");
  require(weight.dtype() == mx::uint32 && scales.dtype() == biases.dtype() && scales.shape() == biases.shape(),
          "packed weights are uint32, their scales and biases alike.");
  int64_t columns = int64_t(weight.shape(-1)) * 32 / packing.bits;
  require(columns == int64_t(scales.shape(-1)) * packing.group && weight.shape(-2) == scales.shape(-2),
          "packed weights and scales do not fit.");
  type_of(scales);
}

mx::array in_mlx(const mx::array& x, const Arrays& weights, bool transpose, Packing packing) {
  auto stream = cpu_stream();
  if (!packing.bits) {
    auto weight = as_float(weights[0]);
    return mx::matmul(x, transpose ? mx::transpose(weight, stream) : weight, stream);
  }
  return mx::quantized_matmul(x, weights[0], as_float(weights[1]), as_float(weights[2]), transpose, packing.group,
                              packing.bits, "affine", stream);
}

// What a product does to x before it multiplies.
struct Stage {
  bool norm = false, gated = false;
  float eps = 0;
  bool any() const { return norm || gated; }
};

// Inputs: x, weight, and for packed ones scales and biases; then the norm's weight and the residual, if they are there.
class Product : public Kernel {
 public:
  Product(mx::Stream stream, Packing packing, Stage stage, bool transpose, bool residual)
      : Kernel(stream, [=](const Arrays& in) -> Arrays {
          Arrays weights(in.begin() + 1, in.begin() + 1 + (packing.bits ? 3 : 1));
          if (stage.any()) {  // in steps, which have gradients of their own
            Optional parts[2];
            if (packing.bits) parts[0] = weights[1], parts[1] = weights[2];
            auto x = stage.gated ? swiglu(in[0]) : rms_norm(in[0], in[1 + weights.size()], stage.eps);
            return {product(x, weights[0], parts[0], parts[1], packing,
                            {{}, 0, false, residual ? Optional(in.back()) : Optional()})};
          }
          auto y = in_mlx(in[0], weights, transpose, packing);
          return {residual ? mx::add(y, in.back(), cpu_stream()) : y};
        }),
        packing_(packing), stage_(stage), transpose_(transpose), residual_(residual) {}

  const char* name() const override { return "Product"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto& out = outputs[0];
    auto x = dense(inputs[0]), weight = dense(inputs[1]);
    Optional scales, biases;
    if (packing_.bits) scales = dense(inputs[2]), biases = dense(inputs[3]);
    const float* norm = stage_.norm ? dense(inputs[packing_.bits ? 4 : 2]).data<float>() : nullptr;
    // The residual's memory becomes the output's where nobody else needs it.
    const float* residual = nullptr;
    if (residual_ && inputs.back().is_donatable() && inputs.back().flags().row_contiguous) {
      out.copy_shared_buffer(inputs.back());
    } else {
      allocate(out);
      if (residual_) residual = dense(inputs.back()).data<float>();
    }
    Matrix m = as_matrix(weight, scales ? &*scales : nullptr, biases ? &*biases : nullptr, packing_);
    int64_t width = out.shape(-1), rows = width ? out.size() / width : 0;
    int64_t depth = x.shape(-1) / (stage_.gated ? 2 : 1);
    dispatch([=, y = out.data<float>(), from = x.data<float>(), fresh = !residual_, bytes = out.nbytes(),
              transposed = !transpose_, round = packing_.round, stage = stage_] {
      if (fresh) std::memset(y, 0, bytes);
      if (residual) std::memcpy(y, residual, bytes);
      if (!bytes || !depth) return;
      const float* input = from;
      thread_local Scratch scratch;
      if (stage.any()) {
        float* prepared = scratch.get<float>(rows * depth);
        if (stage.gated) {
          openelm::swiglu(from, rows, depth, prepared);
        } else {
          openelm::rms_norm(from, norm, rows, depth, stage.eps, prepared);
        }
        input = prepared;
      }
      if (transposed || rows >= kManyRows) {
        many_rows(m, width, depth, input, rows, y, transposed);
      } else {
        few_rows(m, width, input, rows, y, round);
      }
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    if (stage_.any()) return Kernel::vjp(primals, cotangents, argnums, outputs);
    Arrays gradients;
    for (int i : argnums) {
      if (i == 0) {
        Arrays inputs(primals.begin(), primals.end() - residual_);
        inputs[0] = cotangents[0];
        auto exact = Packing{packing_.bits, packing_.group, false};
        gradients.emplace_back(primals[0].shape(), mx::float32,
                               std::make_shared<Product>(stream(), exact, Stage{}, !transpose_, false), inputs);
      } else if (residual_ && i == int(primals.size()) - 1) {
        gradients.push_back(cotangents[0]);
      } else {
        gradients.push_back(Kernel::vjp(primals, cotangents, {i}, outputs)[0]);
      }
    }
    return gradients;
  }

 private:
  Packing packing_;
  Stage stage_;
  bool transpose_, residual_;
};

// Inputs: tokens, and an embedding's packed weight, scales and biases. Output: the tokens' rows.
class Lookup : public Kernel {
 public:
  Lookup(mx::Stream stream, Packing packing)
      : Kernel(stream, [=](const Arrays& in) -> Arrays {
          auto rows = [&](int i) { return mx::take(in[i], in[0], 0, cpu_stream()); };
          return {mx::dequantize(rows(1), as_float(rows(2)), as_float(rows(3)), packing.group, packing.bits, "affine",
                                 std::nullopt, std::nullopt, cpu_stream())};
        }),
        packing_(packing) {}

  const char* name() const override { return "Lookup"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto tokens = dense(inputs[0]), weight = dense(inputs[1]), scales = dense(inputs[2]), biases = dense(inputs[3]);
    Matrix m = as_matrix(weight, &scales, &biases, packing_);
    dispatch([=, y = allocate(outputs[0]), ids = tokens.data<int32_t>(), count = int64_t(tokens.size()),
              vocabulary = int64_t(weight.shape(0))] {
      for (int64_t i = 0; i < count; i++) {
        // As MLX has it: from the end if negative; nothing is read from outside.
        int64_t id = ids[i] < 0 ? ids[i] + vocabulary : ids[i];
        id = id < 0 ? 0 : id < vocabulary ? id : vocabulary - 1;
        open(m, id, 1, 0, m.columns, y + i * m.columns, m.columns);
      }
    });
  }

 private:
  Packing packing_;
};

// RMSNorm and SwiGLU.

class RMSNorm : public Kernel {
 public:
  RMSNorm(mx::Stream stream, float eps)
      : Kernel(stream, [=](const Arrays& in) -> Arrays { return {mx::fast::rms_norm(in[0], in[1], eps, cpu_stream())}; }),
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
    return {mx::array(primals[0].shape(), mx::float32, std::make_shared<SwiGLU>(stream()),
                      {primals[0], cotangents[0]})};
  }
};

// From projections to heads.

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
      out[i] = mx::slice_update(buffer, out[i], {0, 0, o.start, 0},
                                {batch, o.kv, o.start + length, dim}, {1, 1, 1, 1}, s);
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
              room = int64_t(outputs[1].shape(2)), start = o_.start] {
      split_heads(h, from, queries, keys, values, room, start);
    });
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

// Attention.

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

// Inputs: queries, keys, values (each three arrays if packed), the mask if there is one; for the gradient also the mixed
// values, logsumexp, and the gradient of the mixed values. Outputs as `attention` and `attention_gradient` return them.
class AttentionKernel : public Kernel {
 public:
  AttentionKernel(mx::Stream stream, AttentionOptions options, bool masked, bool gradient)
      : Kernel(stream, [=](const Arrays& in) -> Arrays {
          if (gradient) throw std::runtime_error("mlx_openelm.native: attention has no second derivatives.");
          return attention_in_mlx(in, options, masked);
        }),
        o_(options), masked_(masked), gradient_(gradient) {}

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
    // Behind the inputs of the value: its outputs, and the gradient of the first.
    size_t count = inputs.size();
    auto y = dense(inputs[count - 3]), sums = dense(inputs[count - 2]), dy = dense(inputs[count - 1]);
    dispatch([=, y = y.data<float>(), sums = sums.data<float>(), dy = dy.data<float>(), dq = allocate(outputs[0]),
              dk = allocate(outputs[1]), dv = allocate(outputs[2])] { attention_gradient(a, y, dy, sums, dq, dk, dv); });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    bool is_native = !gradient_ && !o_.packing.bits && primals[1].shape(2) == o_.total;
    for (int i : argnums) is_native = is_native && i < 3 && primals[1].dtype() == mx::float32;
    if (!is_native) return Kernel::vjp(primals, cotangents, argnums, outputs);
    Optional mask;
    if (masked_) mask = mx::expand_dims(primals[3], 1, stream());
    auto gradients = attention_gradient(primals[0], primals[1], primals[2], outputs[0], outputs[1], cotangents[0], mask, o_);
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
      // Heads and rows of the batch may lie anywhere; a packed head's rows follow one another.
      bool usable = a.strides(3) == 1 && (!o_.packing.bits || a.strides(2) == a.shape(3));
      parts.push_back(usable ? a : dense(a));
    }
    Past past{};
    bool packed = o_.packing.bits;
    past.matrix = as_matrix(parts[0], packed ? &parts[1] : nullptr, packed ? &parts[2] : nullptr, o_.packing);
    if (!packed) past.matrix.stride = parts[0].strides(2);
    for (size_t i = 0; i < parts.size(); i++) {
      past.batch[i] = parts[i].strides(0) * int64_t(parts[i].itemsize());
      past.head[i] = parts[i].strides(1) * int64_t(parts[i].itemsize());
    }
    return past;
  }

  AttentionOptions o_;
  bool masked_, gradient_;
};

// A mask as the kernel takes it: [batch or 1, length, total].
mx::array flat_mask(const mx::array& mask, int batch, int length, int total) {
  auto stream = cpu_stream();
  require(mask.ndim() == 2 || (mask.ndim() == 4 && mask.shape(1) == 1 && (mask.shape(0) == 1 || mask.shape(0) == batch)),
          "a mask is [length, total] or [batch or 1, 1, length, total].");
  auto flat = mask.ndim() == 4 ? mx::squeeze(mask, 1, stream) : mask;
  return as_float(mx::broadcast_to(flat, {flat.ndim() == 3 ? flat.shape(0) : 1, length, total}, stream));
}

}  // namespace

mx::array product(const mx::array& x, const mx::array& weight, const Optional& scales, const Optional& biases,
                  Packing packing, const Around& around) {
  require(x.ndim() >= 1 && weight.ndim() == 2, "a product takes x [..., in] and weight [out, in].");
  Arrays inputs = {as_float(x), weight};
  int64_t columns = weight.shape(1);
  if (packing.bits) {
    require(scales && biases, "packed weights have scales and biases.");
    check_packing(weight, *scales, *biases, packing);
    columns = columns * 32 / packing.bits;
    inputs.insert(inputs.end(), {*scales, *biases});
  } else {
    type_of(weight);
  }
  require(x.shape(-1) == columns * (around.gated ? 2 : 1), "x and weight do not fit.");
  require(!(around.norm && around.gated), "x is either normalized or gated.");
  if (around.norm) {
    require(around.norm->shape() == mx::Shape{int(columns)}, "x and the norm's weight do not fit.");
    inputs.push_back(as_float(*around.norm));
  }
  auto shape = x.shape();
  shape.back() = weight.shape(0);
  if (around.residual) {
    require(around.residual->shape() == shape, "the residual does not fit.");
    inputs.push_back(as_float(*around.residual));
  }
  auto stream = cpu_stream();
  Stage stage{around.norm.has_value(), around.gated, around.eps};
  auto primitive = std::make_shared<Product>(stream, packing, stage, true, around.residual.has_value());
  return mx::astype(mx::array(std::move(shape), mx::float32, primitive, std::move(inputs)), x.dtype(), stream);
}

mx::array log_softmax(const mx::array& x) {
  require(x.ndim() >= 1, "log_softmax takes at least one dimension.");
  return mx::array(x.shape(), mx::float32, std::make_shared<LogSoftmax>(cpu_stream()), {as_float(x)});
}

mx::array lookup(const mx::array& tokens, const mx::array& weight, const mx::array& scales, const mx::array& biases,
                 Packing packing) {
  require(weight.ndim() == 2, "an embedding's packed weight has two dimensions.");
  check_packing(weight, scales, biases, packing);
  auto shape = tokens.shape();
  shape.push_back(int64_t(weight.shape(1)) * 32 / packing.bits);
  auto stream = cpu_stream();
  return mx::array(std::move(shape), mx::float32, std::make_shared<Lookup>(stream, packing),
                   {mx::astype(tokens, mx::int32, stream), weight, scales, biases});
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
                                   const Optional& key_weight, const Optional& keys, const Optional& values, int queries,
                                   int kv, float eps, int start) {
  require(qkv.ndim() == 2 && table.ndim() == 3 && table.dtype() == mx::float32, "projections have two dimensions, tables three.");
  int length = table.shape(1), dim = table.shape(2);
  require(length > 0 && dim % 2 == 0 && qkv.shape(0) % length == 0 && qkv.shape(1) == (queries + 2 * kv) * dim,
          "projections and heads do not fit.");
  int batch = qkv.shape(0) / length, room = length;
  require(table.shape(0) == 1 || table.shape(0) == batch, "the table does not fit the rows.");
  Arrays inputs = {as_float(qkv), table};
  require(query_weight.has_value() == key_weight.has_value() && keys.has_value() == values.has_value(),
          "weights and buffers come in pairs.");
  if (query_weight) {
    require(query_weight->shape() == mx::Shape{dim} && key_weight->shape() == mx::Shape{dim}, "a norm's weight does not fit.");
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
  auto outputs = mx::array::make_arrays({{batch, length, queries, dim}, past, past}, {mx::float32, mx::float32, mx::float32},
                                        std::make_shared<SplitHeads>(stream, options), inputs);
  for (auto& output : outputs) output = mx::astype(output, qkv.dtype(), stream);
  return outputs;
}

std::vector<mx::array> attention(const mx::array& queries, const std::vector<mx::array>& keys,
                                 const std::vector<mx::array>& values, const Optional& mask, AttentionOptions options) {
  auto [scale, causal, total, packing] = options;
  require(queries.ndim() == 4 && keys.size() == size_t(options.parts()) && values.size() == keys.size(),
          "attention takes queries of four dimensions, and keys and values alike.");
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
  auto outputs = mx::array::make_arrays(
      {{batch * length, heads * dim}, {batch, heads, length}}, {mx::float32, mx::float32},
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
              keys.shape(0) == queries.shape(0) && keys.shape(3) == queries.shape(3) && mixed.size() == queries.size() &&
              gradient.size() == queries.size() && keys.size() > 0 && queries.size() > 0 &&
              queries.shape(2) % keys.shape(1) == 0 &&
              sums.size() * queries.shape(3) == queries.size(),
          "what attention gave does not fit its inputs.");
  Arrays inputs = {queries, keys, values};
  if (mask) inputs.push_back(flat_mask(*mask, queries.shape(0), queries.shape(1), options.total));
  inputs.insert(inputs.end(), {mixed, sums, gradient});
  return mx::array::make_arrays({queries.shape(), keys.shape(), values.shape()}, {mx::float32, mx::float32, mx::float32},
                                std::make_shared<AttentionKernel>(cpu_stream(), options, mask.has_value(), true), inputs);
}

}  // namespace openelm
