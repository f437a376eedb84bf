"""How a token is drawn from its distribution: the options that all systems have."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, Self

from heptapod_fast.config.settings import Rule, Settings, at_least, between, setting
from heptapod_fast.ops import STEPS
from heptapod_fast.tokenizers import TokenSpec

DIFFUSION_STEPS = 100
FLOW_STEPS = 50


@dataclass(frozen=True, kw_only=True)
class SampleOptions(Settings):
    """How tokens are drawn; the fields are flags of `tools/sample.py`.

    A system with more options derives its class from this one.
    """

    temperature: float = setting(
        "Divides the logits; multiplies the noise of the diffusion sampler, of a flow the noise "
        "that it starts from.",
        default=1.0,
        rule=at_least(0),
    )
    top_k: int = setting("Keep the K likeliest codes (0: all).", default=0, rule=at_least(0))
    top_p: float = setting(
        "Keep the likeliest codes that make up probability P (1: all).",
        default=1.0,
        rule=Rule("more than 0, and at most 1", lambda value: 0 < value <= 1),
    )
    diffusion_steps: int | None = setting(
        f"Denoising steps per token (default {DIFFUSION_STEPS} out of the {STEPS} trained; "
        f"{FLOW_STEPS} of a flow).",
        rule=between(1, STEPS),
    )
    late_diffusion_steps: int | None = setting(
        "Denoising steps towards the end of an image: the number falls evenly from "
        "--diffusion-steps to this, as late tokens have little left to decide (DiSA).",
        rule=between(1, STEPS),
    )
    diffusion_sampler: Literal["ddpm", "ddim", "euler", "heun"] | None = setting(
        "Ancestral sampling with the learned variance (ddpm, the default), or the deterministic "
        "DDIM; of a flow euler (the default), or heun, two passes in each step.",
    )

    cuda_graph: Literal["auto", "on", "off"] = setting(
        "Record a step of drawing in a CUDA graph and replay it at those that are like it (auto: "
        "on a GPU). The samples are the same.",
        default="auto",
    )

    def at(self, drawn: float) -> Self:
        """The options of a token before which this share of the image, 0 to below 1, was drawn:
        the number of denoising steps falls on a straight line (DiSA, arXiv 2505.20297)."""
        early, late = self.diffusion_steps, self.late_diffusion_steps
        if early is None or late is None:
            return self
        return replace(self, diffusion_steps=round(early + (late - early) * drawn))

    def check_tokens(self, spec: TokenSpec) -> None:
        """Refuse what cannot be with these tokens.

        Raises:
            ValueError: names the flag.
        """
        self.check()
        if spec.kind == "continuous":
            if self.top_k or self.top_p < 1:
                raise ValueError("--top-k and --top-p need discrete tokens")
            if self.late_diffusion_steps is not None and self.diffusion_steps is None:
                raise ValueError(
                    f"--late-diffusion-steps {self.late_diffusion_steps}: say with "
                    "--diffusion-steps how many the first tokens take"
                )
            if (self.late_diffusion_steps or 0) > (self.diffusion_steps or STEPS):
                raise ValueError(
                    f"--late-diffusion-steps {self.late_diffusion_steps}: expected at most "
                    f"--diffusion-steps, {self.diffusion_steps}"
                )
            return
        of_vectors = ("diffusion_steps", "late_diffusion_steps", "diffusion_sampler")
        self.refuse(of_vectors, "needs continuous tokens")
        if self.top_k > spec.vocabulary:
            raise ValueError(f"--top-k {self.top_k}: expected 0 to {spec.vocabulary}")
