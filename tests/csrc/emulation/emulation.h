// The CUDA that csrc/*.cu are written in, for a host compiler: every thread of a block is a fiber,
// and every access to memory is checked (emulation.cpp says how). Only what the sources use is
// here, so that a name nobody has thought about does not compile.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

namespace emulation {

struct Index {
  unsigned x, y, z;
};

Index thread_index();
Index block_index();
Index grid_size();

// __syncthreads; `line` tells one barrier of the source from another.
void barrier(int line);

// The bits that lane `offset` above this one brought, within `width` lanes; its own at the end.
uint64_t shuffle_down(unsigned mask, uint64_t bits, unsigned offset, int width);

// One access of `bytes` on either side: both must be aligned for it, inside of their tensors, and
// free of races.
void copy(void* to, const void* from, size_t bytes);

struct Launch {
  const char* kernel;
  int64_t launch_bounds;  // threads
  int64_t blocks;
  int64_t threads;
  size_t dynamic_shared_bytes;
};

// Runs body(call) once per thread. call: what the kernel's arguments are read from.
void run(const Launch& launch, const void* call, size_t call_bytes, size_t argument_bytes,
         void (*body)(const void*));

// Arguments are copied once per launch, as a launch on a GPU does.
template <typename... Parameters>
struct Call {
  void (*kernel)(Parameters...);
  std::tuple<std::decay_t<Parameters>...> arguments;

  static void body(const void* call) {
    const Call& self = *static_cast<const Call*>(call);
    std::apply(self.kernel, self.arguments);
  }
};

template <typename... Parameters>
constexpr size_t argument_bytes() {
  size_t bytes = 0;
  const auto place = [&bytes](size_t size, size_t alignment) {
    bytes = (bytes + alignment - 1) / alignment * alignment + size;
  };
  (place(sizeof(std::decay_t<Parameters>), alignof(std::decay_t<Parameters>)), ...);
  return bytes;
}

template <typename... Parameters>
struct Launcher {
  Launch launch;
  void (*kernel)(Parameters...);

  template <typename... Arguments>
  void operator()(Arguments&&... arguments) const {
    using ThisCall = Call<Parameters...>;
    const ThisCall call{kernel, {std::forward<Arguments>(arguments)...}};
    run(launch, &call, sizeof call, argument_bytes<Parameters...>(), &ThisCall::body);
  }
};

// kernel<<<blocks, threads, bytes, stream>>>(...) is rewritten to launcher(...)(...). Launches are
// finished when they return, in the order of the source, as on one stream.
template <typename... Parameters, typename Stream>
Launcher<Parameters...> launcher(const char* name, int64_t launch_bounds,
                                 void (*kernel)(Parameters...), int64_t blocks, int64_t threads,
                                 size_t dynamic_shared_bytes, Stream) {
  return {{name, launch_bounds, blocks, threads, dynamic_shared_bytes}, kernel};
}

}  // namespace emulation
