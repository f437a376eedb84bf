"""Bugs to plant in csrc/: each must be caught by the emulation's own checks or by a comparison."""

from __future__ import annotations

from tests.csrc.emulator import Edit


def in_step(old: str, new: str) -> Edit:
    return Edit("adamw_ema.cu", old, new)


def in_norm(old: str, new: str) -> Edit:
    return Edit("global_norm.cu", old, new)


def in_words(old: str, new: str) -> Edit:
    return Edit("philox.cu", old, new)


def in_tables(old: str, new: str) -> Edit:
    return Edit("multi_tensor.cuh", old, new)


VECTORS_OF_STEP = """\
weight[e] = 1.0f - r.ema_decays[e];

  const int in_vectors = s.vectors ? n / 4 * 4 : 0;"""
VECTORS_OF_AVERAGES = """\
weight[e] = 1.0f - ema_decays[e];

  const int in_vectors = s.vectors ? n / 4 * 4 : 0;"""
LAST_WARP_SUM = """\
  if (threadIdx.x < 32) {
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);"""
FIRST_SUM = """\
  __shared__ double of_warp[Threads / 32];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_down_sync(~0u, sum, offset);"""
SLOT_OF_NORM = """\
  if (threadIdx.x == 0) shared = heptapod::find_slot(table, static_cast<int>(blockIdx.x));
  __syncthreads();"""

CONTRACTED = "step: the build lets the compiler contract"  # seen where the processor can

# {what is wrong: (changes, a text that the verdict holds)}
PLANTED: dict[str, tuple[list[Edit], str]] = {
    # Barriers.
    "step: no barrier before the plan is read": (
        [
            in_step(
                "make_plan<K>(shared, table, r);\n  __syncthreads();",
                "make_plan<K>(shared, table, r);",
            )
        ],
        "shared memory",
    ),
    "averages: no barrier before the slot is read": (
        [in_step(SLOT_OF_NORM, SLOT_OF_NORM.replace("\n  __syncthreads();", ""))],
        "shared memory",
    ),
    "norm: no barrier before the slot is read": (
        [in_norm(SLOT_OF_NORM, SLOT_OF_NORM.replace("\n  __syncthreads();", ""))],
        "shared memory",
    ),
    "norm: no barrier between the sums of warps and of the block": (
        [in_norm("= sum;\n  __syncthreads();", "= sum;")],
        "shared memory",
    ),
    "norm: a barrier that half of the block reaches": (
        [
            in_norm(
                "= sum;\n  __syncthreads();",
                "= sum;\n  if (threadIdx.x < Threads / 2) __syncthreads();",
            )
        ],
        "",
    ),
    "norm: threads leave before the barrier": (
        [
            in_norm(
                "  const Slot& s = table.slot[shared];",
                "  const Slot& s = table.slot[shared];\n  if (threadIdx.x >= s.numel) return;",
            )
        ],
        "does not go on",
    ),
    # Shared memory.
    "norm: the block's sum reads what no warp has written": (
        [in_norm("sum = threadIdx.x < Threads / 32 ?", "sum = threadIdx.x < 32 ?")],
        "",
    ),
    "norm: every lane writes its warp's sum": (
        [in_norm("if (threadIdx.x % 32 == 0) of_warp", "of_warp")],
        "with no barrier between them",
    ),
    "step: a part of the plan is made by a thread that does not exist": (
        [in_step("threadIdx.x == 64", "threadIdx.x == 640")],
        "has not written",
    ),
    # Shuffles.
    "norm: a mask without most of the lanes": (
        [in_norm(LAST_WARP_SUM, LAST_WARP_SUM.replace("~0u", "0xffu"))],
        "mask",
    ),
    "norm: half of the width": (
        [in_norm(FIRST_SUM, FIRST_SUM.replace("sum, offset)", "sum, offset, 16)"))],
        "norms: ",
    ),
    "norm: a width that is no power of two": (
        [in_norm(FIRST_SUM, FIRST_SUM.replace("sum, offset)", "sum, offset, 24)"))],
        "no power of two",
    ),
    "norm: half of the lanes left out": (
        [in_norm(FIRST_SUM, FIRST_SUM.replace("offset = 16", "offset = 8"))],
        "norms: ",
    ),
    "norm: lanes of a warp disagree about a shuffle": (
        [in_norm(LAST_WARP_SUM, LAST_WARP_SUM.replace("< 32)", "< 16)"))],
        "does not go on",
    ),
    # Tails.
    "step: the vector loop rounds up": (
        [in_step(VECTORS_OF_STEP, VECTORS_OF_STEP.replace("n / 4 * 4", "(n + 3) / 4 * 4"))],
        "outside of every tensor",
    ),
    "averages: the vector loop rounds up": (
        [in_step(VECTORS_OF_AVERAGES, VECTORS_OF_AVERAGES.replace("n / 4 * 4", "(n + 3) / 4 * 4"))],
        "outside of every tensor",
    ),
    "step: the last element of a tail is left": (
        [
            in_step(
                "i < n; i += kThreads) {\n    float p1", "i < n - 1; i += kThreads) {\n    float p1"
            )
        ],
        "step: ",
    ),
    "averages: a tail of one more": (
        [
            in_step(
                "i < n; i += kThreads) {\n    const float p1",
                "i <= n; i += kThreads) {\n    const float p1",
            )
        ],
        "",
    ),
    "step: the tail begins with the block": (
        [
            in_step(
                "i = in_vectors + threadIdx.x; i < n; i += kThreads) {\n    float p1",
                "i = threadIdx.x; i < n; i += kThreads) {\n    float p1",
            )
        ],
        "with no barrier between them",
    ),
    "step: threads of the vector loop overlap": (
        [
            in_step(
                "i += kThreads * 4) {\n    float p4[4], m4[4]",
                "i += kThreads) {\n    float p4[4], m4[4]",
            )
        ],
        "with no barrier between them",
    ),
    "norm: a group's bound is one too far": (
        [in_norm("j < end ?", "j <= end ?")],
        "outside of every tensor",
    ),
    "norm: the last group is read as a whole": (
        [in_norm("if (vectors && group < whole)", "if (vectors)")],
        "outside of every tensor",
    ),
    "norm: the unrolled loop goes too far": (
        [in_norm("group + (kLoads - 1) * kThreads < whole", "group < whole")],
        "outside of every tensor",
    ),
    "norm: a chunk forgets that its tensor ends": (
        [in_norm("static_cast<int>(min(kChunk, s.numel - begin))", "static_cast<int>(kChunk)")],
        "outside of every tensor",
    ),
    "words: one counter too many": (
        [in_words("i < items; i += stride", "i <= items; i += stride")],
        "outside of every tensor",
    ),
    # Alignment.
    "step: second moments are taken for aligned": (
        [in_step("aligned(s.m, 16) && aligned(s.v, 16) &&", "aligned(s.m, 16) &&")],
        "not aligned",
    ),
    "step: gradients are taken for aligned": (
        [in_step("aligned(s.g, 4 * sizeof(G))", "aligned(s.g, sizeof(G))")],
        "not aligned",
    ),
    "step: copies are taken for aligned": (
        [in_step("s.vectors = s.vectors && aligned(s.copy, 8);", "")],
        "not aligned",
    ),
    "averages: they are taken for aligned": (
        [
            in_step(
                "          s.vectors = s.vectors && aligned(s.ema[e], 16);\n        }\n      },",
                "        }\n      },",
            )
        ],
        "not aligned",
    ),
    "norm: everything is taken for aligned": (
        [in_norm("heptapod::aligned(data, 16)}", "true}")],
        "not aligned",
    ),
    # Grids and slots.
    "step: a chunk's first element in 32 bits": (
        [
            in_step(
                "const int64_t begin =\n      (static_cast<int>(blockIdx.x)",
                "const int begin =\n      (static_cast<int>(blockIdx.x)",
            )
        ],
        "outside of every tensor",
    ),
    "norm: a chunk's first element in 32 bits": (
        [
            in_norm(
                "const int64_t begin = (static_cast<int>(blockIdx.x)",
                "const int begin = (static_cast<int>(blockIdx.x)",
            )
        ],
        "outside of every tensor",
    ),
    "tables: one block too many": (
        [in_tables("static_cast<unsigned>(chunks))", "static_cast<unsigned>(chunks + 1))")],
        "",
    ),
    "tables: one block too few": (
        [in_tables("static_cast<unsigned>(chunks))", "static_cast<unsigned>(chunks - 1))")],
        "",
    ),
    "tables: bisection misses a slot's first chunk": (
        [in_tables("table.first_chunk[middle] <= block", "table.first_chunk[middle] < block")],
        "",
    ),
    "tables: chunks are not counted from the launch's first": (
        [in_tables("    table.count = 0;\n    chunks = 0;", "    table.count = 0;")],
        "",
    ),
    "words: a grid that rounds down": (
        [in_words("(items + kThreads - 1) / kThreads", "items / kThreads")],
        "invalid configuration",
    ),
    "words: blocks of a grid that strides overlap": (
        [
            in_words("kMaxBlocks = 1 << 16", "kMaxBlocks = 2"),
            in_words("stride = int64_t{gridDim.x} * kThreads", "stride = kThreads"),
        ],
        "with no barrier between them",
    ),
    "norm: a launch with more threads than the kernel is compiled for": (
        [in_norm("squares_kernel<<<count, kThreads,", "squares_kernel<<<count, kFinalThreads,")],
        "too many resources",
    ),
    "norm: all blocks write one partial sum": (
        [in_norm("partials[blockIdx.x] = total", "partials[0] = total")],
        "with no barrier between them",
    ),
    "norm: all threads write the partial sum": (
        [in_norm("if (threadIdx.x == 0) partials[blockIdx.x]", "partials[blockIdx.x]")],
        "with no barrier between them",
    ),
    "norm: later launches write over the first's sums": (
        [in_norm("        next += count;\n", "")],
        "norms_of_many: ",
    ),
    "norm: the last block's stride is the other kernel's": (
        [in_norm("i < n; i += kFinalThreads", "i < n; i += kThreads")],
        "norms_of_many: ",
    ),
    "step: the weight decay of another tensor": (
        [in_step("table.slot[plan.slot].weight_decay", "table.slot[0].weight_decay")],
        "step: ",
    ),
    "averages: decays of the first pass": (
        [in_step("rates.ema_decays + first", "rates.ema_decays")],
        "further_averages: ",
    ),
    # Values.
    CONTRACTED: (
        [Edit("CMakeLists.txt", '"-fmad=false"', '"-O3"')],
        "step: ",
    ),
    "step: the tail contracts a product and a sum, the vector loop does not": (
        [
            in_step(
                "    update(p1, m1, v1, to_float(g[i]), grad_scale, plan, r);",
                "    const float grad = to_float(g[i]) * grad_scale, old = v1;\n"
                "    update(p1, m1, v1, to_float(g[i]), grad_scale, plan, r);\n"
                "    v1 = fmaf(r.beta2, old, r.second * grad * grad);",
            )
        ],
        "step: ",
    ),
    "copies: neighbours change places": (
        [in_tables("__floats2bfloat162_rn(x[0], x[1])", "__floats2bfloat162_rn(x[1], x[0])")],
        "step: ",
    ),
    "step: gradients are written": (
        [
            in_step(
                "    store4(m + i, m4);", "    store4(m + i, m4);\n    const_cast<G*>(g)[i] = G{};"
            )
        ],
        "only reads",
    ),
    "words: a counter of 31 bits": (
        [
            in_words(
                "static_cast<uint32_t>(index[row])",
                "static_cast<uint32_t>(index[row]) & 0x7fffffffu",
            )
        ],
        "words: ",
    ),
}

# Not wrong, but small enough for every way through the code: these must pass.
SMALL: dict[str, list[Edit]] = {
    "grids that stride": [in_words("kMaxBlocks = 1 << 16", "kMaxBlocks = 2")],
    "short chunks": [
        in_step("kChunk = 1 << 14", "kChunk = 1 << 6"),
        in_norm("kChunk = 1 << 14", "kChunk = 1 << 11"),
    ],
    "the arguments of CUDA 12.0": [in_tables("CUDART_VERSION >= 12010", "false")],
    "launches of few chunks": [in_tables("needed > INT_MAX", "needed > 7")],
}
