"""Builds for the GPU at hand and checks, measures and profiles the CUDA kernels there, within nine minutes.

sh scripts/gpu_check.sh [--dry-run] [--seconds S] FOLDER [STEP...]

FOLDER gets summary.json (the machine, each step's end, seconds and last lines), benchmarks.json (every row, and the engines as they
were timed), profile.json (times of the kernels of a training step) and the logs build.log, checks.log, benchmarks.log and sanitizer.log:
results as they come, each file at most 16 MiB. Steps have a limit each and are interrupted (SIGINT) at it, so that what they found is
printed. One that fails ends nothing; where the kernels cannot be built, the other steps run without them. A second call with the same
FOLDER runs, within four minutes, the steps named or else those that have not passed; the build is kept in build/gpu_check.

Needs Python with torch, numpy, pybind11, pytest, cmake and ninja, nvcc 12.4 or later, and nothing from the network. --dry-run: every step
without a GPU, with the package as it is installed and the kernels in the tests' SIMT harness, few tests and tiny benchmarks.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILD = ROOT / "build" / "gpu_check"
FIRST_SECONDS, LATER_SECONDS = 540, 240
SLOWER_DRY = 4  # steps have that many times as long where the kernels run in the harness
GRACE_SECONDS = 10  # from an interrupt to the end by force
MOST_BYTES = 16 << 20
KERNELS = "area_step readout_zones recurrent_conv gate_step norm_step depthwise_conv ctrnn trajectory_norms odd_offsets"
OPS = [f"tests/test_{op}_cuda.py" for op in KERNELS.split()]
ROLLOUTS = [f"tests/test_{name}.py" for name in ("rollout_cuda", "rollout_device", "networks_cuda", "train_device")]
# Of the Triton kernels, each of which is compiled first: forward, gradients and a whole rollout, in all precisions.
TRITON = [
    "tests/triton_conv_cases.py",
    ROLLOUTS[1],
    "-k",
    "1x33x5x3 or 2x16x5x7 or several_maps or triton-torch.float16-topdown_multiplicative",
]
SMALL = "n1c33h5w7 or n2c8h5w3 or 2-9-48-40 or 2x24x6x4 or splits or lstm or partial or buffers_in_place or threads_changes_no_bit"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]


@dataclass
class Step:
    """A command with its limit in seconds."""

    name: str
    seconds: int
    log: str
    command: list[str]
    environment: dict[str, str] = field(default_factory=dict)


def said(*command: str) -> str | None:
    """What a program prints; None where there is none."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return None


def machine() -> dict[str, Any]:
    """Versions and devices; the process that asks for them ends, and gives their memory back."""
    code = (
        "import json, torch\n"
        "n = torch.cuda.device_count()\n"
        "print(json.dumps({'devices': [torch.cuda.get_device_name(i) for i in range(n)],\n"
        "  'capability': '%d%d' % torch.cuda.get_device_capability() if n else None, 'torch': torch.__version__,\n"
        "  'torch_cuda': torch.version.cuda, 'cudnn': torch.backends.cudnn.version()}))"
    )
    found = said(sys.executable, "-c", code)
    about: dict[str, Any] = json.loads(found) if found else {"devices": [], "capability": None}
    about["driver"] = said("nvidia-smi", "--query-gpu=driver_version,clocks.sm,power.limit", "--format=csv,noheader")
    about |= {"python": platform.python_version(), "nvcc": said("nvcc", "--version")}
    about["commit"] = said("git", "-C", str(ROOT), "describe", "--always")
    return about


def build(capability: str) -> int:
    """For one architecture and one instruction set of the CPU, installed beside a copy of the Python files: first without the kernels, so
    that the package is there whatever becomes of these. Returns 0, or 3 without the kernels, or 1."""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    cmake, ninja = (shutil.which(name, path=path) for name in ("cmake", "ninja"))
    if cmake is None or ninja is None:
        print("build: cmake and ninja are needed", file=sys.stderr)
        return 1
    pybind11 = said(sys.executable, "-m", "pybind11", "--cmakedir")
    installed = BUILD / "installed"
    shutil.rmtree(installed, ignore_errors=True)
    left_out = shutil.ignore_patterns("__pycache__", "*.so")
    shutil.copytree(ROOT / "rnndyn_fast", installed / "rnndyn_fast", ignore=left_out)
    for cuda in ("OFF", "ON"):
        settings = {
            "CMAKE_MAKE_PROGRAM": ninja, "RNNDYN_ISAS": "portable", "RNNDYN_CUDA": cuda, "RNNDYN_CUDA_ARCHITECTURES": capability,
            "SKBUILD_PROJECT_VERSION": "0.1.0", "Python_EXECUTABLE": sys.executable, "pybind11_DIR": pybind11,
        }  # fmt: skip
        configure = [cmake, "-S", str(ROOT), "-B", str(BUILD), "-G", "Ninja", *(f"-D{name}={value}" for name, value in settings.items())]
        commands = (configure, [cmake, "--build", str(BUILD)], [cmake, "--install", str(BUILD), "--prefix", str(installed)])
        if any(subprocess.run(command).returncode for command in commands):
            print(f"build: failed with RNNDYN_CUDA={cuda}", file=sys.stderr, flush=True)
            return 1 if cuda == "OFF" else 3
    return 0


def steps(capability: str | None, results: Path, dry: bool) -> list[Step]:
    """In the order in which they matter. Where the device's time ends early, the first ones are there."""
    tests = {} if dry else {"RNNDYN_TEST_DEVICE": "cuda"}
    timed = {"RNNDYN_BENCH_RESULTS": str(results), "RNNDYN_CACHE": str(results), "RNNDYN_MEASURE": "1"}
    few, listed = (["-k", "lstm and float16"], ["--collect-only"]) if dry else (["-k", "not triton"], [])
    interpreted = {"TRITON_INTERPRET": "1"} if dry else {}
    triton = ["tests/triton_conv_cases.py", "-k", "several_maps and float16"] if dry else TRITON
    bench = [*PYTEST, "-s", "benchmarks/bench_rollout_cuda.py"]
    command = [sys.executable, str(Path(__file__).resolve()), "--build", str(capability)]
    if dry:
        command = [sys.executable, "-c", "import rnndyn_fast; print(rnndyn_fast.build_info())"]
    script = [sys.executable, "benchmarks/device_step.py"]
    made = [
        Step("build", 140, "build.log", command),
        # Of the vendor's convolutions and ours, without the time that measuring and compiling takes.
        Step("smoke", 30, "checks.log", [*script, "smoke"], {**timed, "RNNDYN_MEASURE": "0"}),
        Step("tests", 85, "checks.log", [*PYTEST, *OPS, *ROLLOUTS, *few], tests),
        Step("triton", 60, "checks.log", [*PYTEST, *triton], {**tests, **interpreted}),
        # Before the benchmarks, which use these times.
        Step("engines", 60, "benchmarks.log", [*script, "engines"], timed),
        Step("benchmarks", 80, "benchmarks.log", [*bench, "-k", "not test_convolution", "benchmarks/bench_networks_cuda.py"], timed),
        Step("compiled", 55, "benchmarks.log", [*bench, "-k", "test_training_step", *listed], {**timed, "RNNDYN_BENCH_COMPILE": "1"}),
    ]
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        sanitizer = ["compute-sanitizer", "--tool", tool, "--kernel-regex", "kns=rnndyn", "--error-exitcode", "9"]
        # Without torch's cache each tensor is an allocation of its own, past whose end nothing may be touched.
        alone = {**tests, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
        command = [*([] if dry else sanitizer), *PYTEST, *OPS, "-k", SMALL, "-x", *listed]
        made.append(Step(f"sanitizer_{tool}", 20, "sanitizer.log", command, alone))
    return [*made, Step("profile", 30, "benchmarks.log", [*script, "profile"], timed)]


def write(path: Path, content: Any) -> None:
    """All of it or nothing."""
    text = content if isinstance(content, str) else json.dumps(content, indent=1) + "\n"
    new = path.with_suffix(".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def collect(results: Path, out: Path) -> None:
    """Rows that benchmarks have left so far, in one file; the profile beside it."""
    rows = {}
    for path in sorted(results.glob("*.json")):
        try:
            rows[path.stem] = json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            continue  # half-written: whole at the next look
    profile = rows.pop("profile", None)
    write(out / "benchmarks.json", rows)
    if profile is not None:
        write(out / "profile.json", profile)


def run(step: Step, seconds: float, environment: Mapping[str, str], out: Path, results: Path) -> dict[str, Any]:
    """The command until its end or its limit, then interrupted, then ended."""
    start, interrupted = time.monotonic(), False
    with (out / step.log).open("ab") as log:
        log.write(f"\n==== {step.name}\n".encode())
        log.flush()
        place = log.tell()
        variables = {**environment, **step.environment}
        try:
            process = subprocess.Popen(step.command, stdout=log, stderr=log, cwd=ROOT, env=variables, start_new_session=True)
        except OSError as error:
            return {"end": "failed", "seconds": 0.0, "said": [str(error)]}
        while process.poll() is None:
            taken = time.monotonic() - start
            if taken > seconds + GRACE_SECONDS:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
            elif taken > seconds and not interrupted:
                interrupted = True
                os.killpg(process.pid, signal.SIGINT)
            time.sleep(0.2)
            collect(results, out)
    if (out / step.log).stat().st_size > MOST_BYTES:
        text = (out / step.log).read_bytes()
        (out / step.log).write_bytes(text[: MOST_BYTES // 2 - 100] + b"\n[...]\n" + text[-MOST_BYTES // 2 + 100 :])
        place = 0
    lines = (out / step.log).read_bytes()[place:].decode("utf-8", "replace").strip().splitlines()
    status = process.returncode
    end = "passed" if status == 0 else f"failed, exit status {status}"
    if interrupted:
        end = f"stopped after its {seconds:.0f} s"
    elif step.name == "build" and status == 3:
        end = "failed: without the kernels"
    return {"end": end, "seconds": round(time.monotonic() - start, 1), "said": lines[-12:]}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="gpu_check.sh", description=__doc__.split("\n", 1)[0])
    parser.add_argument("--dry-run", action="store_true", help="every step without a GPU")
    parser.add_argument("--seconds", type=int, help=f"for all steps; {FIRST_SECONDS}, or {LATER_SECONDS} in a second call")
    parser.add_argument("--build", metavar="CAPABILITY", help=argparse.SUPPRESS)
    parser.add_argument("folder", type=Path, nargs="?")
    parser.add_argument("step", nargs="*")
    options = parser.parse_args(arguments)
    if options.build:
        return build(options.build)
    if options.folder is None:
        parser.error("FOLDER is missing")
    begin, dry, out = time.monotonic(), options.dry_run, options.folder.resolve()
    out.mkdir(parents=True, exist_ok=True)
    results = BUILD / "results" / out.name
    results.mkdir(parents=True, exist_ok=True)
    summary: dict[str, Any] = {"machine": machine(), "steps": {}}
    later = (out / "summary.json").exists()
    if later:
        summary["steps"] = json.loads((out / "summary.json").read_text(encoding="utf-8")).get("steps", {})
    else:
        shutil.rmtree(results)
        results.mkdir()
    write(out / "summary.json", summary)
    capability = summary["machine"]["capability"]
    if capability is None and not dry:
        print(f"no usable CUDA device: see {out}/summary.json", file=sys.stderr)
        return 1
    known = steps(capability, results, dry)
    if unknown := sorted(set(options.step) - {step.name for step in known}):
        parser.error(f"STEP: expected some of {', '.join(step.name for step in known)}, got {', '.join(unknown)}")
    passed = {name for name, how in summary["steps"].items() if how["end"] == "passed"}
    chosen = [s for s in known if s.name == "build" or (s.name in options.step if options.step else s.name not in passed)]
    environment = dict(os.environ)
    if dry:
        environment["RNNDYN_BENCH_DEVICE"] = "harness"
        environment["PYTHONPATH"] = os.pathsep.join([str(ROOT), str(ROOT / "tests"), str(ROOT / "benchmarks")])
    else:
        # The package as built, not the source tree, which has no native modules.
        environment["PYTHONPATH"] = os.pathsep.join([str(BUILD / "installed"), str(ROOT / "tests"), str(ROOT / "benchmarks")])
        environment["PYTHONSAFEPATH"] = "1"
    slower = SLOWER_DRY if dry else 1
    deadline = begin + (options.seconds or slower * (LATER_SECONDS if later else FIRST_SECONDS)) - GRACE_SECONDS
    for step in chosen:
        left = deadline - time.monotonic()
        if left < 5:
            how: dict[str, Any] = {"end": "no time was left", "seconds": 0.0, "said": []}
        else:
            how = run(step, min(slower * step.seconds, left), environment, out, results)
        print(f"{step.name}: {how['end']}, {how['seconds']} s", flush=True)
        summary["steps"][step.name] = how
        collect(results, out)
        write(out / "summary.json", summary)
    return 0 if all(summary["steps"][step.name]["end"] == "passed" for step in chosen) else 1


if __name__ == "__main__":
    sys.exit(main())
