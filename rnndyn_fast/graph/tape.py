"""A tape of what a rollout did, to be walked back: gradients of maps and parameters, and pieces that PyTorch differentiates.

Maps are channels-last, [N, H, W, C]. A gradient belongs to a key, whatever it is of; keys of maps are :func:`map_key`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.ops.buffers import empty, share_storage, sums_dtype
from rnndyn_fast.ops.channels_last import channels_last

Key = tuple[Any, ...] | None


def map_key(node: str, slot: int, state: str | None) -> Key:
    """Of a map of a node."""
    return "map", node, slot, state


def term_key(drive: int, position: int) -> Key:
    """Of a term."""
    return "term", drive, position


def stacked(maps: Sequence[Tensor]) -> Tensor:
    """Maps [N, ...] one after another as one, [len(maps) * N, ...]: a view where they are adjacent in memory, else a copy."""
    first = maps[0]
    if len(maps) == 1:
        return first
    start = first.storage_offset()
    adjacent = all(m.is_contiguous() and share_storage(m, first) for m in maps)
    if adjacent and all(m.storage_offset() == start + k * first.numel() for k, m in enumerate(maps)):
        return first.as_strided((len(maps) * first.shape[0], *first.shape[1:]), first.stride())
    return torch.cat(list(maps), out=empty((sum(len(m) for m in maps), *first.shape[1:]), first.dtype))


def _sum(a: Tensor, b: Tensor) -> Tensor:
    return torch.add(a, b, out=empty(a.shape, a.dtype))


def parted(maps: Tensor, count: int) -> Sequence[Tensor]:
    """The inverse of :func:`stacked`: [count * N, ...] as so many [N, ...]."""
    return (maps,) if count == 1 else maps.chunk(count)


class Gradients:
    """Sums of gradients by key: of each a summand that others may read too, and the sum of those that are the key's own, in the first one's
    place. They are added up when the sum is taken, or by the kernel that reads them."""

    def __init__(self) -> None:
        self._found: dict[Key, tuple[Tensor | None, Tensor | None]] = {}

    def add(self, key: Key, grad: Tensor, *, own: bool) -> None:
        """One summand; of the key None, which is nothing's, it is dropped. ``own``: it is contiguous, and nobody else reads it."""
        if key is None:
            return
        shared, ours = self._found.get(key, (None, None))
        if ours is not None:
            ours.add_(grad)
        elif own:
            ours = grad
        elif shared is None:
            shared = grad
        else:
            ours = _sum(shared, grad)
            shared = None
        self._found[key] = shared, ours

    def own(self, key: Key) -> Tensor | None:
        """The sum of the summands that are the key's own, to be added to; None: there is none yet."""
        return self._found.get(key, (None, None))[1]

    def parts(self, key: Key) -> list[Tensor]:
        """What adds up to the sum: nothing, one map or two, contiguous. Gone afterwards."""
        return [_contiguous(part) for part in self._found.pop(key, (None, None)) if part is not None]

    def take(self, key: Key) -> tuple[Tensor | None, bool]:
        """The sum, contiguous, and whether it is the taker's own; None: nothing came. Gone afterwards."""
        shared, ours = self._found.pop(key, (None, None))
        if ours is not None:
            return ours if shared is None else ours.add_(shared), True
        return (None, False) if shared is None else (_contiguous(shared), not shared.is_contiguous())


def _contiguous(grad: Tensor) -> Tensor:
    """[N, H, W, C]."""
    if grad.is_contiguous():
        return grad
    return channels_last(grad.permute(0, 3, 1, 2), empty(grad.shape, grad.dtype))


class Tape:
    """Steps back, in the order of the steps forth.

    Args:
        parameters: by name.
        wanted: names of those parameters (and inputs) whose gradients are wanted.
        recording: whether anything is to be walked back at all.
        dtype: of maps. Gradients of parameters are summed in float32 at least.
    """

    def __init__(self, parameters: Mapping[str, Tensor], wanted: set[str], recording: bool, dtype: torch.dtype) -> None:
        self.parameters = parameters
        self.dtype = dtype
        self.wanted = wanted
        self.recording = recording
        self.kept = False  # while walking back: whether the tape is to be walked again, so that no buffer of it may be written
        self.grads = Gradients()
        self.parameter_grads: dict[str, Tensor] = {}
        self._summed: set[str] = set()  # names of those gradients that are sums already
        self._steps: list[Callable[[], None]] = []
        self._leaves: dict[str, Tensor] = {}

    def record(self, step: Callable[..., None], *args: Any) -> None:
        """Note a step back."""
        if self.recording:
            self._steps.append(partial(step, *args))

    def held(self) -> list[Tensor]:
        """What is kept for the steps back, but for what PyTorch keeps of its own (:meth:`by_torch`)."""
        found: list[Tensor] = []
        stack: list[Any] = [step.args for step in self._steps if isinstance(step, partial)]
        while stack:
            item = stack.pop()
            if isinstance(item, Tensor):
                found.append(item)
            elif isinstance(item, (list, tuple)):
                stack.extend(item)
            elif is_dataclass(item):
                stack.extend(getattr(item, part.name) for part in fields(item))
        return found

    def walk_back(self, keep: bool) -> None:
        """Take all steps back; unless ``keep``, what they held is freed on the way."""
        self.kept = keep
        self.parameter_grads, self._summed = {}, set()
        if keep:
            for step in reversed(self._steps):
                step()
        while self._steps and not keep:
            self._steps.pop()()

    def own_parameter(self, name: str) -> Tensor | None:
        """The sum of a parameter's gradient so far, to be added to; None: there is none yet, or somebody else may read it."""
        return self.parameter_grads[name] if name in self._summed else None

    def add_parameter(self, name: str, grad: Tensor, *, own: bool = False) -> None:
        """One summand of a parameter's gradient, if that is wanted. ``own``: nobody else reads it; it may be the sum so far itself, to
        which the summand was added."""
        if name in self.wanted and grad is not self.parameter_grads.get(name):
            grad = grad.to(sums_dtype(grad.dtype))
            if name not in self.parameter_grads:
                self.parameter_grads[name] = grad
                self._summed.update([name] if own else [])
            elif name in self._summed:
                self.parameter_grads[name].add_(grad)
            else:  # (the first one may be somebody else's too)
                self.parameter_grads[name] = _sum(self.parameter_grads[name], grad)
                self._summed.add(name)

    def by_torch(
        self,
        function: Callable[[list[Tensor], Mapping[str, Tensor]], Sequence[Tensor]],
        sources: Sequence[tuple[Key, Tensor]],
        results: Sequence[Key],
        prefixes: Sequence[str] = (),
        *,
        exact: bool = False,
    ) -> list[Tensor]:
        """Values of a function of maps and parameters, both [N, H, W, C], whose gradient PyTorch takes.

        Args:
            sources: keys and values of its arguments.
            results: keys of its values.
            prefixes: of the names of the parameters that it uses.
            exact: computed in float32 at least, whatever the maps are.
        """
        inner = sums_dtype(self.dtype) if exact else self.dtype
        used = [name for name in self.parameters if any(name.startswith(p) for p in prefixes)]

        def values(xs: list[Tensor], parameters: Mapping[str, Tensor]) -> list[Tensor]:
            cast = {**parameters, **{name: parameters[name].to(inner) for name in used}}
            return [y.to(self.dtype) for y in function([x.to(inner) for x in xs], cast)]

        if not self.recording:
            return [y.contiguous() for y in values([x for _, x in sources], self.parameters)]
        for name in self.wanted & set(self.parameters):
            if name not in self._leaves:
                self._leaves[name] = self.parameters[name].detach().requires_grad_(True)
        names = [name for name in self._leaves if any(name.startswith(p) for p in prefixes)]
        xs = [x.detach().requires_grad_(True) for _, x in sources]
        with torch.enable_grad():
            ys = values(xs, {**self.parameters, **self._leaves})
        self.record(self._by_torch_back, list(ys), xs, [key for key, _ in sources], list(results), names)
        return [y.detach().contiguous() for y in ys]

    def _by_torch_back(self, ys: list[Tensor], xs: list[Tensor], sources: list[Key], results: list[Key], names: list[str]) -> None:
        pairs = [(y, grad) for y, key in zip(ys, results, strict=True) if (grad := self.grads.take(key)[0]) is not None and y.requires_grad]
        leaves = [*xs, *(self._leaves[name] for name in names)]
        if not pairs or not leaves:
            return
        grads = torch.autograd.grad([y for y, _ in pairs], leaves, [grad for _, grad in pairs], retain_graph=self.kept, allow_unused=True)
        for key, grad in zip(sources, grads, strict=False):
            if grad is not None:
                self.grads.add(key, grad, own=False)
        for name, grad in zip(names, grads[len(xs) :], strict=True):
            if grad is not None:
                self.add_parameter(name, grad)
