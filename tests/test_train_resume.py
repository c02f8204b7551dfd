"""Training that is killed or stopped, and goes on: bit for bit the run that was never interrupted."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from rnndyn_fast.data import make_dataset
from rnndyn_fast.train import QuietReporter, Stopped, TrainConfig, read_checkpoint, read_metrics, train
from rnndyn_fast.train.signals import StopRequest

OPTIONS: dict[str, Any] = {
    "widths": (4, 6, 8, 10, 12), "timesteps": 3, "epochs": 3, "batch_size": 16, "val_batch_size": 20, "lr": 3e-3, "backend": "reference",
    "threads": 1, "checkpoint_every": 1, "optimizer": "adamw", "weight_decay": 1e-2, "ema": 0.9, "lr_schedule": "cosine",
    "lr_warmup_steps": 4, "mixup": 0.2, "cutmix": 1.0, "clip_norm": 1.0, "accumulate": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=90, num_val=40, num_test=20, num_testplus=20)


def run(images: Path, out: Path, **options: Any) -> Path:
    return train(TrainConfig(data=str(images), out=str(out), **{**OPTIONS, **options}), reporter=QuietReporter())


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("run") / "whole")


def forked(images: Path, out: Path, **given: Any) -> dict[str, Any]:
    words = [
        word
        for name, value in OPTIONS.items()
        for word in (f"--{name}", ",".join(map(str, value)) if isinstance(value, tuple) else str(value))
    ]
    given = {"data": str(images), "out": str(out), "options": words, **given}
    script = Path(__file__).with_name("forked_training.py")
    done = subprocess.run([sys.executable, str(script), json.dumps(given)], capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def same(one: Any, two: Any) -> bool:
    """Bit for bit."""
    if isinstance(one, torch.Tensor):
        return one.dtype == two.dtype and torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(same(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(same, one, two))
    return bool(one == two)


def check_equal_runs(whole: Path, other: Path) -> None:
    for name in ("last.pt", "best.pt"):
        one, two = (read_checkpoint(path.with_name(name)) for path in (whole, other))
        for entry in ("state_dict", "trained_state_dict", "ema", "optimizer", "schedule", "epoch"):
            assert same(one[entry], two[entry]), (name, entry)
    timed = ("seconds", "images_per_s")
    for rows in zip(read_metrics(whole.parent), read_metrics(other.parent), strict=True):
        one, two = ({k: v for k, v in row.to_dict().items() if k not in timed} for row in rows)
        assert one == two
    left = {path.name for path in other.parent.iterdir()} ^ {path.name for path in whole.parent.iterdir()}
    assert left == set()  # no half-written files


def test_killed_at_twenty_moments(images: Path, whole: Path, tmp_path: Path) -> None:
    """With SIGKILL; a quarter of the times in the middle of a checkpoint's writing."""
    out = tmp_path / "run"
    start = time.perf_counter()
    run(images, tmp_path / "timed")
    found = forked(images, out, task="kill", kills=20, seed=7, seconds=time.perf_counter() - start)
    log = Path(f"{out}.log").read_text()
    assert found["ends"][-1] == 0, log
    assert found["ends"].count(-signal.SIGKILL) >= 5, log  # (others were done before)
    assert set(found["ends"]) <= {0, -signal.SIGKILL}, log
    check_equal_runs(whole, out / "last.pt")


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_save_and_say_how_to_go_on(signum: int, code: int, images: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    found = forked(images, out, task="stop", signal=signum)
    assert found["stopped"] == code
    assert f"rnndyn train --config {out}/train.yaml --resume" in found["said"]
    assert "Traceback" not in found["said"]
    assert found["ends"] == [0]
    check_equal_runs(whole, out / "last.pt")


def test_a_stop_in_validation_does_not_train_again(images: Path, whole: Path, tmp_path: Path) -> None:
    class StopInValidation(QuietReporter):
        def start(self, text: str, total: int) -> None:
            if text.startswith("validation 2"):
                signal.raise_signal(signal.SIGTERM)

    out = tmp_path / "run"
    with pytest.raises(Stopped) as caught:
        train(TrainConfig(data=str(images), out=str(out), **OPTIONS), reporter=StopInValidation())
    assert caught.value.exit_code == 143
    assert read_checkpoint(out / "last.pt")["progress"]["step"] == 6
    assert read_checkpoint(out / "last.pt")["epoch"] == 1
    check_equal_runs(whole, run(images, out, resume=True))


def test_a_second_signal_ends_at_once_but_not_one_passed_on_by_a_launcher(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(time, "monotonic", lambda: now)
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as request:
        signal.raise_signal(signal.SIGINT)
        now += 1
        signal.raise_signal(signal.SIGTERM)  # the launcher's
        assert request.signum == signal.SIGINT
        now += 9
        with pytest.raises(Stopped) as caught:
            signal.raise_signal(signal.SIGTERM)
    assert caught.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is before


def test_folder_with_nothing_but_a_half_written_file_is_free(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / ".initial.abc123.pt").write_bytes(b"half")
    with pytest.raises(FileNotFoundError, match=r"resume: no last.pt or initial.pt in .*without resume the run begins"):
        run(images, out, resume=True)
    run(images, out, epochs=1)
    assert not list(out.glob(".*"))


def test_epochs_are_part_of_a_schedule_over_all_steps(images: Path, whole: Path) -> None:
    with pytest.raises(ValueError, match="epochs was 3, is 5"):
        run(images, whole.parent, resume=True, epochs=5)


def test_checkpoint_of_another_time_cannot_be_resumed_but_says_so(images: Path, tmp_path: Path) -> None:
    from rnndyn_fast.train import save_checkpoint

    last = run(images, tmp_path / "run", epochs=1)
    contents = read_checkpoint(last)
    del contents["progress"]
    save_checkpoint(last, {k: v for k, v in contents.items() if k not in ("format", "versions")})
    with pytest.raises(ValueError, match=r"resume: .*last.pt lacks \['progress'\]; it cannot be resumed"):
        run(images, last.parent, resume=True, epochs=1)
