"""The table of conditional layers on the CPU, from what benchmarks/conditional_cpu.py wrote."""

from __future__ import annotations

from typing import Any

from tools.tables.places import INTEL, read

from fastff.report.markdown import markdown_table
from fastff.report.numbers import three_digits, times_faster

SMALL = 2048  # neurons of the dense layer that every layer is compared with
ALIKE = {"36x5-leaf4": 4980, "8x4-leaf16": 2048, "96x32-top3": 3104, "256x12-paths8": 3104, "1x11": 2730}
ROWS = (1, 8, 32, 128, 1024)
TRAINING = "fp32 training"

Cell = dict[str, Any]


def layers() -> str:
    """Microseconds a row by layer, precision and threads; for int8 how many times faster than int8 dense layers."""
    run = read(INTEL / "conditional_cpu.json")
    cells: dict[tuple[Any, ...], Cell] = {
        (cell["layer"], cell["precision"], cell["threads"], cell["rows"]): cell for cell in run["cells"]
    }
    rows = []
    for threads in (1, 2):
        for layer, precision in dict.fromkeys((c["layer"], c["precision"]) for c in run["cells"]):
            if layer in ALIKE and precision != TRAINING:
                measured = [_cell(cells, layer, precision, threads, n) for n in ROWS]
                rows.append((f"{layer} {precision}", threads, *measured))
        for neurons in sorted({SMALL, *ALIKE.values()}):
            fastest = [_dense(cells, neurons, threads, n) for n in ROWS]
            rows.append(
                (f"dense int8, {neurons:,} neurons", threads, *(three_digits(us) if us else "-" for us in fastest))
            )
    head = ["layer", "threads", *(f"{n} row{'s' * (n > 1)}" for n in ROWS)]
    machine = run["machine"]
    versions = ", ".join(f"{name} {machine[name]}" for name in ("torch", "onnxruntime", "openvino"))
    return f"{markdown_table(head, rows)}\n\n{_training(cells)}{machine['cpu']}; {versions}."


def _training(cells: dict[tuple[Any, ...], Cell]) -> str:
    """A sentence for each layer whose forward and backward were measured."""
    text = ""
    for (layer, precision, threads, rows), cell in cells.items():
        if layer not in ALIKE or precision != TRAINING:
            continue
        dense = cells[f"dense-{ALIKE[layer]}", TRAINING, threads, rows]["us"]
        text += (
            f"Forward and backward in fp32, {rows:,} rows, {'one thread' if threads == 1 else f'{threads} threads'}: "
            f"{layer} {three_digits(cell['us'])} us a row, PyTorch's dense SwiGLU layer of {ALIKE[layer]:,} neurons "
            f"{three_digits(dense)}: {times_faster(dense / cell['us'])}.\n\n"
        )
    return text


def _cell(cells: dict[tuple[Any, ...], Cell], layer: str, precision: str, threads: int, rows: int) -> str:
    cell = cells.get((layer, precision, threads, rows))
    if cell is None:
        return "-"
    text = three_digits(cell["us"])
    if precision != "int8":
        return text
    beside = [_dense(cells, neurons, threads, rows) for neurons in (ALIKE[layer], SMALL)]
    ratios = " / ".join(times_faster(us / cell["us"]) for us in beside if us)
    return f"{text} ({ratios})"


def _dense(cells: dict[tuple[Any, ...], Cell], neurons: int, threads: int, rows: int) -> float | None:
    """The faster engine's dense layer, None where neither was measured."""
    engines = ("openvino int8", "onnxruntime int8")
    found = [cells[key]["us"] for engine in engines if (key := (f"dense-{neurons}", engine, threads, rows)) in cells]
    return min(found, default=None)
