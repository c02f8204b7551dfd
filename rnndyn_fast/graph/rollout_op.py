"""The registered ops of a native rollout, and its autograd node.

``torch.ops.rnndyn.rollout`` and ``torch.ops.rnndyn.rollout_backward`` are registered with ``torch.library`` (fake implementations
included), so that ``torch.compile`` sees one node. Outside compilation an ``autograd.Function`` calls the same two ops, because a
registered op alone returns zeros under forward-mode differentiation. Differentiating the backward pass raises.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rnndyn_fast.graph.backward import backward
from rnndyn_fast.graph.device import on_its_device
from rnndyn_fast.graph.forward import forward_inference, forward_training
from rnndyn_fast.graph.operands import Operands
from rnndyn_fast.graph.replay import Flight, flight_of, recording_of, run_inference
from rnndyn_fast.graph.saved import saved_buffers
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec import Network

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
    def operands() -> Operands:
        return _operands(inputs, parameters, network, timesteps, record, engine, keep=not training)

    with on_its_device(inputs[0]):
        recording, _ = recording_of((network, timesteps, tuple(record), engine, training), inputs, parameters)
        if not training:
            return run_inference(recording, inputs, parameters, lambda: forward_inference(operands()))
        flight = Flight.begin(recording, inputs, parameters)
        if flight is None:
            outputs, saved = forward_training(operands())
        else:
            outputs, saved = flight.forward(inputs, parameters, lambda: forward_training(operands()))
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
    def walk_back() -> list[Tensor | None]:
        operands = _operands(inputs, parameters, network, timesteps, record, engine)
        names = [*operands.inputs, *operands.parameters]
        found = backward(operands, saved, grads, dict(zip(names, needs, strict=True)))
        return [found.get(name) for name in names]

    with on_its_device(inputs[0]):
        flight = flight_of(saved)
        if flight is not None and flight.fits(grads, tuple(needs)):
            result = flight.backward(inputs, parameters, grads, tuple(needs), walk_back)
        else:
            result = walk_back()
    # An op returns tensors: an empty one of shape [0] stands for "no gradient" (no parameter or input has that shape).
    return [inputs[0].new_empty(0) if grad is None else grad for grad in result]


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
    held = ctx.saved_tensors  # (once: under checkpointing they are there for one reading)
    if len(held) == count:
        raise RuntimeError("torch.ops.rnndyn.rollout: expected training=True where a gradient is wanted, got training=False")
    tensors, saved = held[:count], held[count:]
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


class Rollout(torch.autograd.Function):
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
        held = ctx.saved_tensors  # (once: under checkpointing they are there for one reading)
        tensors, saved = held[: ctx.num_tensors], held[ctx.num_tensors :]
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
