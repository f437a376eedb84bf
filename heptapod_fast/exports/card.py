"""The model card of an exported folder: README.md as Hugging Face's hub reads it.

A licence is for those to add who own the model: the run does not know one.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heptapod_fast.classes import as_text, numbered
from heptapod_fast.config import Config
from heptapod_fast.exports.samples import SEED, Drawn
from heptapod_fast.reports.run import settings_beside_the_size
from heptapod_fast.reports.tables import properties, show, table
from heptapod_fast.runs.exported import CODEBOOK, EXPORT, SAMPLES, Index
from heptapod_fast.systems import SYSTEMS
from heptapod_fast.tokenizers.weights import ORIGINS

# Of the report's figures, those that say something of the model or of what it took.
SHOWN = (
    "images",
    "epochs",
    "steps",
    "loss",
    "skipped_steps",
    "images_per_second_median",
    "tflops_median",
    "mfu_median",
    "memory_peak_gb",
    "wall_seconds",
    "goodput",
    "device",
    "ranks",
    "torch",
)
# Of an evaluation: lists, and numbers of single classes.
NOT_SHOWN = ("samples_per_class",)
PLACES = ("reference", "samples_from")  # paths on the machine that measured


@dataclass(frozen=True)
class Facts:
    """What a card tells.

    Attributes:
        config: the run's settings, without what is of one machine.
        index: what export.json says.
        values: how many numbers the weights are.
        drawn: what is in samples.png; None where there is none.
        why_none: why not, as a part of a sentence.
        tokenizer: which published weights it takes, `Pretrained.describe`; None for none.
        figures: of the run's report, up to the checkpoint; None where nothing was logged.
        evaluation: what tools/evaluate.py found; None where it was not run.
    """

    config: Config
    index: Index
    values: int
    drawn: Drawn | None
    why_none: str
    tokenizer: dict[str, Any] | None
    figures: dict[str, Any] | None
    evaluation: dict[str, Any] | None


def card(facts: Facts) -> str:
    """The text of README.md."""
    parts = [
        front_matter(facts),
        *introduction(facts),
        *samples(facts),
        *usage(facts),
        *training(facts),
        *figures(facts),
        *evaluation(facts),
    ]
    return "\n\n".join(parts) + "\n"


def front_matter(facts: Facts) -> str:
    """What the hub reads, as YAML, of which JSON's texts are a part."""
    tags = ["image-generation", "autoregressive", "class-conditional", facts.config.system]
    lines = ["---", "library_name: heptapod_fast", "tags:"]
    lines += [f"- {json.dumps(tag)}" for tag in tags]
    return "\n".join([*lines, "---"])


def introduction(facts: Facts) -> list[str]:
    """What it is."""
    config = facts.config
    index = facts.index
    spec = config.spec
    about = (SYSTEMS[config.system].__doc__ or "").split("\n")[0]
    size = config.data.image_size
    tokens = f"{spec.channels} numbers each"
    if spec.kind == "discrete":
        tokens = f"one of {spec.vocabulary:,} codes each"
    return [
        f"# {config.system} {config.size} on {plain(str(config.data.data))}",
        f"An image model of {facts.values:,} parameters, trained with heptapod_fast. System "
        f"`{config.system}`, size `{config.size}`: {about}",
        f"It draws images of {size} x {size} pixels of a class that it is given, as {spec.grid} x "
        f"{spec.grid} tokens (`{spec.name}`, {tokens}).",
        f"Weights: `{index.weights}` of `{index.checkpoint}`, after {index.images_seen:,} training "
        f"images. {len(index.class_names):,} classes: {classes_of(index)}.",
    ]


def classes_of(index: Index) -> str:
    """The first classes and the last, as code."""
    found = f"`{plain(numbered(index.class_names))}`"
    return f"{found} (all in `{EXPORT}`)" if "..." in found else found


def samples(facts: Facts) -> list[str]:
    """The grid, or why there is none."""
    drawn = facts.drawn
    if drawn is None:
        return ["## Samples", f"There are none here: {facts.why_none}."]
    shown = sorted(set(drawn.classes))
    what = f"{len(drawn.classes) // len(shown)} of each class, class by class"
    if len(shown) < len(facts.index.class_names):
        what = f"one each of {len(shown)} classes, in the order of their numbers"
    options = show(without_none(drawn.options))
    return [
        "## Samples",
        f"![samples]({SAMPLES})",
        f"Drawn by these weights and not selected: {what}, seed {SEED}; {options}.",
    ]


def usage(facts: Facts) -> list[str]:
    """How it is loaded and sampled."""
    is_decoded = facts.index.tokenizer is not None
    weights = ""
    flag = ""
    if facts.tokenizer is not None:
        file = plain(facts.tokenizer["weights"] or "FILE")
        weights = f', tokenizer_weights="{file}"'
        flag = f" --tokenizer-weights {file}"
    lines = [
        "import torch",
        "from heptapod_fast import load_run",
        "from heptapod_fast.rng import Rng",
        "",
        f'run = load_run("FOLDER"{weights})  # this folder',
        f"tokens = run.sample(torch.tensor({example(facts.index)}), Rng(seed=0))",
    ]
    commands = ["python tools/train.py --init-from FOLDER ...   # start another run from it"]
    if is_decoded:
        lines.append("images = run.decode(tokens)  # (B, 3, H, W), about in [-1, 1]")
        sampling = f"python tools/sample.py FOLDER{flag} --out grid.png"
        commands = [sampling, f"python tools/evaluate.py FOLDER{flag}", *commands]
    return [
        "## Use",
        fenced("python", lines),
        fenced("", commands),
        about_tokenizer(facts),
        f"`{EXPORT}` has the SHA-256 of every file that this reads, and they are checked.",
    ]


def example(index: Index) -> list[int]:
    """A few labels that there are."""
    return list(range(min(3, len(index.class_names))))


def about_tokenizer(facts: Facts) -> str:
    """Where the images come from."""
    name = facts.config.data.tokenizer
    if facts.index.tokenizer is None:
        return "It was trained on synthetic tokens, to measure speed: nothing decodes its own."
    if CODEBOOK in facts.index.files:
        return f"`{CODEBOOK}` is the codebook of its tokens (`{name}`)."
    if facts.tokenizer is None:
        return f"Its tokens (`{name}`) need no file."
    origin = ORIGINS[name]
    file = facts.tokenizer["weights"]
    place = "name it"
    if file is not None:
        place = f"put it into this folder as `{plain(file)}`, or name it"
    digest = facts.tokenizer.get("weights_sha256")
    known = "" if digest is None else f" SHA-256 over its tensors: `{digest}`."
    return (
        f"Its tokens are decoded by {origin.title}, which is not in this folder: {origin.source}. "
        f"Get the file and {place}. Another file than that of the training is refused.{known}"
    )


def training(facts: Facts) -> list[str]:
    """The command, and the settings that matter most."""
    config = facts.config
    recipe = config.recipe
    command = f"python tools/train.py --size {config.size} --system {config.system}"
    values = {
        "images": f"{facts.index.images_seen:,} of {recipe.images:,}",
        "data": plain(str(config.data.data)),
        "image size": config.data.image_size,
        "mirrored at random": "yes" if config.data.flip else "no",
        "tokenizer": config.data.tokenizer,
        "batch": recipe.batch,
        "learning rate": recipe.learning_rate,
        "schedule": recipe.lr_schedule,
        "weight decay": recipe.weight_decay,
        "AdamW": f"beta {recipe.beta1:g}, {recipe.beta2:g}",
        "gradients clipped at": recipe.clip,
        "moving averages": " ".join(map(str, recipe.ema)) or "none",
        "seed": recipe.seed,
        "started from": None if config.run.init_from is None else plain(config.run.init_from),
    }
    return [
        "## Training",
        fenced("", [f"{command} {plain(settings_beside_the_size(config))}".rstrip()]),
        properties(values),
        "`config.json` has every setting.",
    ]


def figures(facts: Facts) -> list[str]:
    """Numbers that the run has logged."""
    numbers = facts.figures
    if numbers is None:
        return []
    known = {name: numbers.get(name) for name in SHOWN if numbers.get(name) != ""}
    losses = [(int(images), loss) for images, loss in numbers["loss_by_images"].items()]
    parts = [
        "## Figures",
        f"From the log of the run, up to the checkpoint, at {numbers['images']:,} images.",
        properties(known),
        table(["images", "training loss"], losses, numbers=[0, 1]),
    ]
    if numbers["evaluations"]:
        *_, last = numbers["evaluations"]
        parts += ["Of samples while it trained, the last time:", properties(last)]
    return parts


def evaluation(facts: Facts) -> list[str]:
    """What was measured of samples."""
    found = facts.evaluation
    if found is None:
        return []
    numbers = {}
    for name, value in found.items():
        if name in PLACES:
            value = Path(value).name
        elif isinstance(value, dict):
            value = without_none(value)
        numbers[plain(name)] = value
    measured = (found.get("checkpoint"), found.get("weights"))
    parts = ["## Evaluation", "By `tools/evaluate.py`, of samples of the run."]
    if measured != (facts.index.checkpoint, facts.index.weights):
        parts.append(
            f"**These numbers are of other weights than this folder's**: of {measured[1]} of "
            f"{measured[0]}."
        )
    return [*parts, properties(numbers, leave_out=NOT_SHOWN)]


def without_none(values: dict[str, Any]) -> dict[str, Any]:
    """What was decided, without what does not apply."""
    return {name: value for name, value in values.items() if value is not None}


def plain(text: str) -> str:
    """Names of files and classes on a line of Markdown, in code or in a table: what would end
    either is replaced."""
    line = " ".join(as_text(text).split())
    return line.replace("`", "'").replace("|", "/")


def fenced(language: str, lines: list[str]) -> str:
    """A block of code."""
    return "\n".join([f"```{language}", *lines, "```"])
