// Operations on blocks of rows on the CPU, compiled for several instruction sets: rows_baseline.cpp,
// rows_avx2.cpp and rows_avx512.cpp include rows_kernels.inc, and rows.cpp picks one of them when
// the library is loaded. All give the same bits: every sum and every fused multiply-add is written
// out, and the build forbids others.
#pragma once

#include <cstdint>

namespace heptapod::rows {

// Rows of a matrix: rows begin..end-1 of `width` elements each, float32, or bfloat16 as 16 bits.
struct Block {
  int64_t begin, end, width;
  bool bf16;
};

// heptapod_fast/ops/dropout_mask.py: row r has key r / rows_of_key and counter r % counters.
struct Mask {
  const int64_t* key = nullptr;  // pairs; nullptr: nothing is dropped
  const int64_t* counter = nullptr;
  int64_t rows_of_key = 1, counters = 1;
  uint32_t threshold = 0;  // hashes below it are dropped
  float scale = 1.0f;      // of what is kept
};

// Pointers are those of whole matrices, but for `sum`: (width) or more sums over the rows of the
// block, which are added to.
struct Kernels {
  void (*bias_gelu)(const Block&, const Mask&, bool silu, void* y, const void* x,
                    const float* bias);
  void (*bias_gelu_backward)(const Block&, const Mask&, bool silu, void* dx, float* sum,
                             const void* dy, const void* x, const float* bias);
  // branch, branch_bias and total: nullptr for a norm alone. weight and bias: nullptr for neither.
  // stats: mean and 1 / sqrt(variance + eps) of every row. room: width floats.
  void (*layer_norm)(const Block&, const Mask&, void* total, void* y, float* stats, const void* x,
                     const void* branch, const float* branch_bias, const float* weight,
                     const float* bias, float eps, float* room);
  // sum: of dweight and dbias if there is a weight, then of dbranch_bias if is_bias_wanted.
  // dbranch: nullptr without dropout. grad_sum, weight: may be nullptr. room: 2 * width floats.
  void (*layer_norm_backward)(const Block&, const Mask&, void* dx, void* dbranch, float* sum,
                              const void* dy, const void* grad_sum, const void* total,
                              const float* stats, const float* weight, bool is_bias_wanted,
                              float* room);
};

extern const Kernels kBaseline;
extern const Kernels kAvx2;
extern const Kernels kAvx512;

// Those of the best instruction set that this processor has (rows.cpp).
const Kernels& kernels();

}  // namespace heptapod::rows
