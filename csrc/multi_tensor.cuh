// What kernels over lists of tensors share. The tensors' addresses travel in the kernel's argument,
// so there is nothing to copy to the device and a CUDA graph captures the launch as it is. A thread
// block takes one chunk of one tensor and finds the tensor by bisection over their first chunks.
#pragma once

#include <cuda_bf16.h>
#include <cuda_runtime.h>
#include <torch/csrc/stable/tensor.h>

#include <climits>
#include <cstdint>
#include <cstring>
#include <vector>

namespace heptapod {

#if CUDART_VERSION >= 12010
constexpr size_t kArgumentBytes = 32764;
#else
constexpr size_t kArgumentBytes = 4096;
#endif

// As many tensors as fit a kernel's argument, with 256 bytes left for everything else. The first
// chunks have an array of their own: bisection then touches few cache lines.
template <typename Slot>
struct Table {
  static constexpr int kSlots = (kArgumentBytes - 256) / (sizeof(Slot) + sizeof(int));
  Slot slot[kSlots];
  int first_chunk[kSlots];  // within the launch, ascending
  int count;
};

// The slot that the chunk `block` belongs to.
template <typename Slot>
__device__ __forceinline__ int find_slot(const Table<Slot>& table, int block) {
  int low = 0, high = table.count - 1;
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= block)
      low = middle;
    else
      high = middle - 1;
  }
  return low;
}

// Calls launch(table, chunks) for as many full tables as the tensors need. fill(slot, i) describes
// tensor i; empty tensors take no slot.
template <typename Slot, typename Fill, typename Launch>
void for_tables(const std::vector<torch::stable::Tensor>& tensors, int64_t chunk, const Fill& fill,
                const Launch& launch) {
  Table<Slot> table{};
  int64_t chunks = 0;
  const auto flush = [&] {
    if (table.count != 0) launch(table, static_cast<unsigned>(chunks));
    table.count = 0;
    chunks = 0;
  };
  for (size_t i = 0; i < tensors.size(); ++i) {
    const int64_t needed = (tensors[i].numel() + chunk - 1) / chunk;
    if (needed == 0) continue;
    if (table.count == Table<Slot>::kSlots || chunks + needed > INT_MAX) flush();
    fill(table.slot[table.count], i);
    table.first_chunk[table.count++] = static_cast<int>(chunks);
    chunks += needed;
  }
  flush();
}

inline bool aligned(const void* at, size_t bytes) {
  return reinterpret_cast<uintptr_t>(at) % bytes == 0;
}

// Four elements at once. Parameters, moments and gradients are many times the L2 cache and touched
// once per pass, hence the streaming hints.
__device__ __forceinline__ void load4(float (&x)[4], const float* from) {
  const float4 a = __ldcs(reinterpret_cast<const float4*>(from));
  x[0] = a.x, x[1] = a.y, x[2] = a.z, x[3] = a.w;
}

__device__ __forceinline__ void widen2(float& low, float& high, unsigned bits) {
  low = __uint_as_float(bits << 16), high = __uint_as_float(bits & 0xffff0000u);
}

__device__ __forceinline__ void load4(float (&x)[4], const __nv_bfloat16* from) {
  const uint2 a = __ldcs(reinterpret_cast<const uint2*>(from));
  widen2(x[0], x[1], a.x);
  widen2(x[2], x[3], a.y);
}

__device__ __forceinline__ void store4(float* to, const float (&x)[4]) {
  __stcs(reinterpret_cast<float4*>(to), make_float4(x[0], x[1], x[2], x[3]));
}

__device__ __forceinline__ void store4(__nv_bfloat16* to, const float (&x)[4]) {
  const __nv_bfloat162 low = __floats2bfloat162_rn(x[0], x[1]);
  const __nv_bfloat162 high = __floats2bfloat162_rn(x[2], x[3]);
  uint2 a;
  memcpy(&a.x, &low, 4);
  memcpy(&a.y, &high, 4);
  __stcs(reinterpret_cast<uint2*>(to), a);
}

__device__ __forceinline__ float to_float(float x) { return x; }
__device__ __forceinline__ float to_float(__nv_bfloat16 x) { return __bfloat162float(x); }

}  // namespace heptapod
