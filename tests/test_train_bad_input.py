"""What goes wrong around a run: other versions, another run in the folder, a full disk, no network, signals at odd moments, odd options."""

from __future__ import annotations

import errno
import json
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.train import QuietReporter, Stopped, TrainConfig, read_checkpoint, read_metrics, train
from rnndyn_fast.train import loop as train_loop

TINY: dict[str, Any] = {
    "widths": (2, 4, 6, 8, 10), "timesteps": 2, "epochs": 2, "batch_size": 16, "val_batch_size": 20, "lr": 3e-3, "backend": "reference",
    "threads": 1, "augment": "none",
}  # fmt: skip
WORDS = ["--widths", "2,4,6,8,10", "--timesteps", "2", "--epochs", "1", "--batch-size", "16", "--threads", "1", "--backend", "reference"]


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=40, num_val=20, num_test=10, num_testplus=10)


@pytest.fixture(scope="module")
def whole(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("run") / "whole")


def run(images: Path, out: Path, reporter: Any = None, **options: Any) -> Path:
    return train(TrainConfig(data=str(images), out=str(out), **{**TINY, **options}), reporter=reporter or QuietReporter())


def check_same_weights(one: Path, two: Path) -> None:
    a, b = (read_checkpoint(path)["state_dict"] for path in (one, two))
    assert all(torch.equal(a[name], b[name]) for name in a)


def command(images: Path, out: Path, *more: str) -> int:
    return main(["train", "--data", str(images), "--out", str(out), *WORDS, *more])


def error_line(capfd: pytest.CaptureFixture[str]) -> str:
    """What a command says that ends with 2: one line."""
    said = [line for line in capfd.readouterr().err.strip().splitlines() if not line.endswith("the last one counts")]
    assert len(said) == 1, said
    assert said[0].startswith("rnndyn: error: ")
    return said[0].removeprefix("rnndyn: error: ")


# ---------------------------------------------------------------- who runs


def test_versions_differ_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnndyn_fast.processes import Processes

    group = Processes()
    monkeypatch.setattr(group, "all_of", lambda mine: [mine, {**mine, "rnndyn_fast": "9.9"}])
    with pytest.raises(
        ValueError, match=r"processes: expected the same versions in all; process 0 has rnndyn_fast .*, process 1 rnndyn_fast 9\.9"
    ):
        train_loop._check_same(TrainConfig(data="d", out="o"), group)


def test_two_runs_in_one_folder(images: Path, whole: Path, tmp_path: Path) -> None:
    """The second is refused, however it is started, and the first goes on; killed, a run keeps nobody out."""
    refused = []

    class Second(QuietReporter):
        def start(self, text: str, total: int) -> None:
            if text == "epoch 2/2":
                for how in ("resume", "overwrite"):
                    with pytest.raises(ValueError, match="out: another run is writing to"):
                        run(images, tmp_path / "run", **{how: True})
                    refused.append(how)

    (tmp_path / "run").mkdir()
    (tmp_path / "run" / train_loop.LOCK).touch()  # of a killed one
    check_same_weights(run(images, tmp_path / "run", Second()), whole)
    assert refused == ["resume", "overwrite"]
    assert {path.name for path in (tmp_path / "run").iterdir()} == {path.name for path in whole.parent.iterdir()}


def test_a_folder_of_other_files_is_left_alone(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    assert command(images, tmp_path) == 2
    assert "is not empty; use --resume to go on or --overwrite to replace the run" in error_line(capfd)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


# ---------------------------------------------------------------- where it writes


def test_a_full_disk_in_a_checkpoint_loses_nothing(
    images: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    out, write, writes = tmp_path / "run", Path.write_bytes, 0

    def full(path: Path, data: Any) -> int:
        nonlocal writes
        writes += path.suffix == ".pt"
        if writes == 4:  # (initial, best and last of epoch 1, best of epoch 2 or last)
            write(path, data[: len(data) // 2])
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(path, data)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert command(images, out, "--epochs", "2", "--augment", "none", "--lr", "3e-3", "--val-batch-size", "20") == 2
    told = error_line(capfd)
    assert "no space left on the disk: cannot write" in told
    assert "what was complete before is kept" in told
    assert read_checkpoint(out / "last.pt")["epoch"] == 1
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    check_same_weights(run(images, out, resume=True), whole)


@pytest.mark.parametrize("kind", ["UsageError", "CommError"])
def test_weights_and_biases_without_key_or_network(
    kind: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    wandb = pytest.importorskip("wandb")
    error = getattr(wandb.errors, kind)

    def init(**_: Any) -> Any:
        raise error("Run initialization has timed out\nafter 90.0 sec")

    with monkeypatch.context() as patch:
        patch.setattr(wandb, "init", init)
        assert command(images, tmp_path / "run", "--wandb", "p") == 2
    told = error_line(capfd)
    assert told == "--wandb: Run initialization has timed out after 90.0 sec (WANDB_MODE=offline writes files that wandb sync sends later)"
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert command(images, tmp_path / "run", "--wandb", "p", "--resume") == 0
    assert len(read_metrics(tmp_path / "run")) == 1


# ---------------------------------------------------------------- signals


def test_sigterm_in_the_first_batch_saves_it(images: Path, whole: Path, tmp_path: Path) -> None:
    class Stop(QuietReporter):
        def start(self, text: str, total: int) -> None:
            if text == "epoch 1/2":
                signal.raise_signal(signal.SIGTERM)

    with pytest.raises(Stopped):
        run(images, tmp_path / "run", Stop())
    kept = read_checkpoint(tmp_path / "run" / "last.pt")
    assert (kept["epoch"], kept["progress"]["step"]) == (0, 1)
    check_same_weights(run(images, tmp_path / "run", resume=True), whole)


def test_sigterm_while_images_are_prepared(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    """There is no run yet to go on with, and that is what is said; the same command then trains."""
    from PIL import Image

    from rnndyn_fast.data import own_images

    for k in range(24):
        path = tmp_path / "own" / "ab"[k % 2] / f"{k}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((16, 16, 3), (9 * k, 5 * k, k), np.uint8)).save(path)
    with monkeypatch.context() as patch:
        patch.setattr(own_images, "_read_blocks", lambda *_: signal.raise_signal(signal.SIGTERM))
        assert command(tmp_path / "own", tmp_path / "run", "--image-size", "16") == 143
    said = capfd.readouterr()
    assert "stopped; the same command begins again" in said.out
    assert "train.yaml" not in said.out
    assert not (tmp_path / "run").exists()
    assert command(tmp_path / "own", tmp_path / "run", "--image-size", "16") == 0


# ---------------------------------------------------------------- options and data


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--clip", "0"], "--clip: expected a positive finite number, got 0.0"),
        (["--lr-least", "0.01"], "--lr-least: expected less than lr, 0.001, got 0.01"),
        (["--lr-schedule", "cosine", "--lr-least", "0.001"], "--lr-least: expected less than lr, 0.001, got 0.001"),
        (["--lr-schedule", "cosine", "--lr-warmup-steps", "9"], "--lr-warmup-steps: expected fewer than the 3 training steps, got 9"),
        (
            ["--patience", "1", "--lr-patience", "1", "--lr-schedule", "cosine"],
            "--lr-schedule, --lr-patience: expected at most one of them",
        ),
        (["--weight-decay", "-1"], "--weight-decay: expected at least 0 and finite, got -1.0"),
        (["--mixup", "-1"], "--mixup: expected at least 0 and finite, got -1.0"),
        (["--profile", "-1"], "--profile: expected at least 0, got -1"),
        (["--optimizer", "sgd", "--momentum", "1"], "--momentum: expected at least 0 and below 1, got 1.0"),
    ],
)
def test_odd_options_are_told_in_one_line(
    words: list[str], told: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert command(images, tmp_path / "run", *words) == 2
    assert error_line(capfd) == told
    assert not (tmp_path / "run").exists()


def test_resume_with_other_options_or_images(images: Path, whole: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    import shutil

    shutil.copytree(whole.parent, tmp_path / "run")
    options = ["--augment", "none", "--lr", "3e-3", "--val-batch-size", "20", "--epochs", "3", "--resume"]
    before = (tmp_path / "run" / "last.pt").read_bytes()
    for more, told in (
        (["--optimizer", "lars"], "--optimizer was 'adam', is 'lars'"),
        (["--batch-size", "8"], "--batch-size was 16, is 8"),
        (["--ema", "0.9"], "--ema was nothing, is 0.9"),
        (["--accumulate", "3"], "--accumulate was 1, is 3"),
    ):
        assert command(images, tmp_path / "run", *options, *more) == 2
        assert told in error_line(capfd)
    import h5py

    other = tmp_path / "other.h5"
    shutil.copy(images, other)
    with h5py.File(other, "r+") as file:  # as many pixels of the same mean, but an image less
        for name in ("data", "labels"):
            rows = file[f"train/{name}"][:-1]
            del file[f"train/{name}"]
            file[f"train/{name}"] = rows
    assert command(other, tmp_path / "run", *options) == 2
    assert "images of" in (said := error_line(capfd))
    assert "differs from that of the data the run was started with" in said
    assert (tmp_path / "run" / "last.pt").read_bytes() == before


def test_one_class(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """Trains, mixed too; its loss of 0 is not that of answers that are sure and wrong."""
    import h5py

    path = tmp_path / "one.h5"
    rng = np.random.default_rng(0)
    with h5py.File(path, "w") as file:
        for split, count in (("train", 20), ("val", 10)):
            file[f"{split}/data"] = rng.integers(0, 256, (count, 16, 16, 3), dtype=np.uint8)
            file[f"{split}/labels"] = np.zeros(count, int)
        file["categories"] = np.array([b"a"])
        file["train_img_mean_channels"], file["train_img_std_channels"] = [100.0] * 3, [50.0] * 3
    for name, more in {"plain": (), "mixup": ("--mixup", "1"), "cutmix": ("--cutmix", "1", "--label-smoothing", "0.1")}.items():
        assert command(path, tmp_path / name, *more) == 0
        assert "diverged" not in capfd.readouterr().out


@pytest.mark.parametrize(("epochs", "profiled"), [(1, False), (2, True)])
def test_profile_of_one_step(epochs: int, profiled: bool, images: Path, tmp_path: Path) -> None:
    class Lines(QuietReporter):
        said: list[str] = []  # noqa: RUF012

        def line(self, text: str) -> None:
            self.said.append(text)

    Lines.said = []
    run(images, tmp_path / "run", Lines(), profile=1, epochs=epochs)
    trace = tmp_path / "run" / "trace.json"
    assert trace.exists() == profiled
    told = "profile: the first 3 training steps are not profiled, and 3 are left: no trace.json"
    assert (told in Lines.said) != profiled
    if profiled:
        steps = {event["name"] for event in json.loads(trace.read_text())["traceEvents"] if "ProfilerStep" in event.get("name", "")}
        assert len(steps) == 1


def test_lightning_with_accumulation_and_mixed_precision(tmp_path: Path) -> None:
    """As a plain loop does it; its checkpoint loads into a plain network."""
    lightning = pytest.importorskip("lightning")
    from rnndyn_fast.models import blt_net_64
    from rnndyn_fast.train import loss_over_time

    def made() -> Any:
        torch.manual_seed(1)
        return blt_net_64(timesteps=2, image_size=16, widths=(2, 2, 4, 4, 8), num_classes=5, topdown_connections=False)

    x, labels = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5
    plain = made()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1)
    for number, rows in enumerate(torch.arange(12).split(4)):
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_over_time(plain(x[rows]), labels[rows])
        (loss / 2).backward()
        if number != 0:  # after two batches, and after the last
            optimizer.step()
            optimizer.zero_grad()

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = made()

        def training_step(self, batch: Any, index: int) -> Any:
            return loss_over_time(self.net(batch[0]), batch[1])

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    module = Module()
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", devices=1, precision="bf16-mixed", accumulate_grad_batches=2, logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=4))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["state_dict"]
    again = made()
    again.load_state_dict({name.removeprefix("net."): value for name, value in saved.items()})
    for (name, one), two in zip(plain.named_parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name, rtol=1e-4, atol=1e-6)
