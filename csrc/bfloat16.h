// bfloat16 on the CPU, as 16 bits.
#pragma once

#include <cstdint>
#include <cstring>

#include "clones.h"

namespace {

HEPTAPOD_CLONES void widen(float* __restrict to, const uint16_t* __restrict from, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t bits = uint32_t{from[i]} << 16;
    std::memcpy(&to[i], &bits, sizeof bits);
  }
}

}  // namespace
