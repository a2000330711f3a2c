import pytest

import fastff
from fastff.train.presets import feedforward_of


def config(**options):
    return fastff.TreeConfig(**{"in_features": 768, "out_features": 768, "depth": 11, **options})


def test_published_layer_counts():
    c = config()
    assert (c.nodes, c.leaves, c.neurons, c.active_neurons, c.levels) == (2047, 2048, 4095, 12, 12)
    assert c.flops_per_row == 12 * 2 * 2 * 768  # 36.9 kFLOP
    assert c.name == "1x11"


def test_wide_leaves_that_only_route():
    c = config(depth=4, trees=8, leaf_width=16, node_output=False, activation="swiglu", gate="boundary")
    assert (c.in_rows, c.out_rows) == (15 + 16 * 32, 16 * 16)
    assert (c.active_neurons, c.routing_scores) == (8 * 16, 32)
    assert c.flops_per_row == 2 * (8 * (4 + 32) + 8 * 16) * 768
    assert c.name == "8x4-leaf16-swiglu-gate"
    assert config(depth=3, gate="boundary_min").name == "1x3-gate-min"


def test_bias_shapes():
    assert config(bias=True).shape_of_b_out is None
    assert config(bias=True, node_output=False).shape_of_b_out == (1, 2048, 768)
    assert config().shape_of_b_in is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depth": -1}, "depth -1 is not 0 to 24"),
        ({"depth": 25}, "depth 25 is not 0 to 24"),
        ({"depth": 1.5}, "depth 1.5 is not an integer"),
        ({"trees": 0}, "trees 0 is not at least 1"),
        ({"leaf_width": 0}, "leaf_width 0 is not at least 1"),
        ({"in_features": 0}, "in_features 0 is not at least 1"),
        ({"activation": "tanh"}, "activation 'tanh' is not one of"),
        ({"gate": "soft"}, "gate 'soft' is not None, 'boundary' or 'boundary_min'"),
        ({"activation": "swiglu"}, "swiglu' needs node_output=False"),
        ({"tau": 0.0}, "tau 0.0 is not a positive finite number"),
        ({"depth": 24, "trees": 10**6}, "more than can be addressed"),
    ],
)
def test_bad_values_are_named(options, message):
    with pytest.raises(fastff.ShapeError, match=message) as caught:
        config(**options)
    assert isinstance(caught.value, ValueError)


def test_a_layer_too_large_to_address_is_refused_before_it_is_allocated():
    with pytest.raises(fastff.ShapeError, match="more than can be addressed"):
        fastff.FFF(2**20, depth=24, trees=64)


@pytest.mark.parametrize("value", [2, 1, 0, "no", "false", None])
@pytest.mark.parametrize("name", ["node_output", "bias"])
def test_what_is_true_or_false_is_nothing_else(name, value):
    with pytest.raises(fastff.ShapeError, match=f"{name} {value!r} is not True or False"):
        fastff.TreeConfig(in_features=4, out_features=4, depth=2, **{name: value})


@pytest.mark.parametrize("gate", [None, "boundary", "boundary_min"])
@pytest.mark.parametrize("swiglu", [False, True])
@pytest.mark.parametrize("leaf_width", [1, 4, 16])
def test_a_name_is_parsed_back(leaf_width, swiglu, gate):
    options = {"node_output": False, "activation": "swiglu"} if swiglu else {}
    made = fastff.TreeConfig(
        in_features=8, out_features=6, depth=5, trees=36, leaf_width=leaf_width, gate=gate, **options
    )
    assert fastff.TreeConfig.parse(made.name, 8, 6) == made


def test_one_layer_has_one_name():
    older, name = "36x5-swiglu4-gate", "36x5-leaf4-swiglu-gate"
    assert fastff.TreeConfig.parse(older, 8) == fastff.TreeConfig.parse(name, 8)
    assert fastff.TreeConfig.parse(older, 8).name == name
    assert feedforward_of(older, 512) == feedforward_of(name, 512)


@pytest.mark.parametrize("text", ["", "1x", "x11", "1x11-gates", "1x11-leaf", "1x11-leaf2-swiglu4", "dense", "0x3"])
def test_text_that_names_no_layer(text):
    with pytest.raises(fastff.ShapeError, match=r"is not like 1x11|is not at least 1"):
        fastff.TreeConfig.parse(text, 8)


@pytest.mark.parametrize("name", ["1x8-leaf12-swiglu-paths8-gate", "4x3-gelu-paths2", "2x2-leaf3-relu-paths4-gate"])
def test_names_with_paths_are_read_as_they_are_written(name):
    made = fastff.TreeConfig.parse(name, 16)
    assert made.name == name
    assert not made.node_output


def test_cost_with_paths_counts_the_beam():
    c = config(depth=4, trees=2, leaf_width=3, node_output=False, activation="swiglu", paths=3)
    assert c.routing_scores == 2 * (1 + 2 + 3 + 3)
    assert c.active_neurons == 2 * 3 * 3
    assert c.flops_per_row == 2 * (2 * (9 + 3 * 6) + 2 * 9) * 768


def test_a_name_of_paths_says_its_activation():
    """`1x8-leaf12-paths8` is a ConditionalFeedforward's."""
    with pytest.raises(fastff.ShapeError, match="is not like"):
        fastff.TreeConfig.parse("1x8-leaf12-paths8", 16)
