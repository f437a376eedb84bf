"""Settings: sizes, defaults, refusals, and what makes two runs the same run."""

import dataclasses
from typing import get_args

import pytest

from heptapod_fast.config import BatchSplit
from heptapod_fast.config.settings import choices_of, type_hints
from heptapod_fast.systems import Phase, build_system, configure
from heptapod_fast.train.schedule import warmup_images

PAPER_TOTALS = {"B": 207_234_336, "L": 477_143_584, "H": 940_597_024}


def resolved(size="tiny", **flags):
    if size != "tiny":
        flags.setdefault("data", "synthetic")
    return configure(size, **flags)


def test_a_portable_copy_says_nothing_of_the_machine():
    """Whichever setting is a text of its own: a path in it keeps its last part or goes."""
    config = configure("tiny", data="synthetic")
    for name, group in config.groups.items():
        texts = {
            setting: f"/home/somebody/{setting}"
            for setting, kind in type_hints(type(group)).items()
            if str in (kind, *get_args(kind)) and not choices_of(type(group), setting)
        }
        texts.pop("log", None)  # names of sinks
        texts.pop("evaluate_metrics", None)
        texts.pop("evaluate_inception_sha256", None)
        config = dataclasses.replace(config, **{name: group.changed(texts)})
    assert config.to_json().count("/home/somebody/") == 6
    portable = config.portable()
    assert "/" not in portable.to_json()
    assert (portable.data.data, portable.run.init_from) == ("data", "init_from")
    assert portable.run.out is None and portable.data.tokenizer_weights is None
    assert portable.recipe == config.recipe and portable.model == config.model


def test_data_of_a_portable_copy_stays_what_it_is():
    """A folder that is named like embedded data is told from that."""
    config = configure("tiny")
    assert config.portable() == config
    folder = config.replace(data="sets/logograms").portable()
    assert folder.data.data == "./logograms" and folder.data.kind == "images"


def parameters(config):
    system = build_system(config, 1000, device="meta")
    return sum(p.numel() for p in system.parameters())


@pytest.mark.parametrize("size", PAPER_TOTALS)
def test_parameter_counts_are_the_papers(size):
    assert parameters(resolved(size)) == PAPER_TOTALS[size]


@pytest.mark.parametrize("size", ["B", "L", "H"])
@pytest.mark.parametrize("system", ["1d-raster", "1d-random"])
def test_baselines_lack_the_heads_embeddings_and_norm_only(size, system):
    config = resolved(size, system=system)
    heptapod = resolved(size).model
    tables = heptapod.width * (1 + 257 + 2)
    assert config.model.depth == 2 * heptapod.depth
    assert parameters(config) == PAPER_TOTALS[size] - tables


@pytest.mark.parametrize(
    "size, depth, width, heads, blocks, mlp",
    [("B", 12, 768, 12, 6, 1024), ("L", 16, 1024, 16, 8, 1280), ("H", 20, 1280, 16, 12, 1536)],
)
def test_presets_are_table_3(size, depth, width, heads, blocks, mlp):
    c = resolved(size).model
    assert (c.depth, c.head_depth, c.width, c.heads) == (depth, depth, width, heads)
    assert (c.diffusion_blocks, c.diffusion_width, c.diffusion_repeat) == (blocks, mlp, 4)
    assert (c.head, c.window, c.density, c.steps) == ("global", 256, 1, "antithetic")
    assert (c.loss_weight, c.diffusion_loss) == ("position", "mse+vb")
    assert resolved(size).data.tokenizer == "kl16"


@pytest.mark.parametrize("size", ["B", "L", "H"])
def test_recipe_of_the_paper(size):
    config = resolved(size, data="somewhere/train")
    recipe = config.recipe
    assert (recipe.images, recipe.batch, config.data.image_size) == (800 * 1_281_167, 2048, 256)
    assert recipe.learning_rate == pytest.approx(8e-4)
    assert recipe.lr_schedule == "constant"
    assert (recipe.beta1, recipe.beta2, recipe.weight_decay) == (0.9, 0.95, 0.02)
    assert (recipe.clip, recipe.ema) == (3.0, (0.9999,))
    assert (config.model.dropout, config.model.embedding_std) == (0.1, 0.02)
    assert config.data.flip is True
    assert warmup_images(recipe, Phase(0, recipe.images)) == 100 * 1_281_167


def test_recipe_of_tiny():
    config = resolved()
    data, model = config.data, config.model
    assert (data.data, data.tokenizer) == ("logograms", "patch-vq")
    assert (data.image_size, data.patch_size, data.codes, data.flip) == (24, 4, 128, False)
    assert (model.dropout, model.density) == (0.0, 2)


@pytest.mark.parametrize(
    "settings, expected",
    [
        (dict(size="B", data="folder"), True),
        (dict(size="B", data="folder", tokenizer="vq16"), True),
        (dict(size="B", data="folder", tokenizer="patch"), False),
        (dict(size="B", data="folder", tokenizer="patch-vq"), False),
        (dict(size="B", data="folder", image_size=128), False),
        (dict(size="B", data="synthetic"), False),
        (dict(size="B", data="folder", flip=False), False),
        (dict(size="tiny", tokenizer="kl16", image_size=256, data="folder"), False),
        (dict(size="tiny", flip=True), True),
    ],
)
def test_flip_rule(settings, expected):
    assert configure(**settings).data.flip is expected


@pytest.mark.parametrize(
    "settings",
    [
        dict(size="tiny"),
        dict(size="tiny", system="1d-random"),
        dict(size="tiny", window=9),
        dict(size="tiny", tokenizer="patch", image_size=32),
        dict(size="B"),
        dict(size="L", head_depth=1),
        dict(size="H", system="1d-raster"),
        dict(size="L", head="local"),
    ],
)
def test_resolving_twice_changes_nothing(settings):
    once = resolved(**settings)
    assert once.resolve() == once


@pytest.mark.parametrize("head_depth, depth", [(1, 31), (8, 24), (16, 16)])
def test_head_depth_keeps_the_total(head_depth, depth):
    config = resolved("L", head_depth=head_depth)
    assert (config.model.depth, config.model.head_depth) == (depth, head_depth)
    assert parameters(config) == PAPER_TOTALS["L"]


@pytest.mark.parametrize(
    "settings, head, window",
    [
        (dict(), "global", 256),
        (dict(window=256), "global", 256),
        (dict(window=64), "local", 64),
        (dict(head="local"), "local", 64),
        (dict(head="local", window=4), "local", 4),
    ],
)
def test_window_and_head_follow_from_each_other(settings, head, window):
    model = resolved("B", **settings).model
    assert (model.head, model.window) == (head, window)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(head="global", window=4), "--window 4 contradicts --head global"),
        (dict(head="local", window=5), "--window 5"),
        (dict(window=8), "--window 8"),
        (dict(window=16), "--window 16"),
        (dict(head="local", window=36), "--window 36"),
        (dict(head="local", image_size=4), "--head local"),
        (dict(image_size=25), "--image-size 25"),
        (dict(image_size=0), "--image-size 0"),
        (dict(patch_size=0), "--patch-size 0"),
        (dict(tokenizer="kl16", image_size=32, patch_size=8), "--patch-size 8"),
        (dict(tokenizer="kl16"), "--image-size 24"),
        (dict(tokenizer="patch", codes=16), "--codes 16"),
        (dict(codes=1), "--codes must be 2 or more"),
        (dict(tokenizer="patch", tokenizer_weights="x"), "--tokenizer-weights"),
        (dict(diffusion_blocks=2), "--diffusion-blocks"),
        (dict(diffusion_width=2), "--diffusion-width"),
        (dict(diffusion_repeat=2), "--diffusion-repeat"),
        (dict(diffusion_loss="mse"), "--diffusion-loss"),
        (dict(tokenizer="patch", diffusion_repeat=0), "--diffusion-repeat 0"),
        (dict(tokenizer="patch", diffusion_width=0), "--diffusion-width 0"),
        (dict(data="synthetic", logogram_count=5), "--logogram-count"),
        (dict(logogram_count=0), "--logogram-count 0"),
        (dict(data="synthetic", flip=True), "--flip"),
        (dict(num_classes=0), "--num-classes 0"),
        (dict(head_depth=0), "--head-depth 0"),
        (dict(head_depth=6), "--head-depth 6"),
        (dict(density=0), "--density 0"),
        (dict(density=37), "--density 37"),
        (dict(width=30), "--width 30"),
        (dict(width=0), "--width 0"),
        (dict(heads=0), "--heads 0"),
        (dict(dropout=1.0), "--dropout 1.0"),
        (dict(dropout=-0.1), "--dropout -0.1"),
        (dict(images=0), "--images 0"),
        (dict(batch=0), "--batch 0"),
        (dict(micro_batch=0), "--micro-batch 0"),
        (dict(sample_every=-1), "--sample-every -1"),
        (dict(warmup=1.0), "--warmup 1.0"),
        (dict(clip=-1.0), "--clip"),
        (dict(lr_per_256=0.0), "--lr-per-256"),
        (dict(weight_decay=-0.1), "--weight-decay"),
        (dict(ema=(0.9, 0.9)), "--ema"),
        (dict(ema=(1.0,)), "--ema"),
        (dict(embedding_std=0.0), "--embedding-std 0.0"),
        (dict(seed=-1), "--seed -1"),
        (dict(seed=2**63), "--seed"),
        (dict(size="XXL"), "--size XXL: expected one of tiny, B, L, H"),
        (dict(system="var"), "--system var: expected one of heptapod, 1d-raster"),
        (dict(steps="mirrored"), "--steps mirrored"),
        (dict(loss_weight="token"), "--loss-weight token"),
        (dict(tokenizer="vae"), "--tokenizer vae"),
        (dict(clip=float("nan")), "--clip nan"),
        (dict(lr_per_256=float("inf")), "--lr-per-256 inf"),
        (dict(ema=(float("nan"),)), "--ema"),
        (dict(beta1=1.0), "--beta1 1.0"),
        (dict(beta2=-0.1), "--beta2 -0.1"),
        (dict(minutes=0.0), "--minutes 0.0"),
        (dict(max_skips=-1), "--max-skips -1"),
        (dict(images=32), "--batch 64 is more than --images 32"),
        (dict(batch=10**11), "--batch 100000000000"),
        (dict(depth=10**11), "--depth 100000000000"),
    ],
)
def test_refusals_name_the_flag(settings, message):
    with pytest.raises(ValueError) as error:
        configure(**({"size": "tiny"} | settings))
    assert message in str(error.value)


@pytest.mark.parametrize("system", ["1d-raster", "1d-random"])
@pytest.mark.parametrize(
    "name, value",
    [
        ("head", "global"),
        ("head_depth", 2),
        ("window", 4),
        ("density", 1),
        ("steps", "uniform"),
        ("loss_weight", "step"),
    ],
)
def test_baselines_refuse_head_flags(system, name, value):
    with pytest.raises(ValueError, match="--" + name.replace("_", "-")):
        configure("tiny", system, **{name: value})


@pytest.mark.parametrize(
    "settings, world, expected",
    [
        (dict(batch=64), 1, (64, 64, 1)),
        (dict(batch=64), 4, (16, 16, 1)),
        (dict(batch=64, micro_batch=8), 2, (32, 8, 4)),
        (dict(batch=1024), 1, (1024, 256, 4)),
        (dict(batch=518), 1, (518, 74, 7)),
        (dict(batch=7, steps="uniform"), 1, (7, 7, 1)),
        (dict(batch=6, micro_batch=3, system="1d-random"), 2, (3, 3, 1)),
    ],
)
def test_the_batch_over_ranks_and_micro_batches(settings, world, expected):
    assert resolved(**settings).split_batch(world) == BatchSplit(*expected)


@pytest.mark.parametrize(
    "settings, world, message",
    [
        (dict(batch=10), 4, "--batch 10 does not divide over 4 ranks: the nearest are 8 and 12"),
        (dict(batch=8, micro_batch=3), 1, "--micro-batch 3 does not divide the 8 sequences"),
        (dict(batch=8, micro_batch=16), 1, "--micro-batch 16"),
        (dict(batch=8, micro_batch=1), 1, "--micro-batch"),
        (dict(batch=6), 2, "--steps uniform"),
    ],
)
def test_batches_that_cannot_be_shared_are_refused(settings, world, message):
    with pytest.raises(ValueError) as error:
        resolved(**settings).split_batch(world)
    assert message in str(error.value)


def test_every_setting_that_matters_changes_the_run_directory():
    base = resolved()
    changed = dict(
        seed=1,
        batch=32,
        density=3,
        head_depth=1,
        width=64,
        dropout=0.1,
        codes=64,
        ema=(0.99,),
        lr_per_256=1e-3,
        warmup=0.1,
        logogram_count=77,
        steps="uniform",
        loss_weight="step",
        window=4,
        clip=1.0,
        beta2=0.9,
        weight_decay=0.0,
        flip=True,
        system="1d-random",
        data="synthetic",
        image_size=28,
        allow_upscale=True,
    )
    names = {
        name: resolved(
            **({"logogram_count": None} | {name: value} if name == "data" else {name: value})
        ).run_dir()
        for name, value in changed.items()
    }
    assert len({base.run_dir(), *names.values()}) == 1 + len(changed)


@pytest.mark.parametrize(
    "change",
    [
        dict(images=777),
        dict(checkpoint_every=1),
        dict(keep_checkpoints=9),
        dict(device="cpu"),
        dict(precision="fp32"),
        dict(attention="sdpa"),
        dict(micro_batch=2),
        dict(minutes=3.0),
    ],
)
def test_settings_that_do_not_matter_keep_the_run_directory(change):
    assert resolved(**change).run_dir() == resolved().run_dir()


def test_run_directory_is_readable_and_out_wins():
    assert resolved().run_dir().startswith("runs/heptapod-tiny-logograms-patch-vq-24px-")
    assert resolved(data="a/b/birds/").run_dir().startswith("runs/heptapod-tiny-birds-")
    assert resolved(out="elsewhere").run_dir() == "elsewhere"


@pytest.mark.parametrize("image_size, patch_size", [(24, 4), (64, 4), (128, 16), (256, 16)])
def test_patches_are_small_for_small_images(image_size, patch_size):
    data = configure("tiny", tokenizer="patch", image_size=image_size).data
    assert data.patch_size == patch_size


@pytest.mark.parametrize("name", ["logograms", "synthetic"])
def test_a_folder_named_like_embedded_data_is_a_folder(name):
    """A leading dot tells it from that, however it is spelt."""
    for spelt in (f"./{name}", f"./{name}/", f"elsewhere/../{name}"):
        assert configure("tiny", data=spelt).data.data == f"./{name}"
    assert configure("tiny", data="photos/").data.data == "photos"
