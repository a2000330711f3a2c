"""The commands of training: what they print, and one line for what the user can put right."""

from __future__ import annotations

import os
import signal

import pytest

from cli_runner import invoke
from fastff.text.batches import Batches
from fastff.train.layer_training import LayerTraining, layer_training
from training_cases import write_text


def run(*arguments, **environment):
    return invoke(arguments, env=environment)


def test_variants_lists_costs_beside_the_narrow_ones():
    done = run("variants", "base")
    assert done.exit_code == 0
    assert "12 / 4095" in done.output
    assert "narrow:16x7-gate" in done.output


def test_pretrain_says_what_it_did_and_an_error_in_one_line(tmp_path):
    text, out = write_text(tmp_path), tmp_path / "run"
    small = (
        "--steps",
        2,
        "--batch",
        2,
        "--micro-batch",
        1,
        "--seq-len",
        16,
        "--vocab-size",
        200,
        "--cpu",
        "--valid-windows",
        2,
    )
    words = (
        "pretrain",
        "--text",
        text,
        "--out",
        out,
        *small,
        "--feedforward",
        "1x11",
        "--layer-option",
        "lr_scale=0.5",
    )
    done = run(*words)
    assert done.exit_code == 0, done.output
    assert "9 of 511 neurons" in done.output
    assert "finished: held-out loss" in done.output
    second = run(*words, RANK="1")
    assert (second.exit_code, second.output) == (0, ""), "only the first of several processes speaks"
    wrong = run("pretrain", "--text", text, "--out", out, *small)
    assert wrong.exit_code == 1
    assert "error:" in wrong.output
    assert "'1x11' there, 'dense-gelu' asked for" in wrong.output


def test_a_log_gets_lines_of_progress(tmp_path, monkeypatch):
    monkeypatch.setattr("fastff.report.progress.LINE_SECONDS", 0.0)
    words = ["pretrain", "--text", write_text(tmp_path), "--out", tmp_path / "run", "--steps", 3, "--batch", 2]
    words += ["--micro-batch", 2, "--seq-len", 16, "--vocab-size", 200, "--valid-windows", 2, "--log-every", 1, "--cpu"]
    done = run(*words)
    assert done.exit_code == 0, done.output
    lines = [line for line in done.output.splitlines() if line.startswith("pretrain: training, step ")]
    assert [line.split(",")[1] for line in lines] == [f" step {n}" for n in (1, 2, 3)]
    assert lines[2].endswith(", 100%")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_that_a_signal_stopped_says_so_by_its_exit_status(number, tmp_path, monkeypatch):
    words = ["pretrain", "--text", write_text(tmp_path), "--out", tmp_path / "run", "--steps", 4, "--batch", 2]
    words += ["--micro-batch", 2, "--seq-len", 16, "--vocab-size", 200, "--valid-windows", 2, "--cpu"]
    draw, calls = Batches.micro_batch, []

    def stopped(*arguments):
        calls.append(arguments)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return draw(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Batches, "micro_batch", stopped)
        done = run(*words)
    assert done.exit_code == 128 + number, done.output
    assert "stopped; run the same command again to resume" in done.output
    assert run(*words).exit_code == 0


def test_earlier_names_of_options_still_work_with_a_warning(tmp_path):
    words = ["pretrain", "--text", write_text(tmp_path), "--out", tmp_path / "run", "--steps", 1, "--batch", 2, "--cpu"]
    words += ["--micro-batch", 2, "--vocab-size", 200, "--valid-windows", 2, "--seed", 1]
    old = ["--length", 16, "--rate=0.001", "--warm-up", 0.1, "--layer", "freeze_after=0.5"]
    new = ["--seq-len", 16, "--lr", 0.001, "--warmup", 0.1, "--layer-option", "freeze_after=0.5"]
    done = run(*words, *old)
    assert done.exit_code == 0, done.output
    assert "--length is now --seq-len" in done.output
    done = run(*words, *new)
    assert done.exit_code == 0, done.output
    assert "finished" in done.output, "the same run, finished"


def test_earlier_names_of_layer_options_still_work_with_a_warning():
    with pytest.warns(FutureWarning, match="rate is now called lr_scale"):
        assert layer_training(["rate=0.5"]) == LayerTraining(lr_scale=0.5)
