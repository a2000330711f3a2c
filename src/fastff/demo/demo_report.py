"""`index.html`, made from `results.json` alone: one file that loads nothing and reads on a phone and in the dark."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from fastff.demo import charts
from fastff.demo.store import write_atomic
from fastff.demo.summary import missing_parts
from fastff.demo.terminal import gap_words, percent, speed_pair

Section = Callable[[dict[str, Any]], str]


def write_report(out: Path, results: dict[str, Any]) -> Path:
    """Write the page; returns its path. Parts that a run did not reach are left out and named. Raises DemoError."""
    path = out / "index.html"
    write_atomic(path, render(results).encode())
    return path


def render(results: dict[str, Any]) -> str:
    """The page for the results of a run, finished or not."""
    sections: tuple[tuple[str, Section], ...] = (
        ("speed", speed),
        ("start", pretraining),
        ("finetune", authors),
        ("pretrain", routing),
        ("pretrain", filling),
        ("machine", machine),
    )
    body = [section(results) for needed, section in sections if results.get(needed)]
    missing = missing_parts(results)
    notice = (
        f'<p class="notice">This run was stopped early. Missing: {escape(", ".join(missing))}.</p>' if missing else ""
    )
    page = Template((resources.files("fastff.demo") / "page.html").read_text(encoding="utf-8"))
    return page.substitute(notice=notice, headline=headline(results), body="\n".join(body))


def headline(results: dict[str, Any]) -> str:
    """Speed and quality in two sentences, whatever they turned out to be."""
    sentences = []
    if "speed" in results:
        measured = results["speed"]
        ours, best = speed_pair(measured, 1)
        sentences.append(
            f"On this machine one conditional layer ({escape(measured['tree'])}, 12 of 4095 neurons a token) took "
            f"{ours['latency_us_p50']:.1f} µs for one row; the fastest dense layer of {measured['dense_neurons']} "
            f"neurons ({escape(best['provider'])}) took {best['latency_us_p50']:,.0f} µs: "
            f"<strong>{best['latency_us_p50'] / ours['latency_us_p50']:.0f} times</strong> as long."
        )
    against = results.get("summary", {}).get("against_dense", {}).get("tree")
    if against:
        trained = results["start"]["tokens"] + results["pretrain"]["tree"]["tokens"]
        better = "lower" if against["difference"] < 0 else "higher"
        sure = "" if abs(against["difference"]) > 2 * against["error"] else ", which is within the error of measurement"
        sentences.append(
            f"After {trained / 1000:,.0f} thousand tokens, the small model with such trees has a loss on unseen books "
            f"<strong>{abs(against['difference']):.3f} nats {better}</strong> than its dense twin{sure}. "
            "Read it beside the baselines below: with so little training, a feedforward layer matters little."
        )
    found = results.get("summary", {}).get("recovered_gap", {}).values()
    if found and all(gap["value"] is None for gap in found):
        sentences.append(
            "In this run the wide dense layer is not clearly better than the narrow ones, "
            "so the run cannot tell how much quality the trees keep."
        )
    return "".join(f"<p>{sentence}</p>" for sentence in sentences)


def table(head: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """An HTML table; cells are escaped."""
    first = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    rest = "".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{first}</tr></thead><tbody>{rest}</tbody></table></div>'


def figure(svg: str, caption: str) -> str:
    return f"<figure>{svg}<figcaption>{caption}</figcaption></figure>"


def speed(results: dict[str, Any]) -> str:
    measured = results["speed"]
    rows = []
    for t in sorted(measured["timings"], key=lambda t: (t["rows"], t["latency_us_p50"])):
        spread = f"{t['latency_us_p25']:.2f} to {t['latency_us_p75']:.2f}"
        name = t["provider"] if t["kind"] == "dense" else f"{t['provider']} (conditional)"
        rows.append((str(t["rows"]), name, f"{t['latency_us_p50']:.2f}", spread, f"{t['max_abs_error']:.0e}"))
    left_out = "; ".join(f"{name}: {why}" for name, why in measured["left_out"].items())
    faster = ", ".join(
        f"{best['latency_us_p50'] / ours['latency_us_p50']:.0f} times at {count:,} row{'s' * (count > 1)}"
        for count in measured["rows"]
        for ours, best in [speed_pair(measured, count)]
    )
    return f"""<section><h2>Speed of one layer</h2>
{
        figure(
            charts.speed(results),
            "fastff against the fastest dense provider; lines span the quartiles.",
        )
    }
<p>Faster than the fastest dense layer of the same run: {faster}. Width {measured["width"]}, fp32, one thread, one layer
whose weights stay in the caches, inputs that rotate. Every output was compared with a float64 reference before timing;
providers took turns. This is the layer alone: attention does not get faster, so a whole model gains less.</p>
<details><summary>All providers</summary>{
        table(("rows", "provider", "µs a row, median", "quartiles", "largest error"), rows)
    }{f"<p>Left out: {escape(left_out)}.</p>" if left_out else ""}</details></section>"""


def pretraining(results: dict[str, Any]) -> str:
    variants = results.get("pretrain", {})
    summary = results["summary"]
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
    head = (
        "feedforward",
        "active of stored",
        "kFLOP a token, layer",
        "unseen loss",
        "against dense",
        "recovered gap",
        "tokens/s",
    )
    difference = (
        figure(charts.losses(results), "Unseen books; bars are two standard errors.")
        if summary["against_dense"]
        else ""
    )
    return f"""<section><h2>Pretraining: guess masked pieces of words</h2>
{figure(charts.curves(results), "Mean of about twenty steps. After the line, each variant goes on from one start.")}
{difference}{table(head, rows) if rows else ""}
<p>All variants begin as one model without feedforward, trained on growing windows; each then gets its own feedforward,
which at first adds nothing, and sees the same tokens in the same order with the same masks. Loss: mean cross-entropy in
nats over the masked quarter of the pieces, on the beginnings of novels that no variant has seen. The error is that of
the paired difference over windows; it does not include the luck of the seed.</p>
{gaps(results)}</section>"""


def gaps(results: dict[str, Any]) -> str:
    """The recovered gap of every conditional variant, in words."""
    variants, items = results.get("pretrain", {}), []
    for name, gap in results["summary"]["recovered_gap"].items():
        wide, tree = (f"{gap[key]:.3f} ± {gap[key + '_error']:.3f}" for key in ("gap", "gain"))
        measured = f"against the narrow baseline the wide layer gains {wide}, the tree {tree}"
        verdict = gap["reason"] if gap["value"] is None else f"recovered gap {gap['value']:.2f}"
        items.append(f"<li>{escape(variants[name]['title'])}: {escape(measured)}; {escape(verdict)}.</li>")
    if not items:
        return ""
    return f"""<p>The baseline that counts is a dense layer so narrow that it does the same arithmetic, routing
included. The <em>recovered gap</em> is (narrow - tree) / (narrow - wide): 0, the tree is worth nothing; 1, it is as
good as the full width. All dense layers here use GELU.</p><ul>{"".join(items)}</ul>"""


def authors(results: dict[str, Any]) -> str:
    names = results["data"]["authors"]
    pretrain, baselines = results.get("pretrain", {}), results.get("baselines", {})
    rows = [
        (pretrain[name]["title"], percent(variant), f"{variant['macro_f1']:.3f}", f"{variant['seconds']:.0f}")
        for name, variant in results["finetune"].items()
    ]
    titles = {"bag_of_words": "bag of words, logistic regression", "majority": "always one author"}
    rows += [(titles[name], percent(variant), f"{variant['macro_f1']:.3f}", "") for name, variant in baselines.items()]
    variants = results["finetune"].values()
    count = next(iter(variants))["sentences"]
    words = baselines.get("bag_of_words", {"accuracy": 0.0})["accuracy"]
    ahead = (
        " Counting words beats every network here." if words > max(variant["accuracy"] for variant in variants) else ""
    )
    return f"""<section><h2>Fine-tuning: who wrote this sentence?</h2>
{figure(charts.accuracies(results), "Unseen books; bars are two standard errors.")}
{table(("model", "accuracy", "macro F1", "training, s"), rows)}
<p>{count:,} sentences from one novel each, which no model has seen, of {escape(", ".join(names))}.
The models learn from {results["data"]["learn_sentences"]:,} sentences of two other novels of each. Attention carries
much of this task: look at the model without feedforward, and at the bag of words, which no network helped.{ahead}</p>
</section>"""


def routing(results: dict[str, Any]) -> str:
    parts = []
    for variant in results["pretrain"].values():
        if not variant["routing"]:
            continue
        facts = []
        for number, layer in enumerate(variant["routing"].values(), start=1):
            entropy = sum(layer["entropy_bits"]) / layer["trees"]
            dead, leaves = sum(layer["dead_leaves"]), layer["trees"] * 2 ** layer["depth"]
            facts.append(f"layer {number}: {entropy:.2f} of {layer['depth']} bits, {dead} of {leaves} leaves unused")
        parts.append(figure(charts.routing(variant), f"{escape(variant['title'])}. {'; '.join(facts)}."))
    if not parts:
        return ""
    return f"""<section><h2>Where tokens go</h2>{"".join(parts)}
<p>A box is a node, the root on top, its two children below it. Every token takes one way down, right where its score is
positive. Colours say how many tokens of unseen text came by, relative to a tree that is used evenly.</p></section>"""


def filling(results: dict[str, Any]) -> str:
    variant = results["pretrain"].get("tree")
    if variant is None:
        return ""
    filled = variant["fill"]
    guesses = "".join(
        "<li>" + ", ".join(f"<b>{escape(piece)}</b> {100 * chance:.0f} %" for piece, chance in mask["best"]) + "</li>"
        for mask in filled["masks"]
    )
    head = ["piece", *(f"layer {number}" for number in range(1, len(filled["decisions"]) + 1))]
    rows = [
        (piece, *(filled["decisions"][name][at][0] for name in filled["decisions"]))
        for at, piece in enumerate(filled["pieces"])
    ]
    return f"""<section><h2>One sentence through the tree</h2>
<p class="sentence">{escape(filled["sentence"])}</p><ol>{guesses}</ol>
{figure(charts.paths(variant), "Paths of the pieces; thick: the masks. Behind them, how often nodes are used.")}
<details><summary>Every piece's decisions</summary>{table(head, rows)}</details></section>"""


def machine(results: dict[str, Any]) -> str:
    found, data = results["machine"], results.get("data", {})
    plan = {**results.get("plan", {}), **results.get("plan_finetune", {})}
    rows = [(name, ", ".join(value) if isinstance(value, list) else str(value)) for name, value in found.items()]
    rows += [("seed", str(results["settings"]["seed"])), ("seconds asked for", str(results["settings"]["seconds"]))]
    rows += [("seconds used", f"{results.get('seconds_used', 0):.0f}")]
    rows += [(f"steps, {name}", str(plan[name])) for name in ("start", "pretrain", "finetune") if name in plan]
    books = [(b["author"], b["title"], str(b["year"]), b["use"]) for b in data.get("books", [])]
    source = escape(data.get("source", ""))
    return f"""<section><h2>This run</h2>{table(("", ""), rows)}
<details><summary>The novels</summary>{table(("author", "title", "year", "use"), books)}
<p>Public domain; from {source}.</p></details></section>"""
