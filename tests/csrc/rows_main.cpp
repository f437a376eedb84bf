// Calls every kernel of csrc/rows.h on memory that ends where the last row does, for the sanitizers.

#include <cstdio>
#include <initializer_list>
#include <memory>

#include "rows.h"

namespace {

using namespace heptapod::rows;

// So many elements on the heap, and not a byte more, unaligned for vectors.
template <class T>
std::unique_ptr<T[]> fresh(int64_t count) {
  std::unique_ptr<T[]> made(new T[count]);
  for (int64_t i = 0; i < count; ++i) made[i] = static_cast<T>(i % 7);
  return made;
}

template <class T>
void call_all(int64_t rows, int64_t width, bool is_dropped) {
  const Block block{0, rows, width, sizeof(T) == 2};
  const auto keys = fresh<int64_t>(2 * rows);
  const auto counters = fresh<int64_t>(rows);
  Mask mask;
  if (is_dropped) {
    mask.key = keys.get();
    mask.counter = counters.get();
    mask.counters = rows;
    mask.threshold = 1u << 30;
    mask.scale = 4.0f / 3.0f;
  }
  const int64_t count = rows * width;
  const auto x = fresh<T>(count), branch = fresh<T>(count), grad = fresh<T>(count);
  const auto to = fresh<T>(count), total = fresh<T>(count), dbranch = fresh<T>(count);
  const auto a = fresh<float>(width), b = fresh<float>(width), c = fresh<float>(width);
  const auto stats = fresh<float>(2 * rows), room = fresh<float>(2 * width);
  const auto small_room = fresh<float>(width);
  const auto one_sum = fresh<float>(width), three_sums = fresh<float>(3 * width);
  T* beside = is_dropped ? dbranch.get() : nullptr;
  for (const bool silu : {false, true}) {
    kBaseline.bias_gelu(block, mask, silu, to.get(), x.get(), a.get());
    kBaseline.bias_gelu_backward(block, mask, silu, to.get(), one_sum.get(), grad.get(), x.get(),
                                 a.get());
  }
  kBaseline.layer_norm(block, mask, nullptr, to.get(), stats.get(), x.get(), nullptr, nullptr,
                       nullptr, nullptr, 1e-6f, small_room.get());
  kBaseline.layer_norm(block, mask, total.get(), to.get(), stats.get(), x.get(), branch.get(),
                       nullptr, b.get(), c.get(), 1e-6f, small_room.get());
  kBaseline.layer_norm(block, mask, total.get(), to.get(), stats.get(), x.get(), branch.get(),
                       a.get(), b.get(), c.get(), 1e-6f, small_room.get());
  kBaseline.layer_norm_backward(block, mask, to.get(), beside, three_sums.get(), grad.get(),
                                branch.get(), total.get(), stats.get(), b.get(), true, room.get());
  kBaseline.layer_norm_backward(block, mask, to.get(), beside, one_sum.get(), grad.get(), nullptr,
                                total.get(), stats.get(), nullptr, true, room.get());
}

}  // namespace

int main() {
  for (int64_t width : {1, 2, 7, 15, 16, 17, 31, 32, 33, 255, 256, 257, 300}) {
    for (const bool is_dropped : {false, true}) {
      call_all<float>(3, width, is_dropped);
      call_all<uint16_t>(3, width, is_dropped);
    }
  }
  std::puts("all widths");
}
