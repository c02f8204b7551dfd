"""A schedule as text: what is computed once, per component and per time step."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rnndyn_fast.graph.spec.network import Activation, Connection, Interaction, Network, Norm, Operator, Pool

if TYPE_CHECKING:
    from rnndyn_fast.graph.schedule import Component, Schedule

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


def _when(c: Connection, timesteps: int) -> str:
    """The time steps at which a connection is there, where it is not always."""
    if c.steps is None or len(there := sorted(t for t in c.steps if t < timesteps)) == timesteps:
        return ""
    runs: list[list[int]] = []
    for t in there:
        if runs and runs[-1][-1] == t - 1:
            runs[-1] = [runs[-1][0], t]
        else:
            runs.append([t])
    return f"{{t={','.join('..'.join(map(str, run)) for run in runs)}}}"


def _sums(schedule: Schedule, name: str) -> dict[str, str]:
    """The terms of each port, of all updates."""
    network = schedule.network
    sources: dict[Connection, str] = {}  # (at a first step another than later)
    for item in schedule.terms:
        if item[0] == name:
            sources.update({c: c.source for c in schedule.zeros[item]})
            sources.update({t.connection: schedule.drives[t.drive].source for t in schedule.terms[item]})
    sums: dict[str, list[str]] = {port: [] for port in network.area(name).ports}
    for c in network.connections:
        if c in sources:
            sums[network.port(c)].append(_term(network, c, sources[c]) + _when(c, schedule.timesteps))
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
    return lines


def schedule_text(schedule: Schedule) -> str:
    """The components, what they compute and when."""
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
    off = [c.label for c in network.connections if c.steps is not None and not any(t < schedule.timesteps for t in c.steps)]
    if off:
        lines.append(f"  off at all steps: {', '.join(off)}")
    scheduled, every_step = schedule.multiplications()
    lines += [
        "",
        f"  multiply-adds per image: {scheduled / 1e9:.4g} G (every term at every step: {every_step / 1e9:.4g} G)",
    ]
    return "\n".join(lines)
