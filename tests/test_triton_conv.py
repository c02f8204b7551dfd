"""The recurrent convolution in Triton: its cases in the interpreter, its kernels compiled without a device, its tiles, and what there is
where Triton is missing."""

from __future__ import annotations

import os
import random
import re
import subprocess
import sys
from pathlib import Path

import pytest
import simt_harness
import torch
from torch import Tensor

from rnndyn_fast.cli import doctor
from rnndyn_fast.ops import triton_conv
from rnndyn_fast.ops.device_kernels import can_run_triton
from rnndyn_fast.ops.engines import Geometry, Operator
from rnndyn_fast.ops.fused_conv import ConvTerm
from rnndyn_fast.optional import install_hint

ROOT = Path(__file__).resolve().parents[1]
HALF, SINGLE = torch.float16, torch.float32
CONV = Geometry(Operator.CONV, 1, 1)
has_triton = pytest.mark.skipif(triton_conv.unavailable() is not None, reason=str(triton_conv.unavailable()))

sys.path.insert(0, str(ROOT / "scripts"))
import kernel_resources  # noqa: E402
import triton_resources  # noqa: E402

sys.path.pop(0)


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    variables = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, timeout=1800, env=variables, cwd=ROOT)


@has_triton
@pytest.mark.skipif("RNNDYN_TEST_DEVICE" in os.environ, reason="the cases run on the device themselves")
def test_cases_in_the_interpreter() -> None:
    """Those of triton_conv_cases.py: whether Triton interprets kernels is decided when it is imported, so a process of its own."""
    module = str(simt_harness.build().__file__)
    done = run("-m", "pytest", "-q", "-x", "tests/triton_conv_cases.py", TRITON_INTERPRET="1", RNNDYN_SIMT_MODULE=module)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed in", done.stdout, re.MULTILINE), done.stdout


# ---------------------------------------------------------------- compiled


@pytest.fixture
def tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of convolutions, as PyTorch has it by default."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)


@has_triton
@pytest.mark.parametrize("architecture", [80, 90])
@pytest.mark.parametrize("dtype", triton_resources.DTYPES, ids=str)
def test_the_default_tile_compiles_without_spills(dtype: torch.dtype, architecture: int, tf32: None) -> None:
    """For each dtype, as the page of resources says; on sm_90 products are `wgmma`'s."""
    import triton

    name, launch = next(iter(triton_resources.launches(dtype, (architecture // 10, 0)).items()))
    assert (launch.options["ROWS"], launch.options["COLUMNS"]) == (128, 128)
    found = triton_resources.compiled(name, launch, dtype, architecture)
    assert found.stack_bytes == 0
    counts = found.instructions
    assert (counts["wgmma"] > 0, counts["mma"] > 0, counts["tcgen05"]) == (architecture == 90, architecture == 80, 0)
    assert found.shared_bytes <= simt_harness.LEAST_SHARED_BYTES
    page = (ROOT / "docs" / "notes" / "kernel_resources.md").read_text(encoding="utf-8")
    if f"By Triton {triton.__version__}" in page:  # another compiler allocates registers differently
        number = triton_resources.DTYPES.index(dtype)
        (row,) = [line for line in page.splitlines() if line.startswith(f"| {name} | sm_{architecture} |")]
        cells = [cell.strip().split(", ") for cell in row.split("|")[3:-1]]
        said = [int(cell[number if len(cell) > 1 else 0]) for cell in cells]
        assert said == [found.registers, found.stack_bytes, found.shared_bytes, *counts.values()]


@has_triton
def test_one_kernel_serves_all_sizes(tf32: None) -> None:
    """Heights, widths, kernels, strides and paddings are not compiled in: a network's maps share few kernels."""
    hashes = set()
    for size, kernel, stride, padding in ((16, 3, 1, 1), (1, 1, 1, 0), (15, 5, 2, 16), (32, 7, 1, 1)):
        x = torch.empty(256, size * stride, size * stride, 64, dtype=HALF, device="meta")
        weight = torch.empty(64, kernel, kernel, 64, dtype=HALF, device="meta")
        value = torch.empty(256 * 17**2 // size**2, size, size, 64, dtype=HALF, device="meta")
        x = torch.empty(len(value), *x.shape[1:], dtype=HALF, device="meta")
        launch = triton_conv.conv_launch([ConvTerm(x, weight, stride, padding)], None, [], None, value, None, None, (9, 0))
        with triton_resources.compiling_for(90):
            from rnndyn_fast.ops import triton_kernels

            hashes.add(triton_kernels.recurrent_conv_kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options).hash)
    assert len(hashes) == 1


@has_triton
def test_an_odd_address_is_no_error_and_claims_no_alignment() -> None:
    """A kernel is compiled for addresses that are multiples of 16 bytes, and another one for others, with narrower copies."""
    room = torch.zeros(4 * 8 * 8 * 64 + 1, dtype=HALF)
    weight, value = torch.zeros(64, 1, 1, 64, dtype=HALF), torch.zeros(4, 8, 8, 64, dtype=HALF)
    copies = []
    for first in (0, 1):
        x = room[first : first + 4 * 8 * 8 * 64].view(4, 8, 8, 64)
        launch = triton_conv.conv_launch([ConvTerm(x, weight)], None, [], None, value, None, None, (8, 0))
        with triton_resources.compiling_for(80):
            from rnndyn_fast.ops import triton_kernels

            kernel = triton_kernels.recurrent_conv_kernel.warmup(*launch.arguments, grid=launch.grid, **launch.options)
        copies.append(len(re.findall(r"cp\.async\.cg\.shared\.global", kernel.asm["ptx"])))
    assert copies[0] > copies[1] > 0  # (the weight's address is aligned in both)


def test_the_page_of_kernels_has_the_table(tf32: None) -> None:
    page = (ROOT / "docs" / "notes" / "kernel_resources.md").read_text(encoding="utf-8")
    table = page[page.index(triton_resources.START) : page.index(triton_resources.END)]
    assert kernel_resources.replaced(page, table.partition("\n")[2].rstrip("\n"), triton_resources.START, triton_resources.END) == page
    for dtype in triton_resources.DTYPES:
        for architecture in triton_resources.ARCHITECTURES:
            for name in triton_resources.launches(dtype, (architecture // 10, 0)):
                assert f"| {name} | sm_{architecture} |" in table
    for row in re.findall(r"^\| `.*$", table, re.MULTILINE):
        kernel, architecture, _, spilled, _, wgmma, mma, tcgen05 = (cell.strip() for cell in row.strip("| ").split("|"))
        assert spilled == "0" or architecture == "sm_100", row
        used = {"sm_80": mma, "sm_90": wgmma, "sm_100": tcgen05}[architecture]
        assert all(int(n) > 0 for n in used.split(", ")), kernel


# ---------------------------------------------------------------- tiles and arguments


@pytest.mark.parametrize("capability", [(8, 0), (8, 9), (9, 0), (10, 0), (12, 0)], ids=str)
@pytest.mark.parametrize("dtype", triton_resources.DTYPES, ids=str)
def test_tiles_are_such_as_triton_takes(dtype: torch.dtype, capability: tuple[int, int]) -> None:
    """Powers of two; at least 16 in each direction; stages fit into the shared memory of every device of that generation."""
    for precision in ("tf32", "ieee"):
        for channels in (1, 3, 16, 40, 64, 65, 72, 96, 128, 136, 256, 320, 512):
            for samples in (1, 1024):
                conv = triton_conv.conv_tile(samples, 16, 16, channels, channels, dtype, precision, capability)
                assert conv.columns == triton_conv.recurrent_conv_moment_groups(samples, 16, 16, channels)[2]
                for tile in (conv, triton_conv.weight_grad_tile(channels, 2 * channels, dtype, precision, capability)):
                    assert all(n & (n - 1) == 0 for n in (tile.rows, tile.columns, tile.depth))
                    assert min(tile.rows, tile.columns, tile.depth) >= 16
                    shared = (tile.rows + tile.columns) * tile.depth * dtype.itemsize * tile.stages
                    assert shared <= simt_harness.LEAST_SHARED_BYTES
    assert triton_conv.conv_tile(1024, 16, 16, 256, 256, HALF, "tf32", (9, 0)) == triton_conv.Tile(128, 128, 64, 8, 3)
    assert triton_conv.conv_tile(1024, 16, 16, 8, 3, HALF, "tf32", (9, 0)) == triton_conv.Tile(128, 16, 16, 4, 3)
    assert triton_conv.conv_tile(1, 16, 16, 256, 256, HALF, "tf32", (9, 0)).rows == 64


def test_columns_leave_few_of_a_tile_empty() -> None:
    for channels, columns in (
        (8, 16),
        (24, 32),
        (64, 64),
        (72, 128),
        (128, 128),
        (136, 64),
        (192, 64),
        (240, 128),
        (256, 128),
        (1024, 128),
    ):
        groups = triton_conv.recurrent_conv_moment_groups(1024, 16, 16, channels)
        tiles = -(-channels // columns)
        assert groups == [256 * tiles, tiles, columns, channels - (tiles - 1) * columns], channels


def test_weight_gradients_are_one_wave() -> None:
    """No more programs than run at once, unless there are more tiles; a split is worth its sums."""
    for a, b, kernel in ((128, 128, 3), (64, 64, 5), (512, 256, 3), (8, 8, 1)):
        tile = triton_conv.weight_grad_tile(a, b, HALF, "tf32", (9, 0))
        tiles = -(-a // tile.rows) * -(-b // tile.columns) * kernel**2
        for pixels in (100, 1 << 20):
            splits = triton_conv.weight_grad_splits(pixels, a, b, kernel, tile, 132)
            assert 1 <= splits <= triton_conv.MOST_SPLITS
            assert splits == 1 or splits * tiles <= 264
            assert splits == 1 or pixels >= splits * triton_conv.LEAST_SLABS * tile.depth
    assert triton_conv.weight_grad_splits(1 << 20, 64, 64, 5, triton_conv.weight_grad_tile(64, 64, HALF, "tf32", (9, 0)), 132) == 10


def test_division_by_multiplication_is_exact() -> None:
    generator, most = random.Random(0), (1 << 31) - 1
    for d in (
        1,
        2,
        3,
        5,
        7,
        64,
        641,
        4096,
        65535,
        65537,
        (1 << 30) - 1,
        1 << 30,
        most,
        *(generator.randrange(1, most) for _ in range(300)),
    ):
        factor, shift = triton_conv.divisor(d)
        assert factor * most < 1 << 63, "in int64"
        near = [k * d + e for k in (0, 1, 2, most // d - 1, most // d) for e in (-1, 0, 1)]
        for n in (*near, *(generator.randrange(most) for _ in range(50))):
            if 0 <= n <= most:
                assert n * factor >> shift == n // d, (n, d)


def test_maps_with_too_many_pixels_are_refused() -> None:
    x = torch.empty(1, 1 << 16, 1 << 15, 8, dtype=HALF, device="meta")
    term = ConvTerm(x, torch.empty(8, 1, 1, 8, dtype=HALF, device="meta"))
    with pytest.raises(ValueError, match=r"terms: expected maps of at most 2147482624 pixels in all, got \[1, 65536, 32768, 8\]"):
        triton_conv.conv_launch([term], None, [], None, torch.empty_like(x), None, None, (9, 0))


def test_elements_are_counted_in_int64_where_int32_would_overflow() -> None:
    def is_wide(*shape: int) -> bool:
        x = torch.empty(shape, dtype=HALF, device="meta")
        term = ConvTerm(x, torch.empty(64, 1, 1, shape[3], dtype=HALF, device="meta"), shape[1], 0)
        value = torch.empty(shape[0], 1, 1, 64, dtype=HALF, device="meta")
        return bool(triton_conv.conv_launch([term], None, [], None, value, None, None, (9, 0)).options["WIDE"])

    assert not is_wide(1, 1 << 14, 1 << 10, 64)
    assert is_wide(1, 1 << 15, 1 << 10, 64)


@pytest.mark.parametrize(("cudnn", "matmul"), [(True, "highest"), (False, "high")])
def test_float32_has_the_precision_that_the_vendors_would_have(cudnn: bool, matmul: str, monkeypatch: pytest.MonkeyPatch) -> None:
    before = torch.get_float32_matmul_precision()
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", cudnn)
    torch.set_float32_matmul_precision(matmul)

    def precision(dtype: torch.dtype, size: int) -> str:
        x = torch.empty(2, size, size, 8, dtype=dtype, device="meta")
        term = ConvTerm(x, torch.empty(8, 1, 1, 8, dtype=dtype, device="meta"))
        return str(triton_conv.conv_launch([term], None, [], None, torch.empty_like(x), None, None, (9, 0)).options["PRECISION"])

    try:
        assert precision(SINGLE, 4) == ("tf32" if cudnn else "ieee")
        assert precision(SINGLE, 1) == ("ieee" if cudnn else "tf32")  # a matrix product
        assert precision(HALF, 4) == "tf32"  # (of which Triton takes no notice)
    finally:
        torch.set_float32_matmul_precision(before)


# ---------------------------------------------------------------- where there is no Triton


def test_importing_the_package_does_not_import_triton() -> None:
    code = (
        "import sys, rnndyn_fast, rnndyn_fast.ops.triton_conv, rnndyn_fast.ops.cuda_engine, rnndyn_fast.program\n"
        "assert 'triton' not in sys.modules"
    )
    done = run("-c", code)
    assert done.returncode == 0, done.stderr


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    triton_conv.unavailable.cache_clear()
    triton_conv.build_id.cache_clear()
    monkeypatch.setitem(sys.modules, "triton", None)
    try:
        reason = triton_conv.unavailable()
        assert reason is not None
        assert reason.startswith("triton is needed for the Triton kernels of convolutions on GPUs")
        assert reason.endswith(install_hint("triton"))
        assert triton_conv.build_id() == "none"
        assert not can_run_triton(CONV, (64, 64, 3, 3), HALF)
        with pytest.raises(ValueError, match='engine="triton": triton is needed'):
            can_run_triton(CONV, (64, 64, 3, 3), HALF, raise_error=True)
        (row,) = [line for line in doctor.report().splitlines() if line.strip().startswith("Triton kernels")]
        assert reason in row
    finally:
        triton_conv.unavailable.cache_clear()
        triton_conv.build_id.cache_clear()


@has_triton
def test_an_old_triton_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton

    triton_conv.unavailable.cache_clear()
    try:
        monkeypatch.setattr(triton, "__version__", "3.3.1+git1")
        assert str(triton_conv.unavailable()).startswith("triton 3.4 or later is needed, as PyTorch 2.8 brings it; 3.3.1+git1 is there")
        triton_conv.unavailable.cache_clear()
        monkeypatch.setattr(triton, "__version__", "4.0.0")
        assert triton_conv.unavailable() is None
    finally:
        triton_conv.unavailable.cache_clear()


@has_triton
def test_a_launch_that_fails_names_kernel_and_error(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the measurement of engines warns of, when the others take its place."""
    from rnndyn_fast.ops import triton_kernels

    class Failing:
        def __getitem__(self, grid: tuple[int, ...]) -> Failing:
            return self

        def __call__(self, *arguments: object, **options: object) -> None:
            raise ValueError("at 12:4:\n    x = y\n        ^\nno such thing\n")

    monkeypatch.setattr(triton_kernels, "recurrent_conv_kernel", Failing())
    x: Tensor = torch.zeros(1, 2, 2, 8).half()
    with pytest.raises(RuntimeError, match=r"^recurrent_conv_kernel of the Triton convolution: ValueError: no such thing$"):
        triton_conv.recurrent_conv([ConvTerm(x, torch.zeros(8, 1, 1, 8).half())], None, [], None, torch.empty_like(x))
