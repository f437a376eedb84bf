"""A whole optimizer step (gradient norm, clipping, AdamW, one average) against its peers.

    pytest bench/bench_adamw_ema.py --benchmark-only

Also its two operations alone. Bytes that any implementation must move per parameter: 4 for the norm
(g read), 28 for AdamW (p, m, v read and written, g read) and 8 for the average. All contenders of a
size share parameters, gradients and average, each has moments of its own.
"""

import functools

import torch

from bench import harness
from heptapod_fast.ops.adamw_ema import adamw_ema
from heptapod_fast.ops.global_norm import global_norm

BETAS, EPS, DECAY, CLIP, RATE, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.9999, 1.0, 1e-4, 0.02
# Blocks and width of Transformers with as many parameters as the model: 207, 477 and 941 million.
SIZES = {"cuda": {"B": (29, 768), "L": (38, 1024), "H": (48, 1280)}, "cpu": {"tiny": (7, 128)}}


def shapes(layers, width):
    """Per block some large tensors and many small ones."""
    block = [
        (3 * width, width),
        (3 * width,),
        (width, width),
        (width,),
        (4 * width, width),
        (4 * width,),
        (width, 4 * width),
        (width,),
        (width,),
        (width,),
        (width,),
        (width,),
    ]
    return block * layers


@functools.lru_cache(maxsize=1)  # one size at a time: H alone is 11 GB
def inputs(device, layers, width):
    """(parameters, gradients, average)."""
    params = [torch.randn(shape, device=device) for shape in shapes(layers, width)]
    return params, [torch.randn_like(p) for p in params], [p.clone() for p in params]


def ours(clip, implementation):
    def prepare(made):
        params, grads, ema = made
        moments = [[torch.zeros_like(p) for p in params] for _ in range(2)]
        scalar = functools.partial(torch.tensor, device=params[0].device)
        lr, step, one, decays = scalar(RATE), scalar(1.0), scalar(1.0), scalar([DECAY])

        def run():
            scale = one
            if clip:
                scale = (CLIP / (global_norm(grads, implementation) + 1e-6)).clamp(max=1.0)
            adamw_ema(
                params,
                grads,
                *moments,
                [ema],
                lr=lr,
                step=step,
                grad_scale=scale,
                ema_decays=decays,
                weight_decays=[WEIGHT_DECAY] * len(params),
                beta1=BETAS[0],
                beta2=BETAS[1],
                eps=EPS,
                implementation=implementation,
            )

        return run

    return prepare


def leaves(made):
    """The parameters as an optimizer wants them, in the same memory."""
    found = [p.detach().requires_grad_() for p in made[0]]
    for leaf, grad in zip(found, made[1]):
        leaf.grad = grad
    return found


def with_optimizer(make, clip, wrap=lambda f: f):
    """make(parameters) -> an optimizer; its step between PyTorch's clipping and foreach average."""

    def prepare(made):
        params, ema = leaves(made), made[2]
        optimizer = make(params)

        def run():
            if clip:
                torch.nn.utils.clip_grad_norm_(params, CLIP, foreach=True)
            optimizer.step()
            with torch.no_grad():
                torch._foreach_lerp_(ema, params, 1 - DECAY)

        return wrap(run)

    return prepare


def torch_adamw(variant):
    def make(params):
        # A captured step counts on the device; on CPU there is nothing to capture.
        capturable = params[0].is_cuda
        return torch.optim.AdamW(
            params,
            lr=RATE,
            betas=BETAS,
            eps=EPS,
            weight_decay=WEIGHT_DECAY,
            capturable=capturable,
            **{variant: True},
        )

    return make


def apex_adam(params):
    try:
        from apex.optimizers import FusedAdam
    except (ImportError, RuntimeError) as error:
        raise harness.Missing(
            "apex is not installed: build it from github.com/NVIDIA/apex with --cpp_ext --cuda_ext"
        ) from error
    if not params[0].is_cuda:
        raise harness.Missing("apex runs on cuda tensors")
    return FusedAdam(
        params, lr=RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, capturable=True
    )


def apex_adam_swa(made):
    """Clips, updates and averages in one kernel. It also stores a copy for the forward pass, here
    onto the parameters themselves, and sends addresses to the device in every step, which no CUDA
    graph can capture."""
    try:
        from apex.contrib.openfold_triton.fused_adam_swa import AdamMathType, FusedAdamSWA
    except (ImportError, RuntimeError) as error:
        raise harness.Missing(
            "apex's fused_adam_swa is not installed: build apex from github.com/NVIDIA/apex"
        ) from error
    params, ema = leaves(made), made[2]
    optimizer = FusedAdamSWA(
        params,
        params,
        ema,
        DECAY,
        lr=RATE,
        betas=BETAS,
        eps=EPS,
        adam_math_mode=AdamMathType.ApexAdamW,
        weight_decay=WEIGHT_DECAY,
        set_grad_none=False,
    )

    def run():
        norm = torch.nn.utils.get_total_norm([p.grad for p in params], foreach=True)
        optimizer.step(grad_clip_scale=(CLIP / (norm + 1e-6)).clamp(max=1.0))

    return run


def norm_alone(function):
    return lambda made: functools.partial(function, made[1])


def cases(device):
    found, fastest = [], "cuda" if device == "cuda" else "auto"
    for size, (layers, width) in SIZES[device].items():
        count = sum(torch.Size(shape).numel() for shape in shapes(layers, width))
        make = functools.partial(inputs, device, layers, width)
        name = f"{size}, {count / 1e6:.1f}M parameters"
        found.append(
            harness.Case(
                "adamw_ema",
                f"whole step, {name}",
                make,
                {
                    "ours": ours(True, fastest),
                    "torch fused + foreach EMA + clip": with_optimizer(torch_adamw("fused"), True),
                    "torch foreach": with_optimizer(torch_adamw("foreach"), True),
                    "apex": with_optimizer(apex_adam, True),
                    "apex fused_adam_swa": apex_adam_swa,
                },
                bytes=40 * count,
                gate=">= 1.4x best peer, 85% of copy bandwidth",
                aim=">= 2x best peer, 92% of copy bandwidth",
            )
        )
        found.append(
            harness.Case(
                "adamw_ema",
                f"update and average alone, {name}",
                make,
                {
                    "ours": ours(False, fastest),
                    "torch fused + foreach EMA": with_optimizer(torch_adamw("fused"), False),
                },
                bytes=36 * count,
                gate="85% of copy bandwidth",
                aim="92% of copy bandwidth",
            )
        )
        found.append(
            harness.Case(
                "global_norm",
                f"norm alone, {name}",
                make,
                {
                    "ours": norm_alone(functools.partial(global_norm, implementation=fastest)),
                    "torch foreach": norm_alone(
                        functools.partial(torch.nn.utils.get_total_norm, foreach=True)
                    ),
                    "eager": norm_alone(functools.partial(global_norm, implementation="reference")),
                },
                bytes=4 * count,
                gate="85% of copy bandwidth",
                aim="92% of copy bandwidth",
            )
        )
        if size in ("B", "tiny"):  # compiling hundreds of tensors takes minutes
            found.append(
                harness.Case(
                    "adamw_ema",
                    f"compiled peer, whole step, {name}",
                    make,
                    {
                        "ours": ours(True, fastest),
                        "compiled": with_optimizer(torch_adamw("foreach"), True, harness.compiled),
                    },
                    bytes=40 * count,
                )
            )
    return found


bench_adamw_ema = harness.benchmark_of(cases)
