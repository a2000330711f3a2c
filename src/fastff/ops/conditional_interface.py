"""Conditional matrix multiplication for any router: checks, dispatch and the registered op.

`conditional_matmul` validates once and picks a backend. `reference` and `eager` are plain PyTorch, differentiated by
autograd itself. The kernels sit behind one registered op, `fastff::conditional_matmul`, and its backward,
`fastff::conditional_backward`, so that they compile, export and train.

A kernel module has, with the shapes of conditional_reference:
why_unavailable() -> str | None                 why it cannot run on this machine
why_not(x, w_in, w_out, activation) -> str | None    why it cannot take these tensors
forward(x, leaf, gate, leaves, *, activation) -> (y, scores (rows, k, in_rows)); leaves: `weights.Leaves`
backward(grad_y, x, leaf, gate, leaves, scores, *, activation)
    -> gradients of x, gate, w_in, b_in, w_out, b_out; an empty tensor for a bias that is None
"""

from __future__ import annotations

import importlib
import importlib.util
from contextlib import nullcontext
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastff.config import ACTIVATIONS
from fastff.errors import BackendUnavailable, ShapeError
from fastff.ops import backends, conditional_eager, conditional_reference, interface
from fastff.ops.eager import asked_once, is_autocast
from fastff.ops.weights import Leaves

BACKENDS = ("reference", "eager", "native", "triton")
_PLAIN = {"reference": conditional_reference, "eager": conditional_eager}
_KERNEL_MODULES = {
    "native": "fastff.ops.native_conditional",
    "triton": "fastff.ops.triton_kernels.conditional_products",
}
_modules: dict[str, ModuleType] = {}
_unavailable: dict[str, str | None] = {}


def conditional_matmul(
    x: Tensor,
    leaf: Tensor,
    gate: Tensor,
    w_in: Tensor,
    w_out: Tensor,
    *,
    activation: str,
    b_in: Tensor | None = None,
    b_out: Tensor | None = None,
    backend: str | None = None,
    leaf_in_range: bool = False,
) -> Tensor:
    """Every row multiplies only the leaves that a router chose for it:
    `y = sum over k of gate * (act(x w_in[leaf]^T + b_in[leaf]) w_out[leaf] + b_out[leaf])`.

    x: (..., in_features); leaf: (..., k) int64, k may be 0, and a leaf that stands twice in a row adds twice;
    gate: (..., k); w_in: (leaves, in_rows, in_features); w_out: (leaves, width, out_features);
    b_in: (leaves, in_rows) or None; b_out: (leaves, out_features) or None.
    activation: as in TreeConfig; in_rows is width, or for "swiglu" 2 * width, all gate rows of a leaf, then all value
    rows. backend: "reference", "eager", "native", "triton", or None to choose by device and dtype.
    leaf_in_range: leaf is known to be in range, as what fastff's routers chose is: kernels do not look again.
    Returns y (..., out_features), of x's dtype; gradients flow to x, gate, the weights and the biases.
    Raises ShapeError for a size, dtype, device or leaf out of range (leaves on a GPU are checked there, as an
    assertion of the device); BackendUnavailable if `backend` is named and cannot run.
    """
    leaves = Leaves(w_in, b_in, w_out, b_out)
    check_shapes(x, leaf, gate, leaves, activation)
    out_dtype = x.dtype
    autocast = is_autocast(x)
    if autocast:
        out_dtype = torch.get_autocast_dtype(x.device.type)
        x, gate, *weights = interface.autocast(x, gate, *leaves)
        leaves = Leaves(*weights)
    check_dtypes(x, leaf, gate, leaves)
    name = resolve(backend, x, leaves, activation)
    chosen = _rows(leaf)
    routed = (_rows(x), chosen, _rows(gate))
    arguments = (*routed, *leaves)
    if name in _PLAIN:
        check_leaves(chosen, w_in.shape[0])
        with torch.autocast(x.device.type, enabled=False) if autocast else nullcontext():
            y: Tensor = _PLAIN[name].forward(*routed, leaves, activation=activation)
    elif not torch.is_grad_enabled() and interface.untouched(*arguments):
        y, _ = _forward_impl(*arguments, activation, name, leaf_in_range)
    else:
        y, _ = torch.ops.fastff.conditional_matmul(*arguments, activation, name, leaf_in_range)
    return y.to(out_dtype).reshape(*x.shape[:-1], w_out.shape[-1])


def _rows(tensor: Tensor) -> Tensor:
    """All leading dimensions as one; reshape cannot tell how many rows of k = 0 there are."""
    return tensor.unsqueeze(0) if tensor.dim() == 1 else tensor.flatten(0, -2)


def resolve(name: str | None, x: Tensor, leaves: Leaves, activation: str) -> str:
    """The backend that will run: the one named, or the first kernel that can take this input, or eager."""
    name = name or backends.forced_backend()
    if name is not None:
        reason = _why_not(name, x, leaves, activation)
        if reason is not None:
            raise BackendUnavailable(reason)
        return name
    if _differentiated():
        return "eager"
    candidate = "triton" if x.device.type == "cuda" else "native"
    return candidate if _why_not(candidate, x, leaves, activation) is None else "eager"


@asked_once
def why_unavailable(name: str) -> str | None:
    """The reason why a backend cannot compute conditional products on this machine, None if it can."""
    if name in _PLAIN:
        return None
    if name not in _KERNEL_MODULES:
        return f"backend {name!r} is not one of {', '.join(BACKENDS)}"
    if name not in _unavailable:
        _unavailable[name] = backends.why_unavailable(name) or _why_kernels_unavailable(name)
    return _unavailable[name]


def _why_kernels_unavailable(name: str) -> str | None:
    if importlib.util.find_spec(_KERNEL_MODULES[name]) is None:
        return f"backend {name!r} has no conditional products in this build"
    reason: str | None = kernels(name).why_unavailable()
    return reason


def kernels(name: str) -> ModuleType:
    """The module of a kernel backend, as the head of this file describes it."""
    if name in _modules:  # imported before: torch.compile cannot trace an import
        return _modules[name]
    return _modules.setdefault(name, importlib.import_module(_KERNEL_MODULES[name]))


def _why_not(name: str, x: Tensor, leaves: Leaves, activation: str) -> str | None:
    reason = why_unavailable(name)
    if reason is None and name not in _PLAIN:
        reason = kernels(name).why_not(x, leaves.w_in, leaves.w_out, activation)
        if reason is None and _differentiated():
            reason = f"backend {name!r} has no derivatives within torch.func: name backend='eager'"
    return reason


def _differentiated() -> bool:
    """Whether a transform of torch.func other than vmap is active: the registered op has no rule for those."""
    if torch.compiler.is_compiling() or torch._C._functorch.maybe_current_level() is None:
        return False
    stack = torch._C._functorch.get_interpreter_stack() or []
    return any(level.key() != torch._C._functorch.TransformType.Vmap for level in stack)


def check_shapes(x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves, activation: str) -> None:
    """Raise ShapeError unless the shapes and the activation fit together."""
    if activation not in ACTIVATIONS:
        raise ShapeError(f"activation {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    w_in, b_in, w_out, b_out = leaves
    for label, weight in (("w_in", w_in), ("w_out", w_out)):
        if weight.dim() != 3:
            raise ShapeError(f"{label} {tuple(weight.shape)} does not have three dimensions")
    count, in_rows, in_features = w_in.shape
    width, pair = w_out.shape[1], 2 if activation == "swiglu" else 1
    if w_out.shape[0] != count:
        raise ShapeError(f"w_out has {w_out.shape[0]} leaves, w_in {count}: expected one number")
    if in_rows != pair * width:
        raise ShapeError(f"w_in has {in_rows} rows in a leaf, expected {pair} * {width} for {activation!r}")
    for label, bias, shape in (("b_in", b_in, (count, in_rows)), ("b_out", b_out, (count, w_out.shape[2]))):
        if bias is not None and tuple(bias.shape) != shape:
            raise ShapeError(f"{label} {tuple(bias.shape)} does not match {shape}")
    if x.dim() == 0 or x.shape[-1] != in_features:
        seen = "a scalar" if x.dim() == 0 else f"in_features {x.shape[-1]} (shape {tuple(x.shape)})"
        raise ShapeError(f"{seen} does not match in_features {in_features} of w_in")
    if leaf.dim() != x.dim() or leaf.shape[:-1] != x.shape[:-1]:
        raise ShapeError(f"leaf {tuple(leaf.shape)} does not match {(*x.shape[:-1], 'k')}")
    if gate.shape != leaf.shape:
        raise ShapeError(f"gate {tuple(gate.shape)} does not match {tuple(leaf.shape)} of leaf")


def check_dtypes(x: Tensor, leaf: Tensor, gate: Tensor, leaves: Leaves) -> None:
    """Raise ShapeError unless leaf is int64 and all else shares x's floating dtype, on one device."""
    interface.check_dtypes(x, **leaves._asdict(), gate=gate)
    if leaf.dtype != torch.int64:
        raise ShapeError(f"leaf is {leaf.dtype}, expected torch.int64")
    if leaf.device != x.device:
        raise ShapeError(f"leaf is on {leaf.device}, x is on {x.device}: expected one device")


def check_leaves(leaf: Tensor, count: int) -> None:
    """Raise ShapeError unless all of leaf is in 0 to count - 1; on a GPU and in compiled code, assert it there."""
    if leaf.numel() == 0:
        return
    if torch.compiler.is_compiling() or leaf.device.type != "cpu":
        torch._assert_async(((leaf >= 0) & (leaf < count)).all(), f"a leaf is not in 0 to {count - 1}")
        return
    low, high = (int(bound) for bound in _values_of(leaf).aminmax())
    if low < 0 or high >= count:
        raise ShapeError(f"leaf {low if low < 0 else high} is not in 0 to {count - 1}")


def _values_of(tensor: Tensor) -> Tensor:
    """All values that the transforms of torch.func have wrapped."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


_WEIGHTS_SCHEMA = "Tensor x, Tensor leaf, Tensor gate, Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"

torch.library.define(
    "fastff::conditional_matmul",
    f"({_WEIGHTS_SCHEMA}, str activation, str backend, bool leaf_in_range) -> (Tensor y, Tensor scores)",
)
torch.library.define(
    "fastff::conditional_backward",
    f"(Tensor grad_y, {_WEIGHTS_SCHEMA}, Tensor scores, str activation, str backend) -> (Tensor grad_x,"
    " Tensor grad_gate, Tensor grad_w_in, Tensor grad_b_in, Tensor grad_w_out, Tensor grad_b_out)",
)


def _forward_impl(
    x: Tensor,
    leaf: Tensor,
    gate: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    activation: str,
    backend: str,
    leaf_in_range: bool,
) -> tuple[Tensor, Tensor]:
    if not leaf_in_range:
        check_leaves(leaf, w_in.shape[0])
    leaves = Leaves(w_in, b_in, w_out, b_out)
    result: tuple[Tensor, Tensor] = kernels(backend).forward(x, leaf, gate, leaves, activation=activation)
    return result


def _backward_impl(grad_y: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
    x, leaf, gate, *weights, scores, activation, backend = inputs
    leaves = Leaves(*weights)
    grads: tuple[Tensor, ...] = kernels(backend).backward(grad_y, x, leaf, gate, leaves, scores, activation=activation)
    return grads


def _forward_fake(x: Tensor, leaf: Tensor, gate: Tensor, *weights: Any) -> tuple[Tensor, Tensor]:
    w_in, _, w_out = weights[:3]
    return x.new_empty(x.shape[0], w_out.shape[-1]), x.new_empty(*leaf.shape, w_in.shape[1])


def _backward_fake(grad_y: Tensor, x: Tensor, leaf: Tensor, gate: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    weights: tuple[Tensor | None, ...] = rest[:4]
    return tuple(x.new_empty(0 if tensor is None else tensor.shape) for tensor in (x, gate, *weights))


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, ctx.activation, ctx.backend, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(*tensors, output[1])


def _autograd_backward(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Any, ...]:
    saved = ctx.saved_tensors
    grads = torch.ops.fastff.conditional_backward(grad_y, *saved, ctx.activation, ctx.backend)
    x, gate, *weights = (
        None if given is None else grad for given, grad in zip((saved[0], *saved[2:7]), grads, strict=True)
    )
    return x, None, gate, *weights, None, None, None


def _no_second_derivative(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise RuntimeError("the kernels of conditional_matmul have first derivatives only: name backend='eager'")


def _forward_vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """Batches become rows; weights that have a batch of their own become more leaves."""
    *tensors, activation, backend, leaf_in_range = inputs
    batch = info.batch_size
    folded = _fold(batch, in_dims[:7], tensors)
    y, scores = torch.ops.fastff.conditional_matmul(*folded, activation, backend, leaf_in_range)
    return (y.unflatten(0, (batch, -1)), scores.unflatten(0, (batch, -1))), (0, 0)


def _backward_vmap(info: Any, in_dims: tuple[int | None, ...], *inputs: Any) -> tuple[Any, Any]:
    """As forward; every member of the batch has gradients of its own, of the weights too."""
    grad_y, *tensors, scores, activation, backend = inputs
    batch = info.batch_size
    grad_y, scores = (
        _batched(tensor, dim, batch).flatten(0, 1) for tensor, dim in ((grad_y, in_dims[0]), (scores, in_dims[8]))
    )
    folded = _fold(batch, in_dims[1:8], tensors, own_weights=True)
    grads = torch.ops.fastff.conditional_backward(grad_y, *folded, scores, activation, backend)
    given = (tensors[0], *tensors[2:7])
    split = tuple(
        grad.new_empty(batch, 0) if tensor is None else grad.unflatten(0, (batch, -1))
        for tensor, grad in zip(given, grads, strict=True)
    )
    return split, (0,) * len(split)


def _fold(
    batch: int, in_dims: tuple[int | None, ...], tensors: list[Any], *, own_weights: bool = False
) -> list[Tensor | None]:
    """The arguments with the batch folded into rows, and into leaves where each member has weights of its own."""
    x, leaf, gate = (_batched(tensor, dim, batch) for tensor, dim in zip(tensors[:3], in_dims[:3], strict=True))
    weights: list[Tensor | None] = tensors[3:]
    if own_weights or any(dim is not None for dim in in_dims[3:]):
        each = [
            None if tensor is None else _batched(tensor, dim, batch)
            for tensor, dim in zip(weights, in_dims[3:], strict=True)
        ]
        count = each[0].shape[1] if each[0] is not None else 0
        leaf = leaf + count * torch.arange(batch, device=leaf.device).view(batch, 1, 1)
        weights = [None if tensor is None else tensor.flatten(0, 1) for tensor in each]
    return [x.flatten(0, 1), leaf.flatten(0, 1), gate.flatten(0, 1), *weights]


def _batched(tensor: Tensor, dim: int | None, batch: int) -> Tensor:
    """tensor with the batch as its first dimension."""
    return tensor.expand(batch, *tensor.shape) if dim is None else tensor.movedim(dim, 0)


for _device in ("CPU", "CUDA"):
    torch.library.impl("fastff::conditional_matmul", _device, _forward_impl)
    torch.library.impl("fastff::conditional_backward", _device, _backward_impl)
torch.library.register_fake("fastff::conditional_matmul", _forward_fake)
torch.library.register_fake("fastff::conditional_backward", _backward_fake)
torch.library.register_autograd("fastff::conditional_matmul", _autograd_backward, setup_context=_setup_context)
torch.library.register_autograd("fastff::conditional_backward", _no_second_derivative)
torch.library.register_vmap("fastff::conditional_matmul", _forward_vmap)
torch.library.register_vmap("fastff::conditional_backward", _backward_vmap)
