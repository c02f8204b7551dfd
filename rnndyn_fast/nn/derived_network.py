"""The spec of the network that a module tree is now: that it was built with, and what has been changed in its layers since.

A change that the spec can say is taken over (stride, padding, kernel size, groups, whether there is a bias; kind and ``eps`` of norms; the
flags of a published area); any other raises ``TypeError`` or ``ValueError`` that names the module and the attribute.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import nn

from rnndyn_fast.graph.spec.network import Area, Connection, Interaction, Network, Norm, Operator, Pool, Role
from rnndyn_fast.nn.batch_norms import takes_the_batch
from rnndyn_fast.nn.layer_checks import check_layer, check_same_conv, computes_as, conv_fields, refuse_hooks
from rnndyn_fast.nn.layers import cell_layers, leaf_layers

FLAGS = ("lateral_connect", "topdown_connect", "LT_interaction", "pool_input")  # of a published area, which is not called
_FLAG_OF = {Role.LATERAL: "lateral_connect", Role.TOP_DOWN: "topdown_connect"}
_CONVOLUTIONS = {Operator.CONV: nn.Conv2d, Operator.CONV_TRANSPOSE: nn.ConvTranspose2d, Operator.LINEAR: nn.Linear}


def parse_interaction(value: str | None) -> Interaction:
    """``LT_interaction`` as published: "additive" or "multiplicative" (None, used for one time step, counts as additive)."""
    if value is None:
        return Interaction.ADDITIVE
    try:
        return Interaction(value)
    except ValueError:
        raise ValueError(f"LT_interaction: expected 'additive' or 'multiplicative', got {value!r}") from None


@dataclass(frozen=True)
class Derived:
    """A network as its modules are now.

    ``filled``: parameters that no module has, and the number that stands in all their entries: affine maps of norms without one.
    ``changes``: what differs from the spec that it was built with, in words.
    """

    network: Network
    filled: Mapping[str, float] = field(default_factory=dict)
    changes: tuple[str, ...] = ()


def module_at(root: nn.Module, path: str) -> Any:
    """What is at a path: a module, or None. Containers on the way are checked as they are passed."""
    found: Any = root
    passed = ""
    for name in path.split("."):
        if not isinstance(found, nn.Module):
            raise TypeError(f"{passed}: expected a module with {path.removeprefix(passed)[1:]!r}, got {found!r}")
        found, passed = getattr(found, name, None), f"{passed}.{name}".lstrip(".")
    return found


def _check_container(path: str, module: Any, known: tuple[type[nn.Module], ...]) -> None:
    """Modules between the root and the layers are not called."""
    if isinstance(module, nn.Module) and (type(module).forward is nn.Module.forward or any(computes_as(module, cls) for cls in known)):
        refuse_hooks(path, module)
        return
    if not isinstance(module, nn.Module):
        raise TypeError(f"{path}: expected a module that holds layers, got {module!r}")
    own = type(module).__name__
    raise TypeError(
        f"{path}: expected a module whose parameters are read, got {own} with a forward of its own, which a rollout would not call"
    )


class _Derivation:
    def __init__(self, root: nn.Module, network: Network, containers: tuple[type[nn.Module], ...], unread: frozenset[str]) -> None:
        self.root, self.base, self.containers, self.unread = root, network, containers, unread
        self.filled: dict[str, float] = {}
        self.changes: list[str] = []
        self._seen: set[str] = set()

    def container(self, path: str) -> Any:
        """What holds layers, checked with all that it is in."""
        parents = path.split(".") if path else []
        for n in range(1, len(parents) + 1):
            above = ".".join(parents[:n])
            if above not in self._seen:
                self._seen.add(above)
                _check_container(above, module_at(self.root, above), self.containers)
        return module_at(self.root, path) if path else self.root

    def layer(self, path: str) -> Any:
        self.container(path.rpartition(".")[0])
        return module_at(self.root, path)

    def change(self, path: str, attribute: str, value: Any) -> None:
        self.changes.append(f"{path}.{attribute} = {value}")

    @cached_property
    def built(self) -> dict[str, Any]:
        """The layers as they were built."""
        with torch.device("meta"):
            return dict(leaf_layers(self.base))

    # ---------------------------------------------------------------- connections

    def flags(self, c: Connection) -> dict[str, Any]:
        """Those of the area that a connection's layer is in."""
        container, _, _ = str(c.parameter).rpartition(".")
        held = vars(self.container(container)) if container else {}
        return {name: held[name] for name in FLAGS if name in held}

    def connections(self) -> tuple[Connection, ...]:
        found: list[Connection] = []
        for c in self.base.connections:
            if c.parameter is None:
                found.append(c)
                continue
            for name in c.weights:
                self.layer(name.removesuffix(".weight"))
            flags, container = self.flags(c), str(c.parameter).rpartition(".")[0]
            flag = _FLAG_OF.get(c.role)
            if flag is not None and not flags.get(flag, True):
                self.change(container, flag, flags[flag])
                continue
            if c.role is Role.BOTTOM_UP and "pool_input" in flags and c.pool in (Pool.MAX, Pool.NONE):
                pool = Pool.MAX if flags["pool_input"] else Pool.NONE
                if pool is not c.pool:
                    self.change(container, "pool_input", flags["pool_input"])
                    c = replace(c, pool=pool)
            found.append(self.linear(c))
        self._refuse_unknown_flags()
        return self._with_biases(found)

    def _refuse_unknown_flags(self) -> None:
        """A flag that turns on what the network was built without."""
        there = {str(c.parameter) for c in self.base.connections}
        for path in {str(c.parameter).rpartition(".")[0] for c in self.base.connections if c.parameter is not None} - {""}:
            held = vars(self.container(path))
            for leaf, flag in (("lateral", "lateral_connect"), ("top_down", "topdown_connect")):
                name = f"{path}.{leaf}"
                if held.get(flag) and name not in there and name not in self.unread:
                    raise TypeError(f"{path}.{flag}: expected False, as the network was built without {name}, got {held[flag]!r}")

    def linear(self, c: Connection) -> Connection:
        """A connection as its layers are; biases are put right afterwards."""
        alike = {(o.kernel_size, o.stride, o.padding, o.output_padding, o.groups) for o in self.base.connections if o.weights == c.weights}
        simple = isinstance(c.padding, int) and isinstance(c.output_padding, int) and not c.cut_kernel and len(alike) == 1
        for name in c.weights:
            path = name.removesuffix(".weight")
            layer, flag = self.layer(path), _FLAG_OF.get(c.role)
            remedy = f"to leave the connection out, set {path.rpartition('.')[0]}.{flag} = False" if flag and "." in path else ""
            check_layer(path, layer, (_CONVOLUTIONS[c.operator],), remedy if layer is None else "")
            if layer.weight is None:
                raise TypeError(f"{path}.weight: expected a tensor, got None")
            if c.operator is Operator.LINEAR:
                continue
            if simple and c.middle_channels is None and c.concat is None:
                fields = conv_fields(path, layer)
                changed = {name: value for name, value in fields.items() if getattr(c, name) != value}
                for attribute, value in changed.items():
                    self.change(path, attribute, value)
                c = replace(c, **changed)
                continue
            known = name != c.weights[0] or (isinstance(c.padding, int) and not c.cut_kernel)
            check_same_conv(path, layer, self.built[path], fits=not isinstance(c.output_padding, int), padding_known=known)
        return c

    def _with_biases(self, connections: list[Connection]) -> tuple[Connection, ...]:
        """A bias is there where its layer has one now."""
        by_weights: dict[tuple[str, ...], list[int]] = {}
        for k, c in enumerate(connections):
            if c.weights:
                by_weights.setdefault(c.weights, []).append(k)
        for weights, members in by_weights.items():
            paths = [name.removesuffix(".weight") for name in weights]
            fields = ("bias",) if len(weights) == 1 else ("middle_bias", "bias")
            for attribute, path in zip(fields, paths, strict=True):
                there = module_at(self.root, path).bias is not None
                if there == any(getattr(connections[k], attribute) for k in members):
                    continue
                self.change(path, "bias", "a tensor" if there else None)
                first = connections[members[0]].concat is not None  # (the parts of one convolution share its bias)
                for k in members[:1] if there and first else members:
                    connections[k] = replace(connections[k], **{attribute: there})  # type: ignore[arg-type]
        return tuple(connections)

    # ---------------------------------------------------------------- areas

    def areas(self) -> tuple[Area, ...]:
        areas = [self.area(area) for area in self.base.areas]
        # Batch norms of some areas are frozen, and those of others are not.
        by_batch = {area.name: takes_the_batch(self.root, self.base, area) for area in areas if area.norm is Norm.BATCH}
        if len(set(by_batch.values())) > 1:
            self.changes += [f"batch norms of area {name!r} frozen" for name, batch in by_batch.items() if not batch]
            areas = [replace(area, norm_frozen=not by_batch.get(area.name, True)) for area in areas]
        return tuple(areas)

    def area(self, area: Area) -> Area:
        if area.cell is not None:
            return self.cell(area)
        if area.interaction in (Interaction.ADDITIVE, Interaction.MULTIPLICATIVE):
            area = self.interaction(area)
        if area.norm is Norm.BATCH:
            return self.batch_norm(area)
        path = area.norm_parameter or f"{area.name}_ln"
        layer = self.layer(path) if area.norm is not Norm.NONE or path in self.root._modules else None
        return area if area.norm is Norm.NONE and layer is None else self.norm(area, path, layer)

    def interaction(self, area: Area) -> Area:
        """By the flag of the published area that holds the layers."""
        paths = {str(c.parameter).rpartition(".")[0] for c in self.base.connections if c.target == area.name and c.parameter is not None}
        for path in sorted(paths - {""}):
            held = vars(self.container(path))
            if "LT_interaction" in held:
                try:
                    interaction = parse_interaction(held["LT_interaction"])
                except ValueError as error:
                    raise ValueError(f"{path}.{error}") from None
                if interaction is not area.interaction:
                    self.change(path, "LT_interaction", held["LT_interaction"])
                    return replace(area, interaction=interaction)
        return area

    def norm(self, area: Area, path: str, layer: Any) -> Area:
        """LayerNorm, GroupNorm, or nothing."""
        check_layer(path, layer, (nn.LayerNorm, nn.GroupNorm, nn.Identity))
        if isinstance(layer, nn.Identity):
            if area.norm is not Norm.NONE:
                self.changes.append(f"{path} = Identity()")
            return replace(area, norm=Norm.NONE)
        if isinstance(layer, nn.LayerNorm):
            wanted = self.base.norm_shape(replace(area, norm=Norm.LAYER))
            if tuple(layer.normalized_shape) != wanted:
                raise ValueError(f"{path}.normalized_shape: expected {wanted}, the map of area {area.name!r}, got {layer.normalized_shape}")
            found = replace(area, norm=Norm.LAYER, norm_groups=1, eps=layer.eps, norm_parameter=path)
        else:
            if layer.num_channels != area.channels:
                raise ValueError(f"{path}.num_channels: expected {area.channels}, got {layer.num_channels}")
            found = replace(area, norm=Norm.GROUP, norm_groups=layer.num_groups, eps=layer.eps, norm_parameter=path)
        for attribute in ("norm", "norm_groups", "eps"):
            if getattr(found, attribute) != getattr(area, attribute):
                self.change(path, attribute, getattr(found, attribute))
        self.affine(path, layer)
        return found

    def affine(self, path: str, layer: Any) -> None:
        """Parameters of a norm that are not there count as ones and zeros."""
        for name, value in (("weight", 1.0), ("bias", 0.0)):
            if getattr(layer, name) is None:
                self.filled[f"{path}.{name}"] = value

    def batch_norm(self, area: Area) -> Area:
        """Of every time step; all need one eps."""
        eps: dict[float, str] = {}
        for path in self.base.norm_prefixes(area):
            layer = self.layer(path)
            check_layer(path, layer, (nn.BatchNorm2d,))
            if layer.num_features != area.channels:
                raise ValueError(f"{path}.num_features: expected {area.channels}, got {layer.num_features}")
            self.affine(path, layer)
            eps[layer.eps] = path
        if len(eps) > 1:
            (first, one), (second, other) = list(eps.items())[:2]
            raise TypeError(f"{other}.eps: expected {first}, as at the other time steps of area {area.name!r} ({one}), got {second}")
        ((value, path),) = eps.items()
        if value != area.eps:
            self.change(path, "eps", value)
        return replace(area, eps=value)

    def cell(self, area: Area) -> Area:
        """A gated cell's norms, and that its other parameters are there."""
        found, eps = area, {}
        with torch.device("meta"):
            built = dict(cell_layers(self.base, area))
        for path, layer in built.items():
            now = self.layer(path)
            if not isinstance(layer, nn.GroupNorm):
                if now is None:
                    raise TypeError(f"{path}: expected a tensor, got None")
                continue
            check_layer(path, now, (nn.GroupNorm,))
            for attribute in ("num_groups", "num_channels"):
                wanted, got = getattr(layer, attribute), getattr(now, attribute)
                if got != wanted:
                    raise TypeError(f"{path}.{attribute}: expected {wanted}, got {got}")
            self.affine(path, now)
            eps[now.eps] = path
        if len(eps) > 1:
            (first, one), (second, other) = list(eps.items())[:2]
            raise TypeError(f"{other}.eps: expected {first}, as in {one} of the same cell, got {second}")
        for value, path in eps.items():
            if value != area.cell.eps:  # type: ignore[union-attr]
                self.change(path, "eps", value)
                found = replace(area, cell=replace(area.cell, eps=value))  # type: ignore[type-var]
        return found

    def run(self) -> Derived:
        areas, connections = self.areas(), self.connections()
        network = self.base
        if areas != network.areas or connections != network.connections:
            try:
                network = replace(network, areas=areas, connections=connections)
                # (Raises where shapes disagree. What is computed once is there when a compiler traces its use.)
                network.parameter_shapes, network.buffer_shapes  # noqa: B018
            except ValueError as error:
                raise ValueError(f"{', '.join(self.changes)}: {error}") from None
        return Derived(network, self.filled, tuple(self.changes))


def derive(root: nn.Module, network: Network, containers: tuple[type[nn.Module], ...], unread: frozenset[str] = frozenset()) -> Derived:
    """The network that a module tree is.

    Args:
        root: the module that holds the parameters under the names of the spec.
        network: the spec that it was built with.
        containers: classes of modules that hold layers and may be there without being called.
        unread: paths of layers that were there from the beginning and that nothing reads.

    Raises:
        TypeError, ValueError: naming the module and the attribute, what was expected, what came.
    """
    return _Derivation(root, network, containers, unread).run()
