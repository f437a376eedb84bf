"""What all operations share: layouts, devices, dtypes, second derivatives, other row counts."""

import importlib

import pytest
import torch

from heptapod_fast import ops
from heptapod_fast.ops import dispatch
from tests.numerics import DEVICE, needs_triton

W = 12
DRAWS = ops.Draws(torch.arange(6, device=DEVICE), torch.arange(6, device=DEVICE), 1, (1, 2), (3, 4))
TABLES = ops.schedule_tables(ops.cosine_betas()).to(DEVICE)


VECTOR = torch.randn(W, generator=torch.Generator().manual_seed(1)).to(DEVICE)


def weights(channels=2):
    """Parameters of an MLP of one block."""
    generator = torch.Generator().manual_seed(2)
    make = lambda *shape: (0.3 * torch.randn(shape, generator=generator)).to(DEVICE)
    block = ops.BlockWeights(
        make(W), make(W), make(W, W), make(W), make(W, W), make(W), make(3 * W, W), make(3 * W)
    )
    return ops.DiffusionWeights(
        make(W, channels),
        make(W),
        make(2 * W, W),
        make(2 * W),
        make(2 * channels, W),
        make(2 * channels),
        (block,),
    )


WEIGHTS = weights()


def mlp(x, how, **changes):
    xt, t = x[:, :2].float(), torch.arange(len(x), device=x.device)
    return ops.diffusion_mlp(xt.detach(), t, x.detach(), x, WEIGHTS._replace(**changes), 1e-6, how)


def cross_entropy(x, how):
    target = torch.arange(len(x), device=x.device)
    return ops.linear_cross_entropy(
        x, x.detach() * 0.5, x.detach()[:, 0], target, implementation=how
    )[0]


# Each takes rows (6, W) and the implementation.
CALLS = {
    "layer_norm": lambda x, how: ops.layer_norm(x, VECTOR, VECTOR, implementation=how),
    "add_layer_norm": lambda x, how: ops.add_layer_norm(
        x, x, VECTOR, VECTOR, VECTOR, implementation=how
    )[1],
    "bias_gelu": lambda x, how: ops.bias_gelu(x, VECTOR, implementation=how),
    "swiglu": lambda x, how: ops.swiglu(x, x, how),
    "rms_norm": lambda x, how: ops.rms_norm(x, VECTOR, implementation=how),
    "add_rms_norm": lambda x, how: ops.add_rms_norm(x, x, VECTOR, implementation=how)[1],
    "adaln": lambda x, how: ops.adaln(x, x, VECTOR, x, x, x, VECTOR, VECTOR, 1e-6, how)[1],
    "diffusion_mlp": mlp,
    "linear_cross_entropy": cross_entropy,
    "diffusion_loss": lambda x, how: ops.diffusion_loss(
        x,
        x[:, : W // 2].detach(),
        x[:, W // 2 :].detach(),
        torch.arange(6, device=DEVICE) * 150,
        DRAWS,
        TABLES,
        True,
        how,
    ),
    "flow_loss": lambda x, how: ops.flow_loss(x, x.detach(), DRAWS, how),
    "gather_rows": lambda x, how: ops.gather_rows(x, torch.tensor([4, 0], device=DEVICE), how),
    "scatter_rows": lambda x, how: ops.scatter_rows(
        x, torch.tensor([4, 0, 2, 1, 7, 5], device=DEVICE), 9, how
    ),
    "dropout": lambda x, how: ops.dropout(
        x,
        ops.DropoutMask(
            torch.ones(6, 2, dtype=torch.int64, device=DEVICE), torch.arange(6, device=DEVICE), 0.4
        ),
        how,
    ),
}
ROWS_ONLY = ("gather_rows", "scatter_rows", "dropout")  # linear: a second derivative is 0


def rows():
    return torch.randn(6, W, generator=torch.Generator().manual_seed(0)).to(DEVICE)


@needs_triton
@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("layout", ["transposed", "sliced", "every other column"])
def test_layouts_do_not_change_results(name, layout):
    x = rows()
    if layout == "transposed":
        other = x.t().contiguous().t()
    elif layout == "sliced":
        other = torch.cat((x, x + 1), dim=1)[:, :W]
    else:
        other = torch.stack((x, x + 1), dim=2).flatten(1)[:, ::2]
    assert not other.is_contiguous() and torch.equal(other, x)
    found = []
    for each in (x, other):
        leaf = each.detach().requires_grad_()
        out = CALLS[name](leaf, "triton")
        (grad,) = torch.autograd.grad((out * out.detach().cos()).sum(), leaf)
        found.append((out, grad))
    assert torch.equal(found[0][0], found[1][0])
    # Where x is several arguments, autograd adds its gradients in an order of its own.
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-5, atol=1e-5)


@needs_triton
@pytest.mark.parametrize("name", [name for name in CALLS if name not in ROWS_ONLY])
def test_second_derivatives_are_refused_by_kernels(name):
    x = rows().requires_grad_()
    (grad,) = torch.autograd.grad(CALLS[name](x, "triton").square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once.*reference"):
        grad.square().sum().backward()


@needs_triton
@pytest.mark.parametrize(
    "name",
    [
        "layer_norm",
        "add_layer_norm",
        "bias_gelu",
        "adaln",
        "diffusion_mlp",
        "linear_cross_entropy",
        "gather_rows",
    ],
)
def test_other_row_counts_need_few_graphs(name):
    torch._dynamo.reset()
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: CALLS[name](x, "triton"), fullgraph=True, backend=count)
    for repeat in (1, 2, 3, 4, 5):
        x = rows().repeat(repeat, 1)
        torch.testing.assert_close(compiled(x), CALLS[name](x, "triton"))
    assert len(graphs) <= 3


@pytest.mark.parametrize("name", [n for n in CALLS if n not in ("diffusion_loss", "flow_loss")])
def test_tensors_that_are_no_rows_are_refused(name):
    for bad in (rows().long(), rows().to(torch.complex64)):
        with pytest.raises(ValueError, match=f"{name}.*(floating|float32)"):
            CALLS[name](bad, "auto")


@pytest.mark.parametrize(
    "call",
    [
        lambda x, m: ops.layer_norm(x, m, m),
        lambda x, m: ops.bias_gelu(x, m),
        lambda x, m: ops.add_layer_norm(x, x, m, None, None),
        lambda x, m: ops.adaln(x, None, None, None, m.expand(6, W), x, None, None),
        lambda x, m: ops.gather_rows(x, m.long()),
        lambda x, m: mlp(x, "auto", input_bias=m),
        lambda x, m: ops.linear_cross_entropy(
            x, x, m[:6], torch.zeros(6, dtype=torch.int64, device=DEVICE)
        ),
    ],
)
def test_another_device_is_refused_with_the_argument(call):
    with pytest.raises(ValueError, match=r"on one device: \w+ is on .*, \S+ on meta"):
        call(rows(), torch.empty(W, device="meta"))


@pytest.mark.parametrize(
    "part",
    [
        "norm_weight",
        "norm_bias",
        "fc1_weight",
        "fc1_bias",
        "fc2_weight",
        "fc2_bias",
        "modulation_weight",
        "modulation_bias",
    ],
)
def test_weights_of_another_shape_are_refused(part):
    block = WEIGHTS.blocks[0]
    cut = block._replace(**{part: getattr(block, part)[:-3]})
    with pytest.raises(ValueError, match=rf"blocks\[0\].{part} of shape"):
        mlp(rows(), "auto", blocks=(cut,))


def test_cuda_tensors_of_another_dtype_are_told_once(monkeypatch):
    """The choice alone needs no GPU."""
    monkeypatch.setattr(dispatch, "_told", set())
    cuda = torch.device("cuda")
    with pytest.warns(UserWarning, match="layer_norm: the plain-PyTorch reference runs.*float16"):
        assert dispatch.select("layer_norm", cuda, torch.float16) == "reference"
    assert dispatch.select("layer_norm", cuda, torch.float16) == "reference"


@needs_triton
def test_what_is_sent_to_the_kernels_has_a_configuration():
    """The limits that ops/ states are those of the tables."""
    from heptapod_fast.kernels import tuning

    module = lambda name: importlib.import_module(f"heptapod_fast.ops.{name}")
    for name, kernels, limit in (
        ("layer_norm", ("forward", "backward"), "MAX_WIDTH"),
        ("bias_gelu", ("forward", "backward"), "MAX_WIDTH"),
        ("rms_norm", ("forward", "backward"), "MAX_WIDTH"),
        ("rotary", ("rotate",), "MAX_WIDTH"),
        (
            "adaln",
            ("forward", "backward", "silu_sum", "condition_gradient", "time_gradient"),
            "MAX_WIDTH",
        ),
        ("gather_rows", ("gather", "scatter"), "MAX_WIDTH"),
        ("linear_cross_entropy", ("chunk",), "MAX_WIDTH"),
        ("linear_cross_entropy", ("blocks",), "MAX_CODES"),
        ("diffusion_loss", ("inputs", "forward", "backward"), "WIDEST"),
    ):
        found = {tuning.largest(name, kernel) for kernel in kernels}
        assert min(found) == getattr(module(name), limit), f"{name} {kernels}"
    # flow_loss asks diffusion_loss how many channels there may be.
    found = {tuning.largest("flow_loss", kernel) for kernel in ("inputs", "forward", "backward")}
    assert min(found) == module("diffusion_loss").WIDEST
