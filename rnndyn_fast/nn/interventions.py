"""Experiments on a network while it runs: states that are changed, and connections that are off, at some time steps.

Both are a change of the spec. An area whose state is changed becomes two: the area itself, and after it one that its readers and the
caller find in its place; between them stands a cell for each change (:class:`rnndyn_fast.ops.cells.Intervention`). Connections say at which
time steps they are there. So the engine and the reference run what they always run, gradients included.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, SupportsIndex

import torch
from torch import Tensor

from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec.network import ABSENT, Activation, Area, Connection, Network, Norm, Operator, Role
from rnndyn_fast.ops.cells import Intervention
from rnndyn_fast.reference.interventions import StateFunction, number_of
from rnndyn_fast.suggestions import nearest

ACTIONS = ("zero", "clamp", "scale", "freeze", "noise")
_VALUES = {"clamp": "value", "scale": "value", "noise": "std"}  # what each needs
Steps = int | range | slice | Iterable[int] | None


def held_steps(steps: Any) -> Sequence[int] | slice | None:
    """What was given, to be read more than once: ints in a tuple, unless it is a slice or None, which the number of time steps decides.

    Raises: TypeError naming ``steps``.
    """
    if steps is None or isinstance(steps, slice):
        return steps
    one = isinstance(steps, SupportsIndex) and getattr(steps, "ndim", 0) == 0  # (an array of one entry can be an index too)
    if isinstance(steps, bool | str | bytes) or not (one or isinstance(steps, Iterable)):
        raise TypeError(f"steps: expected an int, a range, a slice, ints, or None for all, got {steps!r}")
    found = []
    for t in [steps] if one else steps:
        if isinstance(t, bool) or not isinstance(t, SupportsIndex) or getattr(t, "dtype", None) == torch.bool:
            raise TypeError(f"steps: expected ints, got {t!r}")
        try:
            found.append(operator.index(t))
        except TypeError:  # (tensors and arrays have the method whatever they hold)
            raise TypeError(f"steps: expected ints, got {t!r}") from None
    return tuple(found)


def steps_of(steps: Steps, timesteps: int) -> tuple[int, ...]:
    """Time steps as numbers, in order.

    Raises: TypeError, ValueError naming ``steps``: not of the network's, or none.
    """
    if steps is None:
        return tuple(range(timesteps))
    found = range(timesteps)[steps] if isinstance(steps, slice) else held_steps(steps)
    assert isinstance(found, Sequence)
    for t in found:
        if not 0 <= t < timesteps:
            raise ValueError(f"steps: expected some of 0 .. {timesteps - 1}, got {t}")
    if not found:
        raise ValueError(f"steps: expected some of 0 .. {timesteps - 1}, got none ({steps!r})")
    return tuple(sorted(set(found)))


@dataclass(frozen=True, eq=False)
class StateChange:
    """A state of an area is changed at some steps. ``rule``: of :class:`~rnndyn_fast.ops.cells.Intervention`."""

    area: str
    state: str | None
    steps: Steps
    rule: str
    value: Tensor | None = None  # [C, H, W]
    units: Tensor | None = None  # [C, H, W] bool
    seed: int = 0
    function: StateFunction | None = None


@dataclass(frozen=True, eq=False)
class Lesion:
    """Connections are off at some steps. ``connections``: their labels."""

    connections: frozenset[str]
    steps: Steps


def _expanded(name: str, value: Any, shape: tuple[int, int, int]) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        tensor = None
    if tensor is None or tensor.is_complex():
        raise TypeError(f"{name}: expected a number or a tensor that expands to [C, H, W] = {list(shape)}, got {value!r}")
    try:
        return tensor.expand(shape)
    except RuntimeError:
        raise ValueError(
            f"{name}: expected a number or a tensor that expands to [C, H, W] = {list(shape)}, got {list(tensor.shape)}"
        ) from None


def state_change(
    network: Network, area: str, steps: Steps, action: str | StateFunction, options: dict[str, Any], units: Any, timesteps: int
) -> StateChange:
    """A checked change; see :meth:`rnndyn_fast.nn.RecurrentNetwork.intervene`."""
    if not isinstance(area, str):
        raise TypeError(f"area: expected the name of an area, got {area!r}")
    name, state = network.recorded(area)
    first = network.area(name).states[0]
    shape = network.shapes[name]
    steps = held_steps(steps)
    steps_of(steps, timesteps)
    if isinstance(action, str):
        if action not in ACTIONS:
            raise ValueError(f"action: expected one of {', '.join(ACTIONS)}, or a function, got {action!r}{nearest(action, ACTIONS)}")
    elif not callable(action):
        raise TypeError(f"action: expected one of {', '.join(ACTIONS)}, or a function of a state and a time step, got {action!r}")
    rule = action if isinstance(action, str) else "function"
    takes = {_VALUES[rule]} if rule in _VALUES else set()
    for option, given in options.items():
        if option == "seed":
            if isinstance(given, bool) or not isinstance(given, int):
                raise TypeError(f"seed: expected an int, got {given!r}")
            if not -(2**63) <= given < 2**63:
                raise ValueError(f"seed: expected an int of 64 bits, got {given}")
            continue
        if (given is not None) != (option in takes):
            wanted = "a number or a tensor" if option in takes else "none"
            raise TypeError(f"{option}: expected {wanted} for the action {rule!r}, got {given!r}")
    value: Any = 0.0 if rule == "zero" else next((options[option] for option in takes), None)
    if value is not None:
        value = _expanded(next(iter(takes), "value"), value, shape)
    if rule == "noise" and bool((value < 0).any()):
        raise ValueError(f"std: expected at least 0, got {float(value.min())}")
    mask = None
    if units is not None:
        mask = _expanded("units", units, shape)
        if mask.dtype != torch.bool:
            raise TypeError(f"units: expected booleans [C, H, W] = {list(shape)}, got {mask.dtype}")
    return StateChange(
        name,
        None if state == first else state,
        steps,
        "clamp" if rule == "zero" else rule,
        value,
        mask,
        options["seed"],
        None if isinstance(action, str) else action,
    )


def lesion_of(network: Network, connection: str, steps: Steps, timesteps: int) -> Lesion:
    """Checked; see :meth:`rnndyn_fast.nn.RecurrentNetwork.lesion`."""
    steps = held_steps(steps)
    steps_of(steps, timesteps)
    if not isinstance(connection, str):
        raise TypeError(f"connection: expected the name of a connection, as 'v4:lateral', got {connection!r}")
    source, arrow, target = connection.partition(">")
    if arrow:
        chosen = [c for c in network.connections if (c.source, c.target) == (source.strip(), target.strip())]
    else:
        target, _, role = connection.partition(":")
        roles = {r.value: r for r in Role}
        role = role.replace("-", "_").replace("topdown", "top_down").replace("bottomup", "bottom_up")
        if role not in roles:
            raise ValueError(
                f"connection: expected an area and one of {', '.join(roles)}, as 'v4:lateral', or two areas, as 'it>v4', got {connection!r}"
            )
        chosen = [c for c in network.connections if c.target == network.area(target).name and c.role is roles[role]]
    if not chosen:
        there = sorted({f"{c.target}:{c.role.value}" for c in network.connections})
        raise ValueError(f"connection: network {network.name!r} has no {connection!r}; there are {', '.join(there)}")
    return Lesion(frozenset(_key(c) for c in chosen), steps)


def _key(c: Connection) -> str:
    """What tells connections apart, whatever is changed in their layers."""
    return f"{c.source}:{c.state}>{c.target}:{c.role.value}:{c.port}:{c.parameter}"


@dataclass
class Rewritten:
    """A network with changes. ``names``: what recorded states are called there; ``given``: further parameters by name."""

    network: Network
    names: dict[str, str] = field(default_factory=dict)
    given: dict[str, Tensor] = field(default_factory=dict)


def rewrite(network: Network, timesteps: int, changes: Sequence[StateChange | Lesion]) -> Rewritten:
    """The network in which the changes are made, in their order."""
    connections = list(network.connections)
    for one in changes:
        if isinstance(one, Lesion):
            off = set(steps_of(one.steps, timesteps))
            connections = [
                replace(c, steps=tuple(t for t in range(timesteps) if c.is_there(t) and t not in off)) if _key(c) in one.connections else c
                for c in connections
            ]
    result = Rewritten(replace(network, connections=tuple(connections)))
    by_state: dict[tuple[str, str | None], list[StateChange]] = {}
    for one in changes:
        if isinstance(one, StateChange):
            by_state.setdefault((one.area, one.state), []).append(one)
    # (Outputs first: they take the area's name, which its other states are then read from by its new one.)
    renamed: dict[str, str] = {}
    for (area, state), some in sorted(by_state.items(), key=lambda item: item[0][1] is not None):
        _insert(result, timesteps, renamed.get(area, area), state, some, area)
        if state is None:
            renamed[area] = _before(area)
            for other in network.area(area).states:
                if other is not None:
                    first = other == network.area(area).states[0]
                    result.names[f"{area}:{other}"] = area if first else f"{_before(area)}:{other}"
        else:
            result.names[f"{area}:{state}"] = f"{area} {state}"
    return result


def check_driven(network: Network, timesteps: int, found: Rewritten) -> None:
    """Raise ``ValueError`` where lesions leave the readout's area without its first states: its results would be of other time steps."""
    area = network.readout.source if network.readout is not None else network.areas[-1].name
    (first,) = compile_schedule(network, timesteps, (area,)).first_step.values()
    name = found.names.get(area, area)
    undriven = f"steps: area {area!r} of network {network.name!r} has no state at step {first}: nothing drives it then"
    try:
        (now,) = compile_schedule(found.network, timesteps, (name,)).first_step.values()
    except ValueError as error:
        if str(error).startswith("timesteps: "):
            raise ValueError(undriven) from None
        raise
    if now > first:
        raise ValueError(undriven)


def _before(area: str) -> str:
    return f"{area} before"


def _insert(result: Rewritten, timesteps: int, name: str, state: str | None, changes: Sequence[StateChange], area_name: str) -> None:
    """Put the changes of a state between an area and its readers."""
    network = result.network
    area = network.area(name)
    read = area_name if state is None else f"{area_name} {state}"
    own = _before(area_name) if state is None else name
    channels = area.channels
    nodes: list[Area] = []
    added: list[Connection] = []

    def joined(source: str, target: str, *, delay: int = 0, port: str | None = None, steps: tuple[int, ...] | None = None) -> None:
        wanted = state if source == own else None
        added.append(Connection(source, target, Role.BOTTOM_UP, Operator.IDENTITY, delay=delay, port=port, steps=steps, state=wanted))

    resolved = [set(steps_of(one.steps, timesteps)) for one in changes]
    for one, steps in zip(changes, resolved, strict=True):
        if one.rule == "freeze" and area.initial_of(state) == ABSENT:
            first = compile_schedule(network, timesteps, (name if state is None else f"{name}:{state}",)).first_step
            begin = next(iter(first.values()))
            if min(steps) <= begin:
                raise ValueError(
                    f'steps: "freeze" holds the state of the step before, and area {area_name!r} has its first one at step {begin}; '
                    f"expected steps from {begin + 1} on, got {min(steps)}"
                )
    made: dict[tuple[Any, ...], str] = {(): own}
    at: dict[str, list[int]] = {}
    for t in range(timesteps):
        chain: tuple[Any, ...] = ()
        for k, one in enumerate(changes):
            if t not in resolved[k]:
                continue
            by_step = one.rule in ("noise", "function")
            before, chain = made[chain], (*chain, (k, t) if by_step else (k,))
            if chain not in made:
                made[chain] = node = f"{read} {one.rule} {len(made)}"
                if one.rule == "freeze" and one.units is None:
                    nodes.append(Area(node, channels, norm=Norm.NONE, activation=Activation.IDENTITY))
                    joined(read, node, delay=1)
                    continue
                number = number_of(one.function) if one.function is not None else 0
                cell = Intervention(one.rule, one.units is not None, t if by_step else 0, one.seed if one.rule == "noise" else 0, number)
                nodes.append(Area(node, channels, cell=cell, cell_parameter=node))
                joined(before, node)
                if one.rule == "freeze":
                    joined(read, node, delay=1, port="memory")
                for kind, tensor in (("value", one.value), ("units", one.units)):
                    if tensor is not None:
                        result.given[f"{node}.{kind}"] = tensor
        at.setdefault(made[chain], []).append(t)
    final = Area(read, channels, norm=Norm.NONE, activation=Activation.IDENTITY, initial=area.initial_of(state))
    for source, when in at.items():
        joined(source, read, steps=tuple(when))

    def redirected(c: Connection) -> Connection:
        source, wanted = c.source, c.state
        if c.source == name:
            read_state = None if c.state == area.states[0] else c.state
            source, wanted = (read, None) if read_state == state else (own, c.state)
        return replace(c, source=source, state=wanted, target=own if c.target == name else c.target)

    areas: list[Area] = []
    for other in network.areas:
        areas += [replace(area, name=own), *nodes, final] if other.name == name else [other]
    result.network = replace(network, areas=tuple(areas), connections=(*(redirected(c) for c in network.connections), *added))


def try_functions(changes: Sequence[StateChange | Lesion], network: Network, like: Tensor, timesteps: int, *, twice: bool) -> None:
    """Call the functions of changes, as a native rollout calls them again in its backward pass, and gives no gradient to what they hold.

    Args:
        like: an input.
        twice: whether each is called twice on the same state.

    Raises:
        TypeError: a function uses a tensor that requires a gradient, or gives something else when it is called again.
    """
    for one in changes:
        if not isinstance(one, StateChange) or one.function is None:
            continue
        shape, step = (like.shape[-4], *network.shapes[one.area]), steps_of(one.steps, timesteps)[0]
        state = torch.linspace(-1.0, 1.0, math.prod(shape), dtype=like.dtype, device=like.device).reshape(shape)
        y = one.function(state.clone(), step)
        if not isinstance(y, Tensor):
            continue  # (which the rollout refuses)
        if y.requires_grad:
            raise TypeError(
                "action: expected a function of the state alone, got one that uses a tensor which requires a gradient; a native rollout "
                'gives it none: detach it, pass it as value=, or use backend="reference"'
            )
        if twice and not torch.equal(y.nan_to_num(), one.function(state.clone(), step).nan_to_num()):
            raise TypeError(
                "action: expected a function that gives the same for the same state, as it is called again in the backward pass, got one "
                'that does not: draw its random numbers beforehand, take "noise", or torch.no_grad() where no gradient is needed'
            )


def parse_lesion(text: str) -> tuple[str, slice | int | None]:
    """What ``--lesion`` names, and its time steps: "v4:lateral@3-", "it@2-5" (both included), "it>v4@4", "v4:top_down"."""
    what, at, when = text.partition("@")
    if not at:
        return what.strip(), None
    begin, dash, end = when.partition("-")
    if not begin.strip().isdecimal() or (end.strip() and not end.strip().isdecimal()):
        raise ValueError(f"lesion: expected time steps as 3, 3- or 3-5, got {when!r} in {text!r}")
    if not dash:
        return what.strip(), int(begin)
    return what.strip(), slice(int(begin), int(end) + 1 if end.strip() else None)
