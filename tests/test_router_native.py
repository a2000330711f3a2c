"""Routers of the C++ core against plain float64: routes, gates, and quantised routes equal to those of fp32."""

from __future__ import annotations

import contextlib
import ctypes
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from conftest import SANITIZED, make_rows, supported_isas
from fastff.ops import native
from fastff.ops.library import library, pointer
from pairs import every_pair

OK, BAD_ARGUMENT = 0, 1
TREES, PATHS, FLAT, PRODUCT_KEYS = range(4)
UNGATED, BOUNDARY, BOUNDARY_MIN, NORMALISED = range(4)
WEIGHTS = {"f32": 0, "bf16": 1, "int8": 2}
ROWS = (1, 3, 8, 9, 24, 25, 130)
ISAS = supported_isas(dots=True, tiles=True)


class CRouter(ctypes.Structure):
    """fastff_router of csrc/fastff.h."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("trees", ctypes.c_int64),
        ("candidates", ctypes.c_int64),
        ("chosen", ctypes.c_int64),
        ("kind", ctypes.c_int32),
        ("depth", ctypes.c_int32),
        ("gate", ctypes.c_int32),
        ("reserved", ctypes.c_int32),
        ("tau", ctypes.c_double),
    )


@dataclass(frozen=True)
class Case:
    """A router's sizes and, from a seed, its weights."""

    kind: int
    in_features: int = 68
    trees: int = 1
    candidates: int = 0
    chosen: int = 1
    depth: int = 0
    gate: int = NORMALISED
    bias: bool = False
    balanced: bool = False

    @property
    def c(self):
        sizes = (self.in_features, self.trees, self.candidates, self.chosen, self.kind, self.depth, self.gate, 0, 0.5)
        return CRouter(*sizes)

    @property
    def per_row(self):
        return self.trees * self.chosen

    @property
    def weight_shape(self):
        if self.kind in (TREES, PATHS):
            return (self.trees, 2**self.depth - 1, self.in_features)
        if self.kind == FLAT:
            return (self.candidates, self.in_features)
        return (2, self.candidates, self.in_features // 2)

    @property
    def balance_shape(self):
        if self.kind == PATHS:
            return (self.trees, 2 ** (self.depth + 1) - 1)
        return (self.candidates,) if self.kind == FLAT else (self.candidates**2,)

    def weights(self, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def random(shape, scale):
            return (scale * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

        w = random(self.weight_shape, self.in_features**-0.5)
        b = random(self.weight_shape[:-1], 0.5) if self.bias else None
        return w, b, random(self.balance_shape, 0.1) if self.balanced else None


CASES = {
    "forest": Case(TREES, trees=9, depth=5, gate=BOUNDARY),
    "forest-deep": Case(TREES, in_features=70, trees=3, depth=8, gate=BOUNDARY, bias=True),  # deeper than tiles compute
    "forest-min-bias": Case(TREES, trees=3, depth=4, gate=BOUNDARY_MIN, bias=True),
    "forest-ungated": Case(TREES, in_features=33, trees=5, depth=3, gate=UNGATED),
    "stump": Case(TREES, trees=2, depth=1, gate=BOUNDARY),
    "leaf-alone": Case(TREES, trees=2, depth=0, gate=BOUNDARY),
    "paths": Case(PATHS, depth=8, chosen=8),
    "paths-balanced": Case(PATHS, trees=2, depth=5, chosen=3, bias=True, balanced=True),
    "paths-all": Case(PATHS, depth=3, chosen=8),
    "paths-many": Case(PATHS, in_features=24, depth=7, chosen=40, balanced=True),
    "flat": Case(FLAT, candidates=96, chosen=3),
    "flat-balanced": Case(FLAT, in_features=31, candidates=41, chosen=7, bias=True, balanced=True),
    "flat-all": Case(FLAT, candidates=5, chosen=5, gate=UNGATED),
    "product-keys": Case(PRODUCT_KEYS, candidates=12, chosen=9),
    "product-keys-balanced": Case(PRODUCT_KEYS, in_features=34, candidates=7, chosen=5, bias=True, balanced=True),
    "product-keys-all": Case(PRODUCT_KEYS, candidates=3, chosen=9),
}


def route(case, weights, x, threads=1):
    """Leaves, gates and scores of fastff_route."""
    rows = x.shape[0]
    scored = case.trees * case.depth if case.kind == TREES else case.per_row
    leaf = torch.full((rows, case.per_row), -1)
    gate, scores = (torch.full((rows, n), float("nan"), dtype=x.dtype) for n in (case.per_row, scored))
    name = {torch.float32: "fastff_route_f32", torch.float64: "fastff_route_f64"}[x.dtype]
    status = getattr(library(), name)(
        ctypes.byref(case.c),
        *map(pointer, weights),
        pointer(x),
        ctypes.c_int64(rows),
        *map(pointer, (leaf, gate, scores)),
        threads,
    )
    assert status == OK, library().fastff_error().decode()
    return leaf, gate, scores


class Packed:
    def __init__(self, case, weights, kind):
        self.case, self.handle = case, ctypes.c_void_p()
        status = library().fastff_router_pack_f32(
            ctypes.byref(case.c), *map(pointer, weights), WEIGHTS[kind], ctypes.byref(self.handle)
        )
        assert status == OK, library().fastff_error().decode()

    def route(self, x, threads=1):
        leaf = torch.full((x.shape[0], self.case.per_row), -1)
        gate = torch.full(leaf.shape, float("nan"))
        rows = ctypes.c_int64(x.shape[0])
        status = library().fastff_router_infer_f32(
            self.handle, *map(pointer, (x,)), rows, *map(pointer, (leaf, gate)), threads
        )
        assert status == OK, library().fastff_error().decode()
        return leaf, gate

    def __del__(self):
        library().fastff_router_free(self.handle)


def order(value):
    """Indices from the best to the worst: NaN last, equal ones by index."""
    return sorted(range(len(value)), key=lambda i: (value[i] != value[i], -value[i] if value[i] == value[i] else 0, i))


def best(score, balance, k):
    """The k best, ascending, and by how much the last of them beats the next."""
    value = score if balance is None else torch.sigmoid(score) + balance
    ranked = order(value.tolist())
    margin = (value[ranked[k - 1]] - value[ranked[k]]).item() if k < len(ranked) else float("inf")
    return sorted(ranked[:k]), margin


def normalised(score):
    p = torch.sigmoid(score)
    return p / p.sum() * len(p)


def tree_row(case, score):
    """leaf, gate, margin and path scores of a greedy descent by one tree's node scores."""
    node, gate, margin, path = 0, torch.ones((), dtype=score.dtype), float("inf"), []
    for _ in range(case.depth):
        s = score[node]
        path.append(s.item())
        factor = torch.tanh(s.abs() / 0.5)
        if case.gate == BOUNDARY:
            gate = gate * factor
        elif case.gate == BOUNDARY_MIN:
            gate = torch.minimum(gate, factor)
        margin = min(margin, s.abs().item())
        node = 2 * node + 1 + int(s > 0)
    return node - (2**case.depth - 1), gate.item(), margin, path


def path_row(case, score, balance):
    kept, sums, margin = [0], [torch.zeros((), dtype=score.dtype)], float("inf")
    for level in range(case.depth):
        first = 2**level - 1
        sums = [s + sign * score[first + n] for n, s in zip(kept, sums, strict=True) for sign in (-1, 1)]
        kept = [child for n in kept for child in (2 * n, 2 * n + 1)]
        if len(kept) > case.chosen:
            heap = [2 ** (level + 1) - 1 + n for n in kept]
            index, lead = best(torch.stack(sums), None if balance is None else balance[heap], case.chosen)
            margin = min(margin, lead)
            kept, sums = [kept[i] for i in index], [sums[i] for i in index]
    return kept, torch.stack(sums), margin


def reference(case, weights, x):
    """leaf, gate, scores and margin of every row, row by row."""
    w, b, balance = weights
    leaves, gates, scores, margins = [], [], [], []
    if case.kind == PRODUCT_KEYS:
        z = torch.stack([half @ keys.T for half, keys in zip(x.chunk(2, -1), w, strict=True)], 1)
    else:
        z = x @ w.flatten(0, -2).T
    z = z.view(x.shape[0], *w.shape[:-1]) + (0 if b is None else b)
    for row in z:
        leaf, gate, score, margin = [], [], [], float("inf")
        if case.kind in (TREES, PATHS):
            for t in range(case.trees):
                if case.kind == TREES:
                    own, c, lead, path = tree_row(case, row[t])
                    leaf.append(t * 2**case.depth + own)
                    gate.append(c)
                    score += path
                else:
                    kept, sums, lead = path_row(case, row[t], None if balance is None else balance[t])
                    leaf += [t * 2**case.depth + n for n in kept]
                    gate += normalised(sums).tolist()
                    score += sums.tolist()
                margin = min(margin, lead)
        else:
            value = row if case.kind == FLAT else (row[0][:, None] + row[1]).flatten()
            leaf, margin = best(value, balance, case.chosen)
            gate = normalised(value[leaf]).tolist() if case.gate == NORMALISED else [1.0] * case.chosen
            score = value[leaf].tolist()
        leaves.append(leaf)
        gates.append(gate)
        scores.append(score)
        margins.append(margin)
    as_float = {"dtype": x.dtype}
    shape = (x.shape[0], -1)
    return (
        torch.tensor(leaves),
        torch.tensor(gates, **as_float),
        torch.tensor(scores, **as_float).view(shape)
        if case.depth or case.kind != TREES
        else torch.empty(x.shape[0], 0, **as_float),
        torch.tensor(margins, **as_float),
    )


@pytest.mark.parametrize("name", CASES)
def test_float64_is_the_reference(name, isa):
    case = CASES[name]
    weights, x = case.weights(torch.float64), make_rows(40, case.in_features)
    leaf, gate, scores, margin = reference(case, weights, x)
    decided = margin > 1e-9
    assert decided.double().mean() > 0.9
    got = route(case, weights, x)
    assert torch.equal(got[0][decided], leaf[decided])
    assert (got[1][decided] - gate[decided]).abs().max() <= 1e-12
    assert scores.numel() == 0 or (got[2][decided] - scores[decided]).abs().max() <= 1e-12


@pytest.mark.parametrize("name", CASES)
def test_float32_errs_as_float32_does(name, isa):
    case = CASES[name]
    weights, x = case.weights(torch.float32), make_rows(40, case.in_features, dtype=torch.float32)
    exact = reference(case, [None if w is None else w.double() for w in weights], x.double())
    plain = reference(case, weights, x)
    got = route(case, weights, x)
    decided = exact[3] > 1e-5
    assert decided.double().mean() > 0.9
    assert torch.equal(got[0][decided], exact[0][decided])
    for mine, torchs, want in zip(got[1:], plain[1:3], exact[1:3], strict=True):
        if want.numel():
            allowed = 2 * (torchs - want)[decided].abs().max() + 1e-6
            assert (mine - want)[decided].abs().max() <= allowed


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_quantised_routes_are_those_of_float32(name, isa):
    case = CASES[name]
    weights, x = case.weights(torch.float32), make_rows(1500, case.in_features, dtype=torch.float32)
    leaf, gate, _ = route(case, weights, x)
    for kind in WEIGHTS:
        got = Packed(case, weights, kind).route(x)
        assert torch.equal(got[0], leaf), kind
        assert (got[1] - gate).abs().max() <= (0 if kind == "f32" else 1e-3), kind


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_scores_that_sixteen_bits_cannot_tell_apart_are_decided_in_fp32(name, isa):
    """Weight rows that differ in the last bits of fp32 alone: scores tie, nearly tie or are nearly zero everywhere."""
    case = replace(CASES[name], bias=False)
    w, _, balance = case.weights(torch.float32)
    like = make_rows(1, w.shape[-1], seed=5, dtype=torch.float32)
    w = like * (1 + 1e-7 * w)
    x = make_rows(200, case.in_features, dtype=torch.float32)
    if case.kind == TREES:  # and rows that score nearly zero
        x = x - (x @ like.T / (like @ like.T)) * like
    leaf, _, _ = route(case, (w, None, balance), x)
    for kind in WEIGHTS:
        assert torch.equal(Packed(case, (w, None, balance), kind).route(x)[0], leaf), kind


BALANCED = [name for name, case in CASES.items() if case.balanced]


@every_pair(name=BALANCED, size=(0.1, 4.0, 30.0), isa=ISAS)
def test_quantised_routes_hold_where_sigmoids_saturate(name, size, isa):
    """There a doubt of a score is a far smaller one of what is compared, beside balances in steps as training makes."""
    case = CASES[name]
    w, b, balance = case.weights(torch.float32)
    weights, x = (w, b, (balance * 50).round() / 1000), size * make_rows(150, case.in_features, dtype=torch.float32)
    leaf, _, _ = route(case, weights, x)
    for kind in WEIGHTS:
        assert torch.equal(Packed(case, weights, kind).route(x)[0], leaf), kind


@every_pair(name=CASES, kind=WEIGHTS, isa=ISAS)
def test_a_row_has_the_same_bits_in_any_batch(name, kind, isa):
    case = CASES[name]
    weights, x = case.weights(torch.float32), make_rows(130, case.in_features, dtype=torch.float32)
    packed = Packed(case, weights, kind)
    whole = packed.route(x)
    for threads in (1, 3):
        for rows in ROWS:
            part = packed.route(x[:rows].contiguous(), threads)
            assert torch.equal(part[0], whole[0][:rows])
            assert torch.equal(part[1].view(torch.int32), whole[1][:rows].view(torch.int32))


@contextlib.contextmanager
def memory_of_others():
    """What malloc gives holds what others left there, not zeros."""
    perturb, mallopt = -6, getattr(ctypes.CDLL(None), "mallopt", lambda *_: None)
    mallopt(perturb, 1)
    try:
        yield
    finally:
        mallopt(perturb, 0)


@pytest.mark.parametrize("kind", WEIGHTS)
def test_a_row_alone_reads_nothing_of_the_lanes_beside_it(kind):
    """A beam of so many nodes is chosen row by row, and its lanes without a row are nobody's."""
    case = Case(PATHS, in_features=24, depth=8, chosen=70)
    packed, x = Packed(case, case.weights(torch.float32), kind), make_rows(16, 24, dtype=torch.float32)
    leaf, gate = packed.route(x)
    with ThreadPoolExecutor(1) as fresh, memory_of_others():  # a thread keeps its own memory, and this one has none yet
        alone = fresh.submit(packed.route, x[:1].contiguous()).result()
    assert torch.equal(alone[0], leaf[:1])
    assert torch.equal(alone[1], gate[:1])


@every_pair(name=("paths", "flat", "product-keys"), kind=("plain", *WEIGHTS), isa=ISAS)
def test_ties_choose_the_lower_leaf(name, kind, isa):
    case = CASES[name]
    w, x = torch.zeros(case.weight_shape), make_rows(30, case.in_features, dtype=torch.float32)
    weights = (w, None, None)
    leaf = route(case, weights, x)[0] if kind == "plain" else Packed(case, weights, kind).route(x)[0]
    assert torch.equal(leaf, torch.arange(case.chosen).expand(30, -1))


@pytest.mark.parametrize("kind", ["plain", *WEIGHTS])
def test_zero_scores_turn_left_and_close_the_gate(kind, isa):
    case = CASES["forest"]
    weights, x = case.weights(torch.float32), torch.zeros(30, case.in_features)
    leaf, gate = route(case, weights, x)[:2] if kind == "plain" else Packed(case, weights, kind).route(x)
    assert torch.equal(leaf, (32 * torch.arange(9)).expand(30, -1))
    assert (gate == 0).all()


@every_pair(name=("paths", "flat", "product-keys"), kind=("plain", *WEIGHTS), isa=ISAS)
def test_nan_scores_lose(name, kind, isa):
    """A row of weights that is NaN makes its own leaves lose, and no gate of others NaN."""
    case = CASES[name]
    w, b, balance = case.weights(torch.float32)
    if case.kind == PRODUCT_KEYS:
        w[1, 2] = float("nan")
        dead = {12 * a + 2 for a in range(12)}
    else:
        w.view(-1, case.in_features)[128 if case.kind == PATHS else 2] = float("nan")
        dead = {2, 3} if case.kind == PATHS else {2}
    x = make_rows(300, case.in_features, dtype=torch.float32)
    leaf, gate = (
        route(case, (w, b, balance), x)[:2] if kind == "plain" else Packed(case, (w, b, balance), kind).route(x)
    )
    assert not dead & set(leaf.flatten().tolist())
    assert gate.isfinite().all()


@every_pair(name=CASES, kind=("plain", *WEIGHTS), isa=ISAS)
def test_a_row_that_is_not_finite_disturbs_no_other(name, kind, isa):
    case = CASES[name]
    weights, x = case.weights(torch.float32), make_rows(40, case.in_features, dtype=torch.float32)

    def run(rows):
        return route(case, weights, rows)[:2] if kind == "plain" else Packed(case, weights, kind).route(rows)

    want = run(x)
    x[3, 1], x[7], x[11] = float("nan"), float("inf"), 1e30 * x[11]
    got, whole = run(x), torch.ones(40, dtype=torch.bool)
    whole[[3, 7, 11]] = False
    assert all(torch.equal(a[whole], b[whole]) for a, b in zip(got, want, strict=True))
    count = (
        case.trees * 2**case.depth
        if case.kind in (TREES, PATHS)
        else case.candidates ** (1 + (case.kind == PRODUCT_KEYS))
    )
    assert (got[0] >= 0).all()
    assert (got[0] < count).all()
    if case.kind == TREES:
        assert (got[0][3] == 2**case.depth * torch.arange(case.trees)).all()  # NaN turns left
    if case.gate != UNGATED and case.depth + case.candidates:
        assert got[1][3].isnan().all()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("isa", ISAS, indirect=True)
def test_huge_and_tiny_rows_route_as_float32_does(name, isa):
    case = replace(CASES[name], bias=False)
    weights = case.weights(torch.float32)
    for scale in (1e-42, 1e-30, 1e-12, 1e12, 1e25, 1e37):
        x = (scale * make_rows(30, case.in_features)).float()
        leaf = route(case, weights, x)[0]
        assert torch.equal(Packed(case, weights, "int8").route(x)[0], leaf), scale
        x[:, 1:] = 0
        leaf = route(case, weights, x)[0]
        assert torch.equal(Packed(case, weights, "int8").route(x)[0], leaf), scale


BAD = {
    "kind": {"kind": 4},
    "in_features": {"in_features": 0},
    "trees": {"trees": 0},
    "depth": {"depth": 25},
    "chosen": {"chosen": 0},
    "candidates": {"candidates": -1},
    "gate": {"gate": 4},
    "reserved": {"reserved": 1},
    "tau": {"tau": 0.0, "gate": BOUNDARY},
}


@pytest.mark.parametrize("name", ["forest", "paths", "flat", "product-keys"])
@pytest.mark.parametrize("field", BAD)
def test_bad_sizes_are_refused(name, field):
    case = CASES[name]
    c, weights, handle = case.c, case.weights(torch.float32), ctypes.c_void_p()
    for key, value in BAD[field].items():
        setattr(c, key, value)
    status = library().fastff_router_pack_f32(ctypes.byref(c), *map(pointer, weights), 0, ctypes.byref(handle))
    assert status == BAD_ARGUMENT
    assert not handle
    said = library().fastff_error().decode()
    assert (field if field != "tau" or case.kind == TREES else "gate") in said
    if len(BAD[field]) == 1:
        assert str(*BAD[field].values()) in said


def test_more_choices_than_leaves_are_refused():
    for name, most in {"paths": 256, "flat": 96, "product-keys": 144, "forest": 1}.items():
        case = replace(CASES[name], chosen=most + 1)
        status = library().fastff_router_pack_f32(
            ctypes.byref(case.c), *map(pointer, case.weights(torch.float32)), 0, ctypes.byref(ctypes.c_void_p())
        )
        assert status == BAD_ARGUMENT
        assert f"chosen {most + 1} is not 1 to {most}" in library().fastff_error().decode()


def test_arrays_that_do_not_fit_are_refused():
    case = CASES["flat"]
    w, x = case.weights(torch.float32)[0], make_rows(4, case.in_features, dtype=torch.float32)
    leaf, gate = torch.zeros(4, case.per_row, dtype=torch.int64), torch.zeros(4, case.per_row)

    fitting = {
        "w": pointer(w),
        "x": pointer(x),
        "rows": 4,
        "leaf": pointer(leaf),
        "gate": pointer(gate),
        "balance": None,
    }

    def status(**change):
        a = fitting | change
        before = (ctypes.byref(case.c), a["w"], None, a["balance"], a["x"])
        return library().fastff_route_f32(*before, ctypes.c_int64(a["rows"]), a["leaf"], a["gate"], None, 1)

    assert status() == OK
    assert status(rows=0, x=None, leaf=None, gate=None) == OK
    for change in (
        {"w": None},
        {"x": None},
        {"leaf": None},
        {"gate": None},
        {"rows": -1},
        {"rows": 2**40},
        {"w": pointer(w) + 1},
        {"x": pointer(x) + 2},
        {"leaf": pointer(leaf) + 4},
        {"gate": pointer(x)},
        {"gate": pointer(w)},
        {"leaf": pointer(gate) + 8},
        {"balance": pointer(gate)},
    ):
        assert status(**change) == BAD_ARGUMENT, change
        assert library().fastff_error()
    forest = CASES["forest"]
    status = library().fastff_router_pack_f32(
        ctypes.byref(forest.c),
        pointer(forest.weights(torch.float32)[0]),
        None,
        pointer(w),
        0,
        ctypes.byref(ctypes.c_void_p()),
    )
    assert status == BAD_ARGUMENT
    assert "balance" in library().fastff_error().decode()
    assert (
        library().fastff_router_infer_f32(None, pointer(x), ctypes.c_int64(4), pointer(leaf), pointer(gate), 1)
        == BAD_ARGUMENT
    )


class CLeaves(ctypes.Structure):
    """fastff_leaves of csrc/fastff.h."""

    _fields_ = (
        ("in_features", ctypes.c_int64),
        ("out_features", ctypes.c_int64),
        ("leaves", ctypes.c_int64),
        ("leaf_width", ctypes.c_int64),
        ("activation", ctypes.c_int32),
    )


SWIGLU, OUT, WIDTH = 5, 37, 4


def leaf_count(case):
    if case.kind in (TREES, PATHS):
        return case.trees * 2**case.depth
    return case.candidates ** (1 + (case.kind == PRODUCT_KEYS))


def leaf_weights(case):
    leaves = leaf_count(case)
    w_in = make_rows(leaves, 2 * WIDTH, case.in_features, seed=3) * case.in_features**-0.5
    return w_in.float(), make_rows(leaves, WIDTH, OUT, seed=4, dtype=torch.float32)


def pack_layer(case, weights, w_in, w_out, kind, **change):
    """Status and handle of fastff_layer_pack; `change` replaces sizes of the leaves."""
    sizes = {"in_features": case.in_features, "out_features": OUT, "leaves": len(w_in), "leaf_width": WIDTH}
    leaves, handle = CLeaves(**(sizes | {"activation": SWIGLU} | change)), ctypes.c_void_p()
    status = library().fastff_layer_pack_f32(
        ctypes.byref(case.c),
        *map(pointer, weights),
        ctypes.byref(leaves),
        pointer(w_in),
        None,
        pointer(w_out),
        None,
        WEIGHTS[kind],
        ctypes.byref(handle),
    )
    return status, handle


def joined(case, kind, x, threads=1):
    """y of fastff_layer."""
    status, handle = pack_layer(case, case.weights(torch.float32), *leaf_weights(case), kind)
    assert status == OK, library().fastff_error().decode()
    assert library().fastff_layer_bytes(handle) > 0
    y = torch.full((len(x), OUT), float("nan"))
    status = library().fastff_layer_infer_f32(handle, pointer(x), pointer(y), ctypes.c_int64(len(x)), threads)
    assert status == OK, library().fastff_error().decode()
    library().fastff_layer_free(handle)
    return y


@every_pair(name=CASES, kind=WEIGHTS, isa=ISAS)
def test_a_joined_layer_is_its_packed_router_and_its_packed_leaves(name, kind, isa):
    case = CASES[name]
    w_in, w_out = leaf_weights(case)
    x = make_rows(70, case.in_features, dtype=torch.float32)
    leaf, gate = Packed(case, case.weights(torch.float32), kind).route(x)
    leaves, handle = CLeaves(case.in_features, OUT, len(w_in), WIDTH, SWIGLU), ctypes.c_void_p()
    weights = (pointer(w_in), None, pointer(w_out), None)
    pack = library().fastff_conditional_pack_f32
    assert pack(ctypes.byref(leaves), *weights, WEIGHTS[kind], ctypes.byref(handle)) == OK
    want = torch.full((70, OUT), float("nan"))
    rows, k = ctypes.c_int64(70), ctypes.c_int64(case.per_row)
    infer = library().fastff_conditional_infer_f32
    assert infer(handle, pointer(x), pointer(leaf), pointer(gate), rows, k, pointer(want), 1) == OK
    library().fastff_conditional_packed_free(handle)
    for count in (70, 24, 1):
        assert torch.equal(joined(case, kind, x[:count].contiguous(), threads=2), want[:count])


@pytest.mark.parametrize("name", CASES)
def test_a_joined_layer_errs_as_float32_does(name, isa):
    case = CASES[name]
    w_in, w_out = (w.double() for w in leaf_weights(case))
    x = make_rows(70, case.in_features, dtype=torch.float32)
    weights = [None if w is None else w.double() for w in case.weights(torch.float32)]
    leaf, gate, _, margin = reference(case, weights, x.double())
    score = torch.einsum("ri,rkni->rkn", x.double(), w_in[leaf])
    hidden = torch.nn.functional.silu(score[..., :WIDTH]) * score[..., WIDTH:] * gate[..., None]
    want = torch.einsum("rkn,rkno->ro", hidden, w_out[leaf])
    error = (joined(case, "f32", x) - want)[margin > 1e-5]
    assert error.abs().max() <= 2e-6 * want.abs().max()


def test_leaves_that_are_not_the_routers_are_refused():
    case = CASES["flat"]
    weights, (w_in, w_out) = case.weights(torch.float32), leaf_weights(case)
    for field, value in {"leaves": 95, "in_features": 64, "leaf_width": 0, "activation": 9}.items():
        status, handle = pack_layer(case, weights, w_in, w_out, "int8", **{field: value})
        assert status == BAD_ARGUMENT
        assert not handle
        assert f"{field} {value}" in library().fastff_error().decode()
    x, y = make_rows(2, case.in_features, dtype=torch.float32), torch.zeros(2, OUT)
    _, handle = pack_layer(case, weights, w_in, w_out, "int8")

    def status(x=None, y=None, rows=2, handle=handle):
        return library().fastff_layer_infer_f32(handle, x, y, ctypes.c_int64(rows), 1)

    assert status(pointer(x), pointer(y)) == OK
    assert status(rows=0) == OK
    for bad in (
        status(pointer(x)),
        status(y=pointer(y)),
        status(pointer(x), pointer(y), rows=-1),
        status(pointer(x), pointer(x)),
        status(pointer(x) + 1, pointer(y)),
        status(pointer(x), pointer(y), handle=None),
    ):
        assert bad == BAD_ARGUMENT
    library().fastff_layer_free(handle)


@settings(
    max_examples=40 if SANITIZED else 80, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck)
)
@given(
    kind=st.integers(0, 3),
    halves=st.integers(1, 40),
    trees=st.integers(1, 6),
    depth=st.integers(0, 6),
    candidates=st.integers(1, 12),
    chosen=st.integers(1, 12),
    width=st.integers(1, 19),
    out=st.integers(1, 70),
    rows=st.integers(0, 90),
    weights=st.sampled_from(sorted(WEIGHTS)),
    balanced=st.booleans(),
    isa_index=st.integers(0, 9),
    threads=st.integers(1, 2),
)
def test_any_joined_layer_is_computed_or_refused(
    kind, halves, trees, depth, candidates, chosen, width, out, rows, weights, balanced, isa_index, threads
):
    """Nothing is written beside y, and y is that of the leaves that the packed router chooses."""
    of_trees = kind in (TREES, PATHS)
    case = Case(
        kind,
        in_features=2 * halves,
        trees=trees if of_trees else 1,
        depth=depth if of_trees else 0,
        candidates=0 if of_trees else candidates,
        chosen=1 if kind == TREES else chosen,
        gate=BOUNDARY if kind == TREES else NORMALISED,
        balanced=balanced and kind != TREES,
    )
    leaves = leaf_count(case)
    most = 2**depth if of_trees else leaves
    w_in = make_rows(leaves, 2 * width, case.in_features, seed=3, dtype=torch.float32) * case.in_features**-0.5
    w_out = make_rows(leaves, width, out, seed=4, dtype=torch.float32)
    x = make_rows(rows, case.in_features, dtype=torch.float32)
    names, before = ISAS, native.isa()
    native.set_isa(names[isa_index % len(names)])
    try:
        sizes = {"leaf_width": width, "out_features": out}
        status, handle = pack_layer(case, case.weights(torch.float32), w_in, w_out, weights, **sizes)
        if case.chosen > most:
            assert status == BAD_ARGUMENT
            assert f"chosen {case.chosen}" in library().fastff_error().decode()
            return
        assert status == OK, library().fastff_error().decode()
        room = torch.full((rows * out + 16,), -77.0)
        y = room[8 : 8 + rows * out].view(rows, out)
        infer = library().fastff_layer_infer_f32
        assert infer(handle, pointer(x), y.data_ptr(), ctypes.c_int64(rows), threads) == OK
        library().fastff_layer_free(handle)
        assert (room[:8] == -77).all()
        assert (room[8 + rows * out :] == -77).all()
        if rows:
            leaf, gate = Packed(case, case.weights(torch.float32), weights).route(x)
            score = torch.einsum("ri,rkni->rkn", x.double(), w_in.double()[leaf])
            hidden = torch.nn.functional.silu(score[..., :width]) * score[..., width:] * gate[..., None]
            want = torch.einsum("rkn,rkno->ro", hidden, w_out.double()[leaf])
            # Rounding is relative to the terms of a sum, which may cancel one another.
            terms = torch.einsum("rkn,rkno->ro", hidden.abs(), w_out.double()[leaf].abs())
            assert (y - want).norm() <= {"f32": 1e-5, "bf16": 2e-2, "int8": 5e-2}[weights] * terms.norm() + 1e-6
    finally:
        native.set_isa(before)
