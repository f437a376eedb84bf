"""A system that the package knows nothing of, defined here alone: the contract, used whole.

It has another shape than the systems of the papers: RMSNorm, no attention, a token loss of its own,
classes that are dropped for guidance, and two phases of training. Everything the command lines do
has to work with it.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn

from heptapod_fast import load_run
from heptapod_fast.config import DataSettings, RecipeSettings, RunSettings, Size, SystemSettings
from heptapod_fast.config.settings import at_least, between, setting, share
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model import initial
from heptapod_fast.model.layers import Linear
from heptapod_fast.model.token_losses import TokenLoss, weighted_sum
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import SampleOptions
from heptapod_fast.systems import SYSTEMS, Loss, Phase, System
from heptapod_fast.train.loop import begin_phase
from heptapod_fast.train.metrics import Meter
from heptapod_fast.train.records import read_metrics
from heptapod_fast.train.session import Ending
from tests.running import command, final_files, flags, refused, start_here, train_here

# ------------------------------------------------------------------------------------- the system


@dataclass(frozen=True, kw_only=True)
class RippleSettings(SystemSettings):
    """A network of layers without attention."""

    width: int = setting("Hidden size.", rule=between(1, 2**12))
    layers: int = setting("Layers.", rule=between(1, 64))
    coarse: float = setting("Share of the images for which every other token counts.", rule=share())
    drop_class: float = setting("Share of the samples that are not told their class.", rule=share())


RippleSettings.SIZES = {
    "tiny": Size(
        model=RippleSettings(width=24, layers=2, coarse=0.5, drop_class=0.25),
        data=DataSettings(data="logograms", tokenizer="patch", image_size=24, flip=False),
        recipe=RecipeSettings(
            images=6400,
            batch=64,
            lr_per_256=1e-2,
            lr_schedule="cosine",
            warmup=0.25,
            weight_decay=0.1,
            beta1=0.9,
            beta2=0.95,
            clip=1.0,
            ema=(0.99,),
        ),
        run=RunSettings(sample_every=0, checkpoint_every=3200, log_every=640),
        micro_batch=64,
    )
}


@dataclass(frozen=True, kw_only=True)
class RippleOptions(SampleOptions):
    """How the class is brought out."""

    guidance: float = setting("How far to go away from no class.", default=1.0, rule=at_least(0))


class Laplace(TokenLoss):
    """A location and a scale for every channel of a continuous token."""

    def __init__(self, width: int, channels: int):
        super().__init__()
        self.output = Linear(width, 2 * channels)

    def distribution(self, z_RD: Tensor) -> tuple[Tensor, Tensor]:
        """(location, scale), each (R, C) float32."""
        location_RC, raw_RC = self.output(z_RD).float().chunk(2, dim=-1)
        return location_RC, nn.functional.softplus(raw_RC) + 1e-3

    def loss(self, z_RD, target, rng, index_R, slot_R, weight_R=None):
        """Mean negative log-likelihood of a token's channels."""
        location_RC, scale_RC = self.distribution(z_RD)
        nll_RC = (target - location_RC).abs() / scale_RC + (2 * scale_RC).log()
        return weighted_sum(nll_RC.mean(-1), weight_R)

    def draw(self, z_RD, rng, index_R, slot_R, options):
        """By inverse transform; temperature stretches the scale."""
        location_RC, scale_RC = self.distribution(z_RD)
        uniform_RC = rng.uniform("sample.laplace", index_R, location_RC.shape[1], slot_R) - 0.5
        noise_RC = -uniform_RC.sign() * torch.log1p(-2 * uniform_RC.abs().clamp(max=0.49999))
        return location_RC + options.temperature * scale_RC * noise_RC, None

    def flops(self, rows):
        """One product."""
        return 2 * rows * self.output.weight.numel()


class RippleLayer(nn.Module):
    """x + W SiLU(V RMSNorm(x))."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = nn.RMSNorm(width)
        self.up = Linear(width, 2 * width)
        self.down = Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        normed = nn.functional.rms_norm(x, self.norm.normalized_shape, self.norm.weight.to(x.dtype))
        return x + self.down(nn.functional.silu(self.up(normed)))


class Ripple(System):
    """Every token from its class, its place, and the mean of the tokens before it."""

    Settings = RippleSettings
    Options = RippleOptions
    settings: RippleSettings

    def __init__(self, settings, spec, num_classes, operators):
        super().__init__(settings, spec, num_classes, operators)
        width = settings.width
        self.token = Linear(spec.channels, width)
        self.label = nn.Embedding(num_classes + 1, width)  # the last one: no class
        self.position = nn.Embedding(spec.num_tokens, width)
        self.fine = nn.Parameter(torch.empty(1, width))  # the coarse phase does not use it
        self.layers = nn.ModuleList(RippleLayer(width) for _ in range(settings.layers))
        self.token_loss = Laplace(width, spec.channels)
        self.dtype = torch.float32

    def set_dtype(self, dtype):
        """See System.set_dtype."""
        self.dtype = dtype

    def units(self):
        """See System.units."""
        return list(self.layers)

    # Two phases: even positions alone, then all.

    def phase(self, images, total):
        """See System.phase."""
        assert images < total, "no step begins after the last image"
        border = round(self.settings.coarse * total)
        if images < border:
            return Phase(0, border, "coarse", 0)
        return Phase(border, total, "fine", 1)

    def supervised(self, phase: Phase | None) -> Tensor:
        """Positions that count."""
        stride = 2 if phase is not None and phase.level == 0 else 1
        return torch.arange(0, self.num_tokens, stride)

    def expected_count(self, batch, phase=None):
        """See System.expected_count."""
        return float(batch * len(self.supervised(phase)))

    def forward(self, batch: Batch, rng: Rng, phase: Phase | None = None) -> Loss:
        """See System.forward."""
        labels_B = batch.labels
        if self.training:
            chance_B = rng.uniform("drop.class", batch.index, 1)[:, 0]
            labels_B = labels_B.masked_fill(chance_B < self.settings.drop_class, self.num_classes)
        position_M = self.supervised(phase).to(labels_B.device)
        is_fine = phase is None or phase.level == 1
        z_BMD = self.vectors(batch.tokens, labels_B, position_M, is_fine)
        target_BMC = batch.tokens[:, position_M]
        index_R = batch.index.repeat_interleave(len(position_M))
        slot_R = position_M.repeat(len(batch))
        total, _ = self.token_loss.loss(
            z_BMD.flatten(0, 1), target_BMC.flatten(0, 1), rng, index_R, slot_R
        )
        return Loss(total, float(len(index_R)))

    def vectors(
        self, tokens_BNC: Tensor, labels_B: Tensor, position_M: Tensor, is_fine: bool = True
    ) -> Tensor:
        """(B, M, D) for M positions."""
        before_BNC = tokens_BNC.cumsum(1) - tokens_BNC
        count_N = torch.arange(tokens_BNC.shape[1], device=tokens_BNC.device).clamp(min=1)
        mean_BNC = before_BNC / count_N[:, None]
        x_BMD = self.token(mean_BNC[:, position_M]) + self.label(labels_B)[:, None]
        x_BMD = x_BMD + self.position(position_M)
        if is_fine:
            x_BMD = x_BMD + self.fine
        x_BMD = x_BMD.to(self.dtype)
        for layer in self.layers:
            x_BMD = layer(x_BMD)
        return x_BMD

    def initial_value(self, module, leaf, parameter, name, rng):
        """See System.initial_value."""
        if isinstance(module, nn.RMSNorm):
            return torch.ones_like(parameter)
        if isinstance(module, nn.Embedding) or leaf == "fine":
            return initial.normal(parameter, name, rng, 0.02)
        if isinstance(module, Linear):
            is_bias = leaf == "bias"
            return torch.zeros_like(parameter) if is_bias else initial.xavier(parameter, name, rng)
        return None

    def decays(self, name, parameter):
        """See System.decays."""
        return parameter.dim() == 2

    def flops_per_image(self, phase=None):
        """See System.flops_per_image."""
        rows, width = len(self.supervised(phase)), self.settings.width
        return {
            "embedding": 2 * rows * self.spec.channels * width,
            "layers": 2 * rows * self.settings.layers * 4 * width**2,
            "token loss": self.token_loss.flops(rows),
        }

    @torch.no_grad()
    def sample(self, classes, rng, options=None, index=None):
        """See System.sample."""
        options = self.own_options(options, RippleOptions)
        self.check_sampling(classes, options)
        device = self.label.weight.device
        labels_B = classes.to(device)
        index_B = torch.arange(len(classes), device=device) if index is None else index.to(device)
        shape = (len(classes), self.num_tokens, self.spec.channels)
        tokens_BNC = torch.zeros(shape, device=device)
        nobody_B = torch.full_like(labels_B, self.num_classes)
        for position in range(self.num_tokens):
            here_1 = torch.tensor([position], device=device)
            told_BD = self.vectors(tokens_BNC, labels_B, here_1)[:, 0]
            untold_BD = self.vectors(tokens_BNC, nobody_B, here_1)[:, 0]
            z_BD = untold_BD + options.guidance * (told_BD - untold_BD)
            slot_B = here_1.expand(len(classes))
            token_BC, _ = self.token_loss.draw(z_BD.float(), rng, index_B, slot_B, options)
            tokens_BNC[:, position] = token_BC
        return tokens_BNC


# --------------------------------------------------------------------------------------- the proof

# What tests/running.py gives the systems of the papers, and this one does not have.
NOT_RIPPLES = {"heads": None, "depth": None, "head_depth": None, "codes": None, "width": None}
RIPPLE = NOT_RIPPLES | {"system": "ripple", "ema": (0.9,)}


@pytest.fixture(autouse=True)
def registered(monkeypatch):
    """All that a new system needs outside of its own file."""
    monkeypatch.setitem(SYSTEMS, "ripple", Ripple)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run: 64 images in steps of 8, the second phase begins at 32."""
    out = tmp_path_factory.mktemp("ripple")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(SYSTEMS, "ripple", Ripple)
        train_here(out, **RIPPLE)
    return out


def test_it_trains_through_both_phases(trained):
    records = read_metrics(trained / "metrics.jsonl")
    assert [record["images"] for record in records] == [8, 16, 24, 32, 40, 48, 56, 64]
    assert [record["phase"] for record in records] == ["coarse"] * 4 + ["fine"] * 4
    # The learning rate warms up in each phase: over 8 of its 32 images.
    rates = [record["lr"] for record in records]
    assert rates[4] == pytest.approx(rates[0])
    assert rates[0] > rates[1] > rates[3] < rates[4]


def test_a_phase_ends_with_a_record_of_its_own(tmp_path):
    """Where a progress line would come later, it comes with the phase's last step."""
    train_here(tmp_path, **RIPPLE | {"log_every": 24})
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert [(record["images"], record["phase"]) for record in records] == [
        (24, "coarse"),
        (32, "coarse"),
        (48, "fine"),
        (64, "fine"),
    ]


def test_the_start_names_the_warm_up_of_each_phase(tmp_path):
    said = []
    start_here(tmp_path, say=said.append, **RIPPLE | {"images": 128})
    assert any("warm-up over 16 and 16 images" in line for line in said)


def test_what_depends_on_the_phase_is_read_anew(tmp_path):
    said = []
    session, state = start_here(tmp_path, say=said.append, **RIPPLE)
    meter = Meter(64, None, 1)
    flops = {}
    for state.images in (0, 24, 32):
        phase = begin_phase(session, state, meter)
        flops[phase.name] = meter.flops
    assert flops["fine"] == 2 * flops["coarse"]  # twice the supervised rows
    assert said[-2:] == ["phase     coarse: images 0 to 32", "phase     fine: images 32 to 64"]


@pytest.mark.parametrize("stop_at", [16, 48], ids=["coarse", "fine"])
def test_it_resumes_in_either_phase_bit_for_bit(trained, tmp_path, stop_at):
    _, state, ending = train_here(tmp_path, stop_at=stop_at, **RIPPLE)
    assert (ending, state.images) == (Ending.STOPPED, stop_at + 8)
    _, state, ending = train_here(tmp_path, **RIPPLE)
    assert (ending, state.images) == (Ending.FINISHED, 64)
    assert final_files(tmp_path) == final_files(trained)


def test_micro_batches_do_not_change_it(trained, tmp_path):
    session, _, _ = train_here(tmp_path, micro_batch=2, **RIPPLE)
    whole = load_run(trained, device="cpu", ema="none").system.state_dict()
    for name, value in session.system.state_dict().items():
        torch.testing.assert_close(value, whole[name], rtol=1e-2, atol=1e-3)


def test_it_samples_with_an_option_of_its_own(trained, tmp_path):
    grids = {}
    for guidance in ("1.0", "3.0"):
        out = tmp_path / f"{guidance}.png"
        result = command(
            "sample", trained, "--classes", "0,1", "--guidance", guidance, "--out", out
        )
        assert result.code == 0, result.err
        grids[guidance] = out.read_bytes()
    assert grids["1.0"] != grids["3.0"]
    refused(
        command("sample", trained, "--positions-per-step", 2),
        "--positions-per-step: this system samples with --temperature",
    )
    refused(command("sample", trained, "--guidance", -1), "--guidance -1.0: expected at least 0")


def test_the_systems_of_the_papers_refuse_its_option(tmp_path):
    train_here(tmp_path, images=16)
    refused(
        command("sample", tmp_path, "--guidance", 2.0), "--guidance 2.0", "without a null class"
    )


def test_it_is_evaluated(trained, tmp_path):
    out = tmp_path / "numbers.json"
    result = command("evaluate", trained, "--count", 10, "--guidance", 2.0, "--out", out)
    assert result.code == 0, result.err
    numbers = json.loads(out.read_text())
    assert numbers["options"]["guidance"] == 2.0
    assert "symmetry_accuracy" in numbers
    assert out.with_suffix(".png").exists()


def test_it_is_reported(trained):
    result = command("report", trained)
    assert result.code == 0, result.err
    assert "# ripple tiny on logograms" in (trained / "report.md").read_text()
    assert (trained / "loss.png").exists()


def test_its_checkpoints_are_verified(trained):
    result = command("verify", trained)
    assert result.code == 0, result.err


def test_a_dry_run_shows_both_phases():
    result = command("train", *flags(**RIPPLE, images=6400), "--dry-run")
    assert result.code == 0, result.err
    assert "coarse, images 0 to 3,200" in result.out
    assert "fine, images 3,200 to 6,400" in result.out
    assert "--drop-class           0.25" in result.out
    assert "token_loss" in result.out


def test_it_is_profiled(tmp_path):
    words = flags(**RIPPLE)
    result = command("profile", *words, "--profile-steps", 1, "--profile-out", tmp_path)
    assert result.code == 0, result.err
    assert "ripple tiny" in (tmp_path / "profile.md").read_text()


def test_help_shows_its_flags_in_a_group():
    result = command("train", "--system", "ripple", "--size", "tiny", "--help")
    assert "ripple options" in result.out
    assert "--drop-class" in result.out
    assert "--head-depth" not in result.out


def test_flags_of_others_are_refused_with_the_reason():
    refused(
        command("train", "--size", "tiny", "--system", "ripple", "--head-depth", 2, "--dry-run"),
        "--head-depth 2 belongs to --system heptapod; --system ripple has no such setting",
    )
    refused(
        command("train", "--size", "tiny", "--coarse", 0.1, "--dry-run"),
        "--coarse 0.1 belongs to --system ripple; --system heptapod has no such setting",
    )
    refused(
        command("train", "--size", "tiny", "--system", "ripple", "--drop-class", 1.5, "--dry-run"),
        "--drop-class 1.5: expected 0 or more, and less than 1",
    )


def test_a_phase_that_does_not_hold_its_images_is_an_error(monkeypatch):
    monkeypatch.setattr(Ripple, "phase", lambda self, images, total: Phase(0, 0))
    words = flags(**RIPPLE)
    refused(command("train", *words, "--dry-run"), "Ripple.phase", "does not hold image 0")
