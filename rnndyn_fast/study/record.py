"""What a study has of its networks; the report is made of it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from rnndyn_fast.analysis import ReadoutZoneResult
from rnndyn_fast.analysis.bootstrap import Bootstrap, pool
from rnndyn_fast.study.config import TITLES, StudyConfig
from rnndyn_fast.train import EpochMetrics, TrainConfig

REPORT = "report.html"


@dataclass
class NetworkRun:
    """What a study has of one network."""

    name: str  # one of NETWORKS
    seed: int  # of its weights
    checkpoint: Path
    config: TrainConfig
    metrics: list[EpochMetrics]
    parameters: int
    trained: ReadoutZoneResult
    untrained: ReadoutZoneResult | None
    along: dict[int, ReadoutZoneResult]  # by epoch
    boot: Bootstrap

    @property
    def title(self) -> str:
        """Its kind in words."""
        return TITLES[self.name]


@dataclass
class StudyRecord:
    """What the report is about."""

    config: StudyConfig
    data_path: Path
    commands: list[str] = field(default_factory=list)
    runs: list[NetworkRun] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    @property
    def kinds(self) -> dict[str, list[NetworkRun]]:
        """Kind in words -> its networks."""
        out: dict[str, list[NetworkRun]] = {}
        for run in self.runs:
            out.setdefault(run.title, []).append(run)
        return out

    def pooled(self) -> dict[str, Bootstrap]:
        """Kind in words -> estimates over its networks."""
        return {title: pool([run.boot for run in runs]) for title, runs in self.kinds.items()}
