"""Large buffers are used again once nothing uses them, and never before."""

from __future__ import annotations

import gc
import itertools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import Tensor

from rnndyn_fast import release_memory
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import buffers, kept_packs
from rnndyn_fast.ops.buffers import empty, release_buffers

LARGE = (1 << 20,)  # 4 MiB of float32


def test_room_that_nothing_uses_is_handed_out_again() -> None:
    release_buffers()
    first = empty(LARGE, torch.float32)
    address = first.data_ptr()
    second = empty(LARGE, torch.float32)
    assert second.data_ptr() != address
    view = first[10:20]
    del first
    third = empty(LARGE, torch.float32)
    assert third.data_ptr() not in (address, second.data_ptr())  # the view still uses it
    del view
    assert empty(LARGE, torch.float32).data_ptr() == address


def test_shape_and_dtype() -> None:
    tensor = empty((3, 1000, 200), torch.float64)
    assert tensor.shape == (3, 1000, 200)
    assert tensor.dtype == torch.float64
    assert tensor.is_contiguous()
    small = empty((2, 3), torch.uint8)
    assert small.shape == (2, 3)


def test_release_gives_all_free_ones_back() -> None:
    release_buffers()
    kept = empty(LARGE, torch.float32)
    empty((2 << 20,), torch.float32)
    assert release_buffers() >= 8 << 20
    assert kept.fill_(1).sum() == LARGE[0]
    assert release_buffers() == 0


def test_memory_of_rollouts_can_be_released() -> None:
    net = blt_net_64(timesteps=2, widths=(16, 32, 64, 128, 256))
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        assert kept_packs._kept
        assert release_memory() > 1 << 20
        assert not kept_packs._kept
        assert release_buffers() == 0
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_gaps_are_joined() -> None:
    """Whatever the order in which buffers are given up, their room is one gap, and a larger buffer fits there."""
    region = buffers.Region(64 << 20)

    def take(nbytes: int) -> Tensor:
        gap = region.smallest_gap(nbytes)
        assert gap is not None
        return region.take(gap, nbytes)

    for order in itertools.permutations(range(4)):
        tensors = [take(4 << 20) for _ in range(5)]
        first = tensors[0].data_ptr()
        for i in order:
            tensors[i] = torch.empty(0)
        assert take(16 << 20).data_ptr() == first
        del tensors
        assert region.smallest_gap(64 << 20) == 0
    assert region.smallest_gap(65 << 20) is None


def test_the_smallest_gap_is_taken() -> None:
    region = buffers.Region(64 << 20)
    tensors = [region.take(region.smallest_gap(n << 20) or 0, n << 20) for n in (5, 1, 2, 1)]
    address = tensors[2].data_ptr()
    tensors[0] = tensors[2] = torch.empty(0)
    gap = region.smallest_gap(2 << 20)
    assert gap == 1
    assert region.take(gap, 2 << 20).data_ptr() == address


def test_a_buffer_keeps_its_bytes_while_others_come_and_go() -> None:
    generator = torch.Generator().manual_seed(0)
    live: list[tuple[Tensor, int]] = []
    for i in range(300):
        size = int(torch.randint(1 << 20, 5 << 20, (1,), generator=generator))
        live.append((empty((size,), torch.uint8).fill_(i % 251), i % 251))
        if len(live) > 12:
            tensor, value = live.pop(int(torch.randint(12, (1,), generator=generator)))
            assert bool((tensor == value).all())
    assert all(bool((tensor == value).all()) for tensor, value in live)


def test_buffers_are_given_up_by_any_thread() -> None:
    def fill(value: int) -> bool:
        tensors = [empty(LARGE, torch.float32).fill_(value + k) for k in range(3)]
        return all(bool((t == value + k).all()) for k, t in enumerate(tensors))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(fill, range(0, 60, 3)))


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="asks Linux for the resident size")
def test_what_was_not_reached_for_long_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * 4096

    monkeypatch.setattr(buffers, "_PATIENCE", 8)
    gc.collect()  # (what other tests left behind)
    release_memory()
    before = resident()
    empty((64 << 20,), torch.uint8).fill_(1)
    assert resident() > before + (60 << 20)
    for _ in range(16):  # twice its patience
        empty((1 << 20,), torch.uint8)
    assert resident() < before + (8 << 20)


def test_without_address_space_regions_are_as_large_as_they_must_be(monkeypatch: pytest.MonkeyPatch) -> None:
    class Refused(buffers.Region):
        def __init__(self, nbytes: int) -> None:
            if nbytes > 1 << 30:
                raise OSError("no address space")
            super().__init__(nbytes)

    monkeypatch.setattr(buffers, "Region", Refused)
    monkeypatch.setattr(buffers, "_regions", [])
    tensors = [empty((40 << 20,), torch.uint8).fill_(i) for i in range(3)]
    assert len(buffers._regions) == 3
    assert all(int(t[-1]) == i for i, t in enumerate(tensors))
    address = tensors[1].data_ptr()
    tensors[1] = torch.empty(0)
    assert empty((64 << 20,), torch.uint8).data_ptr() == address


def test_results_of_two_rollouts_stay_apart() -> None:
    """Outputs and saved maps of a rollout must survive the next one; its graph is still needed."""
    net = blt_net_64(timesteps=3, widths=(8, 16, 32, 64, 128))
    x = torch.randn(4, 3, 64, 64)
    first, recorded = net(x, record=("v2",))
    kept = first.detach().clone(), recorded["v2"].detach().clone()
    net(torch.randn(4, 3, 64, 64), record=("v2",))[0].sum().backward()
    net.zero_grad()
    torch.testing.assert_close(first, kept[0], rtol=0, atol=0)
    torch.testing.assert_close(recorded["v2"], kept[1], rtol=0, atol=0)
    first.sum().backward()
    again = net.v2.lateral.weight.grad.clone()
    net.zero_grad()
    net(x)[:].sum().backward()
    torch.testing.assert_close(net.v2.lateral.weight.grad, again, rtol=1e-5, atol=1e-6)
