"""The published classes as transcribed for the benchmarks: the same instances serve the tests."""

from __future__ import annotations

import importlib.util
from pathlib import Path

_PATH = Path(__file__).resolve().parents[1] / "benchmarks" / "published_blt_net.py"
_spec = importlib.util.spec_from_file_location("published_blt_net", _PATH)
assert _spec is not None
assert _spec.loader is not None
_module = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(_module)
PublishedConv, PublishedNet = _module.PublishedConv, _module.PublishedNet
