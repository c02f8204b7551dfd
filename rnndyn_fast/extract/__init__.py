"""Extraction: images through a trained network into the streaming analysis."""

from rnndyn_fast.extract.reactions import react
from rnndyn_fast.extract.run import extract, sha256, trajectories_path
from rnndyn_fast.extract.trajectories import TrajectoryWriter

__all__ = ["TrajectoryWriter", "extract", "react", "sha256", "trajectories_path"]
