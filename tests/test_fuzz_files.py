"""Damaged files: whatever a loader is given, it loads it, or raises an error of fastff that names the file."""

from __future__ import annotations

import gzip
import json
import lzma
import math
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pytest
import torch
from pyarrow import parquet

import fastff
from fastff import FFF, ConditionalFeedforward, io
from fastff.bench import cpu_run, gpu_run
from fastff.bench.limits import Limits
from fastff.bench.workloads import Grid
from fastff.convert.capture import Captured
from fastff.convert.choose_layers import LatencyProfile, Option
from fastff.convert.conversion import _read_plan, _read_timetable
from fastff.convert.conversion_record import Plan
from fastff.convert.quality import read_table
from fastff.convert.time_budget import Timetable
from fastff.errors import CheckpointError, TrainingError
from fastff.routers import FlatRouter, ProductKeyRouter, TreeRouter
from fastff.text.examples import _open as open_examples
from fastff.text.reading import documents
from fastff.text.tokenizer import SPECIALS, Vocabulary, load_tokenizer, train_tokenizer, wrap
from fastff.text.tokens import Tokens
from fastff.train import saving
from fuzzing import damage, error_of, mutations, put
from train_tiny.store import RunError, Store

MUTATIONS = 2000
WORDS = ["one two three, four five six.", "seven eight nine ten", "eleven twelve"]


def fuzz(path: Path, load: Callable[[], Any], seed: int, count: int = MUTATIONS) -> int:
    """Load `count` damaged copies of a file; returns how many were refused."""
    refused = 0
    load()
    for number in damage(path, count, seed=seed):
        error = error_of(load)
        if error is not None:
            refused += 1
            assert isinstance(error, (CheckpointError, TrainingError, RunError)), f"mutation {number}: {error!r}"
            assert str(path) in str(error) or str(path.parent) in str(error), f"mutation {number}: {error}"
    return refused


ROUTERS = {
    "tree": lambda: TreeRouter(4, 1, 2),
    "paths": lambda: TreeRouter(4, 1, 2, paths=2),
    "flat": lambda: FlatRouter(4, 4, 2),
    "product_key": lambda: ProductKeyRouter(4, 2, 2),
}
LAYERS = {"fff": lambda: FFF(3, depth=2, trees=2, bias=True, gate="boundary")} | {
    name: lambda make=make: ConditionalFeedforward(4, 3, router=make(), leaves=4, leaf_width=2, bias=True)
    for name, make in ROUTERS.items()
}
HOSTILE = ("", "0", "-1", "1e400", "nan", "9" * 20, "9" * 5000, "true", "none", "1.5", "\0", str(2**31), str(2**62))


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer(kind, tmp_path):
    path = tmp_path / "layer.safetensors"
    fastff.save(LAYERS[kind](), path)
    assert fuzz(path, lambda: fastff.load(path), 1) > MUTATIONS // 4


@pytest.mark.parametrize("kind", LAYERS)
def test_a_layer_with_any_value_of_its_description_replaced(kind, tmp_path):
    path = tmp_path / "layer.safetensors"
    fastff.save(LAYERS[kind](), path)
    whole = path.read_bytes()
    size = int.from_bytes(whole[:8], "little")
    for name in json.loads(whole[8 : 8 + size])["__metadata__"]:
        for value in HOSTILE:
            header = json.loads(whole[8 : 8 + size])
            header["__metadata__"][name] = value
            text = json.dumps(header).encode()
            put(path, len(text).to_bytes(8, "little") + text + whole[8 + size :])
            error = error_of(lambda: fastff.load(path))
            assert error is None or (isinstance(error, CheckpointError) and str(path) in str(error)), (name, value)


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

    refused = fuzz(tmp_path / name, load, 3)
    assert refused > MUTATIONS - 40 if (name, described) == ("tokens.bin", True) else refused > 400


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
    """Of the files themselves only the digests are read, whatever their format: together they get as many."""
    count = MUTATIONS if name == saving.FILES else MUTATIONS // len(NAMES[:-1])
    refused = fuzz(saved / name, lambda: saving.verify(saved), 6, count)
    assert refused > count // 4 if name == saving.FILES else refused > count - 20


@pytest.mark.parametrize("name", NAMES[:-1])
def test_a_checkpoint_of_an_earlier_version(name, saved, tmp_path):
    folder = tmp_path / "checkpoint-1"
    shutil.copytree(saved, folder)
    (folder / saving.FILES).unlink()
    assert fuzz(folder / name, lambda: saving.verify(folder), 7, MUTATIONS // 20) > 10
    assert fuzz(folder / name, lambda: saving._read(folder / name, ""), 19) > MUTATIONS // 10


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


def test_the_plan_of_a_conversion(tmp_path):
    option = Option({"kind": "fff", "depth": 2}, 0.5, (1.0, 2.0), 0.1, 0.2, 3)
    plan = Plan(LatencyProfile((9.0, 8.0), ((1.0, 2.0),)), [{"name": "1x2"}], [[option]])
    io.write_json(tmp_path / "plan.json", asdict(plan))
    assert _read_plan(tmp_path / "plan.json") == plan

    def load():
        read = _read_plan(tmp_path / "plan.json")
        read.profile.ceilings()
        assert all(math.isfinite(one.share + sum(one.times_us)) for block in read.options for one in block)

    assert fuzz(tmp_path / "plan.json", load, 10) > MUTATIONS // 2


def test_the_timetable_of_a_conversion(tmp_path):
    path, table = tmp_path / "timetable.json", Timetable(2, 6, 0.1, 1.0, 2.0)
    io.write_json(path, asdict(table))
    assert _read_timetable(path) == table
    assert fuzz(path, lambda: str(_read_timetable(path)), 11) > MUTATIONS // 2


@pytest.mark.parametrize("name", ["input-000.f16", "residual-000.f32"])
def test_captured_rows(name, tmp_path):
    """Their content has no form that damage could break: only their size has."""
    Captured(tmp_path, 0, 4, 3, post_norm=False, mode="w")

    def load():
        read = Captured(tmp_path, 0, 4, 3, post_norm=False)
        assert len(read.rows(slice(0, 4), torch.device("cpu"))[1]) == 4

    assert fuzz(tmp_path / name, load, 12) > MUTATIONS // 4


@pytest.mark.parametrize("suffix", [".tsv", ".csv", ".parquet"])
def test_tables_of_sentences(suffix, tmp_path):
    path = tmp_path / f"dev{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"sentence1": WORDS, "score": [1.0, 2.0, 3.0]}), path)
    else:
        rows = [("sentence1", "score"), *((words, "1.0") for words in WORDS)]
        path.write_text("".join(("\t" if suffix == ".tsv" else ",").join(row) + "\n" for row in rows))
    assert fuzz(path, lambda: read_table(path), 13) > 50


def test_the_results_of_a_demo(tmp_path):
    identity = {"quick": True, "seed": 0}
    Store(tmp_path, identity).finish("machine", {"cpu": "a"})

    def load():
        Store(tmp_path, identity).seconds_used()

    assert fuzz(tmp_path / "results.json", load, 14) > MUTATIONS // 2


def test_the_state_of_a_demo(tmp_path):
    store = Store(tmp_path, {"seed": 0})
    store.save_state("start", {"model": {"w": torch.ones(2)}})
    assert fuzz(tmp_path / "state" / "start.pt", lambda: store.load_state("start"), 15) > MUTATIONS // 4


def test_an_interrupted_cpu_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(cpu_run, "machine", lambda: {"cpu": "a"})
    monkeypatch.setattr(cpu_run, "commit", lambda: "0")
    settings = cpu_run.Settings(Grid((1,)))
    record = cpu_run.fresh(settings)
    record.limits[2] = Limits(2, 1e9, 2e9, 1 << 20, 1e12)
    record.timings = [
        cpu_run.Timing("1x2", "torch", "dense", "fp32", 1, 2, 1, False, 1.0, 2.0, 3.0, 0.0, 0.0, 9),
    ]
    path = tmp_path / cpu_run.PARTIAL
    cpu_run._keep(record, path)
    assert cpu_run.begun(settings, tmp_path).timings == record.timings
    assert fuzz(path, lambda: cpu_run.begun(settings, tmp_path), 16) > MUTATIONS // 4


class Gpu:
    name = "a"

    def copy_bytes_per_s(self) -> float:
        return 1e12


def test_an_interrupted_gpu_benchmark(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "machine", lambda: {"torch": "a"})
    monkeypatch.setattr(gpu_run, "commit", lambda: "0")
    path, settings = tmp_path / gpu_run.LINES, gpu_run.Settings()
    record = gpu_run._resume(Gpu(), tmp_path, settings)
    io.append_json_line(path, asdict(gpu_run.Step("a", "dense", 1.0, 2.0, 3.0, 7)))
    assert gpu_run._resume(Gpu(), tmp_path, settings).steps[0].step_ms_p50 == 2.0
    assert record.about["copy_bytes_per_s"] == 1e12
    whole = path.read_bytes()
    for other in (gpu_run.Settings(tune=True), gpu_run.Settings(cell_seconds=settings.cell_seconds / 2)):
        assert gpu_run._resume(Gpu(), tmp_path, other).steps == []  # measured in another way
        path.write_bytes(whole)

    def load():
        # Damage may make it another device's record, which a run replaces.
        put(path, path.read_bytes() or whole)
        gpu_run._resume(Gpu(), tmp_path, settings)

    assert fuzz(path, load, 17) > MUTATIONS // 4


@pytest.mark.filterwarnings("ignore:.*tuned plan:RuntimeWarning")
def test_tuned_plans(tmp_path, monkeypatch):
    """Whatever the file holds, a plan comes: the shipped one, with a warning, in place of one that cannot be used."""
    pytest.importorskip("triton", reason="plans are read with the version of the package triton")
    from fastff.ops.triton_kernels import tuned

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    config, dtype = FFF(8, depth=2).config, torch.float32
    shipped = tuned.forward_plan(config, 4, dtype, "a device")
    tuned.keep("forward", config, 4, dtype, "a device", shipped)
    path = tuned.cache_file()

    def load():
        tuned._loaded.clear()
        tuned._found.cache_clear()
        assert isinstance(tuned.forward_plan(config, 4, dtype, "a device"), type(shipped))

    assert fuzz(path, load, 18) == 0
    tuned._loaded.clear()
    tuned._found.cache_clear()


def test_the_mutations_are_the_same_in_every_run():
    once, twice = (list(mutations(json.dumps(SPECIALS).encode(), 50, seed=1)) for _ in range(2))
    assert once == twice
    assert len(set(once)) > 45
