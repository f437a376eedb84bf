"""A hash of what a kernel computes, whatever its source looks like.

It changes with the code of the kernel, with that of every jit function that the kernel reaches, and
with the value of every module-level constant that any of them uses. It does not change with
comments, docstrings, blank lines, line numbers or formatting. Functions of Triton itself are left
out; its version stands beside the hash in every key (offline_figures.py).
"""

from __future__ import annotations

import ast
import builtins
import functools
import hashlib
import inspect
import textwrap
from collections.abc import Iterator
from types import FunctionType, ModuleType

import triton.language as tl
from triton.runtime.jit import KernelInterface

CONSTANTS = (bool, int, float, str, type(None))


def fingerprint(kernel: KernelInterface) -> str:
    """64 hexadecimal digits for a function under `triton.jit`, with or without the interpreter.

    Raises TypeError on a global whose value has no text that stays the same from run to run.
    """
    return _of_function(kernel.fn)


@functools.cache
def _of_function(function: FunctionType) -> str:
    definition = _definition(function)
    scope = function.__globals__ | inspect.getclosurevars(function).nonlocals
    parts = [ast.unparse(definition)]
    for name in sorted(_outer_names(definition)):
        value = _value(name, scope)
        if value is not None:
            parts.append(f"{name} = {value}")
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()


def _definition(function: FunctionType) -> ast.FunctionDef:
    """The function's syntax tree, decorators included, without its docstring."""
    (definition,) = ast.parse(textwrap.dedent(inspect.getsource(function))).body
    if ast.get_docstring(definition) is not None:
        definition.body = definition.body[1:] or [ast.Pass()]
    return definition


def _outer_names(definition: ast.FunctionDef) -> set[str]:
    """What a function takes from outside: "LOG2E", "tl.load"; the longest dotted form of each."""
    inner = {node.arg for node in ast.walk(definition) if isinstance(node, ast.arg)}
    inner |= {
        node.id
        for node in ast.walk(definition)
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    return {name for name in _dotted(definition) if name.split(".")[0] not in inner}


def _dotted(node: ast.AST) -> Iterator[str]:
    """Names and chains of attributes below a node, each as it is written."""
    if isinstance(node, ast.Name):
        yield node.id
        return
    if isinstance(node, ast.Attribute):
        chain = ast.unparse(node)
        if all(part.isidentifier() for part in chain.split(".")):
            yield chain
            return
    for child in ast.iter_child_nodes(node):
        yield from _dotted(child)


def _value(name: str, scope: dict[str, object]) -> str | None:
    """Text for what a dotted name stands for; None for builtins and what is Triton's."""
    root, *attributes = name.split(".")
    if root not in scope:
        if hasattr(builtins, root):
            return None
        raise TypeError(f"{name} is defined nowhere")
    value = scope[root]
    while isinstance(value, ModuleType) and attributes:
        if value.__name__.split(".")[0] == "triton":
            return None
        value = getattr(value, attributes.pop(0))
    return _text(name, value)


def _text(name: str, value: object) -> str | None:
    """Text for a value; None for what is Triton's."""
    if isinstance(value, KernelInterface):
        belongs_to_triton = value.fn.__module__.split(".")[0] == "triton"
        return None if belongs_to_triton else _of_function(value.fn)
    if isinstance(value, tl.constexpr):
        return _text(name, value.value)
    if isinstance(value, tl.dtype):
        return str(value)
    if isinstance(value, CONSTANTS):
        return repr(value)
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(str(_text(name, each)) for each in value)}]"
    if getattr(value, "__module__", "").split(".")[0] == "triton":
        return None
    raise TypeError(f"{name} is a {type(value).__name__}, whose value has no stable text")
