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
# Two ways to sum 8 products in float64 differ by less than 16 roundings of 2**-53 of |z|.
_CLOSE = 1e-14


def nearest_codes(vectors_MC: Tensor, codebook_VC: Tensor) -> Tensor:
    """The code with the smallest angle to each vector; of codes that tie, the first.

    What is promised, on every machine, for given float32 bits of both arguments: the cosine of a
    code is the float64 sum of its C products added in the order of the channels (`_in_order`), with
    the code's direction normalised the same way; the largest cosine wins, and of equal ones the
    first code. Equal directions therefore tie exactly, and near ties fall the same way everywhere.
    A matrix product promises none of this: libraries add in an order that depends on the
    instruction set and on where in the matrix a column stands. It only finds the candidates here.

    Args:
        vectors_MC: (M, C) float. A vector that is not finite gets code 0.
        codebook_VC: (V, C) float, of any lengths but 0.

    Returns:
        (M,) int64.
    """
    codebook_VC = codebook_VC.double()
    directions_VC = codebook_VC / _in_order(codebook_VC * codebook_VC).sqrt()[:, None]
    directions_CV = directions_VC.T.contiguous()
    codes_M = torch.zeros(len(vectors_MC), dtype=torch.int64, device=vectors_MC.device)
    for start in range(0, len(vectors_MC), _ROWS):
        block_RC = vectors_MC[start : start + _ROWS].double()
        product_RV = block_RC @ directions_CV
        least_R1 = product_RV.amax(1, keepdim=True) - _CLOSE * block_RC.norm(dim=1, keepdim=True)
        row_K, code_K = (product_RV >= least_R1).nonzero(as_tuple=True)
        cosine_K = _in_order(block_RC[row_K] * directions_VC[code_K])
        best_R = torch.full_like(block_RC[:, 0], -torch.inf)
        best_R.scatter_reduce_(0, row_K, cosine_K, "amax")
        wins_K = cosine_K == best_R[row_K]
        block_codes = codes_M[start : start + _ROWS]
        block_codes.scatter_reduce_(0, row_K[wins_K], code_K[wins_K], "amin", include_self=False)
    return codes_M


def _in_order(x_KC: Tensor) -> Tensor:
    """(K, C) -> (K,): the sum over channels, one addition after the other.

    `Tensor.sum` may add in any order; elementwise operations are exact to the last bit everywhere.
    """
    total_K = x_KC[:, 0]
    for channel in range(1, x_KC.shape[1]):
        total_K = total_K + x_KC[:, channel]
    return total_K


class VQ16(Pretrained):
    """Codes (B, N) int64 in 0..16383; see `Pretrained` for arguments, dtypes and chunks."""

    name = "vq16"

    @property
    def codebook_VC(self) -> Tensor:
        """(16384, 8) float32: the codebook as stored, before it is normalised."""
        return self.network.get_parameter("quantize.embedding.weight")

    def code_vectors(self) -> Tensor:
        """See Tokenizer.code_vectors: of length 1, as they are decoded."""
        return F.normalize(self.codebook_VC, dim=-1)

    def encode(self, images: Tensor, rng: Rng | None = None, index: Tensor | None = None) -> Tensor:
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
        codes_BN = self.check_tokens(tokens)
        vocabulary = self.spec.vocabulary
        if codes_BN.is_floating_point() or codes_BN.dtype == torch.bool:
            raise ValueError(f"vq16: expected integer codes, found {codes_BN.dtype}")
        codes_BN = codes_BN.long()
        if codes_BN.numel() and not 0 <= int(codes_BN.min()) <= int(codes_BN.max()) < vocabulary:
            raise ValueError(
                f"vq16: expected codes in 0..{vocabulary - 1}, found "
                f"{int(codes_BN.min())}..{int(codes_BN.max())}"
            )
        grid = self.spec.grid
        vectors_BNC = F.normalize(self.codebook_VC[codes_BN], dim=-1)
        return self._decoded(vectors_BNC.transpose(1, 2).unflatten(2, (grid, grid)))
