// Products with weight matrices, and rows of packed embeddings, as MLX operations.

#include "kernel.h"
#include "matmul.h"
#include "rows.h"

namespace openelm {

namespace {

mx::array in_mlx(const Arrays& in, bool transpose, Packing packing) {
  auto stream = cpu_stream();
  if (!packing.bits) {
    auto weight = as_float(in[1]);
    return mx::matmul(in[0], transpose ? mx::transpose(weight, stream) : weight, stream);
  }
  return mx::quantized_matmul(in[0], in[1], as_float(in[2]), as_float(in[3]), transpose, packing.group, packing.bits,
                              "affine", stream);
}

// Inputs: x, weight, and if that is packed, scales and biases.
class Product : public Kernel {
 public:
  Product(mx::Stream stream, Packing packing, bool transpose)
      : Kernel(stream, [=](const Arrays& in) -> Arrays { return {in_mlx(in, transpose, packing)}; }),
        packing_(packing),
        transpose_(transpose) {}

  const char* name() const override { return "Product"; }

  void eval_cpu(const Arrays& inputs, Arrays& outputs) override {
    auto x = dense(inputs[0]);
    Matrix m = matrix(projection_at(inputs, 1, packing_));
    int64_t width = outputs[0].shape(-1), rows = width ? outputs[0].size() / width : 0, depth = x.shape(-1);
    int64_t length = x.ndim() > 1 ? x.shape(-2) : 1;
    dispatch([=, y = allocate(outputs[0]), from = x.data<float>(), transposed = !transpose_, round = packing_.round] {
      std::memset(y, 0, rows * width * sizeof(float));
      if (!rows || !depth) return;
      if (transposed) {
        many_rows(m, width, depth, from, rows, y, true);
      } else {
        multiply(m, from, rows, length, y, round);
      }
    });
  }

  Arrays vjp(const Arrays& primals, const Arrays& cotangents, const std::vector<int>& argnums,
             const Arrays& outputs) override {
    Arrays gradients;
    for (int i : argnums) {
      if (i > 0) {
        gradients.push_back(Kernel::vjp(primals, cotangents, {i}, outputs)[0]);
        continue;
      }
      Arrays inputs = primals;
      inputs[0] = cotangents[0];
      auto exact = std::make_shared<Product>(stream(), Packing{packing_.bits, packing_.group}, !transpose_);
      gradients.emplace_back(primals[0].shape(), mx::float32, exact, inputs);
    }
    return gradients;
  }

 private:
  Packing packing_;
  bool transpose_;
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
    auto tokens = dense(inputs[0]);
    Matrix m = matrix(projection_at(inputs, 1, packing_));
    dispatch([=, y = allocate(outputs[0]), ids = tokens.data<int32_t>(), count = int64_t(tokens.size())] {
      for (int64_t i = 0; i < count; i++) {
        // As in MLX, negative tokens count from the end; others out of range are not read.
        int64_t id = ids[i] < 0 ? ids[i] + m.rows : ids[i];
        id = id < 0 ? 0 : id < m.rows ? id : m.rows - 1;
        open(m, id, 1, 0, m.columns, y + i * m.columns, m.columns);
      }
    });
  }

 private:
  Packing packing_;
};

}  // namespace

void multiply(const Matrix& m, const float* x, int64_t rows, int64_t length, float* y, bool round) {
  if (length < kManyRows) return few_rows(m, x, rows, y, round);
  many_rows(m, m.rows, m.columns, x, rows, y, false);
}

mx::array product(const mx::array& x, const Projection& projection) {
  require(x.ndim() >= 1, "a product takes x [..., in].");
  Arrays inputs = {as_float(x)};
  require(add_projection(projection, inputs) == x.shape(-1), "x and weight do not fit.");
  auto shape = x.shape();
  shape.back() = projection.weight.shape(0);
  auto primitive = std::make_shared<Product>(cpu_stream(), projection.packing, true);
  return mx::astype(mx::array(std::move(shape), mx::float32, primitive, std::move(inputs)), x.dtype(), cpu_stream());
}

mx::array lookup(const mx::array& tokens, const Projection& embedding) {
  Arrays inputs = {mx::astype(tokens, mx::int32, cpu_stream())};
  require(embedding.packing.bits, "rows are looked up in packed embeddings.");
  auto shape = tokens.shape();
  shape.push_back(add_projection(embedding, inputs));
  auto primitive = std::make_shared<Lookup>(cpu_stream(), embedding.packing);
  return mx::array(std::move(shape), mx::float32, primitive, std::move(inputs));
}

}  // namespace openelm
