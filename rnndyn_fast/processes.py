"""Several processes, as `torchrun` starts them: which one is this, do all agree, and sums over all of them."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rnndyn_fast.job_device import choose_device

FAILURE = "rnndyn_fast/failure"  # key of the process group's store: the first error of a process


def choose_backend(device: torch.device | None = None) -> str:
    """ "nccl" where every process of this machine has a GPU of its own, else (or for a CPU job) "gloo"."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device is not None and device.type != "cuda":
        return "gloo"
    if torch.cuda.is_available() and dist.is_nccl_available() and torch.cuda.device_count() >= local:
        return "nccl"
    return "gloo"


class Processes:
    """The processes of a job; one alone unless a process group is running."""

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
        told = self.all_of(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, reason in enumerate(told):
            if reason is not None:
                raise RuntimeError(f"process {rank} of {self.count} failed: {reason}")
        if only_first and self.count > 1:
            shared = [result]
            dist.broadcast_object_list(shared, src=0)
            result = shared[0]
        return result

    def sum(self, tensor: Tensor) -> Tensor:
        """The sum of a tensor over all processes, in place."""
        if self.count > 1:
            dist.all_reduce(tensor)
        return tensor

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """An error in one process ends all: the others, whose communication with it breaks, say which one failed and why.

        Raises: what was raised here, or RuntimeError naming the process that failed.
        """
        try:
            yield
        except Exception as error:
            if self.count == 1:
                raise
            store = dist.distributed_c10d._get_default_store()
            broken = isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and _tells_of_communication(error))
            if not broken:
                store.set(FAILURE, f"process {self.rank} of {self.count} failed: {type(error).__name__}: {error}")
                raise
            reason = "another process has ended without a message (killed, or out of memory)"
            try:
                if store.check([FAILURE]):
                    reason = store.get(FAILURE).decode()
            except RuntimeError:  # the store has gone with the process that held it
                pass
            raise RuntimeError(f"process {self.rank} of {self.count} ends: {reason}") from error


def _tells_of_communication(error: RuntimeError) -> bool:
    text = str(error)
    return any(word in text for word in ("gloo", "Gloo", "NCCL", "Connection closed", "Connection reset", "TCPStore", "ProcessGroup"))


@contextmanager
def processes(device: torch.device | None = None) -> Iterator[Processes]:
    """The processes that `torchrun` started (a process group is made, and ended afterwards), those of the running group, or this one.

    Args:
        device: where this process computes; None: chosen by itself.
    """
    ours = False
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ and dist.is_available() and not dist.is_initialized():
        backend = choose_backend(device)
        if backend == "nccl":
            torch.cuda.set_device(device or choose_device())
        dist.init_process_group(backend)
        ours = True
    try:
        yield Processes()
    finally:
        if ours:
            dist.destroy_process_group()
