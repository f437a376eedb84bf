"""Sampling by the systems against naive samplers that recompute everything at every step."""

from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from heptapod_fast import grid
from heptapod_fast.ops.dispatch import Operators
from heptapod_fast.rng import Rng
from heptapod_fast.sampling import Given, SampleOptions
from heptapod_fast.sampling.generate import generate, keys, spread, together
from heptapod_fast.systems.heptapod import HeptapodOptions
from heptapod_fast.world import World
from tests.running import dense
from tests.systems.test_a_new_system import Ripple

RNG, TOKENS = Rng(4), 16
KINDS = ("discrete", "continuous")
CLASSES, INDEX = torch.tensor([0, 2, 1]), torch.tensor([5, 0, 9])


def quick(system, **options):
    """Options of the system, with few steps of diffusion where there is any."""
    few = {} if system.spec.kind == "discrete" else {"diffusion_steps": 4}
    return system.options(**few, **options)


def taken(tokens, order):
    """tokens (B, N[, C]) in the order of `order` (B, M)."""
    return torch.stack([tokens[b, order[b]] for b in range(len(order))])


def states_so_far(system, tokens, order, seen):
    """h_0..h_seen of the backbone, without a cache."""
    x = system.backbone.embed_start(CLASSES)
    if seen:
        before = order[:, :seen]
        x = torch.cat((x, system.backbone.embed_tokens(taken(tokens, before), before, 1)), dim=1)
    return system.backbone(x)


def head_at(system, h, order, seen, position):
    """The head's vectors at one position of every sequence: (B, D)."""
    step = torch.full((3, 1), seen)
    if system.settings.head == "local":
        window = system.head.window_positions(position)
        z = system.head(h, step, window).view(3, -1, h.shape[-1])
        return z[torch.arange(3), (window == position[:, None]).int().argmax(1)]
    x = system.head.assemble(h, order, step)
    for block in system.head.blocks:
        x = dense(block, x)
    return system.head.norm(x)[torch.arange(3), position + 1]


def start_of(system, order, given):
    """(tokens, order, number of tokens that are there): those that are given come first, among
    each other and the rest in the order that they had."""
    tokens = system.empty_tokens(3, torch.device("cpu"))
    if given is None:
        return tokens, order, 0
    known = given.known_N.nonzero().flatten().tolist()
    rows = []
    for b, row in enumerate(order.tolist()):
        rows.append([p for p in row if p in known] + [p for p in row if p not in known])
        for position in known:
            tokens[b, position] = given.tokens_BN[b, position]
    return tokens, torch.tensor(rows), len(known)


@torch.no_grad()
def naive_heptapod(system, options, given=None):
    """One position after the other; nothing is kept between steps but the tokens."""
    tokens, order, seen = start_of(system, grid.random_orders(INDEX, TOKENS, RNG), given)
    left = TOKENS - seen
    per_step = min(options.positions_per_step, left)
    sizes = grid.group_sizes(left, per_step, options.position_schedule)
    for step, count in enumerate(sizes):
        h = states_so_far(system, tokens, order, seen)
        candidates = order[:, seen:]
        drawn = []
        for position in candidates.unbind(1):
            z = head_at(system, h, order, seen, position)
            drawn.append(system.token_loss.draw(z, RNG.at(step), INDEX, position, options))
        if options.position_order == "confidence":
            best = torch.stack([chance for _, chance in drawn], 1).argsort(1, descending=True)
        else:
            best = torch.arange(TOKENS - seen).expand(3, -1)
        order = torch.cat((order[:, :seen], candidates.gather(1, best)), dim=1)
        for b in range(3):
            for i in range(count):
                tokens[b, order[b, seen + i]] = drawn[best[b, i]][0][b]
        seen += count
    return tokens


@torch.no_grad()
def naive_next_token(system, options, given=None):
    tokens, order, seen = start_of(system, system.orders(INDEX, RNG), given)
    for step in range(seen, TOKENS):
        x = system.backbone.embed_start(CLASSES, order[:, 0])
        if step:
            x = torch.cat(
                (
                    x,
                    system.backbone.embed_tokens(
                        taken(tokens, order[:, :step]), order[:, 1 : step + 1], 1
                    ),
                ),
                dim=1,
            )
        position = order[:, step]
        token = system.token_loss.draw(
            system.backbone(x)[:, -1], RNG.at(step), INDEX, position, options
        )[0]
        tokens[torch.arange(3), position] = token
    return tokens


def agree(ours, naive):
    if ours.dtype == torch.int64:
        assert torch.equal(ours, naive)
    else:
        torch.testing.assert_close(ours, naive, rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("head", [dict(), dict(head="local", window=4)], ids=("global", "local"))
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(positions_per_step=3),
        dict(positions_per_step=TOKENS),
        dict(positions_per_step=4, position_schedule="cosine"),
        dict(temperature=0.7),
    ],
    ids=("1", "3", "all", "cosine", "cool"),
)
def test_heptapod_equals_the_naive_sampler(make_system, head, kind, options):
    system = make_system(kind, **head).eval()
    options = quick(system, **options)
    agree(system.sample(CLASSES, RNG, options, INDEX), naive_heptapod(system, options))


@pytest.mark.parametrize("k", [1, 3, TOKENS])
def test_confidence_equals_the_naive_sampler(make_system, k):
    system = make_system().eval()
    options = quick(system, positions_per_step=k, position_order="confidence", top_k=7)
    agree(system.sample(CLASSES, RNG, options, INDEX), naive_heptapod(system, options))


def given_to(system, known):
    """Tokens of three images, of which those at these positions are known; the others are such
    that reading them would show."""
    is_known = torch.zeros(TOKENS, dtype=torch.bool)
    is_known[known] = True
    if system.spec.kind == "discrete":
        tokens = torch.randint(system.spec.vocabulary, (3, TOKENS))
        tokens[:, ~is_known] = -(10**6)
    else:
        tokens = torch.randn(3, TOKENS, system.spec.channels)
        tokens[:, ~is_known] = torch.nan
    return Given(tokens, is_known)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(head="local", window=4), dict(system="1d-random")],
    ids=("global", "local", "1d"),
)
@pytest.mark.parametrize("known", [[5], [0, 3, 7, 8, 15], [*range(15)]], ids=("1", "5", "15"))
def test_what_is_given_stays_and_the_rest_is_drawn_after_it(make_system, kind, settings, known):
    system = make_system(kind, **settings).eval()
    given = given_to(system, known)
    options = quick(system)
    found = system.complete(given, CLASSES, RNG, options, INDEX)
    assert torch.equal(found[:, known], given.tokens_BN[:, known])
    naive = naive_next_token if "system" in settings else naive_heptapod
    agree(found, naive(system, options, given))
    others = [p for p in range(TOKENS) if p not in known]
    free = system.sample(CLASSES, RNG, options, INDEX)
    assert not torch.equal(found[:, others], free[:, others])


@pytest.mark.parametrize("per_step, order", [(4, "random"), (TOKENS, "random"), (3, "confidence")])
def test_a_completion_of_several_positions_a_step(make_system, per_step, order):
    system = make_system().eval()
    given = given_to(system, [1, 2, 6, 9, 10])
    options = quick(system, positions_per_step=per_step, position_order=order)
    found = system.complete(given, CLASSES, RNG, options, INDEX)
    agree(found, naive_heptapod(system, options, given))


def test_a_raster_order_goes_on_from_its_beginning_alone(make_system):
    system = make_system(system="1d-raster").eval()
    given = given_to(system, [0, 1, 2])
    found = system.complete(given, CLASSES, RNG, quick(system), INDEX)
    agree(found, naive_next_token(system, quick(system), given))
    with pytest.raises(ValueError, match="1d-raster draws row by row"):
        system.complete(given_to(system, [0, 2]), CLASSES, RNG, quick(system), INDEX)


def test_a_fixed_order_completes_nothing(make_system):
    system = make_system(system="llamagen").eval()
    with pytest.raises(ValueError, match="the order of this one is fixed"):
        system.complete(given_to(system, [0]), CLASSES, RNG)


def test_given_tokens_have_to_fit(make_system):
    system = make_system().eval()
    given = given_to(system, [0, 1])
    tokens, known = given
    wrong = {
        r"\(2, 16\), expected \(3, 16\)": Given(tokens[:2], known),
        r"bool \(16,\)": Given(tokens, known[:8]),
        "0 of 16 tokens are given": Given(tokens, torch.zeros_like(known)),
        "16 of 16 tokens are given": Given(tokens, torch.ones_like(known)),
        "expected 0 to 10": Given(tokens + 11, known),
    }
    for message, each in wrong.items():
        with pytest.raises(ValueError, match=message):
            system.complete(each, CLASSES, RNG)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", ["1d-raster", "1d-random"])
def test_baselines_equal_the_naive_sampler(make_system, name, kind):
    system = make_system(kind, system=name).eval()
    plain = quick(system)
    agree(system.sample(CLASSES, RNG, plain, INDEX), naive_next_token(system, plain))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(head="local", window=4), dict(system="1d-random")],
    ids=("global", "local", "1d"),
)
def test_a_sample_does_not_depend_on_its_batch(make_system, settings, kind):
    system = make_system(kind, **settings).eval()
    few = quick(system)
    together = system.sample(CLASSES, RNG, few, INDEX)
    for b in range(3):
        alone = system.sample(CLASSES[b : b + 1], RNG, few, INDEX[b : b + 1])
        agree(alone, together[b : b + 1])
    assert not torch.equal(together[0], system.sample(CLASSES[:1], RNG, few, INDEX[1:2])[0])
    assert not torch.equal(together, system.sample(CLASSES, Rng(5), few, INDEX))


def test_options_of_another_system_are_refused(make_system):
    baseline = make_system(system="1d-raster")
    with pytest.raises(TypeError, match="options are HeptapodOptions, expected SampleOptions"):
        baseline.sample(CLASSES, RNG, HeptapodOptions(positions_per_step=4))
    with pytest.raises(TypeError, match="options are SampleOptions, expected HeptapodOptions"):
        make_system().sample(CLASSES, RNG, SampleOptions())


def test_sampling_ignores_dropout(make_system):
    system = make_system(dropout=0.5)
    calm = system.eval().sample(CLASSES, RNG, quick(system), INDEX)
    assert torch.equal(system.train().sample(CLASSES, RNG, quick(system), INDEX), calm)


@pytest.mark.parametrize("kind", KINDS)
def test_sdpa_samples_what_the_reference_samples(make_system, kind):
    reference = make_system(kind).eval()
    expected = reference.sample(CLASSES, RNG, quick(reference), INDEX)
    system = make_system(kind, operators=Operators({"attention": "sdpa"})).eval()
    agree(system.sample(CLASSES, RNG, quick(system), INDEX), expected)


@pytest.mark.parametrize("bad", [-1, 3])
@pytest.mark.parametrize("name", ["heptapod", "1d-raster"])
def test_classes_out_of_range_are_refused(make_system, name, bad):
    with pytest.raises(ValueError, match=rf"--classes \[{bad}\]: this run has 3 classes, 0 to 2"):
        make_system(system=name).sample(torch.tensor([0, bad]), RNG)


def test_a_local_head_refuses_to_compare_the_whole_grid(make_system):
    system = make_system(head="local", window=4)
    with pytest.raises(ValueError, match="--position-order confidence .*--head local"):
        system.sample(CLASSES, RNG, quick(system, position_order="confidence"))


def test_more_positions_than_there_are_is_refused(make_system):
    system = make_system()
    with pytest.raises(ValueError, match="--positions-per-step 17"):
        system.sample(CLASSES, RNG, quick(system, positions_per_step=17))


def test_spread():
    assert spread([4, 7], 5).tolist() == [4, 4, 4, 7, 7]
    assert spread([4, 7, 9], 2).tolist() == [4, 7]
    assert spread(list(range(10)), 100).bincount().tolist() == [10] * 10


def test_generate_does_not_depend_on_its_batches(make_system):
    class Decoder:
        def decode(self, tokens):
            return tokens[:, None].float()

    system = make_system().eval()
    done, classes = [], torch.tensor([0, 1, 2, 0, 1])
    few = quick(system)
    batches = list(
        generate(system, Decoder(), classes, RNG, few, 2, progress=lambda *a: done.append(a))
    )
    assert [labels.tolist() for labels, _ in batches] == [[0, 1], [2, 0], [1]]
    whole = together(generate(system, Decoder(), classes, RNG, few, batch=5))
    assert torch.equal(together(batches), whole)
    assert done == [(2, 5), (4, 5), (5, 5)]


class AsTheyAre:
    """A tokenizer whose images are the tokens."""

    def decode(self, tokens):
        return tokens[:, None].float()


def test_keys_are_the_class_and_the_number_within_it():
    labels = torch.tensor([5, 2, 5, 5, 0, 2])
    expected = [(5, 0), (2, 0), (5, 1), (5, 2), (0, 0), (2, 1)]
    assert keys(labels).tolist() == [label * 2**32 + number for label, number in expected]
    assert keys(torch.tensor([], dtype=torch.int64)).tolist() == []


def test_an_image_is_its_class_and_number_whatever_else_is_sampled(make_system):
    """Sampled alone, among others, in another order, in batches of another size."""
    system = make_system().eval()
    few = quick(system)

    def images(classes, batch=256):
        labels = torch.tensor(classes)
        found = together(generate(system, AsTheyAre(), labels, RNG, few, batch))
        by_key = dict(zip(keys(labels).tolist(), found, strict=True))
        assert len(by_key) == len(classes)
        return by_key

    whole = images([0, 0, 0, 1, 1, 1, 2])
    assert len({tuple(image.flatten().tolist()) for image in whole.values()}) == 7
    for classes, batch in (([0], 1), ([1, 1], 2), ([2, 1, 0, 1], 3), ([0, 1, 0, 1, 0], 2)):
        for key, image in images(classes, batch).items():
            torch.testing.assert_close(image, whole[key], rtol=1e-4, atol=1e-4)


class Rank(World):
    """One of several ranks, one after the other in one process: what the others have sent lies in
    `post`."""

    post: ClassVar[dict] = {}

    def gather(self, value):
        mine = self.post.setdefault(self.rank, [])
        mine.append(value)
        if not self.main:
            return []
        return [value, *(self.post[rank][len(mine) - 1] for rank in range(1, self.size))]


def test_images_from_a_later_one_on_are_those_of_all(make_system):
    system = make_system().eval()
    few = quick(system)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1])
    whole = list(generate(system, AsTheyAre(), classes, RNG, few, batch=3))
    done = []
    rest = generate(
        system, AsTheyAre(), classes, RNG, few, 3, progress=lambda *at: done.append(at), start=3
    )
    for (labels, images), (expected_labels, expected) in zip(rest, whole[1:], strict=True):
        assert torch.equal(labels, expected_labels) and torch.equal(images, expected)
    assert done == [(6, 8), (8, 8)]
    assert list(generate(system, AsTheyAre(), classes, RNG, few, 3, start=8)) == []
    with pytest.raises(ValueError, match="image 2 is not the first one of a batch of 3"):
        next(generate(system, AsTheyAre(), classes, RNG, few, 3, start=2))


@pytest.mark.parametrize("size", [2, 3, 5])
def test_any_number_of_ranks_gives_the_images_of_one(make_system, size):
    system = make_system().eval()
    few = quick(system)
    classes = torch.tensor([0, 1, 2, 0, 1, 2, 1, 1])
    alone = list(generate(system, AsTheyAre(), classes, RNG, few, batch=3))
    Rank.post.clear()
    work = []
    for rank in reversed(range(size)):
        world = Rank(rank, size, torch.device("cpu"))
        drawn = []
        done = []
        sampled = system.sample

        def counted(labels, *rest, drawn=drawn, sampled=sampled):
            drawn.append(labels.tolist())
            return sampled(labels, *rest)

        sampling = SimpleNamespace(sample=counted)
        batches = list(
            generate(
                sampling,
                AsTheyAre(),
                classes,
                RNG,
                few,
                3,
                progress=lambda *at, done=done: done.append(at),
                world=world,
            )
        )
        work.append(drawn)
        assert (len(batches) == 3) if world.main else (batches == [] and done == [])
    for (labels, images), (expected_labels, expected) in zip(batches, alone, strict=True):
        assert torch.equal(labels, expected_labels)
        assert torch.equal(images, expected)  # batches are the same batches: no bit may differ
    assert done == [(3, 8), (6, 8), (8, 8)]
    # The work is shared: no rank makes all batches.
    assert max(len(drawn) for drawn in work) == -(-3 // size)


@pytest.mark.parametrize("count", [1, 3, 5, 7, 20])
def test_labels_are_spread_over_all_classes(count):
    """Also fewer of them than classes."""
    labels = spread([0, 1, 2, 3, 4], count)
    assert labels.tolist() == sorted(labels.tolist()) and len(labels) == count
    held = labels.bincount(minlength=5)
    assert int(held.max() - held.min()) <= 1
    if 1 < count < 5:
        assert int(labels.diff().max()) <= 2 and labels[-1] >= 3


@pytest.mark.parametrize("name", ["heptapod", "1d-random", "sar"])
def test_late_tokens_take_fewer_steps(make_system, name, monkeypatch):
    """As many as the share of the image says that was drawn before them."""
    settings = {} if name == "heptapod" else {"system": name}
    system = make_system("continuous", **settings).eval()
    asked = []
    draw = system.token_loss.draw

    def counting(z_RD, rng, index_R, slot_R, options, contrast=None):
        asked.append((len(z_RD) // 3, options.diffusion_steps))
        return draw(z_RD, rng, index_R, slot_R, options, contrast)

    monkeypatch.setattr(system.token_loss, "draw", counting)
    options = system.options(diffusion_steps=9, late_diffusion_steps=2)
    system.sample(CLASSES, RNG, options, INDEX)
    drawn = 0
    for count, steps in asked:
        assert steps == round(9 - 7 * drawn / TOKENS)
        drawn += count
    assert drawn == TOKENS and len({steps for _, steps in asked}) > 2


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "settings",
    [dict(), dict(head="local", window=4), dict(system="1d-random")],
    ids=("global", "local", "1d"),
)
def test_weights_kept_in_bf16_give_the_same_bits(make_system, kind, settings):
    """Of a system that is not trained any more products are cast once, not each time."""
    before, after = (make_system(kind, **settings).eval() for _ in range(2))
    before.set_dtype(torch.bfloat16)
    after.settle_dtype(torch.bfloat16)
    assert all(unit.fc1.weight.dtype == torch.bfloat16 for unit in after.backbone.blocks)
    assert all(p.dtype == torch.float32 for p in after.token_loss.parameters())
    options = quick(before)
    found = [system.sample(CLASSES, RNG, options, INDEX) for system in (before, after)]
    assert torch.equal(*found)


LIKELY = [dict(), dict(head="local", window=4), dict(system="1d-random"), dict(system="1d-raster")]


@pytest.mark.parametrize(
    "settings",
    [
        *LIKELY,
        dict(system="llamagen"),
        dict(system="sar"),
        dict(system="sar", grouping="next-row"),
    ],
    ids=("global", "local", "random", "raster", "llamagen", "two streams", "one stream"),
)
def test_likelihoods_of_all_images_add_up_to_one(make_system, settings):
    """All 3 ** 4 grids of 2 x 2 codes, in the order of one index: nothing was seen too early."""
    settings = settings | ({"window": 1} if "window" in settings else {})
    system = make_system(grid=2, codes=3, **settings).eval()
    every = torch.cartesian_prod(*[torch.arange(3)] * 4)
    for index in (0, 5):
        indices = torch.full((81,), index)
        found = system.log_likelihood(every, torch.zeros(81, dtype=torch.int64), RNG, indices)
        assert found.dtype == torch.float64 and found.shape == (81,)
        assert float(found.exp().sum()) == pytest.approx(1, rel=1e-5)
        assert float(found.std()) > 0.1


@pytest.mark.parametrize("settings", LIKELY, ids=("global", "local", "random", "raster"))
def test_a_likelihood_is_that_of_each_token_after_those_before_it(make_system, settings):
    system = make_system(**settings).eval()
    tokens = torch.randint(system.spec.vocabulary, (3, TOKENS))
    found = system.log_likelihood(tokens, CLASSES, RNG, INDEX)
    expected = torch.zeros(3)
    if "system" in settings:
        order = system.orders(INDEX, RNG)
        x = system.backbone.embed_start(CLASSES, order[:, 0])
        inputs = system.backbone.embed_tokens(taken(tokens, order[:, :-1]), order[:, 1:], 1)
        h = system.backbone(torch.cat((x, inputs), dim=1)).unbind(1)
    else:
        order = grid.random_orders(INDEX, TOKENS, RNG)
        h = [
            head_at(system, states_so_far(system, tokens, order, t), order, t, order[:, t])
            for t in range(TOKENS)
        ]
    for t in range(TOKENS):
        logits = system.token_loss.logits(h[t]).log_softmax(-1)
        target = taken(tokens, order[:, t : t + 1])
        expected += logits.gather(1, target)[:, 0].detach()
    torch.testing.assert_close(found.float(), expected, rtol=1e-4, atol=1e-4)


def test_likelihoods_that_are_not_there(make_system):
    with pytest.raises(ValueError, match="the tokens are continuous"):
        make_system("continuous").eval().log_likelihood(torch.zeros(1, TOKENS), CLASSES[:1], RNG)
    ripple = Ripple.__new__(Ripple)  # which has no such method
    with pytest.raises(ValueError, match="--metrics likelihood: Ripple does not say this"):
        ripple.check_likelihood()
    with pytest.raises(ValueError, match="in training mode"):
        make_system().train().log_likelihood(torch.zeros(1, TOKENS).long(), CLASSES[:1], RNG)
