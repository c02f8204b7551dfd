"""The forward and the backward pass of a planned rollout on tensors."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnndyn_fast.ops.buffers import arena, empty
from rnndyn_fast.ops.kept_packs import kept_pack
from rnndyn_fast.program.bind import Executable, Memory, in_arena
from rnndyn_fast.program.ir import Role, Value, View
from rnndyn_fast.program.plan import GradLayouts, Layout, Passes, Plan, layout

_SMALL_COPIES = 1 / 8  # of the arena, up to which gradients are copied into the expected layout rather than an arena taken for another one
Given = Mapping[str, Tensor]  # inputs, parameters and buffers by name


def _tensors(executable: Executable, given: Given, known: Mapping[Value, Tensor], *, backward: bool) -> dict[Value, Tensor]:
    """The tensors that a pass reads and writes: the caller's, results that are known, and new ones."""
    found: dict[Value, Tensor] = {}
    for value in executable.needs[backward]:
        if value in known:
            found[value] = known[value]
        elif value.role in (Role.RESULT, Role.ARENA):
            found[value] = empty(value.shape, value.dtype)
        elif value.role is Role.PACKED:
            name, m, k = value.source
            found[value] = kept_pack(m, given[name]).data[k]
        else:
            found[value] = given[value.source]
    return found


@dataclass(frozen=True)
class Forward:
    """What a forward pass left: its results and what else it left as tensors, and its arena."""

    passes: Passes
    results: dict[Value, Tensor]
    arena: Tensor

    def of(self, view: View) -> Tensor:
        """A result: a recorded state [T', N, H, W, C], a mean or a variance."""
        return self.results[view.value]

    def kept(self, value: Value) -> Tensor | None:
        """What backward reads; None: it was not kept, as no gradient was expected that needs it."""
        executable = self.passes.executable
        if value in self.results:
            return self.results[value]
        if executable.lives[value][1] < executable.program.split:
            return None
        return in_arena(executable.program, value, self.arena)


def run_forward(passes: Passes, given: Given) -> Forward:
    """Run the forward pass of a program."""
    executable = passes.executable
    tensors = _tensors(executable, given, {}, backward=False)
    memory = arena(executable.program.nbytes, next(iter(given.values())).device)
    executable.run(Memory(memory, tensors))
    return Forward(passes, {v: t for v, t in tensors.items() if v.role in (Role.RESULT, Role.ARENA)}, memory)


def run_backward(plan: Plan, forward: Forward, given: Given, grads: Sequence[Tensor | None], *, keep: bool) -> dict[str, Tensor]:
    """Run the backward pass: the gradients that are wanted, by name.

    Args:
        grads: of the recorded states, [T', N, C, H, W] each.
        keep: there may be a further one, so nothing that forward kept is overwritten.
    """
    layouts: GradLayouts = tuple(None if g is None else layout(g) for g in grads)
    passes, memory, known = forward.passes, forward.arena, dict(forward.results)
    if not keep and layouts != passes.layouts:
        plan.expect(layouts)
        copies = sum(math.prod(g.shape) * g.element_size() for g in grads if g is not None)
        small = copies <= _SMALL_COPIES * forward.arena.numel()
        if small and passes.layouts and None not in layouts and all(_has_every_element(one) for one in passes.layouts):
            grads, layouts = [_in_layout(g, one) for g, one in zip(grads, passes.layouts, strict=True)], passes.layouts
    if keep or layouts != passes.layouts:
        passes = plan.backward_apart(layouts)
        memory = arena(passes.executable.program.nbytes, memory.device)
        kept = [forward.kept(value) for value in passes.kept]
        if any(t is None for t in kept):  # (the last gradients were of fewer states)
            kept = [again.kept(value) for again in [run_forward(plan.forward_alone(), given)] for value in passes.kept]
        known.update({value: t for value, t in zip(passes.kept, kept, strict=True) if t is not None})
    by_name = dict(zip(plan.lowering.schedule.record, grads, strict=True))
    for value in passes.executable.needs[True]:
        if value.role is Role.GRADIENT:
            grad = by_name[value.source]
            assert grad is not None
            known[value] = grad
    tensors = _tensors(passes.executable, given, known, backward=True)
    passes.executable.run(Memory(memory, tensors), backward=True)
    return {name: tensors[view.value] for name, view in passes.gradients.items()}


def _has_every_element(one: Layout | None) -> bool:
    """Whether a tensor of this layout has memory of its own for each element (one that is expanded has not)."""
    return one is not None and all(n == 1 or s > 0 for n, s in zip(one[0], one[1], strict=True))


def _in_layout(grad: Tensor | None, wanted: Layout | None) -> Tensor | None:
    """A gradient in the layout that a program takes."""
    if grad is None or wanted is None or layout(grad) == wanted:
        return grad
    shape, strides, dtype = wanted
    return torch.empty_strided(shape, strides, dtype=dtype, device=grad.device).copy_(grad)


def as_states(plan: Plan, forward: Forward) -> list[Tensor]:
    """The recorded states, [T', N, C, H, W] each."""
    return [forward.of(state).permute(0, 1, 4, 2, 3) for state in plan.states]


def no_gradient(like: Tensor) -> Tensor:
    """Stands for "no gradient" where an op must return a tensor: no parameter or input has this shape."""
    return like.new_empty(0, dtype=torch.uint8)
