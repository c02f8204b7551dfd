"""``rollout``: a whole run of a network through time as one op and one autograd node.

``torch.ops.rnndyn.rollout`` and ``torch.ops.rnndyn.rollout_backward`` are registered with ``torch.library`` (fake implementations included), so that
``torch.compile`` sees one node. Outside compilation an ``autograd.Function`` calls the same two ops, because a registered op alone returns zeros
under forward-mode differentiation: the Function's ``jvp`` runs the reference instead. Differentiating the backward pass raises.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.backward import backward
from rnndyn_fast.graph.forward import forward_inference, forward_training
from rnndyn_fast.graph.operands import Operands
from rnndyn_fast.graph.saved import saved_buffers
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec import Network
from rnndyn_fast.ops import _launch
from rnndyn_fast.reference.rollout import rollout as reference_rollout

NATIVE_DTYPES = (torch.float32, torch.float64)

_LIBRARY = torch.library.Library("rnndyn", "FRAGMENT")
_LIBRARY.define("rollout(Tensor[] inputs, Tensor[] parameters, str network, int timesteps, str[] record, bool training) -> Tensor[]")
_LIBRARY.define(
    "rollout_backward(Tensor[] grads, Tensor[] saved, Tensor[] inputs, Tensor[] parameters, str network, int timesteps, "
    "str[] record, bool[] needs) -> Tensor[]"
)


def _operands(inputs: Sequence[Tensor], parameters: Sequence[Tensor], network: str, timesteps: int, record: Sequence[str]) -> Operands:
    return Operands(compile_schedule(Network.from_json(network), timesteps, tuple(record)), inputs, parameters)


def _forward_cpu(
    inputs: list[Tensor], parameters: list[Tensor], network: str, timesteps: int, record: list[str], training: bool
) -> list[Tensor]:
    with torch.autocast("cpu", enabled=False):  # the op's dtype is that of its arguments
        operands = _operands(inputs, parameters, network, timesteps, record)
        if not training:
            return forward_inference(operands)
        outputs, saved = forward_training(operands)
        return [*outputs, *saved]


def _forward_fake(
    inputs: list[Tensor], parameters: list[Tensor], network: str, timesteps: int, record: list[str], training: bool
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
            outputs.append(inputs[0].new_empty((b.slots, samples, *b.shape), dtype=torch.uint8 if b.byte else inputs[0].dtype))
    return outputs


def _backward_cpu(
    grads: list[Tensor],
    saved: list[Tensor],
    inputs: list[Tensor],
    parameters: list[Tensor],
    network: str,
    timesteps: int,
    record: list[str],
    needs: list[bool],
) -> list[Tensor]:
    with torch.autocast("cpu", enabled=False):
        operands = _operands(inputs, parameters, network, timesteps, record)
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
    key: tuple[str, int, list[str]],
    needs: Sequence[bool],
) -> list[Tensor | None]:
    network, timesteps, record = key
    spec = Network.from_json(network)
    num_inputs = len(spec.inputs)
    schedule = compile_schedule(spec, timesteps, tuple(record))
    full = []
    for name, grad in zip(record, grads, strict=True):
        if grad is None:
            samples = tensors[0].shape[1] if spec.inputs[0].frames else tensors[0].shape[0]
            grad = tensors[0].new_zeros((timesteps - schedule.first_step[name], samples, *spec.shapes[name]))
        full.append(grad)
    result = torch.ops.rnndyn.rollout_backward(
        full, list(saved), list(tensors[:num_inputs]), list(tensors[num_inputs:]), network, timesteps, record, list(needs)
    )
    return [None if grad.dim() == 1 and grad.shape[0] == 0 else grad for grad in result]


def _setup_registered(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, parameters, network, timesteps, record, _ = inputs
    ctx.key = (network, timesteps, list(record))
    ctx.num_outputs, ctx.num_inputs, ctx.num_parameters = len(record), len(tensors), len(parameters)
    ctx.save_for_backward(*tensors, *parameters, *output[len(record) :])


def _backward_registered(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    count = ctx.num_inputs + ctx.num_parameters
    tensors, saved = ctx.saved_tensors[:count], ctx.saved_tensors[count:]
    needs = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    result = _backward_from(grads[: ctx.num_outputs], tensors, saved, ctx.key, needs)
    return result[: ctx.num_inputs], result[ctx.num_inputs :], None, None, None, None


def _refuse_double_backward(*_: Any) -> None:
    raise RuntimeError(
        "the native rollout cannot be differentiated twice; build the network with backend=\"reference\" for second derivatives"
    )


class _Rollout(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(network: str, timesteps: int, record: tuple[str, ...], training: bool, *tensors: Tensor) -> tuple[Tensor, ...]:
        num_inputs = len(Network.from_json(network).inputs)
        return tuple(
            torch.ops.rnndyn.rollout(
                list(tensors[:num_inputs]), list(tensors[num_inputs:]), network, timesteps, list(record), training
            )
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        network, timesteps, record, _, *tensors = inputs
        ctx.key = (network, timesteps, list(record))
        ctx.num_tensors = len(tensors)
        ctx.mark_non_differentiable(*output[len(record) :])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *output[len(record) :])
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        tensors, saved = ctx.saved_tensors[: ctx.num_tensors], ctx.saved_tensors[ctx.num_tensors :]
        record = ctx.key[2]
        result = _backward_from(grads[: len(record)], tensors, saved, ctx.key, ctx.needs_input_grad[4:])
        return None, None, None, None, *result

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> tuple[Tensor | None, ...]:
        network, timesteps, record = ctx.key
        spec = Network.from_json(network)
        primals = ctx.saved_tensors[: ctx.num_tensors]

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            parameters = dict(zip(spec.parameter_shapes, tensors[len(spec.inputs) :], strict=True))
            return tuple(reference_rollout(spec, timesteps, tensors[: len(spec.inputs)], parameters, record))

        filled = tuple(torch.zeros_like(p) if v is None else v for p, v in zip(primals, tangents[4:], strict=True))
        _, result = torch.func.jvp(run, primals, filled)
        num_saved = len(saved_buffers(compile_schedule(spec, timesteps, tuple(record))))
        return (*result, *[None] * num_saved)


# ---------------------------------------------------------------- registration

_LIBRARY.impl("rollout", _forward_cpu, "CPU")
_LIBRARY.impl("rollout_backward", _backward_cpu, "CPU")
torch.library.register_fake("rnndyn::rollout", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnndyn::rollout_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::rollout", _backward_registered, setup_context=_setup_registered, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::rollout_backward", _refuse_double_backward, lib=_LIBRARY)


# ---------------------------------------------------------------- the public function


def can_run_native(
    network: Network, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor], *, raise_error: bool = False
) -> bool:
    """Whether the native engine can run a rollout on these tensors.

    Args:
        raise_error: raise ``ValueError`` with the reason instead of returning False.
    """
    reason = _launch.unavailable
    for name, tensor in (*zip((n.name for n in network.inputs), inputs, strict=True), *parameters.items()):
        if reason:
            break
        if tensor.device.type != "cpu":
            reason = f"{name} is on {tensor.device}; the native engine of this build runs on the CPU"
        elif tensor.dtype not in NATIVE_DTYPES:
            reason = f"{name} has dtype {tensor.dtype}; the native engine takes float32 and float64"
    if reason and raise_error:
        raise ValueError(f'backend="native": {reason}; use backend="reference"')
    return reason is None


def _check(network: Network, inputs: Sequence[Tensor], parameters: Mapping[str, Tensor]) -> None:
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
    for name, shape in network.parameter_shapes.items():
        if name not in parameters:
            raise ValueError(f"parameters: {name!r} {list(shape)} is missing")
        p = parameters[name]
        if tuple(p.shape) != shape:
            raise ValueError(f"{name}: expected {list(shape)}, got {list(p.shape)}")
        if p.dtype != example.dtype or p.device != example.device:
            raise TypeError(
                f"{network.inputs[0].name}: expected {p.dtype} on {p.device} like parameter {name!r}, got {example.dtype} on {example.device}"
            )


def rollout(
    network: Network,
    timesteps: int,
    inputs: Sequence[Tensor],  # [N, C, H, W], or [T, N, C, H, W] where the input has frames
    parameters: Mapping[str, Tensor],
    record: Sequence[str] | None = None,
    *,
    backend: str | None = None,
) -> list[Tensor]:
    """Run a network through time and return the states of some of its areas.

    Args:
        network: the spec; its docstring has the equations.
        timesteps: T >= 1.
        inputs: one tensor per input of the network, float32 or float64 (reference: any float dtype).
        parameters: by name, with the shapes of ``network.parameter_shapes``; others are ignored.
        record: areas to return; the readout's source area if None.
        backend: "native" (raises where :func:`can_run_native` says no), "reference", or None: native where it can run, else the
            reference with a warning that gives the reason.

    Returns: per recorded area its states [T', N, C, H, W] (any strides), T' counted from the first step at which it has a state.

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came.

    Differentiable: inputs and parameters. Forward-mode: yes, at the cost of the reference. Double backward: raises; use
    ``backend="reference"``. Deterministic: yes. Memory: training keeps what ``print(schedule)`` lists; otherwise two time steps.

    Source: Thorat, Doerig & Kietzmann, arXiv 2308.12435.

    >>> from rnndyn_fast.models import blt_net_64
    >>> net = blt_net_64(timesteps=3, widths=(2, 3, 4, 5, 6))
    >>> rollout(net.network, 3, [torch.zeros(1, 3, 64, 64)], dict(net.named_parameters()))[0].shape
    torch.Size([3, 1, 6, 1, 1])
    """
    if record is None:
        if network.readout is None:
            raise ValueError("record: the network has no readout, so name the areas to return")
        record = (network.readout.source,)
    if backend not in (None, "native", "reference"):
        raise ValueError(f'backend: expected "native", "reference" or None, got {backend!r}')
    names = tuple(record)
    compile_schedule(network, timesteps, names)  # raises for bad time steps and names
    _check(network, inputs, parameters)
    for node, x in zip(network.inputs, inputs, strict=True):
        if node.frames and x.shape[0] != timesteps:
            raise ValueError(f"{node.name}: expected [T, N, C, H, W] with T = {timesteps}, got {list(x.shape)}")
    used = {name: parameters[name] for name in network.parameter_shapes}
    if backend is None:
        try:
            can_run_native(network, inputs, used, raise_error=True)
        except ValueError as reason:
            warnings.warn(f'running the slow plain PyTorch rollout: {reason}', stacklevel=2)
            backend = "reference"
    elif backend == "native":
        can_run_native(network, inputs, used, raise_error=True)
    if backend == "reference":
        return reference_rollout(network, timesteps, inputs, used, names)
    tensors = [*inputs, *used.values()]
    training = torch.is_grad_enabled() and any(t.requires_grad for t in tensors)
    if torch.compiler.is_compiling():
        run: Callable[..., Any] = torch.ops.rnndyn.rollout
        result = run(list(inputs), list(used.values()), network.to_json(), timesteps, list(names), training)
    else:
        result = _Rollout.apply(network.to_json(), timesteps, names, training, *tensors)
    return list(result[: len(names)])
