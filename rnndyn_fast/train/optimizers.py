"""Optimisers by name, with weight decay per group of parameters, on any device."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from rnndyn_fast.optional import require
from rnndyn_fast.train.config import TrainConfig

_CAPTURED = {"adam": {"fused": True, "capturable": True}, "adamw": {"fused": True, "capturable": True}, "sgd": {"fused": True}}


def make_optimizer(config: TrainConfig, net: nn.Module, decay: Mapping[str, float], device: torch.device) -> torch.optim.Optimizer:
    """The optimiser of a configuration; on an NVIDIA GPU adam, adamw and sgd in one kernel, whose step can be part of a CUDA graph.

    Args:
        config: says which, with its numbers.
        net: whose parameters it has, on `device`. Parameters of equal decay are a group; with adam, whose weight decay is part of the loss,
            all are one.
        decay: weight decay by parameter name.

    Raises: ImportError: lars or lamb without the extra.
    """
    groups = [{"params": list(net.parameters())}]
    if config.optimizer != "adam":
        named = dict(net.named_parameters())
        values = dict.fromkeys(decay.values())
        groups = [{"params": [named[n] for n, v in decay.items() if v == value], "weight_decay": value} for value in values]  # type: ignore[dict-item]
    captured: dict[str, Any] = _CAPTURED.get(config.optimizer, {}) if device.type == "cuda" else {}
    rate: Any = config.lr
    if captured and (config.lr_schedule != "constant" or config.lr_warmup_steps):
        rate = torch.tensor(config.lr, device=device)  # (a number would be part of the graph)
    if config.optimizer == "adam":
        return torch.optim.Adam(groups, lr=rate, eps=config.adam_eps, **captured)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=rate, eps=config.adam_eps, **captured)
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate, momentum=config.momentum, **captured)
    require("pytorch_optimizer")
    import pytorch_optimizer

    found: torch.optim.Optimizer
    if config.optimizer == "lars":
        found = pytorch_optimizer.LARS(groups, lr=rate, momentum=config.momentum)
    else:
        found = pytorch_optimizer.Lamb(groups, lr=rate, eps=config.adam_eps)
    return found


def load_optimizer(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Take up the state of an optimiser that may have been on another device: how it runs stays this one's."""
    kept = [{name: group[name] for name in ("fused", "capturable", "foreach") if name in group} for group in optimizer.param_groups]
    rates = [group["lr"] for group in optimizer.param_groups]
    groups = [{**group, **own} for group, own in zip(state["param_groups"], kept, strict=True)]
    optimizer.load_state_dict({**state, "param_groups": groups})
    for group, before, saved in zip(optimizer.param_groups, rates, state["param_groups"], strict=True):
        group["lr"] = before
        set_rate(group, float(saved["lr"]))


def set_rate(group: dict[str, Any], rate: float) -> None:
    """Set the learning rate of a group of an optimiser; a tensor stays where it is, for the graphs that read it."""
    if isinstance(group["lr"], torch.Tensor):
        group["lr"].fill_(rate)
    else:
        group["lr"] = rate
