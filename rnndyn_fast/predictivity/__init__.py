"""How well model areas predict recorded neurons over time."""

from rnndyn_fast.predictivity.outputs import load_features, predict, write_results
from rnndyn_fast.predictivity.predictivity import predictivity, steps_of_bins
from rnndyn_fast.predictivity.recordings import Recordings, load_recordings
from rnndyn_fast.predictivity.reliability import split_half_reliability
from rnndyn_fast.predictivity.results import PredictivityResult

__all__ = [
    "PredictivityResult",
    "Recordings",
    "load_features",
    "load_recordings",
    "predict",
    "predictivity",
    "split_half_reliability",
    "steps_of_bins",
    "write_results",
]
