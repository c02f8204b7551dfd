"""Rollouts as programs: planned before they run, printed, and run on the CPU or on a CUDA device."""

from rnndyn_fast.program.plan import release_memory
from rnndyn_fast.program.rollout import can_run_native, rollout

__all__ = ["can_run_native", "release_memory", "rollout"]
