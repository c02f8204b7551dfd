"""The script that a machine with a GPU runs, dry: every step of it, with the kernels in the SIMT harness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import simt_harness

from rnndyn_fast.ops import triton_conv

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif("RNNDYN_TEST_DEVICE" in os.environ, reason="this is that script")
STEPS = ["build", "smoke", "tests", "triton", "engines", "benchmarks", "compiled", "sanitizer_memcheck", "sanitizer_racecheck",
         "sanitizer_initcheck", "sanitizer_synccheck", "profile"]  # fmt: skip

sys.path.insert(0, str(ROOT / "scripts"))
import gpu_check  # noqa: E402

sys.path.pop(0)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, **environment}
    return subprocess.run(["sh", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=1200, env=variables)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_dry_run(tmp_path: Path) -> None:
    module = simt_harness.build().__file__
    out = tmp_path / "results"
    done = run("--dry-run", str(out), RNNDYN_SIMT_MODULE=str(module))
    summary = read(out / "summary.json")
    ends = {name: how["end"] for name, how in summary["steps"].items()}
    assert ends == dict.fromkeys(STEPS, "passed"), (done.stdout, summary)
    assert list(ends) == STEPS
    assert done.returncode == 0
    assert summary["machine"]["torch"]
    files = {p.name: p.stat().st_size for p in out.iterdir()}
    assert set(files) == {"summary.json", "benchmarks.json", "profile.json", "build.log", "checks.log", "benchmarks.log", "sanitizer.log"}
    assert max(files.values()) <= gpu_check.MOST_BYTES
    rows = read(out / "benchmarks.json")
    for name in ("lateral_additive", "topdown_multiplicative"):
        train, forward = rows[f"cuda_train_{name}"], rows[f"cuda_forward_{name}_2"]
        assert set(train["contenders"]) == set(forward["contenders"]) == {"rnndyn", "eager", "channels_last"}
        assert {"matrix_peak_tflops", "share_of_matrix_peak", "batch", "device"} <= set(train)
        assert set(rows[f"cuda_train_memory_{name}"]["peak_bytes"]) == {"rnndyn", "eager", "channels_last"}
    assert {f"cuda_networks_{what}_lstm" for what in ("forward", "training", "memory")} <= set(rows)
    assert "share_of_bandwidth" in rows["cuda_readout_zones"]
    assert "engines" in rows
    checks = (out / "checks.log").read_text(encoding="utf-8").split("==== triton")[1]
    assert "1 passed" in checks or triton_conv.unavailable() is not None, checks
    assert all(row["microseconds"] > 0 and row["launches"] > 0 for row in read(out / "profile.json")["kernels"])
    # A second call runs what is named, keeps the rest, and refuses what there is not.
    again = run("--dry-run", str(out), "engines", RNNDYN_SIMT_MODULE=str(module))
    assert again.returncode == 0, again.stdout + again.stderr
    assert [line.partition(":")[0] for line in again.stdout.splitlines()] == ["build", "engines"]
    assert list(read(out / "summary.json")["steps"]) == STEPS
    assert read(out / "benchmarks.json").keys() == rows.keys()
    assert run("--dry-run", str(out), "speed").returncode == 2


def test_a_step_that_takes_too_long_is_interrupted_and_what_it_found_is_kept(tmp_path: Path) -> None:
    code = """import time
print('found', flush=True)
try:
    time.sleep(60)
except KeyboardInterrupt:
    print('so far: 3')
    raise SystemExit(5)
"""
    step = gpu_check.Step("slow", 1, "checks.log", [sys.executable, "-c", code])
    how = gpu_check.run(step, 1.5, os.environ, tmp_path, tmp_path)
    assert how["end"] == "stopped after its 2 s"
    assert how["said"] == ["found", "so far: 3"]
    assert how["seconds"] < 8
    failing = gpu_check.Step("failing", 9, "checks.log", [sys.executable, "-c", "import sys; print('why'); sys.exit(4)"])
    how = gpu_check.run(failing, 9, os.environ, tmp_path, tmp_path)
    assert (how["end"], how["said"]) == ("failed, exit status 4", ["why"])
    missing = gpu_check.run(gpu_check.Step("missing", 9, "checks.log", ["no-such-program"]), 9, os.environ, tmp_path, tmp_path)
    assert missing["end"] == "failed"
    assert "no-such-program" in missing["said"][0]


def test_rows_are_collected_as_they_come(tmp_path: Path) -> None:
    results, out = tmp_path / "results", tmp_path / "out"
    results.mkdir()
    out.mkdir()
    (results / "cuda_one.json").write_text('{"x": 1}', encoding="utf-8")
    (results / "half.json").write_text('{"x": ', encoding="utf-8")
    gpu_check.collect(results, out)
    assert read(out / "benchmarks.json") == {"cuda_one": {"x": 1}}


def test_the_first_steps_are_those_that_matter_and_all_fit(tmp_path: Path) -> None:
    made = gpu_check.steps("90", tmp_path, False)
    assert [s.name for s in made] == STEPS
    assert sum(s.seconds for s in made if not s.name.startswith("sanitizer")) <= gpu_check.FIRST_SECONDS
    for step in made:
        if step.name.startswith("sanitizer"):
            assert step.command[0] == "compute-sanitizer"
            assert step.command[3:5] == ["--kernel-regex", "kns=rnndyn"]


def test_without_a_device_it_says_so_and_a_wrong_call_is_refused(tmp_path: Path) -> None:
    done = run(str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no usable CUDA device" in done.stderr
    assert run().returncode == 2
