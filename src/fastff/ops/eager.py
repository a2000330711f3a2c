"""Whether a call is plain: run at once on plain tensors, with nothing that watches, records or transforms it.

The private names of torch that tell are asked for here and nowhere else, looked up once: the shortest path of inference
counts tenths of a microsecond.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.autograd import forward_ad

_compiling = torch.compiler.is_compiling
_tracing = torch._C._is_tracing  # within torch.jit.trace
_transformed = torch._C._are_functorch_transforms_active  # within vmap, grad, jvp, ...
is_autocast_enabled = torch._C._is_any_autocast_enabled  # for any kind of device
_dispatch_modes = torch._C._len_torch_dispatch_stack  # 0 where no mode sees each operation, as make_fx's does
_backward_task = torch._C._current_graph_task_id  # -1 outside a backward pass
_PLAIN = (Tensor, torch.nn.Parameter)
_DERIVATIVES = (torch._C._functorch.TransformType.Grad, torch._C._functorch.TransformType.Jvp)

_Function = TypeVar("_Function", bound=Callable[..., object])


def asked_once(function: _Function) -> _Function:
    """Let torch.compile ask this function when it traces a call, and take the answer for a constant: it cannot trace
    imports. What `torch.compiler.assume_constant_result` does, without importing the compiler."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def is_plain_call() -> bool:
    """Whether this thread runs operations as they come: no compiler, trace, function transform, dispatch mode or
    forward-mode derivative is about."""
    return (
        not _compiling()
        and not _tracing()
        and not _transformed()
        and not _dispatch_modes()
        and forward_ad._current_level < 0
    )


def are_plain(tensors: list[Tensor]) -> bool:
    """Whether no tensor is of a class of its own."""
    return all(tensor.__class__ in _PLAIN for tensor in tensors)


def is_differentiated_functionally() -> bool:
    """Whether `torch.func` takes derivatives of this call, or forward-mode autograd does: kernels give neither."""
    if _compiling():
        return False
    if forward_ad._current_level >= 0:
        return True
    if not _transformed():
        return False
    return any(level.key() in _DERIVATIVES for level in torch._C._functorch.get_interpreter_stack() or ())


def is_recomputed() -> bool:
    """Whether this forward runs within a backward pass, as what gradient checkpointing computes again does."""
    return not _compiling() and _backward_task() != -1


def is_side_effect_free() -> bool:
    """Whether this forward must leave nothing behind: within a backward pass, where gradient checkpointing repeats one
    that has been counted, and within a function transform, whose tensors must not outlive it."""
    return is_recomputed() or (not _compiling() and _transformed())


def is_autocast(x: Tensor) -> bool:
    """Whether autocast changes the dtype of operations on x. Devices without memory have no autocast to ask for."""
    return not x.is_meta and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type)
