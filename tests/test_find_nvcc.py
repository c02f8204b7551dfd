"""How the build finds nvcc and decides whether it works with the host compiler: csrc/cuda/find_nvcc.cmake, run by itself on stand-ins."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
CMAKE = shutil.which("cmake", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
VERSION = 'case "$*" in *--version*) echo "Cuda compilation tools, release 13.0, V13.0.88"; exit 0;; esac\n'
SCRIPT = """
set(CMAKE_CXX_COMPILER "{compiler}")
set(CMAKE_CXX_COMPILER_VERSION 99.1)
set(Python_EXECUTABLE "{python}")
include("{file}")
message("nvcc=${{RNNDYN_NVCC}} version=${{RNNDYN_NVCC_VERSION}} reason=${{reason}}")
"""


def program(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("#!/bin/sh\n" + text, encoding="utf-8")
    path.chmod(0o755)
    return path


def found(folder: Path, site: Path, **environment: str) -> str:
    """What the build would say, where nothing but cmake is on the PATH."""
    python = program(folder / "python", f"echo '{site}'\n")
    script = folder / "run.cmake"
    text = SCRIPT.format(compiler="/opt/some/c++", python=python, file=ROOT / "csrc" / "cuda" / "find_nvcc.cmake")
    script.write_text(text, encoding="utf-8")
    assert CMAKE is not None, "the build needs cmake"
    system = {"PATH": "/bin", "CMAKE_FIND_USE_CMAKE_SYSTEM_PATH": "OFF"}
    done = subprocess.run([CMAKE, "-P", str(script)], capture_output=True, text=True, cwd=folder, env=system | environment, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stderr.strip().splitlines()[-1]


@pytest.mark.parametrize("place", ["nvidia/cu13/bin", "nvidia/cuda_nvcc/bin"])
def test_in_wheels_of_nvidia(place: str, tmp_path: Path) -> None:
    nvcc = program(tmp_path / "site" / place / "nvcc", VERSION)
    assert found(tmp_path, tmp_path / "site") == f"nvcc={nvcc} version=13.0 reason="


@pytest.mark.parametrize("variable", ["CONDA_PREFIX", "CUDA_HOME"])
def test_where_the_environment_says(variable: str, tmp_path: Path) -> None:
    nvcc = program(tmp_path / "there" / "bin" / "nvcc", VERSION)
    assert found(tmp_path, tmp_path, **{variable: str(tmp_path / "there")}) == f"nvcc={nvcc} version=13.0 reason="


def test_the_compiler_of_the_build_is_the_one_that_nvcc_gets(tmp_path: Path) -> None:
    program(tmp_path / "there" / "bin" / "nvcc", VERSION + 'case "$*" in *"-ccbin /opt/some/c++"*) exit 0;; *) exit 1;; esac\n')
    assert found(tmp_path, tmp_path, CUDA_HOME=str(tmp_path / "there")).endswith("reason=")


def test_compilers_that_do_not_go_together_are_one_line(tmp_path: Path) -> None:
    said = "/usr/include/crt/host_config.h:143:2: error: #error -- unsupported GNU version! gcc versions later than 15 are not supported!"
    nvcc = program(tmp_path / "there" / "bin" / "nvcc", f"{VERSION}echo 'In file included'; echo '{said}' >&2; exit 1\n")
    line = found(tmp_path, tmp_path, CUDA_HOME=str(tmp_path / "there"))
    assert f"reason={nvcc} 13.0 does not work with /opt/some/c++ 99.1 ({said}; " in line
    assert "In file included" in (tmp_path / "nvcc_probe.log").read_text(encoding="utf-8")


def test_an_old_one_is_named(tmp_path: Path) -> None:
    nvcc = program(tmp_path / "there" / "bin" / "nvcc", VERSION.replace("13.0", "11.8"))
    line = found(tmp_path, tmp_path, CUDA_HOME=str(tmp_path / "there"))
    assert line.endswith(f"reason={nvcc} is version '11.8', and 12.4 or later is needed")
