"""A network spec as an ``nn.Module`` with parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from rnndyn_fast.graph.schedule import Schedule, compile_schedule
from rnndyn_fast.graph.spec import Area, Connection, Network, Norm, Operator
from rnndyn_fast.nn.parameters import current_parameters, owners_of
from rnndyn_fast.program.rollout import rollout


class RecurrentNetwork(nn.Module):
    """Any connection graph as a module: it owns the parameters that its spec names, and runs them through time.

    Args:
        network: the spec; parameter ``a.b.weight`` becomes attribute ``a.b.weight``. Initialisation is that of ``nn.Conv2d``,
            ``nn.ConvTranspose2d``, ``nn.Linear`` and ``nn.LayerNorm``.
        timesteps: T >= 1; the attribute of that name may be changed later.
        backend, engine: see :func:`rnndyn_fast.rollout`; attributes of those names may be changed later.
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
        for path, leaf in _leaf_modules(network):
            if not (modules and path.split(".")[0] in modules):
                _place(self, path, leaf)
        self._owners = owners_of((*network.parameter_shapes, *network.buffer_shapes))  # of what a rollout takes
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
            module = self.get_submodule(readout.parameter)
            assert isinstance(module, nn.Linear)
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
        with torch.autocast(representations.device.type, enabled=False):  # small, and the logarithm that follows needs the precision
            if readout.parameter is None:
                logits = representations[..., : readout.num_classes]
            else:
                module = self.get_submodule(readout.parameter)
                logits = module(representations.to(next(module.parameters()).dtype))
        return logits.cumsum(0) if readout.cumulative else logits

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
        named = current_parameters(self, self._owners)
        statistics: dict[str, tuple[Tensor, Tensor]] | None = {} if self.training and self.network.buffer_shapes else None
        states = rollout(
            self.network, self.timesteps, inputs, named, names, backend=self.backend, engine=self.engine, statistics=statistics
        )
        for prefix, (mean, var) in (statistics or {}).items():
            _move_statistics(self.get_submodule(prefix), mean, var)
        return states

    def extra_repr(self) -> str:
        """Shown by ``print(net)``."""
        return f"{self.network.name}, timesteps={self.timesteps}, backend={self.backend!r}, engine={self.engine!r}"


def _move_statistics(norm: Any, mean: Tensor, var: Tensor) -> None:
    with torch.no_grad():
        norm.running_mean.lerp_(mean.to(norm.running_mean.dtype), norm.momentum)
        norm.running_var.lerp_(var.to(norm.running_var.dtype), norm.momentum)
        norm.num_batches_tracked.add_(1)


def connection_modules(network: Network, c: Connection) -> dict[str, nn.Module]:
    """The ``torch.nn`` modules that hold a connection's parameters, by name."""
    modules: dict[str, nn.Module] = {}
    for name, shape in network.weight_shapes(c).items():
        prefix = name.removesuffix(".weight")
        bias = f"{prefix}.bias" in c.biases
        if c.operator is Operator.LINEAR:
            modules[prefix] = nn.Linear(shape[1], shape[0], bias=bias)
        elif c.operator is Operator.CONV_TRANSPOSE:
            window = network.window(c)
            modules[prefix] = nn.ConvTranspose2d(
                shape[0], shape[1], window.kernel, c.stride, window.before, window.output_padding, bias=bias
            )
        else:
            # (Only its parameters are used; a padding that torch has no word for is left out.)
            first = name == c.weights[0]
            groups, window = c.groups if first else 1, network.window(c)
            padding = window.before if first and window.before == window.after else 0
            kernel = window.kernel if first else (1, 1)
            modules[prefix] = nn.Conv2d(shape[1] * groups, shape[0], kernel, c.stride if first else 1, padding, groups=groups, bias=bias)
    return modules


def _norm_module(network: Network, area: Area) -> nn.Module:
    if area.norm is Norm.GROUP:
        return nn.GroupNorm(area.norm_groups, area.channels, area.eps)
    if area.norm is Norm.BATCH:
        return nn.BatchNorm2d(area.channels, area.eps)
    return nn.LayerNorm(network.norm_shape(area), eps=area.eps)


def _cell_modules(network: Network, area: Area) -> Iterable[tuple[str, nn.Module | nn.Parameter]]:
    """A cell's own parameters: norms as modules, others (a decay, peepholes) as they are, zero at first."""
    assert area.cell is not None
    for name, shape in area.cell.parameter_shapes(*network.shapes[area.name]).items():
        prefix, _, kind = f"{area.cell_parameter}.{name}".rpartition(".")
        if kind == "weight":
            yield prefix, nn.GroupNorm(shape[0] // area.channels, shape[0])
        elif kind != "bias":
            yield f"{prefix}.{kind}", nn.Parameter(torch.zeros(shape))


def _leaf_modules(network: Network) -> Iterable[tuple[str, nn.Module | nn.Parameter]]:
    placed: set[str] = set()
    for area in network.areas:
        leaves: list[tuple[str, nn.Module | nn.Parameter]] = []
        for c in network.connections:
            if c.target == area.name and not placed.issuperset(w.removesuffix(".weight") for w in c.weights):
                leaves += connection_modules(network, _with_bias(network, c)).items()
        leaves += [(prefix, _norm_module(network, area)) for prefix in network.norm_prefixes(area)]
        leaves += _cell_modules(network, area) if area.cell is not None else ()
        for prefix, module in leaves:
            if prefix not in placed:
                placed.add(prefix)
                yield prefix, module
    if network.readout is not None and network.readout.parameter is not None:
        channels = network.shapes[network.readout.source][0]
        yield network.readout.parameter, nn.Linear(channels, network.readout.num_classes, bias=network.readout.bias)


def _with_bias(network: Network, c: Connection) -> Connection:
    """A connection, or one that shares its parameters and uses the bias too."""
    return next((other for other in network.connections if other.weights == c.weights and other.bias), c)


def _place(root: nn.Module, path: str, leaf: nn.Module | nn.Parameter) -> None:
    *parents, last = path.split(".")
    for name in parents:
        if not hasattr(root, name):
            root.add_module(name, nn.Module())
        root = getattr(root, name)
    setattr(root, last, leaf)
