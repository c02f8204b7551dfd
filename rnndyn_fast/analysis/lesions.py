r"""What each area's recurrence contributes: the network with those connections off, against the intact one on the same images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis.intervals import student
from rnndyn_fast.graph.spec.network import Role
from rnndyn_fast.nn import RecurrentNetwork


@dataclass(frozen=True)
class LesionEffects:
    """Of every lesion L and time step T, over N images.

    Args:
        connections: what was off, as "v4:lateral".
        change: mean over images of :math:`\\lVert r^{lesioned}_t - r_t \\rVert / \\lVert r_t \\rVert` [L, T], r the readout area's
            representations.
        change_low, change_high: its 95% interval over images (t), [L, T]; NaN for a single image.
        accuracy: share of images that the lesioned network classifies correctly [L, T]; None without labels.
        accuracy_lost: that share of the intact network less that [L, T]; None without labels.
        lost_low, lost_high: its 95% interval over images, paired (t), [L, T]; None without labels.
        images: N.
    """

    connections: tuple[str, ...]
    change: np.ndarray
    change_low: np.ndarray
    change_high: np.ndarray
    accuracy: np.ndarray | None
    accuracy_lost: np.ndarray | None
    lost_low: np.ndarray | None
    lost_high: np.ndarray | None
    images: int


def lesion_effects(
    net: RecurrentNetwork,
    *inputs: Tensor,  # [N, C, H, W] each
    labels: Any = None,  # [N]
    connections: Sequence[str] | None = None,
    steps: Any = None,
) -> LesionEffects:
    r"""How much representations and accuracy change when recurrent connections are off.

    Contributions of several connections do not add up: what one does may need another.

    Args:
        net: in evaluation mode, with a readout.
        inputs: normalised images.
        labels: of the images, for accuracies.
        connections: as in :meth:`rnndyn_fast.nn.RecurrentNetwork.lesion`; None: lateral and top-down connections of every area, each kind
            by itself.
        steps: time steps at which they are off, as there; None: all.

    Raises:
        ValueError: no readout, no recurrent connections, no such connection, or labels of another number; names the argument.

    Deterministic: yes. Memory: trajectories of the intact and of one lesioned network, [T, N, D].
    """
    if net.network.readout is None:
        raise ValueError(f"net: expected a network with a readout, {net.network.name!r} has none")
    chosen = tuple(dict.fromkeys(recurrent_connections(net) if connections is None else connections))
    if not chosen:
        raise ValueError(f"connections: expected some, got none; network {net.network.name!r} has {recurrent_connections(net) or 'none'}")
    count = len(inputs[0])
    wanted = None if labels is None else np.asarray(labels)
    if wanted is not None and wanted.shape != (count,):
        raise ValueError(f"labels: expected one for each of {count} images, got shape {list(wanted.shape)}")
    intact, correct = _run(net, inputs, wanted)
    norms = np.maximum(np.linalg.norm(intact, axis=2), np.finfo(np.float64).tiny)
    changes, losses, accuracies = [], [], []
    for connection in chosen:
        with net.lesion(connection, steps):
            lesioned, still = _run(net, inputs, wanted)
        changes.append(_interval(np.linalg.norm(lesioned - intact, axis=2) / norms))
        if correct is not None and still is not None:
            losses.append(_interval(correct - still))
            accuracies.append(still.mean(1))
    change, lost = np.array(changes), np.array(losses) if losses else None
    return LesionEffects(
        connections=chosen,
        change=change[:, 0],
        change_low=change[:, 1],
        change_high=change[:, 2],
        accuracy=np.array(accuracies) if accuracies else None,
        accuracy_lost=None if lost is None else lost[:, 0],
        lost_low=None if lost is None else lost[:, 1],
        lost_high=None if lost is None else lost[:, 2],
        images=count,
    )


def recurrent_connections(net: RecurrentNetwork) -> list[str]:
    """Lateral and top-down connections of a network, by target and kind: "v4:lateral"."""
    found = (f"{c.target}:{c.role.value}" for c in net.network.connections if c.role is not Role.BOTTOM_UP)
    return list(dict.fromkeys(found))


def _run(net: RecurrentNetwork, inputs: Sequence[Tensor], labels: np.ndarray | None) -> tuple[np.ndarray, np.ndarray | None]:
    """Representations [T, N, D] and whether each image is classified correctly [T, N], in float64."""
    with torch.no_grad():
        log_probs, representations = net.run(*inputs, return_representations=True)
    correct = None if labels is None else (log_probs.argmax(2).cpu().numpy() == labels).astype(np.float64)
    return representations.double().cpu().numpy(), correct


def _interval(values: np.ndarray) -> np.ndarray:  # [T, N] -> [3, T]
    """Mean over images and the ends of its 95% interval."""
    count = values.shape[1]
    mean = values.mean(1)
    if count < 2:
        return np.stack([mean, np.full_like(mean, np.nan), np.full_like(mean, np.nan)])
    half = student(0.975, np.array(count - 1)) * values.std(1, ddof=1) / np.sqrt(count)
    return np.stack([mean, mean - half, mean + half])
