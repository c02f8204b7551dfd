"""Pages with benchmark results say what the results say, and results name no machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
PAGES = ("README.md", "docs/kernels.md", "docs/training.md", "docs/benchmarks.md")


@pytest.fixture
def benchmark_tables(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import benchmark_tables

    return benchmark_tables


def _results(folder: Path) -> None:
    """A file of convolutions and one of a network."""
    machine = {"processor": "A processor", "threads": 2, "python": "3.11", "torch": "2.13", "commit": "abc", "command": "pytest b.py"}
    times = {"median_s": 0.002, "min_s": 0.001, "max_s": 0.003, "rounds": 15, "relative_error": 1e-6}
    ratios = {"rnndyn": 1.0, "rnndyn_high": 1.0, "rnndyn_bf16": 1.0, "contiguous": 4.0, "channels_last": 3.0, "bf16": 1.5}
    one = {"name": "v2 lateral", "map": 32, "source": 128, "target": 128, "engine": "winograd F(4x4,3x3)", "direct_gflop": 4.8}
    one |= {"done_gflop": 1.2, "packing_s": {"forward": 1e-4, "backward": 2e-4}}
    one |= {"passes": {"forward": {name: {**times, "ours_is_faster_by": ratio} for name, ratio in ratios.items()}}}
    convolutions = {"machine": machine, "what": "blt_net_64", "kernel": 3, "batch": 16, "convolutions": [one]}
    (folder / "convolutions.json").write_text(json.dumps(convolutions), encoding="utf-8")
    contenders = {name: {**times, "ours_is_faster_by": ratio} for name, ratio in (("rnndyn", 1.0), ("eager", 5.0))}
    rollout = {"machine": machine, "what": "forward", "contenders": contenders}
    (folder / "rollout.json").write_text(json.dumps(rollout), encoding="utf-8")


def test_convolutions_and_networks_stand_in_their_sections(benchmark_tables: Any, tmp_path: Path) -> None:
    _results(tmp_path)
    cell = "2 ms, 2400, done 600, x 3; high 2 ms, x 3; bf16 2 ms, x 1"
    row = f"| blt_net_64 v2 lateral | 32 x 32 | 128 to 128 | winograd F(4x4,3x3) | {cell} | 100 us + 200 us |"
    page = benchmark_tables.renewed(f"before\n{benchmark_tables.KERNELS[0]}\nold\n{benchmark_tables.KERNELS[1]}\nafter", tmp_path)
    assert row in page.splitlines()
    assert "kernel 3, batch 16, A processor" in page
    assert "old" not in page
    assert "eager" not in page
    whole = benchmark_tables.renewed(f"{benchmark_tables.GENERATED}\nold", tmp_path)
    assert row in whole.splitlines()
    assert "| forward | 2 ms (1 ms - 3 ms) | 2 ms (1 ms - 3 ms), x 5 |" in whole.splitlines()
    assert "commit abc: `pytest b.py`." in whole
    assert whole.count(benchmark_tables.NOT_YET) == 5  # memory, cells, continuous-time networks, analysis and extraction
    assert "v2 lateral" not in benchmark_tables.summary(tmp_path)


def test_extraction_is_told_over_the_bare_forward(benchmark_tables: Any, tmp_path: Path) -> None:
    machine = {"processor": "A processor", "threads": 2, "python": "3.11", "torch": "2.13", "commit": "abc", "command": "pytest b.py"}
    times = {"median_s": 1.0, "min_s": 1.0, "max_s": 2.0}
    contenders = {"bare_forward": {**times, "ours_is_faster_by": 1.0}, "all_reducers": {**times, "ours_is_faster_by": 1.063}}
    one = {"machine": machine, "section": "extraction", "batch": 64}
    (tmp_path / "a.json").write_text(json.dumps({**one, "what": "a network", "contenders": contenders}), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({**one, "what": "peak", "peak_bytes": {"10 samples": 2**23}}), encoding="utf-8")
    page = benchmark_tables.whole_page(tmp_path)
    assert "| a network | 1 s (1 s - 2 s) | 1 s (1 s - 2 s), +6.3% |" in page.splitlines()
    assert "| peak | 8 MiB |" in page.splitlines()


def test_times_and_memory_of_cells_share_a_section(benchmark_tables: Any, tmp_path: Path) -> None:
    machine = {"processor": "A processor", "threads": 2, "python": "3.11", "torch": "2.13", "commit": "abc", "command": "pytest b.py"}
    times = {"median_s": 1.0, "min_s": 1.0, "max_s": 2.0}
    one = {"machine": machine, "section": "networks", "what": "forward, gru"}
    contenders = {"rnndyn": {**times, "ours_is_faster_by": 1.0}, "eager": {**times, "ours_is_faster_by": 3.2}}
    (tmp_path / "a.json").write_text(json.dumps({**one, "contenders": contenders}), encoding="utf-8")
    (tmp_path / "b.json").write_text(json.dumps({**one, "peak_bytes": {"rnndyn": 2**23, "eager": 2**24}}), encoding="utf-8")
    section = benchmark_tables.whole_page(tmp_path).partition("## Cells and further networks")[2].partition("## ")[0]
    assert "| forward, gru | 1 s (1 s - 2 s) | 1 s (1 s - 2 s), x 3.2 |" in section.splitlines()
    assert "| forward, gru | 8 MiB | 16 MiB, 50% |" in section.splitlines()


def test_the_summary_has_a_row_of_each_network_and_of_other_work(benchmark_tables: Any, tmp_path: Path) -> None:
    assert benchmark_tables.summary(tmp_path) == ""
    machine = {"processor": "A processor", "threads": 2, "python": "3.11", "torch": "2.13"}
    ratios = {"rnndyn": 1.0, "eager": 5.0, "eager_channels_last": 4.0, "compiled": 3.5}
    contenders = {name: {"median_s": 0.2 * x, "min_s": 0.1, "max_s": 9.0, "ours_is_faster_by": x} for name, x in ratios.items()}
    for number, (commit, result) in enumerate(
        (
            ("abc", {"what": "forward of one_net, lateral_additive", "contenders": contenders}),
            ("def", {"what": "peak memory of training, one_net, lateral_additive", "peak_bytes": {"rnndyn": 3, "eager": 10}}),
            ("abc", {"what": "a network's epoch", "section": "ctrnn", "contenders": contenders}),
        )
    ):
        (tmp_path / f"{number}.json").write_text(json.dumps({"machine": {**machine, "commit": commit}, **result}), encoding="utf-8")
    lines = benchmark_tables.summary(tmp_path).splitlines()
    assert "| one_net, lateral | 200 ms: x 5, x 3.5 |  |  |  | 30% |" in lines
    assert "| a network's epoch | rnndyn 200 ms; eager 1 s, x 5; eager channels last 800 ms, x 4; compiled 700 ms, x 3.5 |" in lines
    assert any(line.endswith("commit abc, def.") for line in lines)


def test_pages_are_those_of_the_results() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_tables.py"), "--check", *PAGES]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("up to date") == len(PAGES)


def test_a_page_that_differs_is_reported(benchmark_tables: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text(benchmark_tables.GENERATED + "\nsomething else\n", encoding="utf-8")
    command = [sys.executable, str(ROOT / "scripts" / "benchmark_tables.py")]
    done = subprocess.run([*command, "--check", str(page)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 1
    assert "differs" in done.stdout
    subprocess.run([*command, "--update", str(page)], check=True, timeout=60)
    assert page.read_text(encoding="utf-8") == benchmark_tables.whole_page()


def _nodes(value: Any) -> list[str]:
    """Every non-empty host name in a result."""
    if isinstance(value, dict):
        return [v for k, v in value.items() if k in ("node", "hostname") and v] + [n for v in value.values() for n in _nodes(v)]
    return [n for v in value for n in _nodes(v)] if isinstance(value, list) else []


def test_results_name_no_machine(tmp_path: Path) -> None:
    """Those that are committed, and those that pytest-benchmark writes with benchmarks/conftest.py."""
    for path in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert _nodes(json.loads(path.read_text(encoding="utf-8"))) == [], path.name
    (tmp_path / "conftest.py").write_text((ROOT / "benchmarks" / "conftest.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "measure.py").write_text((ROOT / "benchmarks" / "measure.py").read_text(encoding="utf-8"), encoding="utf-8")
    (tmp_path / "bench_one.py").write_text("def test_one(benchmark):\n    benchmark.pedantic(int)\n", encoding="utf-8")
    command = [sys.executable, "-m", "pytest", "bench_one.py", "-q", "-p", "no:cacheprovider", "--benchmark-json=one.json"]
    # (Not as a part of a run in several processes, in which nothing is timed.)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120, env=environment)
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads((tmp_path / "one.json").read_text(encoding="utf-8"))
    assert _nodes(result) == []
    assert "processor" in result["machine_info"]["rnndyn"]


def test_tables_of_training(benchmark_tables: Any, tmp_path: Path) -> None:
    """Readers by size, processes, communication; what is not measured is said to be so, and other pages leave them out."""
    page = f"before\n{benchmark_tables.TRAINING[0]}\nold\n{benchmark_tables.TRAINING[1]}\nafter"
    assert benchmark_tables.renewed(page, tmp_path).count("Not yet measured") == 3
    machine = {"processor": "A processor", "cores": 2, "threads": 2, "python": "3.11", "torch": "2.13", "commit": "abc", "command": "c"}
    shared = {"machine": machine, "batch": 32, "size": 64}
    results = {
        "training_data_64": {**shared, "section": "training data", "images_per_s": {"training step": 11.04, "HDF5": 4058.3}},
        "training_data_224": {**shared, "section": "training data", "images_per_s": {"HDF5": 301.0}},
        "training_processes": {
            **shared, "section": "training processes", "rounds": 5, "speed_up": 1.044,
            "images_per_s": {"one process, 2 threads": {"median": 11.0, "min": 10.9, "max": 11.2}},
        },
        "training_overlap": {
            **shared, "section": "training processes", "gradient_bytes": 2**25, "bucket_bytes": [2**20, 2**24], "waited_s": 0.05,
            "buckets_ready": [[0.98, 1.0], [0.99, 1.0], [0.995, 1.0]],
            "contenders": {"with the all-reduce": {"median_s": 3.2}, "without": {"median_s": 3.1}},
        },
    }  # fmt: skip
    for name, result in results.items():
        (tmp_path / f"{name}.json").write_text(json.dumps(result), encoding="utf-8")
    told = benchmark_tables.renewed(page, tmp_path)
    for line in (
        "| images/s | 64 px | 224 px |", "| training step | 11 |  |", "| HDF5 | 4,058 | 301 |",
        "| one process, 2 threads | 11 | 10.9 to 11.2 |",
        "Two processes are 1.04 times as fast (median of 5 pairs in turns; batch 32, 64 px",
        "| gradients | 32 MiB in 2 buckets |", "| first bucket ready, share of the time until the last is | 0.990 |",
        "| wait for the all-reduce after the last | 50 ms |", "| training step with the all-reduce | 3.2 s |",
    ):  # fmt: skip
        assert line in told, line
    assert "old" not in told
    assert "one process, 2 threads" not in benchmark_tables.whole_page(tmp_path)
