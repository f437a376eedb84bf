"""The convolutional autoencoder with 16-fold reduction that kl16 and vq16 share, and what the two
make of it.

Both follow LDM's kl-f16 (mar:models/vae.py, LlamaGen:tokenizer/tokenizer_image/vq_model.py):

    encoder  conv_in, five levels of two residual blocks with a strided convolution between them,
             attention after each block of the last level, residual-attention-residual, conv_out
    decoder  its mirror image with three blocks per level and nearest-neighbour upsampling;
             vq16 has attention in its first level, kl16 has not

Modules are named as in LlamaGen; `file_key` translates to the names in MAR's file.

Tensor names: B images, C channels, H rows, W columns, N = H * W.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CHANNELS = (128, 128, 256, 256, 512)  # of the levels, from full resolution to a 16th
ENCODER_BLOCKS, DECODER_BLOCKS = 2, 3
GROUPS, EPSILON = 32, 1e-6


@dataclass(frozen=True)
class Layout:
    """Where the two tokenizers differ.

    Attributes:
        encoded: channels that the encoder gives.
        moments: channels after `quant_conv`: mean and log-variance, or a vector to be quantised.
        latent: channels before `post_quant_conv`.
        decoded: channels that the decoder takes.
        decoder_attention: whether the decoder's first level has attention.
        codes: rows of the codebook; 0 for none.
    """

    encoded: int
    moments: int
    latent: int
    decoded: int
    decoder_attention: bool
    codes: int = 0


LAYOUTS = {
    "kl16": Layout(32, 32, 16, 16, decoder_attention=False),
    "vq16": Layout(256, 8, 8, 256, decoder_attention=True, codes=16384),
}


class Norm(nn.GroupNorm):
    """GroupNorm, optionally followed by SiLU, in float32 whatever the activations are (bf16
    statistics lose what a large mean leaves of a small spread)."""

    def __init__(self, channels: int, silu: bool = True) -> None:
        super().__init__(GROUPS, channels, EPSILON)
        self.silu = silu

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape and dtype."""
        y_BCHW = x_BCHW.float()
        if y_BCHW.device.type == "cpu":
            # PyTorch's kernel for channels-last tensors there takes E[x^2] - E[x]^2, which loses a
            # small spread around a large mean (a plain image); a shift changes nothing else.
            mean_BG = y_BCHW.mean((2, 3)).unflatten(1, (GROUPS, -1)).mean(2)
            mean_BC = mean_BG.repeat_interleave(y_BCHW.shape[1] // GROUPS, 1)
            y_BCHW = y_BCHW - mean_BC[:, :, None, None]
        y_BCHW = F.group_norm(y_BCHW, GROUPS, self.weight, self.bias, EPSILON)
        if self.silu:
            F.silu(y_BCHW, inplace=True)
        return y_BCHW.to(x_BCHW.dtype)


class ResnetBlock(nn.Module):
    """x + conv2(silu(norm2(conv1(silu(norm1(x)))))), the x on the left through a 1 x 1 convolution
    where the number of channels changes (mar:models/vae.py, LlamaGen:vq_model.py)."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1 = Norm(inputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, padding=1)
        self.norm2 = Norm(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1)
        if inputs != outputs:
            self.nin_shortcut = nn.Conv2d(inputs, outputs, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H, W)."""
        h_BCHW = self.conv2(self.norm2(self.conv1(self.norm1(x_BCHW))))
        if hasattr(self, "nin_shortcut"):
            x_BCHW = self.nin_shortcut(x_BCHW)
        return h_BCHW.add_(x_BCHW)


class AttnBlock(nn.Module):
    """x + proj_out(attention(norm(x))): one head over all N positions, scale C**-0.5."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = Norm(channels, silu=False)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> the same shape."""
        h_BCHW = self.norm(x_BCHW)
        q_B1NC, k_B1NC, v_B1NC = (
            layer(h_BCHW).flatten(2).transpose(1, 2)[:, None] for layer in (self.q, self.k, self.v)
        )
        mixed_B1NC = F.scaled_dot_product_attention(q_B1NC, k_B1NC, v_B1NC)
        mixed_BCHW = mixed_B1NC[:, 0].transpose(1, 2).reshape(h_BCHW.shape)
        return self.proj_out(mixed_BCHW).add_(x_BCHW)


class Downsample(nn.Module):
    """Strided 3 x 3 convolution; the zeros are at the right and bottom edges only."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.conv(F.pad(x_BCHW, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Every pixel becomes 2 x 2 equal ones, then a 3 x 3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(F.interpolate(x_BCHW, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution, and the way to the next one.

    Args:
        inputs, outputs: channels before and after the first block.
        blocks: number of residual blocks.
        attention: whether attention follows each of them.
        resample: `Downsample`, `Upsample` or None.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        blocks: int,
        attention: bool,
        resample: type[Downsample] | type[Upsample] | None,
    ) -> None:
        super().__init__()
        self.res = nn.ModuleList(
            ResnetBlock(inputs if i == 0 else outputs, outputs) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(outputs) for _ in range(blocks if attention else 0))
        if resample is not None:
            self.add_module(resample.__name__.lower(), resample(outputs))

    def forward(self, h_BCHW: Tensor) -> Tensor:
        """(B, inputs, H, W) -> (B, outputs, H', W')."""
        for i, block in enumerate(self.res):
            h_BCHW = block(h_BCHW)
            if len(self.attn):
                h_BCHW = self.attn[i](h_BCHW)
        for name in ("downsample", "upsample"):
            if hasattr(self, name):
                h_BCHW = getattr(self, name)(h_BCHW)
        return h_BCHW


class _Coder(nn.Module):
    """What encoder and decoder run; `stages`: in which order."""

    stages: ClassVar[tuple[str, str]]
    conv_in: nn.Conv2d

    def _middle(self, channels: int) -> None:
        self.mid = nn.ModuleList(
            (ResnetBlock(channels, channels), AttnBlock(channels), ResnetBlock(channels, channels))
        )

    def _end(self, channels: int, outputs: int) -> None:
        self.norm_out = Norm(channels)
        self.conv_out = nn.Conv2d(channels, outputs, 3, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        """(B, C, H, W) in the dtype of the convolutions -> its output in that dtype."""
        h_BCHW = self.conv_in(x_BCHW)
        for stage in self.stages:
            for module in getattr(self, stage):
                h_BCHW = module(h_BCHW)
        return self.conv_out(self.norm_out(h_BCHW))


class Encoder(_Coder):
    """(B, 3, 16 H, 16 W) -> (B, outputs, H, W)."""

    stages = "conv_blocks", "mid"

    def __init__(self, outputs: int) -> None:
        super().__init__()
        self.conv_in = nn.Conv2d(3, CHANNELS[0], 3, padding=1)
        last = len(CHANNELS) - 1
        self.conv_blocks = nn.ModuleList(
            Level(
                CHANNELS[max(0, i - 1)],
                CHANNELS[i],
                ENCODER_BLOCKS,
                attention=i == last,
                resample=None if i == last else Downsample,
            )
            for i in range(last + 1)
        )
        self._middle(CHANNELS[-1])
        self._end(CHANNELS[-1], outputs)


class Decoder(_Coder):
    """(B, inputs, H, W) -> (B, 3, 16 H, 16 W); its levels are in the order they run in."""

    stages = "mid", "conv_blocks"

    def __init__(self, inputs: int, attention: bool) -> None:
        super().__init__()
        channels = CHANNELS[::-1]
        last = len(channels) - 1
        self.conv_in = nn.Conv2d(inputs, channels[0], 3, padding=1)
        self._middle(channels[0])
        self.conv_blocks = nn.ModuleList(
            Level(
                channels[max(0, i - 1)],
                channels[i],
                DECODER_BLOCKS,
                attention=attention and i == 0,
                resample=None if i == last else Upsample,
            )
            for i in range(last + 1)
        )
        self._end(channels[-1], 3)


class Autoencoder(nn.Module):
    """Encoder and decoder with the 1 x 1 convolutions on either side of the latent.

    `encoder` and `decoder` may run in bf16 (`set_dtype`); `quant_conv`, `post_quant_conv`, the
    codebook and all normalisation stay in float32.

    Args:
        name: kl16 or vq16.
    """

    def __init__(self, name: str) -> None:
        super().__init__()
        layout = LAYOUTS[name]
        self.encoder = Encoder(layout.encoded)
        self.decoder = Decoder(layout.decoded, layout.decoder_attention)
        self.quant_conv = nn.Conv2d(layout.encoded, layout.moments, 1)
        self.post_quant_conv = nn.Conv2d(layout.latent, layout.decoded, 1)
        if layout.codes:
            self.quantize = nn.Module()
            self.quantize.embedding = nn.Embedding(layout.codes, layout.latent)

    def set_dtype(self, dtype: torch.dtype) -> None:
        """The dtype of the convolutions of encoder and decoder."""
        for part in (self.encoder, self.decoder):
            for module in part.modules():
                if isinstance(module, nn.Conv2d):
                    module.to(dtype)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the convolutions of encoder and decoder."""
        return self.encoder.conv_in.weight.dtype

    def encode(self, images_BCHW: Tensor) -> Tensor:
        """(B, 3, 16 H, 16 W) -> (B, moments, H, W) float32."""
        x_BCHW = images_BCHW.to(self.dtype, memory_format=torch.channels_last)
        return self.quant_conv(self.encoder(x_BCHW).float())

    def decode(self, latents_BCHW: Tensor) -> Tensor:
        """(B, latent, H, W) -> (B, 3, 16 H, 16 W) float32."""
        z_BCHW = self.post_quant_conv(latents_BCHW.float())
        z_BCHW = z_BCHW.to(self.dtype, memory_format=torch.channels_last)
        return self.decoder(z_BCHW).float()


_MIDDLE = ("block_1", "attn_1", "block_2")


def file_key(name: str, key: str) -> str:
    """The name that the published file gives to a parameter of `Autoencoder`."""
    if name == "vq16":
        return key
    last = len(CHANNELS) - 1
    key = re.sub(r"^encoder\.conv_blocks\.", "encoder.down.", key)
    # MAR's list of decoder levels is in the order of resolution, not of execution.
    key = re.sub(r"^decoder\.conv_blocks\.(\d)", lambda m: f"decoder.up.{last - int(m[1])}", key)
    key = re.sub(r"\.res\.", ".block.", key)
    return re.sub(r"\.mid\.(\d)", lambda m: f".mid.{_MIDDLE[int(m[1])]}", key)


def file_shapes(name: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a weights file of kl16 or vq16 must hold."""
    with torch.device("meta"):
        network = Autoencoder(name)
    return {file_key(name, key): tuple(value.shape) for key, value in network.state_dict().items()}


def build(name: str, weights: dict[str, Tensor], dtype: torch.dtype) -> Autoencoder:
    """The frozen network with checked weights (`weights.check`), convolutions in `dtype` and
    channels-last memory."""
    with torch.device("meta"):  # nothing is filled only to be overwritten
        network = Autoencoder(name)
    # Copies: the caller's tensors may change later, or be parameters that are trained.
    network.load_state_dict(
        {key: weights[file_key(name, key)].detach().clone() for key in network.state_dict()},
        assign=True,
    )
    network.requires_grad_(False).eval()
    network.set_dtype(dtype)
    return network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
