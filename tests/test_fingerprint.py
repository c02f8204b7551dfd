"""The fingerprint by which kept weights are known: whatever changes, changes it."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rnndyn_fast.ops.core import fingerprint


@pytest.mark.parametrize("size", [1, 7, 8, 9, 63, 64, 65, 200])
def test_every_bit_counts(size: int) -> None:
    data = torch.randint(256, (size,), dtype=torch.uint8)
    seen = {fingerprint(data)}
    for i in range(size):
        for bit in range(8):
            changed = data.clone()
            changed[i] ^= 1 << bit
            seen.add(fingerprint(changed))
    assert len(seen) == 1 + 8 * size
    assert fingerprint(data.clone()) in seen


@pytest.mark.parametrize(
    "change",
    [
        lambda w: w * 1.5,
        lambda w: -w,
        lambda w: 2 * w,
        lambda w: w.flip(0),
        lambda w: w.roll(16, 1),  # whole words from one place to another
        lambda w: w.roll(1 << 18),  # whole pieces
        lambda w: torch.zeros_like(w),
        lambda w: w[:-1],
        lambda w: torch.cat([w, torch.zeros(1, w.shape[1])]),
    ],
)
def test_changes_of_a_whole_weight_show(change: object) -> None:
    weight = torch.randn(1100, 1024)
    assert callable(change)
    other = change(weight)
    assert isinstance(other, Tensor)
    assert fingerprint(other) != fingerprint(weight)


def test_zeros_of_different_sizes_differ() -> None:
    assert len({fingerprint(torch.zeros(n)) for n in range(40)}) == 40


def test_independent_of_threads_and_strides() -> None:
    weight, before, seen = torch.randn(3_000_000), torch.get_num_threads(), set()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.add(fingerprint(weight))
    finally:
        torch.set_num_threads(before)
    assert seen == {fingerprint(weight.view(1000, 3000).t().contiguous().t())}
