"""The README's tables are those of results/, and its code runs."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

from fastff.training.compare import table

ROOT = Path(__file__).parents[1]


def test_tables_match_results():
    command = [sys.executable, str(ROOT / "runs" / "readme_tables.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_comparison_of_trained_feedforwards_is_that_of_results():
    folder = ROOT / "results" / "training" / "tiny-causal"
    made = table(json.loads((folder / "comparison.json").read_text())["arms"])
    assert (folder / "table.md").read_text() == made + "\n"
    for page in (folder / "README.md", ROOT / "docs" / "training.md"):
        assert made in page.read_text(), page


def test_the_first_example_runs():
    code = re.search(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.startswith("12 of 4095"), done.stderr


def test_the_table_of_conversion_times_is_that_of_its_file(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "runs"))
    from convert_latency import table

    record = json.loads((ROOT / "results" / "convert" / "latency.json").read_text())
    text = (ROOT / "results" / "convert" / "README.md").read_text()
    for row in table(record):
        assert row in text
