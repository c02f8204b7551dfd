"""Times of our convolutions and of the vendor's on a CUDA device: measured once per machine and kept in a file.

What is timed are replays of a CUDA graph that holds several calls: launching from Python takes longer than most small maps. An engine that
fails is slower than any other, and a warning says what failed; that is not kept.

The file is ``convolutions.json`` in the folder ``RNNDYN_CACHE``, or ``~/.cache/rnndyn_fast``. Its entries name the device, its driver, the
versions of torch, cuDNN and Triton, the build of these kernels, and the shape; of others nothing is used. ``RNNDYN_MEASURE=0``: nothing is
measured, and what the file has is used; ``RNNDYN_MEASURE=1``: shapes are measured on devices of any compute capability.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import statistics
import threading
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path

import torch
from torch import Tensor

from rnndyn_fast.file_io import write_text
from rnndyn_fast.ops import cuda_module, triton_conv
from rnndyn_fast.ops.capture import CudaGraphs, Graphs
from rnndyn_fast.ops.device_kernels import kernels_of
from rnndyn_fast.ops.engines import Geometry, Operator
from rnndyn_fast.ops.fused_conv import KERNELS, PASSES, ConvTerm

MOST_SAMPLES = 256  # of a measurement: more fill no device better
ROUNDS = 7
REPLAYED_SECONDS = 1e-3  # that the calls of a graph take together, at least, where MOST_CALLS are enough for it
MOST_CALLS = 32
VENDOR_FROM = (9, 0)  # compute capability: `mma.sync` reaches some 60% of what the vendor's `wgmma` does there
MARGIN = 0.03  # by which an engine must be faster than those before it: nearer, two measurements would differ, and results with them


@dataclass(frozen=True)
class Case:
    """A linear map as it is measured."""

    geometry: Geometry
    weight_shape: tuple[int, ...]
    height: int  # of the source map
    width: int
    dtype: torch.dtype
    samples: int
    engines: tuple[str, ...]  # of our own, those that are timed beside the vendor's

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
    """Seconds of one pass by engine: medians; infinite where it failed."""

    seconds: Mapping[str, float]  # "direct", the vendor's, and others

    @property
    def best(self) -> str:
        """The engine to take."""
        best = "direct"
        for name in KERNELS:
            if self.seconds.get(name, math.inf) < (1 - MARGIN) * self.seconds[best]:
                best = name
        return best

    def __str__(self) -> str:
        return ", ".join(f"{name} {'failed' if math.isinf(s) else format(1e3 * s, '.3g')}" for name, s in self.seconds.items())


_lock = threading.Lock()
_known: dict[str, dict[str, Times]] = {}
_read: set[Path] = set()
_warned: set[str] = set()


def cache_file() -> Path:
    """Where measurements are kept."""
    folder = os.environ.get("RNNDYN_CACHE")
    return (Path(folder) if folder else Path.home() / ".cache" / "rnndyn_fast") / "convolutions.json"


def forget() -> None:
    """Forget what this process knows (the file is read again)."""
    with _lock:
        _known.clear()
        _read.clear()
        _warned.clear()


def device_name(device: torch.device) -> str:
    """As reasons give it."""
    return torch.cuda.get_device_name(device)


def capturing() -> bool:
    """Whether a CUDA graph is being captured on this thread's stream: then nothing may be timed."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()


@cache
def build_id() -> str:
    """Which build of the kernels this is: a digest of their module."""
    path = getattr(cuda_module.module(), "__file__", None)
    return hashlib.blake2b(Path(path).read_bytes(), digest_size=6).hexdigest() if path else "none"


@cache
def driver() -> str:
    """The version of the NVIDIA driver, or, where the system does not say, of the CUDA that it supports."""
    try:
        found = re.search(r"Kernel Module\D*([\d.]+)", Path("/proc/driver/nvidia/version").read_text(encoding="utf-8"))
    except OSError:
        found = None
    return found[1] if found else f"for CUDA {cuda_module.build_info()['driver']}"


def _machine(device: torch.device) -> str:
    return (
        f"{device_name(device)}, driver {driver()}, torch {torch.__version__}, cuDNN {torch.backends.cudnn.version()}, "
        f"Triton {triton_conv.build_id()}, kernels {build_id()}"
    )


def why_not_now(device: torch.device) -> str | None:
    """Why a rollout does not stop to measure on a device; None if it does."""
    setting = os.environ.get("RNNDYN_MEASURE")
    if setting == "0":
        return "RNNDYN_MEASURE=0"
    if setting != "1" and cuda_module.capability(device) >= VENDOR_FROM:
        major, minor = VENDOR_FROM
        return f"the vendor's is the default from compute capability {major}.{minor} on; RNNDYN_MEASURE=1 measures"
    return None


def times_of(case: Case, device: torch.device, unmeasured: str | None = None) -> tuple[Mapping[str, Times] | None, str]:
    """Times by pass, measured now if they are not known; and the device's name. Or None, and why not.

    ``unmeasured``: why nothing is to be measured now.
    """
    key = f"{_machine(device)}: {case}"
    with _lock:
        _read_file(cache_file())
        known = _known.get(key)
    if known is not None and all(set(times.seconds) == {*case.engines, "direct"} for times in known.values()):
        return known, device_name(device)
    if unmeasured is not None:
        return None, unmeasured
    if capturing():
        return None, "a CUDA graph is being captured; run once before capturing"
    try:
        found = measure(case, device)
    except torch.OutOfMemoryError:
        return None, f"{device} has too little free memory for it"
    except Exception as error:  # of the vendor's own operations, whatever it is: they compute what could not be measured, or say why not
        return None, _summary(error)
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
            _known.setdefault(key, {name: Times({e: float(t) for e, t in passes[name].items()}) for name in PASSES})
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return  # none yet, or of another version: measured anew


def _write_file(path: Path) -> None:
    _read.discard(path)
    _read_file(path)  # what other processes have added
    whole = {key: passes for key, passes in _known.items() if all(math.isfinite(s) for t in passes.values() for s in t.seconds.values())}
    try:
        text = json.dumps({key: {p: dict(t.seconds) for p, t in passes.items()} for key, passes in whole.items()}, indent=1)
        write_text(path, text + "\n")
    except OSError:
        return  # a home that cannot be written: measured again by the next process


def measure(case: Case, device: torch.device) -> dict[str, Times]:
    """Time the engines on random maps, alternating: each pass as a rollout runs it."""
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        return {name: Times(_times(found, f"{name} of {case}", device)) for name, found in passes(case, device).items()}


def _times(contenders: Mapping[str, Callable[[], Tensor]], where: str, device: torch.device) -> dict[str, float]:
    """Seconds by engine. Of those that fail a warning is given; the vendor's failure is raised."""
    try:
        return dict(zip(contenders, alternate(list(contenders.values()), device), strict=True))
    except torch.OutOfMemoryError:
        raise
    except Exception:
        failed = _failing(contenders, where, device)
    left = {engine: run for engine, run in contenders.items() if engine not in failed}
    seconds = dict(zip(left, alternate(list(left.values()), device), strict=True))
    return {engine: seconds.get(engine, math.inf) for engine in contenders}


def _failing(contenders: Mapping[str, Callable[[], Tensor]], where: str, device: torch.device) -> set[str]:
    """Those of our own engines that cannot be timed alone."""
    failed = set()
    for engine, run in contenders.items():
        if engine == "direct":
            continue
        try:
            alternate([run], device)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            failed.add(engine)
            _warn(engine, where, _summary(error))
    return failed


def _summary(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _warn(engine: str, where: str, error: str) -> None:
    """Once per kernel and error, whatever the shape."""
    with _lock:
        if error in _warned:
            return
        _warned.add(error)
    name = {"fused": "fused", "triton": "Triton"}[engine]
    warnings.warn(f"the {name} convolution failed, and the fastest of the others takes its place ({where}): {error}", stacklevel=2)


def passes(case: Case, device: torch.device) -> dict[str, dict[str, Callable[[], Tensor]]]:
    """Each pass by our engines and by the vendor's, on random maps; the forward one with the sum of what else enters. All return the same,
    if not rounded alike."""
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

    def forward(engine: str) -> Tensor:
        kernels_of(engine).recurrent_conv([ConvTerm(x, outputs_first, g.stride, g.padding, transposed)], None, [added], None, value)
        return value

    def data(engine: str) -> Tensor:
        kernels_of(engine).recurrent_conv([ConvTerm(grad, inputs_first, g.stride, g.padding, not transposed)], None, [], None, grad_x)
        return grad_x

    def weight_grad(engine: str) -> Tensor:
        kernels_of(engine).recurrent_conv_weight_grad(rows, gathered, rearranged, g.stride, g.padding)
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

    ours = {"forward": forward, "data": data, "weight": weight_grad}
    vendor = {"forward": direct, "data": direct_data, "weight": direct_weight}
    return {name: {**{engine: partial(ours[name], engine) for engine in case.engines}, "direct": vendor[name]} for name in PASSES}


def alternate(contenders: list[Callable[[], object]], device: torch.device, graphs: Graphs | None = None) -> list[float]:
    """Median seconds of a call of each contender, over rounds in which a CUDA graph of several calls of each is replayed once."""
    graphs = graphs if graphs is not None else CudaGraphs()
    graphs.check([torch.empty(0, device=device)])
    replays, calls = [], []
    for run in contenders:
        graphs.aside(run)  # what is done at a first call only
        single = seconds(partial(graphs.aside, run), device)
        count = max(1, min(MOST_CALLS, math.ceil(REPLAYED_SECONDS / max(single, 1e-9))))
        replay, _ = graphs.capture(partial(_repeat, run, count))
        replay()  # uploads the graph
        replays.append(replay)
        calls.append(count)
    times: list[list[float]] = [[] for _ in contenders]
    for _ in range(ROUNDS):
        for replay, count, measured in zip(replays, calls, times, strict=True):
            measured.append(seconds(replay, device) / count)
    return [statistics.median(t) for t in times]


def _repeat(run: Callable[[], object], count: int) -> None:
    for _ in range(count):
        run()


def seconds(run: Callable[[], object], device: torch.device) -> float:
    """What a call takes on the device's current stream, which is waited for."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    stream = torch.cuda.current_stream(device)
    start.record(stream)
    run()
    end.record(stream)
    end.synchronize()
    return start.elapsed_time(end) / 1000
