"""`index.html`, made from `results.json` alone: what its template shows of a run, finished or not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastff.report import pages
from train_tiny import charts
from train_tiny.store import write_atomic
from train_tiny.summary import missing_parts
from train_tiny.terminal import gap_words, percent, speed_pair

Found = dict[str, Any]


def write_report(out: Path, results: Found) -> Path:
    """Write the page; returns its path. Parts that a run did not reach are left out and named. Raises RunError."""
    path = out / "index.html"
    write_atomic(path, render(results).encode())
    return path


def render(results: Found) -> str:
    """The page for the results of a run, finished or not."""
    sections = {
        "speed": ("speed", _speed),
        "pretraining": ("start", _pretraining),
        "authors": ("finetune", _authors),
        "routing": ("pretrain", _routing),
        "filling": ("pretrain", _filling),
        "machine": ("machine", _machine),
    }
    shown = {name: make(results) if results.get(needed) else None for name, (needed, make) in sections.items()}
    gaps = results.get("summary", {}).get("recovered_gap", {}).values()
    unclear = bool(gaps) and all(gap["value"] is None for gap in gaps)
    return pages.render(
        "report.html",
        templates=Path(__file__).parent,
        missing=missing_parts(results),
        quality=_quality(results),
        nothing_to_recover=unclear,
        **shown,
    )


def _quality(results: Found) -> Found | None:
    """The tree's loss against its dense twin's."""
    against: Found | None = results.get("summary", {}).get("against_dense", {}).get("tree")
    if not against:
        return None
    tokens = results["start"]["tokens"] + results["pretrain"]["tree"]["tokens"]
    return {**against, "tokens": tokens, "sure": abs(against["difference"]) > 2 * against["error"]}


def _speed(results: Found) -> Found:
    measured = results["speed"]
    rows = []
    for t in sorted(measured["timings"], key=lambda t: (t["rows"], t["latency_us_p50"])):
        spread = f"{t['latency_us_p25']:.2f} to {t['latency_us_p75']:.2f}"
        name = t["provider"] if t["kind"] == "dense" else f"{t['provider']} (conditional)"
        rows.append((t["rows"], name, f"{t['latency_us_p50']:.2f}", spread, f"{t['max_abs_error']:.0e}"))
    times = {count: _times_faster(measured, count) for count in measured["rows"]}
    return {
        **{name: measured[name] for name in ("tree", "dense_neurons", "width")},
        "first": times[1],
        "faster": ", ".join(
            f"{found['times']:.0f} times at {count:,} row{'s' * (count > 1)}" for count, found in times.items()
        ),
        "chart": charts.speed(results),
        "rows": rows,
        "left_out": "; ".join(f"{name}: {why}" for name, why in measured["left_out"].items()),
    }


def _times_faster(measured: Found, rows: int) -> Found:
    ours, best = speed_pair(measured, rows)
    us, dense_us = ours["latency_us_p50"], best["latency_us_p50"]
    return {"ours_us": us, "dense_us": dense_us, "provider": best["provider"], "times": dense_us / us}


def _pretraining(results: Found) -> Found:
    summary, variants = results["summary"], results.get("pretrain", {})
    rows = []
    for name, variant in variants.items():
        against = summary["against_dense"].get(name)
        rows.append(
            (
                variant["title"],
                f"{variant['active_neurons']} of {variant['neurons']}",
                f"{variant['flops_per_token'] / 1000:.0f}",
                f"{variant['valid_loss']:.3f}",
                f"{against['difference']:+.3f} ± {against['error']:.3f}" if against else "-",
                gap_words(summary["recovered_gap"].get(name)),
                f"{summary['training_speed'][name]:,.0f}",
            )
        )
    return {
        "curves": charts.curves(results),
        "losses": charts.losses(results) if summary["against_dense"] else None,
        "rows": rows,
        "gaps": [_gap(variants[name]["title"], gap) for name, gap in summary["recovered_gap"].items()],
    }


def _gap(title: str, gap: Found) -> str:
    """The recovered gap of a conditional variant, in words."""
    wide, tree = (f"{gap[key]:.3f} ± {gap[key + '_error']:.3f}" for key in ("gap", "gain"))
    verdict = gap["reason"] if gap["value"] is None else f"recovered gap {gap['value']:.2f}"
    return f"{title}: against the narrow baseline the wide layer gains {wide}, the tree {tree}; {verdict}"


def _authors(results: Found) -> Found:
    pretrain, baselines = results.get("pretrain", {}), results.get("baselines", {})
    variants = results["finetune"]
    rows = [
        (pretrain[name]["title"], percent(variant), f"{variant['macro_f1']:.3f}", f"{variant['seconds']:.0f}")
        for name, variant in variants.items()
    ]
    titles = {"bag_of_words": "bag of words, logistic regression", "majority": "always one author"}
    rows += [(titles[name], percent(found), f"{found['macro_f1']:.3f}", "") for name, found in baselines.items()]
    words = baselines.get("bag_of_words", {"accuracy": 0.0})["accuracy"]
    return {
        "chart": charts.accuracies(results),
        "rows": rows,
        "names": results["data"]["authors"],
        "learn_sentences": results["data"]["learn_sentences"],
        "sentences": next(iter(variants.values()))["sentences"],
        "words_win": words > max(variant["accuracy"] for variant in variants.values()),
    }


def _routing(results: Found) -> list[tuple[str, str]]:
    """A drawing and its caption for every variant that routes."""
    shown = []
    for variant in results["pretrain"].values():
        facts = []
        for number, layer in enumerate(variant["routing"].values(), start=1):
            entropy = sum(layer["entropy_bits"]) / layer["trees"]
            dead, leaves = sum(layer["dead_leaves"]), layer["trees"] * 2 ** layer["depth"]
            facts.append(f"layer {number}: {entropy:.2f} of {layer['depth']} bits, {dead} of {leaves} leaves unused")
        if facts:
            shown.append((charts.routing(variant), f"{variant['title']}. {'; '.join(facts)}."))
    return shown


def _filling(results: Found) -> Found | None:
    variant = results["pretrain"].get("tree")
    if variant is None:
        return None
    filled = variant["fill"]
    decisions = filled["decisions"].values()
    return {
        "sentence": filled["sentence"],
        "masks": [mask["best"] for mask in filled["masks"]],
        "chart": charts.paths(variant),
        "head": ["piece", *(f"layer {number}" for number in range(1, len(decisions) + 1))],
        "rows": [(piece, *(layer[at][0] for layer in decisions)) for at, piece in enumerate(filled["pieces"])],
    }


def _machine(results: Found) -> Found:
    data = results.get("data", {})
    plan = {**results.get("plan", {}), **results.get("plan_finetune", {})}
    rows = [
        (name, ", ".join(value) if isinstance(value, list) else value) for name, value in results["machine"].items()
    ]
    rows += [("seed", results["settings"]["seed"]), ("seconds asked for", results["settings"]["seconds"])]
    rows += [("seconds used", f"{results.get('seconds_used', 0):.0f}")]
    rows += [(f"steps, {name}", plan[name]) for name in ("start", "pretrain", "finetune") if name in plan]
    return {
        "rows": rows,
        "books": [(book["author"], book["title"], book["year"], book["use"]) for book in data.get("books", [])],
        "source": data.get("source", ""),
    }
