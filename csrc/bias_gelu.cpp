// heptapod_fast::bias_gelu_cpu and bias_gelu_backward_cpu: the schemas and the operators;
// heptapod_fast/ops/bias_gelu.py defines what they compute.

#include <torch/csrc/stable/library.h>

#include <tuple>

#include "rows_tensors.h"

namespace {

using namespace heptapod::rows;

Tensor bias_gelu_cpu(const Tensor& x, const Tensor& bias, const std::optional<Tensor>& key,
                     const std::optional<Tensor>& counter, double p, bool silu) {
  const Block all = rows_of(x, "bias_gelu");
  const float* shift = parameter(bias, all.width, "bias_gelu");
  const Mask mask = mask_of(key, counter, p, all);
  Tensor y = torch::stable::empty_like(x);
  void* to = y.mutable_data_ptr();
  const void* from = x.const_data_ptr();
  for_rows(all, [&](const Block& rows) { kernels().bias_gelu(rows, mask, silu, to, from, shift); });
  return y;
}

std::tuple<Tensor, Tensor> bias_gelu_backward_cpu(const Tensor& grad, const Tensor& x,
                                                  const Tensor& bias,
                                                  const std::optional<Tensor>& key,
                                                  const std::optional<Tensor>& counter, double p,
                                                  bool silu) {
  const Block all = rows_of(x, "bias_gelu_backward");
  const void* upstream = like(grad, x, "bias_gelu_backward");
  const float* shift = parameter(bias, all.width, "bias_gelu_backward");
  const Mask mask = mask_of(key, counter, p, all);
  Tensor dx = torch::stable::empty_like(x);
  Tensor dbias = torch::stable::empty_like(bias);
  void* to = dx.mutable_data_ptr();
  const void* from = x.const_data_ptr();
  for_rows_and_sums(all, all.width, static_cast<float*>(dbias.mutable_data_ptr()),
                    [&](const Block& rows, float* sum) {
                      kernels().bias_gelu_backward(rows, mask, silu, to, sum, upstream, from,
                                                   shift);
                    });
  return {dx, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heptapod_fast, m) {
  m.def(
      "bias_gelu_cpu(Tensor x, Tensor bias, Tensor? key, Tensor? counter, float p, bool silu) "
      "-> Tensor");
  m.def(
      "bias_gelu_backward_cpu(Tensor grad, Tensor x, Tensor bias, Tensor? key, Tensor? counter, "
      "float p, bool silu) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CPU, m) {
  m.impl("bias_gelu_cpu", TORCH_BOX(&bias_gelu_cpu));
  m.impl("bias_gelu_backward_cpu", TORCH_BOX(&bias_gelu_backward_cpu));
}
