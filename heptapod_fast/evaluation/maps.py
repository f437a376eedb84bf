"""What single tokens look at and are like, as maps over the grid (Heptapod, Figures 3 and 10 to
13)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.data.tokens import Batch
from heptapod_fast.evaluation.observing import Attended, Layer, observe
from heptapod_fast.rng import Rng
from heptapod_fast.systems.base import System
from heptapod_fast.tokenizers.base import Tokenizer

REFERENCES = 3  # tokens of an image that are looked at


@dataclass
class Maps:
    """Maps of one kind, of the same images and tokens.

    Attributes:
        name: for a file, as "attention-head".
        title: for people.
        map_BRN: (images, tokens, N), NaN where there is nothing to say.
        is_similarity: values lie in [-1, 1]; else they are shares.
    """

    name: str
    title: str
    map_BRN: Tensor
    is_similarity: bool


def reference_positions(grid: int) -> list[int]:
    """Positions of the tokens that are looked at: off the centre, so that what repeats around it is
    seen, and different from each other."""
    places = [(0.3, 0.3), (0.7, 0.45), (0.45, 0.75)]
    return [int(row * grid) * grid + int(column * grid) for row, column in places]


def maps_of(
    system: System, tokenizer: Tokenizer, batch: Batch, positions: list[int], seen: int
) -> list[Maps]:
    """Attention and likeness of the tokens at these positions, of the last layer of each part of
    the network, and the likeness of the tokens themselves.

    Args:
        batch: an even number of images.
        seen: as `System.look` takes it.
    """
    num_tokens = system.num_tokens
    last_of_part = {layer.part: layer for layer in observe(system, batch, Rng(0), seen)}
    vectors_BNC = tokenizer.vectors(batch.tokens).to(batch.tokens.device)
    found = [
        Maps(
            "similarity-tokens",
            f"cosine similarity of {tokenizer.spec.name} tokens",
            similarity(vectors_BNC, positions),
            is_similarity=True,
        )
    ]
    for part, layer in last_of_part.items():
        hidden_BND = layer.on_grid(num_tokens)
        found.append(
            Maps(
                f"similarity-{part}",
                f"cosine similarity of {layer.name}",
                similarity(hidden_BND, positions),
                is_similarity=True,
            )
        )
        found.append(
            Maps(
                f"attention-{part}",
                f"attention of {layer.name}, mean of its heads",
                attention_maps(_widest(layer), positions, num_tokens),
                is_similarity=False,
            )
        )
    # A local head may stand at none of these tokens.
    return [maps for maps in found if not bool(maps.map_BRN.isnan().all())]


def _widest(layer: Layer) -> Attended:
    """Of several attentions that which sees the most keys."""
    return max(layer.attended, key=lambda attended: attended.key_BK.shape[1])


def similarity(vectors_BNC: Tensor, positions: list[int]) -> Tensor:
    """(B, R, N) cosines between the tokens at R positions and all others; NaN of NaN."""
    directions_BNC = F.normalize(vectors_BNC.float(), dim=-1)
    return directions_BNC[:, positions] @ directions_BNC.transpose(1, 2)


def attention_maps(attended: Attended, positions: list[int], num_tokens: int) -> Tensor:
    """(B, R, N): the shares, averaged over heads, that the queries at R positions take of the keys
    at all N; the rest of 1 went to elements that stand nowhere. NaN at keys that are not seen, and
    for a position at which no query stands; the last query where several do."""
    share_BNK = attended.shares().mean(1)
    is_seen_BNK = attended.even_shares()[:, 0] > 0
    batch = len(share_BNK)
    # One place more, for what stands nowhere: -1 is the last.
    found = share_BNK.new_full((batch, len(positions), num_tokens + 1), torch.nan)
    for image in range(batch):
        for number, position in enumerate(positions):
            queries = (attended.query_BN[image] == position).nonzero()[:, 0]
            if not len(queries):
                continue
            query = queries[-1]
            is_seen_K = is_seen_BNK[image, query]
            places = attended.key_BK[image, is_seen_K]
            total = torch.zeros_like(found[image, number])
            total.index_add_(0, places % (num_tokens + 1), share_BNK[image, query, is_seen_K])
            found[image, number, places] = total[places]
    return found[..., :num_tokens]
