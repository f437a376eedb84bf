// What this build of the library holds; read by heptapod_fast/ops/library.py through ctypes.

#ifndef HEPTAPOD_ARCHITECTURES
#define HEPTAPOD_BUILD_INFO "CPU only"
#else
#define HEPTAPOD_BUILD_INFO "CPU + CUDA (" HEPTAPOD_ARCHITECTURES ")"
#endif

extern "C" __attribute__((visibility("default"))) const char* heptapod_build_info() {
  return HEPTAPOD_BUILD_INFO;
}
