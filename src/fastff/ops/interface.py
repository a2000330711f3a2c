"""Checks, dispatch and the registered op: the one door to every backend.

`forward` validates once and picks a backend. `reference` is differentiated by autograd itself. The kernels sit behind
one registered op, `fastff::forward`, with its backward `fastff::backward`, so that they compile, export and train.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from fastff.config import TreeConfig
from fastff.errors import BackendUnavailable, ShapeError
from fastff.ops import cost, reference
from fastff.ops.eager import are_plain, is_autocast, is_differentiated_functionally, is_plain_call
from fastff.ops.explanation import Explanation
from fastff.ops.reference import Routed
from fastff.ops.weights import HALF, Weights

BACKENDS = ("reference", "native", "triton")
_KERNEL_MODULES = {"native": "fastff.ops.native", "triton": "fastff.ops.triton_kernels"}
_modules: dict[str, ModuleType] = {}
_open_blocks: tuple[str, ...] = ()  # backends named by the `use_backend` blocks that are open, innermost last


def available_backends() -> tuple[str, ...]:
    """Names of the backends that can run on this machine, `reference` first."""
    return tuple(name for name in BACKENDS if why_unavailable(name) is None)


@contextmanager
def use_backend(name: str) -> Iterator[None]:
    """Run every layer of the process on the named backend within the block. Raises BackendUnavailable if it cannot."""
    reason = why_unavailable(name)
    if reason is not None:
        raise BackendUnavailable(reason)
    global _open_blocks
    _open_blocks = (*_open_blocks, name)
    try:
        yield
    finally:
        _open_blocks = _open_blocks[:-1]


def forced_backend() -> str | None:
    """The backend of the innermost `use_backend` block, None outside."""
    return _open_blocks[-1] if _open_blocks else None


def why_unavailable(name: str) -> str | None:
    """The reason why a backend cannot run on this machine, None if it can."""
    if name == "reference":
        return None
    if name not in _KERNEL_MODULES:
        return f"backend {name!r} is not one of {', '.join(BACKENDS)}"
    if name == "triton" and importlib.util.find_spec("triton") is None:
        return "backend 'triton' needs the package triton, which is not installed"
    try:
        reason: str | None = kernels(name).why_unavailable()
    except BackendUnavailable as error:
        return str(error)
    return reason


def kernels(name: str) -> ModuleType:
    """The module of a kernel backend: `why_unavailable()`, `why_not(x, config)`, `forward(...)`, `backward(...)`."""
    if name in _modules:  # imported before: torch.compile cannot trace an import
        return _modules[name]
    try:
        return _modules.setdefault(name, importlib.import_module(_KERNEL_MODULES[name]))
    except ModuleNotFoundError as error:
        raise BackendUnavailable(f"backend {name!r} is not part of this build: {error}") from error


def forward(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    config: TreeConfig,
    backend: str | None = None,
    sparse_grad: bool = False,
) -> Routed:
    """Conditional feedforward: only the neurons on each row's path are computed.

    x: (..., in_features); w_in: (trees, in_rows, in_features); b_in: (trees, in_rows) or None;
    w_out: (trees, out_rows, out_features); b_out: (trees, leaves, out_features) or None.
    backend: a name of `available_backends()`, or None to choose by device and dtype.
    sparse_grad: gradients of w_in, w_out and b_out as sparse tensors of the visited rows (native only).
    Returns Routed(y (..., out_features), leaf (..., trees) int64, margin (...)); gradients flow through y.
    Raises ShapeError; BackendUnavailable if `backend` is named and cannot run, or has no sparse gradients.
    Source: Belcak & Wattenhofer 2023, arXiv:2311.10770.
    """
    check_shapes(x, w_in, b_in, w_out, b_out, config=config)
    name = backend or forced_backend()
    out_dtype = x.dtype
    if is_autocast(x):
        out_dtype = torch.get_autocast_dtype(x.device.type)
        x, w_in, b_in, w_out, b_out = autocast(x, w_in, b_in, w_out, b_out)
    check_dtypes(x, w_in, b_in, w_out, b_out)
    if is_differentiated_functionally():
        if name not in (None, "reference"):
            raise BackendUnavailable(
                f"backend {name!r} has no derivatives under torch.func or in forward mode: use torch.autograd, or "
                "backend='reference'"
            )
        name = "reference"
    free, name = name is None, resolve(name, x, config)
    if name == "native" and x.dtype in HALF:  # as autocast does: in fp32, and the result rounded once
        x, (w_in, b_in, w_out, b_out) = x.float(), Weights(w_in, b_in, w_out, b_out).map(Tensor.float)
    rows = x.reshape(-1, config.in_features)
    sparse = sparse_grad and torch.is_grad_enabled()
    if sparse and name != "native":
        raise BackendUnavailable(f"backend {name!r} has no sparse gradients, only 'native': use sparse_grad=False")
    if sparse:
        y, leaf, margin = _apply(rows, w_in, b_in, w_out, b_out, config, name, sparse)
    elif free and name == "native" and _masked_wins(config, rows):
        y, leaf, margin = reference.forward_masked(rows, w_in, b_in, w_out, b_out, config=config)
    elif name == "reference":
        y, leaf, margin = reference.forward(rows, w_in, b_in, w_out, b_out, config=config)
    elif untouched(rows, w_in, b_in, w_out, b_out):
        if torch.is_grad_enabled():
            y, leaf, margin = _apply(rows, w_in, b_in, w_out, b_out, config, name, sparse)
        else:
            y, leaf, margin, _ = kernels(name).forward(rows, w_in, b_in, w_out, b_out, config=config)
    else:
        y, leaf, margin, _ = torch.ops.fastff.forward(rows, w_in, b_in, w_out, b_out, *_flat(config), name)
    lead = x.shape[:-1]
    return Routed(
        y.to(out_dtype).reshape(*lead, config.out_features), leaf.reshape(*lead, config.trees), margin.reshape(lead)
    )


def _masked_wins(config: TreeConfig, rows: Tensor) -> bool:
    return not torch.compiler.is_compiling() and cost.masked_wins(config, rows.shape[0], torch.get_num_threads())


def resolve(name: str | None, x: Tensor, config: TreeConfig) -> str:
    """The backend that will run: the one named, or the first kernel that can take this input, or the reference."""
    if name is not None:
        reason = None if why_unavailable_cached(name) is None else why_unavailable(name)
        if reason is None and name != "reference":
            reason = kernels(name).why_not(x, config)
        if reason is not None:
            raise BackendUnavailable(reason)
        return name
    if config.depth == 0:  # a dense layer: torch's matrix products are the fastest form of it
        return "reference"
    candidate = "triton" if x.device.type == "cuda" else "native"
    if why_unavailable_cached(candidate) is None and kernels(candidate).why_not(x, config) is None:
        return candidate
    return "reference"


def explain(
    config: TreeConfig,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    backend: str | None = None,
) -> Explanation:
    """What `forward` would do with `rows` rows of a layer, and why, without running it.

    dtype: of x and the weights; threads: CPU threads, by default torch's number.
    backend: a name of BACKENDS, which need not be able to run here; None for the one that `forward` would choose on
    this machine, on its GPU if there is one.
    Raises BackendUnavailable for an unknown name or a dtype that the backend does not compute; ShapeError for rows < 0.
    """
    free = backend is None and forced_backend() is None
    if rows < 0:
        raise ShapeError(f"rows {rows} is not at least 0")
    if backend is not None and backend not in BACKENDS:
        raise BackendUnavailable(f"backend {backend!r} is not one of {', '.join(BACKENDS)}")
    if backend is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        backend = resolve(forced_backend(), torch.empty(0, dtype=dtype, device=device), config)
    if backend == "reference":
        return reference.explain(config, rows)
    found: Explanation = kernels(backend).explain(config, rows, dtype, threads)
    threads = threads or torch.get_num_threads()
    if free and backend == "native" and cost.masked_wins(config, rows, threads):
        reason = "a row uses so many of the neurons that matrix products over all of them, masked, are faster"
        masked = cost.masked_us(config, rows, threads)
        found = replace(found, backend="reference", form="masked", reason=reason, choices={}, predicted_us=masked)
    return _beside_dense(found)


def _beside_dense(found: Explanation) -> Explanation:
    """The same, saying so where an ordinary layer is expected to win: this one's weights cannot take its form."""
    if found.predicted_us is None or found.dense_us is None or found.predicted_us <= found.dense_us:
        return found
    return replace(found, reason=f"{found.reason}; a dense layer with as many neurons is expected to be faster")


_unavailable: dict[str, str | None] = {}


def why_unavailable_cached(name: str) -> str | None:
    """`why_unavailable`, asked once a process."""
    if name not in _unavailable:
        _unavailable[name] = why_unavailable(name)
    return _unavailable[name]


def check_shapes(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, *, config: TreeConfig
) -> None:
    """Raise ShapeError unless every tensor has the shape that `config` asks for."""
    if x.dim() == 0 or x.shape[-1] != config.in_features:
        seen = "a scalar" if x.dim() == 0 else f"in_features {x.shape[-1]} (shape {tuple(x.shape)})"
        raise ShapeError(f"{seen} does not match in_features {config.in_features}")
    for label, tensor, shape in (
        ("w_in", w_in, config.shape_of_w_in),
        ("b_in", b_in, config.shape_of_b_in),
        ("w_out", w_out, config.shape_of_w_out),
        ("b_out", b_out, config.shape_of_b_out),
    ):
        seen_shape = None if tensor is None else tuple(tensor.shape)
        if seen_shape != shape:
            raise ShapeError(f"{label} {seen_shape} does not match {shape}")


def check_dtypes(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, **others: Tensor
) -> None:
    """Raise ShapeError unless all tensors share x's floating dtype and its device."""
    if not x.dtype.is_floating_point:
        raise ShapeError(f"x is {x.dtype}, expected a floating dtype")
    weights = {"w_in": w_in, "b_in": b_in, "w_out": w_out, "b_out": b_out}
    for label, tensor in (weights | others).items():
        if tensor is None:
            continue
        if tensor.dtype != x.dtype:
            raise ShapeError(f"{label} is {tensor.dtype}, x is {x.dtype}: expected one dtype")
        if tensor.device != x.device:
            raise ShapeError(f"{label} is on {tensor.device}, x is on {x.device}: expected one device")


def autocast(x: Tensor, *weights: Tensor | None) -> tuple[Any, ...]:
    """What the kernels compute with under autocast, x first."""
    # On the CPU the kernels work in fp32 and gain nothing from casting 25 MB of weights down; a GPU's matrix units do.
    dtype = torch.float32 if x.device.type == "cpu" else torch.get_autocast_dtype(x.device.type)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in (x, *weights))


def untouched(*tensors: Tensor | None) -> bool:
    """Whether nothing watches or transforms the call, so that the registered op, which costs the host several times as
    much as the kernels' launches, has nothing to add."""
    return is_plain_call() and are_plain([tensor for tensor in tensors if tensor is not None])


class _Kernels(torch.autograd.Function):
    """A backend's kernels called at once, by eager code. sparse: gradients of the visited rows alone, of which compiled
    graphs know nothing: they have no tensors whose size depends on values."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        w_in: Tensor,
        b_in: Tensor | None,
        w_out: Tensor,
        b_out: Tensor | None,
        config: TreeConfig,
        backend: str,
        sparse: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        y, leaf, margin, scores = kernels(backend).forward(x, w_in, b_in, w_out, b_out, config=config)
        ctx.mark_non_differentiable(leaf, margin)
        ctx.save_for_backward(x, w_in, b_in, w_out, b_out, leaf, scores)
        ctx.chosen = config, backend, sparse
        ctx.set_materialize_grads(False)  # zeros for leaf and margin are launches too
        return y, leaf, margin

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, *_: Any) -> tuple[Any, ...]:
        if grad_y is None:
            return (None,) * 8
        if torch.is_grad_enabled():  # create_graph=True
            return *_differentiable_gradients(grad_y, *ctx.saved_tensors[:5], config=ctx.chosen[0]), None, None, None
        config, backend, sparse = ctx.chosen
        compute = kernels(backend).backward_visited if sparse else kernels(backend).backward
        x, w_in, b_in, w_out, b_out, leaf, scores = ctx.saved_tensors
        grads = compute(grad_y, x, w_in, b_in, w_out, b_out, leaf, scores, config=config)
        return *_of_given((x, w_in, b_in, w_out, b_out), grads), None, None, None


def _differentiable_gradients(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *,
    config: TreeConfig,
) -> tuple[Tensor | None, ...]:
    """Gradients that can be differentiated again, by the reference: kernels give only the first derivative."""
    given = (x, w_in, b_in, w_out, b_out)
    wanted = [tensor for tensor in given if tensor is not None and tensor.requires_grad]
    y = reference.forward(*given, config=config).y
    found = iter(torch.autograd.grad(y, wanted, grad_y, create_graph=True, allow_unused=True))
    return tuple(next(found) if tensor is not None and tensor.requires_grad else None for tensor in given)


_apply: Callable[..., tuple[Tensor, Tensor, Tensor]] = _Kernels.apply


def _of_given(given: tuple[Tensor | None, ...], grads: tuple[Any, ...]) -> tuple[Any, ...]:
    """The gradients, None for an absent bias, whose gradient the kernels give as an empty tensor."""
    return tuple(None if tensor is None else grad for tensor, grad in zip(given, grads, strict=True))


# The registered op. A schema carries no dataclass, so a config travels as its fields, in this order.
_FIELDS = ("depth", "trees", "leaf_width", "node_output", "activation", "gate", "tau")
_CONFIG_SCHEMA = "int depth, int trees, int leaf_width, bool node_output, str activation, str gate, float tau"
_WEIGHTS_SCHEMA = "Tensor w_in, Tensor? b_in, Tensor w_out, Tensor? b_out"

torch.library.define(
    "fastff::forward",
    f"(Tensor x, {_WEIGHTS_SCHEMA}, {_CONFIG_SCHEMA}, str backend)"
    " -> (Tensor y, Tensor leaf, Tensor margin, Tensor scores)",
)
torch.library.define(
    "fastff::backward",
    f"(Tensor grad_y, Tensor x, {_WEIGHTS_SCHEMA}, Tensor leaf, Tensor scores, {_CONFIG_SCHEMA}, str backend)"
    " -> (Tensor grad_x, Tensor grad_w_in, Tensor grad_b_in, Tensor grad_w_out, Tensor grad_b_out)",
)


def _flat(config: TreeConfig) -> tuple[Any, ...]:
    return tuple(getattr(config, name) or "" if name == "gate" else getattr(config, name) for name in _FIELDS)


def _config(x: Tensor, w_out: Tensor, bias: bool, flat: tuple[Any, ...]) -> TreeConfig:
    fields = dict(zip(_FIELDS, flat, strict=True))
    fields["gate"] = fields["gate"] or None
    return TreeConfig(in_features=x.shape[-1], out_features=w_out.shape[-1], bias=bias, **fields)


def _forward_impl(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, *flat_and_backend: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    *flat, backend = flat_and_backend
    config = _config(x, w_out, b_in is not None, tuple(flat))
    result: tuple[Tensor, Tensor, Tensor, Tensor] = kernels(backend).forward(x, w_in, b_in, w_out, b_out, config=config)
    return result


def _backward_impl(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    leaf: Tensor,
    scores: Tensor,
    *flat_and_backend: Any,
) -> tuple[Tensor, ...]:
    *flat, backend = flat_and_backend
    config = _config(x, w_out, b_in is not None, tuple(flat))
    grads: tuple[Tensor, ...] = kernels(backend).backward(
        grad_y, x, w_in, b_in, w_out, b_out, leaf, scores, config=config
    )
    return grads


def _forward_fake(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, b_out: Tensor | None, *flat_and_backend: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    depth, trees, leaf_width, _, activation = flat_and_backend[:5]
    rows, path_scores = x.shape[0], depth + leaf_width * (2 if activation == "swiglu" else 1)
    return (
        x.new_empty(rows, w_out.shape[-1]),
        x.new_empty(rows, trees, dtype=torch.int64),
        x.new_empty(rows),
        x.new_empty(rows, trees, path_scores),
    )


def _backward_fake(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    b_out: Tensor | None,
    *rest: Any,
) -> tuple[Tensor, ...]:
    def like(tensor: Tensor | None) -> Tensor:
        return x.new_empty(0) if tensor is None else x.new_empty(tensor.shape)

    return like(x), like(w_in), like(b_in), like(w_out), like(b_out)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, b_in, w_out, b_out, *ctx.flat_and_backend = inputs
    _, leaf, margin, scores = output
    ctx.mark_non_differentiable(leaf, margin, scores)
    ctx.save_for_backward(x, w_in, b_in, w_out, b_out, leaf, scores)


def _autograd_backward(ctx: Any, grad_y: Tensor, *_: Any) -> tuple[Any, ...]:
    x, w_in, b_in, w_out, b_out, leaf, scores = ctx.saved_tensors
    grads = torch.ops.fastff.backward(grad_y, x, w_in, b_in, w_out, b_out, leaf, scores, *ctx.flat_and_backend)
    return (*_of_given((x, w_in, b_in, w_out, b_out), grads), *(None for _ in ctx.flat_and_backend))


def _no_second_derivative(ctx: Any, *_: Any) -> tuple[Any, ...]:
    raise NotImplementedError(
        "a compiled or traced layer has first derivatives only: for second ones use backend='reference' or eager mode"
    )


for _device in ("CPU", "CUDA"):
    torch.library.impl("fastff::forward", _device, _forward_impl)
    torch.library.impl("fastff::backward", _device, _backward_impl)
torch.library.register_fake("fastff::forward", _forward_fake)
torch.library.register_fake("fastff::backward", _backward_fake)
torch.library.register_autograd("fastff::forward", _autograd_backward, setup_context=_setup_context)
torch.library.register_autograd("fastff::backward", _no_second_derivative)
