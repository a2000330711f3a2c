"""The command line of a conversion: errors are one line and a non-zero exit, results name what was written."""

from __future__ import annotations

from typer.testing import CliRunner

from fastff.cli import app

RECORD = {
    "active": 0.08,
    "latency": {"dense_ms": 10.0, "converted_ms": 5.0},
    "device": "CPU",
    "layers": [{"dense_us": 6000.0}],
    "metric": "perplexity",
    "dense": 20.0,
    "arms": {"tree": {"after": 21.0}},
    "seconds": 12.0,
}


def test_an_unknown_model_is_one_line_and_a_failure(tmp_path):
    arguments = ["convert", str(tmp_path / "none"), "--text", str(tmp_path / "t.txt"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 1
    assert "has no configuration that Transformers knows" in " ".join(result.output.split())
    assert "Traceback" not in result.output


def test_the_options_reach_the_conversion_and_the_summary_is_shown(tmp_path, monkeypatch):
    seen = []

    def fake(settings, progress):
        seen.append(settings)
        progress("distil", 1, 2)
        return RECORD

    monkeypatch.setattr("fastff.convert.convert", fake)
    arguments = ["convert", "model", "--text", "t.txt", "--out", str(tmp_path), "--active", "0.05", "--no-controls"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    (settings,) = seen
    assert (settings.model, settings.active, settings.controls, settings.steps) == ("model", 0.05, False, 2000)
    shown = " ".join(result.output.split())
    assert "spend 8.0 %" in shown
    assert "(2.00x)" in shown
    assert "20.00 before, 21.00 after" in shown
