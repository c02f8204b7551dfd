"""Batch norms of a network, one for each time step, as ``nn.BatchNorm2d`` has them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from rnndyn_fast.graph.spec.network import Area, Network, Norm


def _takes_the_batch(norm: Any) -> bool:
    """Whether it normalises by the batch: in training mode, or without running statistics."""
    return norm.training or (norm.running_mean is None and norm.running_var is None)


def takes_the_batch(root: nn.Module, network: Network, area: Area) -> bool:
    """Whether an area's norms take the statistics of the batch; False: the running ones.

    Raises:
        TypeError: those of some time steps do and others do not, naming one of each.
    """
    paths = network.norm_prefixes(area)
    modes = [_takes_the_batch(root.get_submodule(path)) for path in paths]
    if any(modes) and not all(modes):
        batch, running = paths[modes.index(True)], paths[modes.index(False)]
        raise TypeError(
            f"{running}.training: expected the same at all time steps of area {area.name!r}, got False there and True in {batch}; freeze "
            "all of them with .eval(), or none"
        )
    return all(modes)


def norms_in_training(root: nn.Module, network: Network) -> bool:
    """Whether batch norms that are not said to be frozen take the statistics of the batch (all do then, or none)."""
    # (Of the others too: what a compiler sees here, it looks at again in later calls.)
    modes = [takes_the_batch(root, network, area) and not area.norm_frozen for area in network.areas if area.norm is Norm.BATCH]
    return any(modes)


def move_statistics(
    norm: Any,
    mean: Tensor,  # [C]
    var: Tensor,  # [C], unbiased
) -> None:
    """Move the running statistics of a norm in training, as ``nn.BatchNorm2d`` does: by ``momentum``, or as their mean over all batches."""
    if not norm.training or not norm.track_running_stats or norm.running_mean is None:
        return
    with torch.no_grad():
        if norm.num_batches_tracked is not None:
            norm.num_batches_tracked.add_(1)
        factor = norm.momentum
        if factor is None:
            factor = 1.0 / float(norm.num_batches_tracked)
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), factor)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), factor)
