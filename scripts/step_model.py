"""A model of a training step on a GPU: per kernel launches, bytes, floating-point operations and roofline time, as tables.

python scripts/step_model.py [--batch 1024] [--update docs/gpu.md]

The step's program (rnndyn_fast.program) runs on tensors without memory (torch's "meta" device), and every launch of a kernel is noted with
the buffers that it reads and writes; of the vendor's operations each is one launch. So the launches are those of the program, without loss
and optimiser. Bytes are what a call must move if each buffer is read or written once; it takes the longer of bytes / bandwidth and
operations / peak. It is a bound from below: neither the gaps between launches are in it, nor what caches miss, nor kernels that reach less
than the peak.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from kernel_resources import replaced
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from rnndyn_fast.graph import compile_schedule
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.ops import addresses, core, cuda_module, launch
from rnndyn_fast.ops.addresses import Use
from rnndyn_fast.ops.buffers import buffers_on
from rnndyn_fast.program.passes import run_backward, run_forward
from rnndyn_fast.program.plan import Request, default_gradients, make_plan

VENDOR = " (the vendor's)"
START, END = "<!-- step model -->", "<!-- end of step model -->"
# Bytes per second, and operations per second of float16 products: NVIDIA's data sheets, dense.
DEVICES = {"A100": (2.04e12, 312e12), "H100": (3.35e12, 989e12), "H200": (4.8e12, 989e12)}
NETWORKS: dict[str, dict[str, Any]] = {
    "lateral, additive": {"topdown_connections": False, "LT_interaction": "additive"},
    "top-down, multiplicative": {"topdown_connections": True, "LT_interaction": "multiplicative"},
}


@dataclass
class Kernel:
    """All calls of one kind: bytes, operations and launches of each."""

    calls: list[tuple[int, int, int]] = field(default_factory=list)

    @property
    def launches(self) -> int:
        return sum(n for _, _, n in self.calls)

    @property
    def bytes(self) -> int:
        return sum(b for b, _, _ in self.calls)

    @property
    def operations(self) -> int:
        return sum(f for _, f, _ in self.calls)

    def seconds(self, device: str) -> float:
        bandwidth, peak = DEVICES[device]
        return sum(max(b / bandwidth, f / peak) for b, f, _ in self.calls)


class Noted:
    """Stands for the kernels' module."""

    def __init__(self) -> None:
        self.kernels: defaultdict[str, Kernel] = defaultdict(Kernel)
        self.pending = 0  # bytes of the buffers of the launch to come
        self.module = cuda_module.module()

    def address(self, tensor: Tensor | None, name: str, shape: Sequence[int], dtype: torch.dtype, device: Any, use: Use, **_: Any) -> int:
        if tensor is not None:
            self.pending += tensor.nbytes * (2 if use is Use.UPDATE else 1)
        return 0 if tensor is None else 16

    def note(self, name: str, nbytes: int, operations: int, launches: int = 1) -> None:
        self.kernels[name].calls.append((nbytes, operations, launches))

    def launch(self, op: str, dtype: str, values: dict[str, Any], device: int) -> Any:
        """A launch that does nothing. (What scratch it asks for depends on the device.)"""
        nbytes, self.pending = self.pending, 0
        self.note(op, nbytes, self.operations(op, values), self.launches(op, values))
        return mock.Mock(scratch_bytes=0)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @staticmethod
    def operations(op: str, values: dict[str, Any]) -> int:
        """Of the fused convolution, whose products are what takes long; others are bound by their bytes."""
        if op not in ("recurrent_conv", "recurrent_conv_weight_grad"):
            return 0
        pixels = values["samples"] * values["height"] * values["width"]
        if op == "recurrent_conv_weight_grad":
            return int(2 * pixels * values["row_channels"] * values["gathered_channels"] * values["kernel"] ** 2)
        total = 0
        for _, _, (_, _, sources, kernel, stride, _), transposed in values["terms"]:
            taps = kernel**2 / (stride**2 if transposed else 1)
            total += int(2 * pixels * values["channels"] * sources * taps)
        return total

    @staticmethod
    def launches(op: str, values: dict[str, Any]) -> int:
        """Of a call, as area_step_forward.cu and area_step_backward.cu have them (a weight's gradient: without the sum over its splits)."""
        if op == "area_step_forward":
            value, modulator_sum = "value" in values, "modulator_sum" in values
            finished = "state" in values or "max_pooled" in values or (modulator_sum and not value)
            return (value and "moments" not in values) + ("gamma" in values) + finished + ("mean_pooled" in values)
        return 3 if op == "area_step_backward" and "gamma" in values else 1


class Vendor(TorchDispatchMode):
    """Notes the vendor's operations."""

    def __init__(self, noted: Noted) -> None:
        super().__init__()
        self.noted = noted

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        outputs = [t for t in (result if isinstance(result, tuple | list) else (result,)) if isinstance(t, Tensor)]
        inputs = [t for a in args for t in (a if isinstance(a, tuple | list) else (a,)) if isinstance(t, Tensor)]
        shared = {t.untyped_storage()._cdata for t in inputs}
        name = function.overloadpacket.__name__
        fresh = [t for t in outputs if t.untyped_storage()._cdata not in shared]
        moves = bool(fresh) or name.endswith("_")
        if moves and name not in ("empty", "empty_like", "empty_strided", "new_empty", "detach", "_to_copy_view"):
            counted = flop_registry.get(function.overloadpacket)
            operations = counted(*args, **(kwargs or {}), out_val=result) if counted else 0
            self.noted.note(name + VENDOR, sum(t.nbytes for t in (*inputs, *outputs)), operations)
        return result


@contextmanager
def noting() -> Iterator[Noted]:
    """Half-precision tensors without memory go to kernels that are noted."""
    noted = Noted()
    with (
        mock.patch.object(core, "on_device", lambda tensor: tensor.device.type == "meta"),
        mock.patch.object(cuda_module, "_module", noted),
        mock.patch.object(cuda_module, "unavailable", None),
        mock.patch.object(cuda_module, "capability", return_value=(9, 0)),
        mock.patch.object(cuda_module, "device_error", return_value=None),
        mock.patch.object(addresses, "device_address", noted.address),
        mock.patch.object(launch, "first_element", return_value=0),
        mock.patch.object(addresses, "device_queue", return_value=(0, 0)),
        Vendor(noted),
    ):
        yield noted


def training_step(network: RecurrentNetwork, batch: int, engine: str = "fused", size: int = 64) -> dict[str, Kernel]:
    """The kernels of a forward and a backward pass through time, in float16."""
    spec = network.network
    schedule = compile_schedule(spec, network.timesteps, (spec.readout.source,) if spec.readout else ())
    given = {"image": torch.empty(batch, 3, size, size, dtype=torch.float16, device="meta")}
    parameters = {name: torch.empty(shape, device="meta") for name, shape in spec.parameter_shapes.items()}
    with buffers_on(torch.device("meta")), torch.no_grad(), noting() as noted:
        plan = make_plan(Request(schedule, given, parameters, frozenset(parameters), engine, training=False))
        layouts = [one for one in default_gradients(plan.states) if one is not None]
        grads = [torch.empty_strided(shape, strides, dtype=dtype) for shape, strides, dtype in layouts]
        forward = run_forward(plan.versions[0], {**given, **parameters})
        run_backward(plan, forward, {**given, **parameters}, grads, keep=False)
    return dict(noted.kernels)


def table(kernels: dict[str, Kernel]) -> str:
    """Kernels in rows, the one with most time first."""
    lines = ["| kernel | launches | GB | TFLOP | " + " | ".join(f"{d}, ms" for d in DEVICES) + " |", "|---" * (4 + len(DEVICES)) + "|"]
    rows = sorted(kernels.items(), key=lambda item: -item[1].seconds("H100"))
    whole = Kernel([call for _, kernel in rows for call in kernel.calls])
    small = [(name, kernel) for name, kernel in rows if kernel.seconds("H100") < 0.005 * whole.seconds("H100")]
    shown = [row for row in rows if row not in small]
    rest = Kernel([call for _, kernel in small for call in kernel.calls])
    for name, kernel in [*shown, ("all others", rest), ("**the step**", whole)]:
        times = " | ".join(f"{1e3 * kernel.seconds(d):.2f}" for d in DEVICES)
        vendor = name.endswith(VENDOR)
        label = name if name.startswith(("*", "all")) else f"`{name.removesuffix(VENDOR)}`" + ", the vendor's" * vendor
        lines.append(f"| {label} | {kernel.launches} | {kernel.bytes / 1e9:.2f} | {kernel.operations / 1e12:.2f} | {times} |")
    return "\n".join(lines)


def page(batch: int) -> str:
    """The tables of both networks."""
    parts = []
    for name, options in NETWORKS.items():
        net = blt_net_64(timesteps=10, **options)
        title = f"`blt_net_64`, {name}; T = 10, batch {batch}, float16, every convolution fused that can be:"
        parts += [title, "", table(training_step(net, batch)), ""]
    return "\n".join(parts).rstrip()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--batch", type=int, default=1024)
    parser.add_argument("--update", type=Path, help="page whose tables are replaced; else they are printed")
    arguments = parser.parse_args()
    text = page(arguments.batch)
    if arguments.update is None:
        print(text)
    else:
        old = arguments.update.read_text(encoding="utf-8")
        arguments.update.write_text(replaced(old, text, START, END), encoding="utf-8")


if __name__ == "__main__":
    main()
