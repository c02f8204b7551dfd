"""Markdown tables of the benchmark results in benchmarks/results/*.json.

    python scripts/benchmark_tables.py                      print them
    python scripts/benchmark_tables.py --update README.md   put them between the page's marks
    python scripts/benchmark_tables.py --check README.md    fail where the page says something else

Several pages may be named. A page that begins with GENERATED is made anew as a whole. Two kinds of file are read: of benchmarks
that alternate their contenders (write_result in benchmarks/measure.py), and pytest-benchmark's own. README.md has a few
networks of the summary, the other pages have the tables.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from training_tables import training_tables

RESULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "results"
START, END = "<!-- benchmarks:start -->", "<!-- benchmarks:end -->"
KERNELS = ("<!-- benchmarks:kernels:start -->", "<!-- benchmarks:kernels:end -->")  # where the convolutions stand
TRAINING = ("<!-- benchmarks:training:start -->", "<!-- benchmarks:training:end -->")
GENERATED = "<!-- Generated from benchmarks/results by scripts/benchmark_tables.py: `make bench` makes it anew. -->"
NOT_YET = "Not yet measured: `make bench` fills this in."
NOT_YET_ON_DEVICE = "Not yet measured: `scripts/gpu_check.sh FOLDER` on a machine with a GPU leaves its results in FOLDER."
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


def extraction(result: Json) -> tuple[str, dict[str, str]]:
    """A row of times and what they are over the bare forward, or of peak memory over the number of samples."""
    if "peak_bytes" in result:
        return row(result["what"], {name: f"{value / 2**20:.0f} MiB" for name, value in result["peak_bytes"].items()})
    cells = {}
    for name, c in result["contenders"].items():
        cells[name] = f"{seconds(c['median_s'])} ({seconds(c['min_s'])} - {seconds(c['max_s'])})"
        if name != "bare_forward":
            cells[name] += f", {c['ours_is_faster_by'] - 1:+.1%}"
    return row(result["what"], cells)


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


def convolutions(results: Json) -> list[tuple[str, dict[str, str]]]:
    """Rows of one network, a column per pass: time, rates, and how many times faster than the vendor's better layout and its bfloat16."""
    rows = []
    for one in results["convolutions"]:
        cells = {"map": f"{one['map']} x {one['map']}", "channels": f"{one['source']} to {one['target']}", "engine": one["engine"]}
        for name, contenders in one["passes"].items():
            mine = contenders["rnndyn"]["median_s"]
            vendor = min(contenders[layout]["ours_is_faster_by"] for layout in ("contiguous", "channels_last"))
            rates = f"{one['direct_gflop'] / mine:.0f}, done {one['done_gflop'] / mine:.0f}"
            cells[name] = f"{seconds(mine)}, {rates}, {times(vendor)}"
            high, low = (contenders[k]["median_s"] for k in ("rnndyn_high", "rnndyn_bf16"))
            cells[name] += f"; high {seconds(high)}, {times(vendor * mine / high)}"
            cells[name] += f"; bf16 {seconds(low)}, {times(contenders['bf16']['median_s'] / low)}"
        cells["packing"] = " + ".join(seconds(value) for value in one["packing_s"].values())
        rows.append((f"{results['what']} {one['name']}", cells))
    return rows


NOTES = {
    "time": "Median (least - most) of the rounds; x: how many times the time of the first column.",
    "device": "Median (least - most) of the rounds by CUDA events; x: how many times the time of the first column.",
    "memory": "Peak resident size above that of the imports; %: the first column as a share of it.",
    "extraction": (
        "Median (least - most) of the rounds; %: median of what each round took over the bare forward of the same round. Once: what an "
        "extraction takes beside, in seconds, whatever the number of images."
    ),
    "extraction memory": "Peak resident size above that of the imports, in a fresh process each.",
    "convolutions": (
        "Median time; GFLOP/s of the direct convolution that it stands for, and of the products that it does; x: how many times faster "
        "than PyTorch's convolution in the better of its two layouts. High: with torch.set_float32_matmul_precision('high'); bf16: in "
        "bfloat16, against PyTorch's in bfloat16. On matrix units a product done is one of bfloat16 parts. Packing (forward + backward) is "
        "done once "
        "per rollout and is in none of these times; the transforms of the maps are in all of them."
    ),
}
TITLES = {
    "rollout": "Networks: time",
    "ctrnn": "Continuous-time networks",
    "memory": "Networks: memory",
    "networks": "Cells and further networks",
    "analysis": "Analysis",
    "extraction": "Extraction",
    "convolutions": "Convolutions",
    "device": "On a GPU",
}
PASS_OF_NETWORK = re.compile(r"(?:peak memory of )?(forward|training|latency)(?: of |, )(.+)")  # what a result of a network is of
README_NETWORKS = ("blt_net_128, lateral", "blt_net_64, lateral", "blt_vs", "gru", "rcnn_sat_bl")
SUMMARY = (
    "Times are medians; by how many times ours is the faster: against eager PyTorch, and against `torch.compile` of the same model where "
    "that was measured. Memory: our peak above the imports, as a share of eager's."
)


def section_of(results: Json) -> str:
    """Which of TITLES a file belongs to."""
    if "section" in results:
        return results["section"]
    kinds = {"device": "device", "benchmarks": "analysis", "convolutions": "convolutions", "peak_bytes": "memory"}
    return next((section for key, section in kinds.items() if key in results), "rollout")


def tables(folder: Path = RESULTS, sections: tuple[str, ...] = tuple(TITLES), *, commands: bool = False) -> str:
    """Results of a folder as Markdown (all), empty where there are none. Rows of equal conditions share a table."""
    found: dict[tuple[str, str], list[tuple[str, dict[str, str]]]] = {}
    for path in sorted(folder.glob("[!.]*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        section = section_of(results)
        if section not in sections:
            continue
        machine = results["machine_info"]["rnndyn"] if section == "analysis" else results["machine"]
        if section == "device":
            machine = {**machine, "processor": results["device"]}
        command = f": `{machine['command']}`" if commands and "command" in machine else ""
        if section == "analysis":
            for (kind, line), rows in pytest_benchmark(results).items():
                found.setdefault((kind, line + command), []).extend(rows)
            continue
        facts = {k: v for k, v in results.items() if isinstance(v, int | float)}
        kind = {"rollout": "time", "ctrnn": "time", "networks": "memory" if "peak_bytes" in results else "time"}.get(section, section)
        if section == "extraction" and "peak_bytes" in results:
            kind += " memory"
        rows = {"convolutions": convolutions, "extraction": lambda r: [extraction(r)]}.get(section, lambda r: [alternated(r)])(results)
        found.setdefault((kind, conditions(machine, facts) + command), []).extend(rows)
    parts = []
    for (kind, line), rows in found.items():
        columns = list(dict.fromkeys(name for _, cells in rows for name in cells))
        lines = ["| " + " | ".join(["", *columns]) + " |", "|---" * (len(columns) + 1) + "|"]
        lines += ["| " + " | ".join([title, *(cells.get(name, "") for name in columns)]) + " |" for title, cells in rows]
        parts.append("\n".join([*lines, "", f"{NOTES[kind]} Measured with {line}."]))
    return "\n\n".join(parts)


def time_cell(result: Json | None) -> str:
    """Our median time, and by how many times it is the shorter of eager's and the compiled one's."""
    if result is None:
        return ""
    peers = [result["contenders"][name] for name in ("eager", "compiled") if name in result["contenders"]]
    ours = next(result["contenders"][name] for name in OURS if name in result["contenders"])
    return f"{seconds(ours['median_s'])}: {', '.join(times(peer['ours_is_faster_by']) for peer in peers)}"


def share_cell(result: Json | None) -> str:
    """Our peak of memory as a share of eager's."""
    return f"{result['peak_bytes']['rnndyn'] / result['peak_bytes']['eager']:.0%}" if result else ""


def network_rows(found: Mapping[str, Mapping[str, Json]]) -> list[str]:
    """A table of networks, with times and memory of a forward pass and of a training step."""
    lines = ["|  | forward | training step | one image | memory, forward | memory, training |", "|---|---|---|---|---|---|"]
    for network, results in sorted(found.items()):
        cells = [time_cell(results.get(key)) for key in ("forward", "training", "latency")]
        cells += [share_cell(results.get(f"{key} memory")) for key in ("forward", "training")]
        lines.append("| " + " | ".join([network, *cells]) + " |")
    return lines


def summary(folder: Path = RESULTS, only: tuple[str, ...] = ()) -> str:
    """Two short tables, of networks and of other work; empty where there are no results. With `only`: one table, of these networks."""
    networks: dict[str, dict[str, Json]] = {}
    others = []
    for path in sorted(folder.glob("[!.]*.json")):
        results = json.loads(path.read_text(encoding="utf-8"))
        section = section_of(results)
        if section in ("rollout", "memory", "networks") and (known := PASS_OF_NETWORK.fullmatch(results["what"])):
            network = known[2].replace(", lateral_additive", ", lateral").replace(", topdown_multiplicative", ", all terms, multiplicative")
            networks.setdefault(network, {})[f"{known[1]} memory" if "peak_bytes" in results else known[1]] = results
        elif section in ("ctrnn", "memory", "extraction"):
            others.append((extraction if section == "extraction" else alternated)(results))
        elif section == "analysis":
            others += [row for rows in pytest_benchmark(results).values() for row in rows]
    parts = []
    if only:
        networks, others = {name: networks[name] for name in only if name in networks}, []
    if networks:
        machines = [result["machine"] for results in networks.values() for result in results.values()]
        commits = ", ".join(sorted({machine["commit"] for machine in machines}))
        parts.append("\n".join(network_rows(networks)))
        parts.append(f"{SUMMARY} {conditions({**machines[0], 'commit': commits}, {})}.")
    if others:
        lines = [f"| {title} | " + "; ".join(f"{name} {cell}" for name, cell in cells.items()) + " |" for title, cells in others]
        parts.append("\n".join(["| other work |  |", "|---|---|", *(re.sub(r" \([^()]* - [^()]*\)", "", line) for line in lines)]))
    return "\n\n".join(parts)


def replaced(page: str, text: str, marks: tuple[str, str] = (START, END)) -> str:
    """A page with `text` between its marks. Raises ValueError where it has not one of each."""
    start, end = marks
    if page.count(start) != 1 or page.count(end) != 1 or page.index(start) > page.index(end):
        raise ValueError(f"page: expected one {start} and after it one {end}")
    before, _, rest = page.partition(start)
    after = rest.partition(end)[2]
    return f"{before}{start}\n{text}\n{end}{after}" if text else f"{before}{start}\n{end}{after}"


def whole_page(folder: Path = RESULTS) -> str:
    """All results, with the commands that gave them."""
    parts = [GENERATED, "# Benchmarks"]
    parts.append(
        "Contenders of a row ran in one process, alternating, and their results were checked against float64 there. Losses are listed like "
        "wins. [kernels.md](kernels.md) explains the kernels."
    )
    if short := summary(folder):
        parts += ["## Summary", short]
    for section, title in TITLES.items():
        parts += [f"## {title}", tables(folder, (section,), commands=True) or (NOT_YET_ON_DEVICE if section == "device" else NOT_YET)]
    return "\n\n".join(parts) + "\n"


def renewed(page: str, folder: Path = RESULTS) -> str:
    """A page with the results that its marks, or its first line, ask for. Raises ValueError where it has none."""
    if page.startswith(GENERATED):
        return whole_page(folder)
    if KERNELS[0] in page:
        return replaced(page, tables(folder, ("convolutions",)) or NOT_YET, KERNELS)
    if TRAINING[0] in page:
        return replaced(page, training_tables(folder), TRAINING)
    return replaced(page, summary(folder, README_NETWORKS))


def main() -> int:
    """Run as a script; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--update", type=Path, metavar="PAGE", nargs="+", default=[])
    mode.add_argument("--check", type=Path, metavar="PAGE", nargs="+", default=[])
    options = parser.parse_args()
    if not options.update and not options.check:
        print(tables())
    differing = 0
    for page in options.check:
        old = page.read_text(encoding="utf-8")
        same = old == renewed(old)
        differing += not same
        print(f"{page}: {'up to date' if same else 'differs; run scripts/benchmark_tables.py --update'}")
    for page in options.update:
        unfinished = page.with_name(f".{page.name}.new")
        unfinished.write_text(renewed(page.read_text(encoding="utf-8")), encoding="utf-8")
        os.replace(unfinished, page)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
