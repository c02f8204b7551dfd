"""Where the values of a program lie in its arena, and the proof that no live value is overwritten.

A value lives from the first instruction that touches it to the last one. Values whose lives do not overlap may share bytes; each is placed
in the smallest gap between those that are alive with it (:mod:`rnndyn_fast.program.placement`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rnndyn_fast.program.ir import Instr, Program, Role, Value, instr_lives
from rnndyn_fast.program.placement import Life, placed

ALIGNMENT = 64  # bytes: a cache line, and what matrix units ask for


def place(instrs: Sequence[Instr], fixed: frozenset[Value] = frozenset()) -> tuple[dict[int, int], int]:
    """The byte at which each value begins, by its number, and the bytes of the arena.

    ``fixed``: values that lie elsewhere.
    """
    lives = {value: life for value, life in instr_lives(instrs).items() if value not in fixed}
    buffers = [Life(-(-value.nbytes // ALIGNMENT) * ALIGNMENT, first, last) for value, (first, last) in lives.items()]
    offsets, end = placed(buffers)
    return {value.number: offset for value, offset in zip(lives, offsets, strict=True)}, end


# The sums that kernels write, and the operands that they are of (lists of both: one for each port).
SUMS = {"norm_step": {"drive_sum": "drives", "modulator_sum": "modulators"}, "gate_step": {"sums": "ports"}}


def _check_sum(total: Any, terms: Any, instr: Instr) -> None:
    if isinstance(total, list):
        for one, own in zip(total, terms, strict=True):
            _check_sum(one, own, instr)
    elif total is not None and any(term.same_place(total) for term in terms[1:]):
        raise AssertionError(f"a sum is written over a term that is read after it: {instr}")


def validate(program: Program) -> None:
    """Raise ``AssertionError`` unless every value that is read was written, no two that are alive together share a byte, and no kernel
    writes a sum over one of its terms but the first."""
    written: set[Value] = set()
    for k, instr in enumerate(program.instrs):
        for view in instr.reads:
            if view.value.role is Role.ARENA and view.value not in written and not any(view.value is w.value for w in instr.writes):
                raise AssertionError(f"instruction {k} reads {view.value} {view.value.name!r}, which nothing has written: {instr}")
        written.update(view.value for view in instr.writes)
        for total, terms in SUMS.get(instr.kind, {}).items():
            _check_sum(instr.operands.get(total), instr.operands.get(terms), instr)
    lives = instr_lives(program.instrs)
    spans = sorted((program.offsets[v.number], program.offsets[v.number] + v.nbytes, *life, v) for v, life in lives.items() if v.nbytes)
    for i, (first, end, born, dies, value) in enumerate(spans):
        if end > program.nbytes:
            raise AssertionError(f"{value} {value.name!r} ends at byte {end} of an arena of {program.nbytes}")
        for other_first, _, other_born, other_dies, other in spans[i + 1 :]:
            if other_first >= end:
                break
            if other_born <= dies and born <= other_dies:
                raise AssertionError(f"{value} {value.name!r} and {other} {other.name!r} are alive together and share bytes")
        del first
