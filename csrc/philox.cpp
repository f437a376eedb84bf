// heptapod_fast::philox: the schema and the CPU implementation. heptapod_fast/ops/philox.py defines
// what it computes: item (i, b) of `index.numel() x blocks` encrypts the counter
// (b, slot[i], low word of index[i], high word of index[i]).

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <vector>

#include "clones.h"
#include "philox.h"

namespace {

using torch::stable::Tensor;
namespace philox = heptapod::philox;

constexpr int kLanes = 64;          // items encrypted side by side; four such arrays stay in L1
constexpr int64_t kGrain = 1 << 12; // items below which a second thread does not pay

struct Lanes {
  alignas(64) uint32_t word[4][kLanes];
};

HEPTAPOD_CLONES void encrypt(Lanes& lanes, uint32_t key0, uint32_t key1) {
  for (int round = 0; round < philox::kRounds; ++round) {
#pragma GCC ivdep
    for (int i = 0; i < kLanes; ++i) {
      const uint64_t p0 = uint64_t{lanes.word[0][i]} * philox::kMultiplier0;
      const uint64_t p1 = uint64_t{lanes.word[2][i]} * philox::kMultiplier1;
      lanes.word[0][i] = uint32_t(p1 >> 32) ^ lanes.word[1][i] ^ key0;
      lanes.word[2][i] = uint32_t(p0 >> 32) ^ lanes.word[3][i] ^ key1;
      lanes.word[1][i] = uint32_t(p1);
      lanes.word[3][i] = uint32_t(p0);
    }
    key0 += philox::kWeyl0;
    key1 += philox::kWeyl1;
  }
}

void fill(const int64_t* index, const int64_t* slot, int64_t blocks, uint32_t key0, uint32_t key1,
          int64_t* out, int64_t begin, int64_t end) {
  int64_t row = begin / blocks, block = begin % blocks;
  Lanes lanes{};
  for (int64_t first = begin; first < end; first += kLanes) {
    const int count = static_cast<int>(std::min<int64_t>(kLanes, end - first));
    for (int i = 0; i < count; ++i) {
      lanes.word[0][i] = static_cast<uint32_t>(block);
      lanes.word[1][i] = static_cast<uint32_t>(slot[row]);
      lanes.word[2][i] = static_cast<uint32_t>(index[row]);
      lanes.word[3][i] = static_cast<uint32_t>(static_cast<uint64_t>(index[row]) >> 32);
      if (++block == blocks) {
        block = 0;
        ++row;
      }
    }
    encrypt(lanes, key0, key1);
    int64_t* to = out + 4 * first;
    for (int i = 0; i < count; ++i)
      for (int w = 0; w < 4; ++w) to[4 * i + w] = lanes.word[w][i];
  }
}

Tensor philox_cpu(const Tensor& index, const Tensor& slot, int64_t blocks, int64_t key0,
                  int64_t key1) {
  STD_TORCH_CHECK(index.is_contiguous() && slot.is_contiguous(), "philox: contiguous tensors only");
  STD_TORCH_CHECK(index.scalar_type() == torch::headeronly::ScalarType::Long &&
                      slot.scalar_type() == torch::headeronly::ScalarType::Long,
                  "philox: int64 tensors only");
  STD_TORCH_CHECK(index.numel() == slot.numel(), "philox: index and slot differ in shape");
  std::vector<int64_t> shape(index.sizes().begin(), index.sizes().end());
  shape.push_back(4 * blocks);
  Tensor out = torch::stable::new_empty(index, shape);
  const auto* from = static_cast<const int64_t*>(index.const_data_ptr());
  const auto* slots = static_cast<const int64_t*>(slot.const_data_ptr());
  auto* to = static_cast<int64_t*>(out.mutable_data_ptr());
  torch::stable::parallel_for(0, index.numel() * blocks, kGrain, [&](int64_t begin, int64_t end) {
    fill(from, slots, blocks, static_cast<uint32_t>(key0), static_cast<uint32_t>(key1), to, begin,
         end);
  });
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heptapod_fast, m) {
  m.def("philox(Tensor index, Tensor slot, int blocks, int key0, int key1) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CPU, m) { m.impl("philox", TORCH_BOX(&philox_cpu)); }
