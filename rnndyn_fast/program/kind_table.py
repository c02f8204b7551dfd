"""The table of kinds of instructions: for each the operands that it reads and writes, and the function that runs it on tensors."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from rnndyn_fast.ops.launch import Op

Call = Callable[[], object]


@dataclass(frozen=True)
class Kind:
    """One row of the table. An operand that is both read and written is in both lists.

    ``function`` runs the instruction; of a kind that is ``prepared`` it returns the call that does, so that what does not change from
    call to call is worked out once.
    """

    function: Callable[..., Any]
    reads: frozenset[str]
    writes: frozenset[str]
    launch: bool
    prepared: bool

    def run(self, *args: Any, **operands: Any) -> None:
        """Run the instruction."""
        found = self.function(*args, **operands)
        if self.prepared:
            found()


KINDS: dict[str, Kind] = {}

F = TypeVar("F", bound=Callable[..., Any])


def launch_kind(
    name: str, op: Op, *, run: Callable[..., None] | None = None, renamed: Mapping[str, str] | None = None, **defaults: Any
) -> None:
    """Enter a launch: what it reads and writes is what the op's declaration says.

    Args:
        name: of the kind.
        op: its declaration.
        run: takes the operands in place of the op.
        renamed: operands that the kind has another name for.
        defaults: of numbers.
    """
    names = {key: (renamed or {}).get(key, key) for key in op.buffers}
    inner = run or op
    back = {own: key for key, own in names.items() if own != key}

    def function(**operands: Any) -> None:
        inner(**{**defaults, **{back.get(key, key): operand for key, operand in operands.items()}})

    reads = frozenset(names[key] for key, buffer in op.buffers.items() if buffer.may_be_read)
    writes = frozenset(names[key] for key, buffer in op.buffers.items() if buffer.may_be_written)
    KINDS[name] = Kind(function, reads, writes, launch=True, prepared=False)


def kind(reads: str, writes: str, *, launch: bool = False, prepared: bool = False) -> Callable[[F], F]:
    """Enter a function under its name; operands are its keyword arguments.

    Args:
        reads, writes: names of operands.
        launch: it calls the native core and nothing else.
        prepared: it returns a call, to be repeated for these tensors.
    """

    def enter(function: F) -> F:
        KINDS[function.__name__] = Kind(function, frozenset(reads.split()), frozenset(writes.split()), launch, prepared)
        return function

    return enter
