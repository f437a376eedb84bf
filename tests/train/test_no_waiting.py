"""Between two progress lines the host never waits for the device: it reads nothing back, and hands
over nothing that was made by the host in the middle of a step.

Without a GPU this is seen on meta tensors, which have no values to be read, and by a look at every
operation that runs: none of a step may touch a tensor of the host.
"""

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from heptapod_fast.data.tokens import Batch
from heptapod_fast.ops import dispatch
from heptapod_fast.ops.dispatch import AUTO, Operators
from heptapod_fast.rng import Rng
from heptapod_fast.systems import build_system
from heptapod_fast.train import recompute
from heptapod_fast.train.optimizer import Optimizer
from heptapod_fast.train.step import Buffers, forward_backward, update
from heptapod_fast.world import World
from tests.conftest import small_config
from tests.numerics import DEVICE, needs_triton

META = torch.device("meta")
SEQUENCES = 4
CASES = {
    "codes": ("discrete", {"density": 2}),
    "dropout": ("discrete", {"dropout": 0.1}),
    "spikes": ("discrete", {"skip_spikes": 3.0}),
    "no clipping": ("discrete", {"clip": 0.0}),
    "averages": ("discrete", {"ema": (0.9999, 0.99)}),
    "ddpm": ("continuous", {"diffusion_loss": "mse+vb"}),
    "mse": ("continuous", {"diffusion_loss": "mse"}),
    "flow": ("continuous", {"token_loss": "flow"}),
    "local": ("discrete", {"head": "local", "window": 4, "density": 2, "dropout": 0.1}),
    "local by step": ("continuous", {"head": "local", "window": 4, "loss_weight": "step"}),
    "uniform": ("discrete", {"steps": "uniform", "density": 2}),
    "uniform by step": ("discrete", {"steps": "uniform", "loss_weight": "step"}),
    "antithetic by step": ("discrete", {"loss_weight": "step"}),
    "mar": ("continuous", {"steps": "mar"}),
    "1d-raster": ("discrete", {"system": "1d-raster", "dropout": 0.1}),
    "1d-random": ("continuous", {"system": "1d-random"}),
    "1d-random flow": ("continuous", {"system": "1d-random", "token_loss": "flow"}),
    "llamagen": ("discrete", {"system": "llamagen", "dropout": 0.1}),
    # Logits are made in chunks.
    "many codes": ("discrete", {"system": "llamagen", "codes": 8192}),
    "npp": ("discrete", {"system": "npp", "levels": 2, "dropout": 0.1}),
    "sar": ("continuous", {"system": "sar", "dropout": 0.1}),
    "sar ddpm": ("continuous", {"system": "sar", "token_loss": "ddpm"}),
    "sar codes": ("discrete", {"system": "sar"}),
    "sar tokens": ("continuous", {"system": "sar", "grouping": "next-token"}),
    "sar rows": ("continuous", {"system": "sar", "grouping": "next-row"}),
    "sar rings": (
        "continuous",
        {"system": "sar", "grouping": "next-layer", "injection": "nearest"},
    ),
    "sar shared": ("continuous", {"system": "sar", "injection": "shared"}),
}


# They copy numbers of Python to the device, and the host waits for the copy.
OF_NUMBERS = (
    torch.tensor,
    torch.as_tensor,
    torch.asarray,
    torch.from_numpy,
    torch.Tensor.new_tensor,
)


class FromTheHost(Exception):
    """What the audit finds."""


class NoNumbers(TorchFunctionMode):
    """Refuses functions that make tensors of Python's numbers, wherever they put them."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in OF_NUMBERS:
            raise FromTheHost(f"{func.__name__}{args} copies numbers to the device")
        return func(*args, **(kwargs or {}))


class OnlyOn(TorchDispatchMode):
    """Refuses operations that take or make a tensor of another device, 0-dim ones too, which
    PyTorch lets through; and functions that make tensors of numbers."""

    def __init__(self, device: torch.device):
        super().__init__()
        self.device = device
        self.count = 0
        self._no_numbers = NoNumbers()

    def __enter__(self):
        self._no_numbers.__enter__()
        return super().__enter__()

    def __exit__(self, *error):
        super().__exit__(*error)
        self._no_numbers.__exit__(*error)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self.count += 1
        for value in tree_leaves((args, kwargs, result)):
            if isinstance(value, torch.Tensor) and value.device.type != self.device.type:
                raise FromTheHost(f"{func} has a tensor {tuple(value.shape)} on {value.device}")
        return result


class Step:
    """A training step of one micro-batch on a device that has no values."""

    def __init__(self, name: str, operators: Operators = AUTO, mode: str = "off", **more):
        tokens, settings = CASES[name]
        self.config = small_config(tokens, **settings | more)
        classes = self.config.data.num_classes
        self.operators = operators
        self.system = build_system(self.config, classes, META, operators, fill=False)
        self.system.train()
        recompute.apply(self.system, mode)
        self.put_on(META)

    def put_on(self, device) -> None:
        """Make what a step works on there; the system has no values."""
        self.system.to_empty(device=device)
        self.optimizer = Optimizer(self.system, self.config.recipe, self.operators)
        self.buffers = Buffers.allocate(self.config.spec, SEQUENCES, device)
        self.world = World(0, 1, device)

    @property
    def phases(self):
        return list(self.system.phases(self.config.recipe.images))

    def forward_backward(self, phase) -> None:
        expected = self.system.expected_count(SEQUENCES, phase)
        forward_backward(self.system, self.buffers, Rng(0), expected, phase)

    def update(self, phase):
        expected = self.system.expected_count(SEQUENCES, phase)
        return update(self.optimizer, self.world, self.buffers.sums, expected)


# --------------------------------------------------------------------------------- the audit itself


@pytest.mark.parametrize(
    "read",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: bool(x.sum() > 0),
        lambda x: x.nonzero(),
        lambda x: x[x > 0],
        lambda x: x.masked_select(x > 0),
        lambda x: x.repeat_interleave(x.long()),
    ],
)
def test_what_waits_for_a_value_is_seen(read):
    x = torch.ones(3, device=META)
    with pytest.raises(RuntimeError, match="meta tensor|Meta tensor|unimplemented"), OnlyOn(META):
        read(x)


@pytest.mark.parametrize(
    "bring",
    [
        lambda x: x + torch.tensor(1.0),
        lambda x: x * torch.ones(3),
        lambda x: x[torch.tensor([0, 1])],
        lambda x: torch.as_tensor(2.0, device=x.device),
        lambda x: torch.tensor([1.0, 2.0], device=x.device),
        lambda x: x.copy_(torch.ones(3)),
    ],
)
def test_what_the_host_hands_over_is_seen(bring):
    x = torch.ones(3, device=META)
    with pytest.raises(FromTheHost), OnlyOn(META):
        bring(x)


def test_what_does_neither_is_not():
    x = torch.ones(3, device=META, requires_grad=True)
    with OnlyOn(META) as audit:
        y = torch.where(x > 0, 2 * x, 0.0) + torch.arange(3, device=META)
        (y.sum() / 3.0).backward()
    assert audit.count > 5


# ------------------------------------------------------------------------------------ whole steps


@pytest.mark.parametrize("name", CASES)
def test_a_step_neither_reads_nor_brings_anything(name):
    step = Step(name)
    for phase in step.phases:
        # What is made once, such as a mask on the device of the step, is made here.
        step.forward_backward(phase)
        with OnlyOn(META) as audit:
            for _ in range(2):
                step.forward_backward(phase)
            loss, norm = step.update(phase)
        assert audit.count > 100
        assert loss.device == norm.device == META


@pytest.mark.parametrize("mode", ["selective", "full"])
@pytest.mark.parametrize("name", ["dropout", "local", "llamagen", "npp", "sar"])
def test_nor_does_one_that_recomputes(name, mode):
    step = Step(name, mode=mode)
    for phase in step.phases:
        step.forward_backward(phase)
        with OnlyOn(META):
            step.forward_backward(phase)


def test_every_system_and_every_phase_is_looked_at():
    from heptapod_fast.systems import SYSTEMS

    seen = {settings.get("system", "heptapod") for _, settings in CASES.values()}
    assert seen == set(SYSTEMS)
    assert len(Step("npp").phases) == 2


@needs_triton
@pytest.mark.skipif(DEVICE != "cpu", reason="tensors of these tests are on the CPU")
@pytest.mark.parametrize("name", ["codes", "ddpm", "flow", "local", "uniform", "llamagen", "sar"])
def test_with_kernels_it_reads_nothing(name):
    """What stands around the kernels; none is launched."""
    kernels = dict.fromkeys(dispatch.operations("triton"), "triton")
    plain = {"adamw_ema": "reference", "global_norm": "reference"}
    operators = Operators(kernels | plain)
    step = Step(name, operators, width=64, heads=2)
    step.system.set_dtype(torch.bfloat16)
    with FakeTensorMode(allow_non_fake_inputs=True):  # masks of attention are real
        step.put_on(torch.device("cpu"))
        for phase in step.phases:
            step.forward_backward(phase)
            step.update(phase)


def test_the_batch_of_a_source_is_the_only_thing_handed_over():
    """`Batch.zeros` and the sums are the tensors that a step reads: nothing else changes."""
    buffers = Buffers.allocate(small_config().spec, SEQUENCES, META)
    assert {*vars(buffers)} == {"batch", "sums"}
    assert {*vars(buffers.batch)} == {*Batch.__dataclass_fields__}
