"""LlamaGen and NPP against a plain re-implementation: one image at a time, one head at a time."""

import math

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from heptapod_fast.data.tokens import Batch
from heptapod_fast.model.dropout import Dropout
from heptapod_fast.model.llama import mlp_width
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import sample_codes
from heptapod_fast.systems import build_system, configure
from heptapod_fast.systems.base import Phase
from tests.numerics import Allocations

SIDE, VOCABULARY, CLASSES, WIDTH, HEADS, DEPTH = 4, 13, 3, 32, 2, 2


def small(system="llamagen", grid=SIDE, **flags):
    """A resolved configuration of 4 x 4 codes."""
    values = {
        "data": "synthetic",
        "num_classes": CLASSES,
        "width": WIDTH,
        "heads": HEADS,
        "depth": DEPTH,
        "image_size": grid,
        "patch_size": 1,
        "tokenizer": "patch-vq",
        "codes": VOCABULARY,
        "batch": 8,
    }
    return configure("tiny", system, **(values | flags))


def random_system(system="llamagen", **flags):
    """With random weights everywhere, the output too, which starts at zero."""
    built = build_system(small(system, **flags), CLASSES)
    with torch.no_grad():
        for parameter in built.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.3)
            if parameter.dim() == 1:
                parameter.add_(1)
    return built


def batch_of(count=3, grid=SIDE):
    tokens = torch.randint(VOCABULARY, (count, grid * grid))
    return Batch(tokens, torch.randint(CLASSES, (count,)), torch.arange(count) + 5)


# --------------------------------------------------------------- the paper, in float64, unbatched


def rms(x, weight):
    return x / torch.sqrt((x * x).mean() + 1e-5) * weight


def turn(head, position, count):
    """One head's query or key (E,) at a (row, column), or at the class slot (None)."""
    if position is None:
        return torch.zeros_like(head)
    width = len(head)
    turned = torch.empty_like(head)
    for pair in range(width // 2):
        half = width // 4
        number, at = (pair, position[0]) if pair < half else (pair - half, position[1])
        angle = at * 10_000.0 ** (-2 * number / (width // 2))
        a, b = head[2 * pair], head[2 * pair + 1]
        turned[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
        turned[2 * pair + 1] = a * math.sin(angle) + b * math.cos(angle)
    return turned


def logits_of(weights, elements, positions):
    """elements: embedded inputs (M, D); positions: of each, None for the class slot -> (M, V)."""
    x = list(elements)
    for layer in range(DEPTH):
        w = {k.split(".", 2)[2]: v for k, v in weights.items() if k.startswith(f"layers.{layer}.")}
        normed = [rms(e, w["attention_norm.weight"]) for e in x]
        q, k, v = (
            [(part @ e).view(HEADS, -1) for e in normed]
            for part in w["attention.wqkv.weight"].chunk(3)
        )
        for m, position in enumerate(positions):
            for head in range(HEADS):
                q[m][head] = turn(q[m][head].clone(), position, len(x))
                k[m][head] = turn(k[m][head].clone(), position, len(x))
        after = []
        for m in range(len(x)):
            heads = []
            for head in range(HEADS):
                scores = torch.stack(
                    [q[m][head] @ k[j][head] / math.sqrt(WIDTH / HEADS) for j in range(m + 1)]
                )
                share = scores.softmax(0)
                heads.append(sum(share[j] * v[j][head] for j in range(m + 1)))
            after.append(x[m] + w["attention.wo.weight"] @ torch.cat(heads))
        x = []
        for e in after:
            n = rms(e, w["ffn_norm.weight"])
            gate = w["feed_forward.w1.weight"] @ n
            inner = gate * torch.sigmoid(gate) * (w["feed_forward.w3.weight"] @ n)
            x.append(e + w["feed_forward.w2.weight"] @ inner)
    return torch.stack([weights["output.weight"] @ rms(e, weights["norm.weight"]) for e in x])


def patches_of(codes, patch, grid=SIDE):
    """Codes of every patch, patches and codes both row by row."""
    rows = codes.view(grid, grid).tolist()
    found = []
    for top in range(0, grid, patch):
        for left in range(0, grid, patch):
            found.append([rows[top + y][left + x] for y in range(patch) for x in range(patch)])
    return found


def sequence(weights, label, codes, patch, grid=SIDE):
    """(elements, positions, patches): the class, then all patches but the last."""
    table = weights["tok_embeddings.weight"]
    patches = patches_of(codes, patch, grid)
    start = weights["cls_embedding.embedding_table.weight"][label]
    means = [torch.stack([table[c] for c in codes]).mean(0) for codes in patches[:-1]]
    count = grid // patch
    positions = [None] + [divmod(i, count) for i in range(len(patches) - 1)]
    return [start, *means], positions, patches


def loss_of(weights, batch, patch, grid=SIDE):
    total, count = 0.0, 0
    for codes, label in zip(batch.tokens, batch.labels.tolist(), strict=True):
        elements, positions, patches = sequence(weights, label, codes, patch, grid)
        logits = logits_of(weights, elements, positions)
        for row, targets in zip(logits, patches, strict=True):
            total = total + row.logsumexp(0) - torch.stack([row[c] for c in targets]).mean()
            count += 1
    return total, count


def double(system):
    return {n: p.detach().double().requires_grad_() for n, p in system.named_parameters()}


# ------------------------------------------------------------------------------------- training


@pytest.mark.parametrize("patch, grid", [(1, 4), (2, 4), (4, 8)])
def test_loss_and_gradients_are_the_papers(patch, grid):
    system = random_system("npp", grid=grid, levels=3 if grid == 8 else 2).eval()
    batch = batch_of(grid=grid)
    phase = Phase(0, 1, "", patch)
    loss = system(batch, Rng(0), phase)
    loss.total.backward()
    weights = double(system)
    expected, count = loss_of(weights, batch, patch, grid)
    expected.backward()
    assert loss.count == count == system.expected_count(len(batch), phase)
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-4)
    for name, parameter in system.named_parameters():
        scale = float(weights[name].grad.abs().max())
        torch.testing.assert_close(
            parameter.grad.double(), weights[name].grad, rtol=1e-3, atol=1e-4 * scale
        )


def test_a_patch_of_half_the_grid_and_of_several_sizes():
    """8 x 8 codes in patches of 4, 2 and 1; 16 targets an element."""
    system = random_system("npp", grid=8, levels=3).eval()
    assert sorted(system.patch_sides()) == [1, 2, 4]
    batch = batch_of(2, 8)
    weights = double(system)
    for patch in (4, 2):
        total, count = 0.0, 0
        for codes, label in zip(batch.tokens, batch.labels.tolist(), strict=True):
            elements, positions, patches = sequence(weights, label, codes, patch, 8)
            logits = logits_of(weights, elements, positions)
            for row, targets in zip(logits, patches, strict=True):
                total += float(row.logsumexp(0) - row[targets].mean())
                count += 1
        loss = system(batch, Rng(0), Phase(0, 1, "", patch))
        assert loss.count == count == 2 * (8 // patch) ** 2
        assert float(loss.total) == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("patch, images", [(1, 1), (2, 4), (4, 16)])
def test_the_logits_of_many_codes_are_never_held_in_float32(patch, images):
    """256 rows of 16384 codes, forward and backward; the loss sees to it."""
    codes = 16_384
    system = build_system(small("npp", 16, codes=codes, levels=3), CLASSES)
    batch = Batch(
        torch.randint(codes, (images, 256)), torch.zeros(images).long(), torch.arange(images)
    )
    with Allocations() as seen:
        system(batch, Rng(0), Phase(0, 1, "", patch)).total.backward()
    rows = images * 256 // patch**2
    assert rows == 256
    assert seen.largest <= 4 * rows * codes // 2


@pytest.mark.parametrize("patch", [1, 2])
def test_flops_are_those_that_torch_counts(patch):
    """Of a forward pass, where attention does not skip what the mask hides."""
    system = random_system("npp", levels=2).eval()
    phase = Phase(0, 1, "", patch)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        system(batch_of(2), Rng(0), phase)
    elements = SIDE**2 // patch**2
    hidden = 2 * 2 * DEPTH * WIDTH * elements * (elements - 1) / 2
    formula = sum(system.flops_per_image(phase).values())
    assert counter.get_total_flops() / 2 == pytest.approx(formula + hidden, rel=1e-9)


def test_llamagen_is_npp_with_single_codes():
    system = random_system().eval()
    batch = batch_of()
    expected, count = loss_of(double(system), batch, 1)
    loss = system(batch, Rng(0))
    assert loss.count == count
    torch.testing.assert_close(loss.total.double(), expected, rtol=1e-5, atol=1e-4)


def test_nothing_of_a_code_reaches_what_predicts_it():
    """Changing a code changes no logit of the codes up to it: losses of those stay."""
    system = random_system().eval()
    tokens = torch.randint(VOCABULARY, (1, SIDE**2))
    for changed in range(SIDE**2):
        other = tokens.clone()
        other[0, changed] = (other[0, changed] + 1) % VOCABULARY
        with torch.no_grad():
            x, y = (system.logits(torch.tensor([1]), t) for t in (tokens, other))
        assert torch.equal(x[:, : changed + 1], y[:, : changed + 1])
        for later in range(changed + 1, SIDE**2):
            assert not torch.equal(x[:, later], y[:, later])


@pytest.mark.parametrize("patch", [1, 2])
def test_logits_are_the_papers(patch):
    system = random_system("npp").eval()
    batch = batch_of(2)
    weights = double(system)
    with torch.no_grad():
        found = system.logits(batch.labels, batch.tokens, patch)
        for row, codes, label in zip(found, batch.tokens, batch.labels.tolist(), strict=True):
            elements, positions, _ = sequence(weights, label, codes, patch)
            expected = logits_of(weights, elements, positions)
            torch.testing.assert_close(row.double(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("patch", [1, 2])
def test_dropout_acts_on_tokens_attention_and_mlp(patch):
    """Three places, each with a mask of its own, written out (gpt.py: tok_dropout, resid_dropout,
    ffn_dropout)."""
    p = 0.5
    system = random_system("npp", dropout=p).train()
    batch = batch_of(2)
    elements = SIDE**2 // patch**2
    masks = Dropout.draw(p, "llama", batch.index, 0, system.sites, elements, Rng(2))

    def dropped(x_BMD, site):
        (mask,) = masks.sites(site, 1)
        keep = mask.keep(len(batch) * elements, WIDTH).view(x_BMD.shape)
        assert 0 < int(keep.sum()) < keep.numel()
        return x_BMD * keep / (1 - p)

    table = system.table(patch)[:elements]
    x_BMD = dropped(system.embed(batch.labels, batch.tokens, patch), 0)
    for number, layer in enumerate(system.layers):
        attended = layer.attention(layer.attention_norm(x_BMD), table)
        x_BMD = x_BMD + dropped(attended, 1 + 2 * number)
        x_BMD = x_BMD + dropped(layer.feed_forward(layer.ffn_norm(x_BMD)), 2 + 2 * number)
    found = system.vectors(batch.labels, batch.tokens, patch, masks)
    torch.testing.assert_close(found, system.norm(x_BMD), rtol=1e-4, atol=1e-5)


def test_without_a_class_the_null_row_is_trained():
    system = random_system(label_dropout=0.9).train()
    system(batch_of(40), Rng(0)).total.backward()
    assert system.cls_embedding.embedding_table.weight.grad[CLASSES].abs().sum() > 0
    system.zero_grad()
    system.eval()
    system(batch_of(40), Rng(0)).total.backward()
    assert system.cls_embedding.embedding_table.weight.grad[CLASSES].abs().sum() == 0


def test_dropout_acts_in_training_alone():
    system = random_system(dropout=0.5, label_dropout=0.0)
    batch = batch_of()
    trained = [float(system.train()(batch, Rng(seed)).total) for seed in (0, 0, 1)]
    assert trained[0] == trained[1] != trained[2]
    plain = [float(system.eval()(batch, Rng(seed)).total) for seed in (0, 1)]
    assert plain[0] == plain[1] != trained[0]


def test_counts_are_upstreams():
    """upstream.md, section 3.2."""
    counts = {"B": 110_888_448, "L": 342_910_976, "XL": 774_699_520, "XXL": 1_410_972_672}
    for size, expected in counts.items():
        for name in ("llamagen", "npp"):
            config = configure(size, name, data="synthetic", num_classes=1000)
            system = build_system(config, 1000, "meta", fill=False)
            assert sum(p.numel() for p in system.parameters()) == expected
    assert [mlp_width(width) for width in (768, 1024, 1280, 1536)] == [2048, 2816, 3584, 4096]


def test_names_are_upstreams():
    config = configure("B", "llamagen", data="synthetic", num_classes=1000)
    names = set(build_system(config, 1000, "meta", fill=False).state_dict())
    expected = {"cls_embedding.embedding_table.weight", "tok_embeddings.weight"}
    expected |= {"norm.weight", "output.weight"}
    for layer in range(12):
        for leaf in (
            "attention.wqkv",
            "attention.wo",
            "feed_forward.w1",
            "feed_forward.w2",
            "feed_forward.w3",
            "attention_norm",
            "ffn_norm",
        ):
            expected.add(f"layers.{layer}.{leaf}.weight")
    assert names == expected


def test_what_decays_and_how_it_starts():
    system = build_system(small(embedding_std=0.02), CLASSES)
    for name, parameter in system.named_parameters():
        assert system.decays(name, parameter) is (parameter.dim() == 2)
        if name == "output.weight":
            assert not parameter.any()
        elif parameter.dim() == 1:
            assert (parameter == 1).all()
        else:
            assert float(parameter.std()) == pytest.approx(0.02, rel=0.25)


# ------------------------------------------------------------------------------------- sampling


def naive_sample(system, label, index, rng, options, scale):
    """Everything computed anew for every code, in float64."""
    weights = double(system)
    codes = []
    for step in range(SIDE**2):
        rows = []
        for row in (label, CLASSES):
            table = weights["tok_embeddings.weight"]
            elements = [weights["cls_embedding.embedding_table.weight"][row]]
            elements += [table[code] for code in codes]
            positions = [None] + [divmod(i, SIDE) for i in range(len(codes))]
            rows.append(logits_of(weights, elements, positions)[-1].detach())
        s = scale(step)
        logits = rows[1] + s * (rows[0] - rows[1])
        uniform = rng.at(step).uniform("sample.token", torch.tensor([index]), 1, step)[:, 0]
        code, _ = sample_codes(logits[None].float(), uniform, options)
        codes.append(int(code))
    return codes


@pytest.mark.parametrize(
    "given, scale",
    [
        (dict(guidance=1.0), lambda step: 1.0),
        (dict(guidance=3.0), lambda step: 3.0),
        (dict(guidance=2.0, guidance_schedule="linear"), lambda step: 1 + step / 15),
        (dict(guidance=2.0, top_k=4, top_p=0.8, temperature=0.7), lambda step: 2.0),
    ],
)
def test_cached_sampling_is_the_naive_one(given, scale):
    system = random_system().eval()
    options = system.options(**given)
    labels, index = torch.tensor([2, 0]), torch.tensor([7, 9])
    found = system.sample(labels, Rng(1), options, index)
    for row, (label, key) in enumerate(zip(labels.tolist(), index.tolist(), strict=True)):
        assert found[row].tolist() == naive_sample(system, label, key, Rng(1), options, scale)


def test_guidance_is_the_runs_unless_told_otherwise():
    system = random_system(guidance=4.0).eval()
    labels = torch.tensor([0, 1, 2, 1])
    default = system.sample(labels, Rng(1))
    assert torch.equal(default, system.sample(labels, Rng(1), system.options(guidance=4.0)))
    assert not torch.equal(default, system.sample(labels, Rng(1), system.options(guidance=1.0)))


def test_guidance_without_a_null_class_is_refused():
    system = random_system(label_dropout=0.0).eval()
    with pytest.raises(ValueError, match="--guidance 3: .* --label-dropout 0"):
        system.sample(torch.tensor([0]), Rng(1), system.options(guidance=3.0))
    system.sample(torch.tensor([0]), Rng(1))  # and does without


def test_the_null_class_cannot_be_asked_for():
    system = random_system().eval()
    with pytest.raises(ValueError, match=r"--classes \[3\]: this run has 3 classes"):
        system.sample(torch.tensor([CLASSES]), Rng(1))


# ------------------------------------------------------------------------------------- the phases


@pytest.mark.parametrize(
    "flags, expected",
    [
        ({"levels": 1}, [(1, 0, 1000)]),
        ({"levels": 2}, [(2, 0, 500), (1, 500, 1000)]),
        ({"levels": 3}, [(4, 0, 250), (2, 250, 500), (1, 500, 1000)]),
        ({"levels": 2, "segment_factor": 0.8}, [(2, 0, 800), (1, 800, 1000)]),
        (
            {"patches": (4, 1), "shares": (0.3, 0.7)},
            [(4, 0, 300), (1, 300, 1000)],
        ),
        # 0.7 + 0.1 and 0.7^2 are a little less in binary.
        (
            {"patches": (4, 2, 1), "shares": (0.7, 0.1, 0.2)},
            [(4, 0, 700), (2, 700, 800), (1, 800, 1000)],
        ),
        (
            {"levels": 3, "segment_factor": 0.7},
            [(4, 0, 490), (2, 490, 700), (1, 700, 1000)],
        ),
        # So is 0.29 * 1000 * 0.1.
        ({"patches": (2, 1), "shares": (0.29, 0.71)}, [(2, 0, 290), (1, 290, 1000)]),
    ],
)
def test_phases(flags, expected):
    system = build_system(small("npp", grid=8, **flags), CLASSES, "meta", fill=False)
    found = [(phase.level, phase.first, phase.end) for phase in system.phases(1000)]
    assert found == expected


def test_the_papers_epochs():
    """upstream.md, section 4: rate 0.5 of 300 epochs ends levels at 37, 75, 150 and 300."""
    system = build_system(small("npp", grid=16, levels=4), CLASSES, "meta", fill=False)
    assert [phase.end for phase in system.phases(300)] == [37, 75, 150, 300]


def test_elements_of_the_default():
    """0.625 of the tokens."""
    config = configure("B", "npp", data="synthetic", num_classes=1000)
    lines = dict(config.model.derived(config.spec))
    assert lines["elements a step"].startswith("160 of 256")


@pytest.mark.parametrize(
    "system, flags, text",
    [
        ("npp", {"patches": (3, 1), "shares": (0.5, 0.5)}, "sides that divide the grid of 4 x 4"),
        ("npp", {"levels": 3}, "patches of 4 x 4"),
        ("npp", {"patches": (2, 1), "shares": (0.5, 0.4)}, "add up to 1, these make 0.9"),
        ("npp", {"patches": (2, 1), "shares": (1.0,)}, "one share for each"),
        ("npp", {"patches": (2, 1)}, "--patches needs --shares"),
        ("npp", {"shares": (0.5, 0.5)}, "--shares .* needs --patches"),
        ("npp", {"patches": (1, 2), "shares": (0.5, 0.5)}, "the last phase has patches of 1"),
        ("npp", {"patches": (1, 2, 1), "shares": (0.5, 0.2, 0.3)}, "fall from phase to phase"),
        ("npp", {"patches": (2, 2, 1), "shares": (0.5, 0.2, 0.3)}, "fall from phase to phase"),
        ("npp", {"patches": (16, 1), "shares": (0.5, 0.5), "image_size": 96}, "at most 64 codes"),
        ("npp", {"patches": (2, 1), "shares": (0.5, 0.5), "levels": 2}, "give one of them"),
        ("npp", {"segment_factor": 1.0}, "--segment-factor 1.0: expected between 0 and 1"),
        ("llamagen", {"tokenizer": "patch", "codes": None}, "takes? a discrete tokenizer"),
        ("llamagen", {"width": 36}, "multiple of 4"),
        ("llamagen", {"levels": 2}, "--levels"),
        ("llamagen", {"label_dropout": 0.0, "guidance": 2.0}, "--guidance 2 guides away from what"),
    ],
)
def test_what_cannot_be_is_refused(system, flags, text):
    with pytest.raises(ValueError, match=text):
        small(system, **flags)


@pytest.mark.parametrize(
    "flags, text",
    [
        ({"levels": 3, "images": 3, "batch": 1}, "--images 3 leave no step of 1 to patches of 4"),
        # Steps begin at 0 and 512.
        (
            {"patches": (2, 1), "shares": (0.99, 0.01), "images": 1000, "batch": 512},
            "no step of 512 to patches of 1 x 1, which have images 990 to 1000",
        ),
        ({"levels": 4, "images": 1000, "batch": 512, "grid": 16}, "to patches of 4 x 4"),
    ],
)
def test_segments_without_a_step(flags, text):
    with pytest.raises(ValueError, match=text):
        small("npp", **{"grid": 8} | flags)


def test_a_phase_behind_the_end():
    system = build_system(small("npp", grid=8), CLASSES, "meta", fill=False)
    with pytest.raises(ValueError, match="image 100 lies behind the end of training, 100"):
        system.phase(100, 100)


def test_scales_below_one_are_refused():
    with pytest.raises(ValueError, match="--guidance 0.5: expected at least 1"):
        random_system().options(guidance=0.5).check()


def test_warm_up_may_be_given_either_way():
    """npp's sizes count it in images; a share that is given goes before that."""
    plain = configure("B", "npp", data="synthetic").recipe
    assert (plain.warmup_images, plain.lr_schedule) == (1_281_167, "trapezoid")
    given = configure("B", "npp", data="synthetic", warmup=0.1).recipe
    assert (given.warmup, given.warmup_images) == (0.1, None)
    assert given.resolve(plain) == given
    with pytest.raises(ValueError, match="--warmup 0.1 and --warmup-images 5: give one"):
        configure("B", "npp", data="synthetic", warmup=0.1, warmup_images=5)


def test_more_than_one_position_per_step_is_refused():
    with pytest.raises(ValueError, match="--positions-per-step 4: this system predicts one"):
        random_system().options(positions_per_step=4)
