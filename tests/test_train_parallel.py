"""Training in several processes (torchrun, gloo): the loss curve of one, whatever the number of processes; errors that end all."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rnndyn_fast.data import BatchLoader, make_dataset
from rnndyn_fast.train import EpochMetrics, QuietReporter, TrainConfig, read_checkpoint, read_metrics, train

# A last batch of 5 images, of which with 4 processes two have one each.
OPTIONS: dict[str, Any] = {
    "widths": (4, 6, 8, 10, 12), "timesteps": 2, "epochs": 2, "batch_size": 32, "val_batch_size": 20, "lr": 1e-2, "optimizer": "sgd",
    "threads": 1, "backend": "reference", "augment": "trivialaugmentwide",
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=69, num_val=41, num_test=20, num_testplus=20)


def arguments(images: Path, out: Path, options: dict[str, Any]) -> list[str]:
    given = {**OPTIONS, **options}
    words = [word for k, v in given.items() for word in (f"--{k}", ",".join(map(str, v)) if isinstance(v, tuple) else str(v))]
    return ["train", "--data", str(images), "--out", str(out), *words]


def launch(count: int, *words: str) -> subprocess.CompletedProcess[str]:
    """The command `rnndyn` under torchrun."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m", "rnndyn_fast.cli"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*launcher, *words], capture_output=True, text=True, env=environment, timeout=240)


def forked(tmp_path: Path, *jobs: dict[str, Any]) -> list[dict[str, Any]]:
    """Jobs in several processes each, see `forked_training.ranks`."""
    script = Path(__file__).with_name("forked_training.py")
    given = {"task": "ranks", "logs": str(tmp_path), "jobs": jobs}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, str(script), json.dumps(given)], capture_output=True, text=True, timeout=240, env=environment)
    assert done.returncode == 0, done.stderr
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])["jobs"]
    return found


def alone(images: Path, out: Path, **options: Any) -> list[EpochMetrics]:
    train(TrainConfig(data=str(images), out=str(out), **{**OPTIONS, **options}), reporter=QuietReporter())
    return read_metrics(out)


def check_alike(one: list[EpochMetrics], two: list[EpochMetrics], rel: float) -> None:
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert (a.train_loss, a.val_loss) == pytest.approx((b.train_loss, b.val_loss), rel=rel)
        assert a.train_accuracy == pytest.approx(b.train_accuracy, abs=1.01 / 69)
        assert a.val_accuracy == pytest.approx(b.val_accuracy, abs=1.01 / 41)


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("epoch", [0, 3])
def test_parts_of_a_batch_are_disjoint_and_whole(count: int, epoch: int) -> None:
    class Numbers:
        def __len__(self) -> int:
            return 23

        def read(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
            return torch.zeros(len(indices), 3, 1, 1), torch.from_numpy(indices)

    loaders = [BatchLoader(Numbers(), 8, shuffle=True, seed=5, rank=rank, count=count) for rank in range(count)]
    single = BatchLoader(Numbers(), 8, shuffle=True, seed=5)
    for loader in (single, *loaders):
        loader.set_epoch(epoch)
    for batch, *parts in zip(single.batches(), *(loader.batches() for loader in loaders), strict=True):
        assert torch.cat([part.labels for part in parts]).equal(batch.labels)
        assert {part.total for part in parts} == {len(batch.labels)}
        sizes = [len(part.labels) for part in parts]
        assert max(sizes) - min(sizes) <= 1
        assert sizes[0] > 0


CURVE: dict[str, Any] = {"class_weights": "inverse_frequency", "label_smoothing": 0.1, "ema": 0.8, "clip_norm": 5.0}


def test_torchrun_has_the_loss_curve_of_one_process(images: Path, tmp_path: Path) -> None:
    one = alone(images, tmp_path / "one", **CURVE)
    done = launch(2, *arguments(images, tmp_path / "two", CURVE))
    assert done.returncode == 0, done.stderr[-5000:]
    assert done.stdout.count("epoch 2/2") == 1  # one process speaks
    check_alike(read_metrics(tmp_path / "two"), one, 1e-5)


def test_processes_have_the_loss_curve_of_one_and_resume_in_another_number(images: Path, tmp_path: Path) -> None:
    """With weighted classes, smoothing, EMA and gradients accumulated; the last batch is smaller than the others. Lateral connections that
    one time step does not use have no gradient."""
    one = alone(images, tmp_path / "one", **CURVE)
    short = alone(images, tmp_path / "short", timesteps=1)
    check_alike(alone(images, tmp_path / "parts", accumulate=3, **CURVE), one, 1e-5)
    jobs = {
        "two": (2, {**CURVE, "accumulate": 2}), "four": (4, CURVE), "mixed": (2, {**CURVE, "epochs": 1}),
        "short_two": (2, {"timesteps": 1, "backend": "native"}),
    }  # fmt: skip
    found = forked(tmp_path, *({"count": n, "words": arguments(images, tmp_path / name, o)} for name, (n, o) in jobs.items()))
    for name, job in zip(jobs, found, strict=True):
        assert set(job["ends"]) == {0}, (name, job["said"])
    for name in ("two", "four"):
        check_alike(read_metrics(tmp_path / name), one, 1e-5)
    check_alike(read_metrics(tmp_path / "short_two"), short, 1e-4)
    check_alike(alone(images, tmp_path / "mixed", resume=True, **CURVE), one, 1e-5)
    states = {name: read_checkpoint(tmp_path / name / "last.pt")["state_dict"] for name in ("one", "two", "four", "mixed")}
    for name, value in states["one"].items():
        for other in ("two", "four", "mixed"):
            torch.testing.assert_close(states[other][name], value, rtol=1e-4, atol=1e-5)


def test_tar_shards_have_the_loss_curve_of_one_process_and_resume_in_another_number(images: Path, tmp_path: Path) -> None:
    """Each process reads its own shards, so parts of a batch differ in size; more processes than shards are refused."""
    pytest.importorskip("webdataset")
    from rnndyn_fast.data import ImageFile
    from rnndyn_fast.data.shards import write_shards

    with ImageFile(images) as file:
        write_shards(file, tmp_path / "shards", images_per_shard=12)
        write_shards(file, tmp_path / "few", images_per_shard=40)
    one = alone(tmp_path / "shards", tmp_path / "one", **CURVE)
    jobs = {
        "two": (2, "shards", CURVE), "three": (3, "shards", {**CURVE, "accumulate": 2, "checkpoint_every": 2, "epochs": 1}),
        "refused": (3, "few", {}),
    }  # fmt: skip
    found = forked(tmp_path, *({"count": n, "words": arguments(tmp_path / d, tmp_path / name, o)} for name, (n, d, o) in jobs.items()))
    assert [set(job["ends"]) for job in found] == [{0}, {0}, {2}], found
    check_alike(read_metrics(tmp_path / "two"), one, 1e-5)
    check_alike(alone(tmp_path / "shards", tmp_path / "three", resume=True, checkpoint_every=2, accumulate=2, **CURVE), one, 1e-5)
    told = "processes: expected at most one for each of the 2 tar shards with training images, got 3"
    assert all(said.splitlines()[-1] == f"rnndyn: error: {told}" for said in found[2]["said"]), found[2]


def test_batch_norms_take_local_statistics_or_on_request_those_of_all(tmp_path: Path) -> None:
    """Per time step, in RCNN-SAT. Synchronised, the curve is that of one process."""
    images = make_dataset(tmp_path / "d.h5", source="digits", size=64, num_train=24, num_val=12, num_test=10, num_testplus=10)
    options: dict[str, Any] = {
        "model": "rcnn_sat", "model_options": "{kind: bl, width_divisor: 24}", "timesteps": 2, "batch_size": 12, "lr": 1e-2,
        "optimizer": "sgd", "epochs": 1, "augment": "none", "backend": "reference", "threads": 1,
    }  # fmt: skip
    words = ["train", "--data", str(images), *(word for k, v in options.items() for word in (f"--{k}", str(v)))]
    config = {**options, "model_options": {"kind": "bl", "width_divisor": 24}}
    train(TrainConfig(data=str(images), out=str(tmp_path / "one"), **config), reporter=QuietReporter())
    jobs = {"local": [], "synchronised": ["--sync-batch-norm", "true"]}
    found = forked(tmp_path, *({"count": 2, "words": [*words, "--out", str(tmp_path / name), *more]} for name, more in jobs.items()))
    assert [set(job["ends"]) for job in found] == [{0}, {0}], found
    one, local, synchronised = (read_metrics(tmp_path / name) for name in ("one", "local", "synchronised"))
    for a, b in zip(synchronised, one, strict=True):
        assert (a.train_loss, a.val_loss) == pytest.approx((b.train_loss, b.val_loss), rel=1e-4)
    assert abs(local[0].train_loss - one[0].train_loss) > 1e-3 * one[0].train_loss


def test_synchronised_batch_norm_is_that_of_the_whole_batch() -> None:
    """In one process: values, gradients and running statistics of PyTorch's batch norm."""
    import torch.distributed as dist

    from rnndyn_fast.train.sync_norm import synchronised_batch_norm

    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        x = torch.randn(6, 3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
        weight, bias = (torch.rand(3, dtype=torch.float64, requires_grad=True) for _ in range(2))
        found = []
        for mode in (None, synchronised_batch_norm()):
            if mode is not None:
                mode.__enter__()
            y = functional.batch_norm(x, None, None, weight, bias, True, 0.0, 1e-5)
            moments = torch.var_mean(x.detach(), (0, 2, 3), correction=1)
            if mode is not None:
                mode.__exit__(None, None, None)
            found.append((y, *torch.autograd.grad((y**3).sum(), (x, weight, bias)), *moments))
        for a, b in zip(*found, strict=True):
            torch.testing.assert_close(a, b)
    finally:
        dist.destroy_process_group()


FAILING = """
import os
from rnndyn_fast.data.hdf5 import ImageSplit
read = ImageSplit.read
def failing(self, indices):
    if os.environ["RANK"] == "1" and self.name == "val":
        raise OSError("no such sector")
    return read(self, indices)
ImageSplit.read = failing
"""
DYING = """
import os
from rnndyn_fast.train import loop
step = loop._Run.train_step
def dying(self, batch):
    if os.environ["RANK"] == "1" and self.issued == 2:
        os.kill(os.getpid(), 9)
    return step(self, batch)
loop._Run.train_step = dying
"""
SLOW = """
import time
from rnndyn_fast.train import loop
step = loop._Run.train_step
loop._Run.train_step = lambda self, batch: (time.sleep(0.1), step(self, batch))[1]
"""


def test_what_ends_one_process_ends_all(images: Path, tmp_path: Path) -> None:
    """With its own error: one that fails, one that is killed, fewer images than processes, SIGTERM (which saves)."""
    names = ("fails", "dies", "few", "stopped")
    options = [{}, {"checkpoint_every": 1}, {"max_train_images": 1}, {"checkpoint_every": 1}]
    jobs: list[dict[str, Any]] = [
        {"count": 2, "words": arguments(images, tmp_path / name, given)} for name, given in zip(names, options, strict=True)
    ]
    for job, code in zip(jobs, (FAILING, DYING, "", SLOW), strict=True):
        job["code"] = code
    jobs[3] |= {"signal": signal.SIGTERM, "until": str(tmp_path / "stopped" / "last.pt")}
    fails, dies, few, stopped = forked(tmp_path, *jobs)
    assert fails["ends"] == [2, 2], fails
    assert fails["said"][1].splitlines()[-1] == "rnndyn: error: no such sector"
    assert fails["said"][0].splitlines()[-1] == "rnndyn: error: process 0 of 2 ends: process 1 of 2 failed: OSError: no such sector"
    assert dies["ends"] == [2, -signal.SIGKILL], dies
    assert "process 0 of 2 ends: another process has ended without a message (killed, or out of memory)" in dies["said"][0]
    assert read_checkpoint(tmp_path / "dies" / "last.pt")["progress"]["step"] == 2
    assert few["ends"] == [2, 2]
    for said in few["said"]:
        assert said.startswith("rnndyn: error: processes: expected at most one for each of the 1 training images, got 2")
    assert not (tmp_path / "few" / "initial.pt").exists()
    assert stopped["ends"] == [143, 143], stopped
    assert f"stopped; to go on: rnndyn train --config {tmp_path}/stopped/train.yaml --resume" in stopped["said"][0]
    assert "to go on" not in stopped["said"][1]
    assert read_checkpoint(tmp_path / "stopped" / "last.pt")["progress"]["step"] > 0
    one = alone(images, tmp_path / "one")
    check_alike(alone(images, tmp_path / "stopped", resume=True), one, 1e-5)


def test_options_differ_between_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnndyn_fast.processes import Processes
    from rnndyn_fast.train import loop

    group = Processes()
    config = TrainConfig(data="d", out="o")
    monkeypatch.setattr(group, "all_of", lambda mine: [mine, {**mine, "lr": 0.5} if "lr" in mine else mine])
    with pytest.raises(ValueError, match="options: expected the same in every process, process 1 has another lr"):
        loop._check_same(config, group)


@pytest.mark.parametrize("parts", [[2], [3, 2], [4, 2], [3, 0]])
def test_processes_come_to_synchronised_norms_equally_often(parts: list[int]) -> None:
    """A process with fewer samples than pieces fills up with stand-ins, which weigh nothing; else the others would wait for it for ever."""
    import torch.distributed as dist

    from rnndyn_fast.processes import Processes
    from rnndyn_fast.train.objective import loss_over_time
    from rnndyn_fast.train.steps import Steps

    class Counted(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.map, self.calls = nn.Linear(12, 4), 0

        def run(self, x: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.map(x.flatten(1)).log_softmax(1)[None]

    x, labels = torch.rand(parts[-1], 3, 2, 2), torch.arange(parts[-1]) % 4
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        found = []
        for accumulate in (1, 3):
            group = Processes()
            group.count = 2  # it seems
            group.all_of = lambda value: parts  # type: ignore[method-assign]
            group.sum = lambda tensor: tensor  # type: ignore[method-assign]
            net: Any = Counted()
            optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
            device = torch.device("cpu")
            steps = Steps(net, optimizer, loss_over_time, device, group=group, accumulate=accumulate, sync_batch_norm=True)
            outcome = steps.train(x, labels, sum(parts))
            assert outcome.images == sum(parts)
            assert net.calls == (1 if accumulate == 1 else min(3, max(parts)))
            found.append(net.map.weight.detach())
        torch.testing.assert_close(found[0], found[1])
    finally:
        dist.destroy_process_group()


def test_gradients_of_parts_are_those_of_the_batch() -> None:
    """Of a network with nothing between samples, exactly weighted by classes."""
    from rnndyn_fast.train.objective import loss_over_time, sample_weight
    from rnndyn_fast.train.steps import Steps

    class Tiny(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.map = nn.Linear(12, 4)

        def run(self, x: torch.Tensor) -> torch.Tensor:
            return self.map(x.flatten(1)).log_softmax(1)[None]

    x, labels, weights = torch.rand(7, 3, 2, 2), torch.arange(7) % 4, torch.tensor([0.1, 0.2, 0.3, 0.4])
    found = []
    for parts in (1, 3, 7, 9):
        net: Any = Tiny()
        steps = Steps(
            net, torch.optim.SGD(net.parameters(), lr=0.1), lambda p, y: loss_over_time(p, y, class_weights=weights), torch.device("cpu"),
            weight=lambda y: sample_weight(y, weights), penalty=lambda net=net: 0.1 * net.map.weight.square().sum(), accumulate=parts,
        )  # fmt: skip
        loss, correct = steps.train(x, labels).read()
        found.append((loss, correct, net.map.weight.detach()))
    for loss, correct, weight in found[1:]:
        assert loss == pytest.approx(found[0][0], rel=1e-6)
        assert correct == found[0][1]
        torch.testing.assert_close(weight, found[0][2])
