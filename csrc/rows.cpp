// The choice among the kernels of rows.h.

#include "rows.h"

#include <cstring>

namespace heptapod::rows {
namespace {

struct Candidate {
  const char* name;
  const Kernels* kernels;
  bool (*runs_here)();
};

bool always() { return true; }

#if defined(__x86_64__)
bool has_avx2() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"); }

bool has_avx512() {
  return has_avx2() && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
}
#endif

// The best ones first.
const Candidate kCandidates[] = {
#if defined(__x86_64__)
    {"avx512", &kAvx512, has_avx512},
    {"avx2", &kAvx2, has_avx2},
#endif
    {"baseline", &kBaseline, always},
};

// The candidate of that name, or the best one for nullptr; nullptr if it does not run here.
const Kernels* find(const char* name) {
  for (const Candidate& candidate : kCandidates) {
    const bool is_wanted = name == nullptr || std::strcmp(name, candidate.name) == 0;
    if (is_wanted && candidate.runs_here()) return candidate.kernels;
  }
  return nullptr;
}

const Kernels* chosen = find(nullptr);

}  // namespace

const Kernels& kernels() { return *chosen; }

}  // namespace heptapod::rows

// For tests: takes the kernels for that instruction set ("" for the best one) from now on. 0 if this
// processor has it not; then nothing changes.
extern "C" __attribute__((visibility("default"))) int heptapod_use_rows(const char* name) {
  const auto* found = heptapod::rows::find(*name == '\0' ? nullptr : name);
  if (found == nullptr) return 0;
  heptapod::rows::chosen = found;
  return 1;
}
