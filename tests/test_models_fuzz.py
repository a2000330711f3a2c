"""Damaged files of model directories: whatever is in them, loading raises CheckpointError, or loads."""

from __future__ import annotations

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from convert_cases import tiny
from fastff.errors import CheckpointError
from fastff.models import ConvertedConfig, UltraFastBertConfig, UltraFastBertModel, make_converted
from fastff.models.encoder.checkpoint import _read_config, _read_published
from fastff.models.weight_files import read_object, stored_dtypes
from fuzzing import damage, error_of

COUNT = 2000
TREE = {"kind": "fff", "depth": 2, "trees": 2, "leaf_width": 3, "gate": "boundary", "bias": True, "shared": 4}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    make_converted(tiny(), [TREE, None]).save_pretrained(root / "converted")
    sizes = {"vocab_size": 20, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = UltraFastBertConfig(**sizes, max_position_embeddings=8, feedforward=[{"kind": "fff", "depth": 1}])
    UltraFastBertModel(config).save_pretrained(root / "own")
    return root


def unexpected(path, loads, count, *, seed, allowed=()):
    """Errors that are not CheckpointErrors, of loading a file's damaged copies; the file is whole again afterwards."""
    found = {}
    for number in damage(path, count, seed=seed):
        error = error_of(loads)
        if error is not None and not isinstance(error, (CheckpointError, *allowed)):
            found[f"{type(error).__name__}: {error}"] = (number, path.read_bytes()[:400])
    assert error_of(loads) is None
    return found


@pytest.mark.parametrize(
    ("name", "config_class"), [("own", UltraFastBertConfig), ("converted", ConvertedConfig)], ids=["own", "converted"]
)
def test_damaged_configurations(name, config_class, folders):
    path = folders / name / "config.json"

    def loads():
        config = config_class.from_dict(read_object(path))
        if config_class is ConvertedConfig:
            config.base_config()

    assert unexpected(path, loads, COUNT, seed=1) == {}


def values_of(content):
    """Every place in nested dicts and lists: the container and the key."""
    items = content.items() if isinstance(content, dict) else enumerate(content)
    for key, value in list(items):
        yield content, key
        if isinstance(value, dict | list):
            yield from values_of(value)


@pytest.mark.parametrize("bad", [None, -1, 0, 2**31, 2**70, 1.5, float("inf"), "", "x", True, [], [1], {}, {"a": 1}])
@pytest.mark.parametrize("name", ["own", "converted"])
def test_configurations_with_any_value_replaced(name, bad, folders):
    """JSON that is whole and means something else, such as 2**31 layers, which would be built until memory ends."""
    whole = json.dumps(read_object(folders / name / "config.json"))
    places = len(list(values_of(json.loads(whole))))
    config_class = UltraFastBertConfig if name == "own" else ConvertedConfig
    for number in range(places):
        content = json.loads(whole)
        container, key = list(values_of(content))[number]
        container[key] = bad

        def loads(content=content):
            config = config_class.from_dict(content)
            if config_class is ConvertedConfig:
                config.base_config()

        error = error_of(loads)
        assert error is None or isinstance(error, CheckpointError), (key, error)


def test_damaged_headers_of_weights(folders):
    path = folders / "own" / "model.safetensors"
    assert unexpected(path, lambda: stored_dtypes(path.parent, {}), COUNT, seed=2) == {}


def test_damaged_lists_of_weight_files(folders, tmp_path):
    shutil.copyfile(folders / "own" / "model.safetensors", tmp_path / "part.safetensors")
    path = tmp_path / "model.safetensors.index.json"
    names = stored_dtypes(folders / "own", {})
    path.write_text(json.dumps({"metadata": {}, "weight_map": dict.fromkeys(names, "part.safetensors")}))
    assert unexpected(path, lambda: stored_dtypes(tmp_path, {}), COUNT, seed=3) == {}
    path.write_text(json.dumps({"weight_map": {"a": "../own/model.safetensors"}}))
    with pytest.raises(CheckpointError, match="which is not there"):
        stored_dtypes(tmp_path, {})


@pytest.mark.parametrize("name", ["config.json", "pytorch_model.bin"])
def test_damaged_published_checkpoints(name, tmp_path):
    folder = small_published(tmp_path)

    def loads():
        _, content = _read_config(folder, {})
        if content is not None and content.get("model_type") == "crammedBERT":
            _read_published(folder, content, {})

    assert unexpected(folder / name, loads, COUNT, seed=4) == {}


def small_published(folder):
    """A directory in the published layout without layers, so that a file is read in a millisecond."""
    arch = {"hidden_size": 4, "num_transformer_layers": 0, "attention": {"num_attention_heads": 2}}
    arch |= {"embedding": {"max_seq_length": 4, "vocab_size": 3}, "intermed_type": "fff", "intermed_size": 1}
    arch |= {"intermed_depth": 1}
    config = {"model_type": "crammedBERT", "architectures": ["ScriptableLM"], "arch": arch}
    (folder / "config.json").write_text(json.dumps(config))
    state = {
        "embedding.word_embedding.weight": torch.ones(3, 4),
        "embedding.pos_embedding.scale_factor": torch.ones(1),
        "embedding.norm.weight": torch.ones(4),
        "embedding.norm.bias": torch.ones(4),
        "final_norm.weight": torch.ones(4),
        "final_norm.bias": torch.ones(4),
    }
    torch.save(state, folder / "pytorch_model.bin")
    return folder


@pytest.mark.parametrize("name", ["own", "converted"])
@pytest.mark.parametrize("file", ["config.json", "model.safetensors"])
def test_damaged_directories_loaded_whole(name, file, folders):
    """Transformers reads config.json before it asks this project: what it cannot parse, or whose model_type it does not
    know, is its own OSError or ValueError, which names the file."""
    allowed = (OSError, ValueError) if file == "config.json" else ()
    path = folders / name / file
    assert unexpected(path, lambda: AutoModel.from_pretrained(path.parent), 40, seed=5, allowed=allowed) == {}


@pytest.mark.parametrize("name", ["own", "converted"])
def test_weights_of_another_kind_of_number_are_refused(name, folders, tmp_path):
    """Their bytes would be taken for floats."""
    shutil.copytree(folders / name, tmp_path / name)
    tensors = load_file(tmp_path / name / "model.safetensors")
    changed = next(key for key in tensors if key.endswith("w_in"))
    tensors[changed] = tensors[changed].view(torch.int32)
    save_file(tensors, tmp_path / name / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=rf"holds {changed} as I32, expected torch\.float32"):
        AutoModel.from_pretrained(tmp_path / name)
