"""A report as one HTML page that needs nothing else: text, sortable tables, figures (inline SVG) and images (inline PNG)."""

from __future__ import annotations

import base64
import html
import io
import itertools
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rnndyn_fast.analysis.intervals import UNKNOWN, Estimate
from rnndyn_fast.analysis.outputs import spread, write_csv
from rnndyn_fast.file_io import write_text
from rnndyn_fast.optional import require
from rnndyn_fast.report.script import SCRIPT
from rnndyn_fast.report.style import STYLE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Cell = str | int | float | Estimate | None

# Wider figures (a dendrogram of a hundred classes) keep their size and scroll.
_MOST_INCHES = 7.0


def escape(text: str) -> str:
    """Text as HTML; what stands between backticks becomes code."""
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", html.escape(text, quote=True))


@dataclass(frozen=True)
class Plot:
    """A matplotlib figure with its caption and a description for those who do not see it."""

    figure: Figure
    caption: str
    alt: str
    inches: float = 5.0  # width to draw it at; small enough that its text can be read on a phone
    csv: str = ""  # the numbers behind it, for download


@dataclass(frozen=True)
class Picture:
    """An image, uint8 [H, W, 3] or [H, W]."""

    pixels: np.ndarray
    caption: str
    alt: str


@dataclass
class Section:
    """A part of a page under a heading; its methods append to it and return it."""

    title: str
    anchor: str
    _page: Page
    _parts: list[str] = field(default_factory=list)

    def text(self, *paragraphs: str) -> Section:
        """Paragraphs; `code` between backticks."""
        self._parts += [f"<p>{escape(paragraph)}</p>" for paragraph in paragraphs]
        return self

    def code(self, text: str) -> Section:
        """A block of code or commands."""
        self._parts.append(f"<pre><code>{html.escape(text)}</code></pre>")
        return self

    def commands(self, lines: Sequence[str]) -> Section:
        """Commands, one a line; long ones are broken between words only."""
        broken = [" ".join(f"<span>{html.escape(word)}</span>" for word in line.split(" ")) for line in lines]
        self._parts.append(f'<pre class="commands">{"".join(f"<code>{line}</code>" for line in broken)}</pre>')
        return self

    def table(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> Section:
        """A table under the next number. Numbers are right-aligned, floats get three significant digits, estimates their interval, None
        and NaN a dash.

        Raises ValueError where a row is not as long as the header.
        """
        self._parts.append(self._page.table_html(header, rows, caption))
        return self

    def plots(self, plots: Sequence[Plot]) -> Section:
        """Figures side by side where there is room."""
        self._parts.append(f'<div class="grid">{"".join(self._page.plot_html(plot) for plot in plots)}</div>')
        return self

    def drawing(self, draw: Callable[[str], str], caption: str) -> Section:
        """A drawing as SVG, which `draw` makes with that prefix for its ids, under the next number."""
        self._parts.append(self._page.figure_html(draw, caption))
        return self

    def markup(self, text: str) -> Section:
        """HTML as it is."""
        self._parts.append(text)
        return self

    def gallery(self, pictures: Sequence[Picture]) -> Section:
        """Small images in rows."""
        self._parts.append(f'<div class="gallery">{"".join(picture_html(picture) for picture in pictures)}</div>')
        return self

    def cards(self, cards: Sequence[Card]) -> Section:
        """Boxes side by side."""
        self._parts.append(f'<div class="grid">{"".join(card.html() for card in cards)}</div>')
        return self

    def html(self) -> str:
        """The section as HTML."""
        return f'<section id="{self.anchor}"><h2>{escape(self.title)}</h2>{"".join(self._parts)}</section>'


@dataclass(frozen=True)
class Card:
    """A box with a verdict: `holds` True, False, or None where it is open."""

    title: str
    holds: bool | None
    verdict: str
    paragraphs: Sequence[str] = ()
    table: str = ""  # as `table_html` makes it
    small: str = ""

    def html(self) -> str:
        """The box as HTML."""
        kind = {True: "yes", False: "no", None: "open"}[self.holds]
        parts = [f'<h3>{escape(self.title)}</h3><p class="verdict {kind}">{escape(self.verdict)}</p>']
        parts += [f"<p>{escape(paragraph)}</p>" for paragraph in self.paragraphs]
        if self.small:
            parts.append(f'<p class="small">{escape(self.small)}</p>')
        return f'<div class="card">{"".join(parts)}{self.table}</div>'


class Page:
    """A report: a title, a lead, and sections in the order in which they were added.

    >>> page = Page("Accuracy", "What came out.")
    >>> _ = page.section("Numbers").table(["network", "n"], [["lateral", 100]], "Networks and their samples.")
    >>> "lateral" in page.html()
    True
    """

    def __init__(self, title: str, lead: str, footer: str = "") -> None:
        self.title, self.lead, self.footer = title, lead, footer
        self.sections: list[Section] = []
        self.tables: list[tuple[str, Sequence[str], Sequence[Sequence[Cell]]]] = []  # caption, header, rows, by number
        self._figure_numbers = itertools.count(1)
        self._head = ""

    def answer(self, question: str, answers: Sequence[str], plot: Plot) -> None:
        """What the page is about, ahead of all sections: the question, the answer in a sentence each, and the main figure."""
        told = "".join(f"<p>{escape(sentence)}</p>" for sentence in answers)
        self._head = f'<p class="question">{escape(question)}</p><div class="answer">{told}</div>{self.plot_html(plot)}'

    def table_html(self, header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str) -> str:
        """A table under the next number."""
        self.tables.append((caption, header, rows))
        return table_html(header, rows, caption, len(self.tables))

    def write_tables(self, folder: str | os.PathLike[str]) -> list[Path]:
        """Every table in full precision as ``<folder>/table_<number>.csv``; estimates become columns."""
        return [
            write_csv(_csv_rows(header, rows), Path(folder) / f"table_{number}.csv")
            for number, (_, header, rows) in enumerate(self.tables, start=1)
            if rows
        ]

    def section(self, title: str) -> Section:
        """A new section at the end."""
        anchor = re.sub(r"[^a-z0-9]+", "-", title.lower()).strip("-") or "section"
        taken = {section.anchor for section in self.sections}
        if anchor in taken:
            anchor = next(f"{anchor}-{k}" for k in itertools.count(2) if f"{anchor}-{k}" not in taken)
        self.sections.append(Section(title, anchor, self))
        return self.sections[-1]

    def plot_html(self, plot: Plot) -> str:
        """A figure as inline SVG."""
        link = ""
        if plot.csv:
            data = base64.b64encode(plot.csv.encode("utf-8")).decode("ascii")
            name = re.sub(r"[^a-z0-9]+", "_", plot.caption.lower()).strip("_")[:60] or "figure"
            label = html.escape(f"Numbers of the figure: {plot.caption}", quote=True)
            link = f' <a download="{name}.csv" aria-label="{label}" href="data:text/csv;base64,{data}">CSV</a>'
        return self.figure_html(lambda prefix: figure_svg(plot.figure, prefix=prefix, alt=plot.alt, inches=plot.inches), plot.caption, link)

    def figure_html(self, draw: Callable[[str], str], caption: str, link: str = "") -> str:
        """A drawing under the next number; `draw` makes it, with a prefix for its ids."""
        number = next(self._figure_numbers)
        text = f"<b>Figure {number}.</b> {escape(caption)}{link}"
        return f'<figure class="plot"><div>{draw(f"f{number}-")}</div><figcaption>{text}</figcaption></figure>'

    def html(self) -> str:
        """The whole page."""
        links = "".join(f'<li><a href="#{s.anchor}">{escape(s.title)}</a></li>' for s in self.sections)
        return (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{html.escape(self.title)}</title><style>{STYLE}</style></head><body>"
            f'<header><h1>{escape(self.title)}</h1><p class="lead">{escape(self.lead)}</p>'
            f'{self._head}<nav aria-label="Sections"><ul>{links}</ul></nav></header>'
            f"<main>{''.join(section.html() for section in self.sections)}</main>"
            f"<footer><p>{escape(self.footer)}</p></footer><script>{SCRIPT}</script></body></html>\n"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to `path`, atomically."""
        return write_text(path, self.html())


def _csv_rows(header: Sequence[str], rows: Sequence[Sequence[Cell]]) -> list[dict[str, object]]:
    """Rows in which the columns that hold an estimate have become several, in all rows alike."""
    wide = [any(isinstance(row[k], Estimate) for row in rows) for k in range(len(header))]
    out = []
    for row in rows:
        cells: dict[str, object] = {}
        for name, value, several in zip(header, row, wide, strict=True):
            if several:
                value = value if isinstance(value, Estimate) else UNKNOWN
                cells |= spread(f"{name}, ", value)
            else:
                cells[name] = "" if value is None else value
        out.append(cells)
    return out


def table_html(header: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str, number: int | None = None) -> str:
    """A table as HTML; see `Section.table`."""
    for row in rows:
        if len(row) != len(header):
            raise ValueError(f"rows: expected {len(header)} cells as in the header, got {len(row)}: {list(row)}")
    numeric = [bool(rows) and all(not isinstance(row[k], str) for row in rows) for k in range(len(header))]

    def cell(tag: str, text: str, column: int, scope: str = "") -> str:
        return f"<{tag}{scope}{' class=number' if numeric[column] else ''}>{text}</{tag}>"

    head = "".join(cell("th", escape(name), k, ' scope="col"') for k, name in enumerate(header))
    body = "".join(f"<tr>{''.join(cell('td', escape(format_cell(value)), k) for k, value in enumerate(row))}</tr>" for row in rows)
    label = html.escape(caption, quote=True)
    numbered = "" if number is None else f"<b>Table {number}.</b> "
    return (
        # A <caption> is as wide as its table and would scroll away with it on a phone.
        f'<p class="caption">{numbered}{escape(caption)}</p>'
        # Wide tables scroll within their box: it takes the focus, so that arrow keys move it.
        f'<div class="table" tabindex="0" role="region" aria-label="{label}"><table aria-label="{label}">'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def format_cell(value: Cell) -> str:
    """A value as the tables show it."""
    if isinstance(value, Estimate):
        told = format_cell(value.value)
        if value.known:
            told += f" ({format_cell(value.low)} to {format_cell(value.high)})"
        return told.replace(" ", "\N{NO-BREAK SPACE}")  # one word to the line breaker
    if value is None or (isinstance(value, float) and not np.isfinite(value)):
        return "\N{EN DASH}"
    if isinstance(value, bool | str):
        return str(value)
    if isinstance(value, int):
        return f"{value:,}"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e9 else f"{value:.3g}"


def picture_html(picture: Picture) -> str:
    """An image as inline PNG."""
    require("matplotlib")

    from matplotlib.image import imsave

    pixels = picture.pixels if picture.pixels.ndim == 3 else np.repeat(picture.pixels[:, :, None], 3, axis=2)
    buffer = io.BytesIO()
    imsave(buffer, pixels, format="png")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return (
        f'<figure><img src="data:image/png;base64,{data}" alt="{html.escape(picture.alt, quote=True)}">'
        f"<figcaption>{escape(picture.caption)}</figcaption></figure>"
    )


def lift_note(figure: Figure) -> str:
    """Take titles and the notes above the axes out of a figure and return the notes, for the caption.

    In a caption they wrap, and the figure can be narrow enough for a phone.
    """
    notes: list[str] = []
    for axes in figure.axes:
        for where in ("left", "center", "right"):
            axes.set_title("", loc=where)
        for text in list(axes.texts):
            if text.get_transform() == axes.transAxes and text.get_position()[1] > 1:
                notes.append(text.get_text())
                text.remove()
    return "; ".join(notes)


def figure_svg(figure: Figure, *, prefix: str, alt: str, inches: float) -> str:
    """A matplotlib figure as an SVG element without a background, its ids made unique by `prefix`, its text as text."""
    require("matplotlib")

    from matplotlib import rc_context

    width, height = figure.get_size_inches()
    if width <= _MOST_INCHES:
        width, height = inches, height * (1 + inches / width) / 2
        figure.set_size_inches(width, height)
    buffer = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": prefix}):
        figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'\bid="', f'id="{prefix}', svg)
    svg = re.sub(r"url\(#", f"url(#{prefix}", svg)
    svg = re.sub(r'href="#', f'href="#{prefix}', svg)
    # The page scales the figure: the view box stays, the size in points goes.
    opening = svg.index(">")
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", svg[:opening])
    label = html.escape(alt, quote=True)
    least = "" if width <= _MOST_INCHES else f' style="min-width: {55 * width:.0f}px"'
    return f'{head} role="img" aria-label="{label}"{least}>{svg[opening + 1 :]}'.strip()
