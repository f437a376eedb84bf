// heptapod_fast::global_norm and sum_of_squares: the schemas and the CPU implementations;
// heptapod_fast/ops/global_norm.py defines what they compute. One float64 sum per chunk of a
// tensor, then the chunks in order: the same bits with every number of threads and every
// instruction set.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <vector>

#include "bfloat16.h"
#include "clones.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int kLanes = 16;
constexpr int64_t kPiece = 1024;        // elements widened at a time, a multiple of kLanes
constexpr int64_t kChunk = 16 * kPiece;  // elements handed to a thread at a time

struct Chunk {
  const Tensor* tensor;
  int64_t begin, end;
};

HEPTAPOD_CLONES void add_squares(double* __restrict lanes, const float* __restrict x, int64_t n) {
  const int64_t whole = n / kLanes * kLanes;
  for (int64_t i = 0; i < whole; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lanes[l] += double{x[i + l]} * double{x[i + l]};
  for (int64_t i = whole; i < n; ++i) lanes[i - whole] += double{x[i]} * double{x[i]};
}

double chunk_sum(const Chunk& chunk) {
  alignas(64) double lanes[kLanes] = {};
  alignas(64) float wide[kPiece];
  const void* data = chunk.tensor->const_data_ptr();
  const bool bf16 = chunk.tensor->scalar_type() == ScalarType::BFloat16;
  for (int64_t at = chunk.begin; at < chunk.end; at += kPiece) {
    const int64_t n = std::min(kPiece, chunk.end - at);
    if (bf16) widen(wide, static_cast<const uint16_t*>(data) + at, n);
    add_squares(lanes, bf16 ? wide : static_cast<const float*>(data) + at, n);
  }
  double sum = 0.0;
  for (const double lane : lanes) sum += lane;
  return sum;
}

double reduce(const std::vector<Tensor>& tensors) {
  STD_TORCH_CHECK(!tensors.empty(), "global_norm: an empty list");
  std::vector<Chunk> chunks;
  for (const Tensor& t : tensors) {
    STD_TORCH_CHECK(t.is_contiguous() && (t.scalar_type() == ScalarType::Float ||
                                          t.scalar_type() == ScalarType::BFloat16),
                    "global_norm: contiguous float32 or bfloat16 tensors only");
    const int64_t size = t.numel();
    for (int64_t at = 0; at < size; at += kChunk)
      chunks.push_back({&t, at, std::min(at + kChunk, size)});
  }
  std::vector<double> sums(chunks.size());
  torch::stable::parallel_for(
      0, static_cast<int64_t>(chunks.size()), 1, [&](int64_t begin, int64_t end) {
        for (int64_t c = begin; c < end; ++c) sums[c] = chunk_sum(chunks[c]);
      });
  double total = 0.0;
  for (const double sum : sums) total += sum;
  return total;
}

Tensor scalar(const Tensor& like, ScalarType dtype) {
  return torch::stable::new_empty(like, std::vector<int64_t>{}, dtype);
}

Tensor global_norm_cpu(std::vector<Tensor> tensors) {
  const double sum = reduce(tensors);
  Tensor out = scalar(tensors[0], ScalarType::Float);
  *static_cast<float*>(out.mutable_data_ptr()) = static_cast<float>(std::sqrt(sum));
  return out;
}

Tensor sum_of_squares_cpu(std::vector<Tensor> tensors) {
  const double sum = reduce(tensors);
  Tensor out = scalar(tensors[0], ScalarType::Double);
  *static_cast<double*>(out.mutable_data_ptr()) = sum;
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(heptapod_fast, m) {
  m.def("global_norm(Tensor[] tensors) -> Tensor");
  m.def("sum_of_squares(Tensor[] tensors) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(heptapod_fast, CPU, m) {
  m.impl("global_norm", TORCH_BOX(&global_norm_cpu));
  m.impl("sum_of_squares", TORCH_BOX(&sum_of_squares_cpu));
}
