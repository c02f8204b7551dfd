"""``rollout``: a whole run of a network through time, natively or by the reference.

The native one is one op and one autograd node for any network (:mod:`rnndyn_fast.program.rollout_op`). Forward mode runs the reference
instead, whatever transforms surround it.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from rnndyn_fast.graph.rollout_dtype import HALF_DTYPES, autocast_inputs
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec.network import Network, Norm
from rnndyn_fast.ops import core, cuda_module
from rnndyn_fast.ops.buffers import sums_dtype
from rnndyn_fast.ops.engines import ENGINES, with_precision
from rnndyn_fast.ops.forward_mode import in_forward_mode
from rnndyn_fast.program.rollout_op import run_rollout
from rnndyn_fast.reference.rollout import rollout as reference_rollout

BACKENDS = ("native", "reference")
NATIVE_DTYPES = (torch.float32, torch.float64)


def can_run_native(network: Network, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], *, raise_error: bool = False) -> bool:
    """Whether the native engine can run a rollout on these tensors: any network, on the CPU in float32 or float64, on CUDA devices in
    float32, float16 or bfloat16, where parameters of half-precision maps may be float32.

    Args:
        raise_error: raise ``ValueError`` with the reason instead of returning False.
    """
    reason = core.unavailable
    example = inputs[0]
    for name, tensor in (*zip((n.name for n in network.inputs), inputs, strict=True), *parameters.items()):
        if reason:
            break
        if tensor.layout != torch.strided:
            reason = f"{name} is {tensor.layout}; the native engine takes dense tensors"
        elif tensor.device != example.device:
            reason = f"{name} is on {tensor.device}, and the first input on {example.device}"
        elif core.on_device(tensor):
            reason = cuda_module.why_not(tensor)
            if reason is None and tensor.dtype not in (example.dtype, sums_dtype(example.dtype)):
                reason = f"it has dtype {tensor.dtype}, and the first input {example.dtype}"
            reason = reason and f"{name}: {reason}"
        elif tensor.device.type != "cpu":
            reason = f"{name} is on {tensor.device}; the native engine runs on the CPU and on CUDA devices"
        elif tensor.dtype not in NATIVE_DTYPES:
            reason = f"{name} has dtype {tensor.dtype}; the native engine takes float32 and float64"
    if reason and raise_error:
        raise ValueError(f'backend="native": {reason}; use backend="reference"')
    return reason is None


def _check(network: Network, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len(inputs) != len(network.inputs):
        raise ValueError(f"inputs: expected {len(network.inputs)} ({[n.name for n in network.inputs]}), got {len(inputs)}")
    samples = None
    example = inputs[0]
    for node, x in zip(network.inputs, inputs, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{node.name}: expected a torch.Tensor, got {type(x).__name__}")
        if x.is_nested or x.layout != torch.strided:
            raise TypeError(f"{node.name}: expected a dense tensor, got {'a nested tensor' if x.is_nested else x.layout}")
        symbols = ["T", "N", "C", "H", "W"] if node.frames else ["N", "C", "H", "W"]
        wanted = (node.channels, node.height, node.width)
        if x.dim() != len(symbols) or tuple(x.shape[-3:]) != wanted:
            raise ValueError(
                f"{node.name}: expected [{', '.join(symbols)}] with C, H, W = {', '.join(map(str, wanted))}, got {list(x.shape)}"
            )
        if not x.dtype.is_floating_point:
            raise TypeError(f"{node.name}: expected a floating-point tensor, got {x.dtype}")
        if x.dtype != example.dtype or x.device != example.device:
            raise TypeError(f"{node.name}: expected {example.dtype} on {example.device} like the first input, got {x.dtype} on {x.device}")
        n = x.shape[-4]
        if n == 0:
            raise ValueError(f"{node.name}: expected [{', '.join(symbols)}] with N >= 1, got an empty batch {list(x.shape)}")
        if samples is not None and n != samples:
            raise ValueError(f"{node.name}: expected N = {samples} like the first input, got {n}")
        samples = n
    for name, shape in shapes.items():
        if name not in parameters:
            raise ValueError(f"parameters: {name!r} {list(shape)} is missing")
        p = parameters[name]
        if tuple(p.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(p.shape)}")
        # (Half-precision maps may meet parameters of float32, which are what an optimiser moves.)
        half = core.on_device(example) and example.dtype in HALF_DTYPES and p.dtype == torch.float32
        if not (half or p.dtype == example.dtype) or p.device != example.device:
            raise _unlike(network, example, name, parameters, shapes)


def _unlike(network: Network, example: Tensor, name: str, parameters: Mapping[str, Tensor], names: Iterable[str]) -> TypeError:
    """A parameter of another dtype or device than the input: which of them is the odd one."""
    odd, where = parameters[name], network.inputs[0].name
    if any(p.dtype != odd.dtype or p.device != odd.device for p in (parameters[other] for other in names if other in parameters)):
        return TypeError(
            f"{name}: expected {example.dtype} on {example.device} like {where!r}, got {odd.dtype} on {odd.device}, which not all "
            "parameters have"
        )
    return TypeError(f"{where}: expected {odd.dtype} on {odd.device} like parameter {name!r}, got {example.dtype} on {example.device}")


def _check_samples(network: Network, inputs: Sequence[Tensor]) -> None:
    """As ``nn.BatchNorm2d`` in training: a variance needs two values per channel."""
    samples = inputs[0].shape[-4]
    for area in network.areas:
        _, height, width = network.shapes[area.name]
        if area.norm is Norm.BATCH and not area.norm_frozen and samples * height * width < 2:
            raise ValueError(
                f"{network.inputs[0].name}: expected more than one value per channel for the batch norm of area {area.name!r} in training, "
                f"got {samples} sample of a 1 x 1 map"
            )


def rollout(
    network: Network,
    timesteps: int,
    inputs: Sequence[Tensor],  # [N, C, H, W], or [T, N, C, H, W] where the input has frames
    parameters: Mapping[str, Tensor],
    record: Sequence[str] | None = None,
    *,
    backend: str | None = None,
    engine: str = "auto",
    statistics: dict[str, tuple[Tensor, Tensor]] | None = None,
) -> list[Tensor]:
    """Run a network through time and return the states of some of its areas.

    Args:
        network: the spec; its docstring has the equations.
        timesteps: T >= 1.
        inputs: one tensor per input of the network, float32 or float64; on a CUDA device float32, float16 or bfloat16 (reference: any
            float dtype). Their dtype, or that of CUDA autocast, is the dtype of the states; parameters have it too, or are float32 where
            it is a half one.
        parameters: by name, with the shapes of ``network.parameter_shapes`` and, unless ``statistics`` is given,
            ``network.buffer_shapes``; others are ignored.
        record: areas to return ("area", or "area:state" where it has several); the readout's source area if None.
        backend: "native" (raises where :func:`can_run_native` says no), "reference" (plain PyTorch, nothing is scheduled), or None: native
            where it can run, else the reference, with a warning that gives the reason.
        engine: how convolutions are computed: "auto", "direct" (the vendor's), on the CPU "winograd" or "amx"
            (see :func:`rnndyn_fast.ops.engines.choose_engine`), on CUDA devices "fused" or "triton" (see
            :func:`rnndyn_fast.ops.cuda_engine.choose_device_engine`). The precision of the CPU's "auto" and "amx" is that of
            ``torch.set_float32_matmul_precision``, or bfloat16 under CPU autocast.
        statistics: of batch norms. None: they use the running statistics (inference). A dict: they use those of the batch (training),
            and mean and unbiased variance, [C] each, are put there by ``<prefix>.<t>``.

    Returns: per recorded area its states [T', N, C, H, W] (any strides), T' counted from the first step at which it has a state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came.

    Differentiable: inputs and parameters. Forward-mode: yes, at the cost of the reference. Double backward: raises; use
    ``backend="reference"``. Deterministic: yes. Memory: what ``rnndyn plan`` prints.

    Source: Thorat, Doerig & Kietzmann, arXiv 2308.12435.

    >>> from rnndyn_fast.models import blt_net_64
    >>> net = blt_net_64(timesteps=3, widths=(2, 4, 8, 16, 32))
    >>> rollout(net.network, 3, [torch.zeros(1, 3, 64, 64)], dict(net.named_parameters()))[0].shape
    torch.Size([3, 1, 32, 1, 1])
    """
    if record is None:
        if network.readout is None:
            raise ValueError("record: the network has no readout, so name the areas to return")
        record = (network.readout.source,)
    if backend not in (None, *BACKENDS):
        raise ValueError(f'backend: expected "native", "reference" or None, got {backend!r}')
    if engine not in ENGINES:
        raise ValueError(f"engine: expected one of {', '.join(ENGINES)}, got {engine!r}")
    if isinstance(record, str):
        raise TypeError(f"record: expected a sequence of area names, got the string {record!r}")
    names = tuple(record)
    if not torch.compiler.is_compiling():  # (then the op's fake implementation does it)
        compile_schedule(network, timesteps, names)  # raises for bad time steps and names
    shapes = network.parameter_shapes if statistics is not None else {**network.parameter_shapes, **network.buffer_shapes}
    _check(network, inputs, parameters, shapes)
    for node, x in zip(network.inputs, inputs, strict=True):
        if node.frames and x.shape[0] != timesteps:
            raise ValueError(f"{node.name}: expected [T, N, C, H, W] with T = {timesteps}, got {list(x.shape)}")
    if statistics is not None:
        _check_samples(network, inputs)
    used = {name: parameters[name] for name in shapes}
    if not torch.compiler.is_compiling() and any([t.is_neg() for t in (*inputs, *used.values())]):  # (as the imaginary part of a conjugate)
        inputs, used = [x.resolve_neg() for x in inputs], {name: p.resolve_neg() for name, p in used.items()}
    if backend != "reference":
        inputs = autocast_inputs(inputs)
    if backend is None:
        try:
            can_run_native(network, inputs, used, raise_error=True)
        except ValueError as reason:
            warnings.warn(f"running the reference, in PyTorch's operations: {reason}", stacklevel=2)
            backend = "reference"
    elif backend == "native":
        can_run_native(network, inputs, used, raise_error=True)
    if backend == "reference" or in_forward_mode([*inputs, *used.values()]):
        return reference_rollout(network, timesteps, inputs, used, names, statistics)
    return run_rollout(network, timesteps, inputs, used, names, statistics, with_precision(engine))
