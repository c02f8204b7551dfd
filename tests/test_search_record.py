"""What docs/search.md says of its search is what the record of the search says."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def record(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    import search_record

    return search_record


def test_page_says_what_the_record_says(record: Any) -> None:
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8").splitlines()
    for line in record.page_lines():
        assert line in page, line


def test_record_is_whole_and_small(record: Any) -> None:
    trials = record.read_record()
    for name in {trial["search"] for trial in trials}:
        numbers = [int(trial["trial"]) for trial in trials if trial["search"] == name]
        assert numbers == list(range(len(numbers)))
    # A trial that was lost with its worker is there once more: as many choices come twice as trials have failed.
    choices = [key for key in trials[0] if key not in ("trial", "state", "correct", "epochs", "curve", "parameters", "training_gmac")]
    failed = [trial for trial in trials if trial["state"] == "fail"]
    for lost in failed:
        assert sum(all(trial[key] == lost[key] for key in choices) for trial in trials) == 2
    assert sum(path.stat().st_size for path in record.FOLDER.iterdir()) <= 300_000


def test_power_law_is_continued(record: Any) -> None:
    import numpy as np

    curve = 0.8 - 0.5 * np.arange(1, 6.0) ** -0.5
    assert record.extrapolated(curve[:3], 5) == pytest.approx(curve[4], abs=1e-6)
