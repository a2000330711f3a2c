"""Progress: bars on a terminal, lines in a log, both with the time left."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from fastff.report import progress
from fastff.report.progress import shown, silent, time_left


def said(monkeypatch, *calls, terminal=False, seconds=10.0):
    """What a console shows of some calls, `seconds` of a clock apart."""
    console = Console(file=io.StringIO(), force_terminal=terminal, width=100)
    clock = iter(range(1000))
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock) * seconds)
    with shown(console, "pretrain") as move:
        for call in calls:
            move(*call)
    return console.file.getvalue()


def test_a_log_gets_few_lines_with_the_time_left(monkeypatch):
    calls = [
        ("training", 0, 10),
        *(("training", done, 10, f"step {done}") for done in (1, 2, 3, 4)),
        ("training", 10, 10),
    ]
    assert said(monkeypatch, *calls).splitlines() == [
        "pretrain: training, 0%",
        "pretrain: training, step 3, 30%, 70 s left",
        "pretrain: training, 100%",
    ]


def test_a_stage_of_unknown_length_is_counted(monkeypatch):
    lines = said(monkeypatch, ("tokens", 5), ("tokens", 1_000_000), seconds=40.0).splitlines()
    assert lines == ["pretrain: tokens, 5", "pretrain: tokens, 1,000,000"]


def test_a_terminal_gets_a_bar_for_each_stage(monkeypatch):
    console = Console(file=io.StringIO(), force_terminal=True, width=100)
    with shown(console, "convert") as move:
        move("reading", 1, 2)
        move("teaching", 1, 4, "layer 3")
    out = console.file.getvalue()
    assert "reading" in out
    assert "teaching: layer 3" in out


def test_only_the_first_of_several_processes_is_heard(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert said(monkeypatch, ("training", 1, 2)) == ""
    with shown(Console(file=io.StringIO()), "pretrain") as move:
        assert move is silent


@pytest.mark.parametrize(("seconds", "words"), [(0.4, "0 s"), (89, "89 s"), (600, "10 min"), (9000, "2.5 h")])
def test_time_left_in_words(seconds, words):
    assert time_left(seconds) == words
