"""Specs of recurrent networks, and the schedule compiler."""

from rnndyn_fast.graph.schedule import Schedule, compile_schedule
from rnndyn_fast.graph.spec.network import (
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
    "Unroll", "compile_schedule",
]  # fmt: skip
