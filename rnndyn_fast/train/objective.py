"""What training makes small: the loss over time steps, weight decay; and what keeps its gradients within bounds."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Iterable, Mapping

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

LEAST_PROBABILITY = 1e-10  # of the published networks
CLIP_FLOOR = 1e-3  # added to norms, so that tensors near zero can move


def loss_over_time(
    log_probs: Tensor,  # [T, N, classes]
    labels: Tensor,  # int64 [N], or shares of classes [N, classes]
    over: str = "sum",
    *,
    label_smoothing: float = 0.0,
    class_weights: Tensor | None = None,  # [classes]
    time_weights: Tensor | None = None,  # [T]
) -> Tensor:
    """Cross-entropy, the mean over samples, of the time steps: their "sum", their "mean", or the "last" alone.

    ``sum over t of mean over n of -((1 - s) log_probs[t, n, labels[n]] + s mean over c of log_probs[t, n, c])`` with s the smoothing; with
    class weights each term of class c counts ``class_weights[c]`` times, and the mean is the one weighted by :func:`sample_weight`; with
    weights of time steps each step counts that many times, and "mean" divides by their sum. Shares q[n, c] in place of labels:
    ``sum over c of q[n, c] log_probs[t, n, c]`` in place of ``log_probs[t, n, labels[n]]``.

    Returns: a scalar in nats. Differentiable in `log_probs`. Raises ValueError, TypeError: not one weight per time step; labels that are no
    integers, not one per sample, or (on the CPU) none of the classes.
    """
    labels = _checked(labels, log_probs)
    if over == "last":
        log_probs = log_probs[-1:]
    timesteps, count = log_probs.shape[:2]
    if time_weights is not None:
        if len(time_weights) != timesteps:
            raise ValueError(f"time_weights: expected {timesteps} numbers, one for each answer of the network, got {len(time_weights)}")
        log_probs = log_probs * time_weights[:, None, None]
    flat = log_probs.flatten(0, 1)
    if labels.ndim == 1:
        total = functional.nll_loss(flat, labels.repeat(timesteps), weight=class_weights, reduction="sum")
    else:
        shares = labels if class_weights is None else labels * class_weights
        total = -(log_probs * shares).sum()
    if label_smoothing:
        spread = -(flat if class_weights is None else flat * class_weights).sum() / flat.shape[1]
        total = (1 - label_smoothing) * total + label_smoothing * spread
    weight = count if class_weights is None else sample_weight(labels, class_weights)
    steps = timesteps if time_weights is None else time_weights.sum()
    return total / (weight * steps if over == "mean" else weight)


def _checked(
    labels: Tensor,  # integers [N], or shares of classes [N, classes]
    log_probs: Tensor,  # [T, N, classes]
) -> Tensor:
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels: expected a tensor, got {type(labels).__name__}")
    if log_probs.ndim != 3:
        raise ValueError(f"log_probs: expected [T, N, classes], got {list(log_probs.shape)}")
    _, count, classes = log_probs.shape
    if labels.shape not in ((count,), (count, classes)):
        raise ValueError(f"labels: expected [N] = [{count}] or [N, classes] = [{count}, {classes}], got {list(labels.shape)}")
    if labels.ndim == 2:
        return labels
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(f"labels: expected integers [N], got {labels.dtype}")
    labels = labels.long()
    if labels.device.type == "cpu" and not torch.compiler.is_compiling():
        low, high = (int(x) for x in labels.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"labels: expected classes 0 .. {classes - 1}, got {low if low < 0 else high}")
    return labels


def sample_weight(
    labels: Tensor,  # int64 [N], or shares of classes [N, classes]
    class_weights: Tensor,  # [classes]
) -> Tensor:
    """What the samples of a batch weigh together in the mean of the loss: the sum of their classes' weights."""
    return class_weights[labels].sum() if labels.ndim == 1 else (labels * class_weights).sum()


def inverse_frequencies(labels: np.ndarray, num_classes: int) -> Tensor:  # [n] -> [classes]
    """Weights of classes, one over the number of their images, scaled to sum 1. Raises ValueError for a class without images."""
    counts = np.bincount(labels, minlength=num_classes)
    if (counts == 0).any():
        raise ValueError(f"class_weights: category {int(np.argmin(counts))} has no training images, so no frequency")
    return torch.from_numpy((1 / counts) / (1 / counts).sum()).to(torch.float32)


def decays(net: nn.Module, kernel_decay: float, by_name: Mapping[str, float]) -> dict[str, float]:
    """Weight decay of every parameter by name: ``kernel_decay`` of weights of convolutions and dense layers, 0 of others; where patterns
    (``v1.*``) fit a name, that of the last one. Raises ValueError for a pattern that fits none."""
    found: dict[str, float] = {}
    for name, parameter in net.named_parameters():
        owner = net.get_submodule(name.rpartition(".")[0])
        kernel = isinstance(owner, nn.Conv2d | nn.ConvTranspose2d | nn.Linear) and parameter is owner.weight
        found[name] = kernel_decay if kernel else 0.0
    for pattern, decay in by_name.items():
        names = fnmatch.filter(found, pattern)
        if not names:
            raise ValueError(f"weight_decay_of: no parameter is named like {pattern!r}; there are {', '.join(list(found)[:8])}, ...")
        found |= dict.fromkeys(names, float(decay))
    return found


def decay_penalty(net: nn.Module, decay: Mapping[str, float]) -> Callable[[], Tensor] | None:
    """What weight decay adds to the loss: the sum over parameters of decay times sum of squares. None where all decays are 0."""
    named = dict(net.named_parameters())
    groups: dict[float, list[Tensor]] = {}
    for name, value in decay.items():
        if value:
            groups.setdefault(value, []).append(named[name])
    if not groups:
        return None
    return lambda: torch.stack([value * squared_norm(weights) for value, weights in groups.items()]).sum()


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
    return classes > 1 and loss >= 0.95 * (1 - 1 / classes) * -math.log(LEAST_PROBABILITY)
