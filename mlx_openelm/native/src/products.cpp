// Products with weight matrices, and rows of packed embeddings, as operations of MLX.

#include "elementwise.h"
#include "kernel.h"
#include "matmul.h"
#include "rows.h"

namespace openelm {

namespace {

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
      : Kernel(stream,
               [=](const Arrays& in) -> Arrays {
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
        packing_(packing),
        stage_(stage),
        transpose_(transpose),
        residual_(residual) {}

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
      : Kernel(stream,
               [=](const Arrays& in) -> Arrays {
                 auto rows = [&](int i) { return mx::take(in[i], in[0], 0, cpu_stream()); };
                 return {mx::dequantize(rows(1), as_float(rows(2)), as_float(rows(3)), packing.group, packing.bits,
                                        "affine", std::nullopt, std::nullopt, cpu_stream())};
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

}  // namespace openelm
