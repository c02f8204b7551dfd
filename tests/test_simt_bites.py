"""Faults planted in a copy of the real kernels: the harness, or the comparison with float64, finds each."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import simt_harness

ROOT = Path(__file__).resolve().parents[1]
SMALL, LARGE = "test_forward[torch.float16-3x72x4x6-40k5s1+72k3s1-bias-2added]", "test_forward_in_large_tiles[18x8x31x31-8k1s1-bias]"
# File, what stands there, what is put in its place, the report, and the test that it takes.
FAULTS = {
    "no barrier before the stage is used": (
        "recurrent_conv_forward.cu",
        "    __syncthreads();                   // everybody's have",
        "    // everybody's have",
        "on its way|race",
        SMALL,
    ),
    "a tap past the map's edge": (
        "recurrent_conv_forward.cu",
        "return at >= 0 && at < size;",
        "return at >= 0 && at <= size;",
        "out-of-bounds read",
        SMALL,
    ),
    "no swizzle where rows are read": (
        "matrix_tile.h",
        "a_tile + swizzled<kDepth / 8>(row0 + i * 16 + lane % 16, k / 8 + lane / 16)",
        "a_tile + (row0 + i * 16 + lane % 16) * (kDepth / 8) + k / 8 + lane / 16",
        "times what is allowed",
        SMALL,
    ),
    "no opt-in where dynamic shared memory alone fits without": (
        "device.h",
        "counts too.\n  if (shared_bytes > 0) allow_dynamic_shared(",
        "counts too.\n  if (shared_bytes > 48 * 1024) allow_dynamic_shared(",
        "49664 bytes of static and dynamic shared memory, and a block may have 49152",
        LARGE,
    ),
}


@pytest.mark.skipif("RNNDYN_TEST_DEVICE" in os.environ, reason="the harness is not for a device")
@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_in_a_kernel_is_found(fault: str, tmp_path: Path) -> None:
    simt_harness.build()
    file, right, wrong, report, case = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    text = (sources / "cuda" / file).read_text(encoding="utf-8")
    assert text.count(right) == 1, "the kernels have changed: plant the fault elsewhere"
    (sources / "cuda" / file).write_text(text.replace(right, wrong), encoding="utf-8")

    planted, module = tmp_path / "planted.o", tmp_path / f"_simt{sysconfig.get_config_var('EXT_SUFFIX')}"
    flags = ["-std=c++17", "-O1", "-fsanitize=thread", "-fPIC", "-fvisibility=hidden", f"-I{sources}", "-xc++"]
    kernel = sources / "cuda" / "recurrent_conv_forward.cu"
    subprocess.run(["c++", *flags, "-c", kernel, "-o", planted], check=True, timeout=300)
    others = [path for path in simt_harness.BUILD.rglob("*.o") if "_simt.dir" in str(path) and kernel.name not in path.name]
    assert len(others) > 5
    subprocess.run(["c++", "-shared", *others, planted, "-o", module], check=True, timeout=300)

    case = f"tests/test_recurrent_conv_cuda.py::{case}"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", case]
    environment = os.environ | {"RNNDYN_SIMT_MODULE": str(module)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, cwd=ROOT, env=environment)
    assert done.returncode == 1, done.stdout + done.stderr
    errors = [line for line in done.stdout.splitlines() if line.startswith("E  ")]
    assert re.search(report, "\n".join(errors)), done.stdout
