"""The C ABI with hostile arguments: what csrc/fastff.h promises to compute or to refuse, called as a C program would.

Run under sanitizers by `make sanitize`; without them, arrays lie between guard elements that no call may change."""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
from contextlib import contextmanager
from mmap import mmap

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

import fastff
from conftest import SANITIZED, make_layer, make_rows, supported_isas, weights_of
from fastff.config import ACTIVATIONS
from fastff.ops import native, reference
from fastff.ops.packed import PackedLayer

OK, BAD_ARGUMENT, OUT_OF_MEMORY = 0, 1, 2
FORWARD = ("w_in", "b_in", "w_out", "b_out", "x", "rows", "y", "leaf", "margin", "scores", "threads")
BACKWARD = ("w_in", "w_out", "b_out", "x", "grad_y", "rows", "leaf", "scores")
GRADIENTS = ("grad_x", "grad_w_in", "grad_b_in", "grad_w_out", "grad_b_out")
NAMES = {"forward": FORWARD, "backward": (*BACKWARD, *GRADIENTS, "threads")}
OUTPUTS = {"forward": ("y", "leaf", "margin", "scores"), "backward": GRADIENTS}
OPTIONAL = {"b_in", "b_out", "leaf", "margin", "scores", *GRADIENTS}
DTYPES = {"f32": torch.float32, "f64": torch.float64}
ISAS = supported_isas()
LEAVES = {"depth": 3, "trees": 2, "leaf_width": 3, "node_output": False, "activation": "relu", "bias": True}
GUARD = 7  # elements before and after an array: none of them a multiple of a cache line away from it

fuzz = settings(deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))


@contextmanager
def using(isa):
    before = native.isa()
    native.set_isa(isa)
    try:
        yield
    finally:
        native.set_isa(before)


class Arrays:
    """The arguments of one call by name, each array between guards. Outputs start as NaN or -1."""

    def __init__(self, layer, x, grad_y):
        c, rows = layer.config, x.shape[0]
        self.config, self.guarded = c, []
        given = {"x": x, "grad_y": grad_y, **dict(layer.named_parameters())}
        shapes = {"y": (rows, c.out_features), "margin": (rows,), "scores": (rows, c.trees, c.path_scores)}
        shapes |= {f"grad_{name}": tensor.shape for name, tensor in given.items() if name != "grad_y"}
        nothing = float("nan")
        self.values = {name: self._guard(tensor.detach()) for name, tensor in given.items()}
        self.values |= {name: self._guard(torch.full(shape, nothing, dtype=x.dtype)) for name, shape in shapes.items()}
        self.values |= {"leaf": self._guard(torch.full((rows, c.trees), -1)), "rows": rows, "threads": 1}

    def _guard(self, tensor):
        room = torch.full((tensor.numel() + 2 * GUARD,), -77, dtype=tensor.dtype)
        inside = room[GUARD : GUARD + tensor.numel()].view(tensor.shape).copy_(tensor)
        self.guarded.append((room, tensor.numel()))
        return inside

    def __getitem__(self, name):
        return self.values[name]

    def call(self, kind, suffix, **change):
        """Status of the call; `change` replaces arguments by other tensors, integers (for addresses too) or None."""
        values = {**self.values, **change}
        arguments = [
            value.data_ptr() if isinstance(value, torch.Tensor) else value for value in map(values.get, NAMES[kind])
        ]
        tree = ctypes.addressof(native._c_tree(self.config))
        return getattr(native.library(), f"fastff_{kind}_{suffix}")(tree, *arguments)

    def check_guards(self):
        for room, inside in self.guarded:
            assert (room[:GUARD] == -77).all(), "a call wrote before an array"
            assert (room[GUARD + inside :] == -77).all(), "a call wrote after an array"


def arrays(rows=5, in_features=6, out_features=4, suffix="f64", **options):
    layer = make_layer(in_features, out_features, dtype=DTYPES[suffix], **(options or LEAVES))
    x, grad_y = make_rows(rows, in_features), make_rows(rows, out_features, seed=2)
    return Arrays(layer, x.to(DTYPES[suffix]), grad_y.to(DTYPES[suffix]))


def message():
    return native.library().fastff_error().decode()


def refused(status, text):
    return status == BAD_ARGUMENT and text in message()


def reference_of(layer, x, grad_y):
    inputs = [x.requires_grad_(), *layer.parameters()]
    routed = reference.forward(x, weights_of(layer), config=layer.config)
    grads = torch.autograd.grad((routed.y * grad_y).sum(), inputs, allow_unused=True, materialize_grads=True)
    names = ["grad_x", *(f"grad_{name}" for name, _ in layer.named_parameters())]
    return routed, dict(zip(names, grads, strict=True))


def error(a, b):
    return (a.double() - b.double()).abs().max().item() if a.numel() else 0.0


widths = st.one_of(st.integers(1, 40), st.sampled_from([63, 64, 65, 127, 129, 768, 4999, 5000]), st.integers(1, 5000))


@st.composite
def layers(draw):
    options = {
        "depth": draw(st.integers(0, 12)),
        "trees": draw(st.integers(1, 5)),
        "leaf_width": draw(st.integers(1, 40)),
        "node_output": draw(st.booleans()),
        "gate": draw(st.sampled_from([None, "boundary", "boundary_min"])),
        "bias": draw(st.booleans()),
    }
    options["activation"] = draw(
        st.sampled_from([name for name in ACTIVATIONS if name != "swiglu" or not options["node_output"]])
    )
    in_features, out_features = draw(widths), draw(widths)
    while True:  # a layer that is too large for a fast test gives up its trees, then its leaves, then its depth
        config = fastff.TreeConfig(in_features=in_features, out_features=out_features, **options)
        if config.trees * config.in_rows * max(in_features, out_features) <= 200_000:
            return in_features, out_features, options
        largest = next((name for name in ("trees", "leaf_width") if options[name] > 1), None)
        options[largest or "depth"] = options[largest] // 2 if largest else options["depth"] - 1


@settings(fuzz, max_examples=100)
@given(
    layer=layers(),
    rows=st.sampled_from([0, 1, 2, 3, 5, 8, 17, 40]),
    isa=st.sampled_from(ISAS),
    threads=st.sampled_from([1, 2, 3, 0, -(2**31), 2**31 - 1]),
)
def test_any_shape_in_float64(layer, rows, isa, threads):
    in_features, out_features, options = layer
    exact = make_layer(in_features, out_features, dtype=torch.float64, **options)
    x, grad_y = make_rows(rows, in_features), make_rows(rows, out_features, seed=2)
    a = Arrays(exact, x, grad_y)
    with using(isa):
        assert a.call("forward", "f64", threads=threads) == OK, message()
        assert a.call("backward", "f64", threads=threads) == OK, message()
    a.check_guards()
    want, grads = reference_of(exact, x, grad_y)
    assert torch.equal(a["leaf"], want.leaf)
    assert error(a["y"], want.y) <= 1e-12 * max(1.0, want.y.abs().max().item() if rows else 0.0)
    assert torch.allclose(a["margin"], want.margin, rtol=0, atol=1e-12)
    for name, grad in grads.items():
        assert error(a[name], grad) <= 1e-12 * max(1.0, grad.abs().max().item() if grad.numel() else 0.0), name


@settings(fuzz, max_examples=60)
@given(layer=layers(), rows=st.sampled_from([0, 1, 2, 3, 5, 8, 17, 40]), isa=st.sampled_from(ISAS))
def test_any_shape_in_float32(layer, rows, isa):
    in_features, out_features, options = layer
    single = make_layer(in_features, out_features, dtype=torch.float32, **options)
    exact = make_layer(in_features, out_features, dtype=torch.float64, **options)
    exact.load_state_dict(single.state_dict())
    x = make_rows(rows, in_features, dtype=torch.float32)
    grad_y = make_rows(rows, out_features, seed=2, dtype=torch.float32)
    a = Arrays(single, x, grad_y)
    with using(isa):
        assert a.call("forward", "f32") == OK, message()
        assert a.call("backward", "f32") == OK, message()
        with torch.no_grad():
            packed = PackedLayer(single.config).infer(x, dict(single.named_parameters()) | absent(single))
    a.check_guards()
    assert packed is not None
    with torch.no_grad():
        want = reference.forward(x.double(), weights_of(exact), config=exact.config)
        rough = reference.forward(x, weights_of(single), config=single.config)
    clear = want.margin > 1e-4
    assert torch.equal(a["leaf"][clear], want.leaf[clear])
    bound = 2 * error(rough.y[clear], want.y[clear]) + 1e-6
    assert error(a["y"][clear], want.y[clear]) <= bound
    assert error(packed[clear], want.y[clear]) <= bound
    assert not any(torch.isnan(a[f"grad_{name}"]).any() for name, _ in single.named_parameters())


def absent(layer):
    return {name: None for name in ("b_in", "b_out") if getattr(layer, name) is None}


def test_the_deepest_tree_needs_no_wider_index():
    """Depth 24: 2^25 - 1 neurons; only the pages of the paths are ever touched."""
    config = fastff.TreeConfig(in_features=1, out_features=1, depth=24)
    w_in, w_out = (torch.frombuffer(mmap(-1, 4 * config.in_rows), dtype=torch.float32).view(1, -1, 1) for _ in "io")
    x, y, leaf = torch.tensor([[1.0], [-1.0]]), torch.zeros(2, 1), torch.zeros(2, 1, dtype=torch.int64)
    node = 0
    for _ in range(24):  # the path that always turns right ends at the last row of both arrays
        w_in[0, node] = w_out[0, node] = 2.0
        node = 2 * node + 2
    w_in[0, node], w_out[0, node] = 2.0, 5.0
    assert node == config.in_rows - 1
    tree = ctypes.addressof(native._c_tree(config))
    pointers = [t.data_ptr() for t in (w_in, w_out, x, y, leaf)]
    status = native.library().fastff_forward_f32(
        tree, pointers[0], None, pointers[1], None, pointers[2], 2, pointers[3], pointers[4], None, None, 1
    )
    assert status == OK
    assert leaf.flatten().tolist() == [2**24 - 1, 0]
    active = torch.nn.functional.gelu(torch.tensor(2.0))
    torch.testing.assert_close(y[0, 0], (24 * 2.0 + 5.0) * active)


HOSTILE = [-(2**63), -(2**31), -1, 0, 1, 2, 3, 24, 5000, 2**31 - 1, 2**31, 2**40, 2**46, 2**46 + 1, 2**62, 2**63 - 1]
HOSTILE_32 = [-(2**31), -1, 0, 1, 2, 5, 6, 24, 25, 2**31 - 1]
size, small = st.sampled_from(HOSTILE), st.sampled_from(HOSTILE_32)
tau = st.sampled_from([0.5, 0.0, -1.0, float("nan"), float("inf")])


def promised(tree, rows):
    """Whether the header lets a call with these sizes through, on integers that do not overflow."""
    sizes = (tree["in_features"], tree["out_features"], tree["trees"], tree["leaf_width"])
    if not all(1 <= n <= 2**46 for n in sizes) or not 0 <= tree["depth"] <= 24 or not 0 <= rows < 2**31:
        return False
    if not 0 <= tree["activation"] <= 6 or tree["gate"] not in (0, 1, 2):
        return False
    if (tree["activation"] == 5 and tree["node_output"]) or (tree["gate"] and not 0 < tree["tau"] < float("inf")):
        return False
    widest = max(tree["in_features"], tree["out_features"])
    path = tree["depth"] + tree["leaf_width"] * (2 if tree["activation"] == 5 else 1)
    weights = (2 * tree["leaf_width"] + 1) * 2 ** tree["depth"] * widest * tree["trees"] * 8
    return weights < 2**47 and rows * max(widest, tree["trees"] * (path + 1)) * 8 < 2**47


@settings(fuzz, max_examples=400)
@given(
    hostile=st.fixed_dictionaries(
        {},
        optional={
            **dict.fromkeys(("in_features", "out_features", "trees", "leaf_width"), size),
            **dict.fromkeys(("depth", "activation", "gate", "node_output"), small),
            "tau": tau,
            "rows": size,
        },
    ),
    kind=st.sampled_from(["forward", "backward", "pack"]),
)
def test_hostile_sizes_are_refused(hostile, kind):
    tree = {"in_features": 3, "out_features": 2, "trees": 1, "leaf_width": 1, "depth": 2}
    tree |= {"node_output": 0, "activation": 0, "gate": 0, "tau": 0.5, **hostile}
    rows = 1 if kind == "pack" else tree.pop("rows", 1)
    tree.pop("rows", None)
    assume(not promised(tree, rows))  # the arrays of an accepted call would have to exist
    c_tree, some = native._Tree(*(tree[name] for name, _ in native._Tree._fields_)), torch.full((64,), 7.0)
    address, library = some.data_ptr(), native.library()
    if kind == "pack":
        handle = ctypes.c_void_p()
        pointers = [address, None, address, None]
        status = library.fastff_pack_f32(ctypes.addressof(c_tree), *pointers, 0, ctypes.byref(handle))
        assert not handle
    else:
        arguments = [rows if name == "rows" else 1 if name == "threads" else address for name in NAMES[kind]]
        status = getattr(library, f"fastff_{kind}_f32")(ctypes.addressof(c_tree), *arguments)
    assert status == BAD_ARGUMENT
    assert message()
    assert (some == 7).all()


@pytest.mark.parametrize("kind", NAMES)
@pytest.mark.parametrize("suffix", DTYPES)
def test_null_is_refused_where_it_is_not_optional(kind, suffix):
    a = arrays(suffix=suffix)
    assert a.call("forward", suffix) == OK, message()
    if kind == "backward":
        assert a.call("backward", suffix) == OK, message()
    wanted = {name: a[name].clone() for name in OUTPUTS[kind]}
    given_to_it = set(NAMES[kind]) - {"rows", "threads"}
    needed = (given_to_it - OPTIONAL) | ({"leaf", "scores"} if kind == "backward" else set())
    for name in sorted(given_to_it):
        status = a.call(kind, suffix, **{name: None})
        if name in needed:
            assert status == BAD_ARGUMENT, name
            assert name in message()
            assert "must not be NULL" in message()
        else:
            assert status == OK, name
        if name in OUTPUTS[kind]:  # the others are as they were
            assert all(torch.equal(a[other], wanted[other]) for other in wanted), name
    a.check_guards()


def test_null_trees_packs_and_names_are_refused():
    library, a = native.library(), arrays(suffix="f32")
    tree = ctypes.addressof(native._c_tree(a.config))
    pointers = [a[name].data_ptr() for name in ("w_in", "b_in", "w_out", "b_out")]
    x, y, handle = a["x"].data_ptr(), a["y"].data_ptr(), ctypes.c_void_p()
    assert refused(library.fastff_forward_f32(None, *pointers, x, 5, y, None, None, None, 1), "tree must not be NULL")
    assert refused(library.fastff_pack_f32(None, *pointers, 0, ctypes.byref(handle)), "tree must not be NULL")
    assert refused(library.fastff_pack_f32(tree, *pointers, 0, None), "packed must not be NULL")
    for missing in (0, 2):
        holed = [None if i == missing else pointer for i, pointer in enumerate(pointers)]
        assert refused(
            library.fastff_pack_f32(tree, *holed, 0, ctypes.byref(handle)), "w_in and w_out must not be NULL"
        )
    assert not handle
    assert refused(library.fastff_packed_watch(None, None, 0), "packed must not be NULL")
    assert refused(library.fastff_infer_f32(None, x, y, 5, 1), "packed must not be NULL")
    assert refused(library.fastff_set_isa(None), "name must not be NULL")
    assert library.fastff_packed_bytes(None) == 0
    library.fastff_packed_free(None)
    library.fastff_advise_huge_pages(None, 2**22)


def test_advice_about_any_memory_changes_nothing():
    values = torch.frombuffer(mmap(-1, 2**23), dtype=torch.int64)
    values.copy_(torch.arange(2**20))
    start = values.data_ptr()
    for address in (start, start + 1, 1, 2**47 - 1, 2**63 - 1, 2**64 - 1):
        for size in (-1, 0, 1, 2**21, 2**22 - 1, values.nbytes, 2**63 - 1):
            if size <= values.nbytes or not start <= address <= start + 1:  # what follows is other code's memory
                native.library().fastff_advise_huge_pages(address, size)
    assert torch.equal(values, torch.arange(2**20))


def test_a_bias_that_the_layer_cannot_have_is_refused():
    a = arrays(depth=2, bias=True)
    assert refused(a.call("forward", "f64", b_out=a["y"]), "b_out must be NULL with node_output = 1")
    assert a.call("forward", "f64", b_out=None) == OK
    assert refused(a.call("backward", "f64", b_out=None, grad_b_out=a["margin"]), "grad_b_out must be NULL")


def test_leaves_that_do_not_exist_are_refused():
    a = arrays()
    assert a.call("forward", "f64") == OK
    for leaf in (-1, 8, 2**40):
        hostile = a["leaf"].clone()
        hostile[3, 1] = leaf
        assert refused(a.call("backward", "f64", leaf=hostile), f"leaf {leaf} is not 0 to 7")


def test_visited_rows_are_listed_or_the_call_is_refused():
    a, library = arrays(), native.library()
    assert a.call("forward", "f64") == OK
    c, leaf, counts = a.config, a["leaf"], torch.zeros(3, dtype=torch.int64)
    rows = torch.full((c.trees * c.in_rows,), -7)
    named = {"tree": ctypes.addressof(native._c_tree(c)), "leaf": leaf, "rows": rows, "counts": counts}

    def visited(**change):
        at = {name: getattr(value, "data_ptr", lambda value=value: value)() for name, value in (named | change).items()}
        return library.fastff_visited(at["tree"], at["leaf"], 5, at["rows"], None, None, at["counts"])

    assert visited() == OK
    last = {t * c.in_rows + c.nodes + 3 * int(row[t]) + 2 for row in leaf for t in range(c.trees)}
    assert last < set(rows[: counts[0]].tolist())
    assert (rows[counts[0] :] == -7).all()
    assert visited(rows=None) == OK
    assert refused(visited(tree=None), "tree must not be NULL")
    for missing in ("leaf", "counts"):
        assert refused(visited(**{missing: None}), "leaf and counts must not be NULL")
    assert refused(visited(rows=leaf.data_ptr() + 8), "w_in_rows overlaps leaf")
    assert refused(visited(counts=leaf), "counts overlaps leaf")
    assert refused(visited(rows=rows.data_ptr() + 4), "w_in_rows is not aligned")
    assert refused(visited(leaf=torch.full_like(leaf, 99)), "leaf 99 is not 0 to 7")


def pairs(kind):
    """Every output with every input and with every other output."""
    outputs, names = OUTPUTS[kind], [name for name in NAMES[kind] if name not in ("rows", "threads")]
    for output in outputs:
        for other in names:
            if other not in outputs or outputs.index(other) < outputs.index(output):
                yield kind, output, other


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize(("kind", "output", "other"), [*pairs("forward"), *pairs("backward")])
def test_an_output_that_overlaps_is_refused(kind, output, other, suffix):
    a = arrays(suffix=suffix)
    assert a.call("forward", suffix) == OK
    other_bytes, output_bytes = (a[name].numel() * a[name].element_size() for name in (other, output))
    room = torch.zeros(other_bytes + 2 * output_bytes + 64, dtype=torch.uint8)
    start = (output_bytes + 15) // 8 * 8  # `other` lies in the middle, `output` before, within and after it
    address = room.data_ptr()
    room[start : start + other_bytes] = a[other].flatten().view(torch.uint8)
    end = start + other_bytes
    for at in {start, (end - 1) // 8 * 8, (start - output_bytes + 8) // 8 * 8}:
        status = a.call(kind, suffix, **{output: address + at, other: address + start})
        assert status == BAD_ARGUMENT, at - start
        assert message() in (f"{output} overlaps {other}", f"{other} overlaps {output}")
    for at in ((end + 7) // 8 * 8, (start - output_bytes) // 8 * 8):
        assert a.call(kind, suffix, **{output: address + at, other: address + start}) == OK, message()


@pytest.mark.parametrize(
    ("output", "other"), [("y", "x"), ("leaf", "x"), ("margin", "x"), ("leaf", "y"), ("margin", "y")]
)
def test_a_packed_forward_refuses_overlap_too(output, other):
    a, library, handle = arrays(suffix="f32"), native.library(), ctypes.c_void_p()
    tree = ctypes.addressof(native._c_tree(a.config))
    pointers = [a[name].data_ptr() for name in ("w_in", "b_in", "w_out", "b_out")]
    assert library.fastff_pack_f32(tree, *pointers, 0, ctypes.byref(handle)) == OK
    free = {name: a[name].data_ptr() for name in ("x", "y", "leaf", "margin")}
    argument = ctypes.c_void_p
    try:
        for hostile in (False, True):
            at = free | ({output: free[other] // 8 * 8 + 8} if hostile else {})
            order = [argument(at["x"]), ctypes.c_int64(5), *(argument(at[name]) for name in ("y", "leaf", "margin"))]
            status = library.fastff_forward_packed_f32(handle, *order, 1)
            assert refused(status, f"{output} overlaps {other}") if hostile else status == OK
        assert refused(library.fastff_infer_f32(handle, free["x"], free["x"], 5, 1), "y overlaps x")
    finally:
        library.fastff_packed_free(handle)


@pytest.mark.parametrize("suffix", DTYPES)
@pytest.mark.parametrize("kind", NAMES)
def test_arrays_that_are_not_aligned_to_their_elements_are_refused(kind, suffix):
    a = arrays(suffix=suffix)
    assert a.call("forward", suffix) == OK
    for name in NAMES[kind]:
        if name not in ("rows", "threads"):
            status = a.call(kind, suffix, **{name: a[name].data_ptr() + 2})
            assert refused(status, f"{name} is not aligned to its elements of {a[name].element_size()} bytes")
    a.check_guards()


SPECIAL = [float("nan"), float("inf"), -float("inf"), 1e300, -1e300, 5e-324, -0.0]


@settings(fuzz, max_examples=60)
@given(
    options=st.sampled_from(
        [
            LEAVES,
            {"depth": 4, "gate": "boundary"},
            {"depth": 4, "gate": "boundary_min"},
            {"depth": 3, "leaf_width": 5, "bias": True},
        ]
    ),
    activation=st.sampled_from([name for name in ACTIVATIONS if name != "swiglu"]),
    specials=st.lists(st.tuples(st.integers(0, 10), st.integers(0, 18), st.sampled_from(SPECIAL)), max_size=5),
    weight=st.none() | st.tuples(st.integers(0, 30), st.sampled_from(SPECIAL)),
    isa=st.sampled_from(ISAS),
)
def test_special_values_take_the_reference_path(options, activation, specials, weight, isa):
    layer = make_layer(19, 7, dtype=torch.float64, **{**options, "activation": activation})
    x = make_rows(11, 19)
    for row, column, value in specials:
        x[row, column] = value
    if weight is not None:
        with torch.no_grad():
            layer.w_in.view(-1, 19)[weight[0] % layer.config.in_rows, 3] = weight[1]
    a = Arrays(layer, x, make_rows(11, 7, seed=2))
    with using(isa):
        assert a.call("forward", "f64") == OK
        assert a.call("backward", "f64") == OK  # whatever it computes, it stays within its arrays
    a.check_guards()
    with torch.no_grad():
        want = reference.forward(x, weights_of(layer), config=layer.config)
    assert torch.equal(a["leaf"], want.leaf)
    torch.testing.assert_close(a["y"], want.y, rtol=1e-12, atol=1e-12, equal_nan=True)
    torch.testing.assert_close(a["margin"], want.margin, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.skipif(not SANITIZED, reason="runs under `make sanitize` only")
def test_the_sanitizers_are_at_work():
    """An array of which the caller lies about the size is caught, so that the other tests mean what they say."""
    code = """
import torch
from conftest import make_layer, make_rows
from fastff.ops import native
layer = make_layer(8, 300, depth=2, dtype=torch.float32)
x, y = make_rows(4, 8, dtype=torch.float32), torch.zeros(3, 300)
pointers = [None if t is None else t.data_ptr() for t in (layer.w_in, layer.b_in, layer.w_out, layer.b_out, x)]
tree = native.ctypes.addressof(native._c_tree(layer.config))
native.library().fastff_forward_f32(tree, *pointers, 4, y.data_ptr(), None, None, None, 1)
"""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode != 0
    assert "heap-buffer-overflow" in done.stderr


def test_a_library_named_in_the_environment_is_the_one_that_is_loaded(monkeypatch):
    monkeypatch.setenv("FASTFF_LIBRARY", "/nowhere/libfastff.so")
    with pytest.raises(fastff.BackendUnavailable, match=r"could not load /nowhere/libfastff\.so"):
        native.library.__wrapped__()
