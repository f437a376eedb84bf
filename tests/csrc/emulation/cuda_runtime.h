// Stands for CUDA's header of this name; see emulation.h.
#pragma once

#include <math.h>

#include <algorithm>

#include "emulation.h"

#ifndef CUDART_VERSION
#define CUDART_VERSION 13000
#endif

#define __device__
#define __global__
#define __grid_constant__
#define __forceinline__ inline
#define __launch_bounds__(threads)  // each launch is told (emulator.py)
// Blocks run one after the other, so that one copy serves them all; emulation.cpp knows these
// variables as the writable memory of the library.
#define __shared__ static

#define threadIdx (::emulation::thread_index())
#define blockIdx (::emulation::block_index())
#define gridDim (::emulation::grid_size())
#define __syncthreads() (::emulation::barrier(__LINE__))

using std::min;

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchOutOfResources = 701,
};
using cudaStream_t = struct CUstream_st*;
cudaError_t cudaGetLastError();
const char* cudaGetErrorString(cudaError_t error);

// Copies of vectors are one access each, of all their bytes.
#define EMULATION_VECTOR(Name, Element, bytes, members, arguments, initializers) \
  struct alignas(bytes) Name {                                                   \
    Element members;                                                             \
    Name() = default;                                                            \
    explicit Name arguments : initializers {}                                    \
    Name(const Name& other) { ::emulation::copy(this, &other, sizeof other); }   \
    Name& operator=(const Name& other) {                                         \
      ::emulation::copy(this, &other, sizeof other);                             \
      return *this;                                                              \
    }                                                                            \
  }
#define EMULATION_LIST(...) __VA_ARGS__

EMULATION_VECTOR(float4, float, 16, EMULATION_LIST(x, y, z, w),
                 (float x, float y, float z, float w), EMULATION_LIST(x(x), y(y), z(z), w(w)));
EMULATION_VECTOR(uint4, unsigned, 16, EMULATION_LIST(x, y, z, w),
                 (unsigned x, unsigned y, unsigned z, unsigned w),
                 EMULATION_LIST(x(x), y(y), z(z), w(w)));
EMULATION_VECTOR(uint2, unsigned, 8, EMULATION_LIST(x, y), (unsigned x, unsigned y),
                 EMULATION_LIST(x(x), y(y)));
EMULATION_VECTOR(longlong2, long long, 16, EMULATION_LIST(x, y), (long long x, long long y),
                 EMULATION_LIST(x(x), y(y)));

inline float4 make_float4(float x, float y, float z, float w) { return float4(x, y, z, w); }
inline longlong2 make_longlong2(long long x, long long y) { return longlong2(x, y); }

template <typename T>
T __ldcs(const T* from) {
  return T(*from);
}

template <typename T>
void __stcs(T* to, const T& value) {
  *to = value;
}

inline unsigned __umulhi(unsigned a, unsigned b) {
  return static_cast<unsigned>((uint64_t{a} * b) >> 32);
}

inline float __uint_as_float(unsigned bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned offset, int width = 32) {
  static_assert(sizeof(T) <= sizeof(uint64_t));
  uint64_t bits = 0;
  memcpy(&bits, &value, sizeof value);
  bits = ::emulation::shuffle_down(mask, bits, offset, width);
  memcpy(&value, &bits, sizeof value);
  return value;
}
