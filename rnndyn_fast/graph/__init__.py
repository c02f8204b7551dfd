"""Specs of recurrent networks, the schedule compiler, and the rollout engine."""

from rnndyn_fast.graph.rollout import can_run_native, rollout
from rnndyn_fast.graph.schedule import Schedule, compile_schedule
from rnndyn_fast.graph.spec import (
    Activation,
    Area,
    Connection,
    Input,
    Interaction,
    Network,
    Norm,
    Operator,
    Pool,
    Readout,
    Role,
    Unroll,
)

__all__ = [
    "Activation", "Area", "Connection", "Input", "Interaction", "Network", "Norm", "Operator", "Pool", "Readout", "Role", "Schedule",
    "Unroll", "can_run_native", "compile_schedule", "rollout",
]  # fmt: skip
