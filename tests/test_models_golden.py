"""The model against numbers of the published implementation: outputs, loss, paths and gradients, on every backend."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification

from fastff import FFF, ops
from fastff.models.published.tensors import state_of
from model_cases import GOLDEN

CASES = json.loads((GOLDEN / "cases.json").read_text())
TOLERANCES = CASES["suggested_tolerances"]
NAMES = {group: [case["dir"] for case in CASES["lm_cases"] if case["group"] == group] for group in ("lm", "seqcls")}
pytestmark = pytest.mark.parametrize("backend", ops.available_backends())


def masked_lm(name, **options):
    model = AutoModelForMaskedLM.from_pretrained(GOLDEN / name, **options)
    return model, load_file(GOLDEN / name / "io.safetensors")


def assert_near(got, want, kind):
    torch.testing.assert_close(got.detach(), want, **TOLERANCES[kind])


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("name", NAMES["lm"])
def test_outputs_and_loss(name, attention, backend):
    model, io = masked_lm(name, attn_implementation=attention)
    first, seen = model.encoder.layers[0], {}
    for key, module in (("layer0_attn_out", first.attention), ("layer0_out", first)):
        module.register_forward_hook(lambda module, args, output, key=key: seen.setdefault(key, []).append(output[0]))
    with ops.use_backend(backend), torch.no_grad():
        with_mask = model(io["input_ids"], io["attention_mask"], labels=io["labels"], output_hidden_states=True)
        without = model(io["input_ids"], output_hidden_states=True)
    kind = "lm logits/encoder"
    assert_near(with_mask.hidden_states[0], io["embedding_output"], kind)
    for key, (value, _) in seen.items():
        assert_near(value, io[key], kind)
    assert_near(with_mask.hidden_states[-1], io["encoder_output"], kind)
    assert_near(with_mask.logits, io["logits"], kind)
    assert_near(without.hidden_states[-1], io["encoder_output_no_mask"], kind)
    assert_near(without.logits, io["logits_no_mask"], kind)
    assert_near(with_mask.loss.reshape(1), io["mlm_loss_sparse"], kind)


@pytest.mark.parametrize("name", NAMES["lm"])
def test_logits_in_float64(name, backend):
    model, io = masked_lm(name, dtype=torch.float64)
    with ops.use_backend(backend), torch.no_grad():
        logits = model(io["input_ids"], io["attention_mask"]).logits
    torch.testing.assert_close(logits, io["logits_f64"], rtol=0, atol=1e-6)  # its float32 buffers round scale and mask


@pytest.mark.parametrize("name", NAMES["lm"])
def test_paths(name, backend):
    model, io = masked_lm(name)
    conditional = {i: layer.feedforward for i, layer in enumerate(model.encoder.layers)}
    conditional = {i: layer for i, layer in conditional.items() if isinstance(layer, FFF)}
    paths = {}
    for i, layer in conditional.items():
        layer.register_forward_pre_hook(lambda module, args, i=i: paths.update({i: module.path(args[0])}))
    with ops.use_backend(backend), torch.no_grad():
        model(io["input_ids"], io["attention_mask"])
    expected = {name for name in io if name.endswith("path_nodes")}
    assert expected == {f"layer{i}.path_nodes" for i in paths}
    for i, path in paths.items():
        assert torch.equal(path, io[f"layer{i}.path_nodes"])


@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("name", NAMES["lm"])
def test_gradients_of_the_masked_language_model(name, sparse, backend):
    dropouts = ("hidden_dropout_prob", "embedding_dropout", "attention_probs_dropout_prob")
    model, io = masked_lm(name, **dict.fromkeys(dropouts, 0.0))
    model.train(sparse)  # sparse prediction belongs to training mode
    assert model.config.sparse_prediction
    with ops.use_backend(backend):
        output = model(io["input_ids"], io["attention_mask"], labels=io["labels"])
        output.loss.backward()
    assert output.logits.dim() == (2 if sparse else 3)
    assert_near(output.loss.reshape(1), io["mlm_loss_sparse"], "lm logits/encoder")
    # The renaming is linear, so it takes the published gradients to ours; what has no gradient passes through.
    state = load_file(GOLDEN / name / "model.safetensors")
    state |= {key.removeprefix("grad."): value for key, value in io.items() if key.startswith("grad.")}
    state["decoder.weight"] = state["encoder.embedding.word_embedding.weight"]
    expected = state_of(state, model.config, "ScriptableLMForPreTraining")
    for key, parameter in model.named_parameters():
        assert_near(parameter.grad, expected[key], "lm grads")


@pytest.mark.parametrize("name", NAMES["seqcls"])
def test_classifier(name, backend):
    io = load_file(GOLDEN / name / "io.safetensors")
    model = AutoModelForSequenceClassification.from_pretrained(GOLDEN / name)
    with ops.use_backend(backend), torch.no_grad():
        output = model(io["input_ids"], io["attention_mask"], labels=io["labels"])
    assert_near(output.logits, io["logits"], "lm logits/encoder")
    assert_near(output.loss.reshape(1), io["loss"].reshape(1), "lm logits/encoder")
