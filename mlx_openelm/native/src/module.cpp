// The Python module `mlx_openelm.native.kernels`.

#include <nanobind/nanobind.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include "primitives.h"
#include "threads.h"

namespace nb = nanobind;
using namespace nb::literals;
using openelm::Optional;
using Array = const openelm::mx::array&;
using Arrays = const std::vector<openelm::mx::array>&;

// A `Projection` as Python passes it: weight, scales, biases, bits, group size, and whether rows may be rounded.
using Stored = std::tuple<openelm::mx::array, Optional, Optional, int, int, bool>;

openelm::Projection projection(const Stored& stored) {
  auto& [weight, scales, biases, bits, group_size, round] = stored;
  return {weight, scales, biases, {bits, group_size, round}};
}

NB_MODULE(kernels, m) {
  m.def(
      "linear",
      [](Array x, const Stored& stored) { return openelm::product(x, projection(stored)); }, "x"_a, "stored"_a);
  m.def("log_softmax", &openelm::log_softmax, "x"_a);
  m.def(
      "lookup",
      [](Array tokens, const Stored& stored) { return openelm::lookup(tokens, projection(stored)); }, "tokens"_a,
      "stored"_a);
  m.def("rms_norm", &openelm::rms_norm, "x"_a, "weight"_a, "eps"_a);
  m.def("swiglu", &openelm::swiglu, "x"_a);
  m.def("split_heads", &openelm::split_heads, "qkv"_a, "table"_a, "query_weight"_a.none(), "key_weight"_a.none(),
        "keys"_a.none(), "values"_a.none(), "queries"_a, "kv"_a, "eps"_a, "start"_a);
  m.def(
      "attention",
      [](Array queries, Arrays keys, Arrays values, float scale, bool causal, const Optional& mask, int total, int bits,
         int group_size) {
        return openelm::attention(queries, keys, values, mask, {scale, causal, total, {bits, group_size}});
      },
      "queries"_a, "keys"_a, "values"_a, "scale"_a, "causal"_a, "mask"_a.none(), "total"_a, "bits"_a = 0,
      "group_size"_a = 0);
  m.def(
      "attention_gradient",
      [](Array queries, Array keys, Array values, Array mixed, Array sums, Array gradient, float scale, bool causal,
         const Optional& mask) {
        int total = keys.ndim() == 4 ? keys.shape(2) : 0;
        return openelm::attention_gradient(queries, keys, values, mixed, sums, gradient, mask,
                                           {scale, causal, total, {}});
      },
      "queries"_a, "keys"_a, "values"_a, "mixed"_a, "sums"_a, "gradient"_a, "scale"_a, "causal"_a, "mask"_a.none());
  m.def(
      "layer",
      [](Array x, Array table, Array keys, Array values, int start, int queries, int kv, float eps, float scale,
         Arrays norms, const std::vector<Stored>& stored) {
        std::vector<openelm::Projection> projections;
        for (auto& one : stored) projections.push_back(projection(one));
        return openelm::layer(x, table, keys, values, start, queries, kv, eps, scale, norms, projections);
      },
      "x"_a, "table"_a, "keys"_a, "values"_a, "start"_a, "queries"_a, "kv"_a, "eps"_a, "scale"_a, "norms"_a,
      "projections"_a);
  m.def(
      "step_attention",
      [](Array qkv, Array table, Arrays keys, Arrays values, const std::vector<int>& starts,
         const std::vector<int>& lengths, Arrays after, int queries, int kv, float eps, float scale, Arrays norms) {
        return openelm::step_attention(qkv, table, {keys, values, starts, lengths, after}, queries, kv, eps, scale,
                                       norms);
      },
      "qkv"_a, "table"_a, "keys"_a, "values"_a, "starts"_a, "lengths"_a, "after"_a, "queries"_a, "kv"_a, "eps"_a,
      "scale"_a, "norms"_a);
  m.def(
      "step_layer",
      [](Array x, Array table, Arrays keys, Arrays values, const std::vector<int>& starts,
         const std::vector<int>& lengths, Arrays after, int queries, int kv, float eps, float scale, Arrays norms,
         const std::vector<Stored>& stored) {
        std::vector<openelm::Projection> projections;
        for (auto& one : stored) projections.push_back(projection(one));
        return openelm::step_layer(x, table, {keys, values, starts, lengths, after}, queries, kv, eps, scale, norms,
                                   projections);
      },
      "x"_a, "table"_a, "keys"_a, "values"_a, "starts"_a, "lengths"_a, "after"_a, "queries"_a, "kv"_a, "eps"_a,
      "scale"_a, "norms"_a, "projections"_a);
  m.def("threads", [] { return openelm::Pool::shared().threads(); });
  m.def(
      "set_threads", [](int count) { openelm::Pool::shared().set_threads(count); }, "count"_a);
}
