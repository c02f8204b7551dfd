"""Counter-based random numbers: Philox4x32-10 and the unit normals made of them, in plain PyTorch.

The specification of what the native kernels draw: a number depends on its seed and its place (stream, trial, time step, unit) and on
nothing else, so threads, batches and the order of calls do not matter.

Source: Salmon, Moraes, Dror & Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_LOW = 0xFFFFFFFF


def _wide_product(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
    """High and low 32 bits of ``a * b``, without leaving int64."""
    low = a * (b & 0xFFFF)  # below 2^48
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox(counter: Sequence[Tensor], key: Sequence[Tensor]) -> list[Tensor]:
    """Philox4x32-10: four words of 32 bits (in int64) from a counter of four and a key of two, all broadcast together."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        high0, low0 = _wide_product(_MULTIPLIERS[0], c0)
        high1, low1 = _wide_product(_MULTIPLIERS[1], c2)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, low1, high0 ^ c3 ^ k1, low0
        k0, k1 = (k0 + _WEYL[0]) & _LOW, (k1 + _WEYL[1]) & _LOW
    return [c0, c1, c2, c3]


def unit_normals(
    seeds: Tensor,  # [M] int64
    trials: int,
    timesteps: int,
    units: int,
    *,
    stream: int = 0,
    first_trial: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """The unit normals of a call of ``ops.ctrnn``: [M, N, T, H].

    Units 4k to 4k + 3 of trial n at step t share one Philox call with counter (k, t, n, stream) and the seed's two words as its key;
    its words w make two pairs by Box and Muller, ``sqrt(-2 ln u) * (cos 2 pi v, sin 2 pi v)``, with the upper bits u of w0 (23 of them,
    plus one half, over 2^23) and v of w1 (24 of them, over 2^24): both are exact in float32, so every dtype draws the same numbers, up
    to rounding. The largest possible number is 5.8.
    """
    blocks = -(-units // 4)
    device = seeds.device

    def axis(values: Tensor, dim: int) -> Tensor:
        return values.to(torch.int64).reshape([-1 if i == dim else 1 for i in range(4)])

    counter = [
        axis(torch.arange(blocks, device=device), 3),
        axis(torch.arange(timesteps, device=device), 2),
        axis(torch.arange(first_trial, first_trial + trials, device=device), 1),
        torch.full((1, 1, 1, 1), stream, dtype=torch.int64, device=device),
    ]
    words = philox(counter, [axis(seeds & _LOW, 0), axis((seeds >> 32) & _LOW, 0)])
    normals = []
    for first, second in ((words[0], words[1]), (words[2], words[3])):
        radius = torch.sqrt(-2 * torch.log(((first >> 9).to(torch.float64) + 0.5) * 2.0**-23))
        angle = (2 * math.pi * 2.0**-24) * (second >> 8).to(torch.float64)
        normals += [radius * torch.cos(angle), radius * torch.sin(angle)]
    return torch.stack(normals, -1).flatten(3)[..., :units].to(dtype)
