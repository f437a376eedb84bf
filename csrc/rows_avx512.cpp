// The kernels of rows.h for AVX-512; CMakeLists.txt has the compiler's options.

#if defined(__x86_64__)
#define HEPTAPOD_ROWS kAvx512
#include "rows_kernels.inc"
#endif
