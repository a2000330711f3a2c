"""SVG as text: shapes, and one style for light and dark readers.

A drawing has the class `fastff-chart`; its colours are classes (`c0` to `c6`, `ink`, `faint`), never values in the
shapes. Equal data gives equal text.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from html import escape

# Okabe and Ito's colours, which colour-blind readers tell apart, on light paper and, lighter, on dark.
LIGHT = ("#0072b2", "#d55e00", "#00875f", "#b77900", "#2f8fc4", "#b0568a", "#57606a")
DARK = ("#4aa8e0", "#ff8a3d", "#2fc99a", "#f0b429", "#8ccdf5", "#e59cc8", "#9aa4af")
FONT = 12  # pixels
LETTER = 6.6  # pixels of a letter of that size, about
DASHES = {"solid": "", "dashed": "6 4", "dotted": "2 3", "dashdot": "7 3 2 3"}


def _colours(inks: tuple[str, str, str], colours: Sequence[str]) -> str:
    ink, soft, faint = inks
    rules = [
        f".fastff-chart text {{ fill: {ink} }}",
        f".fastff-chart .soft {{ fill: {soft} }}",
        f".fastff-chart .ink {{ stroke: {ink}; fill: {ink} }}",
        f".fastff-chart .faint {{ stroke: {faint}; fill: none }}",
    ]
    for index, colour in enumerate(colours):
        rules.append(f".fastff-chart .c{index} {{ stroke: {colour}; fill: {colour} }}")
    return "\n".join(rules)


STYLE = f"""
.fastff-chart text {{ font: {FONT}px system-ui, sans-serif; stroke: none }}
.fastff-chart .title {{ font-weight: 600 }}
{_colours(("#1f2328", "#57606a", "#d0d7de"), LIGHT)}
.fastff-chart .line {{ fill: none; stroke-width: 1.8 }}
.fastff-chart .thin {{ fill: none; stroke-width: 0.8 }}
.fastff-chart .mark {{ stroke: none }}
@media (prefers-color-scheme: dark) {{
{_colours(("#e6edf3", "#9198a1", "#3d444d"), DARK)}
.fastff-chart .line, .fastff-chart .thin {{ fill: none }}
.fastff-chart .mark {{ stroke: none }}
}}
"""


def drawing(width: float, height: float, shapes: Iterable[str], *, title: str, style: str = "") -> str:
    """A whole drawing. It fills the width that it is given and keeps its proportions."""
    name = escape(title, quote=True)
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" class="fastff-chart" viewBox="0 0 {width:g} {height:g}" '
        f'role="img" aria-label="{name}" style="max-width: {width:g}px">'
    )
    return "\n".join([head, f"<title>{name}</title>", f"<style>{STYLE}{style}</style>", *shapes, "</svg>"]) + "\n"


def text(x: float, y: float, words: str, *, anchor: str = "start", kind: str = "", turned: bool = False) -> str:
    """Words whose baseline is at y. anchor: start, middle or end. turned: read upwards."""
    turn = f' transform="rotate(-90 {x:.1f} {y:.1f})"' if turned else ""
    named = f' class="{kind}"' if kind else ""
    return f'<text{named} x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"{turn}>{escape(words)}</text>'


def line(x1: float, y1: float, x2: float, y2: float, kind: str = "faint", dashes: str = "solid") -> str:
    """A straight line."""
    dashed = f' stroke-dasharray="{DASHES[dashes]}"' if DASHES[dashes] else ""
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"{dashed}/>'


def polyline(points: Iterable[tuple[float, float]], kind: str, dashes: str = "solid") -> str:
    """Points joined by a line."""
    dashed = f' stroke-dasharray="{DASHES[dashes]}"' if DASHES[dashes] else ""
    places = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
    return f'<polyline class="line {kind}" points="{places}"{dashed}/>'


def rect(x: float, y: float, width: float, height: float, kind: str) -> str:
    """A filled rectangle."""
    return f'<rect class="mark {kind}" x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"/>'


# Corners of a mark around its centre, in pixels; a circle has none.
_CORNERS: dict[str, tuple[tuple[float, float], ...]] = {
    "square": ((-3.6, -3.6), (3.6, -3.6), (3.6, 3.6), (-3.6, 3.6)),
    "triangle": ((0, -4.6), (4.4, 3.4), (-4.4, 3.4)),
    "diamond": ((0, -5), (5, 0), (0, 5), (-5, 0)),
    "cross": tuple(
        (x * 1.2, y * 1.2)
        for x, y in (
            (-4, -2), (-2, -4), (0, -2), (2, -4), (4, -2), (2, 0), (4, 2), (2, 4), (0, 2), (-2, 4), (-4, 2), (-2, 0),
        )
    ),
}  # fmt: skip
MARKS = ("circle", *_CORNERS)


def mark(shape: str, x: float, y: float, kind: str) -> str:
    """A point of a series, told apart by shape as well as by colour. shape: one of MARKS."""
    if shape == "circle":
        return f'<circle class="mark {kind}" cx="{x:.1f}" cy="{y:.1f}" r="4"/>'
    places = " ".join(f"{x + dx:.1f},{y + dy:.1f}" for dx, dy in _CORNERS[shape])
    return f'<polygon class="mark {kind}" points="{places}"/>'
