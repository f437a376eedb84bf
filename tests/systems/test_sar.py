"""SAR: the streams against one pass per group, written out; sampling against recomputation."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from heptapod_fast import grid as gridlib
from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.sampled_mlp import SampledMlp
from heptapod_fast.ops import CAUSAL
from heptapod_fast.ops.dispatch import Operators, operations
from heptapod_fast.rng import Rng
from heptapod_fast.systems import build_system, configure
from heptapod_fast.systems.sar import Guidance, Sar, SarSettings
from heptapod_fast.tokenizers import TokenSpec
from tests.numerics import DEVICE, needs_triton
from tests.running import fill

CLASSES = 3
# Every grouping with every injection that it allows.
KINDS = [
    (grouping, injection)
    for grouping in gridlib.GROUPINGS
    for injection in ("shift", "nearest", "shared", "average")
    if injection != "shift" or grouping in ("next-token", "next-row")
]


class Rectangle(TokenSpec):
    """Tokens of a grid of 5 x 7."""

    @property
    def num_tokens(self) -> int:
        """N."""
        return 35


@dataclass(frozen=True, kw_only=True)
class OnRectangle(SarSettings):
    """SAR on 5 x 7 tokens."""

    def groups(self, spec):
        """See SarSettings.groups."""
        return gridlib.GROUPINGS[self.grouping](5, 7)


def small_settings(grouping="next-neighbor", injection="average", grid=4, kind="patch", **flags):
    values = dict(
        data="synthetic",
        tokenizer=kind,
        image_size=4 * grid,
        patch_size=4,
        num_classes=CLASSES,
        width=16,
        heads=2,
        depth=2,
        grouping=grouping,
        injection=injection,
    )
    if kind == "patch":
        values |= dict(diffusion_blocks=1, diffusion_width=16, diffusion_repeat=2)
    else:
        values |= dict(codes=11)
    return configure("tiny", "sar", **values | flags)


def small_system(*kind, grid=4, **flags):
    """With parameters none of which is 0 or 1."""
    if grid == (5, 7):
        config = small_settings(*kind, grid=6, **flags)
        spec = Rectangle(**vars(config.spec))
        return fill(Sar(OnRectangle(**vars(config.model)), spec, CLASSES))
    config = small_settings(*kind, grid=grid, **flags)
    return fill(build_system(config, CLASSES, fill=False))


def small_batch(system, count=2, dtype=torch.float32):
    spec = system.spec
    labels = torch.arange(count) % CLASSES
    if spec.kind == "discrete":
        tokens = torch.randint(spec.vocabulary, (count, system.num_tokens))
    else:
        tokens = torch.randn(count, system.num_tokens, spec.channels, dtype=dtype)
    return Batch(tokens, labels, torch.arange(count) + 7)


# ----------------------------------------------------------- one pass per group, written out


def plain_block(block, x_MD, seen_MM):
    """MAR's block over one sequence, from its formulas."""
    length, width = x_MD.shape
    y = F.layer_norm(x_MD, (width,), block.norm1.weight, block.norm1.bias, 1e-6)
    qkv = y @ block.qkv.weight.t() + block.qkv.bias
    q, k, v = (part.view(length, block.heads, -1).transpose(0, 1) for part in qkv.chunk(3, dim=-1))
    score = q @ k.transpose(1, 2) / math.sqrt(width // block.heads)
    out = score.masked_fill(~seen_MM, -math.inf).softmax(-1) @ v
    out = out.transpose(0, 1).reshape(length, width)
    x_MD = x_MD + out @ block.proj.weight.t() + block.proj.bias
    y = F.layer_norm(x_MD, (width,), block.norm2.weight, block.norm2.bias, 1e-6)
    y = F.gelu(y @ block.fc1.weight.t() + block.fc1.bias)
    return x_MD + y @ block.fc2.weight.t() + block.fc2.bias


def input_of(system, position, label, tokens):
    """h of one position: from tokens of earlier groups, or the class in the first group."""
    backbone, groups = system.backbone, system.groups
    group = groups.group_N.tolist()
    injection = system.settings.injection
    if group[position] == 0:
        return backbone.label.weight[label]
    if injection == "shared":
        return torch.zeros_like(backbone.label.weight[0])
    if injection == "shift":
        mine = [p for p in range(len(group)) if group[p] == group[position]]
        before = [p for p in range(len(group)) if group[p] == group[position] - 1]
        return backbone.token(tokens[before[mine.index(position)]])
    row, column = divmod(position, groups.width)
    earlier = [p for p in range(len(group)) if group[p] < group[position]]

    def distance(p):
        return (p // groups.width - row) ** 2 + (p % groups.width - column) ** 2

    if injection == "nearest":
        chosen = min(earlier, key=lambda p: (distance(p), -group[p], p))
        return backbone.token(tokens[chosen])
    beside = [backbone.token(tokens[p]) for p in earlier if distance(p) <= 2]
    return torch.stack(beside).mean(0)


def naive_vectors(system, label, tokens):
    """{position: its vector}, with a forward pass of its own for every group."""
    backbone, groups = system.backbone, system.groups
    group = groups.group_N.tolist()

    def place(position):
        return backbone.position.weight[position] + backbone.time.weight[group[position]]

    def generation(t):
        return [
            input_of(system, p, label, tokens) + system.query[0] + place(p)
            for p in range(len(group))
            if group[p] == t
        ]

    found = {}
    for t in range(len(groups.sizes)):
        elements, ends = [], []
        if system.settings.injection == "shift":
            # The elements of earlier groups are the context.
            for s in range(t + 1):
                elements += generation(s)
                ends += [len(elements)] * groups.sizes[s]
        else:
            elements, ends = [backbone.label.weight[label]], [1]
            for s in range(t):
                elements += [
                    backbone.token(tokens[p]) + place(p) for p in range(len(group)) if group[p] == s
                ]
                ends += [len(elements)] * groups.sizes[s]
            elements += generation(t)
            ends += [len(elements)] * groups.sizes[t]
        x_MD = torch.stack(elements)
        seen_MM = torch.arange(len(elements)) < torch.tensor(ends)[:, None]
        for block in backbone.blocks:
            x_MD = plain_block(block, x_MD, seen_MM)
        norm = backbone.norm
        z_MD = F.layer_norm(x_MD, x_MD.shape[-1:], norm.weight, norm.bias, 1e-6)
        of_group = [p for p in range(len(group)) if group[p] == t]
        found |= dict(zip(of_group, z_MD[-len(of_group) :], strict=True))
    return found


def rows_of(system, batch):
    return gridlib.rows_of_all_steps(system.order_N.expand(len(batch), -1))


@pytest.mark.parametrize("grid", [4, 6, (5, 7)])
@pytest.mark.parametrize("kind", ["patch", "patch-vq"])
@pytest.mark.parametrize("grouping, injection", KINDS)
def test_one_pass_is_a_pass_per_group(grouping, injection, kind, grid):
    system = small_system(grouping, injection, kind=kind, grid=grid).double().eval()
    system.set_dtype(torch.float64)
    batch = small_batch(system, dtype=torch.float64)
    rows = rows_of(system, batch)
    found = system.vectors(batch, rows, Rng(1))
    expected = []
    for label, tokens in zip(batch.labels, batch.tokens, strict=True):
        by_position = naive_vectors(system, label, tokens)
        expected += [by_position[p] for p in system.order_N.tolist()]
    expected = torch.stack(expected)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)

    loss = system(batch, Rng(1))
    assert loss.count == 2 * system.num_tokens
    ours = torch.autograd.grad(loss.total, list(system.parameters()), allow_unused=True)
    total, _ = system.token_losses(expected, batch, rows, Rng(1))
    torch.testing.assert_close(loss.total, total)
    theirs = torch.autograd.grad(total, list(system.parameters()), allow_unused=True)
    for (name, parameter), a, b in zip(system.named_parameters(), ours, theirs, strict=True):
        zero = torch.zeros_like(parameter)
        a, b = (zero if grad is None else grad for grad in (a, b))
        # Shares of a third are float32.
        assert torch.allclose(a, b, rtol=0, atol=1e-6 * float(b.abs().max())), name


@pytest.mark.parametrize("grid", [4, (5, 7)])
@pytest.mark.parametrize("grouping, injection", KINDS)
def test_a_token_changes_later_groups_alone(grouping, injection, grid):
    """Every pair of a changed token and a vector."""
    system = small_system(grouping, injection, grid=grid).eval()
    batch = small_batch(system, count=1)
    rows = rows_of(system, batch)
    group_N = system.groups.group_N
    with torch.no_grad():
        before = system.vectors(batch, rows, Rng(1))
        for position in range(system.num_tokens):
            tokens = batch.tokens.clone()
            tokens[0, position] += 1.0
            changed = Batch(tokens, batch.labels, batch.index)
            after = system.vectors(changed, rows, Rng(1))
            is_changed = (after != before).any(1)
            is_later = group_N[system.order_N] > group_N[position]
            assert torch.equal(is_changed, is_later)


def test_single_tokens_shifted_are_a_raster_model():
    """Bit for bit: the plain causal form, whose element i carries token i - 1."""
    system = small_system("next-token", "shift", kind="patch-vq").eval()
    batch = small_batch(system)
    rows = rows_of(system, batch)
    backbone = system.backbone
    start = backbone.label(batch.labels)[:, None]
    x_BND = torch.cat((start, backbone.token(batch.tokens[:, :-1])), dim=1)
    x_BND = x_BND + (backbone.position.weight + backbone.time.weight + system.query)
    z_BND = backbone(x_BND, visible=CAUSAL)
    total, _ = system.token_losses(z_BND.flatten(0, 1), batch, rows, Rng(1))
    assert torch.equal(system(batch, Rng(1)).total, total)


# ----------------------------------------------------------------------------------------- dropping


def test_vectors_are_dropped_token_by_token():
    system = small_system(z_dropout=0.2)
    row = torch.arange(4000)
    sample, slot = row // 10, row % 10
    z = torch.ones(4000, 2)
    gone = system.dropped_vectors(z, sample, slot, Rng(3)) == 0
    assert torch.equal(gone[:, 0], gone[:, 1])
    assert float(gone.double().mean()) == pytest.approx(0.2, abs=0.03)
    of_sample = gone[:, 0].view(400, 10)
    assert bool((of_sample.any(1) & ~of_sample.all(1)).any())
    other = torch.randperm(4000)
    moved = system.dropped_vectors(z, sample[other], slot[other], Rng(3)) == 0
    assert torch.equal(moved, gone[other])
    system.eval()
    assert bool((system.dropped_vectors(z, sample, slot, Rng(3)) == 1).all())


NO_DROPS = dict(dropout=0.0, label_dropout=0.0, z_dropout=0.0)


def test_labels_are_dropped_in_training_alone():
    """The row of no class learns from the samples that are told none, and is not read else."""
    system = small_system(**NO_DROPS | {"label_dropout": 0.5})
    batch = small_batch(system, count=8)
    is_dropped = Rng(2).uniform("label", batch.index, 1)[:, 0] < 0.5
    assert 0 < int(is_dropped.sum()) < 8
    labels = torch.where(is_dropped, CLASSES, batch.labels)
    told = Batch(batch.tokens, labels, batch.index)
    found = system.train().loss(batch, Rng(2)).total
    assert torch.equal(found, system.eval().loss(told, Rng(2)).total)
    assert not torch.equal(found, system.loss(batch, Rng(2)).total)


def test_the_loss_is_that_of_dropped_vectors():
    system = small_system(**NO_DROPS | {"z_dropout": 0.5})
    batch = small_batch(system)
    rows = rows_of(system, batch)
    z_RD = system.eval().vectors(batch, rows, Rng(2))
    slot = rows.position_R
    is_dropped = Rng(2).uniform("z", batch.index[rows.sequence_R], 1, slot)[:, 0] < 0.5
    expected, _ = system.token_losses(z_RD * ~is_dropped[:, None], batch, rows, Rng(2))
    found = system.train().loss(batch, Rng(2)).total
    torch.testing.assert_close(found, expected)
    assert not torch.equal(found, system.eval().loss(batch, Rng(2)).total)


def test_the_backbone_drops_in_training_alone():
    system = small_system(**NO_DROPS | {"dropout": 0.5}).train()
    batch = small_batch(system)
    found = system.loss(batch, Rng(2)).total
    assert torch.equal(found, system.loss(batch, Rng(2)).total)
    assert not torch.equal(found, system.eval().loss(batch, Rng(2)).total)


@pytest.mark.parametrize("grouping, injection", [("next-row", "shift"), ("next-layer", "nearest")])
@pytest.mark.parametrize("kind", ["patch", "patch-vq"])
def test_micro_batches_do_not_change_the_loss(grouping, injection, kind):
    """With everything that training drops."""
    drops = dict(dropout=0.3, label_dropout=0.4, z_dropout=0.4)
    system = small_system(grouping, injection, kind=kind, **drops).train()
    batch = small_batch(system, count=6)
    whole = system.loss(batch, Rng(2))
    parts = [
        system.loss(
            Batch(batch.tokens[i : i + 1], batch.labels[i : i + 1], batch.index[i : i + 1]), Rng(2)
        )
        for i in range(6)
    ]
    total = sum(part.total for part in parts)
    torch.testing.assert_close(total, whole.total, rtol=1e-4, atol=1e-3)


@needs_triton
@pytest.mark.parametrize(
    "grouping, injection", [("next-row", "shift"), ("next-neighbor", "average")]
)
def test_kernels_give_the_loss_and_gradients_of_the_reference(grouping, injection):
    config = small_settings(grouping, injection, dropout=0.2)
    names = [name for name in operations("triton") if name != "attention"]
    batch = small_batch(build_system(config, CLASSES)).to(DEVICE)
    found = []
    for how in ("reference", "triton"):
        asked = Operators(dict.fromkeys(names, how) | {"attention": "reference"})
        system = fill(build_system(config, CLASSES, DEVICE, asked, fill=False)).train()
        loss = system.loss(batch, Rng(0)).mean
        loss.backward()
        found.append([loss.detach(), *(p.grad for p in system.parameters())])
    for expected, value in zip(*found, strict=True):
        scale = float(expected.abs().max())
        torch.testing.assert_close(value, expected, rtol=1e-3, atol=1e-4 * scale + 1e-7)


def test_a_step_compiles_to_one_graph():
    """Blocks see a mask, and packed rows in the last one."""
    system = small_system().train()
    batch = small_batch(system)
    for block in system.backbone.blocks:
        block.compile(fullgraph=True, backend="aot_eager")
    compiled = system.loss(batch, Rng(0)).total
    torch._dynamo.reset()
    plain = small_system().train().loss(batch, Rng(0)).total
    torch.testing.assert_close(compiled, plain)


@pytest.mark.parametrize("grouping, injection", KINDS)
@pytest.mark.parametrize("kind", ["patch", "patch-vq"])
def test_flops_are_those_that_torch_counts(grouping, injection, kind):
    system = small_system(grouping, injection, kind=kind)
    batch = small_batch(system)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        system.loss(batch, Rng(0))
    formula = sum(system.flops_per_image().values())
    # The reference computes all pairs of elements, seen or not.
    elements = system.settings.elements(system.spec)
    unseen = elements * (elements - system.keys_seen())
    attention = 4 * system.settings.width * unseen * system.settings.depth
    assert counter.get_total_flops() / 2 == pytest.approx(formula + attention, rel=1e-9)


# ----------------------------------------------------------------------------------------- sampling

GUIDANCE = [
    {},
    {"guidance": 2.5},
    {"guidance_x": 1.5},
    {"guidance_z": 2.0},
    {"guidance_x": 1.5, "guidance_z": 2.0},
]


def recomputed(system, classes, rng, options, index):
    """Sampling with a whole forward pass per group, guided by the formulas of the slides."""
    batch_size = len(classes)
    tokens = system.empty_tokens(batch_size, classes.device)
    none = torch.full_like(classes, system.num_classes)
    group_R = system.groups.group_N[system.order_N].repeat(batch_size)
    for t in range(len(system.groups.sizes)):

        def vectors(labels):
            batch = Batch(tokens, labels, index)  # noqa: B023  # used at once
            rows = rows_of(system, batch)
            return system.vectors(batch, rows, rng), rows

        z_RD, rows = vectors(classes)
        none_RD, _ = vectors(none)
        if options.guidance_z is not None:
            z_RD = none_RD + options.guidance_z * (z_RD - none_RD)
        other, scale = torch.zeros_like(z_RD), options.guidance_x
        if options.guidance is not None:
            other, scale = none_RD, options.guidance
        is_now = group_R == t
        drawn = guided_draw(system, z_RD, other, scale, rng.at(t), index, rows, is_now, options)
        tokens[rows.sequence_R[is_now], rows.position_R[is_now]] = drawn.to(tokens.dtype)
    return tokens


def guided_draw(system, z_RD, other_RD, scale, rng, index, rows, is_now, options):
    """One token each, by a loop of Euler steps, or from guided logits."""
    z, other = z_RD[is_now], other_RD[is_now]
    index_R, slot_R = index[rows.sequence_R[is_now]], rows.position_R[is_now]
    loss = system.token_loss

    def guided(function):
        own = function(z)
        return own if scale is None else function(other) + scale * (own - function(other))

    if system.spec.kind == "discrete":
        logits = guided(loss.logits)
        uniform = rng.uniform("sample.token", index_R, 1, slot_R)
        return (logits.softmax(-1).double().cumsum(-1) <= uniform).sum(-1)
    x = rng.normal("sample.start", index_R, system.spec.channels, slot_R)
    steps = options.diffusion_steps
    for k in range(steps):
        time = torch.full((len(x),), 1 - k / steps)
        v = guided(lambda z: loss.net(x, time, loss.condition(z)))  # noqa: B023  # used at once
        data = (x - time[:, None] * v).clamp(-loss.limit, loss.limit) if loss.limit else None
        v = v if data is None else (x - data) / time[:, None]
        x = x - v / steps
    return x.clamp(-loss.limit, loss.limit) if loss.limit else x


@pytest.mark.parametrize("given", GUIDANCE, ids=lambda given: " ".join(given) or "none")
@pytest.mark.parametrize("kind", ["patch", "patch-vq"])
@pytest.mark.parametrize("grouping, injection", KINDS)
def test_cached_sampling_is_recomputation(grouping, injection, kind, given):
    system = small_system(grouping, injection, kind=kind).eval()
    if kind == "patch":
        given = given | {"diffusion_steps": 3}
    else:
        # Sums in another order must not tip the draw of a code.
        system.double().set_dtype(torch.float64)
    options = system.options(**given)
    classes, index = torch.tensor([1, 0]), torch.tensor([5, 9])
    found = system.sample(classes, Rng(4), options, index)
    with torch.no_grad():
        expected = recomputed(system, classes, Rng(4), options, index)
    if kind == "patch-vq":
        assert torch.equal(found, expected)
    else:
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "given, backbone, head",
    [
        ({}, 1, 1),
        ({"guidance_x": 1.5}, 1, 2),
        ({"guidance_z": 2.0}, 2, 1),
        ({"guidance": 2.0}, 2, 2),
        ({"guidance_x": 1.5, "guidance_z": 2.0}, 2, 2),
        ({"guidance": 1.0}, 1, 1),
    ],
)
@pytest.mark.parametrize("own", [1.0, 1.5])
@pytest.mark.parametrize(
    "injection, grouping", [("average", "next-neighbor"), ("shift", "next-row")]
)
def test_passes_are_the_slides(monkeypatch, own, given, backbone, head, injection, grouping):
    """C + c, C + 2 c, 2 C + c, 2 C + 2 c, in rows; one step per group. A run's own scales act where
    nothing else is said."""
    system = small_system(grouping, injection, guidance_x=own, guidance_z=own).eval()
    if own > 1 and "guidance" not in given:
        backbone, head = 2, 2
    rows = {"head": 0, "backbone": 0}
    forward, run = system.backbone.forward, SampledMlp.__call__

    def counted_backbone(x, *rest, **named):
        rows["backbone"] += x.shape[0] * x.shape[1]
        return forward(x, *rest, **named)

    def counted_head(self, x, y):
        rows["head"] += len(x)
        return run(self, x, y)

    monkeypatch.setattr(system.backbone, "forward", counted_backbone)
    monkeypatch.setattr(SampledMlp, "__call__", counted_head)
    options = system.options(diffusion_steps=1, **given)
    system.sample(torch.tensor([0, 1]), Rng(0), options)
    tokens = 2 * system.num_tokens
    elements = tokens
    if injection == "average":
        elements = 2 * system.settings.elements(system.spec)
    assert rows == {"backbone": backbone * elements, "head": head * tokens}


def test_vectors_are_guided_in_float32():
    """A scale multiplies the roundings of bfloat16 as well."""
    z_RD = torch.randn(8, 16).bfloat16()
    own, none = z_RD.double().chunk(2)
    found, contrast = Guidance(z=4.5).of_head(z_RD)
    assert contrast is None
    torch.testing.assert_close(found.double(), none + 4.5 * (own - none), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("own", [{}, {"guidance_x": 1.25, "guidance_z": 2.7}])
@pytest.mark.parametrize("given", [*GUIDANCE, {"guidance": 1.0, "guidance_x": 1.5}])
def test_settled_options_draw_the_same(given, own):
    """evaluate.py records settled options and samples with them."""
    system = small_system(**own).eval()
    options = system.options(diffusion_steps=2, **given)
    settled = system.settled(options)
    assert system.guidance_of(settled) == system.guidance_of(options)
    classes = torch.tensor([0, 1])
    drawn = [system.sample(classes, Rng(1), each) for each in (options, settled)]
    assert torch.equal(*drawn)


# -------------------------------------------------------------------------------- counts, refusals


@pytest.mark.parametrize(
    "size, millions, exactly",
    [("B", 141, 141_218_320), ("L", 714, 703_889_936), ("H", 1300, 1_286_845_456)],
)
def test_sizes_are_the_slides(size, millions, exactly):
    config = configure(size, "sar", data="synthetic", num_classes=1000)
    system = build_system(config, 1000, "meta", fill=False)
    count = sum(parameter.numel() for parameter in system.parameters())
    assert count == exactly == pytest.approx(millions * 1e6, rel=0.02)


def test_two_streams_of_16_x_16_fill_their_blocks():
    config = configure("B", "sar", data="synthetic", num_classes=1000)
    system = build_system(config, 1000, "meta", fill=False)
    assert system.settings.elements(system.spec) == system.visible.num_queries == 512
    assert len(system.groups.sizes) == 31


def test_shift_is_the_default_where_it_can_be():
    assert small_settings("next-row", None).model.injection == "shift"
    assert small_settings("next-neighbor", None).model.injection == "average"


@pytest.mark.parametrize(
    "flags, text",
    [
        (("next-layer", "shift"), "groups of --grouping next-layer have 4 to 12 tokens"),
        (("next-neighbor", "shift"), "have 1 to 4 tokens"),
        (("next-neighbor", "average", 32), "2048 elements of 1024 tokens, .* 1024 at most"),
        (("next-row", "shift", 33), "1089 elements of 1089 tokens, .* 1024 at most"),
    ],
)
def test_what_cannot_be_is_refused(flags, text):
    with pytest.raises(ValueError, match=text):
        small_settings(*flags)


def test_what_just_fits():
    """The context of the last group is not there, and a causal stream needs no mask."""
    small_settings("next-layer", "nearest", 23)
    small_settings("next-token", "shift", 33)


@pytest.mark.parametrize(
    "flags", [{"guidance_x": 2.0, "z_dropout": 0.0}, {"guidance_z": 2.0, "label_dropout": 0.0}]
)
def test_scales_that_training_makes_impossible(flags):
    scale, dropout = flags
    words = [f"--{name.replace('_', '-')}" for name in (scale, dropout)]
    with pytest.raises(ValueError, match=f"{words[0]} 2 guides away .*{words[1]} 0 never trains"):
        small_settings(**flags)
    resolved = configure("B", "sar", data="synthetic", **{dropout: 0.0})
    assert getattr(resolved.model, scale) == 1.0
    assert resolved.resolve() == resolved


def test_options_that_cannot_be_are_refused():
    system = small_system(label_dropout=0.0, z_dropout=0.0).eval()
    classes = torch.tensor([0])
    for given, text in (
        ({"guidance": 2.0}, "--label-dropout 0"),
        ({"guidance_z": 2.0}, "--label-dropout 0"),
        ({"guidance_x": 2.0}, "--z-dropout 0"),
        ({"diffusion_sampler": "ddim"}, "--diffusion-sampler ddim: .* drawn by euler or heun"),
    ):
        with pytest.raises(ValueError, match=text):
            system.sample(classes, Rng(0), system.options(**given))
    system = small_system().eval()
    with pytest.raises(ValueError, match="--guidance 2 beside"):
        system.sample(classes, Rng(0), system.options(guidance=2.0, guidance_x=1.5))
    with pytest.raises(ValueError, match="--positions-per-step 2: this system predicts the groups"):
        system.options(positions_per_step=2)
