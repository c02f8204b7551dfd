"""Text files that are there whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path

from rnndyn_fast.analysis.files import replaced_atomically


def write_text(path: str | os.PathLike[str], text: str) -> Path:
    """Write `text` (UTF-8) to `path` whole or not at all; returns the path."""
    with replaced_atomically(path) as unfinished:
        unfinished.write_text(text, encoding="utf-8")
    return Path(path)
