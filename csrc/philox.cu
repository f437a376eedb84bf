// heptapod_fast::philox on CUDA: one thread encrypts one counter and stores four words.

#include "cuda_common.h"

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "philox.h"

namespace {

using torch::stable::Tensor;
namespace philox = heptapod::philox;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 16;  // the grid strides over what is left

__global__ void __launch_bounds__(kThreads)
    philox_kernel(const int64_t* __restrict__ index, const int64_t* __restrict__ slot,
                  int64_t items, int64_t blocks, uint32_t key0, uint32_t key1,
                  longlong2* __restrict__ out) {
  const int64_t stride = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < items; i += stride) {
    const int64_t row = i / blocks;
    uint32_t c0 = static_cast<uint32_t>(i - row * blocks);
    uint32_t c1 = static_cast<uint32_t>(slot[row]);
    uint32_t c2 = static_cast<uint32_t>(index[row]);
    uint32_t c3 = static_cast<uint32_t>(static_cast<uint64_t>(index[row]) >> 32);
    uint32_t k0 = key0, k1 = key1;
#pragma unroll
    for (int round = 0; round < philox::kRounds; ++round) {
      const uint32_t high0 = __umulhi(c0, philox::kMultiplier0);
      const uint32_t high1 = __umulhi(c2, philox::kMultiplier1);
      const uint32_t low0 = c0 * philox::kMultiplier0, low1 = c2 * philox::kMultiplier1;
      c0 = high1 ^ c1 ^ k0;
      c1 = low1;
      c2 = high0 ^ c3 ^ k1;
      c3 = low0;
      k0 += philox::kWeyl0;
      k1 += philox::kWeyl1;
    }
    out[2 * i] = make_longlong2(c0, c1);
    out[2 * i + 1] = make_longlong2(c2, c3);
  }
}

Tensor philox_cuda(const Tensor& index, const Tensor& slot, int64_t blocks, int64_t key0,
                   int64_t key1) {
  STD_TORCH_CHECK(index.is_contiguous() && slot.is_contiguous(), "philox: contiguous tensors only");
  STD_TORCH_CHECK(index.scalar_type() == torch::headeronly::ScalarType::Long &&
                      slot.scalar_type() == torch::headeronly::ScalarType::Long,
                  "philox: int64 tensors only");
  STD_TORCH_CHECK(index.numel() == slot.numel(), "philox: index and slot differ in shape");
  const int32_t device = index.get_device_index();
  torch::stable::accelerator::DeviceGuard guard(device);
  std::vector<int64_t> shape(index.sizes().begin(), index.sizes().end());
  shape.push_back(4 * blocks);
  Tensor out = torch::stable::new_empty(index, shape);
  const int64_t items = index.numel() * blocks;
  if (items == 0) return out;
  const auto grid = static_cast<unsigned>(std::min((items + kThreads - 1) / kThreads, kMaxBlocks));
  philox_kernel<<<grid, kThreads, 0, heptapod::current_stream(device)>>>(
      static_cast<const int64_t*>(index.const_data_ptr()),
      static_cast<const int64_t*>(slot.const_data_ptr()), items, blocks,
      static_cast<uint32_t>(key0), static_cast<uint32_t>(key1),
      static_cast<longlong2*>(out.mutable_data_ptr()));
  heptapod::check_cuda(cudaGetLastError(), "philox: launch");
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CUDA, m) { m.impl("philox", TORCH_BOX(&philox_cuda)); }
