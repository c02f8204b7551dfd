"""Several processes, as `torchrun` starts them: who am I, and do all agree."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist

from rnndyn_fast.devices import choose_device


def choose_backend() -> str:
    """ "nccl" where every process of this machine has a GPU of its own, else "gloo"."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= local:
        return "nccl"
    return "gloo"


class Processes:
    """The processes of an extraction; one alone unless a process group is running."""

    def __init__(self) -> None:
        running = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if running else 0
        self.count = dist.get_world_size() if running else 1

    def all_of(self, value: Any) -> list[Any]:
        """What every process hands in, by rank. Waits for all of them."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def together(self, work: Callable[[], Any], only_first: bool = False) -> Any:
        """Do some work in every process (or the first one only, whose result all get); if it fails in one, raise in all.

        Raises: what `work` raised here, else RuntimeError naming the process that failed and why.
        """
        result, error = None, None
        try:
            if not only_first or self.rank == 0:
                result = work()
        except BaseException as caught:
            error = caught
        told = self.all_of((None if error is None else f"{type(error).__name__}: {error}", result if only_first else None))
        if error is not None:
            raise error
        for rank, (reason, _) in enumerate(told):
            if reason is not None:
                raise RuntimeError(f"process {rank} of {self.count} failed: {reason}")
        return told[0][1] if only_first else result


@contextmanager
def processes() -> Iterator[Processes]:
    """The processes that `torchrun` started (a process group is made, and ended afterwards), those of the running group, or this one."""
    ours = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and dist.is_available() and not dist.is_initialized():
        backend = choose_backend()
        if backend == "nccl":
            torch.cuda.set_device(choose_device())
        dist.init_process_group(backend)
        ours = True
    try:
        yield Processes()
    finally:
        if ours:
            dist.destroy_process_group()
