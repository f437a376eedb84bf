"""What is compiled offline: every kernel in every configuration that the launchers can choose.

One function per kernel module, which yields its cases for an architecture; BY_MODULE lists them.
A case says what the launcher would pass: types of arguments, constants, options of the compiler,
which pointers are None, and which integers are no multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import triton

from heptapod_fast.kernels import (
    adaln,
    attention,
    attention_backward,
    bias_gelu,
    columns,
    diffusion_loss,
    diffusion_mlp,
    dropout,
    flow_loss,
    gather_rows,
    layer_norm,
    linear_cross_entropy,
    rms_norm,
    rotary,
    swiglu,
    tuning,
)
from heptapod_fast.kernels.offline_case import Case
from heptapod_fast.kernels.randomness import noise_block
from heptapod_fast.ops.masks import HEAD_WIDTHS

# Of a configuration, what the compiler takes and what only the launcher does; the rest are
# constants of the kernel.
OPTIONS = ("num_warps", "maxnreg")
LAUNCHER = ("programs",)

DROP = 0.1  # the models' dropout
MASK = dict(key_ptr="*i64", counter_ptr="*i64", rows_per_key="i32", counters="i32", scale="fp32")


def threshold(p: float) -> int:
    """The THRESHOLD of a dropout probability."""
    return round(p * 2**32)


def make(
    name: str,
    kernel,
    types: dict[str, str],
    config: dict[str, int],
    constants: dict | None = None,
    absent: tuple[str, ...] = (),
    **more,
) -> Case:
    """A case. types: of every argument that some kernel of the module has; config: from the table;
    constants: what the launcher adds to it; absent: pointers that are None; more: as Case says."""
    options = {key: config[key] for key in OPTIONS if key in config}
    constexprs = {key: config[key] for key in config if key not in (*OPTIONS, *LAUNCHER)}
    constexprs |= constants or {}
    constexprs |= {pointer: None for pointer in absent if pointer in kernel.arg_names}
    types = {each: types[each] for each in kernel.arg_names if each not in constexprs}
    return Case(name, kernel, types, constexprs, options, **more)


ADALN_TYPES = dict(
    x_ptr="*bf16",
    branch_ptr="*bf16",
    branch_bias_ptr="*fp32",
    gate_ptr="*bf16",
    shift_ptr="*bf16",
    scale_ptr="*bf16",
    weight_ptr="*fp32",
    bias_ptr="*fp32",
    new_ptr="*bf16",
    out_ptr="*bf16",
    mean_ptr="*fp32",
    rstd_ptr="*fp32",
    dnew_ptr="*bf16",
    dout_ptr="*bf16",
    dx_ptr="*bf16",
    dbranch_ptr="*bf16",
    dgate_ptr="*bf16",
    dscale_ptr="*bf16",
    partial_ptr="*fp32",
    rows="i32",
    width="i32",
    slab="i32",
    dout_stride="i32",
    gate_stride="i32",
    shift_stride="i32",
    scale_stride="i32",
    dgate_stride="i32",
    dscale_stride="i32",
    eps="fp32",
)
ADALN_ABSENT = dict(
    first=("branch_ptr", "branch_bias_ptr", "gate_ptr", "new_ptr", "dbranch_ptr", "dgate_ptr"),
    middle=(),
    last=("weight_ptr", "bias_ptr", "dnew_ptr"),
)


def adaln_cases(arch: str) -> Iterator[Case]:
    """The three places of a block chain: first (no branch), middle, last (no parameters)."""
    kernels = dict(forward=adaln.adaln_forward_kernel, backward=adaln.adaln_backward_kernel)
    for direction, kernel in kernels.items():
        for size, config in tuning.buckets("adaln", direction, arch).items():
            for place, absent in ADALN_ABSENT.items():
                constants = dict(
                    BRANCH=place != "first",
                    AFFINE=place != "last",
                    BLOCK=triton.next_power_of_2(size),
                )
                if direction == "backward":
                    constants["DNEW"] = place != "last"
                yield make(
                    f"adaln {place} {direction} <= {size}",
                    kernel,
                    ADALN_TYPES,
                    config,
                    constants,
                    absent,
                    unaligned=("slab",),
                )


# Pointers of attention's kernels that are None unless the mask is of one of these kinds.
ATTENTION_POINTERS = dict(
    ends_ptr=("ends",),
    schedule_ptr=("blocks",),
    bits_ptr=("blocks",),
)
ATTENTION_BACKWARD_POINTERS = dict(
    ends_or_schedule_ptr=("ends", "blocks"),
    bits_ptr=("blocks",),
)
ATTENTION_TYPES = dict(
    q_ptr="*bf16",
    k_ptr="*bf16",
    v_ptr="*bf16",
    out_ptr="*bf16",
    lse_ptr="*fp32",
    ends_ptr="*i32",
    schedule_ptr="*i32",
    bits_ptr="*i32",
    queries="i32",
    keys="i32",
    heads="i32",
    programs_per_head="i32",
    chunk="i32",
    bits_stride="i32",
    q_batch_stride="i32",
    q_row_stride="i32",
    kv_batch_stride="i32",
    kv_row_stride="i32",
    scale_log2="fp32",
)
ATTENTION_BACKWARD_TYPES = dict(
    grad_ptr="*bf16",
    q_ptr="*bf16",
    k_ptr="*bf16",
    v_ptr="*bf16",
    out_ptr="*bf16",
    lse_ptr="*fp32",
    dq_ptr="*bf16",
    dk_ptr="*bf16",
    dv_ptr="*bf16",
    delta_ptr="*fp32",
    ends_or_schedule_ptr="*i32",
    bits_ptr="*i32",
    queries="i32",
    keys="i32",
    heads="i32",
    bits_stride="i32",
    chunk="i32",
    span="i32",
    q_batch_stride="i32",
    q_row_stride="i32",
    kv_batch_stride="i32",
    kv_row_stride="i32",
    dq_batch_stride="i32",
    dq_row_stride="i32",
    dkv_batch_stride="i32",
    dkv_row_stride="i32",
    scale="fp32",
    scale_log2="fp32",
)
# HMMA accepted on sm_90, by width: the last columns of dQ, transposed, are 16 or 32 rows, too few
# for wgmma.
ATTENTION_HMMA = {80: 8, 96: 16}
# Bytes of stack accepted, by architecture and width, the most of Triton 3.6 and 3.7. Only for
# lengths that do not fill their blocks, and for widths that no model has.
ATTENTION_STACK = {
    ("sm_80", 64): 24,
    ("sm_80", 80): 80,
    ("sm_80", 96): 376,
    ("sm_80", 128): 8,
    ("sm_90", 80): 40,
}


def attention_shapes(width: int) -> list[tuple[str, int]]:
    """(kind, length) of what is compiled for heads of a width."""
    is_width_of_a_model = width in (64, 80)
    if not is_width_of_a_model:
        return [("full", 257), ("causal", 255)]
    of_patches = [("causal", 64), ("causal", 16)] if width == 64 else []
    return [
        *of_patches,
        ("full", 256),
        ("causal", 256),
        ("full", 257),  # a tail
        ("full", 321),  # a tail, and 320 is no multiple of 128
        ("full", 255),  # blocks that are not filled
        ("blocks", 512),
        ("blocks", 514),
        ("ends", 100),
        ("chunk", 51),
    ]


def attention_settings(
    direction: str, arch: str, settings_of: Callable[[str, int, int, int, dict], dict]
) -> Iterator[tuple[str, int, int, dict]]:
    """(kind, length, width, the kernel's constants and options) of everything that is compiled.

    settings_of: makes the constants and options from (kind, queries, keys, width, config).
    """
    for width in HEAD_WIDTHS:
        for kind, length in attention_shapes(width):
            name = attention.variant(direction, kind, length, length)
            config = tuning.config("attention", name, width, arch)
            yield kind, length, width, settings_of(kind, length, length, width, config)


def attention_case(
    direction: str,
    kernel,
    shape: tuple[str, int, int],
    settings: dict,
    types: dict[str, str],
    pointers_of_kinds: dict[str, tuple[str, ...]],
    **expected,
) -> Case:
    """One case.

    shape: (kind, length, width). settings: the kernel's constants and options. types: of every
    argument that is no constant. pointers_of_kinds: which kinds of masks pass a pointer that is
    None otherwise. expected: what the compiled kernel may cost, as Case takes it.
    """
    kind, length, width = shape
    absent = {pointer: None for pointer, kinds in pointers_of_kinds.items() if kind not in kinds}
    constexprs = absent | settings
    num_warps = constexprs.pop("num_warps")
    return Case(
        name=f"attention {direction}, {kind} {length}, E {width}",
        kernel=kernel,
        types={name: type for name, type in types.items() if name not in absent},
        constexprs=constexprs,
        options=dict(num_warps=num_warps),
        tensor_cores=True,
        **expected,
    )


def attention_cases(arch: str) -> Iterator[Case]:
    """The forward kernel for every width of heads."""
    found = attention_settings("forward", arch, attention.constants)
    for kind, length, width, settings in found:
        # How many warps must fit on an SM at once, so that some work while others wait: more for
        # lengths that fill their blocks, because these are what the models run.
        wanted_warps = 4
        if settings["EVEN"]:
            wanted_warps = {64: 16, 80: 12}.get(width, 4)
        yield attention_case(
            "forward",
            attention.attention_forward_kernel,
            (kind, length, width),
            settings,
            ATTENTION_TYPES,
            ATTENTION_POINTERS,
            ctas=max(1, wanted_warps // settings["num_warps"]),
        )


def attention_backward_cases(arch: str) -> Iterator[Case]:
    """The backward kernel for every width of heads."""
    found = attention_settings("backward", arch, attention_backward.backward_constants)
    for kind, length, width, settings in found:
        is_what_models_run = settings["EVEN"] and width <= 80
        spill = 0 if is_what_models_run else ATTENTION_STACK.get((arch, width), 0)
        yield attention_case(
            "backward",
            attention_backward.attention_backward_kernel,
            (kind, length, width),
            settings,
            ATTENTION_BACKWARD_TYPES,
            ATTENTION_BACKWARD_POINTERS,
            spill=spill,
            hmma=ATTENTION_HMMA.get(width, 0),
            why="dK, dV, S and dP fill the registers" if spill else "",
        )


BIAS_GELU_TYPES = dict(
    x_ptr="*bf16",
    bias_ptr="*fp32",
    out_ptr="*bf16",
    grad_ptr="*bf16",
    dx_ptr="*bf16",
    partial_ptr="*fp32",
    rows="i32",
    width="i32",
    slab="i32",
    **MASK,
)


def bias_gelu_cases(arch: str) -> Iterator[Case]:
    """GELU with dropout, as in a block, and SiLU without, as in the diffusion MLP."""
    backward_configs = tuning.buckets("bias_gelu", "backward", arch)
    for size, forward_config in tuning.buckets("bias_gelu", "forward", arch).items():
        for name, gelu, p in (("bias_gelu+dropout", True, DROP), ("bias_silu", False, 0.0)):
            constants = dict(GELU=gelu, THRESHOLD=threshold(p))
            yield make(
                f"{name} forward <= {size}",
                bias_gelu.bias_gelu_forward_kernel,
                BIAS_GELU_TYPES,
                forward_config,
                constants,
            )
            yield make(
                f"{name} backward <= {size}",
                bias_gelu.bias_gelu_backward_kernel,
                BIAS_GELU_TYPES,
                backward_configs[size],
                constants,
                unaligned=("slab",),
            )


def columns_cases(arch: str) -> Iterator[Case]:
    """The second stage of all column sums."""
    yield make(
        "column_sum",
        columns.column_sum_kernel,
        dict(partial_ptr="*fp32", out_ptr="*fp32", programs="i32", width="i32"),
        dict(ROWS=columns.ROWS, BLOCK=columns.BLOCK, num_warps=4),
    )


DIFFUSION_LOSS_TYPES = dict(
    x0_ptr="*fp32",
    t_ptr="*i64",
    table_ptr="*fp32",
    index_ptr="*i64",
    slot_ptr="*i64",
    xt_ptr="*fp32",
    loss_ptr="*fp32",
    grad_ptr="*fp32",
    rows="i32",
    tokens="i32",
    steps="i32",
    time0="i32",
    time1="i32",
    noise0="i32",
    noise1="i32",
)
LOSS_CHANNELS = (16, 48, 192, 768, 4096)
LOSS_REPEAT = 4


def _loss_config(operation: str, kernel: str, channels: int, arch: str) -> dict[str, int]:
    """What the launchers of the diffusion losses choose for so many channels."""
    config = tuning.config(operation, kernel, channels, arch)
    config |= dict(BLOCK=noise_block(channels), CHANNELS=channels, REPEAT=LOSS_REPEAT)
    if kernel == "forward":
        config["REPEATS"] = min(LOSS_REPEAT, config["ROWS"])
    return config


def diffusion_loss_cases(arch: str) -> Iterator[Case]:
    """Latents of 16 channels, patches of pixels, the widest; float32 and bfloat16 predictions."""
    free = dict(unaligned=tuple(diffusion_loss.FREE))
    for channels in LOSS_CHANNELS:
        yield make(
            f"diffusion_loss inputs, C = {channels}",
            diffusion_loss.diffusion_inputs_kernel,
            DIFFUSION_LOSS_TYPES,
            _loss_config("diffusion_loss", "inputs", channels, arch),
            **free,
        )
        for dtype, bound in (("fp32", True), ("bf16", True), ("fp32", False)):
            what = f"C = {channels}, {dtype}{'' if bound else ', mse'}"
            types = DIFFUSION_LOSS_TYPES | dict(prediction_ptr=f"*{dtype}", out_ptr=f"*{dtype}")
            yield make(
                f"diffusion_loss forward, {what}",
                diffusion_loss.diffusion_loss_forward_kernel,
                types,
                _loss_config("diffusion_loss", "forward", channels, arch),
                dict(BOUND=bound),
                **free,
            )
            yield make(
                f"diffusion_loss backward, {what}",
                diffusion_loss.diffusion_loss_backward_kernel,
                types,
                _loss_config("diffusion_loss", "backward", channels, arch),
                dict(BOUND=bound),
                **free,
            )


DIFFUSION_MLP_TYPES = dict(
    time_ptr="*bf16",
    t_ptr="*i64",
    condition_ptr="*bf16",
    out_ptr="*bf16",
    ds_ptr="*bf16",
    order_ptr="*i64",
    bound_ptr="*i32",
    rows="i32",
    tokens="i32",
    width="i32",
    repeat="i32",
)


def diffusion_mlp_cases(arch: str) -> Iterator[Case]:
    """SiLU(time + condition) and its gradients; the rest of the MLP is adaln, bias_gelu, cuBLAS."""
    for name, kernel in (
        ("silu_sum", diffusion_mlp.silu_sum_kernel),
        ("condition_gradient", diffusion_mlp.condition_gradient_kernel),
        ("time_gradient", diffusion_mlp.time_gradient_kernel),
    ):
        for size, config in tuning.buckets("adaln", name, arch).items():
            yield make(
                f"diffusion_mlp {name} <= {size}",
                kernel,
                DIFFUSION_MLP_TYPES,
                config,
                unaligned=("repeat",),
            )


def dropout_cases(arch: str) -> Iterator[Case]:
    """Dropout on its own."""
    yield make(
        "dropout",
        dropout.dropout_kernel,
        dict(x_ptr="*bf16", out_ptr="*bf16", width="i32", **MASK),
        dict(BLOCK=dropout.BLOCK, num_warps=4),
        dict(THRESHOLD=threshold(DROP)),
        unaligned=("rows_per_key", "counters"),
    )


FLOW_LOSS_TYPES = dict(
    x0_ptr="*fp32",
    index_ptr="*i64",
    slot_ptr="*i64",
    xt_ptr="*fp32",
    time_ptr="*fp32",
    loss_ptr="*fp32",
    grad_ptr="*fp32",
    rows="i32",
    tokens="i32",
    time0="i32",
    time1="i32",
    noise0="i32",
    noise1="i32",
)


def flow_loss_cases(arch: str) -> Iterator[Case]:
    """As the diffusion loss."""
    free = dict(unaligned=tuple(flow_loss.KEYS))
    for channels in LOSS_CHANNELS:
        yield make(
            f"flow_loss inputs, C = {channels}",
            flow_loss.flow_inputs_kernel,
            FLOW_LOSS_TYPES,
            _loss_config("flow_loss", "inputs", channels, arch),
            **free,
        )
        for dtype in ("fp32", "bf16"):
            types = FLOW_LOSS_TYPES | dict(prediction_ptr=f"*{dtype}", out_ptr=f"*{dtype}")
            yield make(
                f"flow_loss forward, C = {channels}, {dtype}",
                flow_loss.flow_loss_forward_kernel,
                types,
                _loss_config("flow_loss", "forward", channels, arch),
                **free,
            )
            yield make(
                f"flow_loss backward, C = {channels}, {dtype}",
                flow_loss.flow_loss_backward_kernel,
                types,
                _loss_config("flow_loss", "backward", channels, arch),
                **free,
            )


def gather_rows_cases(arch: str) -> Iterator[Case]:
    """Gathering reads an index of int64, scattering the inverse, of int32."""
    integers = dict(rows="i32", limit="i32", width="i32", stride="i32")
    for kernel, source in (("gather", "*i64"), ("scatter", "*i32")):
        for size, config in tuning.buckets("gather_rows", kernel, arch).items():
            for dtype in ("bf16", "fp32"):
                yield make(
                    f"gather_rows {kernel} {dtype} <= {size}",
                    gather_rows.copy_rows_kernel,
                    dict(x_ptr=f"*{dtype}", source_ptr=source, out_ptr=f"*{dtype}", **integers),
                    config,
                    unaligned=("rows", "limit"),
                )
    yield make(
        "gather_rows invert",
        gather_rows.invert_index_kernel,
        dict(index_ptr="*i64", inverse_ptr="*i32", count="i32", limit="i32"),
        dict(BLOCK=gather_rows.INVERT_BLOCK, num_warps=4),
        unaligned=("count", "limit"),
    )


LAYER_NORM_TYPES = dict(
    x_ptr="*bf16",
    branch_ptr="*bf16",
    branch_bias_ptr="*fp32",
    weight_ptr="*fp32",
    bias_ptr="*fp32",
    sum_ptr="*bf16",
    out_ptr="*bf16",
    stats_ptr="*fp32",
    grad_ptr="*bf16",
    grad_sum_ptr="*bf16",
    dx_ptr="*bf16",
    dbranch_ptr="*bf16",
    partial_ptr="*fp32",
    rows="i32",
    slab="i32",
    eps="fp32",
    **MASK,
)


def _layer_norm_case(
    name: str,
    kernel,
    width: int,
    arch: str,
    absent: tuple[str, ...] = (),
    bias: bool = True,
    p: float = 0.0,
) -> Case:
    """absent: pointers that are None besides the mask's; bias: whether the branch has one."""
    is_forward = kernel is layer_norm.layer_norm_forward_kernel
    config = tuning.config("layer_norm", "forward" if is_forward else "backward", width, arch)
    _, config = layer_norm.split_width(width, config)
    return make(
        f"{name} {width}",
        kernel,
        LAYER_NORM_TYPES,
        config,
        dict(BIAS=bias, THRESHOLD=threshold(p)),
        absent if p else (*absent, "key_ptr", "counter_ptr"),
        unaligned=("slab", "rows_per_key", "counters"),
    )


def layer_norm_cases(arch: str) -> Iterator[Case]:
    """The models' widths, the widest one, and one with a masked part."""
    forward = layer_norm.layer_norm_forward_kernel
    backward = layer_norm.layer_norm_backward_kernel
    no_sum = ("branch_ptr", "branch_bias_ptr", "sum_ptr")
    no_sum_gradient = ("grad_sum_ptr", "dbranch_ptr")
    no_parameters = ("weight_ptr", "partial_ptr")
    for width in (768, 1024, 1280, 1536, 3000, 4096):
        yield _layer_norm_case("add_layer_norm+dropout forward", forward, width, arch, p=DROP)
        yield _layer_norm_case("add_layer_norm+dropout backward", backward, width, arch, p=DROP)
        if width <= 1280:
            yield _layer_norm_case(
                "add_layer_norm backward", backward, width, arch, ("dbranch_ptr",)
            )
        if width == 1024:
            yield _layer_norm_case("layer_norm forward", forward, width, arch, no_sum, bias=False)
            yield _layer_norm_case(
                "layer_norm backward", backward, width, arch, no_sum_gradient, bias=False
            )
            yield _layer_norm_case(
                "layer_norm without parameters backward",
                backward,
                width,
                arch,
                no_sum_gradient + no_parameters,
                bias=False,
            )


CROSS_ENTROPY_TYPES = dict(
    pair_ptr="*i32",
    target_ptr="*i64",
    weight_ptr="*fp32",
    loss_ptr="*fp32",
    weighted_ptr="*fp32",
    partial_ptr="*fp32",
    rows="i32",
    columns="i32",
    slab="i32",
)
# (targets, gradient, row weights, whether the row fills the block)
CROSS_ENTROPY_VARIANTS = (
    (1, True, False, True),
    (1, True, True, True),
    (4, True, True, True),
    (16, True, False, True),
    (1, False, False, True),
    (1, True, False, False),
)


def _cross_entropy_case(
    name: str,
    kernel,
    dtype: str,
    config: dict[str, int],
    targets: int,
    gradient: bool,
    weights: bool,
    spill: int,
) -> Case:
    """The suffix of the name says what the variant is."""
    absent = []
    if not weights:
        absent.append("weight_ptr")
    if not gradient:
        absent.append("partial_ptr")
    weighted = ", weights" if weights else ""
    alone = "" if gradient else ", loss alone"
    return make(
        f"linear_cross_entropy {name}, {targets} targets{weighted}{alone}",
        kernel,
        CROSS_ENTROPY_TYPES | dict(logits_ptr=f"*{dtype}"),
        config,
        dict(K=targets, GRADIENT=gradient),
        tuple(absent),
        unaligned=("slab", "rows"),
        spill=spill,
        why="no registers are left" if spill else "",
    )


def linear_cross_entropy_cases(arch: str) -> Iterator[Case]:
    """Whole rows in registers at three sizes, blocks of codes, and the scaling of a gradient."""
    largest = tuning.largest("linear_cross_entropy", "rows")
    for size, config in tuning.buckets("linear_cross_entropy", "rows", arch).items():
        variants = CROSS_ENTROPY_VARIANTS if size == largest else CROSS_ENTROPY_VARIANTS[:1]
        for targets, gradient, weights, whole in variants:
            # 16 warps can have 128 registers each, which only Blackwell's compiler finds too few.
            tight = size == largest and arch == "sm_100" and targets > 1
            yield _cross_entropy_case(
                f"rows of {size}{'' if whole else ', partly filled'}",
                linear_cross_entropy.cross_entropy_rows_kernel,
                "bf16",
                config | dict(BLOCK=size, WHOLE=whole),
                targets,
                gradient,
                weights,
                spill=48 if tight else 0,
            )
    (config,) = tuning.buckets("linear_cross_entropy", "blocks", arch).values()
    for dtype in ("bf16", "fp32"):
        for targets, gradient, weights, whole in CROSS_ENTROPY_VARIANTS:
            if not whole:
                continue
            # Triton 3.6 spills an address or two; 3.7 none.
            yield _cross_entropy_case(
                f"blocks {dtype}",
                linear_cross_entropy.cross_entropy_blocks_kernel,
                dtype,
                config,
                targets,
                gradient,
                weights,
                spill=16,
            )
    yield make(
        "linear_cross_entropy scale",
        linear_cross_entropy.scale_kernel,
        dict(x_ptr="*bf16", factor_ptr="*fp32", out_ptr="*bf16", count="i32"),
        dict(BLOCK=linear_cross_entropy.SCALE_BLOCK, num_warps=8),
    )


RMS_NORM_TYPES = dict(
    x_ptr="*bf16",
    branch_ptr="*bf16",
    weight_ptr="*fp32",
    sum_ptr="*bf16",
    out_ptr="*bf16",
    scale_ptr="*fp32",
    grad_ptr="*bf16",
    grad_sum_ptr="*bf16",
    dx_ptr="*bf16",
    dbranch_ptr="*bf16",
    partial_ptr="*fp32",
    rows="i32",
    slab="i32",
    eps="fp32",
    **MASK,
)


def rms_norm_cases(arch: str) -> Iterator[Case]:
    """The models' widths and the widest one, with dropout, without, and the norm alone."""
    forward = rms_norm.rms_norm_forward_kernel
    backward = rms_norm.rms_norm_backward_kernel
    no_mask = ("key_ptr", "counter_ptr")
    for width in (768, 1024, 1280, 1536, 4096):
        for name, kernel, absent, p in (
            ("add_rms_norm+dropout forward", forward, (), DROP),
            ("add_rms_norm+dropout backward", backward, (), DROP),
            ("add_rms_norm backward", backward, ("dbranch_ptr", *no_mask), 0.0),
            ("rms_norm forward", forward, ("branch_ptr", "sum_ptr", *no_mask), 0.0),
        ):
            which = "forward" if kernel is forward else "backward"
            config = tuning.config("rms_norm", which, width, arch)
            block = 1 << (width - 1).bit_length()
            yield make(
                f"{name} {width}",
                kernel,
                RMS_NORM_TYPES,
                dict(config, WIDTH=width, BLOCK=block),
                dict(THRESHOLD=threshold(p)),
                absent,
                unaligned=("slab", "rows_per_key", "counters"),
            )


def rotary_cases(arch: str) -> Iterator[Case]:
    """Heads of 64 and of 100 channels, both directions."""
    types = dict(x_ptr="*bf16", table_ptr="*fp32", out_ptr="*bf16", elements="i32")
    for width, heads in ((64, 16), (100, 32)):
        config = tuning.config("rotary", "rotate", width, arch)
        block = 1 << (width // 2 - 1).bit_length()
        for back in (False, True):
            yield make(
                f"rotary {'back' if back else 'forward'} {heads} x {width}",
                rotary.rotary_kernel,
                types,
                dict(config, HEADS=heads, WIDTH=width, PAIRS=block),
                dict(BACK=back),
                unaligned=("elements",),
            )


SWIGLU_TYPES = dict(
    x_ptr="*bf16",
    y_ptr="*bf16",
    out_ptr="*bf16",
    grad_ptr="*bf16",
    dx_ptr="*bf16",
    dy_ptr="*bf16",
    elements="i32",
)


def swiglu_cases(arch: str) -> Iterator[Case]:
    """Both directions."""
    kernels = dict(forward=swiglu.swiglu_forward_kernel, backward=swiglu.swiglu_backward_kernel)
    for direction, kernel in kernels.items():
        for size, config in tuning.buckets("swiglu", direction, arch).items():
            yield make(f"swiglu {direction} <= {size}", kernel, SWIGLU_TYPES, config)


BY_MODULE: dict[str, Callable[[str], Iterator[Case]]] = {
    "adaln": adaln_cases,
    "attention": attention_cases,
    "attention_backward": attention_backward_cases,
    "bias_gelu": bias_gelu_cases,
    "columns": columns_cases,
    "diffusion_loss": diffusion_loss_cases,
    "diffusion_mlp": diffusion_mlp_cases,
    "dropout": dropout_cases,
    "flow_loss": flow_loss_cases,
    "gather_rows": gather_rows_cases,
    "layer_norm": layer_norm_cases,
    "linear_cross_entropy": linear_cross_entropy_cases,
    "rms_norm": rms_norm_cases,
    "rotary": rotary_cases,
    "swiglu": swiglu_cases,
}
