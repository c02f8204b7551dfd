"""Optimisers, schedules, averages, mixing; health; where numbers go; workers; other devices."""

from __future__ import annotations

import json
import math
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional

from rnndyn_fast.cli import main
from rnndyn_fast.data import BatchLoader, ImageFile, Part, Request, make_dataset
from rnndyn_fast.job_device import backend_on
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.train import (
    QuietReporter,
    TrainConfig,
    load_checkpoint,
    loss_over_time,
    read_checkpoint,
    read_metrics,
    save_checkpoint,
    train,
)
from rnndyn_fast.train.health import activity, areas_of_parameters, gradient_norms
from rnndyn_fast.train.objective import decay_penalty, decays
from rnndyn_fast.train.optimizers import make_optimizer
from rnndyn_fast.train.rates import Schedule
from rnndyn_fast.train.state import State
from rnndyn_fast.train.steps import Steps
from rnndyn_fast.train.transform import TrainingTransform
from rnndyn_fast.train.watch import read_steps

CPU = torch.device("cpu")
TINY: dict[str, Any] = {
    "widths": (4, 6, 8, 10, 12), "timesteps": 3, "epochs": 1, "batch_size": 16, "val_batch_size": 20, "lr": 3e-3, "backend": "reference",
    "threads": 1, "augment": "none", "log_every": 2,
}  # fmt: skip


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=70, num_val=30, num_test=20, num_testplus=20)


def config(**options: Any) -> TrainConfig:
    return TrainConfig(**{"data": "d", "out": "o", **options})


def run(images: Path, out: Path, **options: Any) -> Path:
    return train(TrainConfig(data=str(images), out=str(out), **{**TINY, **options}), reporter=QuietReporter())


def network() -> Any:
    torch.manual_seed(1)
    return blt_net_64(timesteps=3, image_size=16, widths=(2, 2, 4, 4, 8), num_classes=5, backend="reference", topdown_connections=False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"optimizer": "adamax"}, ValueError, "optimizer: expected one of"),
        ({"accumulate": 0}, ValueError, "accumulate: expected at least 1"),
        ({"ema": 1.0}, ValueError, "ema: expected at least 0 and below 1"),
        ({"momentum": 1.5}, ValueError, "momentum: expected at least 0 and below 1"),
        ({"clip_norm": 0.0}, ValueError, "clip_norm: expected a positive finite"),
        ({"mixup": -1.0}, ValueError, "mixup: expected at least 0"),
        ({"lr_schedule": "cosine", "lr_steps": (3,)}, ValueError, "lr_schedule, lr_steps: expected at most one"),
        ({"lr_schedule": "cosine", "lr_warmup": 3}, ValueError, "lr_warmup: expected lr_warmup_steps with lr_schedule"),
        ({"time_weights": (0, 0)}, ValueError, "time_weights: expected finite numbers of at least 0, not all 0"),
        ({"time_weights": (1, 1), "loss": "last"}, ValueError, "time_weights: expected loss sum or mean"),
        ({"weight_decay_of": {"v1.*": "much"}}, TypeError, "weight_decay_of: expected a number for 'v1"),
        ({"sync_batch_norm": True, "backend": "native"}, ValueError, "sync_batch_norm: runs with backend reference alone"),
        ({"workers": -1}, ValueError, "workers: expected at least 0"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        config(**options)


# ---------------------------------------------------------------- optimisers and schedules


def test_weight_decay_by_group() -> None:
    net = network()
    found = decays(net, 0.1, {"v1.*": 0.5, "v1.lateral.weight": 0.0})
    assert found["v1.lateral.weight"] == 0
    assert found["v2.lateral.weight"] == 0.1
    assert {v for k, v in found.items() if "_ln" in k and not k.startswith("v1.")} == {0.0}
    with pytest.raises(ValueError, match=r"weight_decay_of: no parameter is named like 'v9"):
        decays(net, 0.1, {"v9.*": 0.5})
    optimizer = make_optimizer(config(optimizer="adamw"), net, found, CPU)
    assert sorted(group["weight_decay"] for group in optimizer.param_groups) == [0.0, 0.1, 0.5]
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(net.parameters()))
    penalty = decay_penalty(net, found)
    assert penalty is not None
    expected = sum(found[name] * float(p.detach().square().sum()) for name, p in net.named_parameters())
    assert penalty().item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["adam", "adamw", "sgd", "lars", "lamb"])
def test_optimisers_lower_the_loss_and_resume(name: str, images: Path, tmp_path: Path) -> None:
    if name in ("lars", "lamb"):
        pytest.importorskip("pytorch_optimizer")
    rate = {"sgd": 0.1, "lars": 3.0}.get(name, 3e-2)
    options = {"optimizer": name, "weight_decay": 1e-4, "lr": rate, "epochs": 3}
    whole = run(images, tmp_path / "whole", **options)
    losses = [row.train_loss for row in read_metrics(whole.parent)]
    assert losses[-1] < losses[0]
    run(images, tmp_path / "parts", **{**options, "epochs": 1})
    parts = run(images, tmp_path / "parts", **options, resume=True)
    one, two = (read_checkpoint(path)["state_dict"] for path in (whole, parts))
    assert all(torch.equal(one[k], two[k]) for k in one)


def test_absent_optimisers_name_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "pytorch_optimizer", None)
    with pytest.raises(ImportError, match=r'pip install "rnndyn-fast\[large-batch\]"'):
        make_optimizer(config(optimizer="lamb"), network(), {}, CPU)


def rates(steps: int, epochs: int, **options: Any) -> list[float]:
    given = config(lr=1.0, epochs=epochs, **options)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=given.lr)
    schedule, found = Schedule(given, optimizer, steps), []
    for _ in range(epochs):
        schedule.begin_epoch([])
        for _ in range(steps):
            found.append(schedule.current)
            optimizer.step()
            schedule.step()
            # What goes on has the same rates.
            other = Schedule(given, torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=given.lr), steps)
            other.load_state_dict(schedule.state_dict())
            other.optimizer.load_state_dict(optimizer.state_dict())
            schedule, optimizer = other, other.optimizer  # type: ignore[assignment]
    return found


def test_schedules_over_steps() -> None:
    cosine = rates(5, 4, lr_schedule="cosine", lr_least=0.1)
    assert cosine == pytest.approx([0.1 + 0.45 * (1 + math.cos(math.pi * k / 20)) for k in range(20)])
    warm = rates(5, 4, lr_schedule="cosine", lr_warmup_steps=4)
    assert warm[:5] == pytest.approx([0.01 + 0.99 * k / 4 for k in range(5)])
    assert warm[5:] == pytest.approx([0.5 * (1 + math.cos(math.pi * k / 16)) for k in range(1, 16)])
    one = rates(5, 4, lr_schedule="one_cycle", lr_warmup_steps=8)
    assert one[0] == pytest.approx(1 / 25)
    assert max(one) == pytest.approx(1.0)
    assert one.index(max(one)) == 7
    assert one[-1] < 1e-3
    assert rates(5, 2, lr_warmup_steps=3) == pytest.approx([0.01, 0.34, 0.67, *[1.0] * 7])
    with pytest.raises(ValueError, match="lr_warmup_steps: expected fewer than the 20 training steps, got 20"):
        rates(5, 4, lr_schedule="cosine", lr_warmup_steps=20)


def test_average_of_the_weights(images: Path, tmp_path: Path) -> None:
    """It is what a checkpoint is used by, and what is validated beside; decay 0 is the network itself."""
    last = run(images, tmp_path / "run", ema=0.5, epochs=2)
    row, contents = read_metrics(last.parent)[-1], read_checkpoint(last)
    assert row.ema_val_loss != row.val_loss
    net, _ = load_checkpoint(last)
    assert torch.equal(net.readout.weight, contents["state_dict"]["readout.weight"])
    assert not torch.equal(net.readout.weight, contents["trained_state_dict"]["readout.weight"])
    assert "ema_val_accuracy_t2" in (last.parent / "metrics.csv").read_text()
    same = run(images, tmp_path / "zero", ema=0.0)
    row, contents = read_metrics(same.parent)[-1], read_checkpoint(same)
    assert (row.ema_val_loss, row.ema_val_accuracy) == (row.val_loss, row.val_accuracy)
    assert torch.equal(contents["state_dict"]["readout.weight"], contents["trained_state_dict"]["readout.weight"])


# ---------------------------------------------------------------- loss, clipping and mixing


def test_losses_with_shares_of_classes_and_weights_of_time_steps() -> None:
    generator = torch.Generator().manual_seed(0)
    log_probs = torch.randn(3, 4, 5, dtype=torch.float64, generator=generator).log_softmax(2)
    labels, weights = torch.tensor([0, 3, 4, 1]), torch.rand(5, dtype=torch.float64, generator=generator)
    hard = functional.one_hot(labels, 5).double()
    for over in ("sum", "mean", "last"):
        for more in ({}, {"label_smoothing": 0.1}, {"class_weights": weights}, {"label_smoothing": 0.1, "class_weights": weights}):
            torch.testing.assert_close(loss_over_time(log_probs, hard, over, **more), loss_over_time(log_probs, labels, over, **more))
    mixed = 0.3 * hard + 0.7 * hard.flip(0)
    expected = 0.3 * loss_over_time(log_probs, labels) + 0.7 * loss_over_time(log_probs, labels.flip(0))
    torch.testing.assert_close(loss_over_time(log_probs, mixed), expected)
    single = [loss_over_time(log_probs[t : t + 1], labels) for t in range(3)]
    time = torch.tensor([0.0, 0.5, 2.0], dtype=torch.float64)
    torch.testing.assert_close(loss_over_time(log_probs, labels, time_weights=time), 0.5 * single[1] + 2 * single[2])
    torch.testing.assert_close(loss_over_time(log_probs, labels, "mean", time_weights=time), (0.5 * single[1] + 2 * single[2]) / 2.5)
    with pytest.raises(ValueError, match="time_weights: expected 3 numbers"):
        loss_over_time(log_probs, labels, time_weights=time[:2])


def test_weights_of_time_steps_are_counted_before_training(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="time_weights: expected 3 numbers, one for each answer of the network, got 2"):
        run(images, tmp_path / "run", time_weights=(1.0, 2.0))
    assert not (tmp_path / "run").exists()


def test_clipping_by_norm(images: Path, tmp_path: Path) -> None:
    """SGD without momentum moves all parameters together by lr times the bound at most."""
    data = ImageFile(images, required_splits=("train", "val"))
    given = TrainConfig(data=str(images), out=str(tmp_path), **{**TINY, "optimizer": "sgd", "momentum": 0.0, "lr": 1.0, "clip_norm": 1e-3})
    state = State(given, data, {"mean": [100.0] * 3, "std": [50.0] * 3}, CPU)
    before = [p.detach().clone() for p in state.net.parameters()]
    x, y = data.split("train").read(np.arange(8))
    state.steps.train(*state.prepared(x, y))
    moved = math.sqrt(sum(float((p.detach() - b).square().sum()) for p, b in zip(state.net.parameters(), before, strict=True)))
    assert moved == pytest.approx(1e-3, rel=1e-3)


def request(count: int = 8, number: int = 0, epoch: int = 0, start: int = 0, total: int | None = None) -> Request:
    return Request(np.arange(count), epoch, number, Part(slice(start, start + count), total or count))


def test_mixing() -> None:
    values = torch.arange(8, dtype=torch.uint8)[:, None, None, None] * 20
    images, labels = values.expand(8, 3, 16, 16).contiguous(), torch.arange(8)
    transform = TrainingTransform("none", 3, 8, mixup=0.4)
    mixed, shares = transform(request(), images, labels)
    expected = (shares @ (values.flatten().float() / 255))[:, None, None, None].expand_as(mixed)
    torch.testing.assert_close(mixed, expected)
    torch.testing.assert_close(shares.sum(1), torch.ones(8))
    assert ((shares > 0).sum(1) == 2).any()
    cut, shares = TrainingTransform("none", 3, 8, cutmix=1.0)(request(), images, labels)
    for n in range(8):
        for c in range(8):
            assert float((cut[n, 0] == c * 20 / 255).float().mean()) == pytest.approx(float(shares[n, c]), abs=1e-6)
    again, _ = transform(request(), images, labels)
    other, _ = transform(request(number=1), images, labels)
    assert torch.equal(mixed, again)
    assert not torch.equal(mixed, other)
    both = TrainingTransform("none", 3, 8, mixup=0.4, cutmix=1.0)
    kinds = {bool((both(request(number=k), images, labels)[0] * 255 % 20 < 1e-3).all()) for k in range(12)}
    assert kinds == {True, False}
    alone, shares = TrainingTransform("none", 3, 8, cutmix=1.0)(request(1), images[:1], labels[:1])
    assert torch.equal(shares, functional.one_hot(labels[:1], 8).float())
    assert torch.equal(alone, images[:1] / 255)


@pytest.mark.parametrize("name", ["flip", "trivialaugmentwide", "blur_flip_trivialaugmentwide"])
def test_an_image_is_augmented_the_same_however_its_batch_is_cut(name: str) -> None:
    pixels = torch.randint(0, 256, (8, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    transform = TrainingTransform(name, 3, 10)
    whole, _ = transform(request(), pixels, torch.arange(8))
    parts = [transform(request(4, start=k, total=8), pixels[k : k + 4], torch.arange(4))[0] for k in (0, 4)]
    torch.testing.assert_close(torch.cat(parts), whole, rtol=0, atol=1e-6)


def test_workers_change_nothing(images: Path) -> None:
    """Each opens the file for itself; batches, their order and augmentation are those of none, epoch by epoch, from any batch on."""
    with ImageFile(images) as file:
        transform = TrainingTransform("trivialaugmentwide", 1, 10)
        loaders = [BatchLoader(file.split("train"), 16, shuffle=True, seed=1, workers=count, transform=transform) for count in (0, 2)]
        for epoch, first in ((0, 0), (1, 3)):
            for loader in loaders:
                loader.set_epoch(epoch, first)
            for batches in zip(*(loader.batches() for loader in loaders), strict=True):
                for other in batches[1:]:
                    assert torch.equal(other.labels, batches[0].labels)
                    torch.testing.assert_close(other.images, batches[0].images, rtol=0, atol=1e-6)


# ---------------------------------------------------------------- health


def test_measures_of_activity_and_gradients() -> None:
    net = network()
    with torch.no_grad():
        net.v2.lateral.weight.zero_()
    x = torch.randn(4, 3, 16, 16)
    found = activity(net.eval(), x)
    states = net.run(x, record=("v2",))[1]["v2"]
    for t in range(3):
        assert found["norm"]["v2"][t] == pytest.approx(float(states[t].flatten(1).norm(dim=1).mean()), rel=1e-5)
        dead = [bool((states[t, :, c] == 0).all()) for c in range(4)]
        assert found["dead"]["v2"][t] == pytest.approx(sum(dead) / 4)
    owner = areas_of_parameters(net.network, [name for name, _ in net.named_parameters()])
    assert owner["v2.lateral.weight"] == "v2"
    assert owner["readout.weight"] == "readout"
    assert set(owner.values()) <= {area.name for area in net.network.areas} | {"readout"}
    norms = torch.arange(1.0, len(owner) + 1)
    by_area = gradient_norms(net, norms)
    assert by_area["all"] == pytest.approx(float(norms.norm()))
    assert sum(v**2 for k, v in by_area.items() if k != "all") == pytest.approx(by_area["all"] ** 2)


@pytest.mark.parametrize(("kind", "told"), [("state", "the state of v2 at time step 1"), ("gradient", "the gradient of v2 at time step 0")])
def test_what_is_not_finite_is_found_kept_and_replayed(
    kind: str, told: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """A weight is NaN, or a value under a root is 0, so that its gradient alone is not finite."""
    last = run(images, tmp_path / "run", epochs=1)
    contents = read_checkpoint(last)
    if kind == "state":
        contents["state_dict"]["v2.lateral.weight"][:] = float("nan")
        save_checkpoint(last, {k: v for k, v in contents.items() if k not in ("format", "versions")})
    forward = RecurrentNetwork.run

    def rooted(self: Any, *inputs: Any, **options: Any) -> Any:
        found = forward(self, *inputs, **options)
        extra = (self.v2.lateral.weight.flatten()[0] * 0.0).sqrt() * 0
        return (found[0] + extra, *found[1:]) if isinstance(found, tuple) else found + extra

    with pytest.MonkeyPatch.context() as patch:
        if kind == "gradient":
            patch.setattr(RecurrentNetwork, "run", rooted)
        what = {"state": "loss is nan", "gradient": "a gradient is not finite"}[kind]
        with pytest.raises(FloatingPointError, match=rf"{what} in epoch 2, batch 1 of 5; first not finite: {told}.*--replay-failure"):
            run(images, tmp_path / "run", epochs=2, resume=True)
    kept = read_checkpoint(tmp_path / "run" / "failure.pt")
    assert len(kept["batch"]["labels"]) == 16
    for name, value in kept["state_dict"].items():  # nothing was updated
        torch.testing.assert_close(value, contents["state_dict"][name], rtol=0, atol=0, equal_nan=True)
    if kind == "state":
        assert main(["train", "--config", str(tmp_path / "run" / "train.yaml"), "--replay-failure"]) == 0
        said = capfd.readouterr().out
        assert f"epoch 2, step 1, 16 images: first not finite: {told}" in said
        assert "largest magnitude by area" in said


def test_replay_without_a_failure(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--data", "d", "--out", str(tmp_path), "--replay-failure"]) == 2
    assert "--replay-failure: no failure.pt in" in capfd.readouterr().err


def test_a_fused_optimiser_leaves_parameters_as_they_are() -> None:
    """As on a GPU, where the host does not wait to look."""
    net = network()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.1, fused=True)
    scale = [1.0, float("nan"), 1.0]
    steps = Steps(net, optimizer, lambda log_probs, labels: loss_over_time(log_probs, labels) * scale[0], CPU)
    x, labels = torch.rand(4, 3, 16, 16), torch.arange(4)
    finite = []
    for _ in range(3):
        before = [p.detach().clone() for p in net.parameters()]
        outcome = steps.train(x, labels)
        outcome.read()
        finite.append(outcome.finite)
        moved = any(not torch.equal(p, b) for p, b in zip(net.parameters(), before, strict=True))
        assert moved == outcome.finite
        scale.pop(0)
    assert finite == [True, False, True]


# ---------------------------------------------------------------- watching


def test_steps_report_and_trace(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert main(["report", str(out)]) == 2
    assert "no run of rnndyn train" in capfd.readouterr().err
    run(images, out, epochs=1, profile=1)
    entries = read_steps(out / "steps.jsonl")
    assert [entry["step"] for entry in entries] == [1, 2, 4]
    assert {"loss", "accuracy", "lr", "images_per_s", "eta_s", "grad_norm"} <= entries[0].keys()
    assert entries[0]["grad_norm"]["all"] > entries[0]["grad_norm"]["v2"] > 0
    trace = json.loads((out / "trace.json").read_text())
    assert any("aten::conv" in event.get("name", "") for event in trace["traceEvents"])
    # A line that a killed run has begun, and entries of steps that it had not saved.
    with (out / "steps.jsonl").open("a") as stream:
        stream.write(json.dumps({**entries[-1], "step": 9}) + "\n" + '{"step": 1')
    run(images, out, epochs=2, resume=True)
    assert [entry["step"] for entry in read_steps(out / "steps.jsonl")] == [1, 2, 4, 6, 7, 9]
    capfd.readouterr()
    assert main(["report", str(out)]) == 0
    said = capfd.readouterr().out
    assert "2 of 2 epochs are done; last entry: step 9 in epoch 2" in said
    page = (out / "training.html").read_text()
    assert "Norm of gradients by area" in page
    assert "Share of channels that are 0" in page
    row = read_metrics(out)[-1]
    assert len(row.norm["v2"]) == len(row.dead["it"]) == 3
    assert "norm_v2_t1" in (out / "metrics.csv").read_text()


def test_report_of_a_run_in_its_first_epoch(images: Path, tmp_path: Path) -> None:
    from rnndyn_fast.report.training_page import write_training_page

    class Leave(QuietReporter):
        def start(self, text: str, total: int) -> None:
            if text.startswith("validation"):
                raise KeyError

    with pytest.raises(KeyError):
        train(TrainConfig(data=str(images), out=str(tmp_path / "run"), **TINY), reporter=Leave())
    path, record = write_training_page(tmp_path / "run", tmp_path / "page.html")
    assert record.status.startswith("0 of 1 epochs are done; last entry: step 4 in epoch 1")
    assert path.exists()


def test_table_in_a_terminal() -> None:
    import io

    from rich.console import Console

    from rnndyn_fast.train import EpochMetrics, RichReporter

    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    with RichReporter(console) as reporter:
        reporter.start("epoch 1/3", 10)
        reporter.advance(10, "loss 1.0")
        reporter.epoch(EpochMetrics(1, 1.5, (0.25, 0.5), 1.25, (0.125, 0.75), 321.0, 40.0), 3)
    said = console.file.getvalue()  # type: ignore[attr-defined]
    for text in ("1/3", "1.500", "25 50", "12 75", "321", "0:01:20"):
        assert text in said


def test_tensorboard(images: Path, tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = tmp_path / "run"
    run(images, out, tensorboard=True)
    run(images, out, tensorboard=True, epochs=2, resume=True)
    events = EventAccumulator(str(out / "tensorboard")).Reload()
    named = {"step/loss", "step/lr", "step/grad_norm/all", "epoch/val_loss", "epoch/norm/v2/t1", "epoch/dead/v2/t0"}
    assert named <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("step/loss")] == [1, 2, 4, 6, 7, 9]
    assert [event.step for event in events.Scalars("epoch/val_loss")] == [5, 10]


def test_weights_and_biases_offline(images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run(images, tmp_path / "run", wandb="tests")
    assert list((tmp_path / "run" / "wandb").glob("offline-run-*/*.wandb"))


@pytest.mark.parametrize(("option", "module"), [({"tensorboard": True}, "tensorboard"), ({"wandb": "p"}, "wandb")])
def test_absent_watchers_name_the_extra(
    option: dict[str, Any], module: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sys

    for name in [name for name in sys.modules if name.split(".")[0] == module or name.startswith("torch.utils.tensorboard")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=rf'pip install "rnndyn-fast\[{module}\]"'):
        run(images, tmp_path / "run", **option)


# ---------------------------------------------------------------- other devices, other loops


def test_gpus_of_other_makers_run_on_the_reference_with_one_warning() -> None:
    for name in ("mps", "xpu:0"):
        with pytest.warns(UserWarning, match="there are no kernels for .* GPUs: networks run on the reference backend there") as caught:
            assert backend_on(torch.device(name), None) == "reference"
        assert len(caught) == 1
        with pytest.raises(ValueError, match=f"backend: on {name} expected reference, got 'native'"):
            backend_on(torch.device(name), "native")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert backend_on(torch.device("mps"), "reference") == "reference"
        assert backend_on(CPU, None) is None


def test_plain_loop_and_lightning_train_alike(tmp_path: Path) -> None:
    """The networks are modules as any other."""
    lightning = pytest.importorskip("lightning")
    x, labels = torch.rand(12, 3, 16, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 5
    plain = blt_net()
    optimizer = torch.optim.AdamW(plain.parameters(), lr=1e-2)
    for _ in range(2):
        for rows in torch.arange(12).split(4):
            optimizer.zero_grad()
            loss_over_time(plain(x[rows]), labels[rows]).backward()
            optimizer.step()

    class Module(lightning.LightningModule):  # type: ignore[name-defined, misc]
        def __init__(self) -> None:
            super().__init__()
            self.net = blt_net()

        def training_step(self, batch: Any, index: int) -> Any:
            images, answers = batch
            return loss_over_time(self.net(images), answers)

        def configure_optimizers(self) -> Any:
            return torch.optim.AdamW(self.parameters(), lr=1e-2)

    module = Module()
    batches = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(x, labels), batch_size=4)
    trainer = lightning.Trainer(
        max_epochs=2, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches)
    for (name, one), two in zip(plain.named_parameters(), module.net.parameters(), strict=True):
        torch.testing.assert_close(one, two, msg=name)


def blt_net() -> Any:
    torch.manual_seed(1)
    return blt_net_64(timesteps=2, image_size=16, widths=(2, 2, 4, 4, 8), num_classes=5, topdown_connections=False)
