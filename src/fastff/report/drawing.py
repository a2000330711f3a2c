"""Drawings as SVG text. Equal data gives equal text: words stay words, ids come from a name, no date is written."""

from __future__ import annotations

import io
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

STYLE: dict[str, Any] = {
    "font.size": 11,
    "font.family": "sans-serif",
    "svg.fonttype": "none",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#dddddd",
    "grid.linewidth": 0.5,
    "legend.frameon": False,
}


@contextmanager
def svg(name: str, width: float, height: float, style: Mapping[str, Any] = {}) -> Iterator[tuple[Figure, list[str]]]:
    """A figure of so many inches, and a list that holds its SVG when the block ends.

    style: settings of matplotlib, in addition to STYLE.
    """
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    out: list[str] = []
    settings: Any = {**STYLE, **style, "svg.hashsalt": name}  # Any: matplotlib's stubs list every name
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(width, height), layout="constrained")
        FigureCanvasSVG(figure)
        yield figure, out
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    written = buffer.getvalue()
    out.append(written[written.index("<svg") :])
