// What both implementations of adamw_ema ask of the tensors that all parameters share.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

namespace heptapod {

// They are read as plain arrays of float: another dtype or stride would be misread in silence.
inline void check_scalars(const torch::stable::Tensor& lr, const torch::stable::Tensor& step,
                          const torch::stable::Tensor& grad_scale,
                          const torch::stable::Tensor& ema_decays) {
  using torch::headeronly::ScalarType;
  for (const auto* scalar : {&lr, &step, &grad_scale})
    STD_TORCH_CHECK(scalar->scalar_type() == ScalarType::Float && scalar->numel() == 1,
                    "adamw_ema: lr, step and grad_scale are float32, one element each");
  STD_TORCH_CHECK(ema_decays.scalar_type() == ScalarType::Float && ema_decays.is_contiguous(),
                  "adamw_ema: ema_decays are float32 and contiguous");
}

}  // namespace heptapod
