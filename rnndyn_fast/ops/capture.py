"""CUDA graphs as they are captured: by rollouts that are replayed (:mod:`rnndyn_fast.nn.cuda_graphs`) and by measurements."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten


class Graphs(Protocol):
    """What captures: :class:`CudaGraphs`; tests put another one in its place."""

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` unless tensors like these can be arguments of a graph."""

    def aside(self, run: Callable[[], Any]) -> Any:
        """Run once on the stream on which graphs are captured."""

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what ``run`` launches, without running it: a function that replays it, and run's result, which replays overwrite."""


class CudaGraphs:
    """CUDA graphs of one device. They share a memory pool, and so must not run at the same time."""

    def __init__(self) -> None:
        self._device: torch.device | None = None
        self._stream: torch.cuda.Stream | None = None
        self._pool: Any = None

    def check(self, tensors: Sequence[Tensor]) -> None:
        """Raise ``ValueError`` unless all are on one CUDA device, that of the first call."""
        for i, tensor in enumerate(tensors):
            if tensor.device.type != "cuda":
                raise ValueError(f"argument {i}: a CUDA graph needs tensors on a CUDA device, got one on {tensor.device}")
            if tensor.device != tensors[0].device:
                raise ValueError(f"argument {i}: expected a tensor on {tensors[0].device} like the first one, got one on {tensor.device}")
        if tensors and self._device is None:
            self._device = tensors[0].device
        if tensors and tensors[0].device != self._device:
            raise ValueError(f"argument 0: expected a tensor on {self._device}, as in earlier calls, got one on {tensors[0].device}")

    def _side(self) -> torch.cuda.Stream:
        if self._stream is None:
            self._stream = torch.cuda.Stream(self._device)
        return self._stream

    def aside(self, run: Callable[[], Any]) -> Any:
        """Run once on the stream on which graphs are captured, in order with the current one."""
        side, current = self._side(), torch.cuda.current_stream(self._device)
        side.wait_stream(current)
        with torch.cuda.stream(side):
            result = run()
        current.wait_stream(side)
        for tensor in tree_flatten(result)[0]:
            if isinstance(tensor, Tensor):
                tensor.record_stream(current)
        return result

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        """Record what ``run`` launches."""
        graph = torch.cuda.CUDAGraph()
        try:
            with (
                torch.cuda.device(self._device),
                torch.cuda.graph(graph, pool=self._pool, stream=self._side(), capture_error_mode="thread_local"),
            ):
                result = run()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise RuntimeError(
                f"a CUDA graph could not be captured: {error}. What is captured must not wait for the device (.item(), print, shapes that "
                "depend on values), and every tensor it uses must be on the device; without a graph the same call runs normally"
            ) from error
        self._pool = graph.pool()
        return graph.replay, result
