"""Hooks: the areas of any ``nn.Module`` that is run over time, as [T, N, ...]."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


class Recording:
    """What the hooks have seen since the last `take`."""

    def __init__(self, names: Sequence[str]) -> None:
        self._steps: dict[str, list[Tensor]] = {name: [] for name in names}

    def take(self) -> dict[str, Tensor]:
        """Activations [T, N, ...] per name, T calls each; begins anew.

        Raises:
            ValueError: a module was not called, or with batches of several shapes.
        """
        taken = {}
        for name, steps in self._steps.items():
            if not steps:
                raise ValueError(f"names: module {name!r} was not called since the last take()")
            if len({step.shape for step in steps}) > 1:
                raise ValueError(f"names: module {name!r} gave several shapes over time: {sorted({tuple(s.shape) for s in steps})}")
            taken[name] = torch.stack(steps)
        self.clear()
        return taken

    def clear(self) -> None:
        """Forget what was seen."""
        for steps in self._steps.values():
            steps.clear()


@contextmanager
def record(
    module: nn.Module,
    names: Sequence[str] | Mapping[str, str],
    *,
    select: Callable[[str, Any], Tensor] | None = None,
    every: int = 1,
) -> Iterator[Recording]:
    """Record what submodules give each time they are called, a call per time step, while the ``with`` block lasts.

    Args:
        module: any module; it is not changed, and the hooks go when the block ends.
        names: submodules by their dotted names ("" is the module itself), or a mapping area -> submodule.
        select: (area, output) -> tensor [N, ...], for submodules that give tuples; None: the output, or the first tensor of a tuple
            or list (as the hidden state of an ``nn.LSTMCell``).
        every: keep every so-manieth call, for submodules called several times per time step.

    Returns:
        a Recording, whose ``take()`` gives area -> activations [T, N, ...], detached copies.

    Raises:
        TypeError: `names` is a single string, or an output is no tensor.
        ValueError: no such submodule (names those there are).

    >>> cell = nn.RNNCell(3, 5)
    >>> with record(cell, {"hidden": ""}) as recording:
    ...     h = torch.zeros(2, 5)
    ...     for t in range(4):
    ...         h = cell(torch.randn(2, 3), h)
    >>> recording.take()["hidden"].shape
    torch.Size([4, 2, 5])
    """
    if isinstance(names, str):
        raise TypeError(f"names: expected a sequence of names, got the string {names!r}")
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every: expected an int of at least 1, got {every!r}")
    areas = dict(names) if isinstance(names, Mapping) else {name: name for name in names}
    known = dict(module.named_modules())
    for path in areas.values():
        if path not in known:
            raise ValueError(f"names: no submodule {path!r}; there are {', '.join(repr(name) for name in list(known)[:20])}")
    recording = Recording(list(areas))

    def hook(area: str) -> Callable[[nn.Module, Any, Any], None]:
        calls = 0

        def see(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal calls
            calls += 1
            if calls % every:
                return
            value = select(area, output) if select is not None else _first_tensor(output)
            if not isinstance(value, Tensor):
                raise TypeError(f"names: expected module {areas[area]!r} to give a tensor, got {type(output).__name__}; pass select")
            recording._steps[area].append(value.detach().clone())

        return see

    handles = [known[path].register_forward_hook(hook(area)) for area, path in areas.items()]
    try:
        yield recording
    finally:
        for handle in handles:
            handle.remove()


def _first_tensor(output: Any) -> Any:
    while isinstance(output, tuple | list) and output:
        output = output[0]
    return output
