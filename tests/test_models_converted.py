"""Converted models: save and load through the Auto classes for every family, and what a bad directory says."""

from __future__ import annotations

import copy
import io
import json
import os
import pickle
import subprocess
import sys

import joblib
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForMaskedLM,
    AutoModelForQuestionAnswering,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    BertForTokenClassification,
    PreTrainedModel,
    SiglipTextModel,
)

from fastff.convert.dense_model import load_dense
from fastff.convert.neurons import dense_forward
from fastff.errors import CheckpointError
from fastff.models import ConvertedConfig, ConvertedFeedforward, make_converted
from fastff.models.families import FAMILIES, family_of
from fastff.models.int8_files import INT8_FILE, write_int8
from fastff.text.positions import first_position

TREE = {"kind": "fff", "depth": 2, "trees": 2, "leaf_width": 3, "gate": "boundary", "bias": True}
CASES = [
    ("bert", AutoModel),
    ("bert", AutoModelForSequenceClassification),
    ("roberta", AutoModelForMaskedLM),
    ("xlm-roberta", AutoModel),
    ("modernbert", AutoModelForMaskedLM),
    ("gpt2", AutoModelForCausalLM),
    ("llama", AutoModelForCausalLM),
    ("mistral", AutoModel),
    ("qwen2", AutoModelForCausalLM),
    ("ultrafastbert", AutoModelForCausalLM),
    ("qwen3", AutoModelForCausalLM),
    ("gemma3_text", AutoModelForCausalLM),
    ("distilbert", AutoModelForMaskedLM),
    ("electra", AutoModel),
    ("mpnet", AutoModelForMaskedLM),
    ("deberta-v2", AutoModelForSequenceClassification),
    ("clip_text_model", AutoModel),
    ("siglip_text_model", SiglipTextModel),
    ("vit", AutoModelForImageClassification),
    ("deit", AutoModel),
    ("dinov2", AutoModel),
    ("clip_vision_model", AutoModel),
    ("siglip_vision_model", AutoModel),
]
PICTURES = ("vit", "deit", "dinov2", "clip_vision_model", "siglip_vision_model")


def tiny(model_type, auto, **options):
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if model_type == "gpt2":
        sizes = {"n_embd": 32, "n_layer": 2, "n_head": 4}
    if model_type in ("llama", "mistral", "qwen2", "qwen3", "gemma3_text"):
        sizes["num_key_value_heads"] = 2
    if model_type in ("qwen3", "gemma3_text"):
        sizes["head_dim"] = 8
    if model_type == "distilbert":
        sizes = {"dim": 32, "n_layers": 2, "n_heads": 4, "hidden_dim": 64}
    if model_type in PICTURES:
        options |= {"image_size": 16, "patch_size": 8}
    else:
        options["vocab_size"] = 100
    if model_type == "ultrafastbert":
        del sizes["intermediate_size"]
        sizes |= {"is_decoder": True, "feedforward": {"kind": "dense", "intermediate_size": 64, "activation": "swiglu"}}
    if model_type == "modernbert":
        special |= {"cls_token_id": 1, "sep_token_id": 2}
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **sizes, **special, **options)
    return (auto.from_config if hasattr(auto, "from_config") else auto)(config).eval()


def inputs_of(model_type):
    generator = torch.Generator().manual_seed(1)
    if model_type in PICTURES:
        return {"pixel_values": torch.randn(2, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 100, (2, 7), generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def converted(model_type="bert", auto=AutoModel, descriptions=(TREE, None)):
    return make_converted(tiny(model_type, auto), descriptions)


def test_every_family_is_tested():
    assert {name for name, _ in CASES} == set(FAMILIES)


@pytest.mark.parametrize(("model_type", "auto"), CASES)
def test_what_is_saved_loads_and_computes_the_same(model_type, auto, tmp_path):
    model, inputs = converted(model_type, auto), inputs_of(model_type)
    with torch.no_grad():
        want = model(**inputs, output_hidden_states=True)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(config, ConvertedConfig)
    if auto is SiglipTextModel:  # which no Auto class knows
        loaded = type(model).from_pretrained(tmp_path, config=config.base_config()).eval()
    else:
        loaded = auto.from_pretrained(tmp_path).eval()
    with torch.no_grad():
        got = loaded(**inputs, output_hidden_states=True)
    assert torch.equal(got[0], want[0])
    assert len(got.hidden_states) == 3
    family = family_of(model_type)
    first, second = (isinstance(family.slot_of(block), ConvertedFeedforward) for block in family.blocks_of(loaded))
    assert (first, second) == (True, False)
    if auto is AutoModelForCausalLM and model_type != "ultrafastbert":
        assert loaded.generate(**inputs, max_new_tokens=2).shape == (2, 9)


@pytest.mark.parametrize(("model_type", "auto"), [case for case in CASES if FAMILIES[case[0]].norm is None])
def test_what_a_feedforward_is_added_to_is_known(model_type, auto):
    """`capture` takes the residual as the block's output without what the feedforward adds; a block whose feedforward
    gives nothing puts out the residual."""

    class Nothing(torch.nn.Module):
        def forward(self, x):
            return torch.zeros_like(x)

    family, model = family_of(model_type), tiny(model_type, auto)
    block = family.blocks_of(model)[0]
    with torch.no_grad():
        for parameter in block.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    seen = {}
    hooks = [
        module.register_forward_hook(
            lambda _m, _a, y, name=name: seen.update({name: y if isinstance(y, Tensor) else y[0]})
        )
        for name, module in (("end", block), ("added", family.after_of(block) or family.slot_of(block)))
    ]
    with torch.no_grad():
        model(**inputs_of(model_type))
        found = seen["end"] - seen["added"]
        with family.replaced(block, Nothing()):
            model(**inputs_of(model_type))
    for hook in hooks:
        hook.remove()
    assert (found - seen["end"]).abs().max() < 1e-5


@pytest.mark.parametrize("model_type", ["bert", "roberta", "xlm-roberta", "electra"])
def test_positions_before_the_first_token_are_known(model_type):
    model = tiny(model_type, AutoModel, max_position_embeddings=12)
    most = 12 - first_position(model_type, model.config.pad_token_id)
    with torch.no_grad():
        assert model(torch.full((1, most), 5)).last_hidden_state.shape == (1, most, 32)
        with pytest.raises((IndexError, RuntimeError)):
            model(torch.full((1, most + 1), 5))


def test_heads_that_a_conversion_would_lose_are_refused(tmp_path):
    BertForTokenClassification(tiny("bert", AutoModel).config).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="BertForTokenClassification has a head that a conversion would lose"):
        load_dense(str(tmp_path))


@pytest.mark.parametrize(("model_type", "auto"), [case for case in CASES if case[1] is not AutoModelForCausalLM])
def test_the_weights_read_from_a_block_compute_what_it_computes(model_type, auto):
    model = tiny(model_type, auto)
    family = family_of(model_type)
    x = torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    for block in family.blocks_of(model):
        want = family.dense_of(block)(x)
        assert (dense_forward(family.read(block, model.config), x) - want).abs().max() < 1e-5 * want.abs().max()


def test_a_gated_block_of_dinov2_is_read_too():
    model = tiny("dinov2", AutoModel, use_swiglu_ffn=True)
    block, x = model.encoder.layer[0], torch.randn(5, 32, generator=torch.Generator().manual_seed(2))
    dense = family_of("dinov2").read(block, model.config)
    assert dense.v_in is not None
    assert (dense_forward(dense, x) - block.mlp(x)).abs().max() < 1e-6


def test_8_bit_files_hold_a_quarter_and_load_as_any_other(tmp_path):
    model = converted("llama", AutoModelForCausalLM)
    write_int8(model, tmp_path)
    assert not (tmp_path / "model.safetensors").exists()
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = inputs_of("llama")["input_ids"]
    with torch.no_grad():
        want, got = model(ids).logits, loaded(ids).logits
    assert 0 < (got - want).abs().max() < 0.05 * want.abs().max()
    for name, tensor in model.state_dict().items():
        step = tensor.abs().amax(-1, keepdim=True) / 127
        assert ((loaded.state_dict()[name] - tensor).abs() <= 0.51 * step).all() or tensor.dim() < 2
    with pytest.raises(CheckpointError, match="load without device_map"):
        AutoModelForCausalLM.from_pretrained(tmp_path, device_map="cpu")
    half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype="bfloat16")
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    loaded.save_pretrained(tmp_path / "whole")
    write_int8(model, tmp_path / "whole")
    with torch.no_grad():
        loaded.model.norm.weight.fill_(7.0)
    loaded.save_pretrained(tmp_path / "whole")  # and not what is there in 8 bits
    assert (AutoModelForCausalLM.from_pretrained(tmp_path / "whole").model.norm.weight == 7.0).all()
    stored = load_file(tmp_path / INT8_FILE)
    del stored["model.norm.weight"]
    save_file(stored, tmp_path / INT8_FILE)
    with pytest.raises(CheckpointError, match=r"missing tensor model\.norm\.weight"):
        AutoModelForCausalLM.from_pretrained(tmp_path)
    (tmp_path / INT8_FILE).write_bytes(b"none")
    with pytest.raises(CheckpointError, match="cannot be read"):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_arguments_of_from_pretrained_reach_the_original_configuration(tmp_path):
    converted().save_pretrained(tmp_path)
    changes = {"num_labels": 3, "hidden_dropout_prob": 0.25, "output_hidden_states": True}
    config = AutoConfig.from_pretrained(tmp_path, **changes)
    assert {name: getattr(config.base_config(), name) for name in changes} == changes
    loaded = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, attn_implementation="eager", dtype=torch.bfloat16, **changes
    )
    assert {name: getattr(loaded.config, name) for name in changes} == changes
    assert loaded.classifier.out_features == 3
    assert loaded.dropout.p == 0.25
    assert loaded.config._attn_implementation == "eager"
    assert loaded.dtype == torch.bfloat16
    loaded.save_pretrained(tmp_path / "again")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "again")
    assert torch.equal(again.classifier.weight, loaded.classifier.weight)
    with pytest.raises(TypeError, match="nothing_of_the_kind"):
        AutoModel.from_pretrained(tmp_path, nothing_of_the_kind=1)


@pytest.mark.parametrize("description", [{"kind": "none"}, {"kind": "dense", "intermediate_size": 5, "bias": True}])
def test_the_controls_save_and_load_too(description, tmp_path):
    model = converted(descriptions=(description, description))
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(ids)[0], model(ids)[0])


@pytest.mark.parametrize("description", [TREE, {**TREE, "shared": 5}])
def test_masked_training_is_the_same_function(description):
    layer = ConvertedFeedforward(description, 32)
    x = torch.randn(9, 32, generator=torch.Generator().manual_seed(0))
    plain = layer.train()(x)
    layer.masked_training = True
    assert (layer(x) - plain).abs().max() < 1e-5
    assert ConvertedFeedforward({"kind": "none"}, 32).flops_per_row == 0


@pytest.mark.parametrize("activation", [None, "geglu"])
def test_shared_neurons_add_to_the_trees(activation, tmp_path):
    description = {**TREE, "shared": 6, "shared_activation": activation}
    model = converted(descriptions=(description, None))
    layer = model.encoder.layer[0].intermediate
    with torch.no_grad():
        layer.bias.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1))
    want = layer.layer(x) + layer.shared.linear_out(layer.shared.values(x)) + layer.bias
    assert (layer(x) - want).abs().max() < 1e-5  # with gradients
    with torch.no_grad():
        assert (layer(x) - want).abs().max() < 1e-5  # in place
    assert layer.flops_per_row == layer.layer.flops_per_row + layer.shared.flops_per_row
    model.save_pretrained(tmp_path)
    ids = torch.tensor([[5, 6, 7]])
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(tmp_path).eval()(ids)[0], model(ids)[0])


@pytest.mark.parametrize(
    "description",
    [
        {**TREE, "shared": -1},
        {**TREE, "shared": True},
        {**TREE, "shared": 1.5},
        {"kind": "dense", "intermediate_size": 5, "shared": 2},
    ],
)
def test_a_shared_part_that_cannot_be_is_refused(description):
    with pytest.raises(ValueError, match="shared"):
        converted(descriptions=(description, None))


def test_the_rest_of_the_model_is_copied_and_the_original_untouched():
    model = tiny("bert", AutoModel)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    copy = make_converted(model, (TREE, None))
    assert all(torch.equal(model.state_dict()[k], v) for k, v in before.items())
    assert not hasattr(model.config, "fastff_feedforwards")
    shared = [k for k in before if not k.startswith(("encoder.layer.0.intermediate", "encoder.layer.0.output.dense"))]
    assert all(torch.equal(copy.state_dict()[k], before[k]) for k in shared)


def test_a_missing_tensor_of_a_new_layer_is_an_error(tmp_path):
    converted().save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoder.layer.0.intermediate.layer.w_in"]
    save_file(tensors, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"missing tensor encoder\.layer\.0\.intermediate\.layer\.w_in"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"feedforwards": [TREE]}, "1 feedforward descriptions for 2 blocks"),
        ({"base": {"model_type": "flaubert"}}, "model type 'flaubert' is not one of bert"),
        ({"feedforwards": [{"kind": "nothing"}, None]}, "kind 'nothing'"),
        ({"feedforwards": None}, "needs 'base' and 'feedforwards'"),
    ],
)
def test_a_bad_configuration_says_what_is_wrong(change, message, tmp_path):
    converted().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        AutoModel.from_pretrained(tmp_path)


def test_activations_without_a_kernel_are_refused():
    model = tiny("bert", AutoModel)
    model.config.hidden_act = "mish"
    family = family_of("bert")
    with pytest.raises(CheckpointError, match="activation 'mish' is not one of gelu"):
        family.read(family.blocks_of(model)[0], model.config)


def test_a_head_that_the_architecture_lacks_is_refused(tmp_path):
    converted("mistral", AutoModel).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match="mistral has no AutoModelForMaskedLM"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)


def test_a_missing_tensor_outside_the_new_layers_is_an_error(tmp_path):
    """It would load as random numbers."""
    converted("bert", AutoModelForMaskedLM).save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    lost = ["bert.embeddings.LayerNorm.weight", "bert.encoder.layer.1.output.dense.bias"]
    lost.append("cls.predictions.transform.dense.weight")  # a part of the head, which the others do not make anew
    save_file({k: v for k, v in tensors.items() if k not in lost}, path, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"missing tensor {', '.join(lost)} in"):
        AutoModelForMaskedLM.from_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=r"missing tensor embeddings\.LayerNorm\.weight"):
        AutoModel.from_pretrained(tmp_path)


@pytest.mark.parametrize("auto", [AutoModelForTokenClassification, AutoModelForQuestionAnswering])
@pytest.mark.parametrize("model_type", ["bert", "ultrafastbert"])
def test_heads_of_tokens_and_answers_start_anew_and_are_kept(model_type, auto, tmp_path):
    if model_type == "bert":
        converted("bert", AutoModel).save_pretrained(tmp_path)
    else:
        config = AutoConfig.for_model(
            "ultrafastbert",
            vocab_size=100,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            feedforward=TREE,
        )
        AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path)
    classes = {"num_labels": 5} if auto is AutoModelForTokenClassification else {}
    model = auto.from_pretrained(tmp_path, **classes).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    labels = torch.tensor([[1, -100, 4, 0]])
    if auto is AutoModelForTokenClassification:
        out = model(ids, labels=labels)
        assert out.logits.shape == (1, 4, 5)
        want = torch.nn.functional.cross_entropy(out.logits[0, [0, 2, 3]], labels[0, [0, 2, 3]])
    else:
        out = model(ids, start_positions=torch.tensor([2]), end_positions=torch.tensor([3]))
        pairs = ((out.start_logits, 2), (out.end_logits, 3))
        want = sum(torch.nn.functional.cross_entropy(scores, torch.tensor([at])) for scores, at in pairs) / 2
    assert torch.allclose(out.loss, want)
    out.loss.backward()
    head = model.classifier if auto is AutoModelForTokenClassification else model.qa_outputs
    assert head.weight.grad.abs().sum() > 0
    model.save_pretrained(tmp_path / "again")
    again = auto.from_pretrained(tmp_path / "again").eval()
    with torch.no_grad():
        assert torch.equal(again(ids)[0], model(ids)[0])


def _output(model):
    with torch.no_grad():
        return model(torch.tensor([[5, 6, 7]]))[0]


@pytest.mark.parametrize("model_type", ["bert", "gpt2", "ultrafastbert"])
def test_models_are_pickled_as_objects(model_type, tmp_path):
    model = converted(model_type, AutoModelForCausalLM if model_type != "bert" else AutoModel)
    want = _output(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    joblib.dump(model, tmp_path / "model.joblib")
    copies = [torch.load(file, weights_only=False), pickle.loads(pickle.dumps(model)), copy.deepcopy(model)]
    for other in (*copies, joblib.load(tmp_path / "model.joblib")):
        assert type(other) is type(model)
        assert torch.equal(_output(other), want)
        other.save_pretrained(tmp_path / "saved")
    assert torch.equal(_output(type(model).from_pretrained(tmp_path / "saved", config=model.config).eval()), want)


def test_the_configuration_has_the_sizes_that_tools_ask_for(tmp_path):
    converted("gpt2", AutoModelForCausalLM).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (32, 2, 4)
    assert (config.vocab_size, config.max_position_embeddings) == (100, 1024)
    assert not hasattr(config, "num_key_value_heads")
    assert not hasattr(ConvertedConfig(), "hidden_size")
    assert "hidden_size" not in config.to_dict()


def test_the_hub_gets_the_configuration_of_the_converted_model(tmp_path, monkeypatch):
    uploaded = {}

    def upload(self, folder, *_, **__):
        uploaded.update(json.loads((tmp_path / "config.json").read_text()))

    monkeypatch.setattr(PreTrainedModel, "_upload_modified_files", upload)
    monkeypatch.setattr("transformers.modeling_utils.hf_api", lambda: SimpleHub())
    monkeypatch.setattr("transformers.modeling_utils.create_and_tag_model_card", lambda *_, **__: SimpleHub())
    converted().save_pretrained(tmp_path, push_to_hub=True)
    assert uploaded["model_type"] == "fastff-converted"


class SimpleHub:
    def create_repo(self, name, **_):
        return type("Repository", (), {"repo_id": name})

    def save(self, _path):
        """The model card, of no interest here."""


def test_only_the_main_process_writes(tmp_path):
    converted().save_pretrained(tmp_path / "other", is_main_process=False)
    assert list((tmp_path / "other").glob("*.json")) == []


def test_generation_settings_are_kept(tmp_path):
    dense = tiny("gpt2", AutoModelForCausalLM)
    dense.generation_config.max_length = 77
    make_converted(dense, (TREE, None)).save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).generation_config.max_length == 77


UNPREPARED = """
import pickle, sys
from transformers import AutoConfig, AutoModel
try:
    AutoModel.from_pretrained(sys.argv[1])
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("loaded without being asked to")
model = AutoModel.from_pretrained(sys.argv[1], trust_remote_code=True)
print(type(model).__name__, AutoConfig.from_pretrained(sys.argv[1], trust_remote_code=True).hidden_size)
with open(sys.argv[2], "rb") as file:
    model, ids, want = pickle.load(file)
print(type(model).__name__, bool((model(ids)[0] == want).all()))
"""


def run(source, *arguments, **environment):
    """Words that a fresh interpreter prints, with nobody to answer its questions."""
    command = [sys.executable, "-c", source, *map(str, arguments)]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    done = subprocess.run(
        command, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


def test_a_fresh_process_is_told_how_to_load_and_takes_a_pickled_model(tmp_path):
    """Transformers' error must not only advise to upgrade; a pool's process knows nothing of the classes made here."""
    model, ids = converted("gpt2"), torch.tensor([[5, 6, 7]])
    converted().save_pretrained(tmp_path / "model")
    (tmp_path / "pickle").write_bytes(pickle.dumps((model, ids, _output(model))))
    words = run(UNPREPARED, tmp_path / "model", tmp_path / "pickle", HF_MODULES_CACHE=str(tmp_path / "modules"))
    assert words[-4:] == ["ConvertedBertModel", "32", "ConvertedGPT2Model", "True"]


@pytest.mark.parametrize("count", [1, 3, 2**31])
def test_a_number_of_blocks_without_descriptions_is_refused_before_it_is_built(count, tmp_path):
    converted().save_pretrained(tmp_path)
    path = tmp_path / "config.json"
    content = json.loads(path.read_text())
    content["base"]["num_hidden_layers"] = count
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=f"2 feedforward descriptions for {count} blocks"):
        AutoModel.from_pretrained(tmp_path)
