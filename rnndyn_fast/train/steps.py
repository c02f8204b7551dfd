"""Steps of training and validation on a device: on GPUs as CUDA graphs, with autocast and, in float16, a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.devices import PRECISIONS, in_precision
from rnndyn_fast.nn import GraphedNetwork, GraphedTrainingStep, RecurrentNetwork
from rnndyn_fast.nn.cuda_graphs import CudaGraphs, Graphs, update


def adam(net: torch.nn.Module, device: torch.device, **options: Any) -> torch.optim.Adam:
    """Adam of a network's parameters; on a GPU in one kernel, whose step can be part of a CUDA graph."""
    return torch.optim.Adam(net.parameters(), **options, **_captured(device))


def load_adam(optimizer: torch.optim.Adam, state: dict[str, Any], device: torch.device) -> None:
    """Take up the state of an optimiser that may have been on another device."""
    groups = [{**group, "fused": None, "capturable": False, **_captured(device)} for group in state["param_groups"]]
    optimizer.load_state_dict({**state, "param_groups": groups})


def _captured(device: torch.device) -> dict[str, Any]:
    return {"fused": True, "capturable": True} if device.type == "cuda" else {}


class Outcome:
    """What is told of a batch: its loss, and how many labels each time step has right. It comes from the device when it is asked for."""

    def __init__(self, log_probs: Tensor, loss: Tensor, labels: Tensor) -> None:
        correct = (log_probs.argmax(2) == labels).sum(1)
        told = torch.cat([loss.detach().double().reshape(1), correct.double()])
        self.images = len(labels)
        self._done: torch.cuda.Event | None = None
        if told.is_cuda:
            self._told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(told, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(told.device))
        else:
            self._told = told

    def read(self) -> tuple[float, list[int]]:
        """Loss, and correct labels per time step."""
        if self._done is not None:
            self._done.synchronize()
        loss, *correct = self._told.tolist()
        return loss, [int(count) for count in correct]


class Steps:
    """Training and validation steps of a network.

    Args:
        net: on `device`; called as ``net.run(images)``.
        optimizer: of its parameters.
        loss: from log-probabilities [T, N, classes] and labels [N] to a scalar.
        device: where it all is.
        precision: of maps, by autocast: a key of `rnndyn_fast.devices.PRECISIONS`.
        penalty: is added to the loss before gradients are taken.
        before_update: what is done to the gradients, which are whole and unscaled then.
        graphed: on a GPU, replay CUDA graphs, one per shape of the batch.
        graphs: what captures (for tests); None: CUDA graphs.

    Memory: with graphs those of a training step and of a forward pass are kept.
    """

    def __init__(
        self,
        net: RecurrentNetwork,
        optimizer: torch.optim.Optimizer,
        loss: Callable[[Tensor, Tensor], Tensor],
        device: torch.device,
        precision: str = "float32",
        *,
        penalty: Callable[[], Tensor] | None = None,
        before_update: Callable[[], None] | None = None,
        graphed: bool = True,
        graphs: Callable[[], Graphs] | None = None,
    ) -> None:
        self.net, self.optimizer, self.loss, self.penalty, self.before_update = net, optimizer, loss, penalty, before_update
        self.device, self.precision = device, precision
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None
        self._train: Callable[[Tensor, Tensor], Sequence[Tensor]] = self._eager
        self._run: Callable[[Tensor], Tensor] = net.run
        if graphed and (graphs is not None or device.type == "cuda"):
            # (The two never run at the same time, but keep memory of their own.)
            make = graphs or CudaGraphs
            self._train = GraphedTrainingStep(
                net, self._losses, optimizer, scaler=self.scaler, autocast=PRECISIONS[precision], before_update=before_update, graphs=make()
            )
            self._run = GraphedNetwork(net, call=net.run, copy=False, graphs=make())

    def train(
        self,
        images: Tensor,  # [N, C, H, W], normalised
        labels: Tensor,  # [N]
    ) -> Outcome:
        """Forward, backward, update."""
        _, loss, log_probs = self._train(images, labels)
        return Outcome(log_probs, loss, labels)

    def evaluate(
        self,
        images: Tensor,  # [N, C, H, W], normalised
        labels: Tensor,  # [N]
    ) -> Outcome:
        """Forward alone; the caller has switched gradients off."""
        with in_precision(self.precision, self.device):
            log_probs = self._run(images)
            return Outcome(log_probs, self.loss(log_probs, labels), labels)

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = self.net.run(images)
        loss = self.loss(log_probs, labels)
        return loss if self.penalty is None else loss + self.penalty(), loss, log_probs

    def _eager(self, images: Tensor, labels: Tensor) -> Sequence[Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        with in_precision(self.precision, self.device):
            found = self._losses(images, labels)
        (found[0] if self.scaler is None else self.scaler.scale(found[0])).backward()
        update(self.optimizer, self.scaler, self.before_update)
        return [t.detach() for t in found]
