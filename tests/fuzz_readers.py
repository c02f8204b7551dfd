"""One reader per kind of file, by name, for tests/test_fuzz.py; run as a script in a process of its own, whose crash the test sees."""

from __future__ import annotations

import json
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from fuzzing import survive

from rnndyn_fast.analysis import load_reaction_times, load_result
from rnndyn_fast.data import ImageFile, list_table, read_image
from rnndyn_fast.extract import load_results
from rnndyn_fast.graph.spec.yaml_files import read_network
from rnndyn_fast.models.foreign import find_state_dict, load_tensors
from rnndyn_fast.phase.analysis import PhaseAnalysis
from rnndyn_fast.predictivity import load_features, load_recordings
from rnndyn_fast.search.space import load_space
from rnndyn_fast.train import load_checkpoint, load_networks

Reader = Callable[[Path], object]


def read_all(path: Path) -> object:
    with ImageFile(path, required_splits=("train", "val")) as file:
        return [file.split(name).read(slice(None)) for name in ("train", "val")]


READERS: dict[str, Reader] = {
    "images.h5": read_all,
    "results.h5": load_results,
    "zones.h5": load_result,
    "trajectories.npz": load_result,
    "trajectories.h5": load_result,
    "net.pt": load_checkpoint,
    "weights.pth": lambda path: find_state_dict(load_tensors(path), path),
    "networks.npz": load_networks,
    "phase.npz": PhaseAnalysis.load,
    "features.npz": load_features,
    "recordings.npz": load_recordings,
    "people.npz": lambda path: load_reaction_times(path, 6),
    "people.csv": lambda path: load_reaction_times(path, 6),
    "table.csv": list_table,
    "net.yaml": read_network,
    "net.json": read_network,
    "space.yaml": load_space,
    **{f"image.{suffix}": read_image for suffix in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm")},
    "grey.png": read_image,
    "float.tif": read_image,
}


if __name__ == "__main__":
    torch.set_num_threads(1)
    # A damaged header may ask for any amount of memory: refused by the system, it has to be told too.
    resource.setrlimit(resource.RLIMIT_AS, (6 << 30, 6 << 30))
    folder, count = Path(sys.argv[1]), int(sys.argv[2])
    names = sys.argv[3:] or list(READERS)
    print(json.dumps({name: survive(READERS[name], folder / name, count) for name in names}))
