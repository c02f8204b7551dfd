"""What runs on this machine, and what does not and why."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import sys
from typing import Any

import torch

from rnndyn_fast.optional import OPTIONAL_PACKAGES, install_hint

# What each engine of the native backend computes.
_CONVOLUTIONS = {
    "auto": "the fastest of the others by a rule for each map (rnndyn plan prints it)",
    "direct": "every linear map, by PyTorch",
    "winograd": "float32: 3 x 3, 5 x 5 and 7 x 7 of stride 1, transposed of stride 2; other maps run direct",
    "amx": "float32, any map, in bfloat16 parts on matrix units (emulated, and slow, where the processor has none)",
    "fused": "float16 and bfloat16 on CUDA devices: square kernels of stride 1 and 2, channels in multiples of 8",
    "triton": "float32, float16 and bfloat16 on CUDA devices: square kernels of stride 1, 2, 4, 8 and 16",
}


def report() -> str:
    """Versions, processor, threads, engines (tried on a small network), optional packages; one fact per line."""
    import rnndyn_fast
    from rnndyn_fast.analysis import ReadoutZoneReducer
    from rnndyn_fast.models import blt_net_64
    from rnndyn_fast.nn import CTRNN
    from rnndyn_fast.ops import cuda_module, triton_conv
    from rnndyn_fast.ops.engines import ENGINES

    lines = ["versions"]
    lines += _rows({"rnndyn_fast": rnndyn_fast.__version__, "python": f"{platform.python_version()} ({sys.executable})"})
    lines += _rows({"torch": torch.__version__, "system": f"{platform.system()} {platform.release()} {platform.machine()}"})
    lines += ["threads", *_rows({"torch": torch.get_num_threads(), "processors": os.cpu_count()})]
    settings = ("OMP_NUM_THREADS", "OMP_WAIT_POLICY", "RNNDYN_ISA")
    lines += _rows({name: os.environ[name] for name in settings if name in os.environ})
    lines += ["native core"]
    try:
        info: dict[str, Any] = dict(rnndyn_fast.build_info())
    except ImportError as error:
        info = {"not available": str(error)}
    lines += _rows({name: ", ".join(value) if isinstance(value, list | tuple) else value for name, value in info.items()})

    lines += ["engines"]
    images = torch.zeros(1, 3, 16, 16)
    readout = torch.eye(3)

    def network(backend: str) -> None:
        net = blt_net_64(timesteps=2, image_size=16, widths=(2, 4, 8, 16, 32), backend=backend)
        net(images).sum().backward()

    def reducer(backend: str) -> None:
        one = ReadoutZoneReducer(readout, timesteps=2, backend=backend)
        one.update(torch.ones(2, 1, 3), torch.zeros(1, dtype=torch.int64))

    def convolutions(engine: str) -> None:
        net = blt_net_64(timesteps=2, image_size=16, widths=(16,) * 5, topdown_connections=False, backend="native", engine=engine)
        net(torch.zeros(8, 3, 16, 16)).sum().backward()

    def continuous_time(backend: str) -> None:
        outputs, _ = CTRNN(2, 1, 4, backend=backend)(torch.ones(1, 3, 1))
        outputs.sum().backward()

    for backend in ("native", "reference"):
        lines += _rows(
            {
                f"networks, {backend}": _attempt(network, backend),
                f"readout zones, {backend}": _attempt(reducer, backend),
                f"continuous time, {backend}": _attempt(continuous_time, backend),
            }
        )
    lines += _rows({f"convolutions, {engine}": f"{_attempt(convolutions, engine)}; {_CONVOLUTIONS[engine]}" for engine in ENGINES})
    lines += ["accelerators"]
    if torch.cuda.is_available():
        lines += _rows({f"cuda:{index}": _device(index) for index in range(torch.cuda.device_count())})
    else:
        lines += _rows({"CUDA": f"no device that torch can use ({cuda_module.why_no_device()})"})
    try:
        built = cuda_module.build_info()
        kernels = ", ".join(f"{name} {value}" for name, value in built.items())
        if not built["devices"]:
            kernels += f"; {cuda_module.device_error(0)}"
    except ImportError as error:
        kernels = f"{error}: networks run in PyTorch's operations there"
    lines += _rows({"CUDA kernels": kernels, "Triton kernels": triton_conv.unavailable() or f"Triton {triton_conv.build_id()}"})
    lines += ["optional packages"]
    lines += _rows({package.distribution: _version(name) for name, package in OPTIONAL_PACKAGES.items()})
    return "\n".join(lines)


def _device(index: int) -> str:
    """A CUDA device, and why the kernels cannot run there if they cannot."""
    from rnndyn_fast.ops import cuda_module

    major, minor = cuda_module.capability(torch.device("cuda", index))
    why = "too old for the kernels, which need 8.0" if major < 8 else None
    if why is None and cuda_module.unavailable is None:
        why = cuda_module.device_error(index)
    reason = f"; {why}: networks run in PyTorch's operations there" if why else ""
    return f"{torch.cuda.get_device_name(index)}, compute capability {major}.{minor}{reason}"


def _rows(values: dict[str, Any]) -> list[str]:
    return [f"  {name:<24} {value}" for name, value in values.items()]


def _attempt(function: Any, name: str) -> str:
    """What `function(name)` does: "runs", or why it does not."""
    try:
        function(name)
    except Exception as error:  # whatever it is, it is what the user wants to read
        return f"does not run: {type(error).__name__}: {error}"
    return "runs"


def _version(name: str) -> str:
    package = OPTIONAL_PACKAGES[name]
    try:
        return importlib.metadata.version(package.distribution)
    except importlib.metadata.PackageNotFoundError:
        return f"missing, needed for {package.purpose}: {install_hint(name)}"
