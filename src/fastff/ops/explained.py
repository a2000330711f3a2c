"""`explain`: what a call of any layer would do, and why."""

from __future__ import annotations

from dataclasses import replace

import torch

from fastff.config import TreeConfig
from fastff.errors import BackendUnavailable, ShapeError
from fastff.ops import conditional_interface, cost, reference
from fastff.ops.backends import BACKENDS, forced_backend, kernels
from fastff.ops.cost import RoutedSizes
from fastff.ops.explanation import Explanation
from fastff.ops.interface import resolve
from fastff.ops.weights import Leaves

# Of backends for layers behind routers: the form, and why.
_FORMS = {
    "reference": ("gather", "the leaves of every row are gathered: what the kernels are compared with"),
    "eager": (
        "grouped",
        "rows that chose one leaf are computed together in plain PyTorch, which any transform can take",
    ),
    "native": ("grouped", "rows that chose one leaf are computed together, so that its weights are read once"),
    "triton": ("grouped", "rows that chose one leaf are computed together by matrix units"),
}


def explain(
    config: TreeConfig | RoutedSizes,
    rows: int,
    *,
    dtype: torch.dtype = torch.float32,
    threads: int | None = None,
    backend: str | None = None,
) -> Explanation:
    """What a layer would do with `rows` rows, and why, without running it.

    config: of an FFF or a ConditionalFeedforward.
    dtype: of x and the weights; threads: CPU threads, by default torch's number.
    backend: a name of BACKENDS, or for layers behind routers of conditional_interface.BACKENDS, which need not be able
    to run here; None for the one that the layer would choose on this machine, on its GPU if there is one.
    Raises BackendUnavailable for an unknown name or a dtype that the backend does not compute; ShapeError for rows < 0.
    """
    if rows < 0:
        raise ShapeError(f"rows {rows} is not at least 0")
    if not isinstance(config, TreeConfig) or config.paths is not None:
        return _beside_dense(_explain_routed(config, rows, dtype, threads, backend))
    free = backend is None and forced_backend() is None
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


def _explain_routed(
    config: TreeConfig | RoutedSizes, rows: int, dtype: torch.dtype, threads: int | None, backend: str | None
) -> Explanation:
    """Of a layer behind a router, an FFF with paths among them."""
    if backend is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.empty(0, config.in_features, dtype=dtype, device=device)
        w_in, w_out = x.new_empty(1, config.leaf_in_rows, 1), x.new_empty(1, config.leaf_width, 1)
        backend = conditional_interface.resolve(None, x, Leaves(w_in, None, w_out, None), config.activation)
    elif backend not in _FORMS:
        raise BackendUnavailable(f"backend {backend!r} is not one of {', '.join(_FORMS)}")
    form, reason = _FORMS[backend]
    work = cost.work_of(config)
    choices = {"leaves": work.leaves, "k": work.chosen, "routing_scores": work.routing_scores}
    if backend != "native":
        return Explanation(backend, form, reason, choices)
    threads = threads or torch.get_num_threads()
    predicted = cost.routed_us(work, rows, threads, dtype.itemsize)
    dense_us = cost.products_us(work.leaves * work.leaf_weights, rows, threads)
    return Explanation(backend, form, reason, {**choices, "threads": threads}, predicted, dense_us)
