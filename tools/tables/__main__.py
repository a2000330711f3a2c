"""Write the tables of README.md and of every page with tables from the result files. `--check` only says whether they
are up to date. Run as `python -m tools.tables`.

A table stands between `<!-- NAME -->` and `<!-- /NAME -->`.
"""

from __future__ import annotations

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from experiments.convert import tables as convert_tables

from fastff.bench.report import figure
from fastff.train.compare import at_step, compare, health_table, left_out, table
from fastff.train.presets import feedforward_of, layer_name

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "runs"))
import glue_arms

ROOT = Path(__file__).resolve().parents[2]
MACHINES = ROOT / "benchmarks" / "results"
INTEL, AMD, H200 = (MACHINES / name for name in ("intel-xeon-amx-2-cores", "amd-epyc-2-cores", "nvidia-h200"))
TRAINING = ROOT / "experiments"
PLAIN = "1x11"  # the layer of the first table
ABSENT = "-"


def record(folder: Path = INTEL) -> dict[str, Any]:
    return json.loads((folder / "layer-cpu.json").read_text())


def layer_cpu() -> str:
    """The published layer on one thread beside the fastest dense layer: latency, error, and what bf16 and int8 give."""
    found = record()
    lines = [
        "| us a row (median; error against float64) | fastest dense fp32 | fastff fp32 | faster "
        "| C function alone, fp32 / bf16 / int8 | fastff bf16 | fastff int8 | int8 over the fastest int8 dense |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for best in found["best"]:
        if best["layer"] != PLAIN or best["threads"] != 1:
            continue
        cells = (
            _case(best),
            _dense(best, "fp32"),
            _ours(best, "fp32"),
            f"**{_times(best, 'fp32', 'fp32')}**",
            _alone(found, best),
            *(_ours(best, p, ratio=True) for p in ("bf16", "int8")),
            _against_int8(best),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, "", _machine(found)])


def layers_cpu(folder: Path = INTEL) -> str:
    """Every other layer, and the published one on all threads, each beside its fastest dense layer."""
    lines = [
        "| layer | us a row | threads | fastest dense fp32 | fastff fp32 | faster | fastff bf16 | fastff int8 "
        "| int8 over the fastest int8 dense |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for best in record(folder)["best"]:
        if best["layer"] == PLAIN and best["threads"] == 1:
            continue
        cells = (
            best["layer"],
            _case(best),
            str(best["threads"]),
            _dense(best, "fp32"),
            _ours(best, "fp32"),
            f"**{_times(best, 'fp32', 'fp32')}**",
            *(_ours(best, p, ratio=True) for p in ("bf16", "int8")),
            _against_int8(best),
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) if len(lines) > 2 else "(not in the last run)"


def recommended_cpu() -> str:
    """The trees that trained best, beside the fastest dense layers, and the machine."""
    return f"{layers_cpu(AMD)}\n\n{_versions(record(AMD))}."


def _alone(found: dict[str, Any], best: dict[str, Any]) -> str:
    """The C function without Python around it, in fp32, bf16 and int8."""
    here = {t["provider"]: figure(t["latency_us_p50"]) for t in found["timings"] if _scene(t) == _scene(best)}
    return " / ".join(here[name] for name in ("fastff C", "fastff C bf16", "fastff C int8") if name in here) or ABSENT


def _scene(entry: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(entry[name] for name in ("layer", "rows", "layers", "threads", "training"))


def _case(best: dict[str, Any]) -> str:
    rows = f"{best['rows']} row{'s' * (best['rows'] > 1)}"
    if best["training"]:
        return f"{rows}, forward + backward"
    return f"{rows}, one layer kept hot" if best["layers"] == 1 else f"{rows}, {best['layers']} layers in turn"


def _dense(best: dict[str, Any], precision: str) -> str:
    dense = best["dense"].get(precision)
    if dense is None:
        return ABSENT
    return f"{figure(dense['latency_us_p50'])}, {dense['provider']}"


def _ours(best: dict[str, Any], precision: str, *, ratio: bool = False) -> str:
    ours = best["ours"].get(precision)
    if ours is None:
        return ABSENT
    times = f", {_times(best, precision, 'fp32')}" if ratio else ""
    return f"{figure(ours['latency_us_p50'])} ({ours['relative_error']:.0e}){times}"


def _times(best: dict[str, Any], precision: str, against: str) -> str:
    ratio = best["ratios"].get(f"{precision}_over_dense_{against}")
    return ABSENT if ratio is None else _faster(ratio)


def _faster(ratio: float) -> str:
    return f"{ratio:,.0f}x" if ratio >= 10 else f"{ratio:.1f}x"


def _against_int8(best: dict[str, Any]) -> str:
    if _times(best, "int8", "int8") == ABSENT:
        return ABSENT
    return f"{_times(best, 'int8', 'int8')} ({_dense(best, 'int8')})"


def _versions(found: dict[str, Any]) -> str:
    machine = found["machine"]
    versions = ", ".join(f"{k} {machine[k]}" for k in ("torch", "onnxruntime", "openvino") if k in machine)
    return f"{machine['cpu']}, {machine['isa']} kernels; {versions}"


def _machine(found: dict[str, Any]) -> str:
    limits = found["limits"]
    measured = "; ".join(
        f"{limit['threads']} thread{'s' * (limit['threads'] > 1)} read {limit['memory_bytes_per_s'] / 1e9:.0f} GB/s of "
        f"memory and {limit['cache_bytes_per_s'] / 1e9:.0f} GB/s of the last cache and reach "
        f"{limit['flops_per_s'] / 1e9:.0f} GFLOP/s"
        for limit in limits
    )
    unfinished = "" if found.get("whole", True) else " The run was stopped: what is absent was not measured."
    return f"{_versions(found)}. Measured limits: {measured}.{unfinished}"


def end_to_end() -> str:
    """A whole encoder: every engine's latency, and how many times faster than the fastest fp32 dense one it is."""
    found = json.loads((INTEL / "end-to-end.json").read_text())
    shapes = sorted({cell["shape"] for cell in found["cells"]}, key=lambda shape: int(shape.split("x")[0]))
    ms = {(cell["shape"], cell["engine"]): cell["ms"] for cell in found["cells"]}
    engines = list(dict.fromkeys(cell["engine"] for cell in found["cells"]))
    fp32 = [name for name in engines if name.startswith("dense") and "int8" not in name and "bf16" not in name]
    best = {shape: min(ms[shape, name] for name in fp32) for shape in shapes}
    heads = [f"{shape.replace('x', ' x ')} tokens, ms" for shape in shapes]
    lines = [f"| encoder, engine | {' | '.join(heads)} |", "|---" * (len(shapes) + 1) + "|"]
    for name in engines:
        cells = [f"{figure(ms[shape, name])} ({best[shape] / ms[shape, name]:.1f}x)" for shape in shapes]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


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


def goals_cpu() -> str:
    """Goals beside what was reached, by the module and by the C function."""
    found = record()
    bests = {_scene(best): best for best in found["best"]}
    us = {(*_scene(t), t["provider"]): t["latency_us_p50"] for t in found["timings"] if t["kind"] == "conditional"}
    lines = [
        "| one thread | weights | asked, over the fastest dense | module | C function alone |",
        "|---|---|---|---|---|",
    ]
    for layer, rows, layers, training, ours, dense, asked in GOALS:
        scene = (layer, rows, layers, 1, training)
        best = bests.get(scene)
        fastest = best and best["dense"].get(dense, {}).get("latency_us_p50")
        name = "" if ours == "fp32" else f" {ours}"
        reached = [
            _faster(fastest / us[*scene, provider + name]) if fastest and (*scene, provider + name) in us else ABSENT
            for provider in ("fastff", "fastff C")
        ]
        case = _case(best) if best else f"{rows} rows"
        lines.append(f"| {layer}, {case} | {ours} | {asked:,}x {dense} | {' | '.join(reached)} |")
    return "\n".join(lines)


def threads_cpu() -> str:
    """How many times faster than one thread all threads are, module and C function in fp32, from 128 rows on."""
    us = {(*_scene(t), t["provider"]): t["latency_us_p50"] for t in record()["timings"]}
    lines = ["| layer | case | threads | module | C function alone |", "|---|---|---|---|---|"]
    for best in record()["best"]:
        layer, rows, layers, threads, training = scene = _scene(best)
        one = (layer, rows, layers, 1, training)
        if threads == 1 or rows < 128 or (*one, "fastff") not in us:
            continue
        times = [
            f"{us[*one, provider] / us[*scene, provider]:.2f}x" if (*scene, provider) in us else ABSENT
            for provider in ("fastff", "fastff C")
        ]
        lines.append(f"| {layer} | {_case(best)} | {threads} | {' | '.join(times)} |")
    return "\n".join(lines) if len(lines) > 2 else "(not in the last run)"


def slower_cpu() -> str:
    """Where the fastest dense layer, of any precision up to fastff's own rounding, is faster than the module."""
    lines = [
        "| layer | case | threads | weights | fastff, us a row | fastest dense, us a row | fastff is |",
        "|---" * 7 + "|",
    ]
    allowed = {"fp32": ("fp32",), "bf16": ("fp32", "bf16"), "int8": ("fp32", "bf16", "int8")}
    for best in record()["best"]:
        for precision, ours in best["ours"].items():
            dense = [best["dense"][p] for p in allowed[precision] if p in best["dense"]]
            if not dense:
                continue
            fastest = min(dense, key=lambda entry: entry["latency_us_p50"])
            ratio = fastest["latency_us_p50"] / ours["latency_us_p50"]
            if ratio < 1:
                cells = (best["layer"], _case(best), str(best["threads"]), precision, figure(ours["latency_us_p50"]))
                theirs = f"{figure(fastest['latency_us_p50'])}, {fastest['provider']}"
                lines.append(f"| {' | '.join(cells)} | {theirs} | {ratio:.2f}x |")
    return "\n".join(lines) if len(lines) > 2 else "(nowhere in the last run)"


def layer_gpu() -> str:
    """Every bf16 case with a flushed cache: fastff beside the fastest dense provider; then the steps of a model."""
    found = json.loads((H200 / "layer-gpu.json").read_text())
    by_key = {timing["key"]: timing for timing in found["timings"]}
    lines = ["| layer | against dense | rows | | fastest dense, us | fastff, us | faster |", "|---" * 7 + "|"]
    shown = [(by_key[best["dense"]], by_key[best["ours"]], best["ratio"]) for best in found["best"]]
    layers = list(dict.fromkeys(ours["layer"] for _, ours, _ in shown))
    shown.sort(key=lambda entry: (layers.index(entry[1]["layer"]), entry[1]["training"], entry[1]["rows"]))
    for dense, ours, ratio in shown:
        if not ours["cold"] or ours["dtype"] != "bf16":
            continue
        mode = "forward + backward" if ours["training"] else "forward"
        chain = f", one of {ours['layers']} layers in turn" if ours["layers"] > 1 else ""
        cells = (
            ours["layer"],
            ours["dense"],
            f"{ours['rows']}{chain}",
            mode,
            f"{figure(dense['latency_us_p50'])}, {dense['provider'].removeprefix('dense ')}",
            figure(ours["latency_us_p50"]),
            f"**{ratio:.{1 if ratio >= 2 else 2}f}x**",
        )
        lines.append(f"| {' | '.join(cells)} |")
    lines += [
        "",
        "| training step of 12 layers, 256 x 128 tokens, eager unless it says graph | ms (quartiles) | peak GiB |",
        "|---" * 3 + "|",
    ]
    for step in json.loads((H200 / "training-step.json").read_text())["steps"]:
        spread = f"{figure(step['step_ms_p50'])} ({figure(step['step_ms_p25'])}-{figure(step['step_ms_p75'])})"
        # A graph's memory is taken when it is captured, before the peak is noted.
        peak = "" if step["name"].endswith("graph") else figure(step["peak_bytes"] / 2**30)
        lines.append(f"| {step['name']} | {spread} | {peak} |")
    about = found["about"]
    versions = ", ".join(f"{name} {about[name]}" for name in ("torch", "triton"))
    copy = about["copy_bytes_per_s"] / 1e12
    return "\n".join([*lines, "", f"{about['device']}, {versions}; a copy reads and writes {copy:.1f} TB/s."])


def records_of(plan: str) -> list[dict[str, Any]]:
    """What the runs of a pretraining plan left."""
    return json.loads((TRAINING / plan / "records.json").read_text())


def plan_tables(plan: str, step: int | None = None, **groups: str) -> dict[str, Callable[[], str]]:
    """Tables of a pretraining plan's records. groups: the marker of each group's table; beside those `PLAN-routing`,
    where the rows of the trees went, and `PLAN-left-out`, the arms without a result. step: compare the losses there,
    of unfinished runs too."""

    def arms(group: str) -> str:
        every = records_of(plan)
        found = compare([record for record in every if record["finished"]] if step is None else at_step(every, step))
        return table([entry for entry in found if entry["group"] == group])

    def missing() -> str:
        names = [arm["name"] for arm in json.loads((TRAINING / plan / "plan.json").read_text())]
        return "\n".join(f"- {line}" for line in left_out(names, records_of(plan)))

    made = {f"{plan}-routing": lambda: health_table(records_of(plan)), f"{plan}-left-out": missing}
    return {**made, **{marker: partial(arms, group) for marker, group in groups.items()}}


def growth(plan: str, group: str, steps: tuple[int, ...]) -> str:
    """The recovered gap of a group's trees at several steps, by training loss; unfinished runs as far as they came."""
    records = [record for record in records_of(plan) if record["group"] == group]
    found = {step: {e["name"]: e for e in compare(at_step(records, step))} for step in steps}
    known = {e["name"] for entries in found.values() for e in entries.values() if e["recovered_gap"] is not None}
    trees = [arm for arm in dict.fromkeys(r["arm"] for r in records if r["routing"]) if arm in known]
    lines = ["| step | tokens, M | " + " | ".join(trees) + " |", "|---" * (len(trees) + 2) + "|"]
    rate = records[0]["tokens"] / records[0]["steps"]
    for step, entries in found.items():
        gaps = [entries[tree]["recovered_gap"] if tree in entries else None for tree in trees]
        cells = ["" if gap is None else f"{gap:.2f}" for gap in gaps]
        lines.append(f"| {step} | {step * rate / 1e6:.0f} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def scores_of(plan: str, folder: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What pretrained arms of a plan score after fine-tuning, but for these tasks."""
    found = json.loads((TRAINING / plan / folder / "glue.json").read_text())
    return glue_arms.only(found, [task for task in found["tasks"] if task not in without])


def glue(plan: str, folder: str = "glue") -> str:
    """The scores of every arm and task."""
    return glue_arms.table(scores_of(plan, folder)).rstrip()


def retention(plan: str, folders: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """What each arm keeps of the mean score of the dense one that was pretrained from the same seed, beside its loss.

    folders: the scores of the arms that were pretrained from seed 0, 1, and so on.
    """
    kept: dict[str, dict[int, dict[str, Any]]] = {}
    for seed, folder in enumerate(folders):
        for arm in scores_of(plan, folder, without)["arms"]:
            name = arm["name"].replace(f"-seed-{seed}", "").replace("@layer-rate=1.0", "")
            kept.setdefault(name, {})[seed] = arm
    seeds = range(len(folders))
    losses = {entry["name"]: entry for entry in compare([r for r in records_of(plan) if r["finished"]])}
    head = ["arm", "layer", "active / stored neurons", "FLOP a token and layer", "held-out loss", "recovered gap"]
    head += [f"mean score, seed {seed}" for seed in seeds]
    head += [*(f"% of dense, seed {seed}" for seed in seeds), "% of dense, mean"]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    for name, arms in sorted(kept.items(), key=lambda arm: -next(iter(arm[1].values()))["flops"]):
        first = next(iter(arms.values()))
        loss = losses[name.partition("@")[0]]
        cells = [name, first["layer"], f"{first['active_neurons']} / {first['neurons']}", f"{first['flops']:,}"]
        cells += [f"{loss['loss']:.3f}", "" if loss["recovered_gap"] is None else f"{loss['recovered_gap']:.2f}"]
        for key, digits in (("mean", 2), ("retention", 1)):
            cells += [f"{arms[seed][key]:.{digits}f}" if seed in arms else "" for seed in seeds]
        whole = len(arms) == len(folders)
        cells.append(f"{statistics.fmean(arm['retention'] for arm in arms.values()):.1f}" if whole else "")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def train_losses(plan: str, folder: str) -> str:
    """The mean training loss of the last tenth of the updates, of every arm and task."""
    found = scores_of(plan, folder)
    lines = [f"| arm | {' | '.join(found['tasks'])} |", "|---" * (len(found["tasks"]) + 1) + "|"]
    for arm in found["arms"]:
        losses = [statistics.fmean(arm["train_losses"][task]) for task in found["tasks"]]
        lines.append(f"| {arm['name']} | {' | '.join(f'{loss:.3f}' for loss in losses)} |")
    return "\n".join(lines)


def recipes(plan: str, files: str = "recipe-*.json") -> str:
    """What arms of a plan score by the options of their fine-tuning; means of the tasks that every row has. files: of
    the scores, one for each set of options."""
    found = [json.loads(path.read_text()) for path in sorted((TRAINING / plan).glob(files))]
    tasks = found[0]["tasks"]
    shared = [task for task in tasks if all(task in run["tasks"] for run in found)]
    rows = [
        (arm, {"arm": arm["name"], **dict(option.split("=") for option in run["options"])})
        for run in found
        for arm in glue_arms.only(run, shared)["arms"]
    ]
    arms = [arm["name"] for arm, _ in rows]
    rows.sort(key=lambda row: arms.index(row[0]["name"]))
    names = [name for name in rows[0][1] if len({given[name] for _, given in rows}) > 1]
    mean = "mean" if shared == tasks else f"mean of {', '.join(shared)}"
    lines = ["| " + " | ".join([*names, *tasks, mean]) + " |", "|---" * (len(names) + len(tasks) + 1) + "|"]
    for arm, given in rows:
        scores = [f"{arm['medians'][task]:.1f}" if task in arm["medians"] else "" for task in tasks]
        lines.append("| " + " | ".join([*(given[name] for name in names), *scores, f"{arm['mean']:.1f}"]) + " |")
    return "\n".join(lines)


def training_gpus() -> str:
    """Tokens a second of pretraining on one GPU and on several."""
    runs = [
        {**json.loads(path.read_text()), "how": "FSDP2" if path.stem.endswith("-sharded") else "DDP"}
        for path in sorted((TRAINING / "gpus").glob("*.json"))
    ]
    alone = {run["settings"]["feedforward"]: run["tokens_per_second"] for run in runs if run["processes"] == 1}
    lines = [
        "| feedforward | GPUs | rows a step | tokens/s | times one GPU | memory of a GPU, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for run in sorted(runs, key=lambda run: (run["settings"]["feedforward"], run["processes"], run["how"])):
        settings, speed = run["settings"], run["tokens_per_second"]
        hidden = settings["hidden"]
        cells = (
            layer_name(feedforward_of(settings["feedforward"], hidden), hidden),
            f"{run['processes']}, {run['how']}" if run["processes"] > 1 else "1",
            str(settings["batch"]),
            f"{speed:,}",
            f"{speed / alone[settings['feedforward']]:.2f}" if settings["feedforward"] in alone else "",
            f"{run['peak_gpu_bytes'] / 2**30:.1f}",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def backends() -> str:
    """How far the loss curves of one run are apart on several backends."""
    runs = json.loads((TRAINING / "backends" / "backends.json").read_text())["runs"]
    first = next(iter(runs))
    lines = [f"| run | held-out loss | training loss beside {first}: mean distance / greatest |", "|---|---|---|"]
    for name, run in runs.items():
        apart = "" if name == first else f"{run['mean_apart']:.2g} / {run['furthest_apart']:.2g}"
        lines.append(f"| {name} | {run['valid_loss']:.4f} | {apart} |")
    return "\n".join(lines)


CAUSAL = plan_tables("small-causal", scratch="scratch", **{"from-dense": "from-dense"})
RATES = plan_tables("small-causal-rates", **{f"rate-{rate}": f"rate-{rate}" for rate in ("0.001", "0.002", "0.004")})
TINY = plan_tables("tiny-causal", **{"tiny-causal": "scratch"})
PUBLISHED = plan_tables("tiny-1x11", **{"tiny-1x11": "scratch"})
PUBLISHED_LONG = plan_tables("tiny-1x11-long", **{"tiny-1x11-long": "scratch"})
PUBLISHED_WIDE = plan_tables("wide-1x11", **{"wide-1x11": "scratch"})
MASKED = plan_tables("small-masked", **{"small-masked": "scratch"})
BALANCE = plan_tables("small-causal-balance", 800, **{"small-causal-balance": "scratch"})
LONG = plan_tables(
    "small-300m", **{f"300m-{group}": group for group in ("causal", "masked", "masked-1e-3", "masked-5e-4")}
)
LONG_MASKED = plan_tables("masked-524m", **{"524m-masked": "masked", "524m-start": "start"})
RETENTION = partial(retention, "masked-524m", ("glue", "glue-seed-1"))
GLUE = plan_tables("small-glue", **{"small-glue-causal": "causal", "small-glue-masked": "masked"})
PAGES: dict[str, dict[str, Callable[[], str]]] = {
    "README.md": {"layer-cpu": layer_cpu, "layers-cpu": layers_cpu, "end-to-end": end_to_end, "layer-gpu": layer_gpu},
    "benchmarks/results/intel-xeon-amx-2-cores/NOTES.md": {
        "goals-cpu": goals_cpu,
        "threads-cpu": threads_cpu,
        "slower-cpu": slower_cpu,
    },
    "docs/training.md": {
        "gpus": training_gpus,
        "from-dense": CAUSAL["from-dense"],
        "rate-0.002": RATES["rate-0.002"],
        "300m-causal": LONG["300m-causal"],
        "524m-masked": LONG_MASKED["524m-masked"],
        "524m-retention": RETENTION,
        "recommended-cpu": recommended_cpu,
        "backends": backends,
    },
    "experiments/small-causal/README.md": CAUSAL,
    "experiments/small-causal-rates/README.md": {k: v for k, v in RATES.items() if not k.endswith("left-out")},
    "experiments/small-causal-balance/README.md": BALANCE,
    "experiments/small-300m/README.md": {
        **LONG,
        "300m-growth": partial(growth, "small-300m", "causal", (1000, 2000, 3000, 4500, 6000, 7500, 9100)),
        "300m-rates": partial(recipes, "small-300m"),
        "glue": partial(glue, "small-300m"),
        "glue-five": partial(glue, "small-300m", "glue-five"),
        "glue-375": partial(glue, "small-300m", "glue-375"),
    },
    "experiments/masked-524m/README.md": {
        **{name: made for name, made in LONG_MASKED.items() if not name.endswith("left-out")},
        "524m-growth": partial(growth, "masked-524m", "masked", (1000, 2000, 4000, 6000, 8000, 10000, 12000, 14000)),
        "524m-retention": RETENTION,
        "524m-retention-seven": partial(RETENTION, without=("CoLA", "WNLI")),
        "524m-recipes": partial(recipes, "masked-524m"),
        "524m-layer-rates": partial(recipes, "masked-524m", "rates-*.json"),
        "524m-learned": partial(train_losses, "masked-524m", "glue-seed-1"),
        "glue": partial(glue, "masked-524m"),
        "glue-seed-1": partial(glue, "masked-524m", "glue-seed-1"),
    },
    "experiments/tiny-causal/README.md": {name: TINY[name] for name in ("tiny-causal", "tiny-causal-routing")},
    "experiments/tiny-1x11/README.md": {name: PUBLISHED[name] for name in ("tiny-1x11", "tiny-1x11-routing")},
    "experiments/tiny-1x11-long/README.md": {
        name: PUBLISHED_LONG[name] for name in ("tiny-1x11-long", "tiny-1x11-long-routing")
    },
    "experiments/wide-1x11/README.md": {name: PUBLISHED_WIDE[name] for name in ("wide-1x11", "wide-1x11-routing")},
    "experiments/small-glue/README.md": {
        **{name: made for name, made in GLUE.items() if not name.endswith("routing")},
        "small-glue-rates": partial(recipes, "small-glue"),
    },
    "experiments/gpus/README.md": {"gpus": training_gpus},
    "experiments/backends/README.md": {"backends": backends},
    "experiments/small-masked/README.md": {
        "small-masked": MASKED["small-masked"],
        "small-masked-routing": MASKED["small-masked-routing"],
        "glue": partial(glue, "small-masked"),
    },
    "docs/convert.md": {name: convert_tables.TABLES[name] for name in ("convert-minilm", "convert-latency")},
    "experiments/convert/README.md": convert_tables.TABLES,
}


def updated(page: str, text: str) -> str:
    """The text of a page with every table written anew."""
    for name, made in PAGES[page].items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)", re.DOTALL)
        body = made()
        text, found = pattern.subn(lambda m, body=body: f"{m[1]}{body}\n{m[2]}", text)
        if found != 1:
            raise SystemExit(f"{page} has {found} places for the table {name}, expected 1")
    return text


def main() -> None:
    for page in PAGES:
        path = ROOT / page
        before = path.read_text()
        after = updated(page, before)
        if "--check" not in sys.argv[1:]:
            path.write_text(after)
        elif after != before:
            raise SystemExit(f"{page} does not match the result files: run python -m tools.tables")


if __name__ == "__main__":
    main()
