"""Training: configuration, loop, checkpoints, metrics."""

from rnndyn_fast.train.checkpoint import (
    FORMAT,
    load_checkpoint,
    load_weights,
    read_checkpoint,
    save_checkpoint,
    versions,
)
from rnndyn_fast.train.config import TrainConfig
from rnndyn_fast.train.loop import kept_name, train
from rnndyn_fast.train.metrics import EpochMetrics, read_metrics, write_metrics
from rnndyn_fast.train.objective import loss_over_time
from rnndyn_fast.train.phase_config import PhaseSweepConfig, PhaseTrainConfig
from rnndyn_fast.train.phase_results import NetworkResult, compare, load_networks, read_published, save_networks, summarise
from rnndyn_fast.train.phase_run import train_phase
from rnndyn_fast.train.progress import PlainReporter, QuietReporter, Reporter, RichReporter, choose_reporter
from rnndyn_fast.train.rates import learning_rate
from rnndyn_fast.train.setup import config_yaml, initialise, limited
from rnndyn_fast.train.signals import Stopped

__all__ = [
    "FORMAT",
    "EpochMetrics",
    "NetworkResult",
    "PhaseSweepConfig",
    "PhaseTrainConfig",
    "PlainReporter",
    "QuietReporter",
    "Reporter",
    "RichReporter",
    "Stopped",
    "TrainConfig",
    "choose_reporter",
    "compare",
    "config_yaml",
    "initialise",
    "kept_name",
    "learning_rate",
    "limited",
    "load_checkpoint",
    "load_networks",
    "load_weights",
    "loss_over_time",
    "read_checkpoint",
    "read_metrics",
    "read_published",
    "save_checkpoint",
    "save_networks",
    "summarise",
    "train",
    "train_phase",
    "versions",
    "write_metrics",
]
