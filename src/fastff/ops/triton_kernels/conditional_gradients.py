"""Gradients of the leaves' weights: entries of the neurons times rows of x or grad_y, summed over the pairs of a leaf.

A program sums one chunk of one leaf's pairs. Leaves that many rows choose have several, so that the time does not hang
on how even the load is: at the beginning of training it is not. What more than one chunk gave is added by another
launch, in the order of the pairs: sums have one order, and need no atomics. Few pairs are one chunk whatever the load,
and need no other launch.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from fastff.ops.triton_kernels.conditional_plan import Plan
from fastff.ops.triton_kernels.launch import apply, launch, new
from fastff.ops.triton_kernels.linear import precision_of, tables
from fastff.ops.triton_kernels.plan import ceil_div, power_of_two
from fastff.ops.triton_kernels.sort import Groups, keys_of, look_up
from fastff.ops.weights import Leaves


@dataclass(frozen=True)
class Product:
    """grad[leaf, c] = the sum of entries[pair, c] times rows[row of the pair] over the pairs of each leaf.

    entries: (rows, k, [columns]); rows: (rows, features); grad: (leaves, [columns], features)."""

    entries: Tensor
    rows: Tensor
    grad: Tensor

    def shape(self, plan: Plan, number: int) -> dict[str, int]:
        """Compile-time arguments: columns, features, the tile of both, and how many tiles there are."""
        features = self.rows.shape[1]
        count = self.grad.numel() // (self.grad.shape[0] * features)
        columns = max(16, min(plan.outer.columns, power_of_two(count)))
        wide = max(16, min(plan.outer.outer, power_of_two(features)))
        sizes = {"COUNT": count, "D": features, "COLUMNS": columns, "BN": wide}
        sizes["PARTS"] = ceil_div(features, wide) * ceil_div(count, columns)
        return {f"{name}{number}": size for name, size in sizes.items()}


def weight_gradients(
    of_neurons: tuple[Tensor, Tensor, Tensor], x: Tensor, grad_y: Tensor, groups: Groups, leaves: Leaves, plan: Plan
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of w_in, b_in, w_out, b_out; an empty tensor for an absent bias.

    of_neurons: d scores (rows, k, in_rows), the forward's coefficients (rows, k, width), gate (rows, k)."""
    d_scores, coefficient, gate = of_neurons
    w_in, b_in, w_out, b_out = leaves
    grad_w_in, grad_w_out = new(w_in, *w_in.shape), new(w_out, *w_out.shape)
    _sum_products([Product(d_scores, x, grad_w_in), Product(coefficient, grad_y, grad_w_out)], groups, plan)
    grad_b_in, grad_b_out = (new(x, *(0,) if bias is None else bias.shape) for bias in (b_in, b_out))
    biases = []
    if b_in is not None:
        ones = new(x, x.shape[0], 1)
        apply(_fill_with_one, ones)
        biases.append(Product(d_scores, ones, grad_b_in))
    if b_out is not None:
        biases.append(Product(gate, grad_y, grad_b_out))
    if biases:
        _sum_products(biases, groups, plan)
    return grad_w_in, grad_b_in, grad_w_out, grad_b_out


def _fill_with_one(ones: Tensor) -> None:
    ones.fill_(1)


def _sum_products(products: list[Product], groups: Groups, plan: Plan) -> None:
    """One or two products, side by side in one launch."""
    blocks, apart = groups.order.shape
    leaves, slots = products[0].grad.shape[0], products[0].entries.shape[1]
    pairs = products[0].entries.shape[0] * slots
    chunk = pairs if groups.few else plan.chunk
    most = ceil_div(pairs, chunk)
    shape: dict[str, int] = {}
    sums, given = [], []
    for number in range(2):
        product = products[min(number, len(products) - 1)]
        sizes = product.shape(plan, number)
        if number == len(products):
            sizes[f"PARTS{number}"] = 0
        # No more than two chunks for every full one belong to leaves that have several.
        parts = new(product.grad, 2 * most, *product.grad.shape[1:], dtype=torch.float32)
        given += [product.entries, product.rows, product.grad, parts]
        sums += [product.grad, parts]
        shape |= sizes
    across = shape["PARTS0"] + shape["PARTS1"]
    shape |= {"BLOCKS": blocks, "GROUPS": groups.groups, "FEW": groups.few, "CHUNK": chunk}
    tiles = plan.outer
    launch(
        _outer_kernel, (leaves if groups.few else most + min(leaves, pairs), across),
        *given, *tables(groups), apart, SLOTS=slots, BR=tiles.inner,
        PRECISION=precision_of(products[0].rows.dtype), **shape, num_warps=tiles.warps, num_stages=tiles.stages,
    )  # fmt: skip
    if not groups.few:
        launch(_add_kernel, (leaves, across), *sums, groups.table, **shape, num_warps=4)


@triton.jit
def _chunks_of(table_ptr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, CHUNK: tl.constexpr):
    """How many chunks each leaf (GROUPS,) has: of its pairs in all blocks, one after another."""
    leaf = tl.arange(0, GROUPS)
    total = tl.zeros((GROUPS,), tl.int32)
    for block in range(BLOCKS):
        at = table_ptr + block * 4 * (GROUPS + 1) + leaf
        total += tl.load(at + 1) - tl.load(at)
    return (total + CHUNK - 1) // CHUNK


@triton.jit
def _before(chunks, leaf, GROUPS: tl.constexpr):
    """Of the chunks that belong to leaves with several, those of the leaves before `leaf`: places of partial sums."""
    return tl.sum(tl.where((tl.arange(0, GROUPS) < leaf) & (chunks > 1), chunks, 0), 0)


@triton.jit
def _tile_of(part, COUNT: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr):
    """Columns and features of a part of a gradient."""
    CHUNKS: tl.constexpr = (COUNT + COLUMNS - 1) // COLUMNS
    return (part % CHUNKS) * COLUMNS + tl.arange(0, COLUMNS), (part // CHUNKS) * BN + tl.arange(0, BN)


@triton.jit
def _sum_chunk(
    entries_ptr, rows_ptr, grad_ptr, parts_ptr, order_ptr, table_ptr,
    apart, leaf, number, several, place, part,
    SLOTS: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr,
    COUNT: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr, BR: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Chunk `number` of a leaf; its sums go to the gradient, or where there are several to `place` of the parts.
    Features are the rows of the product: matrix units take at least 64, and leaves may be narrower."""
    c, n = _tile_of(part, COUNT, COLUMNS, BN)
    wanted, inside = c < COUNT, n < D
    total = tl.zeros((BN, COLUMNS), tl.float32)
    first, passed = number * CHUNK, tl.zeros((), tl.int32)
    for block in range(BLOCKS):
        if FEW > 0:
            low, high = look_up(keys_of(table_ptr, apart, FEW), order_ptr, leaf)
        else:
            table = table_ptr + block * 4 * (GROUPS + 1) + leaf
            low, high = tl.load(table), tl.load(table + 1)
        begin, end = low + tl.maximum(first - passed, 0), tl.minimum(high, low + first + CHUNK - passed)
        passed += high - low
        order = order_ptr + (tl.zeros((), tl.int64) + block) * apart
        for start in range(begin, end, BR):
            at = start + tl.arange(0, BR)
            there = at < end
            item = tl.load(order + at, mask=there, other=0).to(tl.int64)
            entry_at = entries_ptr + (item * COUNT)[:, None] + c[None, :]
            entry = tl.load(entry_at, mask=there[:, None] & wanted[None, :], other=0.0)
            row_at = rows_ptr + (item // SLOTS)[:, None] * D + n[None, :]
            row = tl.load(row_at, mask=there[:, None] & inside[None, :], other=0.0)
            total = tl.dot(tl.trans(row), entry, total, input_precision=PRECISION)
    total = tl.trans(total)
    mask = wanted[:, None] & inside[None, :]
    if several:
        part_at = parts_ptr + (place.to(tl.int64) * COUNT + c)[:, None] * D + n[None, :]
        tl.store(part_at, total, mask=mask)
    else:
        grad_at = grad_ptr + (leaf.to(tl.int64) * COUNT + c)[:, None] * D + n[None, :]
        tl.store(grad_at, total.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _outer_kernel(
    entries0_ptr, rows0_ptr, grad0_ptr, parts0_ptr, entries1_ptr, rows1_ptr, grad1_ptr, parts1_ptr, order_ptr,
    table_ptr,
    apart,
    SLOTS: tl.constexpr, BLOCKS: tl.constexpr, GROUPS: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr,
    COUNT0: tl.constexpr, D0: tl.constexpr, COLUMNS0: tl.constexpr, BN0: tl.constexpr, PARTS0: tl.constexpr,
    COUNT1: tl.constexpr, D1: tl.constexpr, COLUMNS1: tl.constexpr, BN1: tl.constexpr, PARTS1: tl.constexpr,
    BR: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A chunk of one leaf's pairs, a part of one of two gradients. The launch grid is an upper bound of the chunks.
    FEW: every leaf is one chunk, those without a pair too."""
    chunk, part = tl.program_id(0), tl.program_id(1)
    if FEW > 0:
        leaf, number, place = chunk, tl.zeros((), tl.int32), tl.zeros((), tl.int32)
        several = False
    else:
        chunks = _chunks_of(table_ptr, BLOCKS, GROUPS, CHUNK)
        ends = tl.cumsum(chunks, 0)
        leaf = tl.sum((ends <= chunk).to(tl.int32), 0)
        own = tl.arange(0, GROUPS) == leaf
        count = tl.sum(tl.where(own, chunks, 0), 0)
        number = chunk - (tl.sum(tl.where(own, ends, 0), 0) - count)
        place = _before(chunks, leaf, GROUPS) + number
        several = count > 1
    if leaf < GROUPS:
        if part < PARTS0:
            _sum_chunk(
                entries0_ptr, rows0_ptr, grad0_ptr, parts0_ptr, order_ptr, table_ptr, apart, leaf, number, several,
                place, part, SLOTS, BLOCKS, GROUPS, FEW, CHUNK, COUNT0, D0, COLUMNS0, BN0, BR, PRECISION,
            )  # fmt: skip
        else:
            _sum_chunk(
                entries1_ptr, rows1_ptr, grad1_ptr, parts1_ptr, order_ptr, table_ptr, apart, leaf, number, several,
                place, part - PARTS0, SLOTS, BLOCKS, GROUPS, FEW, CHUNK, COUNT1, D1, COLUMNS1, BN1, BR, PRECISION,
            )  # fmt: skip


@triton.jit
def _add_parts(
    grad_ptr, parts_ptr, leaf, first, count, part,
    COUNT: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    c, n = _tile_of(part, COUNT, COLUMNS, BN)
    mask = (c < COUNT)[:, None] & (n < D)[None, :]
    total = tl.zeros((COLUMNS, BN), tl.float32)
    for number in range(count):
        part_at = parts_ptr + ((first + number).to(tl.int64) * COUNT + c)[:, None] * D + n[None, :]
        total += tl.load(part_at, mask=mask, other=0.0)
    at = grad_ptr + (leaf.to(tl.int64) * COUNT + c)[:, None] * D + n[None, :]
    tl.store(at, total.to(grad_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _add_kernel(
    grad0_ptr, parts0_ptr, grad1_ptr, parts1_ptr, table_ptr,
    BLOCKS: tl.constexpr, GROUPS: tl.constexpr, FEW: tl.constexpr, CHUNK: tl.constexpr,
    COUNT0: tl.constexpr, D0: tl.constexpr, COLUMNS0: tl.constexpr, BN0: tl.constexpr, PARTS0: tl.constexpr,
    COUNT1: tl.constexpr, D1: tl.constexpr, COLUMNS1: tl.constexpr, BN1: tl.constexpr, PARTS1: tl.constexpr,
):  # fmt: skip
    """Gradients of leaves without a pair become zero, those of leaves with several chunks the sum of their parts."""
    leaf, part = tl.program_id(0), tl.program_id(1)
    chunks = _chunks_of(table_ptr, BLOCKS, GROUPS, CHUNK)
    count = tl.sum(tl.where(tl.arange(0, GROUPS) == leaf, chunks, 0), 0)
    if count != 1:
        first = _before(chunks, leaf, GROUPS)
        if part < PARTS0:
            _add_parts(grad0_ptr, parts0_ptr, leaf, first, count, part, COUNT0, D0, COLUMNS0, BN0)
        else:
            _add_parts(grad1_ptr, parts1_ptr, leaf, first, count, part - PARTS0, COUNT1, D1, COLUMNS1, BN1)
