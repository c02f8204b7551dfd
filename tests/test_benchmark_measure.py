"""What the benchmarks measure with."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "measure.py"


@pytest.fixture
def measure() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_of_benchmarks", PATH)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_contenders_alternate_and_busy_cores_are_counted(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)
    calls: list[str] = []
    times = measure.alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, rounds=3, warmup=1)
    assert calls == ["a", "b", *"abbaab"]
    clock = iter([0.0, 2.0, 2.0, 3.0])
    work = iter([0.0, 3.0, 3.0, 3.5])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(measure.time, "process_time", lambda: next(work))
    times = measure.alternate({"ours": int, "theirs": int}, rounds=1, warmup=0)
    found = measure.summary(times, "ours")
    assert found["theirs"]["ours_is_faster_by"] == 0.5
    assert (found["ours"]["cores"], found["theirs"]["cores"]) == (1.5, 0.5)


def test_threads_that_share_a_core_are_not_measured(measure: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    monkeypatch.setattr(measure, "QUICK", False)
    with pytest.raises(RuntimeError, match="OMP_WAIT_POLICY=passive: threads that sleep between calls share a core"):
        measure.alternate({"ours": int}, rounds=1)
