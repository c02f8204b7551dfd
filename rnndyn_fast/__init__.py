"""Fast convolutional recurrent networks, and streaming analysis of their representation dynamics."""

import torch  # noqa: F401  -- first, so that the native core shares torch's OpenMP runtime

from rnndyn_fast.graph import Network, compile_schedule
from rnndyn_fast.models import accelerate
from rnndyn_fast.ops._launch import build_info
from rnndyn_fast.program import can_run_native, release_memory, rollout

__version__ = "0.1.0"
__all__ = ["Network", "accelerate", "build_info", "can_run_native", "compile_schedule", "release_memory", "rollout"]
