"""Tables of layers on the CPU, from what `fastff bench` wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tools.tables.places import AMD, INTEL, read

from fastff.report.markdown import markdown_table
from fastff.report.numbers import three_digits, times_faster

PLAIN = "1x11"  # the layer of the first table
ABSENT = "-"
NOTHING = "(not in the last run)"


def record(folder: Path = INTEL) -> dict[str, Any]:
    found: dict[str, Any] = read(folder / "layer-cpu.json")
    return found


def published_layer() -> str:
    """The published layer on one thread beside the fastest dense layer: latency, error, and what bf16 and int8 give."""
    found = record()
    head = [
        "us a row (median; error against float64)",
        "fastest dense fp32",
        "fastff fp32",
        "faster",
        "C function alone, fp32 / bf16 / int8",
        "fastff bf16",
        "fastff int8",
        "int8 over the fastest int8 dense",
    ]
    rows = [
        (
            _case(best),
            _dense(best, "fp32"),
            _ours(best, "fp32"),
            f"**{_times(best, 'fp32', 'fp32')}**",
            _alone(found, best),
            *(_ours(best, p, ratio=True) for p in ("bf16", "int8")),
            _against_int8(best),
        )
        for best in found["best"]
        if best["layer"] == PLAIN and best["threads"] == 1
    ]
    return f"{markdown_table(head, rows)}\n\n{_machine(found)}"


def other_layers(folder: Path = INTEL) -> str:
    """Every other layer, and the published one on all threads, each beside its fastest dense layer."""
    head = ["layer", "us a row", "threads", "fastest dense fp32", "fastff fp32", "faster", "fastff bf16", "fastff int8"]
    rows = [
        (
            best["layer"],
            _case(best),
            best["threads"],
            _dense(best, "fp32"),
            _ours(best, "fp32"),
            f"**{_times(best, 'fp32', 'fp32')}**",
            *(_ours(best, p, ratio=True) for p in ("bf16", "int8")),
            _against_int8(best),
        )
        for best in record(folder)["best"]
        if best["layer"] != PLAIN or best["threads"] != 1
    ]
    return markdown_table([*head, "int8 over the fastest int8 dense"], rows) if rows else NOTHING


def recommended_layers() -> str:
    """The trees that trained best, beside the fastest dense layers, and the machine."""
    return f"{other_layers(AMD)}\n\n{_versions(record(AMD))}."


def _alone(found: dict[str, Any], best: dict[str, Any]) -> str:
    """The C function without Python around it, in fp32, bf16 and int8."""
    here = {t["provider"]: three_digits(t["latency_us_p50"]) for t in found["timings"] if _key(t) == _key(best)}
    return " / ".join(here[name] for name in ("fastff C", "fastff C bf16", "fastff C int8") if name in here) or ABSENT


def _key(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("layer", "rows", "layers", "threads", "training"))


def _case(best: dict[str, Any]) -> str:
    rows = f"{best['rows']} row{'s' * (best['rows'] > 1)}"
    if best["training"]:
        return f"{rows}, forward + backward"
    return f"{rows}, one layer kept hot" if best["layers"] == 1 else f"{rows}, {best['layers']} layers in turn"


def _dense(best: dict[str, Any], precision: str) -> str:
    dense = best["dense"].get(precision)
    return ABSENT if dense is None else f"{three_digits(dense['latency_us_p50'])}, {dense['provider']}"


def _ours(best: dict[str, Any], precision: str, *, ratio: bool = False) -> str:
    ours = best["ours"].get(precision)
    if ours is None:
        return ABSENT
    times = f", {_times(best, precision, 'fp32')}" if ratio else ""
    return f"{three_digits(ours['latency_us_p50'])} ({ours['relative_error']:.0e}){times}"


def _times(best: dict[str, Any], precision: str, against: str) -> str:
    ratio = best["ratios"].get(f"{precision}_over_dense_{against}")
    return ABSENT if ratio is None else times_faster(ratio)


def _against_int8(best: dict[str, Any]) -> str:
    if _times(best, "int8", "int8") == ABSENT:
        return ABSENT
    return f"{_times(best, 'int8', 'int8')} ({_dense(best, 'int8')})"


def _versions(found: dict[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "onnxruntime", "openvino") if k in machine)
    return f"{machine['cpu']}, {machine['isa']} kernels; {versions}"


def _machine(found: dict[str, Any]) -> str:
    measured = "; ".join(
        f"{limit['threads']} thread{'s' * (limit['threads'] > 1)} read {limit['memory_bytes_per_s'] / 1e9:.0f} GB/s of "
        f"memory and {limit['cache_bytes_per_s'] / 1e9:.0f} GB/s of the last cache and reach "
        f"{limit['flops_per_s'] / 1e9:.0f} GFLOP/s"
        for limit in found["limits"]
    )
    unfinished = "" if found.get("whole", True) else " The run was stopped: what is absent was not measured."
    return f"{_versions(found)}. Measured limits: {measured}.{unfinished}"


# What was asked of one thread: layer, rows, layers in turn, training, precision, the dense precision, times faster.
GOALS = (
    (PLAIN, 1, 1, False, "fp32", "fp32", 400),
    (PLAIN, 1, 16, False, "fp32", "fp32", 250),
    (PLAIN, 1, 16, False, "bf16", "fp32", 400),
    (PLAIN, 1, 16, False, "int8", "int8", 140),
    (PLAIN, 8, 16, False, "fp32", "fp32", 40),
    (PLAIN, 128, 16, False, "fp32", "fp32", 20),
    (PLAIN, 128, 16, False, "bf16", "fp32", 30),
    (PLAIN, 1024, 16, False, "fp32", "fp32", 30),
    (PLAIN, 1024, 16, False, "bf16", "fp32", 45),
    (PLAIN, 16384, 16, False, "fp32", "fp32", 60),
    (PLAIN, 4096, 1, True, "fp32", "fp32", 20),
    ("1x15-d12288", 1, 1, False, "fp32", "fp32", 3000),
    ("1x15-d12288", 1, 1, False, "bf16", "fp32", 3000),
    ("32x6", 128, 16, False, "fp32", "fp32", 5),
    ("32x6", 1024, 16, False, "fp32", "fp32", 5),
    ("32x6", 16384, 16, False, "fp32", "fp32", 5),
)


def goals() -> str:
    """Goals beside what was reached, by the module and by the C function."""
    found = record()
    bests = {_key(best): best for best in found["best"]}
    us = {(*_key(t), t["provider"]): t["latency_us_p50"] for t in found["timings"] if t["kind"] == "conditional"}
    rows = []
    for layer, count, layers, training, ours, dense, asked in GOALS:
        key = (layer, count, layers, 1, training)
        best = bests.get(key)
        fastest = best and best["dense"].get(dense, {}).get("latency_us_p50")
        name = "" if ours == "fp32" else f" {ours}"
        reached = [
            times_faster(fastest / us[*key, provider + name]) if fastest and (*key, provider + name) in us else ABSENT
            for provider in ("fastff", "fastff C")
        ]
        case = _case(best) if best else f"{count} rows"
        rows.append((f"{layer}, {case}", ours, f"{asked:,}x {dense}", *reached))
    return markdown_table(
        ["one thread", "weights", "asked, over the fastest dense", "module", "C function alone"], rows
    )


def threads() -> str:
    """How many times faster than one thread all threads are, module and C function in fp32, from 128 rows on."""
    us = {(*_key(t), t["provider"]): t["latency_us_p50"] for t in record()["timings"]}
    rows = []
    for best in record()["best"]:
        layer, count, layers, all_threads, training = key = _key(best)
        one = (layer, count, layers, 1, training)
        if all_threads == 1 or count < 128 or (*one, "fastff") not in us:
            continue
        times = [
            f"{us[*one, provider] / us[*key, provider]:.2f}x" if (*key, provider) in us else ABSENT
            for provider in ("fastff", "fastff C")
        ]
        rows.append((layer, _case(best), all_threads, *times))
    return markdown_table(["layer", "case", "threads", "module", "C function alone"], rows) if rows else NOTHING


def slower() -> str:
    """Where the fastest dense layer, of any precision up to fastff's own rounding, is faster than the module."""
    allowed = {"fp32": ("fp32",), "bf16": ("fp32", "bf16"), "int8": ("fp32", "bf16", "int8")}
    head = ["layer", "case", "threads", "weights", "fastff, us a row", "fastest dense, us a row", "fastff is"]
    rows = []
    for best in record()["best"]:
        for precision, ours in best["ours"].items():
            dense = [best["dense"][p] for p in allowed[precision] if p in best["dense"]]
            if not dense:
                continue
            fastest = min(dense, key=lambda entry: entry["latency_us_p50"])
            ratio = fastest["latency_us_p50"] / ours["latency_us_p50"]
            if ratio < 1:
                cells = (best["layer"], _case(best), best["threads"], precision, three_digits(ours["latency_us_p50"]))
                theirs = f"{three_digits(fastest['latency_us_p50'])}, {fastest['provider']}"
                rows.append((*cells, theirs, f"{ratio:.2f}x"))
    return markdown_table(head, rows) if rows else "(nowhere in the last run)"
