"""States, and large pooled forms of them, that the backward pass makes again from what it keeps anyway, rather than have them kept as
well."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from torch import Tensor

from rnndyn_fast.graph.tape import Key


@dataclass(frozen=True)
class Again:
    """A map that is not kept: its key."""

    key: Key


@dataclass
class StatesAgain:
    """How states are made again, in a given place or where they find one, and those that are, until the step back that made them has been
    taken. Forms are made for each reader."""

    makers: dict[Key, Callable[[Tensor | None], Tensor]] = field(default_factory=dict)
    made: dict[Key, Tensor] = field(default_factory=dict)
    forms: dict[Key, Callable[[], Tensor]] = field(default_factory=dict)

    def reading(self, key: Key, x: Tensor) -> Tensor | Again:
        """What is kept of a map that backward reads."""
        return Again(key) if key in self.makers or key in self.forms else x

    def read(self, reading: Tensor | Again) -> Tensor:
        """The map of a reading."""
        if isinstance(reading, Tensor):
            return reading
        if reading.key in self.forms:
            return self.forms[reading.key]()
        if reading.key not in self.made:
            self.made[reading.key] = self.makers[reading.key](None)
        return self.made[reading.key]

    def forget(self, keys: Iterable[Key]) -> None:
        """States that nothing reads for a while: they are made once more then."""
        for key in keys:
            self.made.pop(key, None)

    def leave(self, keys: Iterable[Key], keep: bool) -> None:
        """States and forms that nothing reads from here on; ``keep``: until the tape is walked again."""
        for key in keys:
            self.made.pop(key, None)
            if not keep:
                self.makers.pop(key, None)
                self.forms.pop(key, None)
