"""Batch norms with statistics over the samples of all processes, on any device."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode


class _SumOverProcesses(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Tensor:
        total = x.clone()
        torch.distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(context: Any, *grads: Tensor) -> Tensor:
        (grad,) = grads
        return _SumOverProcesses.forward(context, grad.contiguous())


def _over_processes(x: Tensor) -> Tensor:
    total: Tensor = _SumOverProcesses.apply(x)
    return total


class synchronised_batch_norm(TorchFunctionMode):
    """Within it, ``functional.batch_norm`` in training takes mean and variance over the batches of all processes, and so does
    ``torch.var_mean`` over (N, H, W), with which running statistics are made. Every process must make the same calls in the same order.

    PyTorch's own ``SyncBatchNorm`` is a module for GPUs; the rollout has no such modules, and runs on CPUs too. Rollouts of the reference
    backend call these functions; others have kernels of their own.

    Args:
        counts: whether this process's samples count (a stand-in for no samples does not).
    """

    def __init__(self, counts: bool = True) -> None:
        super().__init__()
        self.counts = counts

    def __torch_function__(
        self, func: Callable[..., Any], types: Iterable[type], args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        options = dict(kwargs or {})
        if func is functional.batch_norm and _training(args, options):
            return self._normed(*args, **options)
        if func is torch.var_mean and args[1:2] == ((0, 2, 3),):
            mean, var, count = self._statistics(args[0])
            correction = min(options.get("correction", 1), count - 1)
            return var * count / (count - correction), mean
        return func(*args, **options)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor, int]:
        """Mean and biased variance [C] of all processes, and the number of values."""
        share = 1.0 if self.counts else 0.0
        flat = x.transpose(0, 1).flatten(1)
        count = _over_processes(flat.new_tensor(share * flat.shape[1]))
        mean = _over_processes(share * flat.sum(1)) / count
        var = _over_processes(share * (flat - mean[:, None]).square().sum(1)) / count
        return mean, var, int(count)

    def _normed(
        self, x: Tensor, mean: Any, var: Any, weight: Tensor, bias: Tensor, training: bool = True, momentum: float = 0.1, eps: float = 1e-5
    ) -> Tensor:
        centre, spread, _ = self._statistics(x)
        scale = weight * torch.rsqrt(spread + eps)
        return torch.addcmul((bias - centre * scale)[:, None, None], x, scale[:, None, None])


def _training(args: tuple[Any, ...], options: Mapping[str, Any]) -> bool:
    return bool(args[5] if len(args) > 5 else options.get("training", False))
