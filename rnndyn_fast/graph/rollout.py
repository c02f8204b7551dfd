"""``rollout``: a whole run of a network through time as one op and one autograd node.

``torch.ops.rnndyn.rollout`` and ``torch.ops.rnndyn.rollout_backward`` are registered with ``torch.library`` (fake implementations
included), so that ``torch.compile`` sees one node. Outside compilation an ``autograd.Function`` calls the same two ops, because a
registered op alone returns zeros under forward-mode differentiation. Forward mode runs the reference instead, whatever transforms
surround it. Differentiating the backward pass raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.backward import backward
from rnndyn_fast.graph.device import HALF_DTYPES, autocast_inputs, on_its_device
from rnndyn_fast.graph.forward import forward_inference, forward_training
from rnndyn_fast.graph.operands import Operands
from rnndyn_fast.graph.saved import saved_buffers
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.scheduled import rollout_scheduled
from rnndyn_fast.graph.spec import Network
from rnndyn_fast.graph.support import unknown_to_native
from rnndyn_fast.graph.taped import can_run_taped, rollout_taped
from rnndyn_fast.ops import _launch, _launch_cuda
from rnndyn_fast.ops.convolution import ENGINES, with_precision
from rnndyn_fast.ops.forward_mode import in_forward_mode
from rnndyn_fast.reference.rollout import rollout as reference_rollout

NATIVE_DTYPES = (torch.float32, torch.float64)

_LIBRARY = torch.library.Library("rnndyn", "FRAGMENT")
_LIBRARY.define(
    "rollout(Tensor[] inputs, Tensor[] parameters, str network, int timesteps, str[] record, bool training, str engine) -> Tensor[]"
)
_LIBRARY.define(
    "rollout_backward(Tensor[] grads, Tensor[] saved, Tensor[] inputs, Tensor[] parameters, str network, int timesteps, "
    "str[] record, bool[] needs, str engine) -> Tensor[]"
)


def _operands(
    inputs: Sequence[Tensor],
    parameters: Sequence[Tensor],
    network: str,
    timesteps: int,
    record: Sequence[str],
    engine: str,
    *,
    keep: bool = False,
) -> Operands:
    schedule = compile_schedule(Network.from_json(network), timesteps, tuple(record))
    return Operands(schedule, inputs, parameters, engine, keep=keep)


def _forward_native(
    inputs: list[Tensor], parameters: list[Tensor], network: str, timesteps: int, record: list[str], training: bool, engine: str
) -> list[Tensor]:
    with on_its_device(inputs[0]):
        operands = _operands(inputs, parameters, network, timesteps, record, engine, keep=not training)
        if not training:
            return forward_inference(operands)
        outputs, saved = forward_training(operands)
        return [*outputs, *saved]


def _forward_fake(
    inputs: list[Tensor], parameters: list[Tensor], network: str, timesteps: int, record: list[str], training: bool, engine: str
) -> list[Tensor]:
    spec = Network.from_json(network)
    schedule = compile_schedule(spec, timesteps, tuple(record))
    samples = inputs[0].shape[1] if spec.inputs[0].frames else inputs[0].shape[0]
    outputs = []
    for name in record:
        channels, height, width = spec.shapes[name]
        buffer = inputs[0].new_empty((timesteps - schedule.first_step[name], samples, height, width, channels))
        outputs.append(buffer.permute(0, 1, 4, 2, 3))
    if training:
        for b in saved_buffers(schedule):
            outputs.append(inputs[0].new_empty((b.slots, samples, *b.shape), dtype=b.dtype(inputs[0].dtype)))
    return outputs


def _backward_native(
    grads: list[Tensor],
    saved: list[Tensor],
    inputs: list[Tensor],
    parameters: list[Tensor],
    network: str,
    timesteps: int,
    record: list[str],
    needs: list[bool],
    engine: str,
) -> list[Tensor]:
    with on_its_device(inputs[0]):
        operands = _operands(inputs, parameters, network, timesteps, record, engine)
        names = [*operands.inputs, *operands.parameters]
        result = backward(operands, saved, grads, dict(zip(names, needs, strict=True)))
    # An op returns tensors: an empty one of shape [0] stands for "no gradient" (no parameter or input has that shape).
    return [grad if (grad := result.get(name)) is not None else inputs[0].new_empty(0) for name in names]


def _backward_fake(
    grads: list[Tensor],
    saved: list[Tensor],
    inputs: list[Tensor],
    parameters: list[Tensor],
    network: str,
    timesteps: int,
    record: list[str],
    needs: list[bool],
    engine: str,
) -> list[Tensor]:
    spec = Network.from_json(network)
    used = _used_parameters(spec, timesteps, tuple(record))
    names = [*(node.name for node in spec.inputs), *spec.parameter_shapes]
    result = []
    for name, tensor, need in zip(names, [*inputs, *parameters], needs, strict=True):
        given = need and (name in used or name not in spec.parameter_shapes)
        result.append(tensor.new_empty(tensor.shape) if given else tensor.new_empty(0))
    return result


def _used_parameters(network: Network, timesteps: int, record: tuple[str, ...]) -> set[str]:
    schedule = compile_schedule(network, timesteps, record)
    used = set()
    for (name, _), terms in schedule.terms.items():
        prefix = network.area(name).norm_parameter
        used |= {f"{prefix}.weight", f"{prefix}.bias"}
        for t in terms:
            used |= {f"{t.connection.parameter}.weight"} | ({f"{t.connection.parameter}.bias"} if t.connection.bias else set())
    return used & set(network.parameter_shapes)


# ---------------------------------------------------------------- autograd


def _backward_from(
    grads: Sequence[Tensor | None],
    tensors: Sequence[Tensor],
    saved: Sequence[Tensor],
    key: tuple[str, int, list[str], str],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    network, timesteps, record, engine = key
    spec = Network.from_json(network)
    num_inputs = len(spec.inputs)
    schedule = compile_schedule(spec, timesteps, tuple(record))
    full = []
    for name, grad in zip(record, grads, strict=True):
        if grad is None:
            samples = tensors[0].shape[1] if spec.inputs[0].frames else tensors[0].shape[0]
            grad = tensors[0].new_zeros((timesteps - schedule.first_step[name], samples, *spec.shapes[name]))
        full.append(grad)
    if torch.compiler.is_compiling():
        result = torch.ops.rnndyn.rollout_backward(
            full, list(saved), list(tensors[:num_inputs]), list(tensors[num_inputs:]), network, timesteps, record, list(needs), engine
        )
    else:
        counts = (len(full), len(saved), num_inputs)
        result = _RolloutBackward.apply(network, timesteps, tuple(record), tuple(needs), counts, engine, *full, *saved, *tensors)
    return [None if grad.dim() == 1 and grad.shape[0] == 0 else grad for grad in result]


def _setup_registered(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, parameters, network, timesteps, record, _, engine = inputs
    ctx.key = (network, timesteps, list(record), engine)
    ctx.num_outputs, ctx.num_inputs, ctx.num_parameters = len(record), len(tensors), len(parameters)
    ctx.save_for_backward(*tensors, *parameters, *output[len(record) :])


def _backward_registered(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count = ctx.num_inputs + ctx.num_parameters
    if len(ctx.saved_tensors) == count:
        raise RuntimeError("torch.ops.rnndyn.rollout: expected training=True where a gradient is wanted, got training=False")
    tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    needs = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    result = _backward_from(grads[: ctx.num_outputs], tensors, saved, ctx.key, needs)
    return result[: ctx.num_inputs], result[ctx.num_inputs :], None, None, None, None, None


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError(
        'the native rollout cannot be differentiated twice; build the network with backend="reference" for second derivatives'
    )


class _RolloutBackward(torch.autograd.Function):
    """The backward op as a node of its own, so that functional transforms see one, and a second derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        network: str,
        timesteps: int,
        record: tuple[str, ...],
        needs: tuple[bool, ...],
        counts: tuple[int, int, int],
        engine: str,
        *tensors: Tensor,
    ) -> tuple[Tensor, ...]:
        num_grads, num_saved, num_inputs = counts
        rest = list(tensors)
        grads, saved = rest[:num_grads], rest[num_grads : num_grads + num_saved]
        inputs, parameters = rest[num_grads + num_saved :][:num_inputs], rest[num_grads + num_saved + num_inputs :]
        return tuple(
            torch.ops.rnndyn.rollout_backward(grads, saved, inputs, parameters, network, timesteps, list(record), list(needs), engine)
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        _refuse_double_backward()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        _refuse_double_backward()


class _Rollout(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(network: str, timesteps: int, record: tuple[str, ...], training: bool, engine: str, *tensors: Tensor) -> tuple[Tensor, ...]:
        num_inputs = len(Network.from_json(network).inputs)
        return tuple(
            torch.ops.rnndyn.rollout(
                list(tensors[:num_inputs]), list(tensors[num_inputs:]), network, timesteps, list(record), training, engine
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        network, timesteps, record, _, engine, *tensors = inputs
        ctx.key = (network, timesteps, list(record), engine)
        ctx.num_tensors = len(tensors)
        ctx.mark_non_differentiable(*output[len(record) :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[len(record) :])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, saved = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
        record = ctx.key[2]
        result = _backward_from(grads[: len(record)], tensors, saved, ctx.key, ctx.needs_input_grad[5:])
        return None, None, None, None, None, *result


# ---------------------------------------------------------------- registration

for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("rollout", _forward_native, _device)
    _LIBRARY.impl("rollout_backward", _backward_native, _device)
torch.library.register_fake("rnndyn::rollout", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnndyn::rollout_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::rollout", _backward_registered, setup_context=_setup_registered, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::rollout_backward", _refuse_double_backward, lib=_LIBRARY)


def _one_by_one(op: Callable[..., list[Tensor]]) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """Batching rule of an op: one call per entry."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
        def entry(arg: Any, dims: Any, i: int) -> Any:
            if not isinstance(arg, list) or not arg or not isinstance(arg[0], Tensor):
                return arg
            dims = dims if isinstance(dims, (list, tuple)) else [dims] * len(arg)
            return [x if d is None else x.select(d, i) for x, d in zip(arg, dims, strict=True)]

        results = [op(*(entry(a, d, i) for a, d in zip(args, in_dims, strict=True))) for i in range(info.batch_size)]
        outputs = [torch.stack(values) for values in zip(*results, strict=True)]
        return outputs, [0] * len(outputs)

    return rule


for _name in ("rollout", "rollout_backward"):
    torch.library.register_vmap(f"rnndyn::{_name}", _one_by_one(getattr(torch.ops.rnndyn, _name)), lib=_LIBRARY)


# ---------------------------------------------------------------- the public function


def can_run_native(network: Network, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], *, raise_error: bool = False) -> bool:
    """Whether the native engine can run a rollout on these tensors.

    Args:
        raise_error: raise ``ValueError`` with the reason instead of returning False.
    """
    reason = _launch.unavailable or unknown_to_native(network)
    for name, tensor in (*zip((n.name for n in network.inputs), inputs, strict=True), *parameters.items()):
        if reason:
            break
        if tensor.device != inputs[0].device:
            reason = f"{name} is on {tensor.device}, and the first input on {inputs[0].device}"
        elif _launch.on_device(tensor):
            reason = _launch_cuda.why_not(tensor)
            reason = reason and f"{name}: {reason}"
        elif tensor.device.type != "cpu":
            reason = f"{name} is on {tensor.device}; the native engine runs on the CPU and on CUDA devices"
        elif tensor.dtype not in NATIVE_DTYPES:
            reason = f"{name} has dtype {tensor.dtype}; the native engine takes float32 and float64"
    if reason and raise_error:
        raise ValueError(f'backend="native": {reason}; use backend="scheduled"')
    return reason is None


def _check(network: Network, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], shapes: Mapping[str, tuple[int, ...]]) -> None:
    if len(inputs) != len(network.inputs):
        raise ValueError(f"inputs: expected {len(network.inputs)} ({[n.name for n in network.inputs]}), got {len(inputs)}")
    samples = None
    example = inputs[0]
    for node, x in zip(network.inputs, inputs, strict=True):
        if not isinstance(x, Tensor):
            raise TypeError(f"{node.name}: expected a torch.Tensor, got {type(x).__name__}")
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
        half = _launch.on_device(example) and example.dtype in HALF_DTYPES and p.dtype == torch.float32
        if not (half or p.dtype == example.dtype) or p.device != example.device:
            raise TypeError(
                f"{network.inputs[0].name}: expected {p.dtype} on {p.device} like parameter {name!r}, "
                f"got {example.dtype} on {example.device}"
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
        backend: "native" (raises where :func:`can_run_native` says no), "scheduled" (any network: every term once, in our own kernels;
            in other dtypes and in functional transforms in PyTorch's operations), "reference" (nothing is scheduled), or None: native
            where it can run, else scheduled, with a warning that gives the reason where that is PyTorch's operations.
        engine: how convolutions are computed: "auto", "direct" (the vendor's), on the CPU "winograd" or "amx"
            (see :func:`rnndyn_fast.ops.convolution.choose_engine`), on CUDA devices "fused" (see
            :func:`rnndyn_fast.ops.device_engine.choose_device_engine`). The precision of the CPU's "auto" and "amx" is that of
            ``torch.set_float32_matmul_precision``, or bfloat16 under CPU autocast.
        statistics: of batch norms. None: they use the running statistics (inference). A dict: they use those of the batch (training),
            and mean and unbiased variance, [C] each, are put there by ``<prefix>.<t>``.

    Returns: per recorded area its states [T', N, C, H, W] (any strides), T' counted from the first step at which it has a state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came.

    Differentiable: inputs and parameters. Forward-mode: yes, at the cost of the reference. Double backward: raises; use
    ``backend="reference"``. Deterministic: yes. Memory: training keeps what ``print(schedule)`` lists; otherwise two time steps.

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
    if backend not in (None, "native", "scheduled", "reference"):
        raise ValueError(f'backend: expected "native", "scheduled", "reference" or None, got {backend!r}')
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
    used = {name: parameters[name] for name in shapes}
    if backend != "reference":
        inputs = autocast_inputs(inputs)
    if backend is None:
        try:
            can_run_native(network, inputs, used, raise_error=True)
        except ValueError as reason:
            if not can_run_taped([*inputs, *used.values()]):
                warnings.warn(f'running backend="scheduled", in PyTorch\'s operations: {reason}', stacklevel=2)
            backend = "scheduled"
    elif backend == "native":
        can_run_native(network, inputs, used, raise_error=True)
    tensors = [*inputs, *used.values()]
    if backend == "scheduled" and not torch.compiler.is_compiling():  # (which cannot trace the compiler of schedules)
        schedule = compile_schedule(network, timesteps, names)
        if can_run_taped(tensors):
            return rollout_taped(schedule, inputs, used, statistics, with_precision(engine))
        return rollout_scheduled(schedule, inputs, used, statistics)
    if backend in ("scheduled", "reference") or in_forward_mode(tensors):
        return reference_rollout(network, timesteps, inputs, used, names, statistics)
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    precise = with_precision(engine)
    if torch.compiler.is_compiling():
        run: Callable[..., Any] = torch.ops.rnndyn.rollout
        result = run(list(inputs), list(used.values()), network.to_json(), timesteps, list(names), training, precise)
    else:
        result = _Rollout.apply(network.to_json(), timesteps, names, training, precise, *tensors)
    return list(result[: len(names)])
