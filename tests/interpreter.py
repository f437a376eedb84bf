"""Triton's interpreter, made right about bfloat16.

As shipped it keeps bfloat16 as 16-bit integers: arithmetic and `tl.dot` act on the bit patterns and
casts truncate (Triton 3.6 and 3.7). Here casts round to nearest even, `tl.dot` multiplies in
float32, and arithmetic on bfloat16 is refused, because our kernels convert to float32 first.
"""

import importlib.util
import os

import numpy as np
import torch


def use_without_a_gpu() -> None:
    """Where there is no GPU, kernels run in the interpreter from here on.

    Raises:
        RuntimeError: versions that do not work together.
    """
    if torch.cuda.is_available() or importlib.util.find_spec("triton") is None:
        return
    os.environ.setdefault("TRITON_INTERPRET", "1")
    import triton

    versions = [
        tuple(int(part) for part in module.__version__.split(".")[:2]) for module in (triton, np)
    ]
    # Triton 3.6's interpreter takes int() of arrays of one element, which numpy 2.4 refuses.
    if versions[0] < (3, 7) and versions[1] >= (2, 4):
        raise RuntimeError(
            f"the interpreter of triton {triton.__version__} does not work with "
            f"numpy {np.__version__}: pip install 'numpy<2.4', or triton>=3.7"
        )
    install()


def to_float(data: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32."""
    return (np.asarray(data).view(np.uint16).astype(np.uint32) << 16).view(np.float32)


def to_bits(data: np.ndarray) -> np.ndarray:
    """float32 -> uint16 bit patterns of bfloat16, round to nearest even, NaN to 0x7fc0."""
    data = np.ascontiguousarray(data, dtype=np.float32)
    bits = data.view(np.uint32).astype(np.uint64)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(data), np.uint16(0x7FC0), rounded)


def install() -> None:
    """Patch the interpreter of the installed Triton; once per process."""
    import triton.language as tl
    from triton.runtime import interpreter

    builder, handle = interpreter.InterpreterBuilder, interpreter.TensorHandle
    if getattr(builder, "_bf16_is_right", False):
        return
    builder._bf16_is_right = True
    cast, dot = builder.cast_impl, builder.create_dot
    binary, unary = builder.binary_op, builder.unary_op

    def convert(self, src, dst_type, *rounding):
        source, target = src.dtype.scalar, dst_type.scalar
        if source == tl.bfloat16 and target != tl.bfloat16:
            src = handle(to_float(src.data), tl.float32)
            return src if target == tl.float32 else cast(self, src, dst_type)
        if target == tl.bfloat16 and source != tl.bfloat16:
            return handle(to_bits(src.data), tl.bfloat16)
        return cast(self, src, dst_type)

    def multiply(self, a, b, d, *options):
        a, b = (
            handle(to_float(x.data), tl.float32) if x.dtype.scalar == tl.bfloat16 else x
            for x in (a, b)
        )
        return dot(self, a, b, d, *options)

    def refuse(operands):
        if any(x.dtype.scalar == tl.bfloat16 for x in operands):
            raise TypeError("arithmetic on bfloat16 in a kernel: convert to float32 first")

    def binary_op(self, lhs, rhs, op):
        refuse((lhs, rhs))
        return binary(self, lhs, rhs, op)

    def unary_op(self, arg, op):
        refuse((arg,))
        return unary(self, arg, op)

    builder.cast_impl, builder.create_dot = convert, multiply
    builder.create_fp_to_fp = lambda self, src, dst, rounding: convert(self, src, dst)
    builder.binary_op, builder.unary_op = binary_op, unary_op
    for name in ("sum", "min_max"):
        original = getattr(interpreter.ReduceOps, name)

        def reduce(self, data, *args, original=original, **kwargs):
            first = data[0] if isinstance(data, tuple) else data
            refuse((first.handle,))
            return original(self, data, *args, **kwargs)

        setattr(interpreter.ReduceOps, name, reduce)
