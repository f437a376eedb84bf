// HEPTAPOD_CLONES on a function compiles it for several instruction sets and picks one when the
// library is loaded, so that a wheel built on one machine runs, and runs fast, on another. The
// build forbids fused multiply-add contraction, hence every clone gives the same bits.
#pragma once

#if defined(__x86_64__) && defined(__linux__) && defined(__GNUC__) && !defined(__clang__)
#define HEPTAPOD_CLONES __attribute__((target_clones("avx512f", "avx2", "default")))
#else
#define HEPTAPOD_CLONES
#endif
