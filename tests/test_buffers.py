"""Large buffers are used again once nothing uses them, and never before."""

from __future__ import annotations

import torch

from rnndyn_fast import release_memory
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import buffers, convolution
from rnndyn_fast.ops.buffers import empty, release_buffers

LARGE = (1 << 20,)  # 4 MiB of float32


def test_a_free_storage_is_handed_out_again() -> None:
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
    assert kept.untyped_storage().data_ptr() in [k.storage.data_ptr() for k in buffers._kept]
    assert not any(k.free for k in buffers._kept)


def test_memory_of_rollouts_can_be_released() -> None:
    net = blt_net_64(timesteps=2, widths=(16, 32, 64, 128, 256))
    x = torch.randn(8, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        assert convolution._kept
        assert release_memory() > 1 << 20
        assert not convolution._kept
        assert not any(k.free for k in buffers._kept)
        torch.testing.assert_close(net(x), before, rtol=0, atol=0)


def test_buffers_unused_for_long_are_given_back() -> None:
    release_buffers()
    tensor = empty(LARGE, torch.float32)
    entry = next(k for k in buffers._kept if k.storage.data_ptr() == tensor.data_ptr())
    del tensor
    entry.last_use -= buffers._PATIENCE
    empty((64 << 20,), torch.float32)  # larger than anything kept: nothing fits
    assert all(k is not entry for k in buffers._kept)
    release_buffers()


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
