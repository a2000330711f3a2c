"""Draw one token's path through a tree of neurons: `python -m tools.path_picture` writes docs/images/path.svg.

The colours follow the reader's light or dark setting.
"""

from __future__ import annotations

from pathlib import Path

OUT = Path(__file__).resolve().parents[1] / "docs" / "images" / "path.svg"
DEPTH = 4
DECISIONS = (1, 0, 1, 1)  # of the token that is drawn: 1 is right
WIDTH, TOP, LEVEL = 720, 58, 52
STYLE = """
text { font: 13px system-ui, sans-serif; fill: #57606a }
.strong { fill: #1f2328; font-weight: 600 }
.edge { stroke: #d0d7de; stroke-width: 1.5 }
.node, .leaf { fill: #eaeef2; stroke: #c4ccd4 }
.edge.used { stroke: #0969da; stroke-width: 3 }
.used { fill: #0969da; stroke: #0969da }
.said { fill: #0969da; font-weight: 600 }
@media (prefers-color-scheme: dark) {
  text { fill: #9198a1 }
  .strong { fill: #f0f6fc }
  .edge { stroke: #3d444d }
  .node, .leaf { fill: #262c36; stroke: #3d444d }
  .edge.used { stroke: #4493f8 }
  .used { fill: #4493f8; stroke: #4493f8 }
  .said { fill: #4493f8 }
}
"""


def place(level: int, index: int) -> tuple[float, float]:
    """Centre of a node, or of a leaf at the last level."""
    return WIDTH * (index + 0.5) / 2**level, TOP + LEVEL * level


def path() -> list[int]:
    """Index within its level of every node on the path, and of the leaf."""
    found = [0]
    for decision in DECISIONS:
        found.append(2 * found[-1] + decision)
    return found


def edges(used: bool) -> list[str]:
    lines, taken = [], path()
    for level in range(DEPTH):
        for index in range(2 ** (level + 1)):
            if (taken[level + 1] == index) == used:
                (x1, y1), (x2, y2) = place(level, index // 2), place(level + 1, index)
                kind = "edge used" if used else "edge"
                lines.append(f'<line class="{kind}" x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}"/>')
    return lines


def shapes() -> list[str]:
    """Nodes as circles, leaves as bars of four neurons."""
    lines, taken = [], path()
    for level in range(DEPTH + 1):
        for index in range(2**level):
            x, y = place(level, index)
            used = " used" if taken[level] == index else ""
            if level < DEPTH:
                lines.append(f'<circle class="node{used}" cx="{x:g}" cy="{y:g}" r="9"/>')
            else:
                parts = (f'<rect class="leaf{used}" x="{x - 16 + 8 * k:g}" y="{y - 2:g}" ' for k in range(4))
                lines += [f'{part}width="7" height="20" rx="1"/>' for part in parts]
    return lines


def labels() -> list[str]:
    """What the picture says: the input, the rule, the output, the cost."""
    x, y = place(0, 0)
    right, leaf = place(1, 1), place(DEPTH, path()[-1])
    return [
        f'<text class="strong" x="{x:g}" y="26" text-anchor="middle">one token</text>',
        f'<text class="said" x="{(x + right[0]) / 2 + 12:g}" y="{y + 16:g}">score above zero: right</text>',
        f'<text x="{(x + place(1, 0)[0]) / 2 - 12:g}" y="{y + 16:g}" text-anchor="end">otherwise: left</text>',
        f'<text class="said" x="{leaf[0]:g}" y="{leaf[1] + 40:g}" text-anchor="middle">this leaf answers</text>',
        f'<text x="8" y="{leaf[1] + 64:g}">The tree stores 15 decisions and 64 neurons; the token uses 4 and 4.</text>',
    ]


def picture() -> str:
    height = TOP + LEVEL * DEPTH + 80
    title = "A token takes one path through a binary tree of neurons: four decisions, then one leaf of four neurons"
    body = "\n".join([*edges(False), *edges(True), *shapes(), *labels()])
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{title}">'
    return f"{head}\n<title>{title}</title>\n<style>{STYLE}</style>\n{body}\n</svg>\n"


if __name__ == "__main__":
    OUT.write_text(picture())
