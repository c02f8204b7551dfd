"""The module ``_cuda`` as built: what it needs, how it behaves without a driver, what its kernels take of a multiprocessor."""

from __future__ import annotations

import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rnndyn_fast.ops import cuda_module

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "scripts"))
import kernel_resources  # noqa: E402

sys.path.pop(0)

built = pytest.mark.skipif(cuda_module.unavailable is not None, reason=str(cuda_module.unavailable))


@pytest.fixture(scope="module")
def resources() -> list[kernel_resources.Resources]:
    """Of the build that is installed."""
    folders = sorted((ROOT / "build").glob(f"{sys.implementation.cache_tag.replace('cpython-', 'cp')}-*/csrc/cuda"))
    assert folders, "no build folder: the package was not built by `pip install -e .`"
    return kernel_resources.read(folders[-1].parents[1])


@built
def test_needs_only_the_system() -> None:
    spec = importlib.util.find_spec("rnndyn_fast._cuda")
    assert spec is not None
    assert spec.origin is not None
    dynamic = subprocess.run(["readelf", "-d", spec.origin], capture_output=True, text=True, check=True, timeout=60).stdout
    needed = re.findall(r"\(NEEDED\).*\[(.+)\]", dynamic)
    allowed = re.compile(r"(libstdc\+\+|libgcc_s|libc|libm|libdl|librt|libpthread|ld-linux[-\w]*)\.so(\.\d+)?")
    assert needed
    assert [name for name in needed if not allowed.fullmatch(name)] == []


@built
@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_driver_it_imports_and_a_launch_says_why_it_cannot() -> None:
    info = cuda_module.build_info()
    assert info["devices"] == 0
    assert info["architectures"].startswith("80")
    error = cuda_module.device_error(0)
    assert error is not None
    assert error.startswith("the CUDA kernels cannot run on cuda:0: ")
    assert f"built by nvcc {info['nvcc']} for {info['architectures']}; " in error
    with pytest.raises(RuntimeError, match="device 0: "):
        cuda_module.module().launch("area_step_forward", "float16", {}, 0)


@built
def test_no_kernel_spills(resources: list[kernel_resources.Resources]) -> None:
    assert {r.architecture for r in resources} == {f"sm_{a}" for a in cuda_module.build_info()["architectures"].split(",")}
    assert [r for r in resources if r.spill_bytes] == []


@built
def test_the_page_of_kernels_has_their_resources(resources: list[kernel_resources.Resources]) -> None:
    """For the compiler that wrote it; another one allocates registers differently."""
    page = (ROOT / "docs" / "notes" / "kernel_resources.md").read_text(encoding="utf-8")
    compiler = re.search(r"by nvcc ([0-9.]+)", page)
    assert compiler, "docs/notes/kernel_resources.md does not say which nvcc"
    if compiler[1] == cuda_module.build_info()["nvcc"]:
        assert kernel_resources.replaced(page, kernel_resources.table(resources)) == page
    else:
        assert {r.kernel for r in resources} == set(re.findall(r"^\| (`\w+_kernel`[ x0-9]*?) \|", page, re.MULTILINE))


def test_a_spill_is_read_from_what_ptxas_says(tmp_path: Path) -> None:
    folder = tmp_path / "csrc" / "cuda"
    folder.mkdir(parents=True)
    (folder / "some.o.log").write_text(
        "ptxas info    : 0 bytes gmem\n"
        "ptxas info    : Compiling entry function '_ZN6rnndyn4cuda50_GLOBAL__N__1_2_some_cu_5c_6021recurrent_conv_kernelINS0_4HalfELi128E"
        "Li64EEEvNS0_19RecurrentConvParamsIT_EE' for 'sm_80'\n"
        "ptxas info    : Function properties for x\n"
        "    16 bytes stack frame, 12 bytes spill stores, 8 bytes spill loads\n"
        "ptxas info    : Used 126 registers, used 1 barriers, 512 bytes smem, 856 bytes cmem[0]\n",
        encoding="utf-8",
    )
    (found,) = kernel_resources.read(tmp_path)
    assert found == kernel_resources.Resources("`recurrent_conv_kernel` 128 x 64", "float16", "sm_80", 126, 512, 20)
    with pytest.raises(FileNotFoundError, match="no build of the CUDA kernels"):
        kernel_resources.read(tmp_path / "elsewhere")
