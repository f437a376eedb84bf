// heptapod_fast::adamw_ema on CUDA. heptapod_fast/ops/adamw_ema.py defines what it computes.
//
// Every address is read and written once, sixteen bytes at a time where all of a tensor's addresses
// allow it; averages beyond the fourth take further passes over the parameters, four at a time.
// Learning rate, step, gradient scale and decays are read on the device. No atomics: the same bits
// every time. See multi_tensor.cuh for how tensors are found.

#include "adamw_ema.h"
#include "cuda_common.h"
#include "multi_tensor.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using heptapod::aligned;
using heptapod::load4;
using heptapod::store4;
using heptapod::Table;
using heptapod::to_float;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int kMostAverages = 4;  // in one pass: more of them would cost occupancy
// Elements; a multiple of 4, so that chunks keep the alignment. Small enough that the last blocks
// to run do not leave the GPU idle for long, large enough to hide a block's start.
constexpr int64_t kChunk = 1 << 14;

template <int K>
struct Slot {
  float *p, *m, *v;
  const void* g;
  __nv_bfloat16* copy;
  float* ema[K > 0 ? K : 1];
  int64_t numel;
  double weight_decay;  // as the CPU and the reference have it
  bool vectors;         // every address is aligned for four elements at once
};

template <int K>
struct AverageSlot {
  const float* p;
  float* ema[K];
  int64_t numel;
  bool vectors;
};

struct Rates {
  const float *lr, *step, *grad_scale, *ema_decays;
  double log_beta1, log_beta2;
  float first, beta2, second, eps;
};

// What one block works with.
struct Plan {
  int slot;
  float decay, step_size, root_correction;
};

// torch.lerp's two forms: each is exact at its own end.
__device__ __forceinline__ float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

__device__ __forceinline__ void update(float& p, float& m, float& v, float g, float grad_scale,
                                       const Plan& plan, const Rates& r) {
  const float grad = g * grad_scale;
  m = lerp(m, grad, r.first);
  v = v * r.beta2 + (r.second * grad) * grad;
  p = p * plan.decay - (plan.step_size * m) / (sqrtf(v) / plan.root_correction + r.eps);
}

// Three warps make one part each: none of them is quick, and all the block waits.
template <int K>
__device__ __forceinline__ void make_plan(Plan& plan, const Table<Slot<K>>& table, const Rates& r) {
  if (threadIdx.x == 0) {
    plan.slot = heptapod::find_slot(table, static_cast<int>(blockIdx.x));
    const double lr = *r.lr;
    plan.decay = static_cast<float>(1.0 - lr * table.slot[plan.slot].weight_decay);
  } else if (threadIdx.x == 32) {
    const double lr = *r.lr, step = *r.step;
    plan.step_size = static_cast<float>(lr / -expm1(step * r.log_beta1));
  } else if (threadIdx.x == 64) {
    const double step = *r.step;
    plan.root_correction = static_cast<float>(sqrt(-expm1(step * r.log_beta2)));
  }
}

template <int K, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table<Slot<K>> table, const Rates r) {
  const float grad_scale = *r.grad_scale;
  if (grad_scale == 0.0f) return;  // a skipped step leaves every bit as it is
  __shared__ Plan shared;
  make_plan<K>(shared, table, r);
  __syncthreads();
  const Plan plan = shared;
  const Slot<K>& s = table.slot[plan.slot];
  const int64_t begin =
      (static_cast<int>(blockIdx.x) - table.first_chunk[plan.slot]) * kChunk;
  const int n = static_cast<int>(min(kChunk, s.numel - begin));
  float* const p = s.p + begin;
  float* const m = s.m + begin;
  float* const v = s.v + begin;
  const G* const g = static_cast<const G*>(s.g) + begin;
  float weight[K > 0 ? K : 1];
#pragma unroll
  for (int e = 0; e < K; ++e) weight[e] = 1.0f - r.ema_decays[e];

  const int in_vectors = s.vectors ? n / 4 * 4 : 0;
  for (int i = threadIdx.x * 4; i < in_vectors; i += kThreads * 4) {
    float p4[4], m4[4], v4[4], g4[4], ema4[K > 0 ? K : 1][4];
    load4(g4, g + i);
    load4(p4, p + i);
    load4(m4, m + i);
    load4(v4, v + i);
#pragma unroll
    for (int e = 0; e < K; ++e) load4(ema4[e], s.ema[e] + begin + i);
#pragma unroll
    for (int j = 0; j < 4; ++j) update(p4[j], m4[j], v4[j], g4[j], grad_scale, plan, r);
    store4(p + i, p4);
    store4(m + i, m4);
    store4(v + i, v4);
#pragma unroll
    for (int e = 0; e < K; ++e) {
#pragma unroll
      for (int j = 0; j < 4; ++j) ema4[e][j] = lerp(ema4[e][j], p4[j], weight[e]);
      store4(s.ema[e] + begin + i, ema4[e]);
    }
    if (s.copy != nullptr) store4(s.copy + begin + i, p4);
  }
  for (int i = in_vectors + threadIdx.x; i < n; i += kThreads) {
    float p1 = p[i], m1 = m[i], v1 = v[i];
    update(p1, m1, v1, to_float(g[i]), grad_scale, plan, r);
    p[i] = p1;
    m[i] = m1;
    v[i] = v1;
#pragma unroll
    for (int e = 0; e < K; ++e) {
      float* const ema = s.ema[e] + begin + i;
      *ema = lerp(*ema, p1, weight[e]);
    }
    if (s.copy != nullptr) s.copy[begin + i] = __float2bfloat16_rn(p1);
  }
}

// Averages alone, of parameters that the pass above has updated.
template <int K>
__global__ void __launch_bounds__(kThreads)
    average_kernel(const __grid_constant__ Table<AverageSlot<K>> table,
                   const float* __restrict__ grad_scale, const float* __restrict__ ema_decays) {
  if (*grad_scale == 0.0f) return;
  __shared__ int shared;
  if (threadIdx.x == 0) shared = heptapod::find_slot(table, static_cast<int>(blockIdx.x));
  __syncthreads();
  const int slot = shared;
  const AverageSlot<K>& s = table.slot[slot];
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_chunk[slot]) * kChunk;
  const int n = static_cast<int>(min(kChunk, s.numel - begin));
  float weight[K];
#pragma unroll
  for (int e = 0; e < K; ++e) weight[e] = 1.0f - ema_decays[e];

  const int in_vectors = s.vectors ? n / 4 * 4 : 0;
  for (int i = threadIdx.x * 4; i < in_vectors; i += kThreads * 4) {
    float p4[4], ema4[K][4];
    load4(p4, s.p + begin + i);
#pragma unroll
    for (int e = 0; e < K; ++e) load4(ema4[e], s.ema[e] + begin + i);
#pragma unroll
    for (int e = 0; e < K; ++e) {
#pragma unroll
      for (int j = 0; j < 4; ++j) ema4[e][j] = lerp(ema4[e][j], p4[j], weight[e]);
      store4(s.ema[e] + begin + i, ema4[e]);
    }
  }
  for (int i = in_vectors + threadIdx.x; i < n; i += kThreads) {
    const float p1 = s.p[begin + i];
#pragma unroll
    for (int e = 0; e < K; ++e) {
      float* const ema = s.ema[e] + begin + i;
      *ema = lerp(*ema, p1, weight[e]);
    }
  }
}

float* write(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }

struct Lists {
  const std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &emas, &copies;
  const std::vector<double>& weight_decays;

  float* ema(int64_t average, size_t i) const { return write(emas[average * params.size() + i]); }
};

template <int K, typename G>
void fill(Slot<K>& s, const Lists& lists, size_t i) {
  s = Slot<K>{};
  s.p = write(lists.params[i]);
  s.m = write(lists.exp_avgs[i]);
  s.v = write(lists.exp_avg_sqs[i]);
  s.g = lists.grads[i].const_data_ptr();
  s.numel = lists.params[i].numel();
  s.weight_decay = lists.weight_decays[i];
  s.vectors = aligned(s.p, 16) && aligned(s.m, 16) && aligned(s.v, 16) &&
              aligned(s.g, 4 * sizeof(G));
  for (int e = 0; e < K; ++e) {
    s.ema[e] = lists.ema(e, i);
    s.vectors = s.vectors && aligned(s.ema[e], 16);
  }
  if (!lists.copies.empty()) {
    s.copy = static_cast<__nv_bfloat16*>(lists.copies[i].mutable_data_ptr());
    s.vectors = s.vectors && aligned(s.copy, 8);
  }
}

template <int K, typename G>
void launch_update(const Lists& lists, const Rates& rates, cudaStream_t stream) {
  static_assert(sizeof(Table<Slot<K>>) + sizeof(Rates) <= heptapod::kArgumentBytes);
  heptapod::for_tables<Slot<K>>(
      lists.params, kChunk, [&](Slot<K>& s, size_t i) { fill<K, G>(s, lists, i); },
      [&](const Table<Slot<K>>& table, unsigned chunks) {
        adamw_ema_kernel<K, G><<<chunks, kThreads, 0, stream>>>(table, rates);
        heptapod::check_cuda(cudaGetLastError(), "adamw_ema: launch");
      });
}

// The averages first..first + K - 1.
template <int K>
void launch_averages(int64_t first, const Lists& lists, const Rates& rates, cudaStream_t stream) {
  heptapod::for_tables<AverageSlot<K>>(
      lists.params, kChunk,
      [&](AverageSlot<K>& s, size_t i) {
        s.p = read(lists.params[i]);
        s.numel = lists.params[i].numel();
        s.vectors = aligned(s.p, 16);
        for (int e = 0; e < K; ++e) {
          s.ema[e] = lists.ema(first + e, i);
          s.vectors = s.vectors && aligned(s.ema[e], 16);
        }
      },
      [&](const Table<AverageSlot<K>>& table, unsigned chunks) {
        average_kernel<K><<<chunks, kThreads, 0, stream>>>(table, rates.grad_scale,
                                                           rates.ema_decays + first);
        heptapod::check_cuda(cudaGetLastError(), "adamw_ema: launch of further averages");
      });
}

template <typename G>
void launch_all(int64_t averages, const Lists& lists, const Rates& rates, cudaStream_t stream) {
  static_assert(kMostAverages == 4);
  switch (averages) {
    case 0: return launch_update<0, G>(lists, rates, stream);
    case 1: return launch_update<1, G>(lists, rates, stream);
    case 2: return launch_update<2, G>(lists, rates, stream);
    case 3: return launch_update<3, G>(lists, rates, stream);
    default: launch_update<4, G>(lists, rates, stream);
  }
  for (int64_t first = kMostAverages; first < averages; first += kMostAverages) {
    switch (averages - first) {
      case 1: return launch_averages<1>(first, lists, rates, stream);
      case 2: return launch_averages<2>(first, lists, rates, stream);
      case 3: return launch_averages<3>(first, lists, rates, stream);
      default: launch_averages<4>(first, lists, rates, stream);
    }
  }
}

void adamw_ema_cuda(std::vector<Tensor> params, std::vector<Tensor> grads,
                    std::vector<Tensor> exp_avgs, std::vector<Tensor> exp_avg_sqs,
                    std::vector<Tensor> emas, std::vector<Tensor> copies, Tensor lr, Tensor step,
                    Tensor grad_scale, Tensor ema_decays, std::vector<double> weight_decays,
                    double beta1, double beta2, double eps) {
  const size_t n = params.size();
  const int64_t k = ema_decays.numel();
  STD_TORCH_CHECK(grads.size() == n && exp_avgs.size() == n && exp_avg_sqs.size() == n &&
                      emas.size() == n * static_cast<size_t>(k) && weight_decays.size() == n &&
                      (copies.empty() || copies.size() == n),
                  "adamw_ema: lists of different lengths");
  heptapod::check_scalars(lr, step, grad_scale, ema_decays);
  if (n == 0) return;
  const int32_t device = params[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  const Lists lists{params, grads, exp_avgs, exp_avg_sqs, emas, copies, weight_decays};
  const Rates rates{read(lr),
                    read(step),
                    read(grad_scale),
                    read(ema_decays),
                    std::log(beta1),
                    std::log(beta2),
                    static_cast<float>(1.0 - beta1),
                    static_cast<float>(beta2),
                    static_cast<float>(1.0 - beta2),
                    static_cast<float>(eps)};
  const cudaStream_t stream = heptapod::current_stream(device);
  if (grads[0].scalar_type() == ScalarType::BFloat16)
    launch_all<__nv_bfloat16>(k, lists, rates, stream);
  else
    launch_all<float>(k, lists, rates, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CUDA, m) {
  m.impl("adamw_ema", TORCH_BOX(&adamw_ema_cuda));
}
