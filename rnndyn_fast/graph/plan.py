"""The readable plan of a schedule (``print(schedule)``, ``rnndyn plan MODEL``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rnndyn_fast.graph import backward, taped_maps
from rnndyn_fast.graph.linear import engines
from rnndyn_fast.graph.saved import SavedBuffer, computed_again, saved_buffers
from rnndyn_fast.graph.schedule import Component, Schedule
from rnndyn_fast.graph.spec import Activation, Connection, Interaction, Network, Norm, Operator, Pool
from rnndyn_fast.graph.support import unknown_to_native
from rnndyn_fast.ops.device_engine import choose_device_engine
from rnndyn_fast.ops.engines import EngineChoice, Geometry, choose_engine

_POOL = {Pool.NONE: "{}", Pool.MAX: "maxpool2({})", Pool.MAX_SAME: "maxpool2same({})", Pool.MEAN: "mean({})"}
_FACTOR = {Interaction.MULTIPLICATIVE: "(1 + {})", Interaction.SQUASHED: "2 sigmoid({})"}
_NORM = {Norm.LAYER: "LayerNorm({})", Norm.GROUP: "GroupNorm({})", Norm.BATCH: "BatchNorm[t]({})"}


def _map(shape: tuple[int, ...]) -> str:
    return "x".join(str(n) for n in shape)


def _term(network: Network, c: Connection, source: str) -> str:
    """A connection's term as text."""
    text = _POOL[c.pool].format(source if c.state is None else f"{source}:{c.state}")
    if c.resize:
        text = f"resize({text})"
    if c.operator is Operator.IDENTITY:
        return text
    if c.operator is Operator.LINEAR:
        return f"{c.parameter} * {text}"
    kernel = network.window(c).kernel
    size = str(kernel[0]) if kernel[0] == kernel[1] else _map(kernel)
    kind = "conv" if c.operator is Operator.CONV else "convT"
    stride = f"/{c.stride}" if c.stride > 1 else ""
    groups = f"[{c.groups} groups]" if c.groups > 1 else ""
    first = "1x1 " if c.middle_channels is not None else ""
    return f"{first}{kind}{size}{stride}{groups}({text}, {c.parameter})"


def _sums(schedule: Schedule, name: str) -> dict[str, str]:
    """The terms of each port at the update that has most of them."""
    network = schedule.network
    slots = [item for item in schedule.terms if item[0] == name]
    item = max(slots, key=lambda i: (len(schedule.terms[i]), len(schedule.zeros[i])))
    reads = [(t.connection, schedule.drives[t.drive].source) for t in schedule.terms[item]]
    reads += [(c, c.source) for c in schedule.zeros[item]]
    sums: dict[str, list[str]] = {port: [] for port in network.area(name).ports}
    for c, source in reads:
        sums[network.port(c)].append(_term(network, c, source))
    return {port: " + ".join(texts) for port, texts in sums.items() if texts}


def _equation(schedule: Schedule, name: str) -> str:
    area, sums = schedule.network.area(name), _sums(schedule, name)
    if area.cell is not None:
        return f"{area.cell.kind}({', '.join(f'{port}={text}' for port, text in sums.items())})"
    text = sums.get("drive", "0")
    if area.drive_activation is not Activation.IDENTITY:
        text = f"{area.drive_activation.value}({text})"
    if "modulator" in sums:
        product = f"({text})" if " + " in text and area.drive_activation is Activation.IDENTITY else text
        text = f"{product} * {_FACTOR[area.interaction].format(sums['modulator'])}"
    if area.norm in _NORM:
        text = _NORM[area.norm].format(text)
    if area.activation not in (None, Activation.IDENTITY):
        text = f"{area.activation.value}({text})"
    return text


def _engines(schedule: Schedule, engine: str, device: str, dtype: torch.dtype, samples: int) -> list[str]:
    where = torch.device(device) if torch.cuda.is_available() else None  # (without a device at hand: what it would depend on)

    def choose(geometry: Geometry, shape: tuple[int, ...], height: int, width: int) -> EngineChoice:
        if device == "cpu":
            return choose_engine(geometry, shape, height, width, dtype, engine, samples)
        return choose_device_engine(geometry, shape, height, width, dtype, engine, samples, where)

    connections = dict.fromkeys(d.connection for d in schedule.drives if d.connection.operator is not Operator.IDENTITY)
    found = [(c, *part) for c in connections for part in engines(schedule.network, c, choose, dtype, on_device=device != "cpu")]
    width = max((len(c.label) for c, *_ in found), default=0)
    return [f"    {c.label:<{width}} {name:<20} {why}" for c, name, why in found]


def _component(schedule: Schedule, component: Component) -> list[str]:
    lines = []
    for d in component.drives_in:
        drive = schedule.drives[d]
        if drive.connection.operator is not Operator.IDENTITY:
            how = "once" if drive.static else f"one call over {len(drive.slots)} steps x N"
            text = _term(schedule.network, drive.connection, drive.source)
            lines.append(f"    {how}: {text}  [{_map(drive.shape)}]")
    slots = {name: schedule.num_slots[name] for name in component.areas}
    if component.recurrent:
        lines.append(f"    for each of {max(slots.values())} steps:")
        indent = "      "
    else:
        lines.append("    once:" if max(slots.values()) == 1 else f"    all {max(slots.values())} steps at once:")
        indent = "      "
    for name in component.areas:
        lines.append(f"{indent}{name} = {_equation(schedule, name)}  [{_map(schedule.network.shapes[name])}]")
        pools = [p.value for p in schedule.pools_read(name) if p is not Pool.NONE]
        if pools and unknown_to_native(schedule.network) is None:
            lines.append(f"{indent}  with its {' and '.join(sorted(pools))}-pooled map, in the same pass")
    return lines


def _size(n: float) -> str:
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def saved_bytes(buffers: Sequence[SavedBuffer], dtype: torch.dtype = torch.float32) -> int:
    """Bytes per sample that a training rollout keeps for its backward pass."""
    total = 0
    for b in buffers:
        elements = b.slots
        for n in b.shape:
            elements *= n
        total += elements * b.dtype(dtype).itemsize
    return total


def describe(
    schedule: Schedule, engine: str = "auto", *, device: str = "cpu", dtype: torch.dtype = torch.float32, samples: int = 16
) -> str:
    """The plan as text: what is computed once, per component, per step, and what is saved for backward.

    ``device`` ("cpu", "cuda", "cuda:1", ...), ``dtype`` of the maps and ``samples`` of a batch are those that engines are chosen for.
    """
    network = schedule.network
    lines = [
        f"{network.name}: {schedule.timesteps} time steps, {network.unroll.value} unroll, recording {', '.join(schedule.record)}",
        "",
    ]
    for i, component in enumerate(schedule.components, 1):
        static = all(schedule.num_slots[name] == 1 for name in component.areas)
        kind = "recurrent" if component.recurrent else "static" if static and schedule.timesteps > 1 else "feed-forward"
        lines.append(f"  component {i} ({kind}): {', '.join(component.areas)}")
        lines += _component(schedule, component)
    unread = [a.name for a in network.areas if not schedule.num_slots[a.name]]
    if unread:
        lines.append(f"  never computed (nothing reads them): {', '.join(unread)}")
    scheduled, every_step = schedule.multiplications()
    lines += [
        "",
        f"  multiply-adds per image: {scheduled / 1e9:.4g} G (every term at every step: {every_step / 1e9:.4g} G)",
    ]
    reason = unknown_to_native(network)
    name, where = str(dtype).removeprefix("torch."), "the CPU" if device == "cpu" else "a CUDA device"
    window = taped_maps.WINDOW_BYTES if reason else backward.WINDOW_BYTES
    lines += [
        f"  weight gradients: one call per connection and window of its steps ({window >> 20} MiB)",
        "  inference: time step by time step, a state is dropped after its last reader",
        f"  backend: scheduled ({reason})" if reason else "  backend: native",
        "",
        f"  engine of each connection ({name} on {where}, batches of {samples}, engine={engine!r}):",
        *_engines(schedule, engine, device, dtype, samples),
    ]
    return "\n".join(lines if reason else [*lines, "", *_saved(schedule, dtype)])


def _saved(schedule: Schedule, dtype: torch.dtype) -> list[str]:
    name = str(dtype).removeprefix("torch.")
    lines = [f"  saved for backward, per image ({name}):"]
    again = [name for c in computed_again(schedule) for name in c.areas]
    if again:
        lines.append(f"    nothing of {', '.join(again)}: computed again in backward")
    buffers = saved_buffers(schedule)
    for b in buffers:
        size = b.slots * b.dtype(dtype).itemsize
        for n in b.shape:
            size *= n
        shape = _map((b.shape[2], b.shape[0], b.shape[1])) if len(b.shape) == 3 else "1"
        lines.append(f"    {b.owner + '.' + b.kind:<28} {b.slots:>3} x {shape:<14} {_size(size)}")
    return [*lines, f"    {'total':<28} {'':>3}   {'':<14} {_size(saved_bytes(buffers, dtype))}"]
