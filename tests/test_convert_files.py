"""Files of a conversion: what a model directory carries along, what a damaged folder of an interrupted run says, and
what the version before wrote (tests/written_before/1f96a58, by that commit, killed after five joint steps of six)."""

from __future__ import annotations

import errno
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from convert_cases import few_shapes, saved, text, tokenizer
from fastff.convert import ConversionSettings, Settings, choose_layers, convert
from fastff.convert.capture import capture
from fastff.convert.distill_context import converted_blocks
from fastff.errors import CheckpointError
from fastff.models.carried_files import carry
from fastff.text.examples import tokenise

BEFORE = Path(__file__).parent / "written_before" / "1f96a58"
MODULES = ["", "1_Pooling", "2_Dense", "3_Normalize", "nested/4_Dropout"]


def interrupted_settings(**changes):
    """Those of the run in BEFORE, whose names were others."""
    old = {"controls": ("narrow",), "mild": 0.5, "rate_routing": 0.3, "rate": 1e-3, "rate_others": 2e-4}
    with pytest.warns(DeprecationWarning, match="now ConversionSettings"):
        settings = Settings(
            model="dense",
            text=Path("text.txt"),
            out=Path("out"),
            active=0.4,
            rows=300,
            probe_rows=150,
            timing_s=0.002,
            shapes=((1, 8),),
            layer_steps=3,
            steps=6,
            batch=8,
            max_length=8,
            keep_slow=True,
            average=0.9,
            **old,
        )
    assert isinstance(settings, ConversionSettings)
    assert (settings.baselines, settings.dense_fade, settings.routing_lr_scale) == (("narrow",), 0.5, 0.3)
    return replace(settings, **changes)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """A copy of what the version before left, as the working directory: its settings name relative paths."""
    shutil.copytree(BEFORE, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(choose_layers, "DEPTHS", (2,))
    return tmp_path / "out" / "work"


def test_a_converted_model_of_the_version_before_computes_the_same():
    model = AutoModel.from_pretrained(BEFORE / "converted").eval()
    expected = load_file(BEFORE / "converted" / "expected.safetensors")
    with torch.no_grad():
        assert (model(expected["input_ids"])[0] - expected["want"]).abs().max() < 1e-5


def test_a_conversion_that_the_version_before_began_goes_on(interrupted):
    done = []
    record = convert(interrupted_settings(), progress=lambda what, done_, *_: done.append((what, done_)))
    assert [step for what, step in done if what == "distil chosen"] == [5, 6]
    assert not [what for what, _ in done if what in ("probe", "capture", "timing", "layers chosen")]
    assert record["continued"]
    assert set(record["variants"]) == {"chosen", "narrow"}
    assert record["variants"]["chosen"]["unexplained"][0] > 0
    assert converted_blocks(AutoModel.from_pretrained("out"))
    assert not interrupted.exists()


def test_other_settings_than_those_of_the_version_before_are_named(interrupted):
    with pytest.raises(CheckpointError, match=r"dense_fade 0\.5 there, 0\.25 asked for"):
        convert(interrupted_settings(dense_fade=0.25))


DAMAGES = {
    "nothing": lambda content: b"",
    "half": lambda content: content[: len(content) // 2],
    "a list": lambda content: b"[1, 2]",
    "a word": lambda content: (
        content.replace(b"steps", b"stops").replace(b"profile", b"porfile").replace(b"clock", b"c")
    ),
}


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("name", ["settings.json", "plan.json", "timetable.json", "main/tree/built.pt"])
def test_a_damaged_file_of_an_interrupted_run_is_named(name, damage, interrupted):
    path = interrupted / name
    before = path.read_bytes()
    path.write_bytes(DAMAGES[damage](before))
    if path.read_bytes() == before:
        pytest.skip("the word is not in this file")
    other_run = "|steps None there, 6 asked for" if name == "settings.json" else ""
    with pytest.raises(CheckpointError, match=path.name.replace(".", r"\.") + other_run):
        convert(interrupted_settings())


@pytest.mark.parametrize("name", ["main/tree/distil.pt", "input-001.f16", "tokens.bin", "offsets.npy"])
@pytest.mark.parametrize("keep", [0.0, 0.5, 0.99])
def test_a_truncated_file_of_an_interrupted_run_is_named(name, keep, interrupted):
    content = (interrupted / name).read_bytes()
    (interrupted / name).write_bytes(content[: int(keep * len(content))])
    with pytest.raises(CheckpointError, match=Path(name).name.replace(".", r"\.")):
        convert(interrupted_settings())


def test_a_disk_that_fills_while_rows_are_captured_is_told_and_the_rows_are_taken_again(
    tokenizer, text, tmp_path, monkeypatch
):
    """Space is taken before it is written to: a map of a file that the disk cannot hold would end the process."""
    model = AutoModel.from_pretrained(saved(tmp_path / "model", tokenizer))
    examples = tokenise(tokenizer, text, tmp_path, max_length=12, max_tokens=10**6, whole_blocks=False)
    sizes = []

    def fill(_file, _offset, size):
        sizes.append(size)
        if len(sizes) == 2:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    options = {"rows": 200, "batch": 16, "progress": lambda *_: None}
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fill)
        with pytest.raises(CheckpointError, match=r"cannot write .*input-001\.f16: No space left on device"):
            capture(model, examples, tmp_path, **options)
    assert sizes == [200 * 32 * 2] * 2
    assert not list(tmp_path.glob("captured-*"))
    assert len(capture(model, examples, tmp_path, **options)[1]) == 200


def write_modules(folder, paths=MODULES):
    (folder / "modules.json").write_text(json.dumps([{"idx": k, "path": path} for k, path in enumerate(paths)]))
    for path in filter(None, paths):
        (folder / path).mkdir(parents=True, exist_ok=True)
    (folder / "1_Pooling" / "config.json").write_text("{}")
    (folder / "2_Dense" / "config.json").write_text("{}")
    save_file({"linear.weight": torch.ones(2, 2)}, folder / "2_Dense" / "model.safetensors")
    (folder / "sentence_bert_config.json").write_text('{"max_seq_length": 256}')
    (folder / "config_sentence_transformers.json").write_text("{}")
    (folder / "training_log.txt").write_text("not carried")


def test_every_module_of_a_sentence_transformer_is_carried(tmp_path):
    model, out = tmp_path / "model", tmp_path / "out"
    model.mkdir()
    write_modules(model)
    carry(str(model), out)
    carried = {str(path.relative_to(out)) for path in out.rglob("*")}
    assert {path for path in MODULES if path} <= carried
    assert {"modules.json", "sentence_bert_config.json", "config_sentence_transformers.json"} <= carried
    assert "training_log.txt" not in carried
    for name in ("2_Dense/model.safetensors", "sentence_bert_config.json"):
        assert (out / name).read_bytes() == (model / name).read_bytes()


def test_modules_of_a_model_of_the_hub_are_fetched(tmp_path, monkeypatch):
    cached, asked = tmp_path / "cache", []
    cached.mkdir()
    write_modules(cached)
    monkeypatch.setattr("fastff.models.carried_files.locate", lambda *_: str(cached / "modules.json"))

    def download(name, allow_patterns):
        asked.append((name, allow_patterns))
        return str(cached)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    carry("someone/model", tmp_path / "out")
    assert (tmp_path / "out" / "2_Dense" / "model.safetensors").is_file()
    ((name, patterns),) = asked
    assert name == "someone/model"
    assert {"2_Dense/*", "sentence_*_config.json"} <= set(patterns)


@pytest.mark.parametrize("path", ["../secret", "/etc", "a/../../b"])
def test_modules_outside_the_model_are_refused(path, tmp_path):
    write_modules(tmp_path)
    (tmp_path / "modules.json").write_text(json.dumps([{"path": path}]))
    with pytest.raises(CheckpointError, match="a place outside the model"):
        carry(str(tmp_path), tmp_path / "out")


@pytest.mark.parametrize("content", ["", "{}", "[1]", '[{"path": 3}]', '[{"path": "1_Pool'])
def test_a_damaged_list_of_modules_is_named(content, tmp_path):
    (tmp_path / "modules.json").write_text(content)
    with pytest.raises(CheckpointError, match=r"modules\.json"):
        carry(str(tmp_path), tmp_path / "out")
