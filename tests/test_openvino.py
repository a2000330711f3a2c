"""Models exported to OpenVINO: the IR that is read back computes what PyTorch does, conditional layers included."""

from __future__ import annotations

import functools
import json
import runpy
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import torch
from transformers import BertConfig, BertForSequenceClassification, BertModel

import fastff
from cli_runner import invoke
from fastff import models
from fastff.engine import extension, openvino
from fastff.errors import BackendUnavailable, CheckpointError, FileError
from fastff.models.feedforward import build_feedforward
from fastff.serve import encoder_backends
from fastff.serve.batcher import Tokens
from serve_cases import tokenizer

ov = pytest.importorskip("openvino", reason="the export needs the package openvino")
pytest.importorskip("nncf", reason="weights in int8 need the package nncf")
pytestmark = [
    pytest.mark.skipif(shutil.which("g++") is None, reason="needs g++"),
    pytest.mark.filterwarnings("ignore"),  # of tracing and of OpenVINO's converter
]

LAYERS = {
    "published": {"kind": "fff", "depth": 4},
    "biased": {"kind": "fff", "depth": 2, "trees": 2, "bias": True, "activation": "relu"},
    "gated": {
        "kind": "fff",
        "depth": 2,
        "trees": 3,
        "leaf_width": 2,
        "node_output": False,
        "activation": "swiglu",
        "gate": "boundary",
        "bias": True,
        "shared": 8,
    },
    "paths": {"kind": "paths", "depth": 3, "trees": 2, "paths": 2, "leaf_width": 4, "bias": True},
    "flat": {"kind": "flat", "leaves": 8, "k": 2, "leaf_width": 4},
    "reads": {"kind": "flat", "leaves": 8, "k": 2, "leaf_width": 4, "reads": 12},
    "product_key": {"kind": "product_key", "n": 3, "k": 2, "leaf_width": 4, "activation": "gelu"},
}


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


def relative(got, want):
    return float((torch.as_tensor(got) - want).norm() / want.norm())


class Beside(torch.nn.Module):
    """Layers that read the same rows: converted once for all of them."""

    def __init__(self, layers):
        super().__init__()
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x):
        return torch.stack([layer(x) for layer in self.layers])


def make(name):
    torch.manual_seed(0)
    layer = build_feedforward(LAYERS[name], 32).eval()
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.normal_(std=0.3)
        if isinstance(layer, fastff.ConditionalFeedforward):
            layer.router.balance.normal_()
    return layer


def compiled(module, weights):
    """What OpenVINO computes in a module's place, for any number of rows."""
    example = torch.randn(1, 4, 32)
    model = openvino.convert(module, (example,), ["x"], weights=weights, samples=[{"x": example.numpy()}])
    return extension.extended_core().compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})


OF_WEIGHTS = {"fp32": tuple(LAYERS), "int8": ("published", "flat")}


@pytest.fixture(scope="module")
def outputs():
    """By weights and rows, each layer's output in OpenVINO and in PyTorch, by name."""

    @functools.cache
    def both_forms(weights):
        module = Beside(map(make, OF_WEIGHTS[weights])).eval()
        return module, compiled(module, weights)

    @functools.cache
    def computed(weights, rows):
        module, in_openvino = both_forms(weights)
        x = torch.randn(2, rows // 2, 32, generator=torch.Generator().manual_seed(rows))
        with torch.no_grad():
            return dict(zip(OF_WEIGHTS[weights], zip(in_openvino(x.numpy())[0], module(x), strict=True), strict=True))

    return computed


@pytest.mark.parametrize("name", LAYERS)
@pytest.mark.parametrize("rows", [2, 200])
def test_an_operation_computes_its_layer(name, rows, outputs):
    got, want = outputs("fp32", rows)[name]
    assert relative(got, want) < 2e-6


def test_a_layer_alone_is_converted():
    layer, x = make("flat"), torch.randn(3, 5, 32)
    with torch.no_grad():
        assert relative(compiled(layer, "fp32")(x.numpy())[0], layer(x)) < 2e-6


@pytest.mark.parametrize("name", OF_WEIGHTS["int8"])
def test_int8_is_close_and_not_fp32(name, outputs):
    got, want = outputs("int8", 64)[name]
    assert 1e-4 < relative(got, want) < 0.05


def small_bert(cls=BertModel, descriptions=("gated", "flat"), **changes):
    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=60,
        hidden_size=32,
        num_hidden_layers=len(descriptions),
        num_attention_heads=2,
        intermediate_size=48,
        max_position_embeddings=40,
        **changes,
    )
    dense = cls(config, add_pooling_layer=False) if cls is BertModel else cls(config)
    return models.make_converted(dense.eval(), [LAYERS.get(name) for name in descriptions]).eval()


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    model = small_bert()
    folder = tmp_path_factory.mktemp("model")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def exported(saved, tmp_path_factory):
    """The saved model's IR by the name of its weights; made once."""
    out = tmp_path_factory.mktemp("ir")
    return functools.cache(lambda weights: fastff.export(saved[1], out / weights, to="openvino", weights=weights))


def padded(model, lengths):
    ids = torch.randint(60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(1))
    mask = (torch.arange(ids.shape[1]) < torch.tensor(lengths)[:, None]).long()
    with torch.no_grad():
        return ids, mask, model(input_ids=ids, attention_mask=mask)


@pytest.mark.parametrize(("weights", "error"), [("fp32", 2e-6), ("int8", 0.06)])
def test_an_ir_on_disk_computes_the_model_at_every_length(saved, exported, weights, error):
    model, out = saved[0], exported(weights)
    run = openvino.read(out, INFERENCE_NUM_THREADS=2, INFERENCE_PRECISION_HINT="f32")
    for lengths in ([1], [7, 3], [40, 40, 12]):
        ids, mask, want = padded(model, lengths)
        got = run(input_ids=ids.numpy(), attention_mask=mask.numpy())
        kept = mask.bool()
        assert relative(got[kept.numpy()], want.last_hidden_state[kept]) < error, lengths
    kinds = [node.get_type_name() for node in _core(out).read_model(out / openvino.MODEL).get_ops()]
    assert sorted(kind for kind in kinds if kind.startswith("Fastff")) == ["FastffRouted", "FastffTrees"]
    assert ("FakeQuantize" in kinds) == (weights == "int8"), "dense parts are NNCF's"


def _core(folder):
    core = ov.Core()
    core.add_extension(folder / extension.NAME)
    return core


def test_bf16_is_openvinos_own_choice(saved, exported):
    ids, mask, want = padded(saved[0], [20])
    got = openvino.read(exported("fp32"), INFERENCE_PRECISION_HINT="bf16")(
        input_ids=ids.numpy(), attention_mask=mask.numpy()
    )
    assert relative(got, want.last_hidden_state) < 0.03


def test_the_command_exports_a_classifier(tmp_path, monkeypatch, capsys):
    model = small_bert(BertForSequenceClassification, ("published", None), num_labels=3)
    model.save_pretrained(tmp_path / "model")
    tokenizer().save_pretrained(tmp_path / "model")
    done = invoke(["export", tmp_path / "model", "--to", "openvino", "--weights", "fp32", "--out", tmp_path / "ir"])
    assert done.exit_code == 0, done.output
    ids, mask, want = padded(model, [9, 4])
    got = openvino.read(tmp_path / "ir")(input_ids=ids.numpy(), attention_mask=mask.numpy())
    assert relative(got, want.logits) < 0.03
    assert json.loads((tmp_path / "ir" / openvino.RECORD).read_text())["output"] == "logits"
    served = encoder_backends.open_openvino(tmp_path / "ir", threads=1)
    batch = [Tokens(row[on.bool()].tolist()) for row, on in zip(ids, mask, strict=True)]
    assert relative(served.compute(batch), want.logits) < 0.03
    monkeypatch.setattr(sys, "argv", ["openvino_runtime", str(tmp_path / "ir"), "w1 w2"])
    runpy.run_path(str(Path(__file__).parents[1] / "examples" / "openvino_runtime.py"), run_name="__main__")
    assert "4 tokens, output (1, 3)" in capsys.readouterr().out
    assert (served.kind, served.labels) == ("classifier", ["LABEL_0", "LABEL_1", "LABEL_2"])


def test_what_cannot_be_exported_is_said(saved, tmp_path, monkeypatch):
    _, folder = saved
    with pytest.raises(ValueError, match="weights 'int3' is not one of int8, fp32"):
        fastff.export(folder, tmp_path / "ir", to="openvino", weights="int3")
    with pytest.raises(ValueError, match="to 'onnx' is not one of"):
        fastff.export(folder, tmp_path / "ir", to="onnx")
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        fastff.export(tmp_path, tmp_path / "ir", to="openvino")
    with pytest.raises(FileError, match=r"fastff_openvino.json"):
        openvino.read(folder)
    fastff_version = metadata.version
    for version in ("2024.6.0", "2027.0.0"):
        monkeypatch.setattr(
            metadata, "version", lambda name, v=version: v if name == "openvino" else fastff_version(name)
        )
        with pytest.raises(BackendUnavailable, match=rf"OpenVINO {version} .* expected 2025.0 up to, .* 2027.0"):
            fastff.export(folder, tmp_path / "ir", to="openvino")
    assert not (tmp_path / "ir").exists()


def test_an_ir_without_the_extension_names_the_operation(exported):
    with pytest.raises(RuntimeError, match="Fastff"):
        ov.Core().read_model(exported("fp32") / openvino.MODEL)


def test_a_compiler_that_fails_is_quoted(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("CXX", shutil.which("false"))
    with pytest.raises(BackendUnavailable, match="cannot build the OpenVINO extension"):
        fastff.openvino_extension()
    monkeypatch.setenv("CXX", "no-such-compiler -O2")
    with pytest.raises(BackendUnavailable, match=r"needs a C\+\+ compiler: .*'no-such-compiler'"):
        fastff.openvino_extension()
    assert not list((tmp_path / "fastff").glob("openvino-*"))


def test_a_router_of_ones_own_is_refused():
    class Mine(torch.nn.Module):
        leaves = 4

        def forward(self, x):
            return torch.zeros(*x.shape[:-1], 1, dtype=torch.int64), torch.ones(*x.shape[:-1], 1)

    layer = fastff.ConditionalFeedforward(8, router=Mine(), leaves=4, leaf_width=2)
    with pytest.raises(Exception, match="router Mine cannot be exported"):
        openvino.convert(layer, (torch.randn(1, 2, 8),), ["x"], weights="fp32")
    keys = {**LAYERS["product_key"], "reads": 16}
    with pytest.raises(CheckpointError, match="leave 16 features unread"):
        openvino._described(build_feedforward(keys, 32), "fp32")


@pytest.mark.parametrize(("said", "other"), [('depth="2"', 'depth="6"'), ('candidates="8"', 'candidates="800"')])
def test_attributes_that_ask_for_more_weights_than_there_are_are_refused(said, other, exported, tmp_path):
    folder = tmp_path / "ir"
    shutil.copytree(exported("fp32"), folder)
    whole = (folder / openvino.MODEL).read_text()
    assert said in whole
    (folder / openvino.MODEL).write_text(whole.replace(said, other))
    ids = torch.ones(1, 3, dtype=torch.int64).numpy()
    with pytest.raises(RuntimeError, match="does not hold the"):
        openvino.read(folder)(input_ids=ids, attention_mask=ids)


MODELS_IN_TURN = """
import gc, os, signal, sys
from fastff.engine import openvino
signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background it is ignored
first, second = openvino.read(sys.argv[1]), openvino.read(sys.argv[1])
del first
gc.collect()
del second
gc.collect()
try:
    os.kill(os.getpid(), signal.SIGINT)
except KeyboardInterrupt:
    print("interrupted")
"""


def test_ctrl_c_is_heard_after_models_that_are_gone(exported):
    """OpenVINO's own stack for signals must not be among what went."""
    command = [sys.executable, "-c", MODELS_IN_TURN, exported("fp32")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "interrupted\n"), done.stderr


def test_the_extension_runs_no_pool_of_its_own():
    """It has no thread of the core's: rows are shared out over OpenVINO's."""
    needed = subprocess.run(["readelf", "-d", fastff.openvino_extension()], capture_output=True, text=True, check=True)
    assert "libtbb" in needed.stdout
    assert "libgomp" not in needed.stdout
