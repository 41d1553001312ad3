// The Python module `mlx_openelm.native.kernels`.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/vector.h>

#include "primitives.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;

NB_MODULE(kernels, m) {
  m.def(
      "linear",
      [](const openelm::mx::array& x, const openelm::mx::array& weight, const openelm::Optional& residual,
         const openelm::Optional& norm, float eps, bool gated) {
        return openelm::product(x, weight, {}, {}, {}, {norm, eps, gated, residual});
      },
      "x"_a, "weight"_a, "residual"_a = nb::none(), "norm"_a = nb::none(), "eps"_a = 0.0f, "gated"_a = false);
  m.def(
      "quantized_linear",
      [](const openelm::mx::array& x, const openelm::mx::array& weight, const openelm::mx::array& scales,
         const openelm::mx::array& biases, int bits, int group_size, bool round, const openelm::Optional& residual,
         const openelm::Optional& norm, float eps, bool gated) {
        return openelm::product(x, weight, scales, biases, {bits, group_size, round}, {norm, eps, gated, residual});
      },
      "x"_a, "weight"_a, "scales"_a, "biases"_a, "bits"_a, "group_size"_a, "round"_a, "residual"_a = nb::none(),
      "norm"_a = nb::none(), "eps"_a = 0.0f, "gated"_a = false);
  m.def("log_softmax", &openelm::log_softmax, "x"_a);
  m.def(
      "lookup",
      [](const openelm::mx::array& tokens, const openelm::mx::array& weight, const openelm::mx::array& scales,
         const openelm::mx::array& biases, int bits, int group_size) {
        return openelm::lookup(tokens, weight, scales, biases, {bits, group_size});
      },
      "tokens"_a, "weight"_a, "scales"_a, "biases"_a, "bits"_a, "group_size"_a);
  m.def("rms_norm", &openelm::rms_norm, "x"_a, "weight"_a, "eps"_a);
  m.def("swiglu", &openelm::swiglu, "x"_a);
  m.def("split_heads", &openelm::split_heads, "qkv"_a, "table"_a, "query_weight"_a.none(), "key_weight"_a.none(),
        "keys"_a.none(), "values"_a.none(), "queries"_a, "kv"_a, "eps"_a, "start"_a);
  m.def(
      "attention",
      [](const openelm::mx::array& queries, const std::vector<openelm::mx::array>& keys,
         const std::vector<openelm::mx::array>& values, float scale, bool causal, const openelm::Optional& mask,
         int total, int bits, int group_size) {
        return openelm::attention(queries, keys, values, mask, {scale, causal, total, {bits, group_size}});
      },
      "queries"_a, "keys"_a, "values"_a, "scale"_a, "causal"_a, "mask"_a.none(), "total"_a, "bits"_a = 0,
      "group_size"_a = 0);
  m.def(
      "attention_gradient",
      [](const openelm::mx::array& queries, const openelm::mx::array& keys, const openelm::mx::array& values,
         const openelm::mx::array& mixed, const openelm::mx::array& sums, const openelm::mx::array& gradient,
         float scale, bool causal, const openelm::Optional& mask) {
        int total = keys.ndim() == 4 ? keys.shape(2) : 0;
        return openelm::attention_gradient(queries, keys, values, mixed, sums, gradient, mask,
                                           {scale, causal, total, {}});
      },
      "queries"_a, "keys"_a, "values"_a, "mixed"_a, "sums"_a, "gradient"_a, "scale"_a, "causal"_a, "mask"_a.none());
  m.def("threads", [] { return openelm::Pool::shared().threads(); });
  m.def(
      "set_threads", [](int count) { openelm::Pool::shared().set_threads(count); }, "count"_a);
}
