"""A network spec as an ``nn.Module`` with parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast.graph.rollout import rollout
from rnndyn_fast.graph.schedule import Schedule, compile_schedule
from rnndyn_fast.graph.spec import Connection, Network, Norm, Operator


class RecurrentNetwork(nn.Module):
    """Any connection graph as a module: it owns the parameters that its spec names, and runs them through time.

    Args:
        network: the spec; parameter ``a.b.weight`` becomes attribute ``a.b.weight``. Initialisation is that of ``nn.Conv2d``,
            ``nn.ConvTranspose2d``, ``nn.Linear`` and ``nn.LayerNorm``.
        timesteps: T >= 1; the attribute of that name may be changed later.
        backend, engine: see :func:`rnndyn_fast.graph.rollout`; attributes of those names may be changed later.
        modules: top-level modules to use in place of ones built here, by name.

    >>> from rnndyn_fast.models import blt_net_64
    >>> net = RecurrentNetwork(blt_net_64(widths=(2, 4, 8, 16, 32)).network, timesteps=4)
    >>> net(torch.zeros(2, 3, 64, 64)).shape
    torch.Size([4, 2, 100])
    """

    def __init__(
        self,
        network: Network,
        timesteps: int,
        *,
        backend: str | None = None,
        engine: str = "auto",
        modules: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__()
        compile_schedule(network, timesteps, self._recorded(network, ()))
        self.network = network
        self.timesteps = timesteps
        self.backend = backend
        self.engine = engine
        for name, module in (modules or {}).items():
            self.add_module(name, module)
        for path, module in _leaf_modules(network):
            if not (modules and path.split(".")[0] in modules):
                _place(self, path, module)
        missing = network.parameter_shapes.keys() - dict(self.named_parameters()).keys()
        if missing:
            raise ValueError(f"modules: parameters {sorted(missing)} of the spec are missing")

    @staticmethod
    def _recorded(network: Network, record: Iterable[str]) -> tuple[str, ...]:
        first = (network.readout.source,) if network.readout else (network.areas[-1].name,)
        return tuple(dict.fromkeys((*first, *record)))

    def schedule(self, record: Sequence[str] = (), timesteps: int | None = None) -> Schedule:
        """The schedule of this network's rollout; ``print`` it for the plan."""
        return compile_schedule(self.network, self.timesteps if timesteps is None else timesteps, self._recorded(self.network, record))

    def log_probabilities(
        self,
        representations: Tensor,  # [T, N, D]
    ) -> Tensor:
        """Clamped log-probabilities, log(clamp(softmax(W r + b), 1e-10, 1)): [T, N, classes]."""
        readout = self.network.readout
        if readout is None:
            raise ValueError(f"network {self.network.name!r} has no readout")
        module = self.get_submodule(readout.parameter)
        with torch.autocast(representations.device.type, enabled=False):  # small, and its logarithm needs the precision
            logits = module(representations.to(next(module.parameters()).dtype))
        return torch.log(torch.clamp(functional.softmax(logits, dim=-1), readout.clamp, 1.0))

    def forward(
        self,
        *inputs: Tensor,  # [N, C, H, W] each, or [T, N, C, H, W]
        return_representations: bool = False,
        record: Sequence[str] = (),
    ) -> Any:
        """Run the network through time.

        Returns:
            log-probabilities [T, N, classes], which iterate over time steps; with ``return_representations`` also the readout area's
            states [T, N, D]; with ``record`` also a dict area -> states [T, N, C, H, W], in that order. A network without readout
            returns the dict alone. T counts from the first step at which an area has a state (always the first in an engineering
            unroll).

        Raises:
            ValueError, TypeError: naming the argument, what was expected, what came.
        """
        if isinstance(record, str):
            raise TypeError(f"record: expected a sequence of area names, got the string {record!r}")
        names = self._recorded(self.network, record)
        parameters = dict(self.named_parameters())
        for name in self.network.parameter_shapes:
            # Modules may have been replaced by equivalents (weight norm, a functional call): take what the attribute gives now.
            if name not in parameters:
                owner, _, leaf = name.rpartition(".")
                parameters[name] = getattr(self.get_submodule(owner), leaf)
        states = rollout(self.network, self.timesteps, inputs, parameters, names, backend=self.backend, engine=self.engine)
        recorded = {name: state for name, state in zip(names, states, strict=True) if name in record}
        if self.network.readout is None:
            return recorded or {names[0]: states[0]}
        representations = states[0].flatten(2)
        result: list[Any] = [self.log_probabilities(representations)]
        if return_representations:
            result.append(representations)
        if record:
            result.append(recorded)
        return tuple(result) if len(result) > 1 else result[0]

    def extra_repr(self) -> str:
        """Shown by ``print(net)``."""
        return f"{self.network.name}, timesteps={self.timesteps}, backend={self.backend!r}, engine={self.engine!r}"


def connection_module(network: Network, c: Connection) -> nn.Module:
    """The ``torch.nn`` module that holds a connection's parameters."""
    source, target = network.shapes[c.source][0], network.shapes[c.target][0]
    g = c.geometry
    if c.operator is Operator.LINEAR:
        return nn.Linear(source, target, bias=c.bias)
    if c.operator is Operator.CONV:
        return nn.Conv2d(source, target, c.kernel_size, g.stride, g.padding, bias=c.bias)
    return nn.ConvTranspose2d(source, target, c.kernel_size, g.stride, g.padding, g.output_padding, bias=c.bias)


def _leaf_modules(network: Network) -> Iterable[tuple[str, nn.Module]]:
    placed = set()
    for area in network.areas:
        for c in network.connections:
            if c.target == area.name and c.parameter is not None and c.parameter not in placed:
                placed.add(c.parameter)
                yield c.parameter, connection_module(network, c)
        if area.norm is Norm.LAYER and area.norm_parameter not in placed:
            assert area.norm_parameter is not None
            placed.add(area.norm_parameter)
            yield area.norm_parameter, nn.LayerNorm(network.norm_shape(area), eps=area.eps)
    if network.readout is not None:
        channels = network.shapes[network.readout.source][0]
        yield network.readout.parameter, nn.Linear(channels, network.readout.num_classes, bias=network.readout.bias)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    *parents, leaf = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    root.add_module(leaf, module)
