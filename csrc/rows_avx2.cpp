// The kernels of rows.h for AVX2 and FMA; CMakeLists.txt has the compiler's options.

#if defined(__x86_64__)
#define HEPTAPOD_ROWS kAvx2
#include "rows_kernels.inc"
#endif
