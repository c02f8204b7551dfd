"""What to say of a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


def nearest(name: object, known: Iterable[str]) -> str:
    """The nearest of the known names as the question ", did you mean ...?"; nothing where none is near.

    >>> nearest("lateral", ["laterals", "top_down"])
    ", did you mean 'laterals'?"
    """
    near = difflib.get_close_matches(str(name), list(known), n=3, cutoff=0.5)
    return f", did you mean {' or '.join(map(repr, near))}?" if near else ""


def others(name: object, known: Iterable[str]) -> str:
    """The end of a message about an unknown name: which one may be meant, and what there is."""
    there = list(known)
    return f"{nearest(name, there)}; there are {there}"


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises ValueError, with the nearest of the choices, unless `value` is one of them."""
    if value not in choices:
        raise ValueError(f"{name}: expected one of {list(choices)}, got {value!r}{nearest(value, choices)}")


def flag(name: str) -> str:
    """An option as it is typed.

    >>> flag("LT_interaction")
    '--lt-interaction'
    """
    return "--" + name.lower().replace("_", "-")
