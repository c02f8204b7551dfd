"""Extraction: images through a network, its trajectories into streaming reducers and files."""

from rnndyn_fast.extract.engine import Activations, stream, trajectories_path
from rnndyn_fast.extract.record import record
from rnndyn_fast.extract.results import load_results, save_results
from rnndyn_fast.extract.run import REDUCERS, extract, network_forward, sha256
from rnndyn_fast.extract.sources import DatasetSource, FolderSource, Hdf5Source, Source

__all__ = [
    "REDUCERS",
    "Activations",
    "DatasetSource",
    "FolderSource",
    "Hdf5Source",
    "Source",
    "extract",
    "load_results",
    "network_forward",
    "record",
    "save_results",
    "sha256",
    "stream",
    "trajectories_path",
]
