"""Training on modulo arithmetic: configuration, the sweep, early stop, resuming, results, the comparison, the command line."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden

from rnndyn_fast.cli import main
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.train import (
    NetworkResult,
    PhaseSweepConfig,
    PhaseTrainConfig,
    QuietReporter,
    compare,
    load_networks,
    phase_run,
    read_published,
    save_networks,
    summarise,
    train_phase,
)
from rnndyn_fast.train.phase_run import CHECKPOINT, CONFIG

# Learns modulo 2 with one pulse (tell 0 from 1) in some epochs.
EASY: dict[str, Any] = {
    "modulus": 2, "pulses": 1, "timesteps": 14, "window": 6, "hidden": 16, "train_trials": 200, "lr": 3e-3, "stop_loss": 0.02,
}  # fmt: skip
GRID: dict[str, Any] = {"alphas": (0.5, 1.0), "noise_stds": (0.0, 0.1), "activations": ("tanh", "relu"), "repeats": 1}


def sweep(out: Path, **options: Any) -> Path:
    return train_phase(PhaseSweepConfig(out=str(out), **{**EASY, **GRID, **options}), reporter=QuietReporter())


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweep(tmp_path_factory.mktemp("sweep") / "run", epochs=40)


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_published_grid() -> None:
    jobs = PhaseSweepConfig(out="x").jobs()
    assert len(jobs) == 90
    assert len({job.seed for job in jobs}) == 90
    for k, alpha, noise, activation in ((29, 0.1, 0.1, "relu"), (52, 0.5, 0.1, "tanh"), (71, 1.0, 0.05, "tanh"), (72, 1.0, 0.05, "tanh")):
        assert (jobs[k].job_id, jobs[k].alpha, jobs[k].noise_std, jobs[k].activation) == (k, alpha, noise, Activation(activation))
    path = GOLDEN / "validation_metrics_m3a.csv"
    if not path.exists():
        golden("validation_metrics_m3a")  # skips or fails
    for job, row in zip(jobs, read_published(path), strict=True):
        assert (job.job_id, job.alpha, job.noise_std, job.activation.value) == (row.job_id, row.alpha, row.noise, row.activation_fn)


def test_networks_stop_one_by_one(finished: Path) -> None:
    """Each when it is good enough; the table, the history and the saved weights say the same."""
    table = rows(finished.parent / "results.csv")
    history = rows(finished.parent / "history.csv")
    assert list(table[0])[:8] == ["job_id", "seed", "best_loss", "best_accuracy", "final_epoch", "alpha", "noise", "activation_fn"]
    reached = [row for row in table if row["status"] == "reached"]
    assert len(reached) >= 6
    assert len({row["final_epoch"] for row in reached}) > 2
    for row in table:
        losses = [float(line["val_error"]) for line in history if line["job_id"] == row["job_id"]]
        assert len(losses) == int(row["epochs"])
        assert float(row["best_loss"]) == pytest.approx(min(losses), rel=1e-6)
        if row["status"] == "reached":
            assert int(row["final_epoch"]) == len(losses) - 1
            assert losses[-1] <= 0.02
            assert min([1.0, *losses[:-1]]) > 0.02
        else:
            assert (row["status"], row["final_epoch"], len(losses)) == ("finished", "", 40)
    net, results = load_networks(finished)
    assert net.num_models == 8
    assert [str(r.job_id) for r in results] == [row["job_id"] for row in table]
    task = PhaseSweepConfig(out="x", **EASY).task
    trials = task.test_set(seed=99)
    outputs, _ = net(trials.inputs)
    correct = (torch.sign(outputs[:, :, -1, 0]) == trials.labels).double().mean(1)
    for m, row in enumerate(table):
        if row["status"] == "reached":
            assert float(correct[m]) > 0.97, row
    summary = json.loads((finished.parent / "results.json").read_text())["summary"]
    assert summary["reached"] == len(reached)
    assert summary["final_epoch_median"] == np.median([int(row["final_epoch"]) for row in reached])


def test_a_network_is_the_same_alone(finished: Path, tmp_path: Path) -> None:
    """Bit for bit, from its seed: trained with others, or as the one network of `phase train`."""
    net, results = load_networks(finished)
    job = PhaseSweepConfig(out="x", **EASY, **GRID).jobs()[6]  # alpha 1, noise 0.1, tanh
    options = {"alpha": job.alpha, "noise_std": job.noise_std, "activation": job.activation.value, "seed": job.seed, "epochs": 40}
    path = train_phase(PhaseTrainConfig(out=str(tmp_path / "one"), **{**EASY, **options}), reporter=QuietReporter())
    alone, (row,) = load_networks(tmp_path / "one")
    torch.testing.assert_close(dict(alone.state_dict()), {k: v[6:7] for k, v in net.state_dict().items()}, rtol=0, atol=0)
    assert dataclasses.replace(row, job_id=6) == results[6]
    assert path.name == "networks.npz"


def test_without_a_stop_the_last_weights_are_kept(tmp_path: Path) -> None:
    config = PhaseTrainConfig(out=str(tmp_path / "run"), **{**EASY, "stop_loss": None}, epochs=3)
    train_phase(config, reporter=QuietReporter())
    contents = torch.load(tmp_path / "run" / CHECKPOINT)
    assert torch.equal(contents["run"]["best"], contents["training"]["parameters"])
    (row,) = rows(tmp_path / "run" / "results.csv")
    assert (row["status"], row["epochs"], row["final_epoch"]) == ("finished", "3", "")


def test_interrupted_and_resumed_is_the_same(tmp_path: Path, finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped in the middle of writing a checkpoint; threads differ afterwards."""
    saves = 0
    whole = torch.save

    def fails(*arguments: Any) -> None:
        nonlocal saves
        saves += 1
        if saves == 9:
            raise KeyboardInterrupt
        whole(*arguments)

    monkeypatch.setattr(phase_run.torch, "save", fails)
    with pytest.raises(KeyboardInterrupt):
        sweep(tmp_path / "run", epochs=40, save_every_s=1e-9)
    monkeypatch.undo()
    done = int(torch.load(tmp_path / "run" / CHECKPOINT)["training"]["epoch"].max())
    assert done == 8
    path = sweep(tmp_path / "run", epochs=40, resume=True, threads=2)
    for name in ("history.csv", "results.csv"):
        assert (path.parent / name).read_bytes() == (finished.parent / name).read_bytes()
    torch.testing.assert_close(load_networks(path)[0].state_dict(), load_networks(finished)[0].state_dict(), rtol=0, atol=0)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this system")
def test_killed_and_resumed_is_the_same(tmp_path: Path, finished: Path) -> None:
    out = tmp_path / "run"
    options = {k: ",".join(map(str, v)) if isinstance(v, tuple) else str(v) for k, v in {**EASY, **GRID}.items()}
    words = [f"--{k}={v}" for k, v in options.items()] + ["--epochs=40", "--save_every_s=1e-9"]
    code = "import sys; from rnndyn_fast.cli import main; sys.exit(main())"
    command = [sys.executable, "-c", code, "phase", "sweep", "--out", str(out), *words]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, env={**os.environ, "OMP_NUM_THREADS": "1"}) as process:
        deadline = time.monotonic() + 100
        while not (out / CHECKPOINT).exists() and process.poll() is None:
            assert time.monotonic() < deadline
            time.sleep(0.005)
        time.sleep(0.05)
        process.kill()
    assert process.returncode == -signal.SIGKILL, "the run was over before it could be killed"
    assert main(["phase", "sweep", "--config", str(out / CONFIG), "--resume"]) == 0
    assert (out / "history.csv").read_bytes() == (finished.parent / "history.csv").read_bytes()
    assert (out / "results.csv").read_bytes() == (finished.parent / "results.csv").read_bytes()


def test_what_is_not_finite_is_stopped_and_said(tmp_path: Path) -> None:
    path = sweep(tmp_path / "run", epochs=3, lr=1e30, activations=("relu",), alphas=(1.0,))
    assert {row["status"] for row in rows(path.parent / "results.csv")} == {"diverged"}


def test_folders_and_other_options_are_refused(tmp_path: Path, finished: Path) -> None:
    with pytest.raises(FileExistsError, match=r"out: .* is not empty; use --resume .* or --overwrite"):
        sweep(finished.parent)
    with pytest.raises(ValueError, match=r"resume: the run in .* was started with other options: lr was 0.003, is 0.001"):
        sweep(finished.parent, lr=1e-3, resume=True)
    with pytest.raises(FileNotFoundError, match=r"resume: no checkpoint.pt"):
        sweep(tmp_path / "none", resume=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FileExistsError, match="out: expected a folder"):
        sweep(tmp_path / "file")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / CHECKPOINT).write_bytes((finished.parent / CHECKPOINT).read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"resume: .*checkpoint.pt is truncated"):
        sweep(broken, resume=True)
    before = (finished.parent / "results.csv").read_bytes()
    with pytest.raises(FileNotFoundError, match="published: no such file"):
        sweep(finished.parent, overwrite=True, published=str(tmp_path / "none.csv"))
    assert (finished.parent / "results.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("options", "kind", "message"),
    [
        ({"modulus": 1}, ValueError, "modulus: expected at least 2"),
        ({"pulses": 9}, ValueError, "pulses: 9 pulses .* got window 40"),
        ({"alphas": (0.5, 1.2)}, ValueError, r"alpha: expected values in \(0, 1\], got 1.2"),
        ({"noise_stds": (float("nan"),)}, ValueError, "noise_std: expected finite values"),
        ({"activations": ("step",)}, ValueError, "activations: expected some of tanh"),
        ({"alphas": ()}, ValueError, "alphas: expected at least one"),
        ({"repeats": 0}, ValueError, "repeats: expected at least 1"),
        ({"lr": 0.0}, ValueError, "lr: expected a positive finite number"),
        ({"stop_loss": -1.0}, ValueError, "stop_loss: expected a positive number"),
        ({"batch_size": 3000}, ValueError, "batch_size: expected at most train_trials"),
        ({"loss_steps": 51}, ValueError, "loss_steps: expected at most timesteps"),
        ({"epochs": 1.5}, TypeError, "epochs: expected int"),
        ({"backend": "cuda"}, ValueError, "backend: expected one of"),
        ({"resume": True, "overwrite": True}, ValueError, "resume, overwrite: expected at most one"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        PhaseSweepConfig(out="x", **options)


def test_published_table_and_comparison(tmp_path: Path) -> None:
    path = GOLDEN / "validation_metrics_m3a.csv"
    if not path.exists():
        golden("validation_metrics_m3a")  # skips or fails
    published = read_published(path)
    summary = summarise(published)
    assert (summary["networks"], summary["reached"], summary["accuracy_1"]) == (90, 89, 88)
    assert (summary["final_epoch_median"], summary["final_epoch_min"], summary["final_epoch_max"]) == (273, 69, 924)
    same = compare(published, published)
    assert same["kolmogorov_smirnov"]["p"] == 1
    assert [c["median_ratio"] for c in same["conditions"]] == [1.0] * 18
    slower = [dataclasses.replace(row, final_epoch=None if row.final_epoch is None else 3 * row.final_epoch) for row in published]
    other = compare(slower, published)
    assert other["mann_whitney"]["p"] < 1e-6
    assert {c["median_ratio"] for c in other["conditions"]} == {3.0}
    assert compare([dataclasses.replace(row, final_epoch=None) for row in published], published)["conditions"] == []
    broken = tmp_path / "broken.csv"
    broken.write_text("job_id,seed,best_loss\n1,2,0.5\n")
    with pytest.raises(ValueError, match="line 2: not a row of results"):
        read_published(broken)


def test_files_of_networks(tmp_path: Path, finished: Path) -> None:
    net, results = load_networks(finished)
    save_networks(tmp_path / "some.npz", net.select([5, 2]), [results[5], results[2]])
    again, two = load_networks(tmp_path / "some.npz")
    torch.testing.assert_close(again.state_dict(), net.select([5, 2]).state_dict(), rtol=0, atol=0)
    assert two == [results[5], results[2]]
    assert again.activations == (net.activations[5], net.activations[2])
    with pytest.raises(FileNotFoundError, match="path: no such file"):
        load_networks(tmp_path / "none.npz")
    (tmp_path / "broken.npz").write_bytes(finished.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"path: .*broken.npz is truncated or not an .npz file"):
        load_networks(tmp_path / "broken.npz")
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    with pytest.raises(ValueError, match="is not a file of networks"):
        load_networks(tmp_path / "other.npz")
    assert isinstance(results[0], NetworkResult)


def test_command_line(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = [f"--{name.replace('_', '-')}={value}" for name, value in EASY.items() if name != "stop_loss"]
    assert main(["phase", "train", "--out", str(tmp_path / "one"), "--epochs", "2", *words]) == 0
    told = capfd.readouterr().out
    assert "1 networks trained" in told
    assert str(tmp_path / "one" / "networks.npz") in told
    words += ["--alphas", "0.5,1", "--noise-stds", "0.05", "--activations", "tanh", "--repeats", "1", "--epochs", "1"]
    assert main(["phase", "sweep", "--out", str(tmp_path / "grid"), *words]) == 0
    assert "0 of 2 networks reached" in capfd.readouterr().out
    assert main(["phase", "sweep", "--out", str(tmp_path / "grid"), *words]) == 2
    assert "rnndyn: error: --out:" in capfd.readouterr().err
    assert main(["phase", "train", "--out", str(tmp_path / "bad"), "--modulus", "1"]) == 2
    assert "modulus: expected at least 2" in capfd.readouterr().err
    assert not (tmp_path / "bad").exists()
