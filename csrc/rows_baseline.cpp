// The kernels of rows.h for every processor of the build's architecture, and the choice.

#define HEPTAPOD_ROWS kBaseline
#include "rows_kernels.inc"

namespace heptapod::rows {

const Kernels& kernels() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq"))
    return kAvx512;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kBaseline;
}

}  // namespace heptapod::rows
