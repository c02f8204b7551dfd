"""The fenced blocks of a page, for the tests that run them."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

# What the first block of the README takes as given: an instance of the published class.
STAND_IN = "from rnndyn_fast.models import blt_net_64\nnet = blt_net_64(timesteps=2, widths=(2, 4, 8, 16, 32))"


def code_blocks(page: str, language: str) -> list[str]:
    """The fenced code blocks of a page in one language."""
    text = (ROOT / page).read_text(encoding="utf-8")
    return re.findall(rf"^```{language}\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
