"""Published training recipes as configuration files: ``rnndyn train --config NAME --data D --out O``.

What each file says beside its options: where they come from, and what of the publication it leaves out.
"""

from __future__ import annotations

from pathlib import Path

from rnndyn_fast.suggestions import nearest

RECIPES = {path.stem: path for path in sorted(Path(__file__).parent.glob("*.yaml"))}


def recipe(name: str) -> Path:
    """The file of a recipe. Raises ``ValueError`` for an unknown one, with the nearest names."""
    if name not in RECIPES:
        raise ValueError(f"config: there is no file or recipe {name!r}{nearest(name, RECIPES)}; recipes are {list(RECIPES)}")
    return RECIPES[name]
