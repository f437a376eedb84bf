// heptapod_fast::global_norm and sum_of_squares on CUDA; heptapod_fast/ops/global_norm.py defines
// what they compute. First one partial sum per chunk of a tensor, then one block adds these up:
// each in an order that depends on the shapes alone, so that neither runs, nor alignment, nor the
// number of multiprocessors change a bit. Sums are kept in float64 (squares of float32 are exact
// there): one conversion and one product per element is a third of what a Hopper GPU can do of them
// while it reads float32 at full bandwidth, two thirds for bfloat16.

#include "cuda_common.h"
#include "multi_tensor.cuh"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <vector>

namespace {

using heptapod::Table;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kThreads = 256, kFinalThreads = 1024;
constexpr int64_t kChunk = 1 << 14;  // elements
constexpr int kLoads = 4;            // of sixteen bytes each, in flight per thread

struct Slot {
  const void* data;
  int64_t numel;
  bool bf16;
  bool vectors;  // aligned for sixteen bytes at once
};

// A group is what sixteen bytes hold: 4 float32 or 8 bfloat16.
template <typename T>
constexpr int kGroup = 16 / sizeof(T);

__device__ __forceinline__ void load_group(float (&x)[4], const float* from) {
  heptapod::load4(x, from);
}

__device__ __forceinline__ void load_group(float (&x)[8], const __nv_bfloat16* from) {
  const uint4 a = __ldcs(reinterpret_cast<const uint4*>(from));
  heptapod::widen2(x[0], x[1], a.x);
  heptapod::widen2(x[2], x[3], a.y);
  heptapod::widen2(x[4], x[5], a.z);
  heptapod::widen2(x[6], x[7], a.w);
}

// The same group by itself, elements from `end` on as zeros.
template <typename T>
__device__ __forceinline__ void load_elements(float (&x)[kGroup<T>], const T* from, int end) {
#pragma unroll
  for (int j = 0; j < kGroup<T>; ++j) x[j] = j < end ? heptapod::to_float(from[j]) : 0.0f;
}

template <int N>
__device__ __forceinline__ void add_squares(double (&sum)[4], const float (&x)[N]) {
#pragma unroll
  for (int j = 0; j < N; ++j) {
    const double wide = x[j];
    sum[j % 4] = fma(wide, wide, sum[j % 4]);
  }
}

// One thread's share of a chunk: the groups threadIdx.x, threadIdx.x + kThreads, ...
template <typename T>
__device__ __forceinline__ double thread_sum(const T* from, int n, bool vectors) {
  constexpr int W = kGroup<T>;
  double sum[4] = {};
  const int whole = n / W;
  int group = threadIdx.x;
  if (vectors) {
    for (; group + (kLoads - 1) * kThreads < whole; group += kLoads * kThreads) {
      float x[kLoads][W];
#pragma unroll
      for (int k = 0; k < kLoads; ++k) load_group(x[k], from + (group + k * kThreads) * W);
#pragma unroll
      for (int k = 0; k < kLoads; ++k) add_squares(sum, x[k]);
    }
  }
#pragma unroll 1
  for (; group * W < n; group += kThreads) {
    float x[W];
    if (vectors && group < whole)
      load_group(x, from + group * W);
    else
      load_elements<T>(x, from + group * W, n - group * W);
    add_squares(sum, x);
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The sum over a block, right in its first thread.
template <int Threads>
__device__ __forceinline__ double block_sum(double sum) {
  __shared__ double of_warp[Threads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = sum;
  __syncthreads();
  sum = threadIdx.x < Threads / 32 ? of_warp[threadIdx.x] : 0.0;
  if (threadIdx.x < 32) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);
  }
  return sum;
}

__global__ void __launch_bounds__(kThreads)
    squares_kernel(const __grid_constant__ Table<Slot> table, double* __restrict__ partials) {
  __shared__ int shared;
  if (threadIdx.x == 0) shared = heptapod::find_slot(table, static_cast<int>(blockIdx.x));
  __syncthreads();
  const Slot& s = table.slot[shared];
  const int64_t begin = (static_cast<int>(blockIdx.x) - table.first_chunk[shared]) * kChunk;
  const int n = static_cast<int>(min(kChunk, s.numel - begin));
  const double sum =
      s.bf16 ? thread_sum(static_cast<const __nv_bfloat16*>(s.data) + begin, n, s.vectors)
             : thread_sum(static_cast<const float*>(s.data) + begin, n, s.vectors);
  const double total = block_sum<kThreads>(sum);
  if (threadIdx.x == 0) partials[blockIdx.x] = total;
}

__device__ __forceinline__ void write_result(double* out, double sum) { *out = sum; }
__device__ __forceinline__ void write_result(float* out, double sum) {
  *out = static_cast<float>(sqrt(sum));
}

// One block. Out: double for the sum, float for its root.
template <typename Out>
__global__ void __launch_bounds__(kFinalThreads)
    final_kernel(const double* __restrict__ partials, int64_t n, Out* __restrict__ out) {
  double sum = 0.0;
#pragma unroll 8
  for (int64_t i = threadIdx.x; i < n; i += kFinalThreads) sum += partials[i];
  sum = block_sum<kFinalThreads>(sum);
  if (threadIdx.x == 0) write_result(out, sum);
}

template <typename Out>
Tensor reduce_cuda(const std::vector<Tensor>& tensors, ScalarType dtype) {
  static_assert(sizeof(Table<Slot>) + 8 <= heptapod::kArgumentBytes);
  STD_TORCH_CHECK(!tensors.empty(), "global_norm: an empty list");
  const int32_t device = tensors[0].get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  int64_t chunks = 0;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_contiguous() && t.get_device_index() == device &&
                        (t.scalar_type() == ScalarType::Float ||
                         t.scalar_type() == ScalarType::BFloat16),
                    "global_norm: contiguous float32 or bfloat16 tensors of one device only");
    chunks += (t.numel() + kChunk - 1) / kChunk;
  }
  Tensor out = torch::stable::new_empty(tensors[0], std::vector<int64_t>{}, dtype);
  Tensor partials =
      torch::stable::new_empty(tensors[0], std::vector<int64_t>{chunks}, ScalarType::Double);
  double* next = static_cast<double*>(partials.mutable_data_ptr());
  const double* const all = next;
  const cudaStream_t stream = heptapod::current_stream(device);
  heptapod::for_tables<Slot>(
      tensors, kChunk,
      [&](Slot& s, size_t i) {
        const void* data = tensors[i].const_data_ptr();
        s = Slot{data, tensors[i].numel(), tensors[i].scalar_type() == ScalarType::BFloat16,
                 heptapod::aligned(data, 16)};
      },
      [&](const Table<Slot>& table, unsigned count) {
        squares_kernel<<<count, kThreads, 0, stream>>>(table, next);
        heptapod::check_cuda(cudaGetLastError(), "global_norm: launch");
        next += count;
      });
  final_kernel<Out><<<1, kFinalThreads, 0, stream>>>(all, chunks,
                                                     static_cast<Out*>(out.mutable_data_ptr()));
  heptapod::check_cuda(cudaGetLastError(), "global_norm: launch of the last sum");
  return out;
}

Tensor global_norm_cuda(std::vector<Tensor> tensors) {
  return reduce_cuda<float>(tensors, ScalarType::Float);
}

Tensor sum_of_squares_cuda(std::vector<Tensor> tensors) {
  return reduce_cuda<double>(tensors, ScalarType::Double);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CUDA, m) {
  m.impl("global_norm", TORCH_BOX(&global_norm_cuda));
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares_cuda));
}
