"""A full disk, on a small one mounted for it: every command that writes says so in one line, and what was complete stays."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from rnndyn_fast.cli import main
from rnndyn_fast.data import ImageFile, make_dataset
from rnndyn_fast.train import read_checkpoint

SIZE = 24 << 20  # of the disk
# Commands that take long to do all they do, with bytes that they surely write.
SLOW = {"analyse": 300_000, "phase analyse": 100_000, "study": 400_000, "search": 100_000, "compare": 60_000, "predict": 60_000}
NET = ["--widths", "2,4,8,16,32", "--timesteps", "3", "--threads", "1", "--backend", "reference"]


@pytest.fixture(scope="module")
def disk(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A disk of 24 MiB. Without the right to mount one: a skip."""
    folder = tmp_path_factory.mktemp("disk")
    command = ["mount", "-t", "tmpfs", "-o", f"size={SIZE}", "tmpfs", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("mounting a small disk is refused here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the commands read, made where there is room."""
    folder = tmp_path_factory.mktemp("made")
    make_dataset(folder / "i.h5", source="digits", size=16, num_train=40, num_val=20, num_test=20, num_testplus=40)
    run = ["train", "--data", str(folder / "i.h5"), "--out", str(folder / "run"), "--epochs", "1", "--batch-size", "20", *NET]
    assert main(run) == 0
    words = ["extract", str(folder / "run" / "last.pt"), str(folder / "i.h5"), "--out", str(folder / "r.h5"), "--save", "gap"]
    assert main([*words, "--backend", "reference"]) == 0
    torch.save(read_checkpoint(folder / "run" / "last.pt")["state_dict"], folder / "w.pt")
    rng = np.random.default_rng(0)
    np.savez(folder / "recordings.npz", responses=rng.random((3, 40, 2, 3)))  # [time, stimulus, repeat, neuron]
    for label in ("a", "b"):
        (folder / "own" / label).mkdir(parents=True)
        for k in range(12):
            pixels = rng.integers(0, 256, (40, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / "own" / label / f"{k}.png")
    phase = ["--epochs", "1", "--hidden", "8", "--train-trials", "64"]
    assert main(["phase", "train", "--out", str(folder / "phase"), *phase]) == 0
    return folder


def commands(made: Path, out: Path) -> dict[str, list[str]]:
    """Each command that writes, into `out`."""
    data, checkpoint = str(made / "i.h5"), str(made / "run" / "last.pt")
    return {
        "data make": ["data", "make", "--source", "digits", "--size", "64", "--num-train", "300", "--num-val", "20", "--num-test", "20",
                      "--num-testplus", "20", "--out", str(out)],
        "data make own": ["data", "make", "--source", str(made / "own"), "--size", "32", "--out", str(out)],
        "data shards": ["data", "shards", data, "--out", str(out)],
        "train": ["train", "--data", data, "--out", str(out), "--epochs", "2", "--batch-size", "20", *NET],
        "import": ["import", str(made / "w.pt"), "--model", "blt_net_64", "--data", data, "--out", str(out)],
        "extract": ["extract", checkpoint, data, "--out", str(out), "--save", "gap,it", "--backend", "reference"],
        "analyse": ["analyse", str(made / "r.h5"), "--out", str(out)],
        "react": ["react", checkpoint, data, "--out", str(out), "--backend", "reference"],
        "predict": ["predict", str(made / "r_trajectories.h5"), str(made / "recordings.npz"), "--num-splits", "5", "--out", str(out)],
        "phase train": ["phase", "train", "--out", str(out), "--epochs", "1", "--hidden", "8", "--train-trials", "64"],
        "phase analyse": ["phase", "analyse", str(made / "phase"), "--out", str(out), "--handcrafted", "false"],
        "study": ["study", "--quick", "--out", str(out), "--networks", "lateral_additive", "--epochs", "1", "--keep", "1"],
        "search": ["search", "--data", data, "--out", str(out), "--trials", "1", "--epochs", "1", "--timesteps", "2"],
        "compare": ["compare", "--data", data, "--out", str(out), "--epochs", "1", "--timesteps", "2"],
    }  # fmt: skip


def used(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def fill(disk: Path, room: int) -> None:
    """Leave that many bytes of room."""
    for path in disk.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    stat = os.statvfs(disk)
    with (disk / "filler").open("wb") as file:
        file.truncate(0)
        os.posix_fallocate(file.fileno(), 0, max(1, stat.f_bavail * stat.f_frsize - room))


def check(told: str, room: int) -> None:
    errors = [line for line in told.splitlines() if line.startswith("rnndyn: error")]
    assert len(errors) == 1, (room, told)
    assert re.search("no space left on the disk", errors[0]), (room, told)
    assert "Traceback" not in told, (room, told)
    assert "Exception ignored" not in told, (room, told)


@pytest.mark.parametrize("name", list(commands(Path(), Path())))
def test_every_command_that_writes(name: str, disk: Path, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    if name == "search":
        pytest.importorskip("optuna")
    out = disk / "out"
    words = commands(made, out)[name]
    needs, shares = SLOW.get(name, 0), (0.0, 0.35, 0.8) if name not in SLOW else (0.5,)
    if not needs:
        fill(disk, SIZE)
        assert main(words) == 0, capfd.readouterr().err
        needs = used(out)
    for share in shares:
        fill(disk, int(share * needs) // 4096 * 4096)
        capfd.readouterr()
        assert main(words) == 2, (share, capfd.readouterr())
        check(capfd.readouterr().err, int(share * needs))


def process(*words: str) -> subprocess.CompletedProcess[str]:
    code = "import sys; from rnndyn_fast.cli import main; sys.exit(main())"
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=120, env=env)


def test_a_process_ends_with_exit_code_2_and_what_was_there_stays(disk: Path, made: Path) -> None:
    """HDF5 and torch write again when a process ends: it must not crash then."""
    fill(disk, SIZE)
    shutil.copy(made / "i.h5", disk / "i.h5")
    before = (disk / "i.h5").read_bytes()
    stat = os.statvfs(disk)
    with (disk / "filler").open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, stat.f_bavail * stat.f_frsize - 60_000)
    done = process(*commands(made, disk / "i.h5")["data make"], "--overwrite")
    assert done.returncode == 2
    check(done.stderr, 0)
    assert (disk / "i.h5").read_bytes() == before
    assert sorted(path.name for path in disk.iterdir()) == ["filler", "i.h5"]
    with ImageFile(disk / "i.h5") as file:
        assert len(file.split("train")) == 40


def test_training_keeps_its_last_checkpoint(disk: Path, made: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = commands(made, disk / "out")["train"]
    fill(disk, SIZE)
    assert main(words) == 0
    before = (disk / "out" / "last.pt").read_bytes()
    with (disk / "filler").open("r+b") as file:
        stat = os.statvfs(disk)
        os.posix_fallocate(file.fileno(), 0, (disk / "filler").stat().st_size + stat.f_bavail * stat.f_frsize)
    capfd.readouterr()
    resumed = [*words, "--resume", "--epochs", "4"]
    assert main(resumed) == 2
    check(capfd.readouterr().err, 0)
    assert (disk / "out" / "last.pt").read_bytes() == before
    (disk / "filler").unlink()
    assert main(resumed) == 0
    assert read_checkpoint(disk / "out" / "last.pt")["epoch"] == 4


def test_room_for_a_name(tmp_path: Path) -> None:
    from rnndyn_fast.file_io import replaced_atomically, space_error

    def fails(error: BaseException) -> Callable[[], None]:
        def work() -> None:
            with replaced_atomically(tmp_path / "a.txt"):
                raise error

        return work

    wrapped = RuntimeError("[enforce fail at inline_container.cc:603] . unexpected pos 0 vs 1")
    wrapped.__context__ = OSError(28, "No space left on device")
    for error in (OSError(28, "No space left on device"), wrapped, OSError("write failed: errno = 28, No space left on device")):
        with pytest.raises(OSError, match=r"no space left on the disk: cannot write .*a\.txt; what was complete before is kept"):
            fails(error)()
    assert space_error(ValueError("x")) is None
    assert list(tmp_path.iterdir()) == []
