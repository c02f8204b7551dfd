"""Training: configuration, metrics, checkpoints, resuming."""

from __future__ import annotations

import csv
import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from rnndyn_fast.data import ImageFile, make_dataset
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.program.describe import describe
from rnndyn_fast.train import (
    QuietReporter,
    TrainConfig,
    config_yaml,
    initialise,
    limited,
    load_checkpoint,
    loss_over_time,
    read_checkpoint,
    read_metrics,
    save_checkpoint,
    train,
)
from rnndyn_fast.train import loop as train_loop
from rnndyn_fast.train import state as train_state

TINY: dict[str, Any] = {
    "widths": (4, 6, 8, 10, 12),
    "timesteps": 3,
    "epochs": 2,
    "batch_size": 32,
    "lr": 3e-3,
    "backend": "reference",
    "threads": 1,
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=40, num_test=20, num_testplus=40)


def run(images: Path, out: Path, **options: Any) -> Path:
    return train(TrainConfig(data=str(images), out=str(out), **{**TINY, **options}), reporter=QuietReporter())


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return run(images, tmp_path_factory.mktemp("run") / "plain")


def states_equal(one: Any, two: Any) -> bool:
    """Whether two nested structures hold the same tensors and values."""
    if isinstance(one, torch.Tensor):
        return torch.equal(one, two)
    if isinstance(one, dict):
        return one.keys() == two.keys() and all(states_equal(one[k], two[k]) for k in one)
    if isinstance(one, list | tuple):
        return len(one) == len(two) and all(map(states_equal, one, two))
    return bool(one == two)


def test_defaults_are_the_published_recipe() -> None:
    config = TrainConfig(data="d", out="o")
    assert (config.lr, config.batch_size, config.val_batch_size, config.epochs) == (1e-3, 1024, 250, 60)
    assert (config.init, config.augment, config.timesteps) == ("xavier", "trivialaugmentwide", 10)
    assert (config.lateral_connections, config.topdown_connections, config.classifier_bias) == (True, False, False)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"timesteps": 0}, ValueError, "timesteps: expected at least 1, got 0"),
        ({"epochs": 1.5}, TypeError, "epochs: expected int"),
        ({"batch_size": True}, TypeError, "batch_size: expected int"),
        ({"lr": float("nan")}, ValueError, "lr: expected a positive finite number"),
        ({"lr": 0.0}, ValueError, "lr: expected a positive"),
        ({"widths": (1, 2)}, ValueError, "widths: expected 5 positive numbers"),
        ({"widths": "12345"}, TypeError, "widths: expected"),
        ({"backend": "fast"}, ValueError, "backend: expected one of"),
        ({"engine": "fft"}, ValueError, "engine: expected one of"),
        ({"LT_interaction": "divisive"}, ValueError, "LT_interaction: expected one of"),
        ({"max_train_images": 0}, ValueError, "max_train_images: expected at least 1"),
        ({"resume": True, "overwrite": True}, ValueError, "resume, overwrite"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainConfig(data="d", out="o", **options)


def test_config_round_trips_through_yaml() -> None:
    config = TrainConfig(data="d.h5", out="o", widths=(1, 2, 3, 4, 5), norm_type="None", backend="reference", lr=1e-4)
    assert TrainConfig.from_dict(yaml.safe_load(config_yaml(config))) == config
    with pytest.raises(ValueError, match=r"unknown fields \['depth'\], missing fields \['out'\]"):
        TrainConfig.from_dict({"data": "d", "depth": 3})


def test_loss_is_the_sum_over_time_of_mean_nll() -> None:
    log_probs = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).log_softmax(2)
    labels = torch.tensor([0, 3, 4, 1])
    expected = 0.0
    for t in range(3):
        expected += -sum(float(log_probs[t, n, labels[n]]) for n in range(4)) / 4
    assert loss_over_time(log_probs, labels).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        (torch.tensor([0, -1, 4, 1]), ValueError, r"labels: expected classes 0 .. 4, got -1"),
        (torch.tensor([0, 5, 4, 1]), ValueError, r"labels: expected classes 0 .. 4, got 5"),
        (torch.tensor([0.0, 3.0, 4.0, 1.0]), TypeError, r"labels: expected integers \[N\], got torch.float32"),
        (torch.tensor([True, False, True, True]), TypeError, r"labels: expected integers \[N\], got torch.bool"),
        (torch.tensor([0, 3, 4]), ValueError, r"labels: expected \[N\] = \[4\] or \[N, classes\] = \[4, 5\], got \[3\]"),
        (torch.zeros(4, 4), ValueError, r"labels: expected \[N\] = \[4\] or"),
        ([0, 3, 4, 1], TypeError, r"labels: expected a tensor, got list"),
    ],
)
def test_labels_that_are_none(labels: Any, error: type[Exception], message: str) -> None:
    log_probs = torch.randn(3, 4, 5, generator=torch.Generator().manual_seed(0)).log_softmax(2)
    with pytest.raises(error, match=message):
        loss_over_time(log_probs, labels)
    whole = loss_over_time(log_probs, torch.tensor([0, 3, 4, 1]))
    assert torch.equal(loss_over_time(log_probs, torch.tensor([0, 3, 4, 1], dtype=torch.int32)), whole)


def test_initialise_is_xavier_but_for_transposed_convolutions() -> None:
    torch.manual_seed(0)
    net = blt_net_64(image_size=16, widths=(4, 6, 12, 24, 48), topdown_connections=True, num_classes=10)
    before = {name: value.clone() for name, value in net.state_dict().items()}
    initialise(net)
    for name, module in net.named_modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            fan_in, fan_out = nn.init._calculate_fan_in_and_fan_out(module.weight)
            bound = math.sqrt(6 / (fan_in + fan_out))
            assert 0.9 * bound < module.weight.abs().max() <= bound, name
    kept = [name for name in before if "top_down" in name or "_ln" in name or name.endswith("bias")]
    assert any("top_down" in name for name in kept)
    for name in kept:
        assert torch.equal(before[name], net.state_dict()[name]), name


def test_limited_spreads_over_the_split(images: Path) -> None:
    with ImageFile(images) as file:
        split = file.split("train")
        assert limited(split, None) is split
        assert limited(split, 1000) is split
        part = limited(split, 7)
        assert len(part) == 7
        _, labels = part.read(torch.arange(7).numpy())
        assert labels.tolist() == [int(split.labels[k * 96 // 7]) for k in range(7)]


def test_run_writes_what_it_says(trained: Path, images: Path) -> None:
    folder = trained.parent
    assert trained == folder / "last.pt"
    names = {"initial.pt", "last.pt", "best.pt", "metrics.csv", "metrics.jsonl", "steps.jsonl", "train.yaml"}
    assert {path.name for path in folder.iterdir()} == names
    rows = read_metrics(folder)
    assert [row.epoch for row in rows] == [1, 2]
    assert all(len(row.train_accuracy) == len(row.val_accuracy) == 3 for row in rows)
    assert rows[1].train_loss < rows[0].train_loss < 3 * math.log(10) + 1
    with open(folder / "metrics.csv", newline="") as stream:
        table = list(csv.DictReader(stream))
    assert [float(line["val_loss"]) for line in table] == [row.val_loss for row in rows]
    assert float(table[1]["val_accuracy_t2"]) == rows[1].val_accuracy[2]
    best = max(rows, key=lambda row: row.mean_val_accuracy)
    assert read_checkpoint(folder / "best.pt")["epoch"] == best.epoch
    contents = read_checkpoint(trained)
    with ImageFile(images) as file:
        assert contents["data"]["mean"] == list(file.mean)
        assert contents["data"]["categories"] == list(file.categories)
    assert contents["versions"]["torch"] == torch.__version__
    # A configuration on record never resumes or replaces anything when it is used again.
    assert TrainConfig.from_dict(yaml.safe_load((folder / "train.yaml").read_text())).overwrite is False


def test_initial_checkpoint_is_the_untrained_network(trained: Path) -> None:
    initial, contents = load_checkpoint(trained.with_name("initial.pt"), backend="reference")
    final, _ = load_checkpoint(trained, backend="reference")
    assert contents["epoch"] == 0
    assert not torch.equal(initial.readout.weight, final.readout.weight)


@pytest.mark.parametrize("backend", ["reference", "native"])
def test_resumed_run_equals_an_uninterrupted_one(backend: str, trained: Path, images: Path, tmp_path: Path) -> None:
    class Killed(Exception):
        pass

    class KillInSecondEpoch(QuietReporter):
        def start(self, text: str, total: int) -> None:
            if text.startswith("epoch 2"):
                raise Killed

    out = tmp_path / "run"
    if backend != "reference":
        trained = run(images, tmp_path / "plain", backend=backend)
    config = TrainConfig(data=str(images), out=str(out), **{**TINY, "backend": backend})
    with pytest.raises(Killed):
        train(config, reporter=KillInSecondEpoch())
    assert read_checkpoint(out / "last.pt")["epoch"] == 1
    run(images, out, resume=True, backend=backend)

    plain, resumed = read_checkpoint(trained), read_checkpoint(out / "last.pt")
    for name in ("state_dict", "optimizer", "schedule", "progress", "epoch"):
        assert states_equal(plain[name], resumed[name]), name
    timed = ("seconds", "images_per_s")
    for one, two in zip(read_metrics(trained.parent), read_metrics(out), strict=True):
        numbers = [{k: v for k, v in row.to_dict().items() if k not in timed} for row in (one, two)]
        assert numbers[0] == numbers[1]


def test_other_seed_gives_another_network(trained: Path, images: Path, tmp_path: Path) -> None:
    other = read_checkpoint(run(images, tmp_path / "run", seed=1, epochs=1).with_name("initial.pt"))
    assert not states_equal(other["state_dict"], read_checkpoint(trained.with_name("initial.pt"))["state_dict"])


def test_run_killed_in_its_first_epoch_resumes_from_the_initial_checkpoint(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "run"

    def killed(*_: Any) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_loop._Run, "epoch", killed)
        with pytest.raises(KeyboardInterrupt):
            run(images, out, epochs=1)
    assert not (out / "last.pt").exists()
    assert read_checkpoint(run(images, out, epochs=1, resume=True))["epoch"] == 1


def test_resume_refuses_other_options_and_other_data(trained: Path, images: Path, tmp_path: Path) -> None:
    folder = trained.parent
    before = (folder / "last.pt").read_bytes()
    with pytest.raises(ValueError, match=r"resume: .*other options: timesteps was 3, is 4; lr was 0.003, is 0.1"):
        run(images, folder, resume=True, epochs=3, timesteps=4, lr=0.1)
    other = make_dataset(tmp_path / "other.h5", source="digits", size=16, num_train=60, num_val=20, num_test=20, num_testplus=20)
    with pytest.raises(ValueError, match=r"resume: mean of .* differs"):
        run(other, folder, resume=True, epochs=3)
    assert (folder / "last.pt").read_bytes() == before
    with pytest.raises(FileNotFoundError, match=r"resume: no last.pt"):
        run(images, tmp_path / "nothing", resume=True)


def test_finished_run_resumes_to_itself(trained: Path, images: Path) -> None:
    before = trained.read_bytes()
    assert run(images, trained.parent, resume=True) == trained
    assert trained.read_bytes() == before


def test_folder_in_use_is_refused_then_replaced_on_request(images: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(FileExistsError, match="is not empty"):
        run(images, out)
    assert [path.name for path in out.iterdir()] == ["notes.txt"]
    run(images, out, epochs=1, overwrite=True)
    assert (out / "notes.txt").read_text() == "mine"


def test_nothing_is_written_where_the_data_is_bad(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        run(tmp_path / "absent.h5", tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(images: Path, tmp_path: Path, monkeypatch: Any) -> None:
    out = tmp_path / "run"
    calls = 0

    def diverging(log_probs: torch.Tensor, labels: torch.Tensor, *over: str, **options: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return loss_over_time(log_probs, labels, *over, **options) * (float("nan") if calls == 6 else 1.0)

    # 3 training batches and 1 validation batch per epoch: the sixth call is batch 2 of epoch 2.
    monkeypatch.setattr(train_state, "loss_over_time", diverging)
    with pytest.raises(FloatingPointError, match=r"loss is nan in epoch 2, batch 2 of 3"):
        run(images, out)
    assert read_checkpoint(out / "last.pt")["epoch"] == 1


def test_checkpoint_survives_a_crash_while_the_next_is_written(trained: Path, tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "last.pt"
    contents = read_checkpoint(trained)
    save_checkpoint(path, contents)
    before = path.read_bytes()

    def half(target: Path, content: Any) -> None:
        with target.open("wb") as file:
            file.write(content[: len(content) // 2])
        raise OSError("disk full")

    monkeypatch.setattr(Path, "write_bytes", half)
    with pytest.raises(OSError, match="disk full"):
        save_checkpoint(path, contents)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["last.pt"]


def test_damaged_and_foreign_checkpoints_are_told_apart(trained: Path, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="no such file"):
        load_checkpoint(tmp_path / "absent.pt")
    with pytest.raises(ValueError, match=r"got the folder .*did you mean"):
        load_checkpoint(trained.parent)
    (tmp_path / "half.pt").write_bytes(trained.read_bytes()[:3000])
    (tmp_path / "text.pt").write_text("not a checkpoint")
    (tmp_path / "empty.pt").write_bytes(b"")
    for name, told in (("half", "truncated or not a PyTorch file"), ("text", "truncated or not a PyTorch file"), ("empty", "is empty")):
        with pytest.raises(ValueError, match=told):
            load_checkpoint(tmp_path / f"{name}.pt")
    torch.save(read_checkpoint(trained)["state_dict"], tmp_path / "bare.pt")
    with pytest.raises(ValueError, match=r"holds weights from elsewhere \(a state_dict\)"):
        load_checkpoint(tmp_path / "bare.pt")
    torch.save({"format": "other/1"}, tmp_path / "other.pt")
    with pytest.raises(ValueError, match=r"found 'other/1'"):
        load_checkpoint(tmp_path / "other.pt")
    contents = read_checkpoint(trained)
    for changed, message in (({"data": {}}, r"data lacks the entries \['path'"), ({"model": [1]}, "model: expected a dict, got list")):
        save_checkpoint(tmp_path / "changed.pt", {**contents, **changed})
        with pytest.raises(ValueError, match=message):
            load_checkpoint(tmp_path / "changed.pt")


def test_checkpoint_of_another_architecture_lists_what_does_not_fit(trained: Path, tmp_path: Path) -> None:
    contents = read_checkpoint(trained)
    contents["model"] = {
        **contents["model"],
        "widths": [4, 6, 8, 10, 14],
        "classifier_bias": True,
        "LT_position": "last",
    }
    save_checkpoint(tmp_path / "other.pt", contents)
    with pytest.raises(ValueError, match="another architecture") as caught:
        load_checkpoint(tmp_path / "other.pt")
    message = str(caught.value)
    assert "missing: readout.bias" in message
    assert "unexpected: v1.lateral.weight, v2.lateral.weight" in message
    assert "gap_ln.weight [12] instead of [14]" in message


def test_a_run_does_not_go_on_with_changed_layers(images: Path, trained: Path, tmp_path: Path) -> None:
    """Its network would be another than the one that was saved."""
    net, contents = load_checkpoint(trained)
    net.it_ln.eps = 0.1
    folder = tmp_path / "run"
    shutil.copytree(trained.parent, folder)
    save_checkpoint(folder / "last.pt", {**contents, "model": net.config})
    with pytest.raises(ValueError, match=r"resume: .*last.pt is of a network with changed layers \(it_ln\), which a run cannot take up"):
        run(images, folder, resume=True, epochs=3)


def test_load_checkpoint_can_unroll_longer(trained: Path) -> None:
    net, _ = load_checkpoint(trained, timesteps=5, backend="reference")
    assert not net.training
    assert net(torch.zeros(2, 3, 16, 16)).shape == (5, 2, 10)


def test_biological_unroll_trains(images: Path, tmp_path: Path) -> None:
    run(images, tmp_path / "run", unroll="biological", timesteps=8, epochs=1, max_train_images=32)
    assert len(read_metrics(tmp_path / "run")[0].val_accuracy) < 8


def test_engines_train_alike(tmp_path: Path) -> None:
    data = make_dataset(tmp_path / "digits.h5", source="digits", size=16, num_train=800, num_val=200, num_test=20, num_testplus=20)
    accuracy, losses = {}, {}
    for engine in ("direct", "auto"):
        options: dict[str, Any] = {"widths": (16,) * 5, "epochs": 4, "augment": "none", "lr": 2e-3, "backend": "native"}
        last = run(data, tmp_path / engine, engine=engine, **options)
        assert read_checkpoint(last)["model"]["engine"] == engine
        rows = read_metrics(last.parent)
        accuracy[engine], losses[engine] = rows[-1].mean_val_accuracy, rows[0].train_loss
    # The same weights and order of images: apart only by rounding, which many steps of Adam make larger.
    net, _ = load_checkpoint(tmp_path / "auto" / "last.pt")
    assert "winograd" in describe(net.schedule())
    assert losses["auto"] != losses["direct"]
    assert losses["auto"] == pytest.approx(losses["direct"], rel=1e-2)
    assert min(accuracy.values()) > 0.6
    # Two runs of 200 validation images: 0.05 is three binomial standard errors at 0.95.
    assert accuracy["auto"] == pytest.approx(accuracy["direct"], abs=0.05)


def test_engine_may_change_on_resume(trained: Path, images: Path) -> None:
    assert run(images, trained.parent, resume=True, engine="direct") == trained
    net, contents = load_checkpoint(trained, engine="winograd")
    assert (net.engine, contents["model"]["engine"]) == ("winograd", "auto")


def test_damaged_metrics_name_file_and_line(trained: Path, tmp_path: Path) -> None:
    text = (trained.parent / "metrics.jsonl").read_text()
    json.loads(text.splitlines()[0])
    (tmp_path / "metrics.jsonl").write_text(text + "{half")
    with pytest.raises(ValueError, match=r"metrics.jsonl: line 3"):
        read_metrics(tmp_path)
