"""What a rollout takes from a module as it is now: its network, and parameters by name.

The network is derived from the modules once (:mod:`rnndyn_fast.nn.derived_network`); each call then looks whether anything has changed that
it depends on: submodules, their classes, hooks, and the attributes that decide what a layer computes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Hashable, Mapping
from functools import lru_cache
from operator import attrgetter, itemgetter
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.nn.derived_network import FLAGS, Derived, derive
from rnndyn_fast.nn.layer_checks import HOOKS, refuse_global_hooks
from rnndyn_fast.torch_internals import GLOBAL_HOOKS, constant_when_compiled

# What the forward methods of these layers read besides parameters and buffers.
_READ: tuple[tuple[type[nn.Module], tuple[str, ...]], ...] = (
    (nn.Conv2d, ("stride", "padding", "dilation", "groups", "padding_mode")),
    (nn.ConvTranspose2d, ("stride", "padding", "dilation", "groups", "padding_mode", "output_padding")),
    (nn.LayerNorm, ("normalized_shape", "eps")),
    (nn.GroupNorm, ("num_groups", "eps")),
    (nn.BatchNorm2d, ("num_features", "eps", "training")),
)
_NONE: Mapping[str, Any] = {}
_ALL_MODULES = tuple(GLOBAL_HOOKS.values())
_MOST_NETWORKS = 16  # of one module: a layer has one for each size of its input


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


def _submodules(root: nn.Module, owners: tuple[Owner, ...]) -> list[nn.Module]:
    found: list[nn.Module] = []
    for parent, child, path, _ in owners:
        if not path:
            found.append(root)
            continue
        held = found[parent]._modules.get(child)
        found.append(getattr(found[parent], child) if held is None else held)
    return found


class _Snapshot:
    """A derived network, what it was derived from, and where its parameters are."""

    def __init__(self, root: nn.Module, base: Network, derived: Derived) -> None:
        self.base, self.derived = base, derived
        taken = (*derived.network.parameter_shapes, *derived.network.buffer_shapes)
        owners = owners_of(tuple(dict.fromkeys((*taken, *base.parameter_shapes, *base.buffer_shapes))))
        there = {owner.path: module for owner, module in zip(owners, _modules_there(root, owners), strict=True) if module is not None}
        self._children = [m._modules for m in (root, *there.values())]
        self._children_then = [dict(c) for c in self._children]
        modules = [m for path, m in there.items() if path]
        self._modules = modules
        self._types = list(map(type, modules))
        self._dicts = [vars(m) for m in modules]
        self._sizes = list(map(len, self._dicts))
        self._hooks = [getattr(m, name) for m in modules for name in HOOKS]
        self._groups: list[tuple[Callable[[Any], Any], list[Any], list[Any]]] = []
        for cls, names in _READ:
            self._watch([m for m in modules if isinstance(m, cls)], names)
        flagged: dict[tuple[str, ...], list[nn.Module]] = {}
        for m in modules:
            flagged.setdefault(tuple(name for name in FLAGS if name in vars(m)), []).append(m)
        for names, some in flagged.items():
            self._watch(some, names)
        absent = [(m._parameters, kind) for m in modules for kind in ("weight", "bias") if kind in m._parameters]
        self._absent = [(held.get, kind) for held, kind in absent if held[kind] is None]
        self.parameters = self._sources(there, derived.network.parameter_shapes)
        self.buffers = self._sources(there, derived.network.buffer_shapes)
        self._constants: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}

    def _watch(self, modules: list[Any], names: tuple[str, ...]) -> None:
        if not modules or not names:
            return
        # (Half the time of attributes, where no class computes them.)
        plain = all(name in vars(m) and not hasattr(type(m), name) for m in modules for name in names)
        get, where = (itemgetter(*names), list(map(vars, modules))) if plain else (attrgetter(*names), modules)
        self._groups.append((get, where, list(map(get, where))))

    def _sources(self, there: Mapping[str, nn.Module], names: Any) -> list[tuple[str, Mapping[str, Any], str, nn.Module]]:
        found = []
        for name in names:
            if name not in self.derived.filled:
                path, _, leaf = name.rpartition(".")
                owner = there[path]
                # (A class may compute it, as parametrizations do.)
                plain = not hasattr(type(owner), leaf)
                held = next((d for d in (owner._parameters, owner._buffers) if plain and leaf in d), _NONE)
                found.append((name, held, leaf, owner))
        return found

    def holds(self, root: nn.Module, base: Network) -> bool:
        """Whether nothing has changed."""
        if base is not self.base or root._modules is not self._children[0] or any(self._hooks):
            return False
        if self._children != self._children_then or list(map(type, self._modules)) != self._types:
            return False
        if list(map(len, self._dicts)) != self._sizes:
            return False
        try:
            for get, where, then in self._groups:
                if list(map(get, where)) != then:
                    return False
        except (AttributeError, KeyError):  # one was deleted
            return False
        return not self._absent or [get(kind) for get, kind in self._absent].count(None) == len(self._absent)

    def values(self, sources: list[tuple[str, Mapping[str, Any], str, nn.Module]]) -> dict[str, Tensor] | None:
        """Tensors by name; None: one is missing."""
        found = {}
        for name, held, leaf, owner in sources:
            tensor = held.get(leaf)
            if tensor is None:
                tensor = getattr(owner, leaf, None)
                if tensor is None:
                    return None
            found[name] = tensor
        return found

    def fill(self, found: dict[str, Tensor]) -> None:
        """Add the parameters that no module has."""
        example = next(iter(found.values()), None)
        dtype, device = (torch.get_default_dtype(), torch.device("cpu")) if example is None else (example.dtype, example.device)
        for name, value in self.derived.filled.items():
            if name in self.derived.network.parameter_shapes:
                key = (name, dtype, device)
                if key not in self._constants:
                    with torch.inference_mode(False):
                        shape = self.derived.network.parameter_shapes[name]
                        self._constants[key] = torch.full(shape, value, dtype=dtype, device=device)
                found[name] = self._constants[key]


def _modules_there(root: nn.Module, owners: tuple[Owner, ...]) -> list[nn.Module | None]:
    """Submodules, or None where there is none any more."""
    found: list[nn.Module | None] = []
    for parent, child, path, _ in owners:
        above = found[parent] if path else None
        held = root if not path else None if above is None else getattr(above, child, None)
        found.append(held if isinstance(held, nn.Module) else None)
    return found


class Current(NamedTuple):
    """A network as its modules are now. ``names``: what recorded states are called in it, where that is not as ever."""

    network: Network
    parameters: dict[str, Tensor]
    snapshot: _Snapshot | None
    names: Mapping[str, str] = _NONE

    def buffers(self, root: nn.Module) -> dict[str, Tensor]:
        """Its running statistics."""
        if self.snapshot is None:
            return _walk(root, self.network.buffer_shapes)
        found = self.snapshot.values(self.snapshot.buffers)
        if found is None:
            missing = next(name for name, _, leaf, owner in self.snapshot.buffers if getattr(owner, leaf, None) is None)
            raise TypeError(f"{missing}: expected a tensor, got None")
        return found


class ModuleReader:
    """Reads one module; it keeps what it has derived. (Copies of the module begin anew.)"""

    def __init__(self, containers: tuple[type[nn.Module], ...] = (), unread: frozenset[str] = frozenset()) -> None:
        self._options = containers, unread
        self._snapshots: dict[Network, _Snapshot] = {}
        self._latest: _Snapshot | None = None
        self.traced = SimpleNamespace()  # what compiled calls run

    def __reduce__(self) -> Any:
        return ModuleReader, self._options

    def read(self, root: nn.Module, base: Network) -> Current:
        """The network and its parameters.

        Raises:
            TypeError, ValueError: naming the module and the attribute that no network can say.
        """
        if torch.compiler.is_compiling():
            traced: _Traced = getattr(self.traced, _derive_while_tracing(self, root, base))
            derived = traced.derived
            _show_to_compiler(root, base, traced.hooks)
            found = _walk(root, tuple(name for name in derived.network.parameter_shapes if name not in derived.filled))
            example = next(iter(found.values()))
            for name, value in derived.filled.items():
                if name in derived.network.parameter_shapes:
                    found[name] = torch.full(derived.network.parameter_shapes[name], value, dtype=example.dtype, device=example.device)
            return Current(derived.network, found, None)
        if any(_ALL_MODULES):
            refuse_global_hooks()
        snapshot, parameters = self._latest, None
        if snapshot is not None and snapshot.holds(root, base):
            parameters = snapshot.values(snapshot.parameters)
        if snapshot is None or parameters is None:
            with parametrize.cached():  # (one evaluation of each parametrization, as in other calls)
                snapshot = self._take(root, base, anew=snapshot is not None and snapshot.holds(root, base))
                parameters = snapshot.values(snapshot.parameters)
                assert parameters is not None
        if snapshot.derived.filled:
            snapshot.fill(parameters)
        return Current(snapshot.derived.network, parameters, snapshot)

    def version(self, root: nn.Module) -> Hashable:
        """The networks that it has read, as they are now."""
        return tuple(self.derived(root, base).network for base in self._snapshots)

    def derived(self, root: nn.Module, base: Network) -> Derived:
        """The network that the modules are."""
        return derive(root, base, *self._options)

    def _take(self, root: nn.Module, base: Network, *, anew: bool = False) -> _Snapshot:
        snapshot = self._snapshots.get(base)
        if anew or snapshot is None or not snapshot.holds(root, snapshot.base):
            snapshot = _Snapshot(root, base, self.derived(root, base))
            if len(self._snapshots) >= _MOST_NETWORKS:
                self._snapshots.clear()
            self._snapshots[base] = snapshot
        self._latest = snapshot
        return snapshot


class _Traced(NamedTuple):
    """What a compiled call runs. ``hooks``: those of its modules and of all modules."""

    derived: Derived
    hooks: list[Mapping[int, Any]]


def stored(store: SimpleNamespace, key: str, make: Callable[[], Any]) -> str:
    """The name of an attribute that holds what is made, once for the same key. (Compiled calls compare the attributes that they read: of a
    dict they would compare all keys.)"""
    name = f"_{hashlib.sha256(key.encode()).hexdigest()}"
    if not hasattr(store, name):
        setattr(store, name, make())
    return name


@constant_when_compiled
def _derive_while_tracing(reader: ModuleReader, root: nn.Module, base: Network) -> str:
    """A compiler traces calls, and so finds out here what the modules are; it does not see what is changed in them afterwards."""
    refuse_global_hooks()
    derived = reader.derived(root, base)
    modules = [module for _, module in _tree(root, (*base.parameter_shapes, *base.buffer_shapes))]
    hooks = [*_ALL_MODULES, *(getattr(m, name) for m in modules for name in HOOKS)]
    key = f"{derived.network.to_json()} {sorted(derived.filled.items())} {[id(h) for h in hooks]}"
    return stored(reader.traced, key, lambda: _Traced(derived, hooks))


@constant_when_compiled
def _constant(module: nn.Module, name: str) -> float:
    return float(getattr(module, name))


def _show_to_compiler(root: nn.Module, base: Network, hooks: list[Mapping[int, Any]]) -> int:
    """Read, in code that is traced, what the network was derived from, so that compiled calls look at it again: compare each value."""
    # (Of the attributes of modules that hold them, a compiler looks at none again.)
    seen = sum([len(held) for held in hooks])
    for _, module in _tree(root, (*base.parameter_shapes, *base.buffer_shapes)):
        for cls, names in _READ:
            if isinstance(module, cls):
                for name in names:
                    value = getattr(module, name)
                    # (A number is compared with itself as a constant, else a compiler takes it for one that may vary.)
                    seen += value == _constant(module, name) if isinstance(value, float) else value is None
        for name in ("weight", "bias"):
            if name in module._parameters:
                seen += module._parameters[name] is None
        for name in FLAGS:
            if name in module.__dict__:
                seen += getattr(module, name) is None
    return seen


def _tree(root: nn.Module, names: tuple[str, ...]) -> list[tuple[str, nn.Module]]:
    owners = owners_of(tuple(dict.fromkeys(names)))
    there = zip(owners, _modules_there(root, owners), strict=True)
    return [(owner.path, module) for owner, module in there if module is not None and owner.path]


def _walk(root: nn.Module, names: Any) -> dict[str, Tensor]:
    """Parameters and buffers by name, in operations that a compiler can trace."""
    owners = owners_of(tuple(names))
    found: dict[str, Tensor] = {}
    for (_, _, _, leaves), module in zip(owners, _submodules(root, owners), strict=True):
        for name, leaf in leaves:
            tensor: Tensor | None = module._parameters.get(leaf)
            if tensor is None:
                tensor = module._buffers.get(leaf)
            found[name] = getattr(module, leaf) if tensor is None else tensor
    return found
