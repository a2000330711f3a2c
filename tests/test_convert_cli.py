"""The command line of a conversion: errors are one line and a non-zero exit, results name what was written."""

from __future__ import annotations

from pathlib import Path

import pytest

from cli_runner import invoke
from fastff.convert import ConversionSettings

RECORD = {
    "device": "NVIDIA H200",
    "timed_on": "CPU, 1 thread",
    "continued": False,
    "tables": ["STS-B/dev", "SICK/test"],
    "shapes": [[1, 128]],
    "layers": [{"description": None}, {"description": {}}],
    "metric": "perplexity",
    "dense": {"quality": 20.0, "further": {"SICK/test": 30.0}, "latency_ms": [10.0], "feedforward_ms": [6.0]},
    "variants": {
        "chosen": {
            "active": 0.08,
            "after": 21.0,
            "further": {"SICK/test": 31.0},
            "latency_ms": [5.0],
            "feedforward_ms": [1.0],
        }
    },
    "written": "chosen",
    "runner_up": None,
    "ceilings": [2.5],
    "seconds": 12.0,
}


def test_an_unknown_model_is_one_line_and_a_failure(tmp_path):
    arguments = ["convert", str(tmp_path / "none"), "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    result = invoke(arguments)
    assert result.exit_code == 1
    assert "has no configuration that Transformers knows" in " ".join(result.output.split())
    assert "Traceback" not in result.output


@pytest.mark.parametrize(
    ("option", "value", "code"),
    [("--active", "much", 2), ("--shapes", "4x64,3", 2), ("--speedup", "0.5x", 1), ("--curve", "3%,9", 1)],
)
def test_a_budget_that_cannot_be_is_one_line(tmp_path, option, value, code):
    arguments = ["convert", "model", "--text", "t.txt", "--out", str(tmp_path), option, value]
    result = invoke(arguments)
    assert result.exit_code == code
    assert "error: " in result.output
    assert len(result.output.strip().splitlines()) == 1


def test_the_options_reach_the_conversion_and_the_summary_is_shown(tmp_path, monkeypatch):
    seen = []

    def fake(settings, progress, say):
        seen.append(settings)
        progress("distil", 1, 2)
        say("about 3 h left")
        return RECORD

    monkeypatch.setattr("fastff.convert.convert", fake)
    arguments = ["convert", "model", "--text", "t.txt", "--out", str(tmp_path), "--active", "5%", "--baselines", "none"]
    arguments += ["--seconds", "600", "--time-on", "cpu", "--batch", "8", "--table", "a.tsv", "--table", "b.tsv"]
    arguments += ["--curve", "3%,25%", "--shapes", "4x64", "--max-loss", "1%", "--shared", "16"]
    result = invoke(arguments)
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert (settings.model, settings.active, settings.baselines, settings.steps) == (
        "model",
        0.05,
        ("none",),
        ConversionSettings.steps,
    )
    assert (settings.curve, settings.shapes) == ((0.03, 0.25), ((4, 64),))
    assert (settings.max_loss, settings.shared, settings.speedup) == (0.01, 16, None)
    assert (settings.seconds, settings.time_on, settings.batch) == (600.0, "cpu", 8)
    assert settings.tables == (Path("a.tsv"), Path("b.tsv"))
    shown = " ".join(result.output.split())
    assert "spend 8.0 %" in shown
    assert "(2.00x; feedforwards 6.0x; without any 2.50x)" in shown
    assert "1 of 2 layers are dense" in shown
    assert "about 3 h left" in shown
    assert "perplexity, STS-B/dev: 20.00 before, 21.00 after; perplexity, SICK/test: 30.00 before, 31.00" in shown
    assert "took 12 s on NVIDIA H200" in shown
