"""Networks and training steps as CUDA graphs: launched once from the host instead of kernel by kernel.

At batches of a few dozen images the host is the slower part of a rollout. A graph is captured per shape of the arguments, after some
calls that run normally (they are real calls: nothing is computed twice, and the engines of convolutions are measured then); later calls
copy their arguments into the graph's own tensors and replay it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from rnndyn_fast.ops.capture import CudaGraphs, Graphs


@dataclass
class _Captured:
    replay: Callable[[], None]
    arguments: list[Tensor]  # the graph's own
    result: Any
    grads: list[Tensor | None] = field(default_factory=list)


class _Cache:
    """Graphs by key; of a key that comes for the first times, how often."""

    def __init__(self, calls_before: int, most: int) -> None:
        for name, value, least in (("calls_before", calls_before, 1), ("max_graphs", most, 1)):
            if value < least:
                raise ValueError(f"{name}: expected at least {least}, got {value}")
        self._calls_before, self._most = calls_before, most
        self._calls: OrderedDict[Hashable, int] = OrderedDict()
        self._graphs: OrderedDict[Hashable, _Captured] = OrderedDict()

    def get(self, key: Hashable) -> _Captured | None:
        if key in self._graphs:
            self._graphs.move_to_end(key)
        return self._graphs.get(key)

    def put(self, key: Hashable, captured: _Captured) -> None:
        self._graphs[key] = captured
        while len(self._graphs) > self._most:
            self._graphs.popitem(last=False)

    def due(self, key: Hashable) -> bool:
        """Whether a key has come often enough to be captured."""
        count = self._calls.pop(key, 0)
        self._calls[key] = count + 1
        while len(self._calls) > 64 * self._most:
            self._calls.popitem(last=False)
        return count >= self._calls_before

    def __len__(self) -> int:
        return len(self._graphs)


def _precision() -> Hashable:
    """Of float32 products: which kernels the vendor's libraries take is part of a graph."""
    if hasattr(torch.backends.cudnn, "conv"):  # (of torch that has this, the older names raise where it has been used)
        return torch.backends.cudnn.conv.fp32_precision, torch.backends.cuda.matmul.fp32_precision
    return torch.backends.cudnn.allow_tf32, torch.get_float32_matmul_precision()


def _described(tensors: Sequence[Tensor]) -> Hashable:
    return tuple((tuple(t.shape), t.dtype, t.device) for t in tensors)


def _storages(module: nn.Module) -> Hashable:
    """Where a module's parameters and buffers lie: a graph knows them by that."""
    return tuple(t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers()))


def _versions(module: nn.Module) -> Hashable:
    """What else a graph of a module depends on: modes, and what its recurrent networks and layers compute now."""
    parts = list(module.modules())
    return tuple(m.training for m in parts), tuple(version() for m in parts if (version := getattr(m, "version", None)) is not None)


def _own(arguments: Sequence[Tensor]) -> list[Tensor]:
    return [a.clone() for a in arguments]


def _fill(own: Sequence[Tensor], arguments: Sequence[Tensor]) -> None:
    for mine, given in zip(own, arguments, strict=True):
        mine.copy_(given)


def _copied(result: Any) -> Any:
    return tree_map_only(Tensor, Tensor.clone, result)


class GraphedNetwork:
    """A network's forward pass, without gradients, as CUDA graphs: one per shape and dtype of the inputs and per set of options.

    Parameters may change in place between calls (training does that); if they move, graphs are captured anew. CUDA autocast that is
    enabled at a call is part of what is captured.

    Args:
        network: the module, on a CUDA device.
        copy: whether calls return copies; without, the next call, of whatever shape, may overwrite what this one returned: graphs
            of all shapes share one pool of memory.
        calls_before: calls of a shape that run normally before it is captured.
        max_graphs: that many shapes are kept, those used last.
        call: a method of the network that is called in its place.

    Deterministic: as the network. Memory: a graph keeps the memory of one rollout without gradients; graphs share it.

    >>> from rnndyn_fast.models import blt_net_64
    >>> net = GraphedNetwork(blt_net_64(timesteps=2, widths=(2, 4, 8, 16, 32)))  # calls take CUDA tensors
    """

    def __init__(
        self,
        network: nn.Module,
        *,
        copy: bool = True,
        calls_before: int = 1,
        max_graphs: int = 8,
        call: Callable[..., Any] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        self.network = network
        self._call: Callable[..., Any] = network if call is None else call
        self.copy = copy
        self._graphs: Graphs = graphs if graphs is not None else CudaGraphs()
        self._cache = _Cache(calls_before, max_graphs)

    def __call__(self, *inputs: Tensor, **options: Any) -> Any:
        """As the network, without gradients.

        Raises:
            ValueError: an input that is not on a CUDA device.
            RuntimeError: the network cannot be captured, with the reason.
        """
        self._graphs.check(inputs)
        frozen = tuple(sorted((name, tuple(v) if isinstance(v, list) else v) for name, v in options.items()))
        autocast = (torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda"))
        settings = tuple(getattr(self.network, name, None) for name in ("timesteps", "backend", "engine"))
        key = (_described(inputs), frozen, autocast, settings, _precision(), _versions(self.network), _storages(self.network))
        with torch.no_grad():
            found = self._cache.get(key)
            if found is None:
                if not self._cache.due(key):
                    return self._graphs.aside(lambda: self._call(*inputs, **options))
                own = _own(inputs)
                replay, result = self._graphs.capture(lambda: self._call(*own, **options))
                found = _Captured(replay, own, result)
                self._cache.put(key, found)
            _fill(found.arguments, inputs)
            found.replay()
            return _copied(found.result) if self.copy else found.result


class GraphedTrainingStep:
    """A training step as CUDA graphs, one per shape of the batch: forward, loss, backward and, if it can be captured, the optimiser's step.

    An optimiser is captured if its groups say ``capturable=True`` (Adam and its kin) or if it is SGD, and with a gradient scaler only
    ``fused=True`` ones; others step after the replay. What a captured one has as Python numbers (a learning rate) is part of the graph: a
    change of it captures anew, so a rate that changes every step belongs in a tensor.

    Args:
        network: the module whose parameters are trained, on a CUDA device.
        loss: from the tensors of a batch to the loss, a scalar, or to a tuple that begins with it; it calls the network.
        optimizer: of the network's parameters.
        scaler: a ``torch.amp.GradScaler``, for float16.
        autocast: dtype of CUDA autocast around ``loss``; None: none.
        calls_before: steps of a shape that run normally before it is captured; they are steps like all others.
        max_graphs: that many shapes are kept, those used last.
        before_update: what is done to the gradients, which are whole and unscaled then; it is captured with an optimiser that is.

    Deterministic: as the network and the optimiser. Memory: a graph keeps the memory of one step; graphs share it.

    >>> net = torch.nn.Linear(2, 1)
    >>> optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    >>> step = GraphedTrainingStep(net, lambda x, y: (net(x) - y).square().mean(), optimizer)  # calls take CUDA tensors
    """

    def __init__(
        self,
        network: nn.Module,
        loss: Callable[..., Any],
        optimizer: torch.optim.Optimizer,
        *,
        scaler: torch.amp.GradScaler | None = None,
        autocast: torch.dtype | None = None,
        calls_before: int = 3,
        max_graphs: int = 4,
        before_update: Callable[[], None] | None = None,
        graphs: Graphs | None = None,
    ) -> None:
        if autocast not in (None, torch.float16, torch.bfloat16):
            raise ValueError(f"autocast: expected torch.float16, torch.bfloat16 or None, got {autocast}")
        self.network, self.loss, self.optimizer, self.scaler, self.autocast = network, loss, optimizer, scaler, autocast
        self.before_update = before_update
        self._graphs: Graphs = graphs if graphs is not None else CudaGraphs()
        self._cache = _Cache(calls_before, max_graphs)
        self._parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.captures_optimizer = can_capture(optimizer, scaled=scaler is not None)

    def __call__(self, *batch: Tensor) -> Any:
        """One step. Returns what ``loss`` did, detached; gradients stay in the parameters' ``grad``.

        Raises:
            ValueError: a tensor that is not on a CUDA device.
            RuntimeError: the step cannot be captured, with the reason; parameters are as before.
        """
        self._graphs.check(batch)
        key = (_described(batch), _precision(), _versions(self.network), _storages(self.network), self._settings())
        found = self._cache.get(key)
        if found is None:
            if not self._cache.due(key):
                return self._graphs.aside(lambda: self._step(batch, True))
            own = _own(batch)
            replay, result = self._graphs.capture(lambda: self._step(own, self.captures_optimizer))
            found = _Captured(replay, own, result, [p.grad for p in self._parameters])
            self._cache.put(key, found)
        _fill(found.arguments, batch)
        found.replay()
        for p, grad in zip(self._parameters, found.grads, strict=True):
            p.grad = grad
        if not self.captures_optimizer:
            self._update()
        return _copied(found.result)

    def _settings(self) -> Hashable:
        """What a captured optimiser has on the host."""
        if not self.captures_optimizer:
            return ()
        groups = [{k: v for k, v in g.items() if k != "params" and not isinstance(v, Tensor)} for g in self.optimizer.param_groups]
        return repr(groups)

    def _step(self, batch: Sequence[Tensor], update: bool) -> Any:
        self.optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cuda", self.autocast or torch.float16, enabled=self.autocast is not None):
            result = self.loss(*batch)
        loss = result[0] if isinstance(result, tuple) else result
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if update:
            self._update()
        return tree_map_only(Tensor, Tensor.detach, result)

    def _update(self) -> None:
        update(self.optimizer, self.scaler, self.before_update)


def update(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler | None, before: Callable[[], None] | None = None) -> None:
    """The optimiser's step, with a gradient scaler unless that finds infinite gradients; ``before`` meets whole, unscaled gradients."""
    if before is not None:
        if scaler is not None:
            scaler.unscale_(optimizer)
        before()
    if scaler is None:
        optimizer.step()
    else:
        scaler.step(optimizer)
        scaler.update()


def can_capture(optimizer: torch.optim.Optimizer, *, scaled: bool) -> bool:
    """Whether an optimiser's step can be part of a graph: it decides nothing on the host (``scaled``: with a gradient scaler)."""
    groups = optimizer.param_groups
    if scaled and not (getattr(optimizer, "_step_supports_amp_scaling", False) and all(g.get("fused") for g in groups)):
        return False
    return isinstance(optimizer, torch.optim.SGD) or all(g.get("capturable") for g in groups)
