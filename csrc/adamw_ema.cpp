// heptapod_fast::adamw_ema: the schema and the CPU implementation. heptapod_fast/ops/adamw_ema.py
// defines what it computes. Memory is touched once: a thread takes a chunk of one tensor and walks
// it in pieces that stay in its L1 cache between the update, the averages and the rounded copy.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "adamw_ema.h"
#include "bfloat16.h"
#include "clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kPiece = 1024;       // elements; p, m, v, g and one average of it: 20 KB
constexpr int64_t kChunk = 16 * kPiece; // elements handed to a thread at a time

struct Rates {
  float grad_scale, first, beta2, second, step_size, root_correction, eps;
};

// torch.lerp's two forms: each is exact at its own end.
inline float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

HEPTAPOD_CLONES void update(float* __restrict p, float* __restrict m, float* __restrict v,
                            const float* __restrict g, int64_t n, float decay, const Rates& rates) {
  const Rates r = rates;
  for (int64_t i = 0; i < n; ++i) {
    const float grad = g[i] * r.grad_scale;
    const float mean = lerp(m[i], grad, r.first);
    const float square = v[i] * r.beta2 + (r.second * grad) * grad;
    const float denominator = std::sqrt(square) / r.root_correction + r.eps;
    m[i] = mean;
    v[i] = square;
    p[i] = p[i] * decay - (r.step_size * mean) / denominator;
  }
}

HEPTAPOD_CLONES void average(float* __restrict ema, const float* __restrict p, int64_t n,
                             float weight) {
  for (int64_t i = 0; i < n; ++i) ema[i] = lerp(ema[i], p[i], weight);
}

// float32 -> bfloat16, round to nearest even, NaN to 0x7fc0 as PyTorch does.
HEPTAPOD_CLONES void narrow(uint16_t* __restrict to, const float* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    uint32_t bits;
    std::memcpy(&bits, &from[i], sizeof bits);
    const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    to[i] = static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? 0x7fc0u : rounded);
  }
}

struct Slot {
  float *p, *m, *v;
  const void* g;
  float* const* ema;
  uint16_t* copy;
  float decay;
};

struct Chunk {
  const Slot* slot;
  int64_t begin, end;
};

void run(const Chunk& chunk, bool bf16_grads, const std::vector<float>& weights,
         const Rates& rates) {
  const Slot& s = *chunk.slot;
  alignas(64) float wide[kPiece];
  for (int64_t at = chunk.begin; at < chunk.end; at += kPiece) {
    const int64_t n = std::min(kPiece, chunk.end - at);
    const float* grad = wide;
    if (bf16_grads)
      widen(wide, static_cast<const uint16_t*>(s.g) + at, n);
    else
      grad = static_cast<const float*>(s.g) + at;
    update(s.p + at, s.m + at, s.v + at, grad, n, s.decay, rates);
    for (size_t e = 0; e < weights.size(); ++e) average(s.ema[e] + at, s.p + at, n, weights[e]);
    if (s.copy != nullptr) narrow(s.copy + at, s.p + at, n);
  }
}

const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
float* write(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }

void adamw_ema_cpu(std::vector<Tensor> params, std::vector<Tensor> grads,
                   std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                   std::vector<Tensor> emas, std::vector<Tensor> copies, Tensor lr, Tensor step,
                   Tensor grad_scale, Tensor ema_decays, std::vector<double> weight_decays,
                   double beta1, double beta2, double eps) {
  const size_t n = params.size(), k = static_cast<size_t>(ema_decays.numel());
  STD_TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                      emas.size() == n * k && weight_decays.size() == n &&
                      (copies.empty() || copies.size() == n),
                  "adamw_ema: lists of different lengths");
  heptapod::check_scalars(lr, step, grad_scale, ema_decays);
  const float scale = *read(grad_scale);
  if (n == 0 || scale == 0.0f) return;
  const double rate = *read(lr), now = *read(step);
  const double correction1 = -std::expm1(now * std::log(beta1));
  const double correction2 = -std::expm1(now * std::log(beta2));
  const Rates rates{scale,
                    static_cast<float>(1.0 - beta1),
                    static_cast<float>(beta2),
                    static_cast<float>(1.0 - beta2),
                    static_cast<float>(rate / correction1),
                    static_cast<float>(std::sqrt(correction2)),
                    static_cast<float>(eps)};
  std::vector<float> weights;
  for (size_t e = 0; e < k; ++e) weights.push_back(1.0f - read(ema_decays)[e]);

  std::vector<Slot> slots(n);
  std::vector<float*> addresses(n * k);
  std::vector<Chunk> chunks;
  for (size_t i = 0; i < n; ++i) {
    Slot& s = slots[i];
    s = Slot{write(params[i]), write(exp_avgs[i]), write(exp_avg_sqs[i]),
             grads[i].const_data_ptr(), addresses.data() + i * k, nullptr,
             static_cast<float>(1.0 - rate * weight_decays[i])};
    for (size_t e = 0; e < k; ++e) addresses[i * k + e] = write(emas[e * n + i]);
    if (!copies.empty()) s.copy = static_cast<uint16_t*>(copies[i].mutable_data_ptr());
    const int64_t size = params[i].numel();
    for (int64_t at = 0; at < size; at += kChunk)
      chunks.push_back({&s, at, std::min(at + kChunk, size)});
  }
  const bool bf16_grads = grads[0].scalar_type() == ScalarType::BFloat16;
  torch::stable::parallel_for(0, static_cast<int64_t>(chunks.size()), 1,
                              [&](int64_t begin, int64_t end) {
                                for (int64_t c = begin; c < end; ++c)
                                  run(chunks[c], bf16_grads, weights, rates);
                              });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heptapod_fast, m) {
  m.def(
      "adamw_ema(Tensor(a!)[] params, Tensor[] grads, Tensor(b!)[] exp_avgs, "
      "Tensor(c!)[] exp_avg_sqs, Tensor(d!)[] emas, Tensor(e!)[] copies, Tensor lr, Tensor step, "
      "Tensor grad_scale, Tensor ema_decays, float[] weight_decays, float beta1, float beta2, "
      "float eps) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CPU, m) {
  m.impl("adamw_ema", TORCH_BOX(&adamw_ema_cpu));
}
