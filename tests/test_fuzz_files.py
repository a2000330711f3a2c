"""Damaged files: whatever a loader is given, it loads it, or raises an error of fastff that names the file."""

from __future__ import annotations

import gzip
import json
import lzma
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

import fastff
from fastff import FFF, io
from fastff.errors import CheckpointError, TrainingError
from fastff.text.examples import _open as open_examples
from fastff.text.reading import documents
from fastff.text.tokenizer import SPECIALS, Vocabulary, load_tokenizer, train_tokenizer, wrap
from fastff.text.tokens import Tokens
from fastff.train import saving
from fuzzing import error_of, mutations

MUTATIONS = 2000
WORDS = ["one two three, four five six.", "seven eight nine ten", "eleven twelve"]


def fuzz(path: Path, load: Callable[[], Any], seed: int, count: int = MUTATIONS) -> int:
    """Load `count` damaged copies of a file; returns how many were refused."""
    whole, refused = path.read_bytes(), 0
    load()
    for number, damaged in enumerate(mutations(whole, count, seed=seed)):
        path.write_bytes(damaged)
        error = error_of(load)
        if error is not None:
            refused += 1
            assert isinstance(error, (CheckpointError, TrainingError)), f"mutation {number}: {error!r}"
            assert str(path) in str(error) or str(path.parent) in str(error), f"mutation {number}: {error}"
    path.write_bytes(whole)
    return refused


def test_a_layer(tmp_path):
    path = tmp_path / "layer.safetensors"
    fastff.save(FFF(3, depth=2, trees=2, bias=True, gate="boundary"), path)
    assert fuzz(path, lambda: fastff.load(path), 1) > MUTATIONS // 4


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    made = wrap(train_tokenizer(lambda: WORDS * 3, 60), 16)
    made.save_pretrained(folder)
    return folder


def test_a_tokenizer(tokenizer, tmp_path):
    shutil.copytree(tokenizer, tmp_path / "t")

    def load():
        Vocabulary.of(load_tokenizer(tmp_path / "t" / "tokenizer.json"))

    assert fuzz(tmp_path / "t" / "tokenizer.json", load, 2) > MUTATIONS // 4


def made_tokens(folder: Path, **more: Any) -> None:
    ids = np.arange(100, dtype="uint16") % 50
    ids.tofile(folder / "tokens.bin")
    meta = {"sources": ["a"], "column": "text", "most": None, "dtype": "uint16", "tokenizer": "0", "tokens": 100}
    io.write_json(folder / "tokens.json", {**meta, **more})


@pytest.mark.parametrize("name", ["tokens.json", "tokens.bin"])
@pytest.mark.parametrize("described", [True, False])
def test_tokens(name, described, tmp_path):
    made_tokens(tmp_path)
    if described:
        made_tokens(tmp_path, sha256=io.digest(tmp_path / "tokens.bin"))
    vocabulary = Vocabulary(60, 0, 2, 3, 4, 5)

    def load():
        read = Tokens(tmp_path, vocabulary, 10)
        assert int(read.windows(range(len(read))).max()) < vocabulary.size

    refused = fuzz(tmp_path / name, load, 3, MUTATIONS // 2)
    assert refused > MUTATIONS // 2 - 20 if (name, described) == ("tokens.bin", True) else refused > 200


@pytest.mark.parametrize("name", ["tokens.bin", "offsets.npy"])
def test_examples(name, tmp_path):
    np.arange(100, dtype=np.uint32).tofile(tmp_path / "tokens.bin")
    io.write_array(tmp_path / "offsets.npy", np.arange(0, 101, 5))

    def load():
        ids, offsets = open_examples(tmp_path / "tokens.bin", tmp_path / "offsets.npy")
        assert offsets[-1] == len(ids)

    assert fuzz(tmp_path / name, load, 4) > 200


@pytest.mark.parametrize("suffix", [".txt", ".txt.xz", ".txt.gz", ".parquet"])
def test_text(suffix, tmp_path):
    path = tmp_path / f"text{suffix}"
    plain = "\n\n".join(WORDS * 20 + ["é ü"]).encode()
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": WORDS * 20}), path)
    else:
        path.write_bytes({".txt": bytes, ".txt.xz": lzma.compress, ".txt.gz": gzip.compress}[suffix](plain))
    assert fuzz(path, lambda: list(documents([str(path)])), 5) > 200


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint with small files of every kind that a run needs, as `save` leaves it."""
    out = tmp_path_factory.mktemp("run")

    def write(folder: Path) -> None:
        weights = torch.nn.Linear(3, 2)
        optimizer = torch.optim.AdamW(weights.parameters())
        weights(torch.ones(3)).sum().backward()
        optimizer.step()
        io.write_tensors(folder / "model.safetensors", weights.state_dict(), {"format": "pt"})
        io.write_torch(folder / "optimizer.pt", optimizer.state_dict())
        io.write_torch(folder / "scheduler.pt", {"last_epoch": 1})
        io.write_torch(folder / "rng_state.pth", {"cpu": torch.get_rng_state()})
        io.write_json(folder / "trainer_state.json", {"global_step": 1})
        io.write_json(folder / "position.json", {"rows": 1, "seconds": 0.0})

    saving.save(out, 1, write, keep=1, leader=True, meet=lambda: None)
    return saving.last_checkpoint(out)


NAMES = ("model.safetensors", "optimizer.pt", "scheduler.pt", "trainer_state.json", "position.json", saving.FILES)


@pytest.mark.parametrize("name", NAMES)
def test_a_checkpoint_that_is_described(name, saved):
    refused = fuzz(saved / name, lambda: saving.verify(saved), 6, 400)
    assert refused > 380 if name != saving.FILES else refused > 100


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_checkpoint_of_an_earlier_version(name, saved, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    (folder / saving.FILES).unlink()
    assert fuzz(folder / name, lambda: saving.verify(folder), 7, 400) > 40


def test_weights_to_start_from(tmp_path):
    model = torch.nn.Linear(3, 2)
    path = tmp_path / "model.safetensors"
    io.write_tensors(path, model.state_dict(), {"format": "pt"})
    assert fuzz(path, lambda: saving.take_over(model, tmp_path), 8) > MUTATIONS // 4


def test_what_a_folder_says_of_its_run(tmp_path):
    identity = {"text": ["a"], "steps": 8, "layer": {"lr": 1.0}}
    io.claim(tmp_path, identity)

    def load():
        if not io.claim(tmp_path, identity):
            raise AssertionError("a damaged file must not count as a new run")

    assert fuzz(tmp_path / io.SETTINGS, load, 9) > MUTATIONS // 2


def test_the_mutations_are_the_same_in_every_run():
    once, twice = (list(mutations(json.dumps(SPECIALS).encode(), 50, seed=1)) for _ in range(2))
    assert once == twice
    assert len(set(once)) > 45
