"""Reports: pages that stand alone."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from rnndyn_fast.analysis import Estimate
from rnndyn_fast.report import Card, Page, Picture, Plot, table_html
from rnndyn_fast.report.page import format_cell, lift_note
from rnndyn_fast.study.run import command_line


class Outline(HTMLParser):
    """Ids, alt texts and unclosed elements of a page."""

    VOID = frozenset({"meta", "img", "br", "link"})

    def __init__(self, page: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.ids: list[str] = []
        self.pictures: list[dict[str, str | None]] = []
        self.links: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag not in self.VOID:
            self.open.append(tag)
        self._note(tag, values)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._note(tag, dict(attrs))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def _note(self, tag: str, values: dict[str, str | None]) -> None:
        if values.get("id"):
            self.ids.append(str(values["id"]))
        if tag in ("img", "svg"):
            self.pictures.append({**values, "tag": tag})
        self.links += [str(values[name]) for name in ("href", "src", "xlink:href") if values.get(name)]


def line(values: list[float]) -> Figure:
    figure = Figure()
    figure.subplots().plot(values)
    return figure


def test_page_stands_alone_and_escapes() -> None:
    page = Page("A & B", "lead <b>", "end")
    section = page.section("Results").text("`x < 1` is & stays")
    section.plots([Plot(line([1, 2]), "one", 'alt "one"'), Plot(line([2, 1]), "two", "alt two")])
    section.gallery([Picture(np.zeros((4, 4), np.uint8), "dark", "black square")])
    section.table(["name", "n"], [["a<b", 1], ["c", None]], "Table & caption.")
    section.cards([Card("Claim", None, "not decided", small="criterion", table=table_html(["x"], [[1]], "t"))])
    section.code("rnndyn <cmd>")
    assert page.section("Results").anchor == "results-2"
    text = page.html()
    outline = Outline(text)
    assert outline.open == []
    assert len(outline.ids) == len(set(outline.ids))
    assert [p.get("aria-label") or p.get("alt") for p in outline.pictures] == ['alt "one"', "alt two", "black square"]
    # Nothing is loaded from elsewhere.
    assert all(link.startswith(("#", "data:")) for link in outline.links)
    assert "<code>x &lt; 1</code> is &amp; stays" in text
    assert "a&lt;b" in text
    assert "lead &lt;b&gt;" in text
    assert "<td class=number>\N{EN DASH}</td>" in text


def test_references_within_figures_still_resolve() -> None:
    page = Page("t", "l")
    page.section("s").plots([Plot(line([1, 2]), "c", "a")])
    outline = Outline(page.html())
    inner = [link[1:] for link in outline.links if link.startswith("#")]
    assert inner
    assert set(inner) <= set(outline.ids)
    for name in re.findall(r"url\(#([^)]+)\)", page.html()):
        assert name in outline.ids


def test_notes_above_the_axes_go_into_the_caption() -> None:
    figure = line([1, 2])
    axes = figure.axes[0]
    axes.set_title("Title", loc="left")
    axes.text(0, 1.02, "n = 5", transform=axes.transAxes)
    axes.text(0, 1.5, "beside the line")
    assert lift_note(figure) == "n = 5"
    assert axes.get_title(loc="left") == ""
    assert [text.get_text() for text in axes.texts] == ["beside the line"]


def test_table_rows_have_the_length_of_the_header() -> None:
    with pytest.raises(ValueError, match="rows: expected 2 cells"):
        table_html(["a", "b"], [[1]], "c")


@pytest.mark.parametrize(
    ("value", "shown"),
    [
        (12418, "12,418"),
        (0.12345678, "0.123"),
        (12345.678, "12,346"),
        (Estimate(0.5, 0.25, 0.75, 0.1, 9.0, 10), "0.5 (0.25 to 0.75)"),
        (float("nan"), "\N{EN DASH}"),
        (None, "\N{EN DASH}"),
        ("text", "text"),
    ],
)
def test_cells(value: object, shown: str) -> None:
    assert format_cell(value).replace("\N{NO-BREAK SPACE}", " ") == shown  # type: ignore[arg-type]


def test_save_keeps_the_old_page_when_rendering_fails(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    Page("old", "l").save(path)
    broken = Page("new", "l")
    broken.sections.append(None)  # type: ignore[arg-type]
    with pytest.raises(AttributeError):
        broken.save(path)
    assert "old" in path.read_text()
    assert [item.name for item in tmp_path.iterdir()] == ["report.html"]


def test_command_line_leaves_out_what_is_not_set() -> None:
    options = {"out": "my file", "widths": (1, 2), "threads": None, "untrained": True, "overwrite": False}
    assert command_line("data make", options, ["w"]) == "rnndyn data make w --out 'my file' --widths 1,2 --untrained"
