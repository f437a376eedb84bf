"""Drawing one token from its predicted distribution: codes from logits, vectors by diffusion."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from heptapod_fast import ops
from heptapod_fast.rng import Rng


@dataclass(frozen=True, kw_only=True)
class SampleOptions:
    """How tokens are drawn; the fields are flags of `tools/sample.py`."""

    positions_per_step: int = 1
    """Positions filled in per step; the 2D distribution allows more than one."""
    position_schedule: Literal["constant", "cosine"] = "constant"
    """Equal groups, or few positions at first and many at the end."""
    position_order: Literal["random", "confidence"] = "random"
    """Where the next token goes: a random order, or where the drawn code is likeliest."""
    temperature: float = 1.0
    """Divides the logits; multiplies the noise of the diffusion sampler."""
    top_k: int = 0
    """Keep the K likeliest codes (0: all)."""
    top_p: float = 1.0
    """Keep the likeliest codes that make up probability P (1: all)."""
    diffusion_steps: int = 100
    """Denoising steps per token, out of the 1000 trained."""
    diffusion_sampler: Literal["ddpm", "ddim"] = "ddpm"
    """Ancestral sampling with the learned variance, or the deterministic DDIM."""
    guidance: float = 1.0
    """Classifier-free guidance; 1 is off, and systems without a null class take nothing else."""

    def check(self, num_tokens: int, vocabulary: int) -> None:
        """Refuse what cannot be (ValueError names the flag); vocabulary 0: continuous tokens."""
        for name, known in (
            ("position_schedule", ("constant", "cosine")),
            ("position_order", ("random", "confidence")),
            ("diffusion_sampler", ("ddpm", "ddim")),
        ):
            if getattr(self, name) not in known:
                raise ValueError(
                    f"--{name.replace('_', '-')} {getattr(self, name)}: expected "
                    f"{' or '.join(known)}"
                )
        if not 1 <= self.positions_per_step <= num_tokens:
            raise ValueError(
                f"--positions-per-step {self.positions_per_step}: expected 1 to "
                f"{num_tokens}, the tokens of an image"
            )
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"--temperature {self.temperature}: expected 0 or more")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"--top-p {self.top_p}: expected 0 < P <= 1")
        if not 0 <= self.top_k <= max(vocabulary, 0) and vocabulary:
            raise ValueError(f"--top-k {self.top_k}: expected 0 to {vocabulary}")
        if not 1 <= self.diffusion_steps <= ops.STEPS:
            raise ValueError(f"--diffusion-steps {self.diffusion_steps}: expected 1 to {ops.STEPS}")
        if not vocabulary:
            if self.position_order == "confidence":
                raise ValueError("--position-order confidence needs discrete tokens")
            if self.top_k or self.top_p < 1:
                raise ValueError("--top-k and --top-p need discrete tokens")
        if self.guidance != 1.0:
            raise ValueError(
                f"--guidance {self.guidance}: this system is trained without a null "
                "class, so there is nothing to guide against"
            )


def sample_codes(logits_RV: Tensor, uniform_R: Tensor, options: SampleOptions):
    """Draw one code per row by inverse transform: the first whose cumulative probability passes u.

    logits (R, V) float32, uniform (R,) in (0, 1). Returns (codes (R,) int64, probability (R,)).
    Temperature 0 takes the likeliest code.
    """
    if options.temperature == 0:
        probability = logits_RV.softmax(-1)
        return probability.argmax(-1), probability.amax(-1)
    probability_RV = restrict(logits_RV / options.temperature, options).softmax(-1)
    total_RV = probability_RV.double().cumsum(-1)
    threshold_R1 = uniform_R.double()[:, None] * total_RV[:, -1:]
    code_R = torch.searchsorted(total_RV, threshold_R1, right=True).squeeze(-1)
    code_R = code_R.clamp(max=logits_RV.shape[-1] - 1)
    return code_R, probability_RV.gather(-1, code_R[:, None]).squeeze(-1)


def restrict(logits_RV: Tensor, options: SampleOptions) -> Tensor:
    """Top-k, then top-p (the code that crosses P is kept): others get -inf."""
    if options.top_k:
        least = logits_RV.topk(options.top_k, dim=-1).values[:, -1:]
        logits_RV = logits_RV.masked_fill(logits_RV < least, float("-inf"))
    if options.top_p < 1:
        sorted_RV, index_RV = logits_RV.sort(dim=-1, descending=True)
        probability_RV = sorted_RV.softmax(-1)
        before_RV = probability_RV.cumsum(-1) - probability_RV
        drop_RV = before_RV >= options.top_p
        dropped_RV = torch.empty_like(drop_RV).scatter_(-1, index_RV, drop_RV)
        logits_RV = logits_RV.masked_fill(dropped_RV, float("-inf"))
    return logits_RV


def respaced(steps: int) -> Tensor:
    """(steps,) int64: evenly spaced timesteps from 0 to 999 (one step: 999), as MAR's respacing."""
    if steps == 1:
        return torch.tensor([ops.STEPS - 1])
    # Adding the stride up and rounding gives upstream's list; round(i * stride) may differ by one.
    stride, current, chosen = (ops.STEPS - 1) / (steps - 1), 0.0, []
    for _ in range(steps):
        chosen.append(round(current))
        current += stride
    return torch.tensor(chosen)


def sample_vectors(
    loss,
    z_RD: Tensor,
    rng: Rng,
    index_R: Tensor,
    slot_R: Tensor,
    options: SampleOptions,
    limit: float = 0.0,
) -> Tensor:
    """Denoise one continuous token per row: (R, C) float32.

    limit: the estimate of x_0 is clipped to [-limit, limit] at every step (0: never). Where tokens
    have a known range this is what keeps the first steps from diverging: they multiply the error
    of eps_hat by up to 20,000 (mar:models/diffloss.py samples latents, without a limit). For the
    same reason the network runs in float32 here, whatever it was trained in.

    loss: model.token_losses.Diffusion. Noise is keyed by (index, slot) and the denoising step.
    ddpm: x' = mean + temperature * sigma * noise, sigma from the learned range. ddim: eta = 0;
    temperature scales the initial noise only.
    """
    times, z_RD = respaced(options.diffusion_steps), z_RD.float()
    abar = (1 - ops.cosine_betas()).cumprod(0)[times]
    betas = 1 - abar / torch.cat((torch.ones(1, dtype=abar.dtype), abar[:-1]))
    tables = ops.schedule_tables(betas).to(z_RD.device)
    condition_RW = loss.condition(z_RD)
    time_TW = loss.embed_time(z_RD.dtype)[times.to(z_RD.device)]
    x_RC = rng.normal("sample.start", index_R, loss.channels, slot_R)
    if options.diffusion_sampler == "ddim":
        x_RC = x_RC * options.temperature
    for i in reversed(range(len(times))):
        prediction = loss.run(x_RC, time_TW[i] + condition_RW)
        x_RC = _previous(prediction, x_RC, tables[:, i], i, rng, index_R, slot_R, options, limit)
    return x_RC


def _previous(
    prediction: Tensor,
    x: Tensor,
    table: Tensor,
    i: int,
    rng: Rng,
    index: Tensor,
    slot: Tensor,
    options: SampleOptions,
    limit: float,
) -> Tensor:
    """x_{t-1} from x_t and the network's (eps, v); table: the schedule's row of this step."""
    sqrt_abar, sqrt_noise, recip, recip_minus_one, mean_x0, mean_xt, log_beta, log_posterior = table
    eps, v = prediction.chunk(2, dim=-1)
    x0 = recip * x - recip_minus_one * eps
    if limit:
        x0 = x0.clamp(-limit, limit)
        eps = (x - sqrt_abar * x0) / sqrt_noise
    if options.diffusion_sampler == "ddim":
        if i == 0:
            return x0
        # sqrt(abar) and 1 - abar of the previous step, from the definitions of mean_x0 and mean_xt;
        # abar / (1 - beta) would lose all digits where beta is near 1.
        signal = mean_x0 * sqrt_noise.square() / log_beta.exp()
        noise = mean_xt * sqrt_noise.square() * signal / sqrt_abar
        return signal * x0 + noise.sqrt() * eps
    mean = mean_x0 * x0 + mean_xt * x
    if i == 0:
        return mean
    share = (v + 1) / 2
    sigma = (0.5 * (share * log_beta + (1 - share) * log_posterior)).exp()
    noise = rng.normal(f"sample.noise.{i}", index, x.shape[-1], slot)
    return mean + options.temperature * sigma * noise
