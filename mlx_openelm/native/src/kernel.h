// What the operations of MLX are built on: a kernel that runs on the CPU's stream, and checks of what it is given.

#pragma once

#include <algorithm>

#include "matrix.h"
#include "mlx/backend/cpu/encoder.h"
#include "primitives.h"

namespace openelm {

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
        for (int axis = int(shape.size()) - 1; axis >= 0; axis--)
          at += rest % shape[axis] * strides[axis], rest /= shape[axis];
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

inline mx::Stream cpu_stream() { return mx::default_stream(mx::Device::cpu); }

inline mx::array as_float(const mx::array& a) { return mx::astype(a, mx::float32, cpu_stream()); }

inline Type type_of(const mx::array& a) {
  if (a.dtype() == mx::bfloat16) return Type::bfloat16;
  if (a.dtype() == mx::float16) return Type::float16;
  if (a.dtype() == mx::float32) return Type::float32;
  throw std::invalid_argument("mlx_openelm.native: numbers are float32, float16 or bfloat16.");
}

inline void require(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(std::string("mlx_openelm.native: ") + what);
}

inline Matrix as_matrix(const mx::array& weight, const mx::array* scales, const mx::array* biases, Packing packing) {
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
inline void check_packing(const mx::array& weight, const mx::array& scales, const mx::array& biases, Packing packing) {
  static const std::vector<int> bits = {2, 3, 4, 5, 6, 8}, groups = {32, 64, 128};
  auto among = [](const std::vector<int>& all, int one) { return std::find(all.begin(), all.end(), one) != all.end(); };
  require(among(bits, packing.bits) && among(groups, packing.group),
          "bits are 2, 3, 4, 5, 6 or 8, groups 32, 64 or 128.");
  require(weight.dtype() == mx::uint32 && scales.dtype() == biases.dtype() && scales.shape() == biases.shape(),
          "packed weights are uint32, their scales and biases alike.");
  int64_t columns = int64_t(weight.shape(-1)) * 32 / packing.bits;
  require(columns == int64_t(scales.shape(-1)) * packing.group && weight.shape(-2) == scales.shape(-2),
          "packed weights and scales do not fit.");
  type_of(scales);
}

}  // namespace openelm
