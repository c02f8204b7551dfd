"""Times of the fused convolution and of the vendor's on a CUDA device: measured once per machine and kept in a file.

The file is ``convolutions.json`` in the folder ``RNNDYN_CACHE``, or ``~/.cache/rnndyn_fast``. Its entries name the device, the versions
of torch, cuDNN and these kernels, and the shape; of others nothing is used. ``RNNDYN_MEASURE=0``: nothing is measured, and what the file
has is used.
"""

from __future__ import annotations

import json
import os
import statistics
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from rnndyn_fast.files import write_text
from rnndyn_fast.ops import _launch_cuda
from rnndyn_fast.ops._launch_cuda import ConvTerm
from rnndyn_fast.ops.engines import Geometry, Operator
from rnndyn_fast.ops.fused_conv import PASSES

MOST_SAMPLES = 256  # of a measurement: more fill no device better
ROUNDS = 7


@dataclass(frozen=True)
class Case:
    """A linear map as it is measured."""

    geometry: Geometry
    weight_shape: tuple[int, ...]
    height: int  # of the source map
    width: int
    dtype: torch.dtype
    samples: int

    @property
    def measured_samples(self) -> int:
        """The number of samples that stands for it: the next power of two."""
        return min(MOST_SAMPLES, 1 << (self.samples - 1).bit_length())

    def __str__(self) -> str:
        g = self.geometry
        shape = "x".join(map(str, self.weight_shape))
        return (
            f"{g.operator.value} {shape} stride {g.stride} padding {g.padding}+{g.output_padding} on {self.height}x{self.width} "
            f"{str(self.dtype).removeprefix('torch.')} N={self.measured_samples}"
        )


@dataclass(frozen=True)
class Times:
    """Seconds of one pass: medians."""

    fused: float
    direct: float


_lock = threading.Lock()
_known: dict[str, dict[str, Times]] = {}
_read: set[Path] = set()


def cache_file() -> Path:
    """Where measurements are kept."""
    folder = os.environ.get("RNNDYN_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "rnndyn_fast") / "convolutions.json"


def forget() -> None:
    """Forget what this process knows (the file is read again)."""
    with _lock:
        _known.clear()
        _read.clear()


def device_name(device: torch.device) -> str:
    """As reasons give it."""
    return torch.cuda.get_device_name(device)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on this thread's stream: then nothing may be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


def _machine(device: torch.device) -> str:
    build = _launch_cuda.build_info()
    return f"{device_name(device)}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, nvcc {build['nvcc']}"


def times_of(case: Case, device: torch.device) -> tuple[Mapping[str, Times] | None, str]:
    """Times by pass, measured now if they are not known; and the device's name. Or None, and why not."""
    key = f"{_machine(device)}: {case}"
    with _lock:
        _read_file(cache_file())
        if key in _known:
            return _known[key], device_name(device)
    if os.environ.get("RNNDYN_MEASURE") == "0":
        return None, "RNNDYN_MEASURE=0"
    if capturing():
        return None, "a CUDA graph is being captured; run once before capturing"
    try:
        found = measure(case, device)
    except torch.OutOfMemoryError:
        return None, f"{device} has too little free memory for it"
    with _lock:
        _known[key] = found
        _write_file(cache_file())
    return found, device_name(device)


def _read_file(path: Path) -> None:
    if path in _read:
        return
    _read.add(path)
    try:
        entries = json.loads(path.read_text(encoding="utf-8"))
        for key, passes in entries.items():
            _known.setdefault(key, {name: Times(*(float(t) for t in passes[name])) for name in PASSES})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # none yet, or of another version: measured anew


def _write_file(path: Path) -> None:
    _read.discard(path)
    _read_file(path)  # what other processes have added
    try:
        text = json.dumps({key: {p: [t.fused, t.direct] for p, t in passes.items()} for key, passes in _known.items()}, indent=1)
        write_text(path, text + "\n")
    except OSError:
        return  # a home that cannot be written: measured again by the next process


def measure(case: Case, device: torch.device) -> dict[str, Times]:
    """Time both engines on random maps, alternating: each pass as a rollout runs it."""
    contenders = passes(case, device)
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return {name: Times(*alternate([fused, direct], device)) for name, (fused, direct) in contenders.items()}


def passes(case: Case, device: torch.device) -> dict[str, tuple[Callable[[], Tensor], Callable[[], Tensor]]]:
    """Each pass by the fused convolution and by the vendor's, on random maps; the forward one with the sum of what else enters. Both return
    the same, if not rounded alike."""
    generator = torch.Generator(device).manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator, device=device, dtype=torch.float32).to(case.dtype)

    g = case.geometry
    transposed, product = g.operator is Operator.CONV_TRANSPOSE, g.operator is Operator.LINEAR
    outputs, inputs = case.weight_shape[:2][:: -1 if transposed else 1]
    x = draw(case.measured_samples, case.height, case.width, inputs)
    weight = 0.05 * draw(*case.weight_shape)
    shape = (case.measured_samples, *g.output_size((case.height, case.width), case.weight_shape[2:]), outputs)
    added, grad, value = draw(*shape), draw(*shape), torch.empty(shape, dtype=case.dtype, device=device)
    grad_x = torch.empty_like(x)
    # As the fused convolution takes it, for the map and for its transpose; as the vendor does.
    square = weight[:, :, None, None] if product else weight
    outputs_first, inputs_first = (square.permute(first, 2, 3, 1 - first).contiguous() for first in ((1, 0) if transposed else (0, 1)))
    rearranged = torch.empty(square.permute(0, 2, 3, 1).shape, dtype=torch.float32, device=device)
    rows, gathered = (x, grad) if transposed else (grad, x)
    last = weight if product else weight.contiguous(memory_format=torch.channels_last)
    maps, grads = x.permute(0, 3, 1, 2), grad.permute(0, 3, 1, 2)
    options = [g.stride] * 2, [g.padding] * 2, [1, 1], transposed, [g.output_padding] * 2, 1

    def fused() -> Tensor:
        _launch_cuda.recurrent_conv([ConvTerm(x, outputs_first, g.stride, g.padding, transposed)], None, [added], None, value)
        return value

    def fused_data() -> Tensor:
        _launch_cuda.recurrent_conv([ConvTerm(grad, inputs_first, g.stride, g.padding, not transposed)], None, [], None, grad_x)
        return grad_x

    def fused_weight() -> Tensor:
        _launch_cuda.recurrent_conv_weight_grad(rows, gathered, rearranged, g.stride, g.padding)
        return rearranged.permute(0, 3, 1, 2).contiguous().reshape(case.weight_shape)

    def direct() -> Tensor:  # the vendor's convolution, and the pass that adds what else there is
        y = torch.mm(x.flatten(1), weight.t()).view(shape) if product else torch.convolution(maps, last, None, *options).permute(0, 2, 3, 1)
        return torch.add(y, added, out=value)

    def direct_data() -> Tensor:
        if product:
            return torch.mm(grad.flatten(1), weight).view(x.shape)
        found = torch.ops.aten.convolution_backward(grads, maps, last, None, *options, [True, False, False])[0]
        return found.permute(0, 2, 3, 1).contiguous()

    def direct_weight() -> Tensor:
        if product:
            return torch.mm(grad.flatten(1).t(), x.flatten(1))
        return torch.ops.aten.convolution_backward(grads, maps, last, None, *options, [False, True, False])[1].contiguous()

    return {"forward": (fused, direct), "data": (fused_data, direct_data), "weight": (fused_weight, direct_weight)}


def alternate(contenders: list[Callable[[], object]], device: torch.device) -> list[float]:
    """Median seconds of each contender on the device's current stream, one call of each per round."""
    for run in contenders:
        for _ in range(2):
            run()
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS):
        for run, measured in zip(contenders, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record(torch.cuda.current_stream(device))
            run()
            end.record(torch.cuda.current_stream(device))
            end.synchronize()
            measured.append(start.elapsed_time(end) / 1000)
    return [statistics.median(t) for t in times]
