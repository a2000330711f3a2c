"""Triton's interpreter, in which the kernels are tested where there is no GPU, without work that it repeats.

What it computes and checks stays the same.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np


def quicken() -> None:
    """Change the interpreter of this process. Needs TRITON_INTERPRET=1, set before Triton was imported."""
    from triton.language.semantic import TritonSemantic
    from triton.runtime import interpreter

    _patch_once_a_launch(interpreter)
    plain, types = interpreter._get_np_dtype, {}

    def numpy_type(of: Any) -> Any:
        if of.name not in types:
            types[of.name] = plain(of)
        return types[of.name]

    interpreter._get_np_dtype = numpy_type
    TritonSemantic.binary_op_sanitize_overflow_impl = _check_overflow


def _patch_once_a_launch(interpreter: Any) -> None:
    """A launch puts the interpreter's functions into Triton's language. Every helper that a kernel calls did it again,
    although they stay there until the launch ends."""
    patch, restore = interpreter._patch_lang, interpreter._LangPatchScope.restore
    patched: set[str] = set()

    @functools.cache
    def languages(function: Callable[..., Any]) -> set[str]:
        language = (interpreter.tl, interpreter.tl.core)
        return {value.__name__ for value in function.__globals__.values() if any(value is each for each in language)}

    def patch_once(function: Callable[..., Any]) -> Any:
        if languages(function) <= patched:
            return None  # a helper's: the launch restores
        patched.update(languages(function))
        return patch(function)

    def restore_all(self: Any) -> None:
        patched.clear()
        restore(self)

    interpreter._patch_lang, interpreter._LangPatchScope.restore = patch_once, restore_all


def _check_overflow(self: Any, lhs: Any, rhs: Any, operation: Any) -> None:
    """A sum, difference or product of integers must fit their type: asked of numpy, not by ten operations of Triton."""
    kind = lhs.type.scalar
    if kind.int_bitwidth < 64:
        compute = {"add": np.add, "sub": np.subtract, "mul": np.multiply}[operation.__name__]
        exact = compute(lhs.handle.data.astype(np.int64), rhs.handle.data.astype(np.int64))
        fits = (exact >= kind.get_int_min_value()) & (exact <= kind.get_int_max_value())
        assert fits.all(), f"{kind} overflow detected for operation {operation.__name__}"
