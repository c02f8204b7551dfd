"""A small extraction that tests interrupt, damage and spread over processes."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import Dataset

from rnndyn_fast.analysis import DecodabilityReducer, MomentReducer, NormReducer, RdmReducer, ReadoutZoneReducer, Reducer
from rnndyn_fast.extract import Activations, DatasetSource, engine, plan, stream, trajectories_path
from rnndyn_fast.train import QuietReporter

QUIET = QuietReporter()
HERE = Path(__file__).resolve().parent
CLASSES = 5


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images that are a function of their number alone."""

    def __init__(self, count: int, nan_at: int | None = None, fail_at: int | None = None, slow: float = 0.0) -> None:
        self.count, self.nan_at, self.fail_at, self.slow = count, nan_at, fail_at, slow

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.fail_at:
            raise OSError("no such sector")
        time.sleep(self.slow)
        values = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(index))
        if index == self.nan_at:
            values[0, 0, 0] = float("nan")
        return values, index * 7 % CLASSES


WEIGHT = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(1))
MIXING = torch.randn(48, 6, generator=torch.Generator().manual_seed(2))


def forward(images: torch.Tensor) -> Activations:
    """A network of sorts: three steps of a map and of representations."""
    maps = torch.stack([(images - 0.4 * t).relu() for t in range(3)])
    gap = torch.stack([torch.tanh(images.flatten(1) @ MIXING * (t + 1)) for t in range(3)])
    return Activations({"map": maps, "gap": gap}, torch.log_softmax(gap @ WEIGHT.T, 2))


def reducers() -> list[Reducer]:
    both = ("map", "gap")
    return [
        ReadoutZoneReducer(WEIGHT, timesteps=3, keep_samples=True),
        NormReducer(both),
        MomentReducer(both, units=8, exact=10),
        RdmReducer(both, classes=range(CLASSES)),
        DecodabilityReducer(both, num_classes=CLASSES, held_out=20),
    ]


def run(out: Path, images: Dataset[Any] | None = None, **options: Any) -> Path:
    source = DatasetSource(Images(110) if images is None else images)
    given = {"batch_size": 4, "save": ("map", "gap"), "shards": 4, "reporter": QUIET, **options}
    return stream(forward, source, reducers(), out=out, **given)


def contents(out: Path) -> dict[str, bytes]:
    assert not out.with_name(out.name + ".partial").exists()
    return {path.name[len(out.stem) :]: path.read_bytes() for path in (out, trajectories_path(out))}


def set_small_blocks(patch: pytest.MonkeyPatch) -> None:
    """Blocks of a few images, committed at once."""
    patch.setattr(plan, "BLOCK_IMAGES", 12)
    patch.setattr(engine, "COMMIT_SECONDS", 0.0)
    patch.setattr(engine, "COMMIT_SHARE", float("inf"))


def whole_run(folder: Path) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK_IMAGES", 12)
        return contents(run(folder / "r.h5"))


class Interrupting(QuietReporter):
    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, images: int, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


SCRIPT = """
    import sys
    sys.path.insert(0, {here!r})
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import test_extract_engine as t
    from rnndyn_fast.extract import engine, plan
    plan.BLOCK_IMAGES, engine.COMMIT_SECONDS, engine.COMMIT_SHARE = 12, 0.0, float("inf")
    {more}
    {end}
"""


def start(out: Path, slow: float = 0.0, more: str = "", launcher: tuple[str, ...] = (), end: str = "") -> subprocess.Popen[str]:
    path = out.with_suffix(".py")
    end = end or f"t.run(Path({str(out)!r}), t.Images(110, slow={slow}))"
    path.write_text(textwrap.dedent(SCRIPT).format(here=str(HERE), more=more, end=end))
    command, pipe = [sys.executable, *launcher, str(path)], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
