// What every CUDA translation unit needs from PyTorch: the current stream and error checks.
#pragma once

#include <cuda_runtime.h>
#include <dlfcn.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

// Lives in libtorch_cuda.so. A strong reference would keep the library from loading beside a CPU
// build of PyTorch, so it is weak and looked at before it is called.
extern "C" __attribute__((weak, visibility("default"))) AOTITorchError
aoti_torch_get_current_cuda_stream(int32_t device_index, void** ret_stream);

namespace heptapod {

inline void check_cuda(cudaError_t status, const char* what) {
  STD_TORCH_CHECK(status == cudaSuccess, what, ": ", cudaGetErrorString(status));
}

using StreamGetter = AOTITorchError (*)(int32_t, void**);

inline StreamGetter find_stream_getter() {
  if (aoti_torch_get_current_cuda_stream != nullptr) return aoti_torch_get_current_cuda_stream;
  // The linker dropped libtorch.so from our dependencies, or PyTorch was loaded in a private scope:
  // ask the copy that is in the process already.
  void* cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
  if (cuda == nullptr) return nullptr;
  return reinterpret_cast<StreamGetter>(dlsym(cuda, "aoti_torch_get_current_cuda_stream"));
}

// PyTorch's current stream of one device. Throws where this PyTorch has no CUDA.
inline cudaStream_t current_stream(int32_t device_index) {
  static const StreamGetter getter = find_stream_getter();
  STD_TORCH_CHECK(getter != nullptr, "this PyTorch was built without CUDA: no current stream");
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(getter(device_index, &stream));
  return static_cast<cudaStream_t>(stream);
}

}  // namespace heptapod
