"""The registered ops of a rollout, and its autograd nodes.

``torch.ops.rnndyn.rollout`` and ``torch.ops.rnndyn.rollout_backward`` are registered with ``torch.library`` (fake implementations
included), so that ``torch.compile`` sees one node whatever the network. Outside compilation and functional transforms an
``autograd.Function`` runs the same programs, and lets the backward pass overwrite what forward kept. Forward-mode derivatives come from the
reference; differentiating the backward pass raises.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rnndyn_fast.graph.rollout_dtype import on_its_device
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.program.ir import Value
from rnndyn_fast.program.passes import Forward, as_states, no_gradient, run_backward, run_forward
from rnndyn_fast.program.plan import Plan, Request, plan_of
from rnndyn_fast.reference.rollout import Statistics
from rnndyn_fast.torch_internals import constant_when_compiled, graph_is_kept, in_transform, is_watched

_LIBRARY = torch.library.Library("rnndyn", "FRAGMENT")
# Returns the recorded states, mean and unbiased variance of each batch norm (with batch_statistics), and where gradients are needed what
# forward keeps for backward.
_LIBRARY.define(
    "rollout(Tensor[] inputs, Tensor[] parameters, str network, int timesteps, str[] record, bool[] needs, bool batch_statistics, "
    "str engine) -> Tensor[]"
)
_LIBRARY.define(
    "rollout_backward(Tensor[] grads, bool[] given, Tensor[] states, Tensor[] kept, Tensor[] inputs, Tensor[] parameters, str network, "
    "int timesteps, str[] record, bool[] needs, bool batch_statistics, str engine) -> Tensor[]"
)


class Key(NamedTuple):
    """What a rollout depends on besides tensors. ``network``: in JSON; ``needs``: whether the gradient of each input and parameter is."""

    network: str
    timesteps: int
    record: tuple[str, ...]
    needs: tuple[bool, ...]
    batch_statistics: bool
    engine: str

    @staticmethod
    def of(options: Sequence[Any]) -> Key:
        """From the last arguments of an op."""
        network, timesteps, record, needs, batch_statistics, engine = options
        return Key(network, timesteps, tuple(record), tuple(needs), batch_statistics, engine)

    @property
    def options(self) -> tuple[Any, ...]:
        """The last arguments of an op."""
        return self.network, self.timesteps, list(self.record), list(self.needs), self.batch_statistics, self.engine


def _plan(tensors: Sequence[Tensor], key: Key) -> tuple[Plan, dict[str, Tensor]]:
    """The plan of a rollout, and what it is given by name. ``tensors``: inputs, then parameters."""
    network = Network.from_json(key.network)
    schedule = compile_schedule(network, key.timesteps, key.record)
    shapes = network.parameter_shapes if key.batch_statistics else {**network.parameter_shapes, **network.buffer_shapes}
    given = dict(zip((*(node.name for node in network.inputs), *shapes), tensors, strict=True))
    inputs = {node.name: given[node.name] for node in network.inputs}
    parameters = {name: given[name] for name in shapes}
    wanted = frozenset(name for name, need in zip(given, key.needs, strict=True) if need)
    return plan_of(Request(schedule, inputs, parameters, wanted, key.engine, training=key.batch_statistics)), given


def _statistics(plan: Plan) -> list[Value]:
    return [view.value for name in sorted(plan.statistics) for view in plan.statistics[name]]


def _forward(inputs: list[Tensor], parameters: list[Tensor], *options: Any) -> list[Tensor]:
    with on_its_device(inputs[0]):
        plan, given = _plan([*inputs, *parameters], Key.of(options))
        run = run_forward(plan.forward_alone(), given)
    return [*as_states(plan, run), *(run.results[v] for v in (*_statistics(plan), *plan.forward_alone().kept))]


def _forward_fake(inputs: list[Tensor], parameters: list[Tensor], *options: Any) -> list[Tensor]:
    plan, _ = _plan([*inputs, *parameters], Key.of(options))
    like = inputs[0]
    states = [like.new_empty(state.shape).permute(0, 1, 4, 2, 3) for state in plan.states]
    return [*states, *(like.new_empty(v.shape, dtype=v.dtype) for v in (*_statistics(plan), *plan.forward_alone().kept))]


@dataclass(frozen=True)
class _BackwardArguments:
    """Of the op of the backward pass, in its order. ``given``: whether the gradient of each recorded state is among ``grads``."""

    grads: list[Tensor]
    given: list[bool]
    states: list[Tensor]
    kept: list[Tensor]
    inputs: list[Tensor]
    parameters: list[Tensor]

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.inputs, *self.parameters]


def _backward(*args: Any) -> list[Tensor]:
    a, key = _BackwardArguments(*args[:6]), Key.of(args[6:])
    like = a.inputs[0]
    with on_its_device(like):
        plan, given = _plan(a.tensors, key)
        rest = iter(a.grads)
        full = [next(rest) if there else None for there in a.given]
        maps = [state.permute(0, 1, 3, 4, 2).contiguous() for state in a.states]
        results = dict(zip((view.value for view in plan.states), maps, strict=True))
        results.update(zip(plan.forward_alone().kept, (t.contiguous() for t in a.kept), strict=True))
        found = run_backward(plan, Forward(plan.forward_alone(), results, like), given, full, keep=True)
    return [found.get(name, no_gradient(like)) if need else no_gradient(like) for name, need in zip(given, key.needs, strict=True)]


def _backward_fake(*args: Any) -> list[Tensor]:
    a, key = _BackwardArguments(*args[:6]), Key.of(args[6:])
    plan, given = _plan(a.tensors, key)
    known = plan.versions[0].gradients
    return [
        tensor.new_empty(tensor.shape) if need and name in known else no_gradient(a.inputs[0])
        for (name, tensor), need in zip(given.items(), key.needs, strict=True)
    ]


# ---------------------------------------------------------------- autograd


def refuse_double_backward(*_: Any) -> None:
    """Raise, naming what can be differentiated twice."""
    raise RuntimeError(
        'the native rollout cannot be differentiated twice; build the network with backend="reference" for second derivatives'
    )


class Rollout(torch.autograd.Function):
    """A rollout outside compilation and transforms."""

    @staticmethod
    def forward(ctx: Any, plan: Plan, statistics: Statistics | None, names: tuple[str, ...], *tensors: Tensor) -> tuple[Tensor, ...]:
        with on_its_device(tensors[0]):
            run = run_forward(plan.versions[-1], dict(zip(names, tensors, strict=True)))
        _put(statistics, plan, run)
        ctx.plan, ctx.names = plan, names
        ctx.results = list(run.results)
        ctx.set_materialize_grads(False)
        # (So that a change in place between forward and backward raises, and a forward pass that is repeated gives its own memory.)
        ctx.save_for_backward(*tensors, *run.results.values(), run.arena)
        return tuple(as_states(plan, run))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        if torch.is_grad_enabled():
            refuse_double_backward()
        *held, arena = ctx.saved_tensors  # (once: under checkpointing they are there for one reading)
        tensors, results = held[: len(ctx.names)], held[len(ctx.names) :]
        given, keep = dict(zip(ctx.names, tensors, strict=True)), graph_is_kept()
        with on_its_device(tensors[0]):
            run = Forward(ctx.plan.version_of(arena), dict(zip(ctx.results, results, strict=True)), arena)
            found = run_backward(ctx.plan, run, given, grads, keep=keep)
        needed = zip(ctx.names, ctx.needs_input_grad[3:], strict=True)
        return None, None, None, *(found.get(name) if need else None for name, need in needed)


def _put(statistics: Statistics | None, plan: Plan, run: Forward) -> None:
    if statistics is not None:
        statistics.update({name: (run.of(mean), run.of(variance)) for name, (mean, variance) in plan.statistics.items()})


def _grads_of(
    grads: Sequence[Tensor | None],
    states: Sequence[Tensor],
    kept: Sequence[Tensor],
    tensors: Sequence[Tensor],
    num_inputs: int,
    key: Key,
) -> list[Tensor | None]:
    there, given = [g is not None for g in grads], [g for g in grads if g is not None]
    counts = (len(given), len(states), len(kept), num_inputs)
    if torch.compiler.is_compiling():
        split = list(tensors[:num_inputs]), list(tensors[num_inputs:])
        result = torch.ops.rnndyn.rollout_backward(given, there, list(states), list(kept), *split, *key.options)
    else:
        result = _RolloutOpBackward.apply(key, tuple(there), counts, *given, *states, *kept, *tensors)
    return [None if grad.dim() == 1 and grad.shape[0] == 0 else grad for grad in result]


def _setup_registered(ctx: Any, inputs: tuple[Any, ...], output: list[Tensor]) -> None:
    tensors, parameters, *options = inputs
    ctx.key = Key.of(options)
    ctx.num_inputs, ctx.num_tensors = len(tensors), len(tensors) + len(parameters)
    ctx.save_for_backward(*tensors, *parameters, *_states_and_kept(ctx.key, output))


@constant_when_compiled
def _num_moments(key: Key) -> int:
    return 2 * len(_batch_norms(key)) if key.batch_statistics else 0


def _states_and_kept(key: Key, output: Sequence[Tensor]) -> list[Tensor]:
    """What backward reads of what an op returned."""
    states = len(key.record)
    return [*output[:states], *output[states + _num_moments(key) :]]


def _backward_registered(ctx: Any, grads: list[Tensor | None]) -> tuple[Any, ...]:
    record, needs = ctx.key.record, ctx.key.needs
    asked = [*ctx.needs_input_grad[0], *ctx.needs_input_grad[1]]
    if any(a and not n for a, n in zip(asked, needs, strict=True)):
        raise RuntimeError("torch.ops.rnndyn.rollout: expected needs=True for every input and parameter whose gradient is wanted")
    held = ctx.saved_tensors
    tensors, rest = held[: ctx.num_tensors], held[ctx.num_tensors :]
    states, kept = rest[: len(record)], rest[len(record) :]
    found = _grads_of(grads[: len(record)], states, kept, tensors, ctx.num_inputs, ctx.key)
    return found[: ctx.num_inputs], found[ctx.num_inputs :], None, None, None, None, None, None


class _RolloutOpBackward(torch.autograd.Function):
    """The backward op as a node of its own, so that functional transforms see one, and a second derivative is refused."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key: Key, there: tuple[bool, ...], counts: tuple[int, int, int, int], *tensors: Tensor) -> tuple[Tensor, ...]:
        num_grads, num_states, num_kept, num_inputs = counts
        rest = iter(tensors)
        grads, states, kept, inputs = ([next(rest) for _ in range(n)] for n in (num_grads, num_states, num_kept, num_inputs))
        return tuple(torch.ops.rnndyn.rollout_backward(grads, list(there), states, kept, inputs, list(rest), *key.options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        refuse_double_backward()

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> None:
        refuse_double_backward()


class RolloutOp(torch.autograd.Function):
    """The op as a node that functional transforms can take apart."""

    generate_vmap_rule = True

    @staticmethod
    def forward(key: Key, num_inputs: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        split = list(tensors[:num_inputs]), list(tensors[num_inputs:])
        return tuple(torch.ops.rnndyn.rollout(*split, *key.options))

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
        ctx.key, ctx.num_inputs, *tensors = inputs
        ctx.num_tensors, states = len(tensors), len(ctx.key.record)
        ctx.mark_non_differentiable(*output[states:])
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors, *_states_and_kept(ctx.key, output))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Any, ...]:
        held, states = ctx.saved_tensors, len(ctx.key.record)
        tensors, found = held[: ctx.num_tensors], held[ctx.num_tensors :]
        return None, None, *_grads_of(grads[:states], found[:states], found[states:], tensors, ctx.num_inputs, ctx.key)


def run_rollout(
    network: Network,
    timesteps: int,
    inputs: Sequence[Tensor],
    parameters: Mapping[str, Tensor],
    record: tuple[str, ...],
    statistics: Statistics | None,
    engine: str,
) -> list[Tensor]:
    """Run a rollout on tensors that :func:`rnndyn_fast.program.rollout.can_run_native` takes. Returns its recorded states."""
    tensors = (*inputs, *parameters.values())
    needs = tuple(t.requires_grad for t in tensors) if torch.is_grad_enabled() else (False,) * len(tensors)
    key = Key(network.to_json(), timesteps, record, needs, statistics is not None, engine)
    if torch.compiler.is_compiling() or in_transform() or is_watched(tensors):
        if torch.compiler.is_compiling():
            found = torch.ops.rnndyn.rollout(list(inputs), list(parameters.values()), *key.options)
        else:
            found = RolloutOp.apply(key, len(inputs), *tensors)
        if statistics is not None:
            moments = iter(found[len(record) : len(record) + _num_moments(key)])
            statistics.update({name: (mean, variance) for name, mean, variance in zip(_batch_norms(key), moments, moments, strict=True)})
        return list(found[: len(record)])
    with on_its_device(inputs[0]):
        plan, given = _plan(tensors, key)
    if any(needs):
        return list(Rollout.apply(plan, statistics, tuple(given), *tensors))
    with torch.no_grad(), on_its_device(inputs[0]):
        run = run_forward(plan.versions[0], given)
    _put(statistics, plan, run)
    return as_states(plan, run)


@constant_when_compiled
def _batch_norms(key: Key) -> list[str]:
    """Names of the batch norms of a rollout, in the order of its results."""
    return compile_schedule(Network.from_json(key.network), key.timesteps, key.record).batch_norms()


# ---------------------------------------------------------------- registration

for _device in ("CPU", "CUDA"):
    _LIBRARY.impl("rollout", _forward, _device)
    _LIBRARY.impl("rollout_backward", _backward, _device)
torch.library.register_fake("rnndyn::rollout", _forward_fake, lib=_LIBRARY)
torch.library.register_fake("rnndyn::rollout_backward", _backward_fake, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::rollout", _backward_registered, setup_context=_setup_registered, lib=_LIBRARY)
torch.library.register_autograd("rnndyn::rollout_backward", refuse_double_backward, lib=_LIBRARY)


def _one_by_one(op: Callable[..., list[Tensor]]) -> Callable[..., tuple[list[Tensor], list[int]]]:
    """Batching rule of an op: one call per entry."""

    def rule(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[list[Tensor], list[int]]:
        def entry(arg: Any, dims: Any, i: int) -> Any:
            if isinstance(arg, Tensor):
                return arg if dims is None else arg.select(dims, i)
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
