"""Pretraining at toy size: it learns, resumes exactly, survives kills and full disks, refuses nonsense."""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import tarfile
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForMaskedLM, AutoTokenizer

from fastff import FFF, io
from fastff.errors import FileError, TrainingError
from fastff.text.batches import Batches
from fastff.text.tokenizer import Vocabulary
from fastff.text.tokens import Tokens
from fastff.train import saving
from fastff.train.layer_training import LayerTraining
from fastff.train.presets import PRESETS, Preset, cost_of
from fastff.train.pretrain import pretrain, read_text, tokens_per_second
from fastff.train.pretrain_settings import PretrainSettings
from fastff.train.trainer import release_unused
from training_cases import FEEDFORWARD, small, write_text


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    return write_text(tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The record of a run that nothing disturbed, and its folder."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return pretrain(small(out, text)), out


def test_a_run_leaves_a_model_and_a_record(whole, text):
    record, out = whole
    assert record["finished"]
    assert record["steps"] == 8
    assert len(record["curve"]) == 8
    assert record == json.loads((out / "result.json").read_text())
    assert record["tokens"] == record["rows"] * 16
    stats = record["routing"]["encoder.layers.0.feedforward"]
    assert 0 < stats["leaf_entropy_bits"] <= stats["most_bits"] == 3
    model = AutoModelForMaskedLM.from_pretrained(out / "model")
    assert any(isinstance(module, FFF) for module in model.modules())
    tokenizer = AutoTokenizer.from_pretrained(out / "model")
    assert model(**tokenizer("a [MASK] word", return_tensors="pt")).logits.shape[-1] == len(tokenizer)
    assert sorted(path.name for path in out.glob("checkpoint-*")) == ["checkpoint-6", "checkpoint-8"]


def test_a_finished_run_is_not_run_again(whole, text, monkeypatch):
    record, out = whole
    monkeypatch.setattr("fastff.train.pretrain.build", lambda *_: pytest.fail("trained again"))
    assert pretrain(small(out, text)) == record


@pytest.mark.parametrize("objective", ["masked", "causal"])
def test_it_learns(objective, text, tmp_path):
    # Sixteen masked words a batch are noise, whose sign hung on the number of threads: these rows show the loss fall.
    rows = {"batch": 32, "micro_batch": 32, "valid_windows": 64, "data": tmp_path / "data"}
    record = pretrain(small(tmp_path, text, objective=objective, steps=60, lr=3e-3, save_every=100, **rows))
    assert record["curve"][-1][1] < record["curve"][0][1] - 0.3
    assert record["valid_loss"] < record["curve"][0][1] - 0.3
    auto = AutoModelForCausalLM if objective == "causal" else AutoModelForMaskedLM
    auto.from_pretrained(tmp_path / "model")


def test_pieces_make_the_same_run(whole, text, tmp_path):
    record, _ = whole
    out = tmp_path / "run"
    pieces = [pretrain(small(out, text, max_run_seconds=1e-9)) for _ in range(8)]
    assert [piece["steps"] for piece in pieces] == list(range(1, 9))
    assert [piece["finished"] for piece in pieces] == [False] * 7 + [True]
    assert pieces[-1]["curve"] == record["curve"]


def test_speed_is_that_of_the_second_half_of_the_curve():
    points = [{"rows": rows, "seconds": seconds} for rows, seconds in ((1, 10.0), (2, 11.0), (4, 11.5), (8, 12.5))]
    assert tokens_per_second([*points, {"eval_loss": 3.0}], 100) == 400
    assert tokens_per_second(points[:1], 100) is None


def test_a_warm_start_takes_over_every_weight(whole, text, tmp_path):
    record, out = whole
    later = pretrain(small(tmp_path / "later", text, init_from=out / "model", steps=1, lr=1e-9))
    assert later["valid_loss"] == pytest.approx(record["valid_loss"], abs=1e-3)
    with pytest.raises(TrainingError, match=r"do not fit: .*0.feedforward.b_in \(2, 15\) there, absent here"):
        pretrain(small(tmp_path / "other", text, init_from=out / "model", feedforward="none"))
    with pytest.raises(TrainingError, match=r"holds no model"):
        pretrain(small(tmp_path / "nothing", text, init_from=tmp_path / "absent"))


def test_trees_with_a_shared_part_learn_and_are_counted(text, tmp_path):
    shared = FEEDFORWARD.replace("}", ', "shared": 6}')
    record = pretrain(small(tmp_path / "run", text, feedforward=shared))
    alone = cost_of(FEEDFORWARD, PRESETS["tiny"])
    assert (record["cost"]["neurons"], record["cost"]["active_neurons"]) == (
        alone.neurons + 6,
        alone.active_neurons + 6,
    )
    assert record["cost"]["flops"] == alone.flops + 4 * 6 * 128
    assert record["cost"]["layer"] == "2x3-gate+6"
    again = pretrain(small(tmp_path / "again", text, feedforward=shared, init_from=tmp_path / "run" / "model", steps=1))
    assert again["routing"], "trees beside a shared part are watched, too"


def test_killed_between_the_last_checkpoint_and_the_record(whole, text, tmp_path):
    record, finished = whole
    out = tmp_path / "run"
    shutil.copytree(finished, out)
    (out / "result.json").unlink()
    again = pretrain(small(out, text))
    assert (again["steps"], again["curve"], again["valid_loss"]) == (8, record["curve"], record["valid_loss"])


def test_a_budget_of_seconds(text, tmp_path):
    record = pretrain(small(tmp_path, text, steps=None, seconds=0.5, save_every=1000))
    assert record["finished"]
    assert 0.5 <= record["seconds"] < 20
    assert record["steps"] >= 1


@pytest.mark.parametrize("where", ["torch.save", "fastff.io.sync"])
def test_a_full_disk_leaves_the_last_good_checkpoint(where, text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    pretrain(small(out, text, max_run_seconds=1e-9))

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(where, full)
        with pytest.raises(TrainingError, match=r"step 3: .*No space left.*last good one is .*checkpoint-1"):
            pretrain(small(out, text))
    assert [path.name for path in out.glob("checkpoint-*")] == ["checkpoint-1"]
    assert pretrain(small(out, text))["finished"]


def test_a_full_disk_while_tokenising_is_said(text, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(io.os, "fsync", full)
    with pytest.raises(TrainingError, match="No space left"):
        pretrain(small(tmp_path, text, data=tmp_path / "data"))


def test_a_loss_that_is_not_finite_stops_the_run(text, tmp_path, monkeypatch):
    out = tmp_path / "run"
    pretrain(small(out, text, max_run_seconds=1e-9))
    draw = Batches.micro_batch

    def poisoned(self, position, count):
        batch = draw(self, position, count)
        if position > 12:
            trainer_model[0].encoder.final_norm.weight.data.fill_(float("nan"))
        return batch

    trainer_model = []
    build = sys.modules["fastff.train.pretrain"].build

    def watched(*args):
        trainer = build(*args)
        trainer_model.append(trainer.model)
        return trainer

    monkeypatch.setattr("fastff.train.pretrain.build", watched)
    monkeypatch.setattr(Batches, "micro_batch", poisoned)
    with pytest.raises(TrainingError, match=r"not finite in step \d; the last good checkpoint is .*checkpoint-[13]"):
        pretrain(small(out, text))


def test_another_configuration_is_refused_with_what_differs(whole, text):
    _, out = whole
    with pytest.raises(TrainingError, match=r"holds another run: .*feedforward '\{.* there, 'none' asked for"):
        pretrain(small(out, text, feedforward="none"))
    with pytest.raises(TrainingError, match=r"seq_len 16 there, 32 asked for"):
        pretrain(small(out, text, seq_len=32))


def test_checkpoints_of_an_unknown_run_are_refused(text, tmp_path):
    saving.checkpoint_path(tmp_path, 5).mkdir()
    with pytest.raises(TrainingError, match=r"holds checkpoints but no settings.json"):
        pretrain(small(tmp_path, text))


def test_a_damaged_checkpoint_is_named(text, tmp_path):
    out = tmp_path / "run"
    pretrain(small(out, text, max_run_seconds=1e-9))
    (out / "checkpoint-1" / "model.safetensors").write_bytes(b"damaged")
    with pytest.raises(TrainingError, match=r"model.safetensors is damaged .*: remove .*checkpoint-1 to go on from"):
        pretrain(small(out, text))


@pytest.mark.parametrize(
    "name", ["optimizer.pt", "scheduler.pt", "rng_state.pth", "position.json", "trainer_state.json"]
)
@pytest.mark.parametrize("described", [True, False])
def test_a_checkpoint_without_one_of_its_files_is_not_trained_on_from(name, described, text, tmp_path):
    """Transformers goes on with a new optimiser, or schedule, without a word."""
    out = tmp_path / "run"
    pretrain(small(out, text, max_run_seconds=1e-9))
    folder = out / "checkpoint-1"
    (folder / name).unlink()
    if not described:  # as an earlier version left it
        (folder / saving.FILES).unlink()
    with pytest.raises(TrainingError, match=rf"checkpoint-1/{name} is missing: remove"):
        pretrain(small(out, text))


def test_a_text_that_changes_in_the_middle_of_a_run_is_another_run(tmp_path):
    text = write_text(tmp_path)
    pretrain(small(tmp_path / "run", text, max_run_seconds=1e-9))
    text.write_text(text.read_text(encoding="utf-8") + " More.", encoding="utf-8")
    with pytest.raises(TrainingError, match="holds another run: text_sha256"):
        pretrain(small(tmp_path / "run", text))


def test_a_run_of_an_earlier_version_goes_on(tmp_path, monkeypatch):
    """tests/golden/pretrain-1f96a58.tar.xz: stopped by an exception after step 5 of 8 with a checkpoint of step 3, and
    what the same version made of the whole run."""
    with tarfile.open(Path(__file__).parent / "golden" / "pretrain-1f96a58.tar.xz") as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path / "pretrain-1f96a58")
    monkeypatch.setitem(PRESETS, "toy", Preset("toy", 16, 1, 2, 16, 90, 4, 2, 2e-3, 8, 100_000))
    feedforward = '{"kind": "fff", "depth": 2, "trees": 1, "gate": "boundary", "bias": true}'
    record = pretrain(
        PretrainSettings(
            out=Path("run"),
            text=("text.txt",),
            preset="toy",
            data=Path("data"),
            steps=8,
            save_every=3,
            valid_windows=4,
            log_every=1,
            cpu=True,
            lr=3e-3,
            warmup=0.25,
            seq_len=16,
            feedforward=feedforward,
            layer=LayerTraining(lr_scale=0.5),
            seed=3,
        )
    )
    want = io.read_json(Path("expected.json"))
    assert record["finished"]
    assert [loss for _, loss in record["curve"]] == pytest.approx([loss for _, loss in want["curve"]], abs=2e-4)
    assert record["valid_loss"] == pytest.approx(want["valid_loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"objective": "other"}, "objective 'other' is not masked or causal"),
        ({"precision": "fp8"}, "precision 'fp8' is not"),
        ({"seconds": 5.0}, "steps or seconds, not both"),
        ({"steps": 0}, "steps 0 is not above 0"),
        ({"layers": 0}, "layers 0 is not above 0"),
        ({"valid_windows": 0}, "valid_windows 0 is not above 0"),
        ({"max_tokens": -3}, "max_tokens -3 is not above 0"),
        ({"seq_len": 2}, "seq_len 2 is not at least 3"),
        ({"warmup": 1.0}, r"warmup 1.0 is not in \[0, 1\)"),
        ({"graph": True}, "graph needs the objective causal: what masked training computes"),
    ],
)
def test_settings_out_of_range(changes, message, text, tmp_path):
    with pytest.raises(TrainingError, match=message):
        small(tmp_path, text, **changes)


def test_two_processes_do_not_train_in_one_folder(text, tmp_path):
    tmp_path.joinpath("run").mkdir()
    with io.alone_in(tmp_path / "run", "trains in"), pytest.raises(FileError, match="another process trains in"):
        pretrain(small(tmp_path / "run", text))


def test_a_graph_is_refused_on_the_cpu(text, tmp_path):
    with pytest.raises(TrainingError, match="graph needs a GPU and no torchrun, this is the CPU"):
        pretrain(small(tmp_path, text, objective="causal", graph=True))


def test_the_number_of_layers_can_be_chosen(text, tmp_path):
    record = pretrain(small(tmp_path, text, steps=1, layers=3))
    assert AutoConfig.from_pretrained(tmp_path / "model").num_hidden_layers == 3
    assert record["cost"] == asdict(cost_of(FEEDFORWARD, replace(PRESETS["tiny"], layers=3, seq_len=16)))


def test_sizes_that_do_not_fit(text, tmp_path):
    with pytest.raises(TrainingError, match="batch 5 is not a multiple of micro_batch 2"):
        pretrain(small(tmp_path, text, batch=5))
    with pytest.raises(TrainingError, match="preset 'huge' is not one of tiny, mini, small, base"):
        pretrain(small(tmp_path, text, preset="huge"))
    with pytest.raises(TrainingError, match="no text is given"):
        PretrainSettings(out=tmp_path, text=())


@pytest.mark.parametrize(("objective", "of_the_text"), [("masked", 14), ("causal", 15)])
def test_windows_of_a_causal_model_end_with_the_text(text, tmp_path, objective, of_the_text):
    _, read, _ = read_text(small(tmp_path, text, objective=objective))
    assert read.inner == of_the_text


def test_rows_are_the_same_on_any_number_of_processes(text):
    folder = text.parent / "data"
    tokens = Tokens(folder / "train", Vocabulary(300, 0, 2, 3, 4, 5), 16)
    batches = Batches(tokens, 0, 50, seed=1, causal=False)
    passed = batches.numbers(0, 50)
    assert sorted(passed) == list(range(50))
    assert not (passed == batches.numbers(50, 50)).all()
    assert (batches.numbers(30, 40) == [*passed[30:], *batches.numbers(50, 20)]).all()
    first, second = batches.micro_batch(8, 4), batches.micro_batch(8, 4)
    assert torch.equal(first["input_ids"], second["input_ids"])
    assert not torch.equal(first["labels"], batches.micro_batch(12, 4)["labels"])
    with pytest.raises(TrainingError, match="no windows to learn from: 0"):
        Batches(tokens, 3, 3, seed=0, causal=False)


def test_bf16_and_one_option_of_each_kind(text, tmp_path):
    layer = LayerTraining(lr_scale=0.5, level_lr_scale=0.5, freeze_after=0.5, balance=0.01, output_scale=0.5)
    record = pretrain(small(tmp_path, text, precision="bf16", layer=layer, steps=4))
    assert record["finished"]
    assert all(loss > 0 for _, loss in record["curve"])


@pytest.mark.parametrize(("cached", "given_back"), [(199, 0), (201, 1)])
def test_memory_that_a_growing_batch_leaves_behind_is_given_back(cached, given_back, monkeypatch):
    calls = []
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda _: 100)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda _: cached)
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append(1))
    release_unused(torch.device("cuda"))
    release_unused(torch.device("cpu"))
    assert len(calls) == given_back
