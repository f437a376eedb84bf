"""How diffusion_mlp is composed, step by step in plain PyTorch.

The reference in heptapod_fast/ops/diffusion_mlp.py is a loop of layers under autograd.
kernels/diffusion_mlp.py computes the same from four kernels and cuBLAS products, with a backward
pass by hand. The steps here take the reference apart and put it together that way; each is tested
against it. docs/kernels/README.md tells the story in words; tests/ladder/test_adaln.py and
tests/ladder/test_bias_gelu.py have the kernels.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.ops import BlockWeights, DiffusionWeights, adaln, bias_gelu
from heptapod_fast.ops.diffusion_mlp import reference
from tests.numerics import DEVICE

EPS = 1e-6
CHANNELS = 3


def step_1(xt: Tensor, y: Tensor, w: DiffusionWeights) -> Tensor:
    """The layers as they are defined; y (R, F) is time embedding plus condition of every row.

    Each block has a modulation layer of its own, and every one of them multiplies the same SiLU(y):
    nb + 1 products of which each reads the (R, F) input again.
    """
    s = F.silu(y)
    x = F.linear(xt, w.input_weight, w.input_bias)
    for block in w.blocks:
        modulation = F.linear(s, block.modulation_weight, block.modulation_bias)
        shift, scale, gate = modulation.chunk(3, dim=1)
        normal = F.layer_norm(x, x.shape[1:], block.norm_weight, block.norm_bias, EPS)
        v = normal * (1 + scale) + shift
        hidden = F.silu(F.linear(v, block.fc1_weight, block.fc1_bias))
        x = x + gate * F.linear(hidden, block.fc2_weight, block.fc2_bias)
    shift, scale = F.linear(s, w.modulation_weight, w.modulation_bias).chunk(2, dim=1)
    v = F.layer_norm(x, x.shape[1:], eps=EPS) * (1 + scale) + shift
    return F.linear(v, w.output_weight, w.output_bias)


def modulated(s: Tensor, w: DiffusionWeights) -> Tensor:
    """(R, (3 nb + 2) F): shift, scale and gate of every block, shift and scale of the last layer.

    `_modulation_weights` in kernels/diffusion_mlp.py makes the one weight.
    """
    layers = [*w.blocks, w]
    weight = torch.cat([layer.modulation_weight for layer in layers])
    bias = torch.cat([layer.modulation_bias for layer in layers])
    return F.linear(s, weight, bias)


def slot(modulation: Tensor, layer: int, part: int, width: int) -> Tensor:
    """(R, F): part 0 is the shift of a layer, 1 its scale, 2 its gate; a view."""
    first = (3 * layer + part) * width
    return modulation[:, first : first + width]


def step_2(xt: Tensor, y: Tensor, w: DiffusionWeights) -> Tensor:
    """One product for the modulation of all blocks.

    Of a block's 5 F^2 multiply-adds per row, 3 F^2 are modulation: now they are one large product,
    which reads SiLU(y) once, and so are its gradients.
    """
    width = y.shape[1]
    modulation = modulated(F.silu(y), w)
    x = F.linear(xt, w.input_weight, w.input_bias)
    for i, block in enumerate(w.blocks):
        shift, scale, gate = (slot(modulation, i, part, width) for part in range(3))
        normal = F.layer_norm(x, x.shape[1:], block.norm_weight, block.norm_bias, EPS)
        v = normal * (1 + scale) + shift
        hidden = F.silu(F.linear(v, block.fc1_weight, block.fc1_bias))
        x = x + gate * F.linear(hidden, block.fc2_weight, block.fc2_bias)
    shift, scale = (slot(modulation, len(w.blocks), part, width) for part in range(2))
    v = F.layer_norm(x, x.shape[1:], eps=EPS) * (1 + scale) + shift
    return F.linear(v, w.output_weight, w.output_bias)


def step_3(xt: Tensor, y: Tensor, w: DiffusionWeights) -> Tensor:
    """What stands between two products is one operation.

    A block leaves its last product without bias, gate and sum; the next layer's adaln takes them
    before its norm. Between v W1 and g W2 stands bias_gelu. Products read no bias and write no sum,
    so they are plain cuBLAS calls. `forward` in kernels/diffusion_mlp.py is this loop.
    """
    width = y.shape[1]
    modulation = modulated(F.silu(y), w)
    x = F.linear(xt, w.input_weight, w.input_bias)
    before = (None, None, None)  # branch, its bias, its gate
    for i, block in enumerate(w.blocks):
        shift, scale, gate = (slot(modulation, i, part, width) for part in range(3))
        x, v = adaln(x, *before, shift, scale, block.norm_weight, block.norm_bias, EPS)
        g = bias_gelu(v @ block.fc1_weight.t(), block.fc1_bias, None, "silu")
        before = (g @ block.fc2_weight.t(), block.fc2_bias, gate)
    shift, scale = (slot(modulation, len(w.blocks), part, width) for part in range(2))
    _, v = adaln(x, *before, shift, scale, None, None, EPS)
    return F.linear(v, w.output_weight, w.output_bias)


def step_4(grad: Tensor, xt: Tensor, y: Tensor, w: DiffusionWeights) -> tuple[Tensor, Tensor]:
    """Backward by hand, as far as the modulation: the gradients of y and of all modulation weights.

    The gradient of modulation is one tensor too. Since v = normal * (1 + scale) + shift, the
    gradient of v is that of shift: the product that makes it writes it into its slot, and the
    gradients of scale and gate are written into theirs by adaln's backward pass. Then two products
    with the whole tensor give the gradients of SiLU(y) and of all modulation weights.

    `backward` in kernels/diffusion_mlp.py does the same for everything else besides.
    """
    width = y.shape[1]
    count = len(w.blocks)
    s = F.silu(y)
    modulation = modulated(s, w)

    # Forward as in step 3; of every layer what its backward pass needs.
    x = F.linear(xt, w.input_weight, w.input_bias)
    before = (None, None, None)
    kept = []
    for i, block in enumerate(w.blocks):
        shift, scale, gate = (slot(modulation, i, part, width) for part in range(3))
        into = (x, *before, shift, scale, block.norm_weight, block.norm_bias)
        x, v = adaln(*into, EPS)
        a = v @ block.fc1_weight.t()
        g = bias_gelu(a, block.fc1_bias, None, "silu")
        kept.append((into, a))
        before = (g @ block.fc2_weight.t(), block.fc2_bias, gate)
    shift, scale = (slot(modulation, count, part, width) for part in range(2))
    kept.append(((x, *before, shift, scale, None, None), None))

    # Backward: every part of dmodulation is written once, in its place.
    dmodulation = torch.full_like(modulation, torch.nan)
    slot(dmodulation, count, 0, width).copy_(grad @ w.output_weight)
    dx = torch.zeros_like(x)
    for i in reversed(range(count + 1)):
        into, _ = kept[i]
        dv = slot(dmodulation, i, 0, width)
        dx, dbranch, dgate, dscale = adaln_gradients(into, dx, dv)
        slot(dmodulation, i, 1, width).copy_(dscale)
        if i > 0:
            slot(dmodulation, i - 1, 2, width).copy_(dgate)
            block = w.blocks[i - 1]
            _, a = kept[i - 1]
            da = activation_gradient(a, block.fc1_bias, dbranch @ block.fc2_weight)
            slot(dmodulation, i - 1, 0, width).copy_(da @ block.fc1_weight)

    all_weights = torch.cat([layer.modulation_weight for layer in (*w.blocks, w)])
    ds = dmodulation @ all_weights
    share = torch.sigmoid(y)
    return ds * share * (1 + y * (1 - share)), dmodulation.t() @ s


def adaln_gradients(into, dx, dv):
    """Gradients of x, branch, gate and scale: what adaln's backward kernel writes."""
    leaves = [None if each is None else each.detach().requires_grad_() for each in into]
    new, v = adaln(*leaves, EPS)
    x, branch, _, gate, _, scale, _, _ = leaves
    wanted = [each for each in (x, branch, gate, scale) if each is not None]
    found = torch.autograd.grad((new, v), wanted, (dx, dv))
    if branch is None:
        return found[0], None, None, found[1]
    return found


def activation_gradient(a, bias, dg):
    """The gradient of fc1's product: what bias_gelu's backward kernel writes."""
    leaf = a.detach().requires_grad_()
    (da,) = torch.autograd.grad(bias_gelu(leaf, bias, None, "silu"), leaf, dg)
    return da


def step_5(a: Tensor, b: Tensor) -> Tensor:
    """A float32 product on bfloat16's tensor cores.

    A float32 number is the sum of three bfloat16 ones of 8 bits each, and products of those are
    exact in a float32 accumulator. Of the nine products of pieces six matter; written side by side,
    they are one product with a sixfold inner dimension. The inner dimension is small here: the
    channels of a token.

    `mm_rounded` in kernels/diffusion_mlp.py is this for the first and the last layer.
    """

    def pieces(x):
        first = x.bfloat16()
        second = (x - first.float()).bfloat16()
        third = (x - first.float() - second.float()).bfloat16()
        return first, second, third

    a1, a2, a3 = pieces(a)
    b1, b2, b3 = pieces(b)
    wide = torch.cat((a1, a1, a1, a2, a2, a3), 1)
    tall = torch.cat((b1, b2, b3, b1, b2, b1))
    return wide.float() @ tall.float()


def draw(tokens=3, repeat=2, width=16, blocks=2, steps=7):
    """xt (R, C), y (R, F), the parameters, and the arguments that the reference makes y of."""

    def normal(*shape, scale=1.0):
        return scale * torch.randn(shape, device=DEVICE)

    def layer(outputs, inputs):
        return normal(outputs, inputs, scale=inputs**-0.5), normal(outputs, scale=0.5)

    weights = DiffusionWeights(
        *layer(width, CHANNELS),
        *layer(2 * width, width),
        *layer(2 * CHANNELS, width),
        tuple(
            BlockWeights(
                normal(width),
                normal(width),
                *layer(width, width),
                *layer(width, width),
                *layer(3 * width, width),
            )
            for _ in range(blocks)
        ),
    )
    xt = normal(tokens * repeat, CHANNELS)
    t = torch.randint(steps, (tokens * repeat,), device=DEVICE)
    time = normal(steps, width)
    condition = normal(tokens, width)
    y = time[t] + condition.repeat_interleave(repeat, 0)
    return xt, y, weights, (t, time, condition)


@pytest.mark.parametrize("blocks", [0, 1, 3])
@pytest.mark.parametrize("step", [step_1, step_2, step_3])
def test_forward_is_the_references(step, blocks):
    xt, y, weights, (t, time, condition) = draw(blocks=blocks)
    expected = reference(xt, t, time, condition, weights, EPS)
    torch.testing.assert_close(step(xt, y, weights), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("blocks", [0, 1, 3])
def test_step_4_every_part_of_the_gradient_in_its_place(blocks):
    xt, y, weights, _ = draw(blocks=blocks)
    flat = [each.clone().requires_grad_() for each in weights.flat()]
    leaves = DiffusionWeights.of(flat)
    y_leaf = y.clone().requires_grad_()
    out = step_1(xt, y_leaf, leaves)
    grad = torch.randn_like(out)
    modulation_weights = [layer.modulation_weight for layer in (*leaves.blocks, leaves)]
    dy, *dweights = torch.autograd.grad(out, (y_leaf, *modulation_weights), grad)

    found_dy, found_dweights = step_4(grad, xt, y, weights)
    torch.testing.assert_close(found_dy, dy, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(found_dweights, torch.cat(dweights), rtol=1e-3, atol=1e-3)


def test_step_5_float32_from_pieces_of_bfloat16():
    a = torch.randn(20, 5, device=DEVICE)
    b = torch.randn(5, 9, device=DEVICE)
    exact = a.double() @ b.double()
    found = (step_5(a, b).double() - exact).abs().max()
    rounded = (a.bfloat16().double() @ b.bfloat16().double() - exact).abs().max()
    # Some roundings of float32 at the size of the products that are added up.
    allowed = 4 * torch.finfo(torch.float32).eps * (a.abs() @ b.abs()).max()
    assert float(found) < float(allowed) < 1e-4 < float(rounded)
