"""Steps of training and validation on a device: on GPUs as CUDA graphs, with autocast and, in float16, a gradient scaler; of several
processes each with its part of the batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from rnndyn_fast.job_device import PRECISIONS, in_precision
from rnndyn_fast.nn import GraphedNetwork, GraphedTrainingStep, RecurrentNetwork
from rnndyn_fast.nn.cuda_graphs import CudaGraphs, Graphs, update
from rnndyn_fast.processes import Processes
from rnndyn_fast.train.sync_norm import synchronised_batch_norm


class NotFinite(ArithmeticError):
    """A gradient is NaN or infinite; parameters are as they were."""


class Outcome:
    """What is told of a batch, of all processes: its loss, how many labels each time step has right, whether its loss and gradients were
    finite, and whether a process was asked to stop. It comes from the device when it is asked for."""

    def __init__(self, told: Tensor, images: int) -> None:
        self.images = images
        self._done: torch.cuda.Event | None = None
        if told.is_cuda:
            self._told = torch.empty(told.shape, dtype=told.dtype, pin_memory=True).copy_(told, non_blocking=True)
            self._done = torch.cuda.Event()
            self._done.record(torch.cuda.current_stream(told.device))
        else:
            self._told = told
        self.finite, self.stop = True, False

    def read(self) -> tuple[float, list[int]]:
        """Loss, and correct labels per time step; sets ``finite`` and ``stop``."""
        if self._done is not None:
            self._done.synchronize()
        loss, weight, stop, bad, *correct = self._told.tolist()
        self.finite, self.stop = not bad, stop > 0
        return loss / weight, [int(count) for count in correct]


class _Running(nn.Module):
    """A network whose forward is its ``run``, for `DistributedDataParallel`."""

    def __init__(self, net: RecurrentNetwork) -> None:
        super().__init__()
        self.net = net

    def forward(self, images: Tensor) -> Tensor:
        log_probs: Tensor = self.net.run(images)
        return log_probs


class Steps:
    """Training and validation steps of a network.

    Args:
        net: on `device`; called as ``net.run(images)``.
        optimizer: of its parameters.
        loss: from log-probabilities [T, N, classes] and labels to a scalar, a mean over the samples weighted by `weight`.
        device: where it all is.
        precision: of maps, by autocast: a key of `rnndyn_fast.job_device.PRECISIONS`.
        penalty: is added to the loss before gradients are taken.
        before_update: what is done to the gradients, which are whole and unscaled then.
        weight: what the samples with these labels weigh together in the mean; None: their number.
        averaged: an average of the network, which is validated as well.
        group: the processes; gradients are those of the mean over the samples of all of them.
        accumulate: parts in which a process takes its samples.
        sync_batch_norm: take statistics of batch norms over the samples of all processes.
        graphed: on a GPU, with one process and one part, replay CUDA graphs, one per shape of the batch.
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
        weight: Callable[[Tensor], Tensor] | None = None,
        averaged: RecurrentNetwork | None = None,
        group: Processes | None = None,
        accumulate: int = 1,
        sync_batch_norm: bool = False,
        graphed: bool = True,
        graphs: Callable[[], Graphs] | None = None,
    ) -> None:
        self.net, self.optimizer, self.loss, self.penalty, self.before_update = net, optimizer, loss, penalty, before_update
        self.device, self.precision, self.weight, self.averaged = device, precision, weight, averaged
        self.group, self.accumulate = group or Processes(), accumulate
        self.scaler = torch.amp.GradScaler(device.type) if precision == "float16" else None
        self.stop_asked: Callable[[], bool] = lambda: False
        # Written in place, so that all graphs write to the same: norms of the last step's gradients by parameter of the optimiser, 0 where
        # there was none; and whether they are finite.
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.norms = torch.zeros(len(self.parameters), device=device)
        self._finite = torch.ones(1, dtype=torch.bool, device=device)
        self._forward: Callable[[Tensor], Tensor] = net.run
        self._parallel: DistributedDataParallel | None = None
        self._sync_norms = sync_batch_norm and self.group.count > 1
        if self.group.count > 1:
            places = [device] if device.type == "cuda" else None
            # (A connection that no time step uses yet has no gradient.)
            self._parallel = DistributedDataParallel(_Running(net), device_ids=places, find_unused_parameters=True)
            self._forward = self._parallel
        self._train: Callable[[Tensor, Tensor, int], Sequence[Tensor]] = self._eager
        self._runs: list[Callable[[Tensor], Tensor]] = [net.run, *([] if averaged is None else [averaged.run])]
        if graphed and (graphs is not None or device.type == "cuda") and self.group.count == accumulate == 1:
            # (They never run at the same time, but keep memory of their own.)
            make = graphs or CudaGraphs
            step = GraphedTrainingStep(
                net, self._losses, optimizer, scaler=self.scaler, autocast=PRECISIONS[precision], before_update=self._before, graphs=make()
            )
            self._train = lambda images, labels, _: step(images, labels)
            self._runs = [GraphedNetwork(one, call=one.run, copy=False, graphs=make()) for one in (net, averaged) if one is not None]

    def train(
        self,
        images: Tensor,  # [N, C, H, W], normalised
        labels: Tensor,  # [N], or shares of classes [N, classes]
        total: int | None = None,
    ) -> Outcome:
        """Forward, backward, update. `total`: samples in all processes; this one's part may be empty.

        Where a gradient is not finite nothing is updated, and the outcome says so. (With a gradient scaler such steps are left out and
        the scale is lowered, as ever.)
        """
        total = len(images) if total is None else total
        try:
            _, loss, log_probs = self._train(images, labels, total)
        except NotFinite:
            self.optimizer.zero_grad(set_to_none=True)
            told = torch.tensor([float("nan"), 1.0, float(self.stop_asked()), 1.0], dtype=torch.float64)
            return Outcome(told, total)  # (no process goes further: gradients are the same in all)
        return self._outcome(log_probs, loss, labels, total, loss.isfinite().reshape(1) & self._finite)

    def evaluate(
        self,
        images: Tensor,  # [N, C, H, W], normalised
        labels: Tensor,  # [N]
        total: int | None = None,
        *,
        averaged: bool = False,
    ) -> Outcome:
        """Forward alone; the caller has switched gradients off."""
        shown, answers = (images, labels) if len(images) else self._stand_in(images, labels)
        with in_precision(self.precision, self.device):
            log_probs = self._runs[1 if averaged else 0](shown)
            loss = self.loss(log_probs, answers)
            return self._outcome(log_probs, loss, labels, len(images) if total is None else total, loss.isfinite().reshape(1))

    def share_buffers(self) -> None:
        """Give all processes the first one's running statistics; training leaves each its own until the next step."""
        if self.group.count > 1:
            for one in (self.net, self.averaged):
                for buffer in () if one is None else one.buffers():
                    torch.distributed.broadcast(buffer, 0)

    # ---------------------------------------------------------------- how

    def _outcome(self, log_probs: Tensor, loss: Tensor, labels: Tensor, total: int, finite: Tensor) -> Outcome:
        count = len(labels)
        label = labels if labels.ndim == 1 else labels.argmax(1)
        correct = (log_probs[:, :count].argmax(2) == label).sum(1)
        exact = torch.float32 if self.device.type == "mps" else torch.float64  # (which Apple's GPUs have not)
        loss, several = loss.detach().to(exact).reshape(1), self.group.count > 1
        weight = torch.ones_like(loss)
        if several:
            weight = weight * (self.weight(labels).to(exact) if self.weight is not None else count)
            loss = loss * weight if count else torch.zeros_like(loss)
        told = torch.cat([loss, weight, loss.new_tensor([float(self.stop_asked())]), (~finite).to(exact), correct.to(exact)])
        return Outcome(self.group.sum(told), total)

    def _stand_in(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """A sample for a process that has none; it weighs nothing."""
        return images.new_zeros((1, *images.shape[1:])), labels.new_zeros((1, *labels.shape[1:]))

    def _losses(self, images: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        log_probs = self._forward(images)
        loss = self.loss(log_probs, labels)
        return loss if self.penalty is None else loss + self.penalty(), loss, log_probs

    def _eager(self, images: Tensor, labels: Tensor, total: int) -> Sequence[Tensor]:
        self.optimizer.zero_grad(set_to_none=True)
        if self.group.count == 1 and (self.accumulate == 1 or len(images) == 1):
            with in_precision(self.precision, self.device):
                found: Sequence[Tensor] = self._losses(images, labels)
            (found[0] if self.scaler is None else self.scaler.scale(found[0])).backward()
        else:
            found = self._in_parts(images, labels, total)
        update(self.optimizer, self.scaler, self._before)
        return [t.detach() for t in found]

    def _in_parts(self, images: Tensor, labels: Tensor, total: int) -> Sequence[Tensor]:
        """Gradients of the mean over all samples of all processes, part by part."""
        parts = min(self.accumulate, len(images) or 1)
        if self._sync_norms and self.accumulate > 1:  # all processes must come to their norms equally often
            parts = min(self.accumulate, max(self.group.all_of(len(images))))
        pieces = list(zip(images.tensor_split(parts), labels.tensor_split(parts), strict=True))
        weigh = self.weight or (lambda labels: torch.tensor(float(len(labels)), device=labels.device))
        nothing = torch.zeros((), device=labels.device)
        weights = [weigh(y) if len(y) else nothing for _, y in pieces]
        mine = torch.stack(weights).sum()
        whole = self.group.sum(mine.clone()) if self.weight is not None else mine.new_tensor(float(total))
        losses, log_probs = [], []
        for k, ((x, y), weight) in enumerate(zip(pieces, weights, strict=True)):
            none = len(y) == 0
            x, y = self._stand_in(images, labels) if none else (x, y)
            waits = self._parallel is not None and k < parts - 1
            assert self._parallel is not None or not waits
            with self._parallel.no_sync() if waits and self._parallel is not None else nullcontext():
                norms = synchronised_batch_norm(counts=not none) if self._sync_norms else nullcontext()
                with in_precision(self.precision, self.device), norms:
                    answer = self._forward(x)
                    loss = self.loss(answer, y)
                    # (Gradients become their mean over processes.)
                    part = loss * (weight / whole * self.group.count)
                    if self.penalty is not None:
                        part = part + self.penalty() / parts
                (part if self.scaler is None else self.scaler.scale(part)).backward()
            losses.append(loss.detach() * weight)
            log_probs.append(answer.detach()[:, : 0 if none else None])
        mean = torch.stack(losses).sum() / (mine if len(labels) else 1.0)
        return mean, mean, torch.cat(log_probs, 1)

    def _before(self) -> None:
        """Look at the gradients, which are whole, before the update."""
        self.norms.copy_(torch.stack([p.grad.norm() if p.grad is not None else p.new_zeros(()) for p in self.parameters]))
        if self.scaler is None:
            finite = self.norms.isfinite().all()
            if getattr(self.optimizer, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in self.optimizer.param_groups):
                # The kernel leaves parameters as they are, and the host need not wait.
                self.optimizer.grad_scale = None  # type: ignore[attr-defined]
                self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]
                self._finite.copy_(finite)
            elif not finite:
                raise NotFinite
        if self.before_update is not None:
            self.before_update()
