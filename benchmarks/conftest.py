"""Puts machine, versions, commit and command into pytest-benchmark's JSON; benchmarks import from their own folder."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parent))

from measure import machine


def pytest_benchmark_update_machine_info(config: pytest.Config, machine_info: dict[str, Any]) -> None:
    """The same record in pytest-benchmark's own JSON, which is published: without the machine's name."""
    machine_info["node"] = ""
    machine_info["rnndyn"] = machine()
