"""The parameters that a rollout takes, as a module has them now."""

from __future__ import annotations

import warnings
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Owner(NamedTuple):
    """A submodule on the way to parameters that are read."""

    parent: int  # its number
    child: str  # its name there
    path: str
    leaves: tuple[tuple[str, str], ...]  # its parameters and buffers: their names in the module and here


@lru_cache(maxsize=256)
def owners_of(names: tuple[str, ...]) -> tuple[Owner, ...]:
    """The module itself and the submodules that lead to these parameters and buffers, each after the one it is in."""
    paths = {"": ("", "")}  # of parent and child
    leaves: dict[str, list[tuple[str, str]]] = {"": []}
    for name in names:
        *parents, leaf = name.split(".")
        path = ""
        for child in parents:
            before, path = path, f"{path}.{child}".lstrip(".")
            paths.setdefault(path, (before, child))
            leaves.setdefault(path, [])
        leaves[path].append((name, leaf))
    numbers = {path: number for number, path in enumerate(paths)}
    return tuple(Owner(numbers[parent], child, path, tuple(leaves[path])) for path, (parent, child) in paths.items())


def current_parameters(
    module: nn.Module,
    owners: tuple[Owner, ...],
) -> dict[str, Tensor]:
    """Parameters and buffers by name, as the attributes give them now: layers may have been replaced by equivalents, and their parameters
    by others (parametrizations, a functional call, ``load_state_dict(assign=True)``). Only the modules on the way are looked at.

    Warns of forward hooks of these submodules: a rollout does not call them.
    """
    found: dict[str, Tensor] = {}
    modules: list[nn.Module] = []
    hooked: list[str] = []
    for parent, child, path, leaves in owners:
        owner = module
        if path:
            above = modules[parent]
            held = above._modules.get(child)
            owner = getattr(above, child) if held is None else held
            if owner._forward_pre_hooks or owner._forward_hooks:
                hooked.append(path)
        modules.append(owner)
        for name, leaf in leaves:
            tensor: Tensor | None = owner._parameters.get(leaf)
            if tensor is None:
                tensor = owner._buffers.get(leaf)
            found[name] = getattr(owner, leaf) if tensor is None else tensor
    if hooked and not torch.compiler.is_compiling():
        for path in hooked:
            warnings.warn(
                f"the forward hooks of submodule {path!r} do not run: a rollout reads its parameters and does not call it. Weights "
                "that a hook computes (torch.nn.utils.spectral_norm, weight_norm, prune) stay what they are: take "
                "torch.nn.utils.parametrizations, or prune.remove first; states of areas are recorded with record=",
                stacklevel=4,
            )
    return found
