"""Markdown of what was measured of training: readers against training steps, two processes against one, when gradients are ready."""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Any

NOT_YET = "Not yet measured: `make bench` fills this in."


def _read(path: Path) -> Mapping[str, Any] | None:
    found: Mapping[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return found


def _machine(results: Mapping[str, Any]) -> str:
    machine = results["machine"]
    return f"{machine['processor']}, {machine['cores']} cores, torch {machine['torch']}, commit {machine['commit']}"


def readers(folder: Path) -> str:
    """Images/s of readers, a column for each size of images."""
    found = {
        int(name[1]): path for path in folder.glob("training_data_*.json") if (name := re.fullmatch(r"training_data_(\d+)", path.stem))
    }
    results = {size: _read(path) for size, path in sorted(found.items())}
    speeds = {size: result["images_per_s"] for size, result in results.items() if result is not None}
    names = list(dict.fromkeys(name for speed in speeds.values() for name in speed))
    lines = [f"| images/s | {' | '.join(f'{size} px' for size in speeds)} |", f"|{'---|' * (len(speeds) + 1)}"]
    for name in names:
        cells = [
            f"{speed[name]:,.3g}" if name in speed and speed[name] < 100 else f"{speed[name]:,.0f}" if name in speed else ""
            for speed in speeds.values()
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    commits = "; ".join(f"{size} px: {_machine(result)}" for size, result in results.items() if result is not None)
    return "\n".join(lines) + f"\n\n{commits}." if speeds else NOT_YET


def processes(folder: Path) -> str:
    """Two processes against one, with equal batches."""
    results = _read(folder / "training_processes.json")
    if results is None:
        return NOT_YET
    lines = ["| `rnndyn train`, equal batches | images/s, median of runs | least to most |", "|---|---|---|"]
    for name, speed in results["images_per_s"].items():
        lines.append(f"| {name} | {speed['median']:.3g} | {speed['min']:.3g} to {speed['max']:.3g} |")
    told = f"Two processes are {results['speed_up']:.3g} times as fast (median of {results['rounds']} pairs in turns"
    return "\n".join(lines) + f"\n\n{told}; batch {results['batch']}, {results['size']} px; {_machine(results)})."


def overlap(folder: Path) -> str:
    """When gradients are ready within the backward pass, and what their all-reduce costs."""
    results = _read(folder / "training_overlap.json")
    if results is None:
        return NOT_YET
    seconds = {name: found["median_s"] for name, found in results["contenders"].items()}
    first = statistics.median(shares[0] for shares in results["buckets_ready"])
    rows = {
        "gradients": f"{results['gradient_bytes'] / 2**20:.3g} MiB in {len(results['bucket_bytes'])} buckets",
        "first bucket ready, share of the time until the last is": f"{first:.3f}",
        "wait for the all-reduce after the last": f"{1e3 * results['waited_s']:.3g} ms",
        **{f"training step {name}": f"{value:.3g} s" for name, value in seconds.items()},
    }
    lines = ["| two processes, gloo | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    return "\n".join(lines) + f"\n\nBatch {results['batch']}, {results['size']} px; {_machine(results)}."


def training_tables(folder: Path) -> str:
    """All of them."""
    titles = {"Readers": readers, "Processes": processes, "Communication": overlap}
    return "\n\n".join(f"**{title}.**\n\n{make(folder)}" for title, make in titles.items())
