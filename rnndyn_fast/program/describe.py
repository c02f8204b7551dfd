"""The readable plan of a rollout (``rnndyn plan MODEL``): its schedule, its engines, its memory, its instructions."""

from __future__ import annotations

from collections import Counter

import torch

from rnndyn_fast.graph.linear import engines
from rnndyn_fast.graph.schedule import Schedule
from rnndyn_fast.graph.spec.network import Operator
from rnndyn_fast.ops import core
from rnndyn_fast.ops.cuda_engine import choose_device_engine
from rnndyn_fast.ops.engines import EngineChoice, Geometry, choose_engine
from rnndyn_fast.program.ir import Instr, Program, Role, instr_lives
from rnndyn_fast.program.plan import Plan, Request, make_plan


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


def plan_for(schedule: Schedule, engine: str, dtype: torch.dtype, samples: int, *, training: bool) -> Plan:
    """The plan of a rollout on the CPU, with gradients of all parameters in training."""
    network = schedule.network
    inputs = {}
    for node in network.inputs:
        lead = (schedule.timesteps, samples) if node.frames else (samples,)
        inputs[node.name] = torch.empty((*lead, node.channels, node.height, node.width), dtype=dtype, device="meta")
    shapes = network.parameter_shapes if training else {**network.parameter_shapes, **network.buffer_shapes}
    parameters = {name: torch.empty(shape, dtype=dtype, device="meta") for name, shape in shapes.items()}
    wanted = frozenset(network.parameter_shapes) if training else frozenset[str]()
    return make_plan(Request(schedule, inputs, parameters, wanted, engine, training=training and bool(network.buffer_shapes)))


def size_text(n: float) -> str:
    """Bytes with a unit."""
    for unit in ("B", "KiB", "MiB"):
        if n < 1024:
            return f"{n:.4g} {unit}"
        n /= 1024
    return f"{n:.4g} GiB"


def kept_bytes(program: Program) -> int:
    """Bytes of the arena that hold, between the passes, what forward keeps for backward."""
    return sum(v.nbytes for v, (first, last) in instr_lives(program.instrs).items() if first < program.split <= last)


def _pass(name: str, instrs: tuple[Instr, ...]) -> list[str]:
    counts = ", ".join(f"{n} {kind}" for kind, n in Counter(i.kind for i in instrs).most_common())
    return [f"    {name}: {len(instrs)} instructions ({counts})"]


def _program(plan: Plan, name: str) -> list[str]:
    program = plan.versions[0].executable.program
    lines = [f"  {name}: one arena of {size_text(program.nbytes)}"]
    packed = {v.value for i in program.instrs for v in i.reads if v.value.role is Role.PACKED}
    if packed:
        lines[0] += f", and {size_text(sum(v.nbytes for v in packed))} of packed weights that are kept for the next rollout"
    lines += _pass("forward", program.part(backward=False))
    if plan.lowering.recording:
        lines[0] += f", of which forward keeps {size_text(kept_bytes(program))} for backward"
        lines += _pass("backward", program.part(backward=True))
    return lines


def describe(
    schedule: Schedule,
    engine: str = "auto",
    *,
    device: str = "cpu",
    dtype: torch.dtype = torch.float32,
    samples: int = 16,
    instructions: str | None = None,
) -> str:
    """The plan as text: what is computed once, per component, per step; engines; memory.

    ``device`` ("cpu", "cuda", "cuda:1", ...), ``dtype`` of the maps and ``samples`` of a batch are those that engines are chosen for.
    ``instructions``: "inference" or "training", whose program is printed too.
    """
    name, where = str(dtype).removeprefix("torch."), "the CPU" if device == "cpu" else "a CUDA device"
    lines = [
        str(schedule),
        "",
        f"  engine of each connection ({name} on {where}, batches of {samples}, engine={engine!r}):",
        *_engines(schedule, engine, device, dtype, samples),
    ]
    if device != "cpu" or core.unavailable is not None:
        return "\n".join(lines)
    lines.append("")
    for kind in ("inference", "training"):
        plan = plan_for(schedule, engine, dtype, samples, training=kind == "training")
        lines += _program(plan, kind)
        if instructions == kind:
            lines += ["", *(f"    {line}" for line in str(plan.versions[0].executable.program).splitlines()), ""]
    return "\n".join(lines)
