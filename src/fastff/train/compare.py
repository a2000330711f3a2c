"""What several runs of pretraining say about their feedforwards: losses, costs and the recovered gap.

The recovered gap of a tree is (narrow - tree) / (narrow - wide): 0, it is worth no more than a dense layer with its
arithmetic, routing included; 1, it is as good as the full width. Wide and narrow are dense swiglu layers, the better
kind.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from fastff.report.axis import Axis, si
from fastff.report.chart import Panel, Series
from fastff.report.chart import chart as draw
from fastff.report.markdown import markdown_table

WIDE, TREE = "dense-swiglu", "tree"  # kinds of feedforwards
MARKS = {"trees": "square", "experts": "diamond", "product keys": "cross"}  # of what `by_router` gives
NEARLY = 1.1  # so much more arithmetic may a narrow layer have, where none has less: that understates the gap

# The axis of charts that compare layers.
ARITHMETIC = Axis("FLOP a token and layer, routing included", log=True, format=si, margin=0.15)


def variant_of(record: dict[str, Any]) -> str:
    """The variant that a record is of; earlier versions called it an arm."""
    name: str = record["variant"] if "variant" in record else record["arm"]
    return name


def kind_of(entry: dict[str, Any]) -> str:
    """The kind of an entry's feedforward, see `fastff.train.presets.Cost`; earlier versions wrote only the name of the
    layer, which begins with the kind unless it is a tree's."""
    if "kind" in entry:
        return str(entry["kind"])
    name = str(entry["layer"]).partition(" ")[0]
    return name if name == "none" or name.startswith("dense-") else TREE


def by_router(entries: Iterable[dict[str, Any]]) -> dict[str, list[dict[str, Any]]]:
    """The entries with a router by what a legend calls them, in one order; kinds without an entry are left out."""
    found: dict[str, list[dict[str, Any]]] = {"trees": [], "experts": [], "product keys": []}
    for entry in entries:
        if kind_of(entry) == TREE:
            family = str(entry["layer"]).partition("-")[0]
            found[{"flat": "experts", "pk": "product keys"}.get(family, "trees")].append(entry)
    return {name: those for name, those in found.items() if those}


def recovered_gap(narrow: float, tree: float, wide: float) -> float | None:
    """The recovered gap of three losses, None if the wide layer is no better than the narrow one."""
    return (narrow - tree) / (narrow - wide) if wide < narrow else None


def compare(records: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """One entry a variant from records of finished runs, group by group, most arithmetic first.

    records: those of `fastff.train.pretrain`, and "variant" and "group" beside. A loss is the mean over a variant's
    seeds, with each seed's beside it in losses; recovered_gap is made of the means, gaps of each seed by itself.
    """
    runs: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for record in records:
        runs.setdefault((record["group"], variant_of(record)), []).append(record)
    found = []
    for (group, name), of in runs.items():
        losses = {str(run["settings"]["seed"]): run["valid_loss"] for run in of}
        entry = {**of[0]["cost"], "name": name, "group": group, "loss": statistics.fmean(losses.values())}
        found.append({**entry, "losses": losses, "tokens": of[0]["tokens"]})
    set_gaps(found)
    for entry in found:
        gaps = {seed: gap_of(entry, found, seed) for seed in entry["losses"]}
        entry["gaps"] = {seed: gap for seed, gap in gaps.items() if gap is not None}
    return sorted(found, key=lambda entry: (entry["group"], -entry["flops"]))


def at_step(records: Sequence[dict[str, Any]], step: int) -> list[dict[str, Any]]:
    """Records of the runs that logged a loss at `step`, as if they had ended there: with that training loss, a mean
    since the line before, for the held-out one. While no text is read twice, it is a loss on unseen text, too."""
    reached = [(record, dict(record["curve"]).get(step)) for record in records]
    return [{**record, "valid_loss": loss} for record, loss in reached if loss is not None]


def set_gaps(entries: Sequence[dict[str, Any]]) -> None:
    """Give every entry its recovered_gap, see `gap_of`. entries: group, layer, flops and losses (by seed), lower being
    better."""
    for entry in entries:
        entry["recovered_gap"] = gap_of(entry, entries)


def gap_of(entry: dict[str, Any], entries: Sequence[dict[str, Any]], seed: str | None = None) -> float | None:
    """The recovered gap of a tree whose group has a wide layer and narrow ones around it, None for all others.

    It is made of means over the tree's seeds, or of this one `seed`; of a dense layer those count that it has, too. The
    narrow layer that a tree is compared with is read off the dense swiglu layers of its group, see `loss_at`.
    """

    def loss(of: dict[str, Any]) -> float | None:
        found = [of["losses"][one] for one in (entry["losses"] if seed is None else [seed]) if one in of["losses"]]
        return statistics.fmean(found) if found else None

    mine = loss(entry)
    if mine is None or kind_of(entry) != TREE:
        return None
    wide = [other for other in entries if other["group"] == entry["group"] and kind_of(other) == WIDE]
    dense = {other["flops"]: found for other in wide if (found := loss(other)) is not None}
    narrow = loss_at(entry["flops"], dense)
    return None if narrow is None else recovered_gap(narrow, mine, dense[max(dense)])


def loss_at(cost: float, dense: Mapping[float, float]) -> float | None:
    """Loss of a dense layer of such a cost (arithmetic or time), in a straight line over its logarithm between the two
    of `dense` (loss by cost) around it; of the least one if that is nearly so small; None outside of them."""
    below, above = ([c for c in dense if c <= cost], [c for c in dense if c >= cost])
    if not above:
        return None
    if not below:
        return dense[min(above)] if min(above) <= NEARLY * cost else None
    low, high = max(below), min(above)
    if low == high:
        return dense[low]
    share = math.log(cost / low) / math.log(high / low)
    return dense[low] + share * (dense[high] - dense[low])


def table(entries: Sequence[dict[str, Any]]) -> str:
    """The entries as a Markdown table."""
    head = [
        "feedforward",
        "layer",
        "active / stored neurons",
        "FLOP a token and layer",
        "held-out loss",
        "recovered gap",
    ]
    rows = []
    for entry in entries:
        gap = "" if entry["recovered_gap"] is None else f"{entry['recovered_gap']:.2f}{_spread(entry['gaps'], 2)}"
        neurons = f"{entry['active_neurons']} / {entry['neurons']}"
        rows.append([entry["name"], entry["layer"], neurons, f"{entry['flops']:,}", losses_of(entry), gap])
    return markdown_table(head, rows)


def losses_of(entry: dict[str, Any]) -> str:
    """The mean loss of an entry, and the least and the greatest of several seeds."""
    return f"{entry['loss']:.3f}{_spread(entry['losses'], 3)}"


def _spread(by_seed: dict[str, float], digits: int) -> str:
    """The least and the greatest of several seeds, in brackets."""
    values = by_seed.values()
    return f" ({min(values):.{digits}f} to {max(values):.{digits}f})" if len(values) > 1 else ""


def routing_table(records: Sequence[dict[str, Any]]) -> str:
    """Where the rows of the last logged steps went, means over layers and seeds, as a Markdown table; trees only."""
    of: dict[str, list[dict[str, Any]]] = {}
    for record in records:
        of.setdefault(variant_of(record), []).extend(record["routing"].values())
    rows = []
    for variant, layers in of.items():
        if not layers:
            continue
        bits, most, dead, sided = (
            statistics.fmean(layer[key] for layer in layers if layer[key] is not None)
            for key in ("leaf_entropy_bits", "most_bits", "dead_leaves", "one_sided_nodes")
        )
        rows.append([variant, f"{bits:.2f} ({most:g})", f"{100 * dead:.0f} %", f"{100 * sided:.0f} %"])
    return markdown_table(["feedforward", "leaf entropy, bits (at most)", "dead leaves", "one-sided nodes"], rows)


def left_out(
    variants: Sequence[str], records: Sequence[dict[str, Any]], seeds: Sequence[int] | None = None
) -> list[str]:
    """A line for every variant of a plan, and every seed if there are several, that is not finished; without seeds, for
    every variant of which no seed is."""
    found = {(variant_of(record), record["settings"]["seed"]): record for record in records}
    if seeds is None:
        done = {
            variant: seed for (variant, seed), record in sorted(found.items(), key=lambda item: item[1]["finished"])
        }
        asked = [(variant, done.get(variant, 0)) for variant in variants]
    else:
        asked = list(itertools.product(variants, seeds))
    lines = []
    for variant, seed in asked:
        name = variant if seeds is None or len(seeds) == 1 else f"{variant}, seed {seed}"
        if (variant, seed) not in found:
            lines.append(f"not run: {name}")
        elif not (record := found[variant, seed])["finished"]:
            of = f"step {record['steps']} of {record['settings']['steps']}"
            lines.append(f"unfinished: {name}, {of}, held-out loss {record['valid_loss']:.4f}")
    return lines


def chart(entries: Sequence[dict[str, Any]]) -> str:
    """Held-out loss against the arithmetic of a layer, as SVG text; dense layers are joined by a line."""
    dense = [e for e in entries if kind_of(e) == WIDE]
    others = [e for e in entries if kind_of(e) not in (WIDE, TREE) and e["flops"]]
    looks = (
        ("dense swiglu", dense, "circle", "solid"),
        *((name, those, MARKS[name], "") for name, those in by_router(entries).items()),
        ("dense gelu", others, "triangle", ""),
    )
    series = [
        Series(name, [(e["flops"], e["loss"]) for e in points], color, mark, line, labels=[e["name"] for e in points])
        for color, (name, points, mark, line) in enumerate(looks)
        if points
    ]
    levels = [(e["loss"], "no feedforward") for e in entries if not e["flops"]]
    panel = Panel(series, ARITHMETIC, Axis("held-out loss, nats a token"), levels=levels)
    return draw([panel], title="Held-out loss against the arithmetic of a layer")
