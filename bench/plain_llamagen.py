"""LlamaGen as one writes it in plain PyTorch: what `bench_llamagen.py` compares the trainer with.

Eager, float32 parameters under bfloat16 autocast, PyTorch's attention, norm, loss, clipping and
fused AdamW, as llamagen:autoregressive/train/train_c2i.py trains it. Suffixes as in docs/legend.md.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from heptapod_fast.model.llama import mlp_width
from heptapod_fast.ops import grid_table


class Block(nn.Module):
    """Pre-norm block."""

    def __init__(self, width: int, heads: int, dropout: float):
        super().__init__()
        inner = mlp_width(width)
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.RMSNorm(width, eps=1e-5)
        self.wqkv = nn.Linear(width, 3 * width, bias=False)
        self.wo = nn.Linear(width, width, bias=False)
        self.ffn_norm = nn.RMSNorm(width, eps=1e-5)
        self.w1 = nn.Linear(width, inner, bias=False)
        self.w3 = nn.Linear(width, inner, bias=False)
        self.w2 = nn.Linear(inner, width, bias=False)

    def forward(self, x_BND: Tensor, table: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D); table (N, E / 2, 2), cos and sin."""
        x_BND = x_BND + self._drop(self._attention(self.attention_norm(x_BND), table))
        y_BND = self.ffn_norm(x_BND)
        return x_BND + self._drop(self.w2(F.silu(self.w1(y_BND)) * self.w3(y_BND)))

    def _attention(self, y_BND: Tensor, table: Tensor) -> Tensor:
        q, k, v = self.wqkv(y_BND).unflatten(-1, (3, self.heads, -1)).unbind(2)
        q, k, v = (x.transpose(1, 2) for x in (turned(q, table), turned(k, table), v))
        out_BHNE = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.wo(out_BHNE.transpose(1, 2).flatten(-2))

    def _drop(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def turned(x_BNHE: Tensor, table: Tensor) -> Tensor:
    """Rotary embedding of adjacent pairs, in float32."""
    pairs = x_BNHE.float().unflatten(-1, (-1, 2))
    cos, sin = table[:, None].unbind(-1)
    even, odd = pairs.unbind(-1)
    rotated = torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1)
    return rotated.flatten(-2).type_as(x_BNHE)


class PlainLlamaGen(nn.Module):
    """The next code of an image, in raster order."""

    def __init__(
        self,
        depth: int,
        width: int,
        heads: int,
        codes: int,
        classes: int,
        side: int,
        dropout: float,
        label_dropout: float,
    ):
        super().__init__()
        self.classes = classes
        self.dropout = dropout
        self.label_dropout = label_dropout
        self.class_embedding = nn.Embedding(classes + 1, width)
        self.token_embedding = nn.Embedding(codes, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(depth))
        self.norm = nn.RMSNorm(width, eps=1e-5)
        self.output = nn.Linear(width, codes, bias=False)
        self.register_buffer("table", grid_table(side, width // heads)[:-1])
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                nn.init.normal_(module.weight, std=0.02)
        nn.init.zeros_(self.output.weight)

    def forward(self, labels_B: Tensor, tokens_BN: Tensor) -> Tensor:
        """Mean loss."""
        is_dropped_B = torch.rand(len(labels_B), device=labels_B.device) < self.label_dropout
        labels_B = torch.where(is_dropped_B, self.classes, labels_B)
        start_B1D = self.class_embedding(labels_B)[:, None]
        x_BND = torch.cat((start_B1D, self.token_embedding(tokens_BN[:, :-1])), dim=1)
        x_BND = F.dropout(x_BND, self.dropout, self.training)
        for block in self.blocks:
            x_BND = block(x_BND, self.table)
        logits_BNV = self.output(self.norm(x_BND))
        return F.cross_entropy(logits_BNV.float().flatten(0, 1), tokens_BN.flatten())


class PlainStep:
    """A training step: forward and backward pass, clipping, AdamW."""

    def __init__(self, model: PlainLlamaGen, batch: int):
        self.model = model
        device = model.table.device
        codes, side = model.output.out_features, int(len(model.table) ** 0.5)
        self.labels_B = torch.randint(model.classes, (batch,), device=device)
        self.tokens_BN = torch.randint(codes, (batch, side**2), device=device)
        decayed = [p for p in model.parameters() if p.dim() >= 2]
        others = [p for p in model.parameters() if p.dim() < 2]
        groups = [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0}]
        self.optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def __call__(self) -> None:
        with torch.autocast(self.labels_B.device.type, torch.bfloat16):
            loss = self.model(self.labels_B, self.tokens_BN)
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


class Products:
    """The products of a step's linear layers and nothing else, in bfloat16: what a step that wastes
    nothing would take. Forward, and both gradients."""

    def __init__(self, model: PlainLlamaGen, rows: int):
        device = model.table.device
        layers = [layer for layer in model.modules() if isinstance(layer, nn.Linear)]
        shapes = [(layer.out_features, layer.in_features) for layer in layers]
        self.shapes = shapes
        # One set of tensors for layers that are alike: a product has no memory of the last.
        self.made = {
            shape: tuple(
                torch.randn(form, device=device, dtype=torch.bfloat16)
                for form in ((rows, shape[1]), shape, (rows, shape[0]))
            )
            for shape in set(shapes)
        }

    def __call__(self) -> None:
        for shape in self.shapes:
            x, weight, grad = self.made[shape]
            torch.mm(x, weight.t())
            torch.mm(grad, weight)
            torch.mm(grad.t(), x)
