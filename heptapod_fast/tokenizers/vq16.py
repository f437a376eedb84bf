"""LlamaGen's VQ-16: 16384 codes, one for 16 x 16 pixels.

    z = quant_conv(encoder(image));   code = argmin_v |z / |z| - e_v / |e_v||^2
    image = decoder(post_quant_conv(e_code / |e_code|))

(LlamaGen:tokenizer/tokenizer_image/vq_model.py:215-276). With unit vectors the squared distance is
2 - 2 cos, and |z| > 0 scales all products alike: the nearest code is that of the largest product.

Tensor names: B images, C = 8 channels, V codes, H x W the token grid, N = H * W tokens, M rows.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from heptapod_fast.rng import Rng
from heptapod_fast.tokenizers.pretrained import Pretrained

_ROWS = 256  # of one block of products: 256 x 16384 in float64 are 34 MB


def nearest_codes(vectors_MC: Tensor, codebook_VC: Tensor) -> Tensor:
    """The code with the smallest angle to each vector; the first of equal ones.

    Args:
        vectors_MC: (M, C) float.
        codebook_VC: (V, C) float, of any lengths but 0.

    Returns:
        (M,) int64.

    Products are taken in float64: with 8 channels they cost nothing beside the encoder, no setting
    for fast float32 products (TF32) reaches them, and close calls fall the same way everywhere.
    Every block has the same number of rows (the last is filled up), so that the library runs the
    same code for a row whatever the batch is.
    """
    directions_CV = F.normalize(codebook_VC.double(), dim=1).T.contiguous()
    codes_M = torch.empty(len(vectors_MC), dtype=torch.int64, device=vectors_MC.device)
    for start in range(0, len(vectors_MC), _ROWS):
        block_MC = vectors_MC[start:start + _ROWS].double()
        used = len(block_MC)
        if used < _ROWS:
            block_MC = F.pad(block_MC, (0, 0, 0, _ROWS - used))
        codes_M[start:start + used] = (block_MC @ directions_CV).argmax(dim=1)[:used]
    return codes_M


class VQ16(Pretrained):
    """Codes (B, N) int64 in 0..16383; see `Pretrained` for arguments, dtypes and chunks."""

    name = "vq16"

    @property
    def codebook_VC(self) -> Tensor:
        """(16384, 8) float32: the codebook as stored, before it is normalised."""
        return self.network.quantize.embedding.weight

    def encode(self, images: Tensor, rng: Rng | None = None,
               index: Tensor | None = None) -> Tensor:
        """(B, 3, H, W) float in [-1, 1] -> (B, N) int64, the nearest codes; `rng` is ignored.

        Raises:
            ValueError: images of another shape or dtype.
        """
        vectors_BCHW = self._encoded(images)
        vectors_MC = vectors_BCHW.permute(0, 2, 3, 1).flatten(0, 2)
        return nearest_codes(vectors_MC, self.codebook_VC).view(len(images), self.spec.num_tokens)

    def decode(self, tokens: Tensor) -> Tensor:
        """(B, N) integers in 0..16383 -> (B, 3, H, W) float32, not clipped.

        Raises:
            ValueError: tokens of another shape, floats, or codes out of range.
        """
        codes_BN, vocabulary = self.check_tokens(tokens), self.spec.vocabulary
        if codes_BN.is_floating_point() or codes_BN.dtype == torch.bool:
            raise ValueError(f"vq16: expected integer codes, found {codes_BN.dtype}")
        codes_BN = codes_BN.long()
        if codes_BN.numel() and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < vocabulary:
            raise ValueError(f"vq16: expected codes in 0..{vocabulary - 1}, found "
                             f"{int(codes_BN.min())}..{int(codes_BN.max())}")
        grid = self.spec.grid
        vectors_BNC = F.normalize(self.codebook_VC[codes_BN], dim=-1)
        return self._decoded(vectors_BNC.transpose(1, 2).unflatten(2, (grid, grid)))
