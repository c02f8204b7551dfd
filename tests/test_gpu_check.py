"""The script that a machine with a GPU runs, dry: every step of it, with the kernels in the SIMT harness."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import simt_harness

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "gpu_check.sh"
pytestmark = pytest.mark.skipif("RNNDYN_TEST_DEVICE" in os.environ, reason="this is that script")


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "PYTHON": sys.executable, "PYTHONPATH": f"{ROOT}:{ROOT / 'tests'}", **environment}
    return subprocess.run(["sh", str(SCRIPT), *arguments], capture_output=True, text=True, timeout=540, env=variables)


def test_dry_run(tmp_path: Path) -> None:
    module = simt_harness.build().__file__
    out = tmp_path / "results"
    done = run("--dry-run", str(out), RNNDYN_SIMT_MODULE=str(module))
    logs = "\n".join(p.read_text(encoding="utf-8")[-3000:] for p in sorted(out.glob("*.log")))
    assert done.returncode == 0, done.stdout + done.stderr + logs
    summary = (out / "summary.txt").read_text(encoding="utf-8").splitlines()
    steps = ["build", "tests", "sanitizer_memcheck", "sanitizer_racecheck", "sanitizer_initcheck", "sanitizer_synccheck", "benchmarks"]
    assert [line.partition(":")[0] for line in summary] == steps
    assert all("passed" in line for line in summary)
    results = {p.stem: json.loads(p.read_text(encoding="utf-8")) for p in out.glob("cuda_*.json")}
    for name in ("lateral_additive", "topdown_multiplicative"):
        train, forward = results[f"cuda_train_{name}"], results[f"cuda_forward_{name}_2"]
        assert set(train["contenders"]) == set(forward["contenders"]) == {"rnndyn", "eager", "channels_last"}
        assert {"matrix_peak_tflops", "share_of_matrix_peak", "batch", "device"} <= set(train)
        assert set(results[f"cuda_train_memory_{name}"]["peak_bytes"]) == {"rnndyn", "eager", "channels_last"}
    assert {f"cuda_networks_{what}_lstm" for what in ("forward", "training", "memory")} <= set(results)
    assert "share_of_bandwidth" in results["cuda_readout_zones"]
    assert {name.rsplit("_", 1)[1] for name in results if name.startswith("cuda_conv")} == {"forward", "data", "weight"}
    assert json.loads((out / "machine.json").read_text(encoding="utf-8"))["torch"]
    with tarfile.open(f"{out}.tar.gz") as archive:
        assert "results/summary.txt" in archive.getnames()


def test_without_a_device_it_says_so_and_a_wrong_call_is_refused(tmp_path: Path) -> None:
    done = run(str(tmp_path / "results"), CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 1
    assert "no usable CUDA device" in done.stderr
    assert run().returncode == 2
