"""The SIMT harness reports what it is for: kernels with a planted fault (csrc/simt/planted.cu), and the same kernels without."""

from __future__ import annotations

import os
from typing import Any

import pytest
import simt_harness
import torch
from torch import Tensor

from rnndyn_fast.ops.addresses import Use

pytestmark = pytest.mark.skipif("RNNDYN_TEST_DEVICE" in os.environ, reason="the harness is not for a device")

FAULTS = {
    "READ": ("neighbours", r"thread \(0, 0, 0\): out-of-bounds read of 4 bytes at in \+ 260, which has 260 bytes"),
    "WRITE": ("neighbours", r"thread \(63, 0, 0\): out-of-bounds write of 4 bytes at out \+ 256"),
    "SHARED_BOUNDS": ("neighbours", r"out-of-bounds write of 4 bytes at shared array at planted.cu:\d+ \+ 260, which has 260"),
    "UNWRITTEN_SHARED": ("neighbours", r"read of unwritten shared memory \(shared array at planted.cu:\d+ \+ 256\)"),
    "MISSING_BARRIER": ("neighbours", "race: (read of what another thread writes|write to what another thread reads)"),
    "WRITE_AFTER_READ": ("neighbours", "race: (read of what another thread writes|write to what another thread reads)"),
    "DIVERGENT_BARRIER": ("neighbours", r"divergent barrier: .* waits at planted.cu:\d+, and thread .* at planted.cu"),
    "RETURN_BEFORE_BARRIER": ("neighbours", r"divergent barrier: .* thread \(63, 0, 0\) has returned"),
    "INPUT": ("neighbours", r"write to a buffer that is an input \(in"),
    "OTHER_BLOCK": ("neighbours", r"block \(1, 0, 0\).* race: write to what another thread writes \(out"),
    "DIVERGENT_SHUFFLE": ("warp", "divergent warp operation: lane 0.* lane 31"),
    "MISSING_WARP_BARRIER": ("warp", "race: (read of what another thread writes|write to what another thread reads)"),
    "MISALIGNED": ("vector", r"misaligned read of 16 bytes at in \+"),
    "UNWRITTEN_OUTPUT": ("vector", r"read of unwritten memory \(out"),
    "NO_OPT_IN": (
        "resources",
        "49408 bytes of static and dynamic shared memory, and a block may have 49152 where its kernel has not opted in",
    ),
    "SHARED_LIMIT": ("resources", "101632 bytes of static and dynamic shared memory, and a block may have 101376$"),
    "THREADS": ("resources", r"blocks \(1056, 1, 1\) cannot be launched"),
    "GRID": ("resources", r"grid \(1, 65536, 1\) of blocks .* cannot be launched"),
    "MISSING_WAIT": ("copy", "read of memory into which an asynchronous copy is on its way"),
}
ORDERS = ("FORWARD", "REVERSED", "RANDOM")


def run(simt: Any, which: str, fault: str, x: Tensor, out: Tensor) -> None:
    simt.forget_buffers()
    simt_harness.register(simt, x, "in", Use.READ)
    simt_harness.register(simt, out, "out", Use.WRITE)
    simt.planted(which, x.data_ptr(), out.data_ptr(), getattr(simt.Planted, fault))


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_reported(simt: Any, fault: str, order: str) -> None:
    """In every order of the threads: it does not take luck."""
    which, report = FAULTS[fault]
    simt.set_order(getattr(simt.Order, order), 3)
    x, out = torch.randn(65), torch.full((64,), float("nan"))
    with pytest.raises(simt.Fault, match=report):
        run(simt, which, fault, x, out)


@pytest.mark.parametrize("order", ORDERS)
def test_without_a_fault_nothing_is_reported_and_the_results_are_right(simt: Any, order: str) -> None:
    simt.set_order(getattr(simt.Order, order), 3)
    x = torch.randn(65)
    expected = {
        "neighbours": x[:-1] + x[1:],
        "warp": x[:64].view(2, 32).sum(1).repeat_interleave(32),
        **dict.fromkeys(("vector", "copy", "resources"), x[:64]),
    }
    for which, result in expected.items():
        out = torch.full((64,), float("nan"))
        run(simt, which, "NONE", x, out)
        torch.testing.assert_close(out, result)


def test_matrix_product_has_the_fragments_of_the_ptx_isa(simt: Any) -> None:
    """With a wrong fragment index the product is wrong."""
    a, b = torch.randn(16, 16).half(), torch.randn(8, 16).half()
    x, truth = torch.cat([a, b]), a.float() @ b.float().T
    out = torch.full((16, 8), float("nan"))
    run(simt, "matrix", "NONE", x, out)
    torch.testing.assert_close(out, truth)
    run(simt, "matrix", "FRAGMENT", x, out)
    assert (out - truth).abs().max() > 0.1


def test_limits_are_those_of_an_architecture(simt: Any) -> None:
    """More shared memory than sm_86 has passes on sm_90; kernels whose registers do not fit are refused."""
    x, out = torch.randn(65), torch.full((64,), float("nan"))
    simt.set_limits(227 * 1024, {})
    run(simt, "resources", "SHARED_LIMIT", x, out)
    torch.testing.assert_close(out, x[:64])
    simt.set_limits(99 * 1024, {"resources_kernel": 255, "copy_kernel": 32})
    run(simt, "resources", "NONE", x, out)  # 64 threads
    simt.set_limits(99 * 1024, {"resources_kernel": 2048})
    with pytest.raises(
        simt.Fault, match=r"resources_kernel: blocks \(64, 1, 1\) of threads with 2048 registers, and a multiprocessor has 65536"
    ):
        run(simt, "resources", "NONE", x, out)
    with pytest.raises(ValueError, match="shared_bytes: expected at most 232448, got 300000"):
        simt.set_limits(300000, {})


def test_bad_buffers_are_refused(simt: Any) -> None:
    simt.forget_buffers()
    x = torch.zeros(8)
    simt_harness.register(simt, x, "x", Use.READ)
    with pytest.raises(ValueError, match="y: overlaps x"):
        simt_harness.register(simt, x[2:6], "y", Use.WRITE)
    with pytest.raises(ValueError, match="no kernel 'other'"):
        simt.planted("other", 0, 0, simt.Planted.NONE)
