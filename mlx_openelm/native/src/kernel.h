// The base of our MLX operations: a kernel that runs on the CPU stream, and checks of its inputs.

#pragma once

#include <algorithm>
#include <chrono>
#include <condition_variable>
#include <memory>
#include <mutex>
#include <utility>

#include "matrix.h"
#include "mlx/backend/cpu/encoder.h"
#include "primitives.h"
#include "threads.h"

namespace openelm {

using Arrays = std::vector<mx::array>;
using Fallback = std::function<Arrays(const Arrays&)>;

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

inline Matrix as_matrix(const Projection& p) {
  Matrix m;
  m.data = p.weight.data<char>();
  m.bits = p.packing.bits, m.group = p.packing.group;
  m.rows = p.weight.shape(-2), m.columns = m.stride = p.weight.shape(-1);
  m.type = type_of(p.scales ? *p.scales : p.weight);
  if (p.scales) {
    m.columns = m.columns * 32 / m.bits;
    m.scales = p.scales->data<char>(), m.biases = p.biases->data<char>();
  }
  return m;
}

// The kernels that were dispatched to a stream: how many, how many have finished, and what the others will write.
class Dispatched {
 public:
  static Dispatched& to(mx::Stream stream) {
    static auto* all = new std::unordered_map<int, Dispatched>;  // never destroyed: kernels may outlive main
    static std::mutex mutex;
    std::lock_guard lock(mutex);
    return (*all)[stream.index];
  }

  // Counts memory that the next kernel will write; first waits, for a limited time, until others have finished. MLX
  // evaluates far ahead of the processor: all activations of a prompt would be in memory at once.
  void reserve(int64_t bytes) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return finished_ == started_ || bytes_ + bytes <= kMostBytes; });
    bytes_ += bytes, reserved_ += bytes;
  }

  // Counts a kernel, which must hold the returned object until it has finished or is dropped.
  std::shared_ptr<void> one_more() {
    std::lock_guard lock(mutex_);
    started_++;
    return {nullptr, [this, bytes = std::exchange(reserved_, 0)](void*) {
              std::lock_guard lock(mutex_);
              finished_++, bytes_ -= bytes;
              changed_.notify_all();
            }};
  }

  // Waits, for a limited time, until nothing else references an array, or all kernels have finished.
  void wait_for(const mx::array& a) {
    std::unique_lock lock(mutex_);
    changed_.wait_for(lock, kPatience, [&] { return a.is_donatable() || finished_ == started_; });
  }

 private:
  static constexpr std::chrono::seconds kPatience{1};
  static constexpr int64_t kMostBytes = 4 << 20;

  std::mutex mutex_;
  std::condition_variable changed_;
  int64_t started_ = 0, finished_ = 0;
  int64_t bytes_ = 0, reserved_ = 0;  // of all kernels that have not finished, and of the next one
};

// An operation on the CPU. Gradients that a kernel does not define, and MLX's other transformations, use `fallback`,
// the same mathematics in MLX's operations.
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
  // Runs `kernel` on the stream's thread, in order. MLX keeps inputs and outputs alive until then.
  template <class Call>
  void dispatch(Call&& kernel) {
    mx::cpu::get_command_encoder(stream()).dispatch(
        [kernel = std::forward<Call>(kernel), held = Dispatched::to(stream()).one_more()]() mutable { kernel(); });
  }

  // The array itself if it is contiguous, else a contiguous copy that lives as long as the kernel.
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

  Matrix matrix(const Projection& p) {
    if (!p.packing.bits) return as_matrix({dense(p.weight), {}, {}, p.packing});
    return as_matrix({dense(p.weight), dense(*p.scales), dense(*p.biases), p.packing});
  }

  // For a kernel with several outputs that writes into its inputs: each output references all inputs until MLX clears
  // that after evaluation, so buffers would seem to be in use several times.
  static void forget_inputs(const Arrays& inputs, Arrays& outputs) {
    if (std::any_of(outputs.begin(), outputs.end(), [](auto& out) { return out.is_tracer(); })) return;
    for (auto& out : outputs)
      if (&out.inputs() != &inputs) out.inputs().clear();
  }

  // `out` becomes the buffer itself if nothing else references it, else a copy.
  void append_to(const mx::array& buffer, mx::array& out) {
    // Kernels of the last token reference it until they have run, and MLX does so a moment longer; waiting costs less
    // than a copy.
    Dispatched::to(stream()).wait_for(buffer);
    for (int i = 0; i < kPatience && !buffer.is_donatable(); i++) pause_briefly();
    if (buffer.is_donatable() && buffer.flags().row_contiguous) return out.copy_shared_buffer(buffer);
    auto from = dense(buffer);
    dispatch([to = allocate(out), from = from.data<float>(), bytes = out.nbytes()] { std::memcpy(to, from, bytes); });
  }

  float* allocate(mx::array& out) {
    Dispatched::to(stream()).reserve(out.nbytes());
    out.set_data(mx::allocator::malloc(out.nbytes()));
    return out.data<float>();
  }

 private:
  static constexpr int kPatience = 4000;  // pauses: about 50 microseconds

  // The inputs with these numbers, and the fallback as a function of them alone. Others may not be differentiable, such
  // as packed weights.
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

// y [rows, m.rows] += x [rows, m.columns] times m transposed. `length`, the number of positions of each sequence among
// the rows, decides how: a row of a few positions may be rounded, and gets the same numbers whatever the other rows
// are. Defined in one file, as it has hundreds of cases.
void multiply(const Matrix& m, const float* x, int64_t rows, int64_t length, float* y, bool round);

// Checks that packed weights, scales and biases fit together, and that the packing is supported.
inline void check_packing(const mx::array& weight, const mx::array& scales, const mx::array& biases, Packing packing) {
  static const std::vector<int> bits = {2, 3, 4, 5, 6, 8}, groups = {32, 64, 128};
  auto among = [](const std::vector<int>& all, int one) { return std::find(all.begin(), all.end(), one) != all.end(); };
  require(among(bits, packing.bits) && among(groups, packing.group),
          "bits are 2, 3, 4, 5, 6 or 8, groups 32, 64 or 128.");
  require(weight.dtype() == mx::uint32 && scales.dtype() == biases.dtype() && scales.shape() == biases.shape(),
          "packed weights must be uint32, and scales and biases of the same type and shape.");
  int64_t columns = int64_t(weight.shape(-1)) * 32 / packing.bits;
  require(columns == int64_t(scales.shape(-1)) * packing.group && weight.shape(-2) == scales.shape(-2),
          "packed weights and scales do not fit.");
  type_of(scales);
}

// Checks a projection's arrays and appends them to inputs; returns its number of columns.
inline int64_t add_projection(const Projection& p, Arrays& inputs) {
  require(p.weight.ndim() == 2, "a weight matrix has two dimensions.");
  inputs.push_back(p.weight);
  if (!p.packing.bits) {
    type_of(p.weight);
    return p.weight.shape(1);
  }
  require(p.scales && p.biases, "packed weights have scales and biases.");
  check_packing(p.weight, *p.scales, *p.biases, p.packing);
  inputs.insert(inputs.end(), {*p.scales, *p.biases});
  return int64_t(p.weight.shape(1)) * 32 / p.packing.bits;
}

// The projection whose arrays start at inputs[first].
inline Projection projection_at(const Arrays& inputs, size_t first, Packing packing) {
  if (!packing.bits) return {inputs[first], {}, {}, packing};
  return {inputs[first], inputs[first + 1], inputs[first + 2], packing};
}

}  // namespace openelm
