"""Which weights of a run: found by name, or made of its snapshots."""

from __future__ import annotations

from torch import Tensor

from heptapod_fast import checkpoints, shards
from heptapod_fast.averages import LONGEST, POST_HOC, averages_of, power_name
from heptapod_fast.checkpoints import Checkpoint
from heptapod_fast.config import Config
from heptapod_fast.runs.directory import RunDir, RunError
from heptapod_fast.runs.post_hoc import make_average
from heptapod_fast.runs.trained import Trained, spellings


class TrainedRun(RunDir):
    """A run directory as a `Source` of trained systems."""

    def open(self, checkpoint: int | None = None, ema: str | None = None) -> Trained:
        """See `Source.open`."""
        weights = weights_name(self.read_config(), ema)
        chosen = checkpoints.load_step(self.checkpoints, checkpoint)
        return Trained(
            tensors=read_weights(self, chosen, weights),
            where=f"{weights} of {chosen.path}",
            weights=weights,
            checkpoint=chosen.path,
            images_seen=chosen.state["images"],
            class_names=tuple(chosen.state["class_names"]),
            tokenizer=chosen.state["tokenizer"],
        )


def weights_name(config: Config, ema: str | None) -> str:
    """What the weights asked for are called: a file of a checkpoint, or an average that has to be
    made.

    Raises:
        RunError: the run has no such average, nor what one could be made of.
    """
    names = [average.name for average in averages_of(config.recipe.ema)]
    if ema == "none" or (ema is None and not names):
        return "model"
    if ema is None:
        return names[0]
    for wanted in spellings(ema):
        if wanted in names:
            return wanted
    expected = f"{', '.join(names) or 'no average'}, and 'none' for the raw weights"
    if POST_HOC in config.recipe.ema:
        length = _number(ema.removeprefix("power-"))
        if 0 < length <= LONGEST:
            return power_name(length)
        expected += f", and makes others of a length of about 0.02 to {LONGEST}"
    raise RunError(f"--ema {ema}: this run keeps {expected}")


def _number(text: str) -> float:
    """0 for what is none."""
    try:
        return float(text)
    except ValueError:
        return 0.0


def read_weights(run: RunDir, checkpoint: Checkpoint, name: str) -> dict[str, Tensor]:
    """The weights of that `weights_name`, at a checkpoint."""
    if name in shards.names(checkpoint.path) or not name.startswith("power-"):
        return checkpoint.read(name)
    return make_average(run.averages, checkpoint, float(name.removeprefix("power-")))
