// heptapod_fast::layer_norm_cpu, add_layer_norm_cpu and layer_norm_backward_cpu: the schemas and the
// operators; heptapod_fast/ops/layer_norm.py defines what they compute.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows_tensors.h"

namespace {

using namespace heptapod::rows;

// x, and what is added to it.
struct Sum {
  const void* x;
  const void* branch = nullptr;
  const float* branch_bias = nullptr;
  Mask mask = {};
  void* total = nullptr;
};

// Fills y and stats.
void normalise(const Block& all, const Sum& sum, const std::optional<Tensor>& weight,
               const std::optional<Tensor>& bias, double eps, Tensor& y, Tensor& stats) {
  STD_TORCH_CHECK(weight.has_value() == bias.has_value(),
                  "layer_norm: weight and bias together, or neither");
  const float* scale = parameter(weight, all.width, "layer_norm");
  const float* shift = parameter(bias, all.width, "layer_norm");
  void* to = y.mutable_data_ptr();
  auto* of_rows = static_cast<float*>(stats.mutable_data_ptr());
  for_rows(all, [&](const Block& rows) {
    std::vector<float> room(all.width);
    kernels().layer_norm(rows, sum.mask, sum.total, to, of_rows, sum.x, sum.branch,
                         sum.branch_bias, scale, shift, static_cast<float>(eps), room.data());
  });
}

Tensor new_floats(const Tensor& x, int64_t rows, int64_t columns) {
  return torch::stable::new_empty(x, std::vector<int64_t>{rows, columns}, ScalarType::Float);
}

std::tuple<Tensor, Tensor> layer_norm_cpu(const Tensor& x, const std::optional<Tensor>& weight,
                                          const std::optional<Tensor>& bias, double eps) {
  const Block all = rows_of(x, "layer_norm");
  Tensor y = torch::stable::empty_like(x);
  Tensor stats = new_floats(x, all.end, 2);
  normalise(all, Sum{x.const_data_ptr()}, weight, bias, eps, y, stats);
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> add_layer_norm_cpu(
    const Tensor& x, const Tensor& branch, const std::optional<Tensor>& branch_bias,
    const std::optional<Tensor>& weight, const std::optional<Tensor>& bias,
    const std::optional<Tensor>& key, const std::optional<Tensor>& counter, double p, double eps) {
  const Block all = rows_of(x, "add_layer_norm");
  Tensor total = torch::stable::empty_like(x);
  Tensor y = torch::stable::empty_like(x);
  Tensor stats = new_floats(x, all.end, 2);
  const Sum sum{x.const_data_ptr(), like(branch, x, "add_layer_norm"),
                parameter(branch_bias, all.width, "add_layer_norm"),
                mask_of(key, counter, p, all), total.mutable_data_ptr()};
  normalise(all, sum, weight, bias, eps, y, stats);
  return {total, y, stats};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_backward_cpu(
    const Tensor& grad, const std::optional<Tensor>& grad_sum, const Tensor& total,
    const Tensor& stats, const std::optional<Tensor>& weight, const std::optional<Tensor>& key,
    const std::optional<Tensor>& counter, double p, bool branch_bias) {
  const char* what = "layer_norm_backward";
  const Block all = rows_of(total, what);
  STD_TORCH_CHECK(stats.is_contiguous() && stats.scalar_type() == ScalarType::Float &&
                      stats.numel() == 2 * all.end,
                  what, ": contiguous float32 statistics of every row only");
  const void* upstream = like(grad, total, what);
  const void* beside = grad_sum.has_value() ? like(*grad_sum, total, what) : nullptr;
  const float* scale = parameter(weight, all.width, what);
  const Mask mask = mask_of(key, counter, p, all);

  const bool is_dropped = key.has_value();
  const int64_t sums = (scale == nullptr ? 0 : 2) + (branch_bias ? 1 : 0);
  Tensor dx = torch::stable::empty_like(total);
  Tensor dbranch = is_dropped ? torch::stable::empty_like(total)
                              : torch::stable::new_empty(total, std::vector<int64_t>{0});
  Tensor columns = new_floats(total, sums, all.width);

  const void* stream = total.const_data_ptr();
  const auto* of_rows = static_cast<const float*>(stats.const_data_ptr());
  void* to = dx.mutable_data_ptr();
  void* to_branch = is_dropped ? dbranch.mutable_data_ptr() : nullptr;
  for_rows_and_sums(all, sums * all.width, static_cast<float*>(columns.mutable_data_ptr()),
                    [&](const Block& rows, float* sum) {
                      std::vector<float> room(2 * all.width);
                      kernels().layer_norm_backward(rows, mask, to, to_branch, sum, upstream,
                                                    beside, stream, of_rows, scale, branch_bias,
                                                    room.data());
                    });
  return {dx, dbranch, columns};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heptapod_fast, m) {
  m.def("layer_norm_cpu(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_cpu(Tensor x, Tensor branch, Tensor? branch_bias, Tensor? weight, "
      "Tensor? bias, Tensor? key, Tensor? counter, float p, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_backward_cpu(Tensor grad, Tensor? grad_sum, Tensor total, Tensor stats, "
      "Tensor? weight, Tensor? key, Tensor? counter, float p, bool branch_bias) "
      "-> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CPU, m) {
  m.impl("layer_norm_cpu", TORCH_BOX(&layer_norm_cpu));
  m.impl("add_layer_norm_cpu", TORCH_BOX(&add_layer_norm_cpu));
  m.impl("layer_norm_backward_cpu", TORCH_BOX(&layer_norm_backward_cpu));
}
