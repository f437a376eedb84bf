"""How much memory training takes on a rank: an estimate by counting."""

from __future__ import annotations

from heptapod_fast.config import Config
from heptapod_fast.resolve import share_of_batch
from heptapod_fast.systems import System, build_system
from heptapod_fast.tokenizers import token_spec


def memory_estimate(config: Config, classes: int, world_size: int) -> int:
    """Bytes of training a resolved configuration on one of `world_size` ranks."""
    spec = token_spec(config.tokenizer, config.image_size, config.patch_size, config.codes)
    system = build_system(config, spec, classes, "meta", fill=False)
    share, micros = share_of_batch(config, world_size)
    count = sum(p.numel() for p in system.parameters())
    return int(
        bytes_per_parameter(config) * count + activation_bytes(config, system, share // micros)
    )


def bytes_per_parameter(config: Config) -> int:
    """Weight, gradient, two moments, averages, and a bf16 copy unless --precision is fp32."""
    return 4 + 4 + 8 + 4 * len(config.ema) + (2 if config.precision != "fp32" else 0)


def activation_bytes(config: Config, system: System, micro_batch: int) -> float:
    """Activations of one micro-batch that are saved for the backward pass."""
    return (
        micro_batch * activation_values(config, system) * (2 if config.precision != "fp32" else 4)
    )


def activation_values(config: Config, system: System) -> float:
    """Values saved for the backward pass of one sequence.

    Per element of a block 17 D + heads * keys values (two residuals, two norms, qkv and its scaled
    q, probabilities, attention, MLP before and after GELU); per row of the diffusion MLP 9 W a
    block, or 3 V for logits.
    """
    tokens, width = system.num_tokens, config.width

    def block(elements: float, keys: float) -> float:
        return elements * (17 * width + config.heads * keys)

    total = config.depth * block(tokens, tokens)
    rows = float(tokens)
    if config.system == "heptapod":
        n = config.density
        if config.head == "global":
            # Antithetic rows are packed, others padded to all positions.
            rows = n * (tokens + 1) / 2 if config.steps == "antithetic" else n * tokens
            total += n * config.head_depth * block(tokens + 1, tokens + 1)
        else:
            rows = n * config.window
            cross = rows * (4 * width + config.heads * tokens) + 2 * tokens * width
            total += config.head_depth * (n * block(config.window, config.window) + cross)
    if config.continuous:
        values = config.diffusion_width * (9 * config.diffusion_blocks + 6)
        per_row = config.diffusion_repeat * values
    else:
        per_row = 3 * system.spec.vocabulary
    return total + rows * per_row
