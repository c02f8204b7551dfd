"""The table of kinds of instructions: for each the operands that it reads and writes, and the function that runs it on tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

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
