"""UltraFastBertConfig and the descriptions of feedforward layers."""

import json

import pytest
import torch
from transformers import AutoConfig

from fastff import FFF, ShapeError
from fastff.models import DenseFeedforward, UltraFastBertConfig, build_feedforward
from model_cases import FEEDFORWARDS, small_config, values


def test_the_default_is_the_published_size():
    config = UltraFastBertConfig()
    layer = build_feedforward(config.feedforward_of(15), config.hidden_size, device="meta")
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size) == (16, 768, 32768)
    assert (layer.neurons, layer.active_neurons) == (4095, 12)


def test_defaults_of_the_feedforward_are_written_out():
    config = small_config(feedforward={"kind": "fff", "depth": 3})
    assert config.feedforward == {
        "kind": "fff",
        "depth": 3,
        "trees": 1,
        "leaf_width": 1,
        "node_output": True,
        "activation": "gelu",
        "gate": None,
        "tau": 0.5,
        "bias": False,
        "paths": None,
        "surrogate": None,
        "region_leak": 0.0,
        "quantization": None,
        "shared": None,
        "shared_activation": None,
    }


@pytest.mark.parametrize("feedforward", [*FEEDFORWARDS.values(), [FEEDFORWARDS["fff"], FEEDFORWARDS["none"]]])
def test_save_and_load(tmp_path, feedforward):
    config = small_config(feedforward=feedforward, num_labels=3, pooler="avg")
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, UltraFastBertConfig)
    assert values(loaded) == values(config)
    assert json.loads((tmp_path / "config.json").read_text())["feedforward"] == config.feedforward


def test_one_description_per_layer():
    config = small_config(feedforward=[FEEDFORWARDS["fff"], FEEDFORWARDS["dense"]])
    assert config.feedforward_of(0)["kind"] == "fff"
    assert config.feedforward_of(1)["intermediate_size"] == 24


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"vocab_size": 0}, ShapeError, "vocab_size 0 is not an integer of at least 1"),
        ({"num_hidden_layers": -1}, ShapeError, "num_hidden_layers -1 is not an integer of at least 0"),
        ({"hidden_size": 16.0}, ShapeError, "hidden_size 16.0 is not an integer"),
        ({"head_dim": True}, ShapeError, "head_dim True is not an integer"),
        ({"num_labels": 0}, ShapeError, "num_labels 0 is not an integer of at least 1"),
        ({"num_attention_heads": 3}, ShapeError, "hidden_size 16 is not a multiple of num_attention_heads 3"),
        ({"hidden_size": 15, "num_attention_heads": 3}, ShapeError, "hidden_size 15 is not even"),
        ({"pad_token_id": 50}, ShapeError, r"pad_token_id 50 is not in \[0, vocab_size 50\)"),
        ({"hidden_dropout_prob": 1.0}, ValueError, r"hidden_dropout_prob 1.0 is not in \[0, 1\)"),
        ({"classifier_dropout": -0.1}, ValueError, "classifier_dropout -0.1"),
        ({"initializer_range": 0.0}, ValueError, "initializer_range 0.0 is not a positive finite number"),
        ({"layer_norm_eps": float("nan")}, ValueError, "layer_norm_eps nan"),
        ({"pooler": "max"}, ValueError, "pooler 'max' is not one of masked_avg, avg, zero_index"),
        ({"feedforward_init": "zeros"}, ValueError, "feedforward_init 'zeros' is not one of published, fan_in"),
        ({"feedforward": "fff"}, ValueError, "layer 'fff' is not of the form"),
        ({"feedforward": {}}, ValueError, "feedforward kind None is not one of fff, dense, none"),
        ({"feedforward": {"kind": "moe"}}, ValueError, "feedforward kind 'moe' is not one of fff, dense, none"),
        ({"feedforward": {"kind": "fff"}}, ValueError, "feedforward kind 'fff' needs the option 'depth'"),
        ({"feedforward": {"kind": "dense"}}, ValueError, "kind 'dense' needs the option 'intermediate_size'"),
        ({"feedforward": {"kind": "none", "depth": 1}}, ValueError, "kind 'none' has no option 'depth', only none"),
        ({"feedforward": {"kind": "fff", "dept": 1}}, ValueError, "kind 'fff' has no option 'dept', only depth"),
        ({"feedforward": {"kind": "fff", "depth": 25}}, ShapeError, "depth 25 is not 0 to 24"),
        ({"feedforward": {"kind": "fff", "depth": 2, "activation": "swiglu"}}, ShapeError, "needs node_output=False"),
        ({"feedforward": {"kind": "fff", "depth": 2, "surrogate": "hard"}}, ValueError, "surrogate 'hard'"),
        ({"feedforward": {"kind": "dense", "intermediate_size": 0}}, ShapeError, "intermediate_size 0"),
        ({"feedforward": {**FEEDFORWARDS["dense"], "activation": "glu"}}, ValueError, "activation 'glu' is not"),
        ({"feedforward": [{"kind": "none"}]}, ShapeError, "feedforward has 1 entries, expected num_hidden_layers 2"),
        ({"feedforward": [{"kind": "none"}, {"kind": "fff", "depth": -1}]}, ShapeError, "depth -1 is not 0 to 24"),
    ],
)
def test_a_bad_value_is_named(changes, error, message):
    with pytest.raises(error, match=message):
        small_config(**changes)


def test_build_feedforward_gives_the_described_layer():
    conditional = build_feedforward({"kind": "fff", "depth": 2, "trees": 3, "gate": "boundary", "tau": 0.7}, 16)
    assert isinstance(conditional, FFF)
    assert (conditional.config.trees, conditional.config.gate, conditional.config.tau) == (3, "boundary", 0.7)
    assert build_feedforward({"kind": "none"}, 16) is None


@pytest.mark.parametrize(
    ("activation", "function"),
    [
        ("gelu", torch.nn.functional.gelu),
        ("relu", torch.relu),
        ("silu", torch.nn.functional.silu),
        ("geglu", lambda s: torch.nn.functional.gelu(s[..., :6]) * s[..., 6:]),
        ("reglu", lambda s: torch.relu(s[..., :6]) * s[..., 6:]),
        ("swiglu", lambda s: torch.nn.functional.silu(s[..., :6]) * s[..., 6:]),
    ],
)
@pytest.mark.parametrize("bias", [False, True])
def test_dense_feedforward(activation, function, bias):
    torch.manual_seed(0)
    layer = DenseFeedforward(4, intermediate_size=6, activation=activation, bias=bias)
    x = torch.randn(3, 5, 4)
    scores = x @ layer.linear_in.weight.T + (layer.linear_in.bias if bias else 0)
    want = function(scores) @ layer.linear_out.weight.T + (layer.linear_out.bias if bias else 0)
    torch.testing.assert_close(layer(x), want)
    rows = 12 if activation.endswith("glu") else 6
    assert (layer.neurons, layer.active_neurons, layer.flops_per_row) == (6, 6, 2 * 4 * (rows + 6))
    assert repr(layer).startswith(f"DenseFeedforward(\n  activation='{activation}', neurons=6")


def test_a_number_of_layers_beyond_all_memory_is_refused_at_once():
    with pytest.raises(ShapeError, match="num_hidden_layers 2147483648 is more than 65536"):
        UltraFastBertConfig(num_hidden_layers=2**31)
