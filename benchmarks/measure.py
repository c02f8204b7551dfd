"""What benchmarks share: alternating measurement, peak memory of a fresh process, and a record of machine and
versions."""

from __future__ import annotations

import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent

QUICK = os.environ.get("RNNDYN_BENCH_QUICK") == "1"  # tiny sizes, to check that the benchmarks run


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 1) -> dict[str, list[float]]:
    """Seconds of each contender, one call of each per round, so that a drifting machine meets all of them alike."""
    for _ in range(warmup):
        for run in contenders.values():
            run()
    times: dict[str, list[float]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders)
        for name in names if i % 2 == 0 else reversed(names):
            start = time.perf_counter()
            contenders[name]()
            times[name].append(time.perf_counter() - start)
    return times


def summary(times: Mapping[str, list[float]], ours: str) -> dict[str, dict[str, float]]:
    """Median and spread per contender, in seconds, and how many times faster ``ours`` is (median of the ratios of
    each round)."""
    result = {}
    for name, values in times.items():
        ratios = [theirs / mine for theirs, mine in zip(values, times[ours], strict=True)]
        result[name] = {
            "median_s": statistics.median(values),
            "min_s": min(values),
            "max_s": max(values),
            "rounds": len(values),
            "ours_is_faster_by": statistics.median(ratios),
        }
    return result


def peak_memory(code: str, *, baseline: str) -> int:
    """Bytes that ``code`` adds to the peak resident size of a fresh process over that of ``baseline`` (its imports)."""
    # The high-water mark of this address space: ru_maxrss would still remember the process that started it.
    measure = "\nprint([line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')][0])"

    def rss(text: str) -> int:
        environment = os.environ | {"PYTHONPATH": str(HERE)}
        result = subprocess.run([sys.executable, "-c", text + measure], capture_output=True, text=True, env=environment, timeout=1800)
        if result.returncode:
            raise RuntimeError(result.stderr)
        return 1024 * int(result.stdout.split()[-1])

    return rss(baseline + "\n" + code) - rss(baseline)


def machine() -> dict[str, Any]:
    """Processor, versions, commit and command."""
    processor = platform.processor()
    if Path("/proc/cpuinfo").exists():
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                processor = line.split(":", 1)[1].strip()
                break
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=HERE, capture_output=True, text=True).stdout.strip()
    from rnndyn_fast import build_info

    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "core": build_info(),
        "commit": commit,
        "command": " ".join(["pytest", *sys.argv[1:]]),
    }


def write_result(name: str, result: dict[str, Any]) -> Path:
    """Write ``$RNNDYN_BENCH_RESULTS/<name>.json`` (default benchmarks/results; quick runs do not count): all of it
    or nothing."""
    folder = Path(os.environ.get("RNNDYN_BENCH_RESULTS") or HERE / "results")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{name}.json"
    partial = folder / f".{name}.json.{os.getpid()}"
    partial.write_text(json.dumps({"machine": machine(), **result}, indent=2) + "\n")
    os.replace(partial, path)
    return path
