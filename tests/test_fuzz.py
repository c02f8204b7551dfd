"""A thousand damaged files of all kinds that are read: each is read, or refused in one line that names it; nothing crashes."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
import yaml
from fuzz_readers import READERS
from fuzzing import mutated
from PIL import Image

from rnndyn_fast.analysis import ReadoutZoneReducer
from rnndyn_fast.analysis.results import ReadoutZoneResult
from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.extract import load_results
from rnndyn_fast.graph.spec.yaml_files import network_yaml
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.phase.analysis import FORMAT, FORMAT_VERSION
from rnndyn_fast.search.space import SPACES
from rnndyn_fast.train import save_checkpoint

HERE = Path(__file__).parent
EACH = 42  # damaged copies of each kind; with all kinds a thousand and more


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small sound file of every kind."""
    folder = tmp_path_factory.mktemp("files")
    make_dataset(folder / "images.h5", source="digits", size=8, num_train=20, num_val=10, num_test=10, num_testplus=20)
    net = blt_net_64(num_classes=10, image_size=8, widths=(1, 2, 4, 8, 16), timesteps=2)
    data = {"path": "", "image_size": 8, "categories": [f"c{k}" for k in range(10)], "mean": [127.5] * 3, "std": [60.0] * 3}
    save_checkpoint(folder / "net.pt", {"model": net.config, "state_dict": net.state_dict(), "epoch": 0, "data": data})
    torch.save(net.state_dict(), folder / "weights.pth")
    with h5py.File(folder / "images.h5", "r") as file:
        data["categories"] = [name.decode() for name in file["categories"][()]]
    save_checkpoint(folder / "own.pt", {"model": net.config, "state_dict": net.state_dict(), "epoch": 0, "data": data})
    words = ["extract", str(folder / "own.pt"), str(folder / "images.h5"), "--out", str(folder / "results.h5"), "--save", "gap"]
    assert main(words) == 0
    load_results(folder / "results.h5")
    rng = np.random.default_rng(0)
    trajectories, weight, labels = rng.random((3, 6, 4)), rng.random((2, 4)), rng.integers(0, 2, 6)
    reducer = ReadoutZoneReducer(torch.from_numpy(weight), timesteps=3)
    reducer.update(torch.from_numpy(trajectories), torch.from_numpy(labels))
    reducer.result().save(folder / "zones.h5")
    ReadoutZoneResult.load(folder / "zones.h5")
    arrays = {"trajectories": trajectories, "readout_weight": weight, "labels": labels}
    np.savez(folder / "trajectories.npz", **arrays)
    with h5py.File(folder / "trajectories.h5", "w") as file:
        for name, value in arrays.items():
            file[name] = value
    assert main(["phase", "train", "--out", str(folder / "phase"), "--epochs", "1", "--hidden", "4", "--train-trials", "64"]) == 0
    (folder / "phase" / "networks.npz").rename(folder / "networks.npz")
    header = {"format": FORMAT, "format_version": FORMAT_VERSION, "facts": {"name": "x"}}
    np.savez_compressed(folder / "phase.npz", header=np.asarray(json.dumps(header)), cycle=np.zeros((4, 4)))
    np.savez(folder / "features.npz", v4=rng.random((3, 6, 4)))
    np.savez(folder / "recordings.npz", responses=rng.random((3, 6, 2, 4)))
    people = rng.random((3, 6)) * 100 + 400
    np.savez(folder / "people.npz", reaction_times=people)
    rows = [f"s{j},{k},{people[j, k]:.1f}" for j in range(3) for k in range(6)]
    (folder / "people.csv").write_text("\n".join(["subject,image,reaction_time", *rows]) + "\n")
    for name in ("png", "jpg", "gif", "bmp", "webp", "tif", "ppm"):
        Image.fromarray(rng.integers(0, 256, (12, 12, 3), dtype=np.uint8)).save(folder / f"image.{name}")
    Image.fromarray(rng.integers(0, 65536, (12, 12), dtype=np.uint16)).save(folder / "grey.png")
    Image.fromarray(rng.random((12, 12), dtype=np.float32)).save(folder / "float.tif", tiffinfo={340: 0.0, 341: 1.0})
    (folder / "table.csv").write_text("path,label,split\nimage.png,a,train\nimage.jpg,b,test\n")
    (folder / "net.yaml").write_text(network_yaml(net.network))
    (folder / "net.json").write_text(json.dumps(yaml.safe_load((folder / "net.yaml").read_text())))
    (folder / "space.yaml").write_text(SPACES["cells"].read_text())
    return folder


def test_damaged_files_are_read_or_refused(files: Path) -> None:
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
    command = [sys.executable, "-X", "faulthandler", str(HERE / "fuzz_readers.py"), str(files), str(EACH)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found.keys() == READERS.keys()
    assert sum(sum(counts.values()) for counts in found.values()) >= 1000
    assert sum(counts["refused"] for counts in found.values()) >= 400


COMMANDS = {
    "images.h5": ["train --data F --out O --epochs 1", "extract own.pt F --out O", "react own.pt F --split test --out O",
                  "import weights.pth --model blt_net_64 --data F --out O", "study --quick --data F --out O", "compare --data F --out O",
                  "search --data F --out O"],
    "results.h5": ["analyse F --out O"],
    "trajectories.h5": ["analyse F --out O", "predict F recordings.npz --out O"],
    "net.pt": ["extract F images.h5 --out O", "react F images.h5 --out O", "plan F",
               "study --quick --checkpoints F --data images.h5 --out O"],
    "recordings.npz": ["predict features.npz F --out O"],
    "networks.npz": ["phase analyse F --out O"],
    "net.yaml": ["plan F"],
}  # fmt: skip


@pytest.mark.parametrize(("name", "words"), [(name, words) for name, list_ in COMMANDS.items() for words in list_])
def test_commands_refuse_damaged_files_in_one_line(
    name: str, words: str, files: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of which the first bytes, the middle, or the rest are gone."""
    monkeypatch.chdir(files)
    content = (files / name).read_bytes()
    damaged = tmp_path / ("damaged" + Path(name).suffix)
    half = len(content) // 2
    noise = next(mutated(content[200:], 1, seed=1))
    for data in (content[:half], bytes(min(512, half)) + content[min(512, half) :], b"", content[:100] + noise[: half // 2]):
        damaged.write_bytes(data)
        out = str(tmp_path / "out")
        assert main([{"F": str(damaged), "O": out}.get(word, word) for word in words.split()]) == 2, data[:20]
        told = capfd.readouterr().err.splitlines()
        assert len([line for line in told if line.startswith("rnndyn: ")]) == 1, told
        assert told[-1].startswith("rnndyn: error: "), told
        assert "damaged" in told[-1]
