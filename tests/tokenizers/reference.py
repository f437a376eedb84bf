"""kl16 and vq16 once more, in float64 from the formulas and by the names of the published files."""

from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F

HERE = Path(__file__).parent
UNUSED = {"quantize.codebook_used"}  # in LlamaGen's file, of no use


def table(name):
    """{name: shape} of the published file."""
    rows = (line.split("\t") for line in (HERE / f"{name}_keys.tsv").read_text().splitlines())
    return {
        row[0]: tuple(int(n) for n in row[1].strip("()").split(",") if n.strip()) for row in rows
    }


@lru_cache
def random_weights(name):
    """Weights of which none is 0 or 1, with activations of about unit size."""
    generator = torch.Generator().manual_seed(len(name))
    weights = {}
    for key, shape in table(name).items():
        value = torch.randn(shape, generator=generator)
        if len(shape) == 1:
            value = 0.1 * value + (1.0 if key.endswith("weight") else 0.0)
        elif not key.startswith("quantize"):
            value = value / value[0].numel() ** 0.5
        weights[key] = value
    return weights


def images(count, size, seed=0):
    """(count, 3, size, size) in [-1, 1], smooth and rough parts."""
    generator = torch.Generator().manual_seed(seed)
    rough = torch.rand(count, 3, size, size, generator=generator)
    smooth = torch.rand(count, 3, 4, 4, generator=generator)
    return F.interpolate(smooth, size=size, mode="bilinear") + rough - 1.0


class Reference:
    """Float64 versions of every layer; weights are found by prefix."""

    def __init__(self, weights):
        self.weights = weights

    def conv(self, x, key, stride=1, padding=None):
        weight = self.weights[f"{key}.weight"].double()
        around = (weight.shape[-1] // 2,) * 4 if padding is None else padding
        return F.conv2d(F.pad(x, around), weight, self.weights[f"{key}.bias"].double(), stride)

    def norm(self, x, key):
        groups = x.unflatten(1, (32, -1))
        mean = groups.mean(dim=(2, 3, 4), keepdim=True)
        variance = ((groups - mean) ** 2).mean(dim=(2, 3, 4), keepdim=True)
        unit = ((groups - mean) / torch.sqrt(variance + 1e-6)).flatten(1, 2)
        weight, bias = (self.weights[f"{key}.{part}"].double() for part in ("weight", "bias"))
        return unit * weight[:, None, None] + bias[:, None, None]

    @staticmethod
    def silu(x):
        return x / (1.0 + torch.exp(-x))

    def resnet(self, x, key):
        h = self.conv(self.silu(self.norm(x, f"{key}.norm1")), f"{key}.conv1")
        h = self.conv(self.silu(self.norm(h, f"{key}.norm2")), f"{key}.conv2")
        if f"{key}.nin_shortcut.weight" in self.weights:
            x = self.conv(x, f"{key}.nin_shortcut")
        return x + h

    def attention(self, x, key):
        h = self.norm(x, f"{key}.norm")
        q, k, v = (self.conv(h, f"{key}.{part}").flatten(2) for part in "qkv")
        logits = torch.einsum("bci,bcj->bij", q, k) / x.shape[1] ** 0.5
        mixed = torch.einsum("bij,bcj->bci", logits.softmax(-1), v).view_as(x)
        return x + self.conv(mixed, f"{key}.proj_out")

    def down(self, x, key):
        return self.conv(x, f"{key}.conv", stride=2, padding=(0, 1, 0, 1))

    def up(self, x, key):
        return self.conv(x.repeat_interleave(2, 2).repeat_interleave(2, 3), f"{key}.conv")

    def level(self, x, key, res):
        i = 0
        while f"{key}.{res}.{i}.conv1.weight" in self.weights:
            x = self.resnet(x, f"{key}.{res}.{i}")
            if f"{key}.attn.{i}.q.weight" in self.weights:
                x = self.attention(x, f"{key}.attn.{i}")
            i += 1
        assert i in (2, 3)
        if f"{key}.downsample.conv.weight" in self.weights:
            x = self.down(x, f"{key}.downsample")
        if f"{key}.upsample.conv.weight" in self.weights:
            x = self.up(x, f"{key}.upsample")
        return x

    def middle(self, x, keys):
        return self.resnet(self.attention(self.resnet(x, keys[0]), keys[1]), keys[2])

    def coder(self, x, part, levels, res, middle):
        """levels: names in the order of execution; middle: names of the three blocks."""
        x = self.conv(x.double(), f"{part}.conv_in")
        middle = [f"{part}.mid.{name}" for name in middle]
        if part == "decoder":
            x = self.middle(x, middle)
        for name in levels:
            x = self.level(x, f"{part}.{name}", res)
        if part == "encoder":
            x = self.middle(x, middle)
        return self.conv(self.silu(self.norm(x, f"{part}.norm_out")), f"{part}.conv_out")


class ReferenceKL16(Reference):
    """MAR's names; the decoder's list of levels runs backwards."""

    MIDDLE = ("block_1", "attn_1", "block_2")

    def moments(self, x):
        x = self.coder(x, "encoder", [f"down.{i}" for i in range(5)], "block", self.MIDDLE)
        mean, logvar = self.conv(x, "quant_conv").chunk(2, dim=1)
        return mean, torch.exp(0.5 * torch.clip(logvar, -30.0, 20.0))

    def decode(self, z):
        z = self.conv(z.double(), "post_quant_conv")
        return self.coder(z, "decoder", [f"up.{i}" for i in (4, 3, 2, 1, 0)], "block", self.MIDDLE)


class ReferenceVQ16(Reference):
    """LlamaGen's names."""

    LEVELS, MIDDLE = [f"conv_blocks.{i}" for i in range(5)], "012"

    def unit_codebook(self):
        codebook = self.weights["quantize.embedding.weight"].double()
        return codebook / codebook.square().sum(-1, keepdim=True).sqrt()

    def vectors(self, x):
        """(B, H * W, 8) of unit length."""
        z = self.conv(self.coder(x, "encoder", self.LEVELS, "res", self.MIDDLE), "quant_conv")
        z = z.flatten(2).transpose(1, 2)
        return z / z.square().sum(-1, keepdim=True).sqrt()

    def decode(self, codes, grid):
        z = self.unit_codebook()[codes].transpose(1, 2).unflatten(2, (grid, grid))
        z = self.conv(z, "post_quant_conv")
        return self.coder(z, "decoder", self.LEVELS, "res", self.MIDDLE)


def gap(found, expected):
    """Largest difference in units of the expected values' spread."""
    assert found.shape == expected.shape, (found.shape, expected.shape)
    return float((found.double() - expected.double()).abs().max() / expected.double().std())
