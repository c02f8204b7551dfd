"""The study: four kinds of networks, trained or given, compared over time from one command."""

from rnndyn_fast.study.config import NETWORKS, StudyConfig
from rnndyn_fast.study.record import NetworkRun, StudyRecord
from rnndyn_fast.study.run import run_study

__all__ = ["NETWORKS", "NetworkRun", "StudyConfig", "StudyRecord", "run_study"]
