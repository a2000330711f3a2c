"""The README's tables are those of results/, and its code runs."""

from __future__ import annotations

import importlib
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from fastff.errors import TrainingError
from fastff.experiment import glue_variants, variants
from fastff.experiment.study_settings import GlueVariantsSettings
from fastff.train import compare

ROOT = Path(__file__).parents[1]


def test_tables_match_results(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["tools.tables", "--check"])
    monkeypatch.syspath_prepend(str(ROOT))
    runpy.run_module("tools.tables", run_name="__main__")


@pytest.mark.parametrize("name", ["small-causal", "small-causal-rates", "tiny-causal", "masked-524m"])
def test_the_comparison_of_a_plan_is_that_of_its_records(name, monkeypatch, tmp_path):
    folder = ROOT / "experiments" / name
    shutil.copy(folder / "records.json", tmp_path)
    said = []
    variants.redraw(tmp_path, folder / "plan.json", say=said.append)
    assert (tmp_path / "records.json").read_bytes() == (folder / "records.json").read_bytes()
    rows = [line for text in said for line in text.splitlines() if line.startswith("| ")]
    records = json.loads((folder / "records.json").read_text())
    done = {(record["group"], compare.variant_of(record)) for record in records if record["finished"]}
    heads = len({group for group, _ in done})
    assert len(rows) == len(done) + heads


def test_scores_of_fewer_tasks_have_their_own_retention_and_gap():
    shared = {"group": "scratch", "neurons": 8, "active_neurons": 8, "mean": 1.0, "retention": 1.0}

    def variant(name, layer, flops, first, second):
        scores = {"MRPC": [first - 1, first, first + 1], "WNLI": [second] * 3}
        medians = {"MRPC": first, "WNLI": second}
        return {**shared, "name": name, "layer": layer, "flops": flops, "scores": scores, "medians": medians}

    dense = variant("dense", "dense-swiglu 64", 1000, 80, 10)
    narrow = variant("narrow", "dense-swiglu 6", 100, 60, 50)
    tree = variant("tree", "2x3", 100, 70, 90)
    found = {"tasks": ["MRPC", "WNLI"], "notes": {"WNLI": "dev"}, "arms": [dense, narrow, tree]}
    fewer = glue_variants.only(found, ["MRPC"])
    assert "| 70.0 (69.0-71.0) | 70.00 (69.00-71.00) | 87.5 | 0.50 |" in glue_variants.table(fewer)
    assert not fewer["notes"]
    assert tree["mean"] == 1.0


def test_pictures_of_the_pages_are_there():
    pages = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(p for room in ("results", "benchmarks", "experiments") for p in (ROOT / room).rglob("*.md")),
    ]
    found = [page.parent / path for page in pages for path in re.findall(r"!\[[^]]*\]\(([^)]+)\)", page.read_text())]
    assert len(found) > 5
    assert not [str(path) for path in found if not path.is_file()]


def test_charts_name_variants_without_the_end_that_all_have():
    labels = glue_variants.labels
    names = ["dense-masked-seed-1", "2x3-masked-seed-1@layer-rate=0.5", "none-masked-seed-1"]
    assert labels(names) == ["dense", "2x3@layer-rate=0.5", "none"]
    assert labels(["a-masked", "b", "c-masked"]) == ["a-masked", "b", "c-masked"]
    assert labels(["x-masked", "x-masked@rate=1"]) == ["x", "x@rate=1"]
    assert labels(["x-masked"]) == ["x-masked"]


@pytest.mark.parametrize(
    "scores",
    sorted((ROOT / "experiments").glob("*/glue*/glue.json")),
    ids=lambda path: "-".join(path.parts[-3:-1]),
)
def test_tables_of_scores_are_made_of_their_files(scores, tmp_path):
    (tmp_path / "glue.json").write_bytes(scores.read_bytes())
    said = []
    glue_variants.redraw(tmp_path, say=said.append)
    found = json.loads(scores.read_text())
    (table,) = said
    assert [line.split(" | ")[0] for line in table.splitlines()[2:] if line.startswith("| ")] == [
        f"| {entry['name']}" for entry in glue_variants.variants_of(found)
    ]
    assert "<svg" in (tmp_path / "glue.svg").read_text()


def test_scores_are_not_made_of_nothing(tmp_path):
    with pytest.raises(TrainingError, match="holds no finished model of a, b"):
        glue_variants.run(GlueVariantsSettings(variants=("a", "b"), runs=tmp_path, data=tmp_path, out=tmp_path))
    with pytest.raises(TrainingError, match=r"glue\.json is missing"):
        glue_variants.redraw(tmp_path)


def test_the_speed_of_compiled_training_is_that_of_its_file():
    text = (ROOT / "docs" / "benchmarks-gpu.md").read_text()
    speeds = re.findall(r"([\d,]+) tokens/s", (ROOT / "experiments" / "gpus" / "compile.txt").read_text())
    assert len(speeds) == 2
    assert all(speed in text for speed in speeds)


def test_the_first_page_is_short_and_names_its_limits():
    lines = (ROOT / "README.md").read_text().splitlines()
    assert len(lines) <= 110
    assert lines.count("<!-- speed-and-quality -->") == 1
    assert "## Limits" in lines


def test_the_picture_of_a_path_is_what_its_script_draws(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    drawn = importlib.import_module("tools.path_picture")
    assert drawn.OUT.read_text() == drawn.picture()


def test_the_first_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("12 of 4095"), done.stderr


def test_a_run_of_the_whole_conversion_is_a_table(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    convert_tables = importlib.import_module("experiments.convert.tables")
    monkeypatch.setattr(convert_tables, "FOLDER", tmp_path)
    made = convert_tables.TABLES["convert-command-causal"]
    variant = {
        "active": 0.1,
        "before": 1500.0,
        "after": 42.0,
        "further": {},
        "latency_ms": [5.0],
        "feedforward_ms": [1.0],
    }
    variant["held_out_loss"] = 0.25
    dense = {"quality": 40.0, "further": {}, "latency_ms": [10.0], "feedforward_ms": [6.0]}
    report = {
        "dense": dense,
        "tables": ["held-out"],
        "shapes": [[1, 128]],
        "kind": "causal",
        "variants": {"tree": variant},
    }
    (tmp_path / "command-causal.json").write_text(json.dumps({"report": {**report, "curve": []}}))
    head, _, *rows = made().splitlines()
    times = "1x128, ms (whole) | 1x128, ms (feedforwards)"
    assert head == f"| model | active, % | distance | held-out, alone | held-out | {times} |"
    assert rows == [
        "| dense (original) | 100 | 0 |  | 40.00 | 10.0 | 6.0 |",
        "| trees | 10.0 | 0.250 | 1,500.00 | 42.00 (+5.0 %) | 5.0 (2.00x) | 1.0 (6.00x) |",
    ]
