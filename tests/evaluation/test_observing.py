"""What is seen of a network at work, against its own behaviour and against loops."""

import math

import numpy as np
import pytest
import torch

from heptapod_fast import ops
from heptapod_fast.data import Logograms
from heptapod_fast.data.tokens import Batch
from heptapod_fast.evaluation import MetricContext, make_metrics
from heptapod_fast.evaluation.attention_distance import distances
from heptapod_fast.evaluation.held_out import by_step
from heptapod_fast.evaluation.maps import (
    _widest,
    attention_maps,
    maps_of,
    reference_positions,
    similarity,
)
from heptapod_fast.evaluation.observing import Attended, Layer, observe, without_class
from heptapod_fast.evaluation.probe import probe_accuracy
from heptapod_fast.ops import CAUSAL, FULL, AttentionMask, Ends
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import NOWHERE, Elements
from heptapod_fast.tokenizers import Patch, PatchVQ
from tests.cases import EVERY_SYSTEM

RNG = Rng(3)
TOKENS = 16
ONE_AFTER_THE_OTHER = ["global", "local", "ddpm", "1d-raster", "1d-random", "llamagen", "npp"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# ------------------------------------------------------------------------------------- attention


@pytest.mark.parametrize(
    "visible",
    [FULL, CAUSAL, Ends(torch.tensor([[1, 2, 5], [3, 1, 4]])), "mask"],
    ids=("full", "causal", "ends", "mask"),
)
def test_shares_are_what_attention_sums_values_with(visible):
    if visible == "mask":
        visible = AttentionMask.from_dense(torch.tensor([[1, 0, 0, 1, 1]] * 3).bool())
    q, kv = randn(2, 3, 2, 4), randn(2, 5, 2, 2, 4, seed=1)
    seen = []
    with ops.watched_attention(lambda *call: seen.append(call)):
        out = ops.cross_attention(q, kv, visible)
    ((q_seen, k_seen, visible_seen),) = seen
    assert visible_seen is visible
    shares = ops.attention_shares(q_seen, k_seen, visible_seen)
    assert shares.shape == (2, 2, 3, 5)
    torch.testing.assert_close(shares.sum(-1), torch.ones(2, 2, 3))
    expected = torch.einsum("bhnm,bmhe->bnhe", shares, kv[:, :, 1])
    torch.testing.assert_close(out, expected)


def test_nobody_watches_any_more_afterwards():
    seen = []
    qkv = randn(1, 3, 3, 2, 4)
    with ops.watched_attention(lambda *call: seen.append(call)):
        ops.attention(qkv)
    with pytest.raises(RuntimeError, match="stop"), ops.watched_attention(seen.append):
        raise RuntimeError("stop")
    ops.attention(qkv)
    assert len(seen) == 1


# ------------------------------------------------------------------------------------ systems


def in_training_order(system, batch):
    """What every element of the first unit is made of: x (B, M, D)."""
    found = []
    unit = system.units()[0]
    handle = unit.register_forward_pre_hook(lambda _, inputs: found.append(inputs[0].value()))
    with torch.no_grad():
        elements = system.look(batch, RNG, 3)
    handle.remove()
    return found[0], elements[0]


def with_another_token(system, batch, position):
    tokens = batch.tokens.clone()
    if system.spec.kind == "discrete":
        tokens[:, position] = (tokens[:, position] + 1) % system.spec.vocabulary
    else:
        tokens[:, position] += 1.0
    return Batch(tokens, batch.labels, batch.index)


@pytest.mark.parametrize("name", [*ONE_AFTER_THE_OTHER, "one stream"])
def test_an_element_stands_where_the_token_is_that_it_carries(make_system, make_batch, name):
    """Exhaustively: whichever token changes, those elements change that stand there."""
    kind, settings = EVERY_SYSTEM[name]
    system = make_system(kind, **settings).eval()
    batch = make_batch(system, 2)
    before, elements = in_training_order(system, batch)
    for position in range(TOKENS):
        after, _ = in_training_order(system, with_another_token(system, batch, position))
        has_changed = (after != before).any(-1)
        assert torch.equal(has_changed, elements.place_BM == position)


@pytest.mark.parametrize("name", EVERY_SYSTEM)
def test_a_query_that_predicts_a_token_does_not_see_it(make_system, make_batch, name):
    """And a key stands where the token is that it carries: what changes with a token is, of the
    first attention, the outputs of queries that see a key there."""
    kind, settings = EVERY_SYSTEM[name]
    system = make_system(kind, **settings).eval()
    batch = make_batch(system, 2)
    layers = observe(system, batch, RNG, 3)
    assert [layer.hidden_BMD.shape[:2] for layer in layers] == [
        layer.place_BM.shape for layer in layers
    ]
    for layer in layers:
        for attended in layer.attended:
            shares = attended.shares()
            assert shares.shape[2:] == (attended.query_BN.shape[1], attended.key_BK.shape[1])
            assert int(attended.key_BK.max()) < TOKENS and int(attended.key_BK.min()) >= NOWHERE
    first = layers[0]
    for position in range(TOKENS):
        changed = observe(system, with_another_token(system, batch, position), RNG, 3)[0]
        moves = (changed.hidden_BMD != first.hidden_BMD).any(-1)
        (attended,) = first.attended
        sees = (attended.even_shares()[:, 0] * (attended.key_BK == position)[:, None]).sum(-1) > 0
        if name == "two streams":  # the generation is made of earlier tokens, before any attention
            assert bool((sees <= moves)[:, : 1 + TOKENS - system.groups.sizes[-1]].all())
        else:
            assert torch.equal(moves, sees)


def test_a_layer_is_named_by_its_module_and_its_part(make_system, make_batch):
    system = make_system().eval()
    layers = observe(system, make_batch(system, 2), RNG, 3)
    assert [layer.name for layer in layers] == [
        "backbone.blocks.0",
        "backbone.blocks.1",
        "head.blocks.0",
        "head.blocks.1",
    ]
    assert [layer.part for layer in layers] == ["backbone"] * 2 + ["head"] * 2
    assert torch.equal(layers[-1].place_BM[0], torch.arange(-1, TOKENS))


@pytest.mark.parametrize("seen", [0, 5, 15])
def test_the_head_is_shown_as_many_tokens_as_asked(make_system, make_batch, seen):
    """A token that comes later than those changes nothing there."""
    system = make_system().eval()
    batch = make_batch(system, 2)
    order = ops_order(batch)
    before = observe(system, batch, RNG, seen)[-1].hidden_BMD[0]
    for step in range(TOKENS):
        changed = with_another_token(system, batch, int(order[0, step]))
        after = observe(system, changed, RNG, seen)[-1].hidden_BMD[0]
        assert torch.equal(before, after) == (step >= seen)


def ops_order(batch):
    from heptapod_fast import grid

    return grid.random_orders(batch.index, TOKENS, RNG)


class Mistaken:
    """Tells of other things than ran."""

    def __init__(self, system, elements):
        self.system, self.elements = system, elements

    def __getattr__(self, name):
        return getattr(self.system, name)

    def look(self, batch, rng, seen):
        return self.elements(self.system.look(batch, rng, seen))


def test_what_a_system_says_must_fit_what_ran(make_system, make_batch):
    system = make_system().eval()
    batch = make_batch(system, 2)
    with pytest.raises(ValueError, match="3 of 4 units"):
        observe(Mistaken(system, lambda found: found[1:]), batch, RNG, 3)
    without = [Elements(torch.zeros(2, 16).long(), ())] * 4
    with pytest.raises(ValueError, match=r"0 attentions in backbone.blocks.0, in which 1 ran"):
        observe(Mistaken(system, lambda found: without), batch, RNG, 3)


def test_labels_that_say_nothing(make_system):
    index = torch.arange(300)
    drawn = without_class(make_system().eval(), index)
    assert drawn.bincount().min() > 60 and len(drawn.unique()) == 3
    assert torch.equal(drawn[7:9], without_class(make_system().eval(), index[7:9]))
    none = without_class(make_system(system="llamagen"), index)
    assert none.tolist() == [3] * 300
    without_null = make_system(system="llamagen", label_dropout=0.0)
    assert without_class(without_null, index).max() == 2


def test_features_are_means_over_tokens_and_the_grid_knows_its_holes():
    hidden = randn(2, 4, 3)
    place = torch.tensor([[-1, 2, 0, 2], [3, -1, -1, 1]])
    layer = Layer("a.b", hidden, place, [])
    expected = torch.stack((hidden[0, 1:].mean(0), hidden[1, [0, 3]].mean(0)))
    torch.testing.assert_close(layer.pooled(), expected)
    grid = layer.on_grid(4)
    assert torch.equal(grid[0, 2], hidden[0, 3]) and torch.equal(grid[1, 3], hidden[1, 0])
    assert grid[0].isnan().all(-1).tolist() == [False, True, False, True]
    assert grid[1].isnan().all(-1).tolist() == [True, False, True, False]


# ------------------------------------------------------------------------------------ distances


def test_distances_by_loops():
    side, heads = 3, 2
    query = torch.tensor([[-1, 0, 4, 8], [2, 5, -1, 7]])
    key = torch.tensor([[-1, 0, 4, 8], [-1, 3, 1, 6]])
    attended = Attended(randn(2, 4, heads, 5), randn(2, 4, heads, 5, seed=1), CAUSAL, query, key)
    shares = attended.shares()
    expected, count = [0.0] * heads, 0
    for b in range(2):
        for i in range(4):
            keys = [j for j in range(i + 1) if key[b, j] >= 0]
            if query[b, i] < 0 or not keys:
                continue
            count += 1
            for h in range(heads):
                whole = sum(float(shares[b, h, i, j]) for j in keys)
                for j in keys:
                    (row, column), (to_row, to_column) = (
                        divmod(int(p), side) for p in (query[b, i], key[b, j])
                    )
                    apart = math.hypot(row - to_row, column - to_column)
                    expected[h] += float(shares[b, h, i, j]) / whole * apart
    found, queries = distances(attended, shares, side)
    assert queries == count == 5
    torch.testing.assert_close(found, torch.tensor(expected))


def test_even_attention_is_even_over_what_is_seen():
    places = torch.zeros(1, 4).long()
    attended = Attended(randn(1, 4, 2, 5), randn(1, 4, 2, 5), CAUSAL, places, places)
    expected = torch.tril(torch.ones(4, 4)) / torch.arange(1, 5)[:, None]
    torch.testing.assert_close(attended.even_shares(), expected.expand(1, 2, 4, 4))


# ---------------------------------------------------------------------------------------- probes


def test_a_probe_finds_what_a_plane_divides_and_nothing_else():
    labels = torch.arange(600) % 3
    centres = 4 * randn(3, 6)
    features = centres[labels] + randn(600, 6, seed=1)
    features = torch.cat((1000 * features, torch.ones(600, 1)), dim=1)  # scales do not matter
    train, test = slice(0, 400), slice(400, 600)
    accuracy = probe_accuracy(features[train], labels[train], features[test], labels[test], 3)
    assert accuracy > 0.97
    noise = randn(600, 6, seed=2)
    by_chance = probe_accuracy(noise[train], labels[train], noise[test], labels[test], 3)
    assert 0.2 < by_chance < 0.47
    # Of what it has not learned it knows nothing, however much it has learned by heart.
    many = randn(600, 500, seed=3)
    assert probe_accuracy(many[train], labels[train], many[test], labels[test], 3) < 0.5


SIDE = 24
LOGOGRAMS = Logograms(SIDE, 600)
TOKENIZER = PatchVQ.fit(LOGOGRAMS, SIDE, 4, codes=11)


def context(system, source=LOGOGRAMS, **more):
    return MetricContext(
        source, tokenizer=TOKENIZER, system=system, image_size=SIDE, count=20, **more
    )


def test_the_probe_is_not_told_the_class_through_the_class(make_system, monkeypatch):
    """A network that lets the class it was told out again, and nothing else."""
    monkeypatch.setattr("heptapod_fast.evaluation.probe.IMAGES", 400)
    monkeypatch.setattr("heptapod_fast.evaluation.probe.PER_CLASS", 1)
    system = make_system(grid=6, num_classes=5).eval()

    class Parrot:
        num_classes, num_tokens, null_class = 5, 36, None
        parameters = system.parameters

        def check_answers(self, method, asked_by):
            """Everything."""

    def observed(parrot, batch, rng, seen):
        told = torch.nn.functional.one_hot(batch.labels, 5).float()
        place = torch.zeros(len(told), 1).long()
        return [Layer("parrot.0", told[:, None], place, [])]

    monkeypatch.setattr("heptapod_fast.evaluation.probe.observe", observed)
    (metric,) = make_metrics(["probe"], context(Parrot()))
    assert metric.compute()["probe_accuracy"] < 0.4


def test_numbers_of_a_whole_system(make_system, monkeypatch):
    monkeypatch.setattr("heptapod_fast.evaluation.probe.IMAGES", 200)
    monkeypatch.setattr("heptapod_fast.evaluation.probe.PER_CLASS", 1)
    system = make_system(grid=6, num_classes=5).eval()
    metrics = make_metrics(["loss", "probe", "attention"], context(system))
    assert not any(metric.needs_samples for metric in metrics)
    found = {}
    for metric in metrics:
        found |= metric.compute()
    layers = [f"{part}.blocks.{i}" for part in ("backbone", "head") for i in range(2)]
    assert list(found["probe_accuracies"]) == layers
    assert found["probe_accuracy"] == max(found["probe_accuracies"].values())
    assert found["probe_images"] == {"trained on": 200, "tested on": 50}
    assert list(found["attention_distances"]) == layers
    assert found["attention_part"] == "head"
    # Of 6 x 6 tokens that all look at all alike the mean distance is known.
    places = [divmod(p, 6) for p in range(36)]
    even = sum(math.dist(a, b) for a in places for b in places) / 36**2
    assert found["attention_distances_even"]["head.blocks.0"] == pytest.approx(even, rel=1e-4)
    assert 1.5 < found["attention_distance"] < 5
    steps = found["held_out_loss_by_step"]
    assert list(steps) == [str(step) for step in range(36)]
    assert found["held_out_loss"] == pytest.approx(sum(steps.values()) / 36)
    assert found["held_out_loss"] == pytest.approx(math.log(11), rel=0.5)


def test_probes_need_classes_to_tell_apart(make_system):
    system = make_system(grid=6).eval()
    one = Logograms(SIDE, 100, num_classes=1)
    with pytest.raises(ValueError, match="these are of one class"):
        make_metrics(["probe"], context(system, one))
    with pytest.raises(ValueError, match="none beside its tokens"):
        make_metrics(["probe"], context(system, None))


@pytest.mark.parametrize("name", ["loss", "probe", "attention"])
def test_a_system_that_does_not_answer_is_refused(name, make_system):
    from tests.systems.test_a_new_system import Ripple

    system = Ripple.__new__(Ripple)
    torch.nn.Module.__init__(system)
    with pytest.raises(ValueError, match=f"--metrics {name}: Ripple does not say this"):
        make_metrics([name], context(system))


# -------------------------------------------------------------------------------------- losses


def test_a_step_is_a_group_where_tokens_come_in_groups(make_system):
    system = make_system("continuous", system="sar")
    steps = system.step_of_tokens()
    assert steps.tolist() == sorted(steps.tolist()) and int(steps.max()) == 6  # anti-diagonals
    found = by_step(torch.arange(16.0), steps)
    assert found["0"] == 0 and found["1"] == 1.5 and found["6"] == 15


@pytest.mark.parametrize("name", EVERY_SYSTEM)
def test_losses_of_tokens_are_the_loss_of_training(make_system, make_batch, name):
    """Where training scores every token once; the global head scores the next ones, on average."""
    kind, settings = EVERY_SYSTEM[name]
    system = make_system(kind, **settings).eval()
    batch = make_batch(system, 4)
    with torch.no_grad():
        found = system.next_token_losses(batch, RNG)
        loss = system(batch, RNG)
    assert found.shape == (4, TOKENS) and found.dtype == torch.float32
    if name in ("global", "local", "ddpm"):
        assert 0.5 < float(found.mean() / loss.mean) < 2
    else:
        torch.testing.assert_close(found.sum(), loss.total, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["ddpm", "1d-random", "two streams"])
def test_noise_is_put_in_to_the_degree_asked_for(make_system, make_batch, name, monkeypatch):
    """What the network is given, and how its guess is judged, against the formulas."""
    kind, settings = EVERY_SYSTEM[name]
    system = make_system(kind, **settings).eval()
    loss = system.token_loss
    index, slot = torch.tensor([4, 9]), torch.tensor([1, 2])
    target, z = randn(2, loss.channels), randn(2, 32, seed=1)
    is_flow = name != "ddpm"
    given = []

    def net(xt, time, condition):
        given.append((xt, time))
        return torch.full((2, loss.OUTPUTS * loss.channels), 0.25)

    monkeypatch.setattr(loss, "net", net)
    for share in (0.0, 0.3, 1.0):
        found = loss.loss_at(z, target, RNG, index, slot, share)
        xt, time = given.pop()
        if is_flow:
            noise = RNG.normal("flow.at", index, loss.channels, slot)
            assert time.tolist() == pytest.approx([share] * 2)
            torch.testing.assert_close(xt, (1 - share) * target + share * noise)
            wanted = noise - target
        else:
            noise = RNG.normal("diffusion.at", index, loss.channels, slot)
            step = round(999 * share)
            assert time.tolist() == [step] * 2
            kept = (1 - ops.cosine_betas()).cumprod(0)[step].float()
            torch.testing.assert_close(xt, kept.sqrt() * target + (1 - kept).sqrt() * noise)
            wanted = noise
        torch.testing.assert_close(found, ((0.25 - wanted) ** 2).mean(-1))


def test_losses_by_noise_leave_out_what_training_does(make_system, make_batch):
    """Rows of weight 0, of positions already seen, count nothing."""
    system = make_system("continuous", steps="uniform").eval()
    batch = make_batch(system, 4)
    rows, z = system.predicted(batch, RNG)
    assert 0 < float(rows.weight_R.sum()) < len(rows.weight_R)
    target = batch.tokens[rows.sequence_R, rows.position_R]
    with torch.no_grad():
        found = system.losses_by_noise(batch, RNG, [0.2, 0.7])
        for number, share in enumerate((0.2, 0.7)):
            index = batch.index[rows.sequence_R]
            each = system.token_loss.loss_at(z, target, RNG, index, rows.slot_R, share)
            expected = each[rows.weight_R > 0].mean()
            torch.testing.assert_close(found[number], expected)


def test_codes_have_no_noise(make_system, make_batch):
    system = make_system().eval()
    with pytest.raises(ValueError, match="it has no noise"):
        system.losses_by_noise(make_batch(system, 2), RNG, [0.5])


# ----------------------------------------------------------------------------------------- maps


def test_maps_of_attention_by_loops():
    query = torch.tensor([[-1, 0, 2, 2], [2, 3, -1, 0]])
    key = torch.tensor([[-1, 0, 2, 1], [-1, 3, 1, 2]])
    attended = Attended(randn(2, 4, 2, 5), randn(2, 4, 2, 5, seed=1), CAUSAL, query, key)
    found = attention_maps(attended, [2, 3], 4)
    shares = attended.shares().mean(1)
    for b in range(2):
        for number, position in enumerate((2, 3)):
            queries = [i for i in range(4) if query[b, i] == position]
            expected = [math.nan] * 4
            if queries:
                for j in range(queries[-1] + 1):
                    if key[b, j] >= 0:
                        expected[int(key[b, j])] = float(shares[b, queries[-1], j])
            torch.testing.assert_close(found[b, number], torch.tensor(expected), equal_nan=True)


def test_similarity_is_the_cosine():
    vectors = randn(2, 4, 3)
    found = similarity(vectors, [1, 3])
    for b in range(2):
        for number, position in enumerate((1, 3)):
            for other in range(4):
                a, c = vectors[b, position], vectors[b, other]
                cosine = float(a @ c) / math.sqrt(float(a @ a) * float(c @ c))
                assert float(found[b, number, other]) == pytest.approx(cosine, abs=1e-5)


def test_maps_of_a_system(make_system, make_batch):
    system = make_system(grid=6).eval()
    batch = make_batch(system, 2)
    positions = reference_positions(6)
    assert len(set(positions)) == 3 and all(0 <= p < 36 for p in positions)
    found = {maps.name: maps for maps in maps_of(system, TOKENIZER, batch, positions, 10)}
    assert list(found) == [
        "similarity-tokens",
        "similarity-backbone",
        "attention-backbone",
        "similarity-head",
        "attention-head",
    ]
    codes = TOKENIZER.codebook_VE[batch.tokens]
    expected = torch.cosine_similarity(codes[:, positions[0], None], codes, dim=-1)
    torch.testing.assert_close(found["similarity-tokens"].map_BRN[:, 0], expected)
    assert torch.equal(TOKENIZER.vectors(batch.tokens), codes)
    head = found["attention-head"].map_BRN
    assert not bool(head.isnan().any()) and bool((head.sum(-1) <= 1 + 1e-5).all())


def test_a_local_head_stands_at_few_tokens(make_system, make_batch):
    system = make_system(grid=6, head="local", window=1).eval()
    found = [m.name for m in maps_of(system, TOKENIZER, make_batch(system, 2), [0, 7], 10)]
    assert "attention-backbone" in found


def test_of_several_attentions_the_widest_is_drawn(make_system, make_batch):
    """A local head looks at all states, and then within its window."""
    system = make_system(grid=6, head="local", window=4).eval()
    layer = observe(system, make_batch(system, 2), RNG, 10)[-1]
    widest = _widest(layer)
    assert widest is layer.attended[0] and widest.key_BK.shape[1] == 36


def test_probes_and_distances_show_the_head_what_they_say(make_system, monkeypatch):
    monkeypatch.setattr("heptapod_fast.evaluation.probe.IMAGES", 64)
    monkeypatch.setattr("heptapod_fast.evaluation.probe.PER_CLASS", 1)
    system = make_system(grid=6, num_classes=5).eval()
    for name, expected in (("probe", 35), ("attention", 18)):
        shown = []

        def watch(system, batch, rng, seen, shown=shown):
            shown.append(seen)
            return observe(system, batch, rng, seen)

        module = {"probe": "probe", "attention": "attention_distance"}[name]
        monkeypatch.setattr(f"heptapod_fast.evaluation.{module}.observe", watch)
        (metric,) = make_metrics([name], context(system))
        metric.compute()
        assert set(shown) == {expected}


def test_tested_features_are_scaled_as_the_others_were():
    """Test images that all lie on one side stay there."""
    labels = torch.arange(400) % 2
    train = (2.0 * labels - 1)[:, None] + 0.1 * randn(400, 1)
    test = 1 + 0.1 * randn(50, 1, seed=1)
    assert probe_accuracy(train, labels, test, torch.ones(50).long(), 2) == 1


def test_losses_by_noise_weigh_batches_by_their_images(make_system, monkeypatch):
    """66 images come as 64 and 2."""
    system = make_system("continuous", grid=6, num_classes=5).eval()
    monkeypatch.setattr(
        type(system),
        "losses_by_noise",
        lambda self, batch, rng, shares: torch.full((len(shares),), float(len(batch.index))),
    )
    monkeypatch.setattr(
        type(system), "next_token_losses", lambda self, batch, rng: torch.zeros(len(batch), 36)
    )
    given = MetricContext(
        LOGOGRAMS, tokenizer=Patch(SIDE, 4), system=system, image_size=SIDE, count=66
    )
    (metric,) = make_metrics(["loss"], given)
    (value,) = set(metric.compute()["held_out_loss_by_noise"].values())
    assert value == pytest.approx((64 * 64 + 2 * 2) / 66)


@pytest.mark.parametrize("name", ["loss", "attention", "likelihood"])
def test_images_that_cannot_be_asked_of_the_run(make_system, tmp_path, name):
    system = make_system(grid=6, num_classes=3).eval()
    images = np.zeros((3, SIDE, SIDE, 3), np.uint8)
    np.savez(tmp_path / "others.npz", arr_0=images, labels=np.array([0, 7, 1]))
    np.savez(tmp_path / "one.npz", arr_0=images[:1], labels=np.array([0]))
    for file, text in (("others", "has classes 0 to 7, the run 0 to 2"), ("one", "has one image")):
        given = context(system, reference=str(tmp_path / f"{file}.npz"))
        with pytest.raises(ValueError, match=f"--metrics {name}: .*{text}"):
            make_metrics([name], given)
