"""What all tests share: where the golden files are, and networks small enough to check exhaustively."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import simt_harness
import torch

from rnndyn_fast import _core, build_info

GOLDEN = Path(os.environ.get("RNNDYN_GOLDEN") or Path(__file__).resolve().parents[2] / "shared" / "golden")


@lru_cache(maxsize=8)
def golden(name: str) -> dict[str, np.ndarray]:
    """The arrays of a golden file. Without the file: a skip that says so, and in CI a failure."""
    path = GOLDEN / f"{name}.npz"
    if not path.exists():
        message = f"golden file {path} is not there (set RNNDYN_GOLDEN to the folder that has it)"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with np.load(path) as data:
        return {key: data[key] for key in data.files}


def golden_module(name: str) -> Any:
    """A helper module that lies beside the golden files."""
    path = GOLDEN / f"{name}.py"
    if not path.exists():
        golden(name)  # skips or fails
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# Files that take 20 s or longer, the longest first: they are marked slow, and begin first, so that none is left alone at the end of a run
# that has several processes.
SLOW = (
    "test_sanitized", "test_repository", "test_program_runs", "test_gpu_check", "test_area_step_cuda", "test_extract_engine",
    "test_study", "test_train_parallel", "test_analysis_results", "test_rollout_autograd", "test_train_resume", "test_search",
    "test_search_postgresql", "test_search_found", "test_search_proxies",
    "test_program_rollout", "test_program_random", "test_rollout", "test_claims", "test_rcnn_sat", "test_train_models",
    "test_gate_step", "test_install", "test_blt_vs", "test_cli", "test_winograd_conv", "test_train_options", "test_blt_net",
    "test_simt_bites", "test_rollout_half", "test_conv_epilogue", "test_phase_report", "test_report_numbers", "test_area_step",
    "test_isa", "test_networks_native", "test_cli_dialect", "test_triton_conv",
)  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark and order."""
    rank = {name: number for number, name in enumerate(SLOW)}
    for item in items:
        if item.path.stem in rank:
            item.add_marker(pytest.mark.slow)
    items.sort(key=lambda item: rank.get(item.path.stem, len(SLOW)))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
    np.random.seed(0)  # noqa: NPY002  -- for libraries that draw from the global generator


@pytest.fixture(autouse=True)
def _full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of float32 on devices too, where cuDNN's convolutions are in TF32 otherwise: tests compare with float64."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.fixture(params=_core.build_info()["isa_supported"])
def isa(request: pytest.FixtureRequest) -> Iterator[str]:
    """The test, on every instruction set that can run here (or on those that a file parametrizes it with): its name."""
    before = build_info()["isa"]
    _core.select_isa(request.param)
    yield request.param
    _core.select_isa(before)


@pytest.fixture
def simt(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The CUDA kernels on CPU tensors, in the SIMT harness: its module. With RNNDYN_TEST_DEVICE=cuda, on that device and its tensors."""
    device = os.environ.get("RNNDYN_TEST_DEVICE")
    if device is None:
        yield simt_harness.install(monkeypatch)
        return
    torch.set_default_device(device)
    yield simt_harness.OnDevice()
    torch.set_default_device("cpu")


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For networks so small that threads only wait for each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
