"""The op tests again, on a native core built with AddressSanitizer and UBSan; and that those find what they are for."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Kept, so that only what has changed is built again.
BUILD = ROOT / "build" / f"sanitized-{sys.implementation.cache_tag}"
_OPS = (
    "area_step",
    "readout_zones",
    "trajectory_norms",
    "winograd_conv",
    "amx_conv",
    "conv_epilogue",
    "fingerprint",
    "gate_step",
    "norm_step",
    "depthwise_conv",
    "channels_last",
    "ctrnn",
    "ctrnn_train",
)
OP_TESTS = tuple(f"tests/test_{op}.py" for op in _OPS)


def sanitize(*arguments: str, core: Path | None = None) -> subprocess.CompletedProcess[str]:
    """Build, and run tests where there are arguments."""
    environment = {k: v for k, v in os.environ.items() if k != "RNNDYN_ISA"}
    # Two at least: with one, nothing runs beside anything. Not more: the shapes are small.
    environment |= {"OMP_NUM_THREADS": "2", "OMP_WAIT_POLICY": "passive"} | ({"RNNDYN_SANITIZED_CORE": str(core)} if core else {})
    command = ["sh", str(ROOT / "scripts" / "sanitize.sh"), sys.executable, str(BUILD), *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)


@pytest.fixture(scope="module")
def build() -> Path:
    """The folder of a finished build."""
    BUILD.parent.mkdir(exist_ok=True)
    done = sanitize()
    assert done.returncode == 0, done.stdout + done.stderr
    return BUILD


def test_op_tests_pass_on_the_sanitised_core(build: Path) -> None:
    done = sanitize("-x", *OP_TESTS)
    assert done.returncode == 0, (done.stdout + done.stderr)[-20000:]
    assert "Sanitizer" not in done.stderr
    assert " passed" in done.stdout


FAULTS = {
    "a write past the end": (
        "for (int64_t i = 0; i < count; ++i) p[i] = lanes[i];",
        "for (int64_t i = 0; i <= count; ++i) p[i] = lanes[i];",
        "AddressSanitizer: heap-buffer-overflow",
    ),
    "a misaligned read": (
        "reinterpret_cast<const vec_unaligned*>(p)",
        "reinterpret_cast<const vec*>(p)",
        "runtime error: load of misaligned address",
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_found(build: Path, tmp_path: Path, fault: str) -> None:
    """In a copy of the portable kernels, linked with the rest of the sanitised build."""
    right, wrong, report = FAULTS[fault]
    sources = tmp_path / "csrc"
    shutil.copytree(ROOT / "csrc", sources)
    header = sources / "cpu" / "winograd_transform_kernel.h"
    text = header.read_text(encoding="utf-8")
    assert text.count(right) == 1, "the kernels have changed: plant the fault elsewhere"
    header.write_text(text.replace(right, wrong), encoding="utf-8")

    commands = json.loads((build / "compile_commands.json").read_text(encoding="utf-8"))
    # (The family that the tests below run.)
    kernels = "kernels_winograd_conv.cpp"
    known = [(c["file"], Path(c["directory"]), shlex.split(c["command"])) for c in commands]
    own = next(at for at, (file, _, words) in enumerate(known) if file.endswith(kernels) and "-DRNNDYN_ISA=portable" in words)
    words = known[own][2]
    compiler, flags = words[0], [str(sources) if str(ROOT / "csrc") in w else w for w in words[1 : words.index("-o")]]
    flags = [f"-I{word}" if word == str(sources) else word for word in flags]
    planted, core = tmp_path / "planted.o", tmp_path / "_core.so"
    subprocess.run([compiler, *flags, "-O0", "-c", sources / "cpu" / kernels, "-o", planted], check=True, timeout=300)
    # (Those of this build: the folder may hold objects of an earlier one.)
    others = [folder / words[words.index("-o") + 1] for at, (_, folder, words) in enumerate(known) if at != own]
    sanitizers = ["-fsanitize=address,undefined", "-fopenmp"]
    # (First: of functions that several families share, the linker takes the first.)
    subprocess.run([compiler, "-shared", *sanitizers, planted, *others, "-o", core], check=True, timeout=300)

    tests = ("tests/test_winograd_conv.py", "-x", "-s", "-k", "test_forward_and_gradients and portable and not avx")
    done = sanitize(*tests, core=core)
    assert done.returncode != 0
    assert report in done.stderr, (done.stdout + done.stderr)[-20000:]
    assert "winograd_transform_kernel.h" in done.stderr
