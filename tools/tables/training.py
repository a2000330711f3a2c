"""Tables of pretraining plans, fine-tuning and training speed."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from functools import partial
from typing import Any

from tools.tables.places import ROOT, TRAINING, read

from fastff.experiment import frontier
from fastff.experiment.glue_variants import only, variants_of
from fastff.experiment.glue_variants import table as glue_table
from fastff.report.markdown import markdown_table
from fastff.train.compare import at_step, compare, left_out, routing_table, table, variant_of
from fastff.train.presets import feedforward_of, layer_name

Table = Callable[[], str]


def records_of(plan: str) -> list[dict[str, Any]]:
    """What the runs of a pretraining plan left."""
    found: list[dict[str, Any]] = read(TRAINING / plan / "records.json")
    return found


def plan_tables(plan: str, step: int | None = None, **groups: str) -> dict[str, Table]:
    """Tables of a pretraining plan's records.

    groups: the marker of each group's table; beside those `PLAN-routing`, where the rows of the trees went, and
    `PLAN-left-out`, the variants without a result. step: compare the losses there, of unfinished runs too.
    """

    def losses(group: str) -> str:
        every = records_of(plan)
        found = compare([record for record in every if record["finished"]] if step is None else at_step(every, step))
        return table([entry for entry in found if entry["group"] == group])

    def missing() -> str:
        names = [variant["name"] for variant in read(TRAINING / plan / "plan.json")]
        return "\n".join(f"- {line}" for line in left_out(names, records_of(plan)))

    made = {f"{plan}-routing": lambda: routing_table(records_of(plan)), f"{plan}-left-out": missing}
    return {**made, **{marker: partial(losses, group) for marker, group in groups.items()}}


def growth(plan: str, group: str, steps: tuple[int, ...]) -> str:
    """The recovered gap of a group's trees at several steps, by training loss; unfinished runs as far as they came."""
    records = [record for record in records_of(plan) if record["group"] == group]
    found = {step: {e["name"]: e for e in compare(at_step(records, step))} for step in steps}
    known = {e["name"] for entries in found.values() for e in entries.values() if e["recovered_gap"] is not None}
    trees = [name for name in dict.fromkeys(variant_of(r) for r in records if r["routing"]) if name in known]
    rate = records[0]["tokens"] / records[0]["steps"]
    rows = []
    for step, entries in found.items():
        gaps = [entries[tree]["recovered_gap"] if tree in entries else None for tree in trees]
        rows.append((step, f"{step * rate / 1e6:.0f}", *("" if gap is None else f"{gap:.2f}" for gap in gaps)))
    return markdown_table(["step", "tokens, M", *trees], rows)


def scores_of(plan: str, folder: str, without: tuple[str, ...] = ()) -> dict[str, Any]:
    """What pretrained variants of a plan score after fine-tuning, but for these tasks."""
    found = read(TRAINING / plan / folder / "glue.json")
    scores: dict[str, Any] = only(found, [task for task in found["tasks"] if task not in without])
    return scores


def glue(plan: str, folder: str = "glue") -> str:
    """The scores of every variant and task."""
    return str(glue_table(scores_of(plan, folder))).rstrip()


def retention(plan: str, folders: tuple[str, ...], without: tuple[str, ...] = ()) -> str:
    """What each variant keeps of the mean score of the dense one that was pretrained from the same seed, and its loss.

    folders: the scores of the variants that were pretrained from seed 0, 1, and so on.
    """
    kept: dict[str, dict[int, dict[str, Any]]] = {}
    for seed, folder in enumerate(folders):
        for scored in variants_of(scores_of(plan, folder, without)):
            name = scored["name"].replace(f"-seed-{seed}", "").replace("@layer-rate=1.0", "")
            kept.setdefault(name, {})[seed] = scored
    seeds = range(len(folders))
    losses = {entry["name"]: entry for entry in compare([r for r in records_of(plan) if r["finished"]])}
    head = ["variant", "layer", "active / stored neurons", "FLOP a token and layer", "held-out loss", "recovered gap"]
    head += [f"mean score, seed {seed}" for seed in seeds]
    head += [*(f"% of dense, seed {seed}" for seed in seeds), "% of dense, mean"]
    rows = []
    for name, by_seed in sorted(kept.items(), key=lambda item: -next(iter(item[1].values()))["flops"]):
        first = next(iter(by_seed.values()))
        loss = losses[name.partition("@")[0]]
        cells = [name, first["layer"], f"{first['active_neurons']} / {first['neurons']}", f"{first['flops']:,}"]
        cells += [f"{loss['loss']:.3f}", "" if loss["recovered_gap"] is None else f"{loss['recovered_gap']:.2f}"]
        for key, digits in (("mean", 2), ("retention", 1)):
            cells += [f"{by_seed[seed][key]:.{digits}f}" if seed in by_seed else "" for seed in seeds]
        whole = len(by_seed) == len(folders)
        cells.append(f"{statistics.fmean(one['retention'] for one in by_seed.values()):.1f}" if whole else "")
        rows.append(cells)
    return markdown_table(head, rows)


def train_losses(plan: str, folder: str) -> str:
    """The mean training loss of the last tenth of the updates, of every variant and task."""
    found = scores_of(plan, folder)
    rows = [
        (one["name"], *(f"{statistics.fmean(one['train_losses'][task]):.3f}" for task in found["tasks"]))
        for one in variants_of(found)
    ]
    return markdown_table(["variant", *found["tasks"]], rows)


def recipes(plan: str, files: str = "recipe-*.json") -> str:
    """What variants of a plan score by the options of their fine-tuning; means of the tasks that every row has.

    files: of the scores, one for each set of options.
    """
    found = [read(path) for path in sorted((TRAINING / plan).glob(files))]
    tasks = found[0]["tasks"]
    shared = [task for task in tasks if all(task in run["tasks"] for run in found)]
    scored = [
        (one, {"variant": one["name"], **dict(option.split("=") for option in run["options"])})
        for run in found
        for one in variants_of(only(run, shared))
    ]
    order = [one["name"] for one, _ in scored]
    scored.sort(key=lambda row: order.index(row[0]["name"]))
    names = [name for name in scored[0][1] if len({given[name] for _, given in scored}) > 1]
    mean = "mean" if shared == tasks else f"mean of {', '.join(shared)}"
    rows = []
    for one, given in scored:
        scores = [f"{one['medians'][task]:.1f}" if task in one["medians"] else "" for task in tasks]
        rows.append([*(given[name] for name in names), *scores, f"{one['mean']:.1f}"])
    return markdown_table([*names, *tasks, mean], rows)


def gpus() -> str:
    """Tokens a second of pretraining on one GPU and on several."""
    runs = [
        {**read(path), "how": "FSDP2" if path.stem.endswith("-fsdp") else "DDP"}
        for path in sorted((TRAINING / "gpus").glob("*.json"))
    ]
    alone = {run["settings"]["feedforward"]: run["tokens_per_second"] for run in runs if run["processes"] == 1}
    rows = []
    for run in sorted(runs, key=lambda run: (run["settings"]["feedforward"], run["processes"], run["how"])):
        settings, speed = run["settings"], run["tokens_per_second"]
        rows.append(
            (
                _layer_of(run),
                f"{run['processes']}, {run['how']}" if run["processes"] > 1 else "1",
                settings["batch"],
                f"{speed:,}",
                f"{speed / alone[settings['feedforward']]:.2f}" if settings["feedforward"] in alone else "",
                f"{run['peak_gpu_bytes'] / 2**30:.1f}",
            )
        )
    head = ["feedforward", "GPUs", "rows a step", "tokens/s", "times one GPU", "memory of a GPU, GiB"]
    return markdown_table(head, rows)


def one_gpu() -> str:
    """Tokens a second on one GPU, compiled and recorded as graphs, beside the dense layer in the same form."""
    rows = []
    for preset in ("small", "base"):
        found = {path.stem: read(path) for path in sorted((TRAINING / "gpus" / preset).glob("*.json"))}
        for name, run in found.items():
            dense = found[f"dense-swiglu-1{name.removeprefix(run['settings']['feedforward'] + '-1')}"]
            # Of graphs the caching allocator's pools count, of other runs what was in use at once would be less.
            rows.append(
                (
                    preset,
                    _layer_of(run),
                    name.removeprefix(f"{run['settings']['feedforward']}-1").strip("-") or "plain",
                    f"{run['tokens_per_second']:,}",
                    f"{run['tokens_per_second'] / dense['tokens_per_second']:.2f}x",
                    f"{run['cached_gpu_bytes'] / 2**30:.1f}",
                )
            )
    return markdown_table(["preset", "feedforward", "form", "tokens/s", "times dense", "memory held, GiB"], rows)


def _layer_of(run: dict[str, Any]) -> str:
    hidden = run["settings"]["hidden"]
    return layer_name(feedforward_of(run["settings"]["feedforward"], hidden), hidden)


def backends() -> str:
    """How far the loss curves of one run are apart on several backends."""
    runs = read(TRAINING / "backends" / "backends.json")["runs"]
    first = next(iter(runs))
    rows = [
        (
            name,
            f"{run['valid_loss']:.4f}",
            "" if name == first else f"{run['mean_apart']:.2g} / {run['furthest_apart']:.2g}",
        )
        for name, run in runs.items()
    ]
    head = ["run", "held-out loss", f"training loss beside {first}: mean distance / greatest"]
    return markdown_table(head, rows)


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
ROUTERS = plan_tables("routers-300m", **{"routers-300m": "causal"})
RANKED = plan_tables("routers-50m", **{"routers-50m": "causal", "routers-50m-annealing": "annealing"})
ANNEALED = plan_tables("1x11-300m", **{"1x11-300m": "causal", "1x11-300m-annealing": "annealing"})
MINI = plan_tables("mini-300m", **{"mini-300m": "causal"})
LONG_MASKED = plan_tables("masked-524m", **{"524m-masked": "masked", "524m-start": "start"})
EXPERTS_MASKED = plan_tables("masked-170m", **{"170m-masked": "masked", "170m-start": "start"})
GLUE = plan_tables("small-glue", **{"small-glue-causal": "causal", "small-glue-masked": "masked"})
RETENTION = partial(retention, "masked-524m", ("glue", "glue-seed-1"))


def frontier_table(folder: str = "frontier") -> str:
    """Held-out losses beside measured speeds."""
    studies = [TRAINING / study for study in ("routers-300m", "small-300m")]
    prompt = read(TRAINING / folder / frontier.SPEEDS)["prompt"]
    return frontier.table(frontier.points_of(studies, TRAINING / folder, TRAINING / "gpus" / "small"), prompt)


def pair_table() -> str:
    """The two models that ship: size, loss and speed."""
    folder = TRAINING / "mini-300m"
    shipped = {"flat": "mini-experts", "dense": "mini-dense"}
    rows = []
    for point in frontier.points_of([folder], folder, None):
        model = shipped[point["name"]]
        size = (ROOT / "models" / model / "model.fastff").stat().st_size
        neurons = f"{point['active_neurons']} of {point['neurons']}"
        speed = (f"{point['decode']:,.0f}", f"{point['prefill']:,.0f}")
        rows.append((f"`{model}`", neurons, f"{point['loss']:.3f}", *speed, f"{size / 1e6:.1f}"))
    head = ["model", "neurons of a token", "held-out loss", "decoding, tokens/s", "128-token prompt, tokens/s", "MB"]
    return markdown_table(head, rows)


def without(made: dict[str, Table], *endings: str) -> dict[str, Table]:
    """The tables whose markers do not end so."""
    return {name: table for name, table in made.items() if not name.endswith(endings)}


STUDIES: dict[str, dict[str, Table]] = {
    "small-causal": CAUSAL,
    "small-causal-rates": without(RATES, "left-out"),
    "small-causal-balance": BALANCE,
    "small-300m": {
        **LONG,
        "300m-growth": partial(growth, "small-300m", "causal", (1000, 2000, 3000, 4500, 6000, 7500, 9100)),
        "300m-rates": partial(recipes, "small-300m"),
        "glue": partial(glue, "small-300m"),
        "glue-five": partial(glue, "small-300m", "glue-five"),
        "glue-375": partial(glue, "small-300m", "glue-375"),
    },
    "routers-300m": without(ROUTERS, "left-out", "routing"),
    "routers-50m": without(RANKED, "left-out", "routing"),
    "1x11-300m": without(ANNEALED, "left-out", "routing"),
    "mini-300m": without(MINI, "left-out", "routing"),
    "frontier": {"frontier": frontier_table, "frontier-amd": partial(frontier_table, "frontier/amd")},
    "masked-524m": {
        **without(LONG_MASKED, "left-out"),
        "524m-growth": partial(growth, "masked-524m", "masked", (1000, 2000, 4000, 6000, 8000, 10000, 12000, 14000)),
        "524m-retention": RETENTION,
        "524m-retention-seven": partial(RETENTION, without=("CoLA", "WNLI")),
        "524m-recipes": partial(recipes, "masked-524m"),
        "524m-layer-rates": partial(recipes, "masked-524m", "rates-*.json"),
        "524m-learned": partial(train_losses, "masked-524m", "glue-seed-1"),
        "glue": partial(glue, "masked-524m"),
        "glue-seed-1": partial(glue, "masked-524m", "glue-seed-1"),
    },
    "masked-170m": {
        **without(EXPERTS_MASKED, "left-out", "routing"),
        "glue": partial(glue, "masked-170m"),
        "glue-seed-1": partial(glue, "masked-170m", "glue-seed-1"),
    },
    "tiny-causal": without(TINY, "left-out"),
    "tiny-1x11": without(PUBLISHED, "left-out"),
    "tiny-1x11-long": without(PUBLISHED_LONG, "left-out"),
    "wide-1x11": without(PUBLISHED_WIDE, "left-out"),
    "small-glue": {**without(GLUE, "routing"), "small-glue-rates": partial(recipes, "small-glue")},
    "gpus": {"gpus": gpus},
    "backends": {"backends": backends},
    "small-masked": {**without(MASKED, "left-out"), "glue": partial(glue, "small-masked")},
}
QUALITY: dict[str, Table] = {
    "from-dense": CAUSAL["from-dense"],
    "rate-0.002": RATES["rate-0.002"],
    "300m-causal": LONG["300m-causal"],
    "routers-300m": ROUTERS["routers-300m"],
    "frontier": frontier_table,
    "170m-masked": EXPERTS_MASKED["170m-masked"],
    "524m-masked": LONG_MASKED["524m-masked"],
    "524m-retention": RETENTION,
    "backends": backends,
}
