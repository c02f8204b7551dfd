"""Parameters of published TensorFlow and Keras checkpoints under our names: strictly, with a report of what does not fit."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn


@dataclass(frozen=True)
class Entry:
    """One of our tensors, made of one or more published variables."""

    ours: str
    theirs: tuple[str, ...]
    convert: Callable[..., np.ndarray]


@dataclass
class Mapped:
    """What a checkpoint gave: ``loaded`` our tensor -> published variables, ``ignored`` variables without effect, with the reason."""

    loaded: dict[str, tuple[str, ...]] = field(default_factory=dict)
    ignored: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} tensors loaded, {len(self.ignored)} variables ignored"]
        lines += [f"  {ours} <- {', '.join(theirs)}" for ours, theirs in self.loaded.items()]
        return "\n".join(lines + [f"  ignored {name}: {reason}" for name, reason in self.ignored.items()])


def dense(array: np.ndarray) -> np.ndarray:
    """[in, out] -> [out, in]."""
    return array.T


def kernel(array: np.ndarray) -> np.ndarray:
    """HWIO -> OIHW."""
    return array.transpose(3, 2, 0, 1)


def depthwise(array: np.ndarray) -> np.ndarray:
    """[kh, kw, C, 1] -> [C, 1, kh, kw]."""
    return array.transpose(2, 3, 0, 1)


def same(array: np.ndarray) -> np.ndarray:
    """As it is."""
    return array


def stacked(*arrays: np.ndarray) -> np.ndarray:
    """Vectors one after another."""
    return np.concatenate(arrays)


def load_mapped(net: nn.Module, arrays: Mapping[str, np.ndarray], entries: Iterable[Entry], ignored: Mapping[str, str]) -> Mapped:
    """Fill a module's tensors from published variables.

    Args:
        arrays: by published name.
        entries: for every tensor of the module how it is made.
        ignored: variables that may be there and have no effect, with the reason.

    Raises:
        ValueError: variables missing, unexpected or of the wrong shape: all of them are listed, and nothing is loaded.
    """
    targets = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    result, values, problems = Mapped(), dict[str, torch.Tensor](), list[str]()
    wanted: set[str] = set()
    for entry in entries:
        wanted |= set(entry.theirs)
        missing = [name for name in entry.theirs if name not in arrays]
        if missing:
            problems += [f"missing {name} (for {entry.ours} {list(targets[entry.ours].shape)})" for name in missing]
            continue
        try:
            value = torch.from_numpy(np.ascontiguousarray(entry.convert(*(np.asarray(arrays[name]) for name in entry.theirs))))
        except ValueError:
            value = None
        shapes = ", ".join(f"{name} {list(np.shape(arrays[name]))}" for name in entry.theirs)
        if value is None or value.shape != targets[entry.ours].shape:
            problems.append(f"wrong shape: {shapes} for {entry.ours} {list(targets[entry.ours].shape)}")
        else:
            values[entry.ours] = value
            result.loaded[entry.ours] = entry.theirs
    for name in arrays:
        if name not in wanted:
            if name in ignored:
                result.ignored[name] = ignored[name]
            else:
                problems.append(f"unexpected {name} {list(np.shape(arrays[name]))}")
    if problems:
        raise ValueError(f"checkpoint: {len(problems)} variables do not fit {type(net).__name__}:\n  " + "\n  ".join(problems))
    with torch.no_grad():
        for name, value in values.items():
            targets[name].copy_(value)
    return result
