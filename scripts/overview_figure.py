"""The picture of the README: a convolutional recurrent network unrolled over time, as SVG.

python scripts/overview_figure.py docs/overview.svg
"""

from __future__ import annotations

import sys
from pathlib import Path

AREAS = ("image", "V1", "V4", "IT", "readout")
STEPS = 4
COLUMN, ROW, LEFT, TOP, BOX_WIDTH, BOX_HEIGHT = 170, 74, 110, 56, 84, 34
COLOURS = {"bottom-up": "#1f6f8b", "lateral": "#c2571a", "top-down": "#6a3d9a"}


def centre(step: int, area: int) -> tuple[int, int]:
    """Of the box of an area at a time step; the image is lowest."""
    return LEFT + step * COLUMN + BOX_WIDTH // 2, TOP + (len(AREAS) - 1 - area) * ROW + BOX_HEIGHT // 2


def arrow(begin: tuple[float, float], end: tuple[float, float], kind: str) -> str:
    """A straight connection."""
    (x1, y1), (x2, y2) = begin, end
    return f'<line x1="{x1:g}" y1="{y1:g}" x2="{x2:g}" y2="{y2:g}" stroke="{COLOURS[kind]}" stroke-width="2" marker-end="url(#{kind})"/>'


def picture() -> str:
    """The SVG."""
    width, height = LEFT + (STEPS - 1) * COLUMN + BOX_WIDTH + 30, TOP + len(AREAS) * ROW + 16
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="14">',
        "<title>Areas of a convolutional recurrent network at four time steps, with bottom-up, lateral and top-down connections</title>",
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        "<defs>",
    ]
    lines += [
        f'<marker id="{kind}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="6" markerHeight="6" orient="auto">'
        f'<path d="M0 0 L8 4 L0 8 z" fill="{colour}"/></marker>'
        for kind, colour in COLOURS.items()
    ]
    lines.append("</defs>")
    half_width, half_height = BOX_WIDTH / 2, BOX_HEIGHT / 2
    for step in range(STEPS):
        lines.append(f'<text x="{centre(step, 0)[0]}" y="{TOP - 20}" text-anchor="middle" fill="#555555">t = {step}</text>')
        for area, name in enumerate(AREAS):
            x, y = centre(step, area)
            if area:
                below = centre(step, area - 1)
                lines.append(arrow((below[0], below[1] - half_height), (x, y + half_height + 2), "bottom-up"))
            recurrent = 0 < area < len(AREAS) - 1
            if recurrent and step + 1 < STEPS:
                later = centre(step + 1, area)
                lines.append(arrow((x + half_width, y), (later[0] - half_width - 2, y), "lateral"))
                if area > 1:
                    lower = centre(step + 1, area - 1)
                    lines.append(arrow((x + half_width, y + 8), (lower[0] - half_width - 2, lower[1] - 8), "top-down"))
            fill = "#e8f1f4" if recurrent else "#f4f4f4"
            box = f'x="{x - half_width:g}" y="{y - half_height:g}" width="{BOX_WIDTH}" height="{BOX_HEIGHT}" rx="5"'
            lines.append(f'<rect {box} fill="{fill}" stroke="#333333"/>')
            lines.append(f'<text x="{x}" y="{y + 5}" text-anchor="middle" fill="#111111">{name}</text>')
    for index, (kind, colour) in enumerate(COLOURS.items()):
        lines.append(f'<text x="{LEFT + index * COLUMN}" y="{height - 14}" fill="{colour}">{kind}</text>')
    return "\n".join([*lines, "</svg>"]) + "\n"


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(picture(), encoding="utf-8")
