"""Every number that a report shows, looked for in the CSV files that lie beside it."""

from __future__ import annotations

import csv
import html
import re
from pathlib import Path

from rnndyn_fast.analysis.claims import KEPT_CHANGE, MIN_CHANGE, MIN_EFFECT, MIN_ORDER, MIN_SAMPLES
from rnndyn_fast.analysis.results import MIN_GROUP
from rnndyn_fast.report.page import format_cell

# Levels and bounds, which the text states, and small counts in words about them.
CONSTANTS = {KEPT_CHANGE, MIN_CHANGE, MIN_EFFECT, MIN_ORDER, MIN_SAMPLES, MIN_GROUP, 95.0, 2.5, 0.001, 0.0, 1.0, 2.0}
NUMBER = re.compile(r"(?<![\w.#])[-\N{MINUS SIGN}]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:e[-+]\d+)?(?![\w])")


def csv_numbers(*folders: Path) -> set[str]:
    """All numbers of all CSV files, in the forms in which a report may show them."""
    forms: set[str] = set()
    for path in (path for folder in folders for path in folder.glob("*.csv")):
        with path.open(newline="", encoding="utf-8") as file:
            for cell in (cell for row in csv.reader(file) for cell in row):
                try:
                    value = float(cell)
                except ValueError:
                    forms |= set(NUMBER.findall(cell))  # a reason or a class name
                    continue
                if value == value and abs(value) != float("inf"):
                    forms |= {format_cell(value), f"{value:.1f}", f"{value:.2f}", f"{100 * value:.1f}"}
                    if value.is_integer():
                        forms.add(f"{int(value):,}")
    return forms


def tables_of(page: str) -> dict[int, list[list[str]]]:
    """Cells of the numbered tables, header first."""
    found = {}
    for number, body in re.findall(r"<b>Table (\d+)\.</b>.*?<table[^>]*>(.*?)</table>", page, re.DOTALL):
        rows = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, re.DOTALL) for row in re.findall(r"<tr>(.*?)</tr>", body, re.DOTALL)]
        found[int(number)] = [[plain(cell) for cell in row] for row in rows]
    return found


def plain(fragment: str) -> str:
    """The text of a piece of HTML."""
    return html.unescape(re.sub(r"<[^>]*>", "", fragment)).replace("\N{NO-BREAK SPACE}", " ")


def text_of(page: str) -> str:
    """What the report says in its answer, cards and captions; what is run, and published, aside."""
    page = re.sub(r'<section id="(provenance|what-was-run|published)[^"]*">.*?</section>', " ", page, flags=re.DOTALL)
    parts = re.findall(r'<div class="answer">.*?</div>|<div class="card">.*?</div>|<figcaption>.*?</figcaption>|<p class="caption">.*?</p>',
                       page, re.DOTALL)  # fmt: skip
    text = " ".join(re.sub(r"<b>(Figure|Table) \d+\.</b>|<a download.*?</a>", " ", part, flags=re.DOTALL) for part in parts)
    return plain(text)


def unknown_numbers(page: str, *folders: Path) -> list[str]:
    """Numbers of the answer, cards, captions and tables that are in no CSV file of the folders."""
    known = csv_numbers(*folders)
    out = []
    for number in NUMBER.findall(text_of(page)):
        value = float(number.replace(",", "").replace("\N{MINUS SIGN}", "-"))
        if number not in known and value not in CONSTANTS:
            out.append(number)
    return out + wrong_cells(page, folders[0])


def wrong_cells(page: str, folder: Path) -> list[str]:
    """Cells of numbered tables that are not those of table_<number>.csv, at the digits that are shown."""
    out = []
    for number, (header, *rows) in tables_of(page).items():
        if not rows:
            continue
        with (folder / f"table_{number}.csv").open(newline="", encoding="utf-8") as file:
            records = list(csv.DictReader(file))
        if len(records) != len(rows):
            out.append(f"table {number}: {len(rows)} rows, {len(records)} in the file")
        for row, record in zip(rows, records, strict=False):
            shown = [(name, cell) for name, cell in zip(header, row, strict=True) if cell not in (_shown(record, name), record.get(name))]
            out += [f"table {number}, {name}: {cell}" for name, cell in shown]
    return out


def _shown(record: dict[str, str], name: str) -> str:
    if name in record:
        return _number(record[name])
    value, low, high = (_number(record[f"{name}, {part}"]) for part in ("value", "low", "high"))
    return value if low == "\N{EN DASH}" else f"{value} ({low} to {high})"


def _number(cell: str) -> str:
    if not cell:
        return "\N{EN DASH}"
    try:
        return format_cell(int(cell))
    except ValueError:
        pass
    try:
        return format_cell(float(cell))
    except ValueError:
        return cell
