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
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

HERE = Path(__file__).resolve().parent

QUICK = os.environ.get("RNNDYN_BENCH_QUICK") == "1"  # tiny sizes, to check that the benchmarks run


class Seconds(float):
    """Of a clock on the wall. ``cores``: processor time over them, so how many cores were busy."""

    cores: float


def alternate(contenders: Mapping[str, Callable[[], Any]], rounds: int, warmup: int = 3) -> dict[str, list[Seconds]]:
    """Time of each contender, one call of each per round, so that a drifting machine meets all of them alike. (The first call of a rollout
    plans it, and touches its memory.)

    Raises:
        RuntimeError: OMP_WAIT_POLICY is passive: Linux then often wakes all threads on one core, and what is timed is no longer all cores.
    """
    if os.environ.get("OMP_WAIT_POLICY", "").lower() == "passive" and not QUICK:
        raise RuntimeError("OMP_WAIT_POLICY=passive: threads that sleep between calls share a core; unset it to measure")
    for _ in range(warmup):
        for run in contenders.values():
            run()
    times: dict[str, list[Seconds]] = {name: [] for name in contenders}
    for i in range(rounds):
        names = list(contenders)
        for name in names if i % 2 == 0 else reversed(names):
            start, before = time.perf_counter(), time.process_time()
            contenders[name]()
            seconds = Seconds(time.perf_counter() - start)
            seconds.cores = (time.process_time() - before) / seconds
            times[name].append(seconds)
    return times


def summary(times: Mapping[str, Sequence[float]], ours: str) -> dict[str, dict[str, float]]:
    """Median and spread per contender, in seconds, how many times faster ``ours`` is (median of the ratios of
    each round), and where that was measured how many cores were busy."""
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
        cores = [value.cores for value in values if isinstance(value, Seconds)]
        if cores:
            result[name]["cores"] = statistics.median(cores)
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
