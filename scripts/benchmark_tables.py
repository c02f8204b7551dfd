"""Markdown tables of the benchmark results in benchmarks/results/*.json.

    python scripts/benchmark_tables.py                      print them
    python scripts/benchmark_tables.py --update README.md   put them between the page's marks
    python scripts/benchmark_tables.py --check README.md    fail where the page says something else

Two kinds of file are read: of benchmarks that alternate their contenders (write_result in benchmarks/measure.py),
and pytest-benchmark's own.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
OURS = ("rnndyn", "native")  # the contender that the others are compared with, by either kind of file

Json = Mapping[str, Any]


def seconds(value: float) -> str:
    """A duration with three digits and a unit."""
    for factor, unit in ((1.0, "s"), (1e3, "ms"), (1e6, "us")):
        if value * factor >= 1.0:
            return f"{value * factor:.3g} {unit}"
    return f"{value * 1e9:.3g} ns"


def times(value: float) -> str:
    """A ratio with three digits."""
    return f"x {value:.3g}" if value < 999.5 else f"x {value:,.0f}"


def conditions(machine: Json, facts: Json) -> str:
    """What was measured where and with what, in one line."""
    core = machine.get("core", {})
    parts = [f"{name.replace('_', ' ')} {value:,}" for name, value in facts.items()]
    parts += [machine["processor"], f"{machine['threads']} threads", f"Python {machine['python']}"]
    parts += [f"torch {machine['torch']}"] + ([core["isa"]] if "isa" in core else []) + [f"commit {machine['commit']}"]
    return ", ".join(str(part) for part in parts)


def row(title: str, cells: Mapping[str, str]) -> tuple[str, dict[str, str]]:
    """A row of a table whose columns are contenders."""
    return title, {name.replace("_", " "): cell for name, cell in cells.items()}


def alternated(result: Json) -> tuple[str, dict[str, str]]:
    """A row of times (median, extremes, how many times ours is faster), or of peak memory (ours as a share of it)."""
    if "contenders" in result:
        cells = {}
        for name, c in result["contenders"].items():
            cells[name] = f"{seconds(c['median_s'])} ({seconds(c['min_s'])} - {seconds(c['max_s'])})"
            if name not in OURS:
                cells[name] += f", {times(c['ours_is_faster_by'])}"
        return row(result["what"], cells)
    peaks = result["peak_bytes"]
    ours = next(peaks[name] for name in OURS if name in peaks)
    texts = {name: f"{value / 2**20:.0f} MiB" for name, value in peaks.items()}
    return row(result["what"], {n: t if n in OURS else f"{t}, {ours / peaks[n]:.0%}" for n, t in texts.items()})


def pytest_benchmark(results: Json) -> dict[tuple[str, str], list[tuple[str, dict[str, str]]]]:
    """Rows of pytest-benchmark's file, one per test function, by what its contenders have in common."""
    functions: dict[str, list[Json]] = {}
    for benchmark in results["benchmarks"]:
        functions.setdefault(benchmark["name"].partition("[")[0].removeprefix("test_"), []).append(benchmark)
    found: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {}
    for function, rows in functions.items():
        medians = {one["param"]: one["stats"]["median"] for one in rows}
        ours = next(medians[name] for name in OURS if name in medians)
        cells = {}
        for one in rows:
            stats = one["stats"]
            text = f"{seconds(stats['median'])} ({seconds(stats['min'])} - {seconds(stats['max'])})"
            cells[one["param"]] = text if one["param"] in OURS else f"{text}, {times(stats['median'] / ours)}"
        line = conditions(results["machine_info"]["rnndyn"], rows[0]["extra_info"])
        found.setdefault(("time", line), []).append(row(function.replace("_", " "), cells))
    return found


NOTES = {
    "time": "Median (least - most) of the rounds; x: how many times the time of the first column.",
    "memory": "Peak resident size above that of the imports; %: the first column as a share of it.",
}


def tables(folder: Path = RESULTS) -> str:
    """All results of a folder as Markdown, empty where there are none. Rows of equal conditions share a table."""
    found: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "benchmarks" in results:
            for key, rows in pytest_benchmark(results).items():
                found.setdefault(key, []).extend(rows)
        else:
            kind = "time" if "contenders" in results else "memory"
            facts = {k: v for k, v in results.items() if isinstance(v, int | float)}
            found.setdefault((kind, conditions(results["machine"], facts)), []).append(alternated(results))
    parts = []
    for (kind, line), rows in found.items():
        columns = list(dict.fromkeys(name for _, cells in rows for name in cells))
        lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += ["| " + " | ".join([title, *(cells.get(name, "") for name in columns)]) + " |" for title, cells in rows]
        parts.append("\n".join([*lines, "", f"{NOTES[kind]} Measured with {line}."]))
    return "\n\n".join(parts)


def replaced(page: str, text: str) -> str:
    """A page with `text` between its marks. Raises ValueError where it has not one of each."""
    if page.count(START) != 1 or page.count(END) != 1 or page.index(START) > page.index(END):
        raise ValueError(f"page: expected one {START} and after it one {END}")
    before, _, rest = page.partition(START)
    after = rest.partition(END)[2]
    return f"{before}{START}\n{text}\n{END}{after}" if text else f"{before}{START}\n{END}{after}"


def main() -> int:
    """Run as a script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", type=Path, metavar="PAGE")
    mode.add_argument("--check", type=Path, metavar="PAGE")
    options = parser.parse_args()
    page: Path | None = options.update or options.check
    if page is None:
        print(tables())
        return 0
    old = page.read_text(encoding="utf-8")
    new = replaced(old, tables())
    if options.check:
        print(f"{page}: {'up to date' if old == new else 'differs; run scripts/benchmark_tables.py --update'}")
        return int(old != new)
    unfinished = page.with_name(f".{page.name}.new")
    unfinished.write_text(new, encoding="utf-8")
    os.replace(unfinished, page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
