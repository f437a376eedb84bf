// What operators need to hand tensors to the kernels of rows.h.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <optional>
#include <vector>

#include "rows.h"

namespace heptapod::rows {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kRows = 32;  // rows handed to a thread at a time; their sum is one partial sum

// The rows of a contiguous float32 or bfloat16 tensor, over its last dimension.
inline Block rows_of(const Tensor& x, const char* what) {
  const ScalarType kind = x.scalar_type();
  STD_TORCH_CHECK(x.is_contiguous(), what, ": contiguous tensors only");
  STD_TORCH_CHECK(kind == ScalarType::Float || kind == ScalarType::BFloat16, what,
                  ": float32 or bfloat16 only");
  const int64_t width = x.size(x.dim() - 1);
  return {0, width == 0 ? 0 : x.numel() / width, width, kind == ScalarType::BFloat16};
}

inline const void* like(const Tensor& x, const Tensor& other, const char* what) {
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == other.scalar_type() &&
                      x.numel() == other.numel(),
                  what, ": contiguous tensors of one shape and type only");
  return x.const_data_ptr();
}

inline const float* parameter(const Tensor& x, int64_t width, const char* what) {
  STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float && x.numel() == width,
                  what, ": a contiguous float32 parameter of the width of a row only");
  return static_cast<const float*>(x.const_data_ptr());
}

// nullptr where there is none.
inline const float* parameter(const std::optional<Tensor>& x, int64_t width, const char* what) {
  return x.has_value() ? parameter(*x, width, what) : nullptr;
}

inline Mask mask_of(const std::optional<Tensor>& key, const std::optional<Tensor>& counter,
                    double p, const Block& block) {
  Mask mask;
  if (!key.has_value() || !counter.has_value() || block.end == 0) return mask;
  STD_TORCH_CHECK(key->is_contiguous() && counter->is_contiguous() &&
                      key->scalar_type() == ScalarType::Long &&
                      counter->scalar_type() == ScalarType::Long,
                  "dropout: contiguous int64 keys and counters only");
  const int64_t sequences = key->size(0);
  const int64_t counters = counter->numel();
  STD_TORCH_CHECK(sequences > 0 && counters > 0 && block.end % sequences == 0 &&
                      block.end % counters == 0,
                  "dropout: the numbers of keys and of counters divide the number of rows");
  mask.key = static_cast<const int64_t*>(key->const_data_ptr());
  mask.counter = static_cast<const int64_t*>(counter->const_data_ptr());
  mask.rows_of_key = block.end / sequences;
  mask.counters = counters;
  const double threshold = std::nearbyint(p * 4294967296.0);
  const bool is_all = threshold >= 4294967296.0;  // p is 1 but for a rounding
  mask.threshold = is_all ? 0u : static_cast<uint32_t>(threshold);
  mask.scale = is_all ? 0.0f : static_cast<float>(1.0 / (1.0 - p));
  return mask;
}

// work(block): a part of the rows, on some thread.
template <class Work>
void for_rows(const Block& all, const Work& work) {
  torch::stable::parallel_for(0, all.end, kRows, [&](int64_t begin, int64_t end) {
    work(Block{begin, end, all.width, all.bf16});
  });
}

// The same for work(block, sums) that adds to `columns` sums over its rows. to[column] is the sum
// over all rows, taken in an order that follows from their number alone: the same bits with every
// number of threads.
template <class Work>
void for_rows_and_sums(const Block& all, int64_t columns, float* to, const Work& work) {
  const int64_t blocks = (all.end + kRows - 1) / kRows;
  std::vector<float> partials(blocks * columns);
  torch::stable::parallel_for(0, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t block = begin; block < end; ++block) {
      const Block rows{block * kRows, std::min(all.end, (block + 1) * kRows), all.width, all.bf16};
      work(rows, partials.data() + block * columns);
    }
  });
  std::fill_n(to, columns, 0.0f);
  for (int64_t block = 0; block < blocks; ++block) {
    const float* partial = partials.data() + block * columns;
    for (int64_t column = 0; column < columns; ++column) to[column] += partial[column];
  }
}

}  // namespace heptapod::rows
