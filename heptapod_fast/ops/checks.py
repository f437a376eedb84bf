"""What every operation asks of its tensors, in one wording.

Each function is one rule. It takes the operation's name, and tensors under the names that the error
uses (None stands for an argument that was left out), and raises ValueError unless the rule holds. A
rule of one operation alone is an `if` in its file that raises a `refusal`.

Messages are formatted only when a rule is broken. That keeps calls cheap; besides, torch.compile
would specialise on every size that is formatted and compile again for each.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """x, in float32 if it was less precise."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def refusal(operation: str, wanted: str, *found: object) -> ValueError:
    """The error of an operation that takes `wanted` and was given `found`.

    found: tensors (shown by dtype and shape), shapes, dtypes, numbers or words.
    """
    return ValueError(f"{operation} takes {wanted}, got {_enumerate([_show(f) for f in found])}")


def check_rows(operation: str, **tensors: Tensor | None) -> None:
    """All tensors are on the device of the first, which holds floating-point rows (..., D)."""
    (name, first), *others = ((n, t) for n, t in tensors.items() if t is not None)
    if not torch.is_tensor(first) or first.dim() == 0 or not first.is_floating_point():
        what = first if torch.is_tensor(first) else type(first).__name__
        rows = "rows (..., D) of float32 or bfloat16 (the reference: any floating dtype)"
        raise refusal(operation, f"{name} as {rows}", what)
    for other, tensor in others:
        if not torch.is_tensor(tensor) or tensor.device != first.device:
            where = tensor.device if torch.is_tensor(tensor) else type(tensor).__name__
            raise ValueError(
                f"{operation} takes its tensors on one device: {name} is on "
                f"{first.device}, {other} on {where}"
            )


def check_together(operation: str, **tensors: Tensor | None) -> None:
    """All of the tensors are there, or none of them."""
    absent = [name for name, tensor in tensors.items() if tensor is None]
    if absent and len(absent) < len(tensors):
        some = "one of them is" if len(absent) == 1 else f"{_enumerate(absent)} are"
        raise ValueError(
            f"{operation} takes {_enumerate(list(tensors))} together or not at all; {some} None"
        )


def check_like(operation: str, x: Tensor, **tensors: Tensor | None) -> None:
    """Every tensor has the shape and the dtype of x."""
    for name, tensor in tensors.items():
        if tensor is not None and (tensor.shape != x.shape or tensor.dtype != x.dtype):
            raise refusal(operation, f"{name} like x, {_show(x)}", tensor)


def check_shape(operation: str, shape: Sequence[int], **tensors: Tensor | None) -> None:
    """All tensors have this shape; those of one call are named together."""
    there = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    if any(tensor.shape != shape for tensor in there.values()):
        wanted = f"{_enumerate(list(there))} of shape {tuple(shape)}"
        raise refusal(operation, wanted, *(tensor.shape for tensor in there.values()))


def check_dtype(operation: str, dtype: torch.dtype, **tensors: Tensor) -> None:
    """Every tensor has this dtype."""
    for name, tensor in tensors.items():
        if tensor.dtype != dtype:
            raise refusal(operation, f"{name} as {str(dtype).removeprefix('torch.')}", tensor.dtype)


def _show(value: object) -> str:
    """A tensor, a shape, a dtype, a number or a word, as an error shows it."""
    if torch.is_tensor(value):
        return f"{value.dtype} {tuple(value.shape)}"
    if isinstance(value, torch.Size):
        return str(tuple(value))
    return str(value)


def _enumerate(words: list[str]) -> str:
    """Words in a row, as a sentence has them: a, b and c."""
    if len(words) == 1:
        return words[0]
    return f"{', '.join(words[:-1])} and {words[-1]}"
