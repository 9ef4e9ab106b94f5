"""Stacks of a sampling profiler as a picture without scripts: `python flame.py STACKS FIGURE.svg`.

STACKS: a line a stack, outermost first, parts separated by semicolons, then a space and how often it was seen; as
`py-spy record --format raw` writes it (`pip install py-spy`; nothing of the service needs it).
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from html import escape
from pathlib import Path
from typing import NamedTuple

WIDTH, ROW = 1200, 17
LEAST_SHARE = 0.004
CHARACTER = 6.6
COLOURS = (("moe_forward", "#f4a259"), ("uvicorn", "#8cb369"), ("prometheus_client", "#5b8e7d"), ("logging", "#bc4b51"))


class Box(NamedTuple):
    """A function at a depth: where it starts and how much there is of it, as shares of all samples."""

    name: str
    depth: int
    start: float
    share: float


def boxes(stacks: Iterable[str]) -> list[Box]:
    """Merge equal beginnings of stacks; functions by name, whatever their line."""
    root: dict[str, list] = {}  # type: ignore[type-arg]  # name -> [samples, children of the same kind]
    total = 0
    for line in stacks:
        stack, _, count = line.rpartition(" ")
        total += int(count)
        level = root
        for part in stack.split(";"):
            entry = level.setdefault(part.rsplit(":", 1)[0].rstrip(" ("), [0, {}])
            entry[0] += int(count)
            level = entry[1]
    return list(_walk(root, 0, 0.0, max(total, 1)))


def _walk(level: dict[str, list], depth: int, start: float, total: int) -> Iterator[Box]:  # type: ignore[type-arg]
    for name, (count, below) in sorted(level.items(), key=lambda item: -item[1][0]):
        share = count / total
        if share >= LEAST_SHARE:
            yield Box(name, depth, start, share)
            yield from _walk(below, depth + 1, start, total)
        start += share


def picture(found: list[Box]) -> str:
    """Return the boxes as SVG, the outermost functions at the top."""
    height = ROW * (1 + max((box.depth for box in found), default=0))
    head = f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="monospace"'
    lines = [f'{head} font-size="11"><rect width="100%" height="100%" fill="white"/>']
    for box in found:
        x, y, width = WIDTH * box.start, ROW * box.depth, WIDTH * box.share
        colour = next((colour for mark, colour in COLOURS if mark in box.name), "#d9d9d9")
        room = int((width - 4) / CHARACTER)
        text = box.name if len(box.name) <= room else box.name[: room - 1]
        shown = f'<text x="{x + 2:.1f}" y="{y + 12}">{escape(text)}</text>' if room > 3 else ""
        title = f"<title>{escape(box.name)}: {100 * box.share:.1f} %</title>"
        shape = f'<rect x="{x:.1f}" y="{y}" width="{max(width - 0.5, 0.5):.1f}" height="{ROW - 1}" fill="{colour}"/>'
        lines.append(f"<g>{title}{shape}{shown}</g>")
    return "\n".join([*lines, "</svg>", ""])


if __name__ == "__main__":
    Path(sys.argv[2]).write_text(picture(boxes(Path(sys.argv[1]).read_text().splitlines())))
