"""What training makes small: the loss over time steps, weight decay; and what keeps its gradients within bounds."""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_PROBABILITY = 1e-10  # of the published networks
CLIP_FLOOR = 1e-3  # added to norms, so that tensors near zero can move


def loss_over_time(
    log_probs: Tensor,  # [T, N, classes]
    labels: Tensor,  # [N]
    over: str = "sum",
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,  # [classes]
) -> Tensor:
    """Cross-entropy, the mean over samples, of the time steps: their "sum", their "mean", or the "last" alone.

    ``sum over t of mean over n of -((1 - s) log_probs[t, n, labels[n]] + s mean over c of log_probs[t, n, c])`` with s the smoothing; with
    weights each term of class c counts ``class_weights[c]`` times, and the mean is the one weighted by ``class_weights[labels]``.

    Returns: a scalar in nats. Differentiable in `log_probs`.
    """
    if over == "last":
        log_probs = log_probs[-1:]
    timesteps, count = log_probs.shape[:2]
    flat = log_probs.flatten(0, 1)
    total = functional.nll_loss(flat, labels.repeat(timesteps), weight=class_weights, reduction="sum")
    if label_smoothing:
        spread = -(flat if class_weights is None else flat * class_weights).sum() / flat.shape[1]
        total = (1 - label_smoothing) * total + label_smoothing * spread
    weight = count if class_weights is None else class_weights[labels].sum()
    return total / (weight * timesteps if over == "mean" else weight)


def inverse_frequencies(labels: np.ndarray, num_classes: int) -> Tensor:  # [n] -> [classes]
    """Weights of classes, one over the number of their images, scaled to sum 1. Raises ValueError for a class without images."""
    counts = np.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"class_weights: category {int(np.argmin(counts))} has no training images, so no frequency")
    return torch.from_numpy((1 / counts) / (1 / counts).sum()).to(torch.float32)


def kernels(net: nn.Module) -> list[Tensor]:
    """Weights of convolutions and dense layers."""
    return [m.weight for m in net.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d | nn.Linear)]


def squared_norm(weights: Iterable[Tensor]) -> Tensor:
    """Sum of squares of all of them."""
    return torch.stack([weight.square().sum() for weight in weights]).sum()


def clip_gradients(parameters: Iterable[nn.Parameter], share: float) -> None:
    """Scale gradients in place, tensor by tensor: where ``|g| > share (|w| + 1e-3)``, ``g *= share (|w| + 1e-3) / (|g| + 1e-3)``.

    Source: the published training of KietzmannLab/BLT-VS (2024), after Brock et al., ICML 2021.
    """
    for parameter in parameters:
        if parameter.grad is not None:
            most = share * (parameter.detach().norm() + CLIP_FLOOR)
            norm = parameter.grad.norm()
            parameter.grad.mul_(torch.where(norm > most, most / (norm + CLIP_FLOOR), torch.ones_like(norm)))


def clamped(loss: float, classes: int) -> bool:
    """Whether a loss per time step, in nats, is that of a network that is sure and wrong: 95% of what answers at the clamp of
    log-probabilities, log 1e-10, cost where one in `classes` is right by chance."""
    return loss >= 0.95 * (1 - 1 / classes) * -math.log(LEAST_PROBABILITY)
