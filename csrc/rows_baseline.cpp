// The kernels of rows.h for every processor of the build's architecture.

#define HEPTAPOD_ROWS kBaseline
#include "rows_kernels.inc"
