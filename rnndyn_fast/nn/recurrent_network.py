"""A network spec as an ``nn.Module`` with parameters."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast.graph.schedule import Schedule, compile_schedule
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.nn.batch_norms import move_statistics, norms_in_training
from rnndyn_fast.nn.blt_conv import BLTConv
from rnndyn_fast.nn.changed_layers import changed_layers, described
from rnndyn_fast.nn.derived_network import module_at
from rnndyn_fast.nn.experiments import Experiments
from rnndyn_fast.nn.layer_checks import HOOKS, check_layer, computes_as
from rnndyn_fast.nn.layers import leaf_layers
from rnndyn_fast.nn.parameters import Current, ModuleReader
from rnndyn_fast.nn.tracing import NotScriptable, refuse_tracers
from rnndyn_fast.program.rollout import rollout


class RecurrentNetwork(NotScriptable, Experiments, nn.Module):
    """Any connection graph as a module: it owns the parameters that its spec names, and runs them through time.

    Args:
        network: the spec; parameter ``a.b.weight`` becomes attribute ``a.b.weight``. Initialisation is that of ``nn.Conv2d``,
            ``nn.ConvTranspose2d``, ``nn.Linear`` and ``nn.LayerNorm``.
        timesteps: T >= 1; the attribute of that name may be changed later.
        backend, engine: see :func:`rnndyn_fast.rollout`; attributes of those names may be changed later.
        modules: top-level modules to use in place of ones built here, by name.

    A rollout reads the layers and does not call them. What is changed in them later counts as if they were called one by one (a replaced
    layer, stride, padding, eps, a bias that comes or goes, an Identity for a norm, a frozen batch norm), or raises an error that names
    module and attribute (dilation, hooks, a ``forward`` of their own). The readout is called.

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
        self._changes, self._in_force, self._given, self._traced = (), "", {}, SimpleNamespace()
        for name, module in (modules or {}).items():
            self.add_module(name, module)
        for path, leaf in leaf_layers(network):
            if not (modules and path.split(".")[0] in modules):
                _place(self, path, leaf)
        read = {name.rpartition(".")[0] for name in (*network.parameter_shapes, *network.buffer_shapes)}
        unread = frozenset(path for path, m in self.named_modules() if m._parameters and path not in read)
        held = {type(part) for m in (modules or {}).values() for part in m.modules() if next(part.children(), None) is not None}
        self._reader = ModuleReader((BLTConv, *held), unread)
        missing = network.parameter_shapes.keys() - dict(self.named_parameters()).keys()
        if missing:
            raise ValueError(f"modules: parameters {sorted(missing)} of the spec are missing")

    def current(self) -> Current:
        """The network as its modules are now, and its parameters. Raises TypeError, ValueError: as :meth:`run`."""
        now = self._reader.read(self, self.network)
        return self._with_interventions(now) if self._in_force else now

    def version(self) -> Hashable:
        """What its rollouts depend on besides parameters: it differs after any change that its modules honour."""
        return self.current().network, self.interventions

    @property
    def config(self) -> dict[str, Any]:
        """What :func:`rnndyn_fast.models.build` builds this network from: its options, and under "layers" what has been changed since in
        its layers. (Parameters are not in it.)

        Raises:
            TypeError: a change that cannot be made again, or interventions that are in force; names module and attribute.
            AttributeError: a network that was not built by name.
        """
        options, network, timesteps, built = self._as_built
        if self.interventions:
            raise TypeError(f"interventions: expected none in force, which are not saved, got {len(self.interventions)}; leave the block")
        if self.network != network:
            raise TypeError(f"network: expected the spec that {options['model']!r} was built with, got another one, which is not saved")
        if self.timesteps != timesteps:
            by_step = any(area.norm_steps is not None for area in network.areas)  # (norms, for as many steps as it was built with)
            if "presentation" in options or (by_step and self.timesteps < timesteps):  # (a presentation says when the image goes)
                raise TypeError(f"timesteps: expected {timesteps}, as the network was built, got {self.timesteps}; build it with as many")
            if not by_step:
                options = {**options, "timesteps": self.timesteps}
        now = self.current().network
        changes = changed_layers(self, built)
        if now == network:  # (so flags that areas have been given say what is the case anyway)
            changes = {path: change for path, change in changes.items() if "class" in change}
        return {**options, "layers": changes} if changes else dict(options)

    @config.setter
    def config(self, options: dict[str, Any]) -> None:
        self._as_built = options, self.network, self.timesteps, described(self)

    @staticmethod
    def _recorded(network: Network, record: Iterable[str]) -> tuple[str, ...]:
        first = (network.readout.source,) if network.readout else (network.areas[-1].name,)
        return tuple(dict.fromkeys((*first, *record)))

    def schedule(self, record: Sequence[str] = (), timesteps: int | None = None) -> Schedule:
        """The schedule of this network's rollout; ``print`` it for the plan."""
        steps = self.timesteps if timesteps is None else timesteps
        now = self.current()
        return compile_schedule(now.network, steps, [now.names.get(name, name) for name in self._recorded(self.network, record)])

    @property
    def first_output(self) -> int:
        """The time step of the first answer. Raises ValueError: no readout, or fewer time steps."""
        readout = self.network.readout
        if readout is None:
            raise ValueError(f"network {self.network.name!r} has no readout")
        first = max(readout.first_step, self.schedule().first_step[readout.source])
        if first >= self.timesteps:
            raise ValueError(f"timesteps: expected more than {first}, the step of the first answer, got {self.timesteps}")
        return first

    def readout_map(self) -> tuple[Tensor, Tensor | None]:
        """Weight [classes, D] and bias [classes] of the readout; without a map of its own, ones that select its channels."""
        readout = self.network.readout
        if readout is None:
            raise ValueError(f"network {self.network.name!r} has no readout")
        if readout.parameter is not None:
            module = self._readout(readout.parameter)
            check_layer(readout.parameter, module, (nn.Linear,), "the zones of a readout are those of a linear map")
            return module.weight, module.bias
        example = next(self.parameters())
        return torch.eye(readout.num_classes, self.network.shapes[readout.source][0], dtype=example.dtype, device=example.device), None

    def logits(
        self,
        representations: Tensor,  # [T, N, D]
    ) -> Tensor:
        """What the readout's softmax takes: [T, N, classes]."""
        readout = self.network.readout
        if readout is None:
            raise ValueError(f"network {self.network.name!r} has no readout")
        device = representations.device.type
        # (Small, and the logarithm that follows needs the precision.)
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            if readout.parameter is None:
                logits = representations[..., : readout.num_classes]
            else:
                logits = _called(self._readout(readout.parameter), representations)
        return logits.cumsum(0) if readout.cumulative else logits

    def _readout(self, path: str) -> Any:
        """The readout's module, which is called. Raises TypeError: there is none."""
        module = module_at(self, path)
        if not isinstance(module, nn.Module):
            raise TypeError(f"{path}: expected a module from [N, D] to [N, classes], got {module!r}")
        return module

    def log_probabilities(
        self,
        representations: Tensor,  # [T, N, D]
    ) -> Tensor:
        """Log-probabilities, clamped as the readout says: [T, N, classes]."""
        logits, readout = self.logits(representations), self.network.readout
        if readout is None or readout.clamp is None:
            return functional.log_softmax(logits, dim=-1)
        return torch.log(torch.clamp(functional.softmax(logits, dim=-1), readout.clamp, 1.0))

    def forward(
        self,
        *inputs: Tensor,  # [N, C, H, W] each, or [T, N, C, H, W]
        return_representations: bool = False,
        record: Sequence[str] = (),
    ) -> Any:
        """As :meth:`run`, where a published class does not say otherwise."""
        refuse_tracers(type(self).__name__, inputs)
        return self.run(*inputs, return_representations=return_representations, record=record)

    def run(
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
        refuse_tracers(type(self).__name__, inputs)
        if isinstance(record, str):
            raise TypeError(f"record: expected a sequence of area names, got the string {record!r}")
        names = self._recorded(self.network, record)
        states = self.states(inputs, names)
        recorded = {name: state for name, state in zip(names, states, strict=True) if name in record}
        if self.network.readout is None:
            return recorded or {names[0]: states[0]}
        # From the readout's first step on. (Its states are those of the last steps; torch.compile cannot trace `first_output`.)
        skipped = max(0, self.network.readout.first_step - (self.timesteps - len(states[0])))
        if skipped >= len(states[0]):
            raise ValueError(f"timesteps: the readout begins at step {self.network.readout.first_step}, got {self.timesteps}")
        representations = states[0][skipped:].flatten(2)
        result: list[Any] = [self.log_probabilities(representations)]
        if return_representations:
            result.append(representations)
        if record:
            result.append(recorded)
        return tuple(result) if len(result) > 1 else result[0]

    def states(self, inputs: Sequence[Tensor], names: Sequence[str]) -> list[Tensor]:
        """States of some areas, [T', N, C, H, W] each (see :func:`rnndyn_fast.rollout`). Training moves the running statistics."""
        refuse_tracers(type(self).__name__, inputs)
        now = self.current()
        if self._in_force:
            self._check_functions(inputs)
            names = [now.names.get(name, name) for name in names]
        parameters = now.parameters
        statistics: dict[str, tuple[Tensor, Tensor]] | None = None
        if now.network.buffer_shapes:
            if norms_in_training(self, now.network):
                statistics = {}
            else:
                parameters = {**parameters, **now.buffers(self)}
        states = rollout(
            now.network, self.timesteps, inputs, parameters, names, backend=self.backend, engine=self.engine, statistics=statistics
        )
        for prefix, (mean, var) in (statistics or {}).items():
            move_statistics(self.get_submodule(prefix), mean, var)
        return states

    def __dir__(self) -> list[str]:
        # (torch.jit asks for every name in here; this one has no value without a readout.)
        return [name for name in super().__dir__() if name != "first_output" or self.network.readout is not None]

    def extra_repr(self) -> str:
        """Shown by ``print(net)``."""
        return f"{self.network.name}, timesteps={self.timesteps}, backend={self.backend!r}, engine={self.engine!r}"


def _called(
    module: Any,
    representations: Tensor,  # [T, N, D]
) -> Tensor:
    """A readout of every time step: [T, N, classes]. A linear map takes all at once, any other module a step at a time."""
    example = next(module.parameters(), representations)
    x = representations.to(example.dtype)
    if computes_as(module, nn.Linear) and not any(getattr(module, name) for name in HOOKS) and "forward" not in vars(module):
        return module(x)
    return torch.stack([module(step) for step in x])


def _place(root: nn.Module, path: str, leaf: nn.Module | nn.Parameter) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    setattr(root, last, leaf)
