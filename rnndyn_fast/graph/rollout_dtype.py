"""Where and in what dtype a rollout computes: its inputs' device, and on CUDA devices the dtype of autocast."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.buffers import buffers_on
from rnndyn_fast.torch_internals import constant_when_compiled

HALF_DTYPES = (torch.float16, torch.bfloat16)  # of maps, on CUDA devices


@contextmanager
def on_its_device(example: Tensor) -> Iterator[None]:
    """On the device of the arguments, and in their dtype: no autocast. Where its memory runs out, the error says of what size."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(example.device.type, enabled=False))
        if example.device.type != "cpu":
            stack.enter_context(buffers_on(example.device))
        try:
            yield
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"in a native rollout of an input {list(example.shape)} of {example.dtype} on {example.device}; nothing of the "
                "caller's was changed. rnndyn plan prints what is kept per image; fewer images, fewer time steps, half precision or, "
                "without gradients, torch.no_grad() need less"
            )
            raise


@constant_when_compiled  # (as with_precision)
def _autocast_dtype() -> torch.dtype | None:
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else None


def autocast_inputs(inputs: Sequence[Tensor]) -> Sequence[Tensor]:
    """The inputs as CUDA autocast wants them, where it is enabled: their dtype is that of a rollout's maps."""
    dtype = _autocast_dtype()
    if dtype not in HALF_DTYPES or not core.on_device(inputs[0]) or inputs[0].dtype not in (torch.float32, *HALF_DTYPES):
        return inputs
    return [x.to(dtype) for x in inputs]
