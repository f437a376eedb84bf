// heptapod_fast::adamw_ema on CUDA. heptapod_fast/ops/adamw_ema.py defines what it computes.
//
// Multi-tensor: up to kSlots tensors per launch, their addresses travel in the kernel's argument,
// so there is nothing to copy to the device and a CUDA graph captures the launch as it is. A thread
// block takes one chunk of one tensor, found by bisection over the tensors' first chunks. Every
// address is read and written once, sixteen bytes at a time where all of a tensor's addresses allow
// it. Learning rate, step, gradient scale and decays are read on the device. No atomics: the same
// bits every time.

#include "cuda_common.h"

#include <cuda_bf16.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <cstdint>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kChunk = 1 << 15;  // elements; a multiple of 4, so that chunks keep the alignment
#if CUDART_VERSION >= 12010
constexpr int kSlots = 320;  // 32764 bytes of kernel argument since CUDA 12.1
#else
constexpr int kSlots = 40;  // 4096 bytes before
#endif

template <int K>
struct Slot {
  float *p, *m, *v;
  const void* g;
  __nv_bfloat16* copy;
  float* ema[K > 0 ? K : 1];
  int64_t numel;
  float weight_decay;
  int first_chunk;  // within the launch
  bool vectors;     // every address is aligned for four elements at once
};

template <int K>
struct Table {
  Slot<K> slot[kSlots];
  int count;
};

struct Rates {
  const float *lr, *step, *grad_scale, *ema_decays;
  double log_beta1, log_beta2;
  float first, beta2, second, eps;
};

// What one block works with, made once by its first thread.
struct Plan {
  int slot;
  float decay, step_size, root_correction;
};

// torch.lerp's two forms: each is exact at its own end.
__device__ __forceinline__ float lerp(float from, float to, float weight) {
  return weight < 0.5f ? from + weight * (to - from) : to - (to - from) * (1.0f - weight);
}

__device__ __forceinline__ void load4(float (&x)[4], const float* from) {
  const float4 a = *reinterpret_cast<const float4*>(from);
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}

__device__ __forceinline__ void load4(float (&x)[4], const __nv_bfloat16* from) {
  const uint2 a = *reinterpret_cast<const uint2*>(from);
  x[0] = __uint_as_float(a.x << 16), x[1] = __uint_as_float(a.x & 0xffff0000u);
  x[2] = __uint_as_float(a.y << 16), x[3] = __uint_as_float(a.y & 0xffff0000u);
}

__device__ __forceinline__ void store4(float* to, const float (&x)[4]) {
  *reinterpret_cast<float4*>(to) = make_float4(x[0], x[1], x[2], x[3]);
}

__device__ __forceinline__ void store4(__nv_bfloat16* to, const float (&x)[4]) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]);
  const __nv_bfloat162 high = __floats2bfloat162_rn(x[2], x[3]);
  uint2 a;
  memcpy(&a.x, &low, 4);
  memcpy(&a.y, &high, 4);
  *reinterpret_cast<uint2*>(to) = a;
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

__device__ __forceinline__ void update(float& p, float& m, float& v, float g, float grad_scale,
                                       const Plan& plan, const Rates& r) {
  const float grad = g * grad_scale;
  m = lerp(m, grad, r.first);
  v = v * r.beta2 + (r.second * grad) * grad;
  p = p * plan.decay - (plan.step_size * m) / (sqrtf(v) / plan.root_correction + r.eps);
}

template <int K>
__device__ Plan make_plan(const Table<K>& table, const Rates& r) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.slot[middle].first_chunk <= static_cast<int>(blockIdx.x))
      low = middle;
    else
      high = middle - 1;
  }
  const double lr = *r.lr, step = *r.step;
  Plan plan;
  plan.slot = low;
  plan.decay = static_cast<float>(1.0 - lr * table.slot[low].weight_decay);
  plan.step_size = static_cast<float>(lr / -expm1(step * r.log_beta1));
  plan.root_correction = static_cast<float>(sqrt(-expm1(step * r.log_beta2)));
  return plan;
}

template <int K, typename G>
__global__ void __launch_bounds__(kThreads)
    adamw_ema_kernel(const __grid_constant__ Table<K> table, const Rates r) {
  const float grad_scale = *r.grad_scale;
  if (grad_scale == 0.0f) return;  // a skipped step leaves every bit as it is
  __shared__ Plan shared;
  if (threadIdx.x == 0) shared = make_plan<K>(table, r);
  __syncthreads();
  const Plan plan = shared;
  const Slot<K>& s = table.slot[plan.slot];
  const int64_t begin = (static_cast<int>(blockIdx.x) - s.first_chunk) * kChunk;
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

float* write(const Tensor& t) { return static_cast<float*>(t.mutable_data_ptr()); }
const float* read(const Tensor& t) { return static_cast<const float*>(t.const_data_ptr()); }
bool aligned(const void* at, size_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; }

struct Lists {
  const std::vector<Tensor>&params, &grads, &exp_avgs, &exp_avg_sqs, &emas, &copies;
  const std::vector<double>& weight_decays;
};

template <int K, typename G>
Slot<K> make_slot(const Lists& lists, size_t i) {
  Slot<K> s{};
  s.p = write(lists.params[i]);
  s.m = write(lists.exp_avgs[i]);
  s.v = write(lists.exp_avg_sqs[i]);
  s.g = lists.grads[i].const_data_ptr();
  s.numel = lists.params[i].numel();
  s.weight_decay = static_cast<float>(lists.weight_decays[i]);
  s.vectors = aligned(s.p, 16) && aligned(s.m, 16) && aligned(s.v, 16) &&
              aligned(s.g, 4 * sizeof(G));
  for (int e = 0; e < K; ++e) {
    s.ema[e] = write(lists.emas[e * lists.params.size() + i]);
    s.vectors = s.vectors && aligned(s.ema[e], 16);
  }
  if (!lists.copies.empty()) {
    s.copy = static_cast<__nv_bfloat16*>(lists.copies[i].mutable_data_ptr());
    s.vectors = s.vectors && aligned(s.copy, 8);
  }
  return s;
}

template <int K, typename G>
void launch(const Lists& lists, const Rates& rates, cudaStream_t stream) {
  static_assert(sizeof(Table<K>) + sizeof(Rates) <= (kSlots > 40 ? 32764 : 4096));
  Table<K> table{};
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table.count == 0) return;
    adamw_ema_kernel<K, G><<<static_cast<unsigned>(chunks), kThreads, 0, stream>>>(table, rates);
    heptapod::check_cuda(cudaGetLastError(), "adamw_ema: launch");
    table.count = 0;
    chunks = 0;
  };
  for (size_t i = 0; i < lists.params.size(); ++i) {
    const int64_t needed = (lists.params[i].numel() + kChunk - 1) / kChunk;
    if (needed == 0) continue;
    if (table.count == kSlots || chunks + needed > INT32_MAX) flush();
    Slot<K>& s = table.slot[table.count++];
    s = make_slot<K, G>(lists, i);
    s.first_chunk = static_cast<int>(chunks);
    chunks += needed;
  }
  flush();
}

template <typename G>
void launch_for(int64_t averages, const Lists& lists, const Rates& rates, cudaStream_t stream) {
  switch (averages) {
    case 0: return launch<0, G>(lists, rates, stream);
    case 1: return launch<1, G>(lists, rates, stream);
    case 2: return launch<2, G>(lists, rates, stream);
    case 3: return launch<3, G>(lists, rates, stream);
    case 4: return launch<4, G>(lists, rates, stream);
    default: STD_TORCH_CHECK(false, "adamw_ema: at most 4 averages");
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
    launch_for<__nv_bfloat16>(k, lists, rates, stream);
  else
    launch_for<float>(k, lists, rates, stream);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CUDA, m) {
  m.impl("adamw_ema", TORCH_BOX(&adamw_ema_cuda));
}
