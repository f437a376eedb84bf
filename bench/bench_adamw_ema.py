"""A whole optimizer step (gradient norm, clipping, AdamW, one average) against its peers.

    python bench/bench_adamw_ema.py
    pytest bench/bench_adamw_ema.py --benchmark-only

Also its two operations alone. Bytes that any implementation must move per parameter: 4 for the norm
(g read), 28 for AdamW (p, m, v read and written, g read) and 8 for the average. All contenders of a
size share parameters, gradients and average, each has moments of its own.
"""

import functools
from typing import NamedTuple

import torch
from torch import Tensor

from bench import harness
from bench.case import Case, Missing, compiled
from heptapod_fast.ops.adamw_ema import adamw_ema
from heptapod_fast.ops.global_norm import global_norm

BETAS, EPS, DECAY, CLIP, RATE, WEIGHT_DECAY = (0.9, 0.95), 1e-8, 0.9999, 1.0, 1e-4, 0.02
# Blocks and width of Transformers with as many parameters as the model: 207, 477 and 941 million.
SIZES = {"cuda": {"B": (29, 768), "L": (38, 1024), "H": (48, 1280)}, "cpu": {"tiny": (7, 128)}}
COMPILED_SIZES = ("B", "tiny")  # compiling hundreds of tensors takes minutes
GOALS = {
    "whole step": (
        ">= 1.4x best peer, 85% of copy bandwidth",
        ">= 2x best peer, 92% of copy bandwidth",
    ),
    "alone": ("85% of copy bandwidth", "92% of copy bandwidth"),
}


class Tensors(NamedTuple):
    """Lists of equal shapes."""

    params: list[Tensor]
    grads: list[Tensor]
    average: list[Tensor]


def shapes(layers, width):
    """Per block some large tensors and many small ones."""
    products = [(3 * width, width), (width, width), (4 * width, width), (width, 4 * width)]
    vectors = [(3 * width,), (width,), (4 * width,), (width,)]
    norms = [(width,)] * 4
    return [*products, *vectors, *norms] * layers


@functools.lru_cache(maxsize=1)  # one size at a time: H alone is 11 GB
def inputs(device, layers, width):
    """Random parameters and gradients; the average starts as the parameters."""
    params = [torch.randn(shape, device=device) for shape in shapes(layers, width)]
    return Tensors(params, [torch.randn_like(p) for p in params], [p.clone() for p in params])


# ------------------------------------------------------------------------------------------- ours


class OurStep:
    """A call: one step by adamw_ema, with clipping by global_norm or without."""

    def __init__(self, implementation, clip, made):
        self.implementation, self.clip = implementation, clip
        self.made = made
        self.moments = [[torch.zeros_like(p) for p in made.params] for _ in range(2)]
        scalar = functools.partial(torch.tensor, device=made.params[0].device)
        self.scalars = dict(lr=scalar(RATE), step=scalar(1.0), ema_decays=scalar([DECAY]))
        self.one = scalar(1.0)

    def __call__(self):
        params, grads, average = self.made
        scale = self.one
        if self.clip:
            scale = (CLIP / (global_norm(grads, self.implementation) + 1e-6)).clamp(max=1.0)
        adamw_ema(
            params,
            grads,
            *self.moments,
            [average],
            grad_scale=scale,
            weight_decays=[WEIGHT_DECAY] * len(params),
            beta1=BETAS[0],
            beta2=BETAS[1],
            eps=EPS,
            implementation=self.implementation,
            **self.scalars,
        )


# ------------------------------------------------------------------------------------------ peers


def leaves(made):
    """The parameters as an optimizer wants them, in the same memory."""
    found = [p.detach().requires_grad_() for p in made.params]
    for leaf, grad in zip(found, made.grads):
        leaf.grad = grad
    return found


class OptimizerStep:
    """A call: an optimizer's step between PyTorch's clipping and a foreach average.

    make(parameters): the optimizer.
    """

    def __init__(self, make, clip, made):
        self.params, self.average, self.clip = leaves(made), made.average, clip
        self.optimizer = make(self.params)

    def __call__(self):
        if self.clip:
            torch.nn.utils.clip_grad_norm_(self.params, CLIP, foreach=True)
        self.optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(self.average, self.params, 1 - DECAY)


def compiled_step(make, clip, made):
    """The same, compiled as a whole."""
    return compiled(OptimizerStep(make, clip, made).__call__)


def torch_adamw(params, variant):
    """PyTorch's. variant: "fused" or "foreach"."""
    # A step count on the device needs no wait; on a CPU there is nothing to wait for.
    options = {variant: True, "capturable": params[0].is_cuda}
    return torch.optim.AdamW(
        params, lr=RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, **options
    )


def apex_adam(params):
    """NVIDIA's."""
    try:
        from apex.optimizers import FusedAdam
    except (ImportError, RuntimeError) as error:
        raise Missing(
            "apex is not installed: build it from github.com/NVIDIA/apex with --cpp_ext --cuda_ext"
        ) from error
    if not params[0].is_cuda:
        raise Missing("apex runs on cuda tensors")
    return FusedAdam(
        params, lr=RATE, betas=BETAS, eps=EPS, weight_decay=WEIGHT_DECAY, capturable=True
    )


class ApexSwaStep:
    """A call: apex's kernel that updates and averages. It also stores a copy for the forward pass,
    here onto the parameters themselves, and sends addresses to the device in every step."""

    def __init__(self, made):
        try:
            from apex.contrib.openfold_triton.fused_adam_swa import AdamMathType, FusedAdamSWA
        except (ImportError, RuntimeError) as error:
            raise Missing(
                "apex's fused_adam_swa is not installed: build apex from github.com/NVIDIA/apex"
            ) from error
        self.params = leaves(made)
        self.optimizer = FusedAdamSWA(
            self.params,
            self.params,
            made.average,
            DECAY,
            lr=RATE,
            betas=BETAS,
            eps=EPS,
            adam_math_mode=AdamMathType.ApexAdamW,
            weight_decay=WEIGHT_DECAY,
            set_grad_none=False,
        )

    def __call__(self):
        norm = torch.nn.utils.get_total_norm([p.grad for p in self.params], foreach=True)
        self.optimizer.step(grad_clip_scale=(CLIP / (norm + 1e-6)).clamp(max=1.0))


def norm_of_gradients(function, made):
    """A call: the norm alone."""
    return functools.partial(function, made.grads)


# ------------------------------------------------------------------------------------------ cases

FUSED = functools.partial(torch_adamw, variant="fused")
FOREACH = functools.partial(torch_adamw, variant="foreach")


def step_contenders(implementation):
    """Whole steps, with clipping."""
    return {
        "ours": functools.partial(OurStep, implementation, True),
        "torch fused + foreach EMA + clip": functools.partial(OptimizerStep, FUSED, True),
        "torch foreach": functools.partial(OptimizerStep, FOREACH, True),
        "apex": functools.partial(OptimizerStep, apex_adam, True),
        "apex fused_adam_swa": ApexSwaStep,
    }


def update_contenders(implementation):
    """Update and average."""
    return {
        "ours": functools.partial(OurStep, implementation, False),
        "torch fused + foreach EMA": functools.partial(OptimizerStep, FUSED, False),
    }


def norm_contenders(implementation):
    """The norm."""
    functions = {
        "ours": functools.partial(global_norm, implementation=implementation),
        "torch foreach": functools.partial(torch.nn.utils.get_total_norm, foreach=True),
        "eager": functools.partial(global_norm, implementation="reference"),
    }
    return {
        name: functools.partial(norm_of_gradients, function) for name, function in functions.items()
    }


def compiled_contenders(implementation):
    """torch.compile of a whole step, in a case of its own, because it takes so long."""
    return {
        "ours": functools.partial(OurStep, implementation, True),
        "compiled": functools.partial(compiled_step, FOREACH, True),
    }


# operation, name, contenders, bytes per parameter, gate and aim
KINDS = [
    ("adamw_ema", "whole step", step_contenders, 40, GOALS["whole step"]),
    ("adamw_ema", "update and average alone", update_contenders, 36, GOALS["alone"]),
    ("global_norm", "norm alone", norm_contenders, 4, GOALS["alone"]),
    ("adamw_ema", "compiled peer, whole step", compiled_contenders, 40, ("", "")),
]


def case(device, size, operation, name, contenders, bytes_each, goals):
    """One kind at one size."""
    layers, width = SIZES[device][size]
    count = sum(torch.Size(shape).numel() for shape in shapes(layers, width))
    gate, aim = goals
    return Case(
        operation,
        f"{name}, {size}, {count / 1e6:.1f}M parameters",
        functools.partial(inputs, device, layers, width),
        contenders("cuda" if device == "cuda" else "auto"),
        bytes=bytes_each * count,
        gate=gate,
        aim=aim,
    )


def cases(device):
    """Every size and kind."""
    return [
        case(device, size, *kind)
        for size in SIZES[device]
        for kind in KINDS
        if kind[2] is not compiled_contenders or size in COMPILED_SIZES
    ]


bench_adamw_ema = harness.bench(cases)

if __name__ == "__main__":
    harness.main(cases)
