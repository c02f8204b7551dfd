"""The reports in a real browser: no errors, nothing from elsewhere, tables sort, nothing sticks out of a phone."""

from __future__ import annotations

from pathlib import Path

import pytest
from browser import visit
from test_analysis_cases import make

from rnndyn_fast.analysis import readout_zones
from rnndyn_fast.report import Page
from rnndyn_fast.report.analysis_page import analysis_page

SORT = """
  var table = document.querySelector('table[aria-label^="Numbers"]'), out = [];
  function column(k) { return Array.prototype.map.call(table.tBodies[0].rows, function (row) { return row.cells[k].textContent; }); }
  for (var k = 0; k < 2; k++) for (var click = 0; click < 2; click++) {
    var button = table.tHead.rows[0].cells[k].querySelector('button');
    button.focus();
    if (document.activeElement !== button) throw new Error('the heading takes no focus');
    button.click();
    out.push([table.tHead.rows[0].cells[k].getAttribute('aria-sort'), column(k), table.querySelectorAll('[aria-sort]').length]);
  }
  return out;
"""

LAYOUT = """
  var root = document.documentElement, svg = document.querySelectorAll('.plot svg');
  return {
    wide: root.scrollWidth, height: root.scrollHeight, figures: svg.length,
    drawn: Array.prototype.every.call(svg, function (s) { var b = s.getBoundingClientRect(); return b.width > 50 && b.height > 50; }),
    named: Array.prototype.every.call(svg, function (s) { return s.getAttribute('aria-label').length > 20; }),
    loaded: window.performance.getEntriesByType('resource').map(function (e) { return e.name; })
      .filter(function (n) { return n.indexOf('data:') !== 0; }),
    tables: document.querySelectorAll('table').length,
    marked: Array.prototype.every.call(document.querySelectorAll('.table'), function (box) {
      var told = window.getComputedStyle(box, '::before').content;
      return (box.scrollWidth > box.clientWidth + 1) === (told.indexOf('scroll') >= 0);
    }),
    cut: Array.prototype.some.call(document.querySelectorAll('.table'), function (box) { return box.scrollWidth > box.clientWidth + 1; }),
    buttons: document.querySelectorAll('th button').length,
    downloads: document.querySelectorAll('a[download]').length
  };
"""


def test_tables_sort_by_number_and_by_text(tmp_path: Path) -> None:
    page = Page("Sorting", "lead")
    rows = [["b", 1234], ["a10", None], ["a2", -5.5], ["c", 30]]
    page.section("s").table(["name", "n"], rows, "Numbers to sort.")
    found, errors = visit(page.save(tmp_path / "page.html"), SORT, 800, tmp_path)
    assert errors == []
    assert found == [
        ["ascending", ["a2", "a10", "b", "c"], 1],
        ["descending", ["c", "b", "a10", "a2"], 1],
        ["ascending", ["-5.5", "30", "1,234", "\N{EN DASH}"], 1],
        ["descending", ["1,234", "30", "-5.5", "\N{EN DASH}"], 1],
    ]


def test_console_errors_are_seen(tmp_path: Path) -> None:
    """The check of the other tests can fail."""
    path = tmp_path / "page.html"
    path.write_text("<!doctype html><title>t</title><script>missing();</script>", encoding="utf-8")
    _, errors = visit(path, "return 1", 800, tmp_path)
    assert any("missing is not defined" in line for line in errors)


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    result = readout_zones(**make(n=200))
    result.descriptors["class_names"] = [f"a class with a rather long name {c}" for c in range(5)]
    data = make(n=200)
    untrained = readout_zones(**(data | {"trajectories": data["trajectories"][::-1].copy()}))
    page = analysis_page(result, untrained=untrained, replicates=20)
    return page.save(tmp_path_factory.mktemp("r") / "report.html")


@pytest.mark.parametrize("width", [1280, 400])
def test_report_renders(report: Path, tmp_path: Path, width: int) -> None:
    found, errors = visit(report, LAYOUT, width, tmp_path)
    assert errors == []
    assert found["loaded"] == []
    assert found["wide"] <= width  # wide tables scroll within their boxes
    assert found["drawn"]
    assert found["named"]
    assert found["marked"]  # tables that are cut off say so, and no others
    assert found["cut"] or width > 400
    assert found["figures"] >= 14
    assert found["downloads"] >= 13
    assert found["buttons"] > found["tables"] > 4


@pytest.mark.parametrize("case", [{"t": 1}, {"c": 1}, {"n": 1}, {"n": 4, "t": 2}], ids=str)
def test_empty_groups_are_dashes_and_gaps(case: dict[str, int], tmp_path: Path) -> None:
    """Warnings are errors here (pyproject.toml): there is no storm of them."""
    text = analysis_page(readout_zones(**make(**case)), replicates=20).html()
    assert ">nan<" not in text.lower()
    assert "\N{EN DASH}" in text
