"""Dense products in 8 and 4 bits: exact against whole numbers, close to float64, the same bits alone and in a batch."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from conftest import make_rows, supported_isas
from fastff.errors import FastffError, ShapeError
from fastff.ops import native
from fastff.ops.native_linear import PackedMatrix

SHAPES = [(1, 1), (64, 64), (65, 66), (130, 300), (48, 1024), (200, 33)]  # out_features, in_features


def rounded(x, bits, in_features):
    """Whole numbers and scales of rows, as the core rounds them: in float32."""
    limit = 127 if bits == 8 else min(32000, (2**31 - 1) // (127 * in_features) - 1)
    largest = x.abs().amax(1, keepdim=True).float()
    factor = torch.tensor(float(limit)).float() / largest
    return torch.round(x.float() * factor).double(), (largest / limit).double()


def reference(weights, x, bits):
    """The product of the rounded numbers in float64: exact but for the scales."""
    rows, row_scale = rounded(x, bits, weights.shape[1])
    numbers, scale = rounded(weights, 8, 1)
    return rows @ numbers.T * row_scale * scale.T


@pytest.mark.parametrize("bits", [8, 16])
@pytest.mark.parametrize(("out_features", "in_features"), SHAPES)
def test_products_are_those_of_the_rounded_numbers(out_features, in_features, bits, tile_isa, threads):
    weights = make_rows(out_features, in_features, seed=3, dtype=torch.float32)
    matrix = PackedMatrix(weights)
    for rows in (1, 2, 3, 7, 40):
        x = make_rows(rows, in_features, seed=rows, dtype=torch.float32)
        got, want = matrix.multiply(x, bits=bits), reference(weights, x, bits)
        # Beside the rounding of two scales a factor may differ in its last bit, which moves a number that lies halfway.
        tolerance = 1e-5 * want.abs().max() + 3e-4 * (bits == 8) + 1e-5
        assert (got - want).abs().max() <= tolerance, rows


def test_rounding_to_16_bits_costs_nothing_beside_that_of_the_weights(tile_isa):
    weights, x = make_rows(256, 576, seed=1), make_rows(5, 576, seed=2)
    numbers, scale = rounded(weights, 8, 1)
    got = PackedMatrix(weights).multiply(x.float(), bits=16)
    want = x @ (numbers * scale).T
    assert (got - want).norm() / want.norm() < 1e-4
    exact = x @ weights.T
    assert (PackedMatrix(weights).multiply(x.float(), bits=8) - exact).norm() / exact.norm() < 0.015


def test_a_row_has_the_same_bits_alone_and_in_a_batch_at_any_number_of_threads(tile_isa):
    matrix, x = PackedMatrix(make_rows(200, 130)), make_rows(70, 130, dtype=torch.float32)
    for bits in (8, 16):
        torch.set_num_threads(1)
        together = matrix.multiply(x, bits=bits)
        alone = torch.cat([matrix.multiply(row[None], bits=bits) for row in x])
        assert torch.equal(together, alone)
        torch.set_num_threads(2)
        assert torch.equal(matrix.multiply(x, bits=bits), alone)


def test_every_instruction_set_sums_the_same_whole_numbers():
    """Only the last roundings may differ: the order of a product of three factors, or a fused addition."""
    matrix, x = PackedMatrix(make_rows(100, 700)), make_rows(33, 700, dtype=torch.float32)
    before, results = native.isa(), {}
    for name in supported_isas(dots=True, tiles=True):
        native.set_isa(name)
        results[name] = matrix.multiply(x, bits=16)
    native.set_isa(before)
    first = results.pop("scalar")
    for name, other in results.items():
        assert (other - first).abs().max() <= 2e-6 * first.abs().max(), name


@pytest.mark.parametrize("rows", [1, 9, 35])
def test_bias_activation_and_residual(rows, tile_isa):
    weights, bias = make_rows(130, 96, seed=3) / 10, make_rows(130, seed=4)
    x, residual = make_rows(rows, 96, dtype=torch.float32), make_rows(rows, 130, seed=5, dtype=torch.float32)
    matrix = PackedMatrix(weights)
    plain = matrix.multiply(x).double()
    for name, function in {"gelu": F.gelu, "silu": F.silu, "relu": F.relu}.items():
        got = matrix.multiply(x, bias.float(), activation=name, add_to=residual)
        want = function(plain + bias) + residual
        assert (got - want).abs().max() < 2e-6


@pytest.mark.parametrize("neurons", [1, 32, 50, 96])
def test_gated_pairs(neurons, tile_isa):
    weights, bias = make_rows(2 * neurons, 64, seed=3), make_rows(2 * neurons, seed=4)
    x = make_rows(11, 64, dtype=torch.float32)
    gate, value = (PackedMatrix(weights).multiply(x).double() + bias).chunk(2, 1)
    got = PackedMatrix(weights, gated=True).multiply(x, bias.float())
    want = F.silu(gate) * value
    assert got.shape == (11, neurons)
    assert (got - want).abs().max() < 1e-5 * (1 + want.abs().max())


def test_rows_that_are_not_finite_stay_apart(tile_isa):
    matrix, x = PackedMatrix(make_rows(70, 64)), make_rows(40, 64, dtype=torch.float32)
    want = matrix.multiply(x, bits=16)
    x[3, 5], x[20, 0], x[30] = float("nan"), float("inf"), 0
    got = matrix.multiply(x, bits=16)
    rest = [i for i in range(40) if i not in (3, 20, 30)]
    assert got[3].isnan().all()
    assert got[20].isnan().all()
    assert not got[30].any()
    assert torch.equal(got[rest], want[rest])


def test_a_full_row_of_largest_numbers_does_not_overflow(tile_isa):
    weights, x = torch.full((64, 12288), -1.0), torch.full((9, 12288), 1.0)
    for bits in (8, 16):
        assert (PackedMatrix(weights).multiply(x, bits=bits) + 12288).abs().max() <= 0.01


def grouped_weights(matrix, rows):
    """The weights that a matrix in groups holds: its products with unit vectors, exact but for a last bit."""
    return matrix.multiply(torch.eye(matrix.in_features), bits=16).T.double()[:rows]


@pytest.mark.parametrize(
    ("form", "most"), [("int8-groups", 0.006), ("int8-groups64", 0.007), ("int4", 0.09), ("int4-least", 0.09)]
)
def test_weights_in_groups_are_near_those_given(form, most):
    group = 64 if form == "int8-groups64" else 32
    weights = make_rows(130, 300, seed=3, dtype=torch.float32)
    weights[:, group : 2 * group] *= 100  # a group of its own has a scale of its own
    weights[:, 2 * group : 3 * group] = 0
    kept = grouped_weights(PackedMatrix(weights, form=form), 130)
    assert not kept[:, 2 * group : 3 * group].any()
    for part in (slice(0, group), slice(group, 2 * group), slice(3 * group, 300)):
        assert (kept[:, part] - weights[:, part]).norm() / weights[:, part].norm() < most


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("form", ["int8-groups", "int8-groups64", "int4", "int4-least"])
def test_products_with_groups(form, gated, tile_isa, threads):
    """Those of the weights that are held, alone and in a batch to the bit, whichever kernel takes the rows."""
    for out_features, in_features in ((1, 1), (66, 96), (130, 300)):
        weights = make_rows(out_features * (1 + gated), in_features, seed=3, dtype=torch.float32)
        matrix, bias = PackedMatrix(weights, gated=gated, form=form), make_rows(len(weights), seed=4)
        kept = grouped_weights(PackedMatrix(weights, form=form), len(weights))
        for bits, rows in ((8, 5), (16, 1), (16, 33)):
            x = make_rows(rows, in_features, seed=rows, dtype=torch.float32)
            numbers, scale = rounded(x, bits, in_features)
            want = numbers * scale @ kept.T + bias
            if gated:
                gate, value = want.chunk(2, 1)
                want = F.silu(gate) * value
            got = matrix.multiply(x, bias.float(), bits=bits)
            tolerance = 3e-5 * (1 + want.abs().max()) + 3e-3 * (bits == 8)
            assert (got - want).abs().max() <= tolerance, (out_features, bits, rows)
            alone = torch.cat([matrix.multiply(row[None], bias.float(), bits=bits) for row in x])
            assert torch.equal(got, alone)


def test_blocks_of_gguf_are_kept(tile_isa):
    """By hand, from the format's description: a scale, with Q4_1 a minimum, and 32 numbers."""
    generator = torch.Generator().manual_seed(0)
    for form, size, head in (("int8-groups", 34, 2), ("int4", 18, 2), ("int4-least", 20, 4)):
        blocks = torch.randint(256, (40, 3, size), dtype=torch.uint8, generator=generator)
        halves = torch.rand(40, 3, head // 2, generator=generator).half()
        blocks[..., :head] = halves.view(torch.uint8)
        numbers = blocks[..., head:].long()
        if form == "int8-groups":
            numbers = numbers.to(torch.int8).long()
        else:
            numbers = torch.cat([numbers & 15, numbers >> 4], -1) - 8 * (form == "int4")
        want = numbers * halves[..., :1].double() + (halves[..., 1:].double() if form == "int4-least" else 0)
        got = grouped_weights(PackedMatrix.of_blocks(blocks, form=form), 40)
        assert (got - want.flatten(1)).abs().max() <= 2e-6 * want.abs().max(), form
        blocks[7, 1, 1] = 0x7C  # a scale of infinity
        with pytest.raises(FastffError, match="scale of a group"):
            PackedMatrix.of_blocks(blocks, form=form)
    with pytest.raises(ShapeError, match=r"\(40, 3, 20\)"):
        PackedMatrix.of_blocks(blocks, form="int4")
    with pytest.raises(FastffError, match="too large for half precision"):
        PackedMatrix(torch.full((1, 32), 1e9), form="int8-groups")


def test_what_cannot_be_is_refused():
    with pytest.raises(FastffError, match="NaN"):
        PackedMatrix(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(FastffError, match="in_features 131073"):
        PackedMatrix(torch.zeros(1, 131073))
    with pytest.raises(ShapeError, match=r"\(3, 4\)"):
        PackedMatrix(torch.zeros(3, 4), gated=True)
    matrix = PackedMatrix(torch.zeros(3, 4))
    with pytest.raises(ShapeError, match=r"\(2, 5\)"):
        matrix.multiply(torch.zeros(2, 5))
    x = torch.zeros(2, 4)
    for wrong in ({"x": x.double()}, {"bias": torch.zeros(2)}, {"add_to": torch.zeros(1, 3)}):
        with pytest.raises(ShapeError, match=r"is not \(.*\) of torch.float32"):
            matrix.multiply(**{"x": x, **wrong})
    with pytest.raises(FastffError, match="bits"):
        matrix.multiply(torch.zeros(2, 4), bits=7)
    with pytest.raises(FastffError, match="gated"):
        matrix.multiply(torch.zeros(2, 4), activation="swiglu")
    assert matrix.multiply(torch.zeros(0, 4)).shape == (0, 3)
