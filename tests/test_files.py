"""A layer alone in a file: what comes back is what was saved, and a file that is no layer is refused by name."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fastff
from conftest import make_layer, make_rows

BEFORE = Path(__file__).parent / "written_before" / "1f96a58" / "layers"
FORMS = [
    {"depth": 4},
    {"depth": 0, "leaf_width": 3},
    {"depth": 3, "trees": 2, "leaf_width": 2, "gate": "boundary", "tau": 0.3, "bias": True, "activation": "silu"},
    {"depth": 2, "node_output": False, "activation": "swiglu", "bias": True},
    {"depth": 2, "node_output": False, "surrogate": "soft", "region_leak": 0.125, "bias": True},
]
METADATA = {"format": "fastff", "version": "1", "in_features": "6", "out_features": "5", "depth": "2", "trees": "1"}
METADATA |= {"leaf_width": "1", "node_output": "true", "activation": "gelu", "gate": "none", "tau": "0.5"}
METADATA |= {"bias": "false", "quantization": "none", "surrogate": "none", "region_leak": "0.0"}
TENSORS = {"w_in": torch.ones(1, 7, 6), "w_out": torch.ones(1, 7, 5)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("options", FORMS, ids=str)
def test_what_was_saved_comes_back(options, dtype, tmp_path):
    layer = make_layer(6, 5, dtype=dtype, **options)
    fastff.save(layer, tmp_path / "layer.safetensors")
    again = fastff.load(tmp_path / "layer.safetensors")
    assert again.config == layer.config
    assert (again.surrogate, again.region_leak) == (layer.surrogate, layer.region_leak)
    assert again.training
    for (name, was), (name_now, now) in zip(layer.named_parameters(), again.named_parameters(), strict=True):
        assert name == name_now
        assert now.dtype == dtype
        assert torch.equal(was, now)
    x = make_rows(9, 6, dtype=dtype)
    with torch.no_grad():
        assert torch.equal(layer.eval()(x), again.eval()(x))
    assert again.usage().counts.sum() == 0
    assert list(tmp_path.iterdir()) == [tmp_path / "layer.safetensors"]


def test_a_quantized_layer_comes_back_quantized(tmp_path):
    layer, x = make_layer(40, depth=4, dtype=torch.float32).eval().quantize("int8"), make_rows(9, 40)
    fastff.save(layer, tmp_path / "layer")
    again = fastff.load(tmp_path / "layer").eval()
    assert again.quantization == "int8"
    with torch.no_grad():
        assert torch.equal(again(x.float()), layer(x.float()))


def test_a_loaded_layer_runs_where_it_is_told_to(tmp_path):
    fastff.save(make_layer(6, depth=2), str(tmp_path / "layer"))
    layer = fastff.load(str(tmp_path / "layer"), device="cpu", backend="reference")
    assert layer.backend == "reference"
    assert fastff.load(tmp_path / "layer", device="meta").w_in.is_meta


def test_the_file_is_what_its_documentation_says(tmp_path):
    from safetensors import safe_open

    fastff.save(fastff.FFF(6, 5, depth=2), tmp_path / "layer")
    with safe_open(tmp_path / "layer", "pt") as file:
        assert file.metadata() == METADATA
    assert {name: t.shape for name, t in load_file(tmp_path / "layer").items()} == {
        n: t.shape for n, t in TENSORS.items()
    }


@pytest.mark.parametrize(
    ("metadata", "tensors", "text"),
    [
        ({"format": "pt"}, {}, r"'format': 'pt'.*expected format 'fastff', version '1'"),
        ({"version": "2"}, {}, "'version': '2'"),
        ({"depth": None}, {}, "lacks depth in its metadata"),
        ({"depth": "two"}, {}, "has depth 'two' in its metadata, expected int"),
        ({"bias": "maybe"}, {}, "has bias 'maybe' in its metadata, expected bool"),
        ({"depth": "25"}, {}, "impossible layer: depth 25 is not 0 to 24"),
        ({"tau": "nan"}, {}, "impossible layer: tau nan"),
        ({"activation": "tanh"}, {}, "impossible layer: activation 'tanh'"),
        ({"in_features": str(2**60)}, {}, "impossible layer: a weight of"),
        ({"quantization": "int4"}, {}, "impossible layer: quantization 'int4'"),
        ({"surrogate": "magic"}, {}, "impossible layer: surrogate 'magic'"),
        ({"depth": "24"}, {}, r"holds tensors .*expected .*33554431"),
        ({}, {"w_out": None}, "holds tensors .*expected .*w_out"),
        ({}, {"b_in": torch.ones(1, 7)}, "holds tensors .*b_in.*expected"),
        ({}, {"w_in": torch.ones(1, 7, 5)}, r"holds tensors .*\(1, 7, 5\).*expected .*\(1, 7, 6\)"),
        ({}, {"w_in": torch.ones(1, 7, 6, dtype=torch.float64)}, "holds F32, F64, expected one of"),
        ({}, {n: t.to(torch.int64) for n, t in TENSORS.items()}, "holds I64, expected one of"),
    ],
)
def test_a_file_that_is_no_layer_is_refused_by_name(metadata, tensors, text, tmp_path):
    merged = {name: value for name, value in {**METADATA, **metadata}.items() if value is not None}
    stored = {name: value for name, value in {**TENSORS, **tensors}.items() if value is not None}
    save_file(stored, tmp_path / "layer", merged)
    with pytest.raises(fastff.CheckpointError, match=text):
        fastff.load(tmp_path / "layer")


@pytest.mark.parametrize("content", [b"", b"12345", b"\xff" * 64, b"\x08" + bytes(7) + b"[1, 2]  "])
def test_a_file_of_another_kind_is_refused(content, tmp_path):
    (tmp_path / "layer").write_bytes(content)
    with pytest.raises(fastff.CheckpointError, match=r"layer is not a safetensors file"):
        fastff.load(tmp_path / "layer")


def test_a_truncated_or_missing_file_is_refused(tmp_path):
    fastff.save(fastff.FFF(6, depth=2), tmp_path / "layer")
    whole = (tmp_path / "layer").read_bytes()
    (tmp_path / "layer").write_bytes(whole[:-1])
    with pytest.raises(fastff.CheckpointError, match="not a safetensors file"):
        fastff.load(tmp_path / "layer")
    with pytest.raises(FileNotFoundError):
        fastff.load(tmp_path / "nothing")


def test_only_a_layer_can_be_saved(tmp_path):
    with pytest.raises(TypeError, match="layer is Linear, expected FFF"):
        fastff.save(nn.Linear(3, 3), tmp_path / "layer")


def test_a_save_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    fastff.save(fastff.FFF(6, depth=2), tmp_path / "layer")
    before = (tmp_path / "layer").read_bytes()

    def run_out_of_space(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError("no space left")

    monkeypatch.setattr("safetensors.torch.save_file", run_out_of_space)
    with pytest.raises(fastff.CheckpointError, match=r"cannot write .*layer: no space left"):
        fastff.save(fastff.FFF(6, depth=2), tmp_path / "layer")
    assert (tmp_path / "layer").read_bytes() == before
    assert list(tmp_path.iterdir()) == [tmp_path / "layer"]


@pytest.mark.parametrize("name", ["tree", "forest-int8", "leaves"])
def test_a_layer_that_the_version_before_saved_computes_the_same(name):
    """tests/written_before/1f96a58/layers: saved by that commit, with rows and what it computed of them."""
    expected = load_file(BEFORE / "expected.safetensors")
    layer = fastff.load(BEFORE / f"{name}.safetensors").eval()
    with torch.no_grad():
        y = layer(expected[f"{name}.x"])
    want = expected[f"{name}.y"]
    assert y.dtype == want.dtype
    # bfloat16 outputs may round to the neighbour: the sum is in another order
    unit = torch.finfo(want.dtype).eps * want.abs().max().item()
    assert (y.double() - want.double()).abs().max() <= (unit if want.dtype == torch.bfloat16 else 1e-6)
