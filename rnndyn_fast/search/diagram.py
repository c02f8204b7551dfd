"""A network drawn as SVG: maps one below the other, what passes between them within a time step on the left, from the step before on
the right."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from rnndyn_fast.graph.spec.network import Area, Connection, Network, Norm, Operator, Pool

WIDTH = 400  # of the drawing, at least; it scales to the page, and its text can be read on a phone
_BOX, _STEP, _FIRST = (184, 36), 60, 8  # width and height of a box, distance of the next one, of the first from the top
_LANE, _LEFT = 26, 0  # between arcs; left edge of the boxes
_FONT, _LETTER, _LINE = 11, 6.4, 12  # size of letters, their usual width, height of a line
_INK, _FAINT, _LATER = "#222", "#888", "#0072B2"


@dataclass(frozen=True)
class Arc:
    """Connections between two maps, drawn as one line: positions in the column, whether they read the step before, and what they are."""

    source: int
    target: int
    later: bool
    label: str

    @property
    def span(self) -> tuple[int, int]:
        """The positions that it passes, upper first."""
        return min(self.source, self.target), max(self.source, self.target)


def arcs(network: Network) -> tuple[list[str], list[Arc]]:
    """Names of the maps from the image to the readout, and the lines between them."""
    names = [*(one.name for one in network.inputs), *(area.name for area in network.areas)]
    joined: dict[tuple[str, str, bool], list[str]] = {}
    for c in network.connections:
        joined.setdefault((c.source, c.target, network.delay(c) > 0), []).append(_label(network, c))
    found = [
        Arc(names.index(source), names.index(target), later, ", ".join(dict.fromkeys(label for label in labels if label)))
        for (source, target, later), labels in joined.items()
    ]
    return names, found


def _label(network: Network, c: Connection) -> str:
    """A connection in a few letters: its port unless that goes without saying, its kernel, what is done to the map before."""
    area = network.area(c.target)
    port = network.port(c)
    said = "" if port == "drive" else port
    kernel = ""
    if c.operator is not Operator.IDENTITY:
        height, width = network.window(c).kernel
        kernel = f"{height}\u00d7{width}"
        if c.middle_channels is not None:
            kernel += " sep"
        if c.operator is Operator.CONV_TRANSPOSE:
            kernel += "\u1d40"
    pool = {Pool.MAX: "max", Pool.MAX_SAME: "max", Pool.MEAN: "mean"}.get(c.pool, "")
    if area.cell is None and port == "modulator":
        said = "\u00d7"
    return " ".join(part for part in (said, pool, kernel) if part)


def _kind(area: Area) -> str:
    """What an area does with what enters it."""
    if area.cell is not None:
        return area.cell.kind.replace("_", " ")
    activation = "relu" if area.activation is None else area.activation.value
    norm = (Norm.LAYER if area.norm is None else area.norm).value
    parts = [f"{norm} norm" if norm != "none" else "", activation if activation != "identity" else ""]
    return ", ".join(part for part in parts if part) or "sum"


def lanes(found: Sequence[Arc]) -> dict[Arc, int]:
    """A lane for each line, so that no two that overlap share one: short ones are next to the boxes."""
    taken: dict[Arc, int] = {}
    for arc in sorted(found, key=lambda one: (one.span[1] - one.span[0], one.span)):
        first, last = arc.span
        clash = {lane for other, lane in taken.items() if other.later == arc.later and other.span[0] <= last and first <= other.span[1]}
        taken[arc] = next(lane for lane in range(len(clash) + 1) if lane not in clash)
    return taken


def network_svg(network: Network, prefix: str = "") -> str:
    """The network as SVG, at least 400 units wide: a box per map with its channels, height and width.

    Solid lines are read within the time step (straight between neighbours, else on the left), dashed ones, on the right, at the step
    before. Labels: the port of a cell that is entered, pooling, kernel; ``sep`` is depthwise separable, a raised T transposed.
    `prefix` stands before the ids, of which a page may have each once.
    """
    names, found = arcs(network)
    straight = [arc for arc in found if not arc.later and arc.target == arc.source + 1]
    curved = [arc for arc in found if arc not in straight]
    lane = lanes(curved)
    right = float(_LEFT + _BOX[0])
    # Lines and labels may need more than there is beside the boxes: the drawing grows on that side.
    reach = {side: [_extent(lane[arc], arc.label) for arc in curved if arc.later == side] for side in (False, True)}
    left, right = _LEFT - max(reach[False], default=4.0), right + max(reach[True], default=4.0)
    spare = max(0.0, WIDTH - (right - left))  # (a narrow drawing is not blown up)
    left, width = left - spare / 2, right - left + spare
    height = 2 * _FIRST + _STEP * len(names) - (_STEP - _BOX[1])
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" role="img" aria-label="{html.escape(_words(network), quote=True)}" '
        f'viewBox="{left:g} 0 {width:g} {height}" font-size="{_FONT}">',
        *(_marker(f"{prefix}arrow-{name}", colour) for name, colour in (("now", _INK), ("before", _LATER))),
    ]
    for arc in straight:
        x, y = _LEFT + _BOX[0] / 2, _middle(arc.source) + _BOX[1] / 2
        parts.append(_path(f"M{x} {y}V{_middle(arc.target) - _BOX[1] / 2 - 1}", prefix, later=False))
        parts.append(_text(x + 5, (y + _middle(arc.target) - _BOX[1] / 2) / 2 + 3.5, arc.label, _INK))
    parts += [_curve(arc, lane[arc], prefix) for arc in curved]
    parts += _labels(curved, lane)
    for position, name in enumerate(names):
        parts += _box(network, name, position)
    return "".join([*parts, "</svg>"])


def _extent(lane: int, label: str) -> float:
    return _LANE * (lane + 1) + 8 + _LETTER * max(map(len, label.split(", ")))


def _middle(position: int) -> float:
    return _FIRST + _STEP * position + _BOX[1] / 2


def _marker(name: str, colour: str) -> str:
    return (
        f'<marker id="{name}" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="7" markerHeight="7" orient="auto">'
        f'<path d="M0 0L8 4L0 8z" fill="{colour}"/></marker>'
    )


def _path(d: str, prefix: str, *, later: bool) -> str:
    name, colour = ("before", _LATER) if later else ("now", _INK)
    dashes = ' stroke-dasharray="5 3"' if later else ""
    return f'<path d="{d}" fill="none" stroke="{colour}" stroke-width="1.2"{dashes} marker-end="url(#{prefix}arrow-{name})"/>'


def _text(x: float, y: float, text: str, colour: str, anchor: str = "start") -> str:
    halo = ' stroke="#fff" stroke-width="3" paint-order="stroke"'  # lines end around it
    return f'<text x="{x:g}" y="{y:g}" fill="{colour}"{halo} text-anchor="{anchor}">{html.escape(text)}</text>' if text else ""


def _ends(arc: Arc) -> tuple[float, float]:
    """Heights at which a line beside the boxes begins and ends: below the middle, above it, so that it does not run into another's head."""
    return _middle(arc.source) + 7, _middle(arc.target) - 7


def _outer(arc: Arc, lane: int) -> float:
    return _LEFT + _BOX[0] + _LANE * (lane + 1) if arc.later else _LEFT - _LANE * (lane + 1)


def _curve(arc: Arc, lane: int, prefix: str) -> str:
    """A line beside the boxes, or from a box to itself."""
    edge, sign = (_LEFT + _BOX[0], 1) if arc.later else (_LEFT, -1)
    out, (begin, end) = _outer(arc, lane), _ends(arc)
    corner = min(8.0, abs(end - begin) / 2)
    down = 1 if end > begin else -1
    d = (
        f"M{edge} {begin}H{out - sign * corner:g}Q{out:g} {begin} {out:g} {begin + down * corner:g}"
        f"V{end - down * corner:g}Q{out:g} {end} {out - sign * corner:g} {end}H{edge + sign}"
    )
    return _path(d, prefix, later=arc.later)


def _labels(found: Sequence[Arc], lane: Mapping[Arc, int]) -> list[str]:
    """The words beside the lines, a line of text for each, where no others are: short lines, which leave no choice, come first."""
    parts: list[str] = []
    boxes: list[tuple[float, float, float, float]] = []
    for arc in sorted((one for one in found if one.label), key=lambda one: (one.span[1] - one.span[0], one.span)):
        words, x = arc.label.split(", "), _outer(arc, lane[arc])
        wide, high = _LETTER * max(map(len, words)), _LINE * len(words)
        first, last = sorted(_ends(arc))
        middle = (first + last) / 2
        left = x + 3 if arc.later else x - 3 - wide
        steps = range(int(max(0, last - first - high) / 2 / 4) + 1)
        places = [
            (left, middle + sign * 4 * k - high / 2, left + wide, middle + sign * 4 * k + high / 2) for k in steps for sign in (1, -1)
        ]
        box = next((place for place in places if not any(_overlap(place, other) for other in boxes)), places[0])
        boxes.append(box)
        anchor, at = ("start", box[0]) if arc.later else ("end", box[2])
        parts += [_text(at, box[1] + _LINE * (k + 0.8), word, _LATER if arc.later else _INK, anchor) for k, word in enumerate(words)]
    return parts


def _overlap(one: tuple[float, float, float, float], other: tuple[float, float, float, float]) -> bool:
    return one[0] < other[2] and other[0] < one[2] and one[1] < other[3] and other[1] < one[3]


def _box(network: Network, name: str, position: int) -> list[str]:
    top = _middle(position) - _BOX[1] / 2
    channels, height, width = network.shapes[name]
    kind = "" if position < len(network.inputs) else _kind(network.area(name))
    fill = "#eef4fb" if kind and network.area(name).cell is not None else "#fff"
    middle = _LEFT + _BOX[0] / 2
    told = f"{channels} \u00d7 {height} \u00d7 {width}" + (f" \u00b7 {kind}" if kind else "")
    return [
        f'<rect x="{_LEFT}" y="{top}" width="{_BOX[0]}" height="{_BOX[1]}" rx="4" fill="{fill}" stroke="{_FAINT}"/>',
        f'<text x="{middle}" y="{top + 14}" text-anchor="middle" fill="{_INK}" font-weight="600">{html.escape(name)}</text>',
        f'<text x="{middle}" y="{top + 27}" text-anchor="middle" fill="{_INK}">{html.escape(told)}</text>',
    ]


def _words(network: Network) -> str:
    """The drawing for those who do not see it."""
    recurrent = [f"{c.source} to {c.target}" for c in network.connections if network.delay(c) > 0]
    areas = " to ".join(area.name for area in network.areas)
    return f"Network: image to {areas}. Read at the step before: {', '.join(dict.fromkeys(recurrent)) or 'nothing'}."
