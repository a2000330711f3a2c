"""Write the tables of README.md from the files under results/. `--check` only says whether they are up to date.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
CASES = {
    "1x11-hot-1-rows-1-threads": "1 row, one layer kept hot",
    "1x11-16-layers-1-rows-1-threads": "1 row, sixteen layers in turn",
    "1x11-16-layers-8-rows-1-threads": "8 rows, sixteen layers in turn",
    "1x11-16-layers-128-rows-1-threads": "128 rows, sixteen layers in turn",
    "1x11-hot-1024-rows-1-threads": "1024 rows",
    "1x11-train-4096-rows-1-threads": "4096 rows, forward + backward",
}


def layer_cpu() -> str:
    """The layer beside the fastest dense layer, latency and error."""
    record = json.loads((ROOT / "results" / "cpu" / "layer-cpu.json").read_text())
    lines = [
        "| us a row (median; error against float64) | fastest dense | fastff | faster | C function alone |",
        "|---|---|---|---|---|",
    ]
    for case, label in CASES.items():
        timings = [t for t in record["timings"] if t["case"] == case]
        dense = min((t for t in timings if t["kind"] == "dense"), key=lambda t: t["latency_us_p50"])
        ours = next(t for t in timings if t["provider"] == "fastff")
        kernel = next((t for t in timings if t["provider"] == "fastff C"), None)
        alone = f"{kernel['latency_us_p50']:.1f}" if kernel else "-"
        lines.append(
            f"| {label} | {dense['latency_us_p50']:.0f} ({dense['provider']}) "
            f"| {ours['latency_us_p50']:.1f} ({ours['max_abs_error']:.0e}) "
            f"| **{dense['latency_us_p50'] / ours['latency_us_p50']:.0f}x** | {alone} |"
        )
    machine = record["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "onnxruntime", "openvino") if k in machine)
    lines += ["", f"{machine['cpu']}, {machine['isa']} kernels, one thread, fp32; {versions}."]
    return "\n".join(lines)


TABLES = {"layer-cpu": layer_cpu}


def updated(text: str) -> str:
    """README text with every table written anew."""
    for name, table in TABLES.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = table()
        text, found = pattern.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
        if found != 1:
            raise SystemExit(f"README.md has {found} places for the table {name}, expected 1")
    return text


def main() -> None:
    readme = ROOT / "README.md"
    before = readme.read_text()
    after = updated(before)
    if "--check" in sys.argv[1:]:
        if after != before:
            raise SystemExit("README.md does not match results/: run runs/readme_tables.py")
        return
    readme.write_text(after)


if __name__ == "__main__":
    main()
