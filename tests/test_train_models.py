"""Training of every family of networks: options, recipes, losses, learning rates, and checkpoints in the other commands."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from torch import nn
from torch.nn import functional

from rnndyn_fast.analysis import ReadoutZoneResult
from rnndyn_fast.cli import main
from rnndyn_fast.data import ImageFile, augmentation, make_dataset
from rnndyn_fast.data.augmentation import blur, flip
from rnndyn_fast.extract import extract, react
from rnndyn_fast.models import BLTVS, ConvRNN, blt_vs
from rnndyn_fast.train import (
    QuietReporter,
    TrainConfig,
    config_yaml,
    learning_rate,
    load_checkpoint,
    loss_over_time,
    read_checkpoint,
    read_metrics,
    train,
)
from rnndyn_fast.train.metrics import EpochMetrics
from rnndyn_fast.train.objective import clip_gradients, inverse_frequencies
from rnndyn_fast.train.rates import cuts_by_trend
from rnndyn_fast.train.recipes import RECIPES

SHALLOW = {f"conv{i}": 2 for i in range(1, 6)}
QUICK: dict[str, Any] = {"epochs": 1, "batch_size": 10, "augment": "none", "threads": 1}
# Every kind of network at the smallest size that it takes, with its number of answers.
FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "rgc_shallow": ({"model_options": {"widths": SHALLOW}, "timesteps": 8, "loss": "last"}, 3),
    "convrnn": ({"model_options": {"name": "gru_shallow_tmaxconf", "widths": SHALLOW}, "timesteps": 6}, 1),
    "rcnn_sat": ({"model_options": {"width_divisor": 32}, "timesteps": 3, "weight_decay": 1e-6}, 3),
    "rcnn_sat b_d": ({"model": "rcnn_sat", "model_options": {"kind": "b_d", "width_divisor": 32}}, 1),
}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """66 px: shallow ConvRNNs take no fewer, RCNN-SAT 64."""
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=66, num_train=10, num_val=10, num_test=10, num_testplus=10)


def config(images: Path, out: Path, family: str, **options: Any) -> TrainConfig:
    given = {"model": family, **QUICK, **FAMILIES[family][0], **options}
    return TrainConfig(data=str(images), out=str(out), **given)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    return {name: train(config(images, folder / name.replace(" ", "_"), name), reporter=QuietReporter()) for name in FAMILIES}


@pytest.mark.filterwarnings("ignore:running")
@pytest.mark.parametrize("family", FAMILIES)
def test_family_trains_and_loads(family: str, trained: dict[str, Path], images: Path, tmp_path: Path) -> None:
    initial, last = (read_checkpoint(trained[family].with_name(name)) for name in ("initial.pt", "last.pt"))
    moved = [name for name, value in last["state_dict"].items() if not torch.equal(value, initial["state_dict"][name])]
    assert any(name.endswith("weight") for name in moved)
    row = read_metrics(trained[family].parent)[0]
    assert len(row.val_accuracy) == FAMILIES[family][1]
    assert last["data"]["mean"] == pytest.approx([127.5] * 3 if "rcnn" in family else [123.675, 116.28, 103.53])
    net, _ = load_checkpoint(trained[family])
    assert net.run(torch.zeros(1, 3, 66, 66)).shape == (FAMILIES[family][1], 1, 10)


@pytest.mark.filterwarnings("ignore:running")
@pytest.mark.parametrize("family", ["rgc_shallow", "rcnn_sat"])
def test_stopped_and_resumed_it_is_the_run_that_went_on(family: str, trained: dict[str, Path], images: Path, tmp_path: Path) -> None:
    whole = train(config(images, tmp_path / "whole", family, epochs=2), reporter=QuietReporter())
    stopped = tmp_path / "stopped"
    shutil.copytree(trained[family].parent, stopped)
    train(config(images, stopped, family, epochs=2, resume=True), reporter=QuietReporter())
    for name, value in read_checkpoint(whole)["state_dict"].items():
        assert torch.equal(value, read_checkpoint(stopped / "last.pt")["state_dict"][name]), name


@pytest.mark.filterwarnings("ignore:running")
def test_checkpoints_serve_the_other_commands(
    trained: dict[str, Path], images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    for family, area in (("rgc_shallow", "conv4"), ("rcnn_sat", "layer3")):
        checkpoint, out = str(trained[family]), tmp_path / family
        assert main(["extract", checkpoint, str(images), "--out", f"{out}.h5", "--areas", area, "--save", area]) == 0
        result = ReadoutZoneResult.load(f"{out}.h5")
        assert (result.n, result.timesteps) == (10, FAMILIES[family][1])
        assert main(["analyse", f"{out}.h5", "--out", f"{out}_analysis"]) == 0
        assert main(["react", checkpoint, str(images), "--out", f"{out}_react", "--split", "val"]) == 0
        recordings = tmp_path / f"{family}.npz"
        rng = np.random.default_rng(0)
        responses = rng.normal(size=(2, 10, 1, 3)) + 0.1 * rng.normal(size=(2, 10, 4, 3))
        np.savez(recordings, responses=responses, rows=np.arange(10))
        words = ["predict", f"{out}_trajectories.h5", str(recordings), "--areas", area, "--num-splits", "4", "--num-folds", "2"]
        if family == "rcnn_sat":  # (the other has states that no image has reached yet, which predict refuses)
            assert main([*words, "--out", f"{out}_predict"]) == 0, capfd.readouterr().err
        assert main(["plan", checkpoint]) == 0
        assert "multiply-adds per image" in capfd.readouterr().out


def test_react_counts_from_the_first_answer(trained: dict[str, Path], images: Path) -> None:
    result, _ = react(trained["rgc_shallow"], images, reporter=QuietReporter())
    net, _ = load_checkpoint(trained["rgc_shallow"])
    assert result.timesteps == 3
    assert result.cost is not None
    assert result.cost[-1] == net.schedule().multiplications()[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"model": "rgc_shalow"}, r"unknown model 'rgc_shalow', did you mean 'rgc_shallow'.*there are \['blt_net_64'"),
        (
            {"model": "rcnn_sat", "model_options": {"width_diviser": 8}},
            r"no option 'width_diviser', did you mean 'width_divisor'\?; options",
        ),
        ({"model": "rcnn_sat", "model_options": {"timesteps": 3}}, "'timesteps' is an option of its own"),
        ({"model": "rcnn_sat", "model_options": {"num_classes": 3}}, "'num_classes' is that of the data"),
        ({"model": "blt_vs", "widths": (1, 2, 3, 4, 5)}, "widths: is an option of blt_net, not of blt_vs"),
        ({"model_options": {"widths": [1]}}, "'widths' is an option of its own"),
        ({"loss": "first"}, "loss: expected one of"),
        ({"lr_trend": True, "lr_patience": 2}, "lr_patience, lr_trend: expected at most one"),
        ({"label_smoothing": 1.0}, "label_smoothing: expected at least 0 and below 1"),
        ({"clip": 0.0}, "clip: expected a positive"),
        ({"lr_steps": (0,)}, "lr_steps: expected epochs of at least 1"),
    ],
)
def test_bad_options_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainConfig(data="d", out="o", **options)


def test_networks_that_do_not_take_the_images_say_so(images: Path, trained: dict[str, Path], tmp_path: Path) -> None:
    for options, message in (
        ({"model": "blt_vs"}, r"model blt_vs: image_size: expected one of \[128, 224\], got 66 .*digits.h5 has 66 px and 10 categories"),
        ({"model": "convrnn"}, "missing option 'name'"),
        ({"model": "rcnn_sat", "model_options": {"kind": "c"}}, r"kind: expected one of \['b', 'bl'"),
    ):
        with pytest.raises(ValueError, match=message):
            train(TrainConfig(data=str(images), out=str(tmp_path / "run"), **QUICK, **options), reporter=QuietReporter())
        assert not (tmp_path / "run").exists()
    other = make_dataset(tmp_path / "other.h5", source="digits", size=80, num_train=10, num_val=10, num_test=10, num_testplus=10)
    with pytest.raises(ValueError, match=r"expected images of 66 px, as the network was trained on, .* has 80 px"):
        extract(trained["rcnn_sat"], other, out=tmp_path / "r.h5", reporter=QuietReporter())
    with pytest.raises(ValueError, match=r"areas: no area 'it' in this network; its areas are layer0, layer1"):
        extract(trained["rcnn_sat"], images, out=tmp_path / "r.h5", areas=("it",), reporter=QuietReporter())


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("name", sorted(RECIPES))
def test_recipes_are_configurations(name: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", name, "--data", "absent.h5", "--out", str(tmp_path / "run")]) == 2
    assert "absent.h5" in capfd.readouterr().err  # all of its options were taken
    values = yaml.safe_load(RECIPES[name].read_text())
    made = TrainConfig(data="d", out="o", **values)
    assert TrainConfig.from_dict(yaml.safe_load(config_yaml(made))) == made
    assert made.build_options()["model"] == values["model"]


def test_recipe_of_blt_net_is_the_defaults() -> None:
    assert TrainConfig(data="d", out="o", **yaml.safe_load(RECIPES["blt_net"].read_text())) == TrainConfig(data="d", out="o")


def test_unknown_recipe_names_the_nearest(capfd: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "--config", "rcnnsat", "--data", "d", "--out", "o"]) == 2
    assert "no file or recipe 'rcnnsat', did you mean 'rcnn_sat'" in capfd.readouterr().err


@pytest.mark.filterwarnings("ignore:running")
def test_recipe_of_rcnn_sat_trains_a_smaller_network(images: Path, tmp_path: Path) -> None:
    words = ["--model_options", "{kind: bl, width_divisor: 32}", "--timesteps", "2", "--epochs", "1", "--batch-size", "10"]
    assert main(["train", "--config", "rcnn_sat", "--data", str(images), "--out", str(tmp_path / "run"), *words]) == 0
    assert read_checkpoint(tmp_path / "run" / "last.pt")["config"]["lr_steps"] == [30, 60]


@pytest.mark.filterwarnings("ignore:running")
@pytest.mark.parametrize("readout_type", ["multi", "single"])
def test_blt_vs_takes_a_step_by_its_recipe(readout_type: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """At 128 px, with a few channels in place of the published ones."""
    monkeypatch.setattr("rnndyn_fast.models.blt_vs_net.CHANNELS", (2, 2, 4, 4, 4, 2, 2))
    data = make_dataset(tmp_path / "i.h5", source="digits", size=128, num_train=10, num_val=10, num_test=10, num_testplus=10)
    values = yaml.safe_load(RECIPES["blt_vs"].read_text())
    values |= {
        "model_options": {"add_feats": 2, "readout_type": readout_type},
        "timesteps": 6,
        "epochs": 1,
        "batch_size": 5,
        "lr_warmup": 1,
    }
    last = train(TrainConfig(data=str(data), out=str(tmp_path / "run"), **values, threads=1), reporter=QuietReporter())
    net, contents = load_checkpoint(last)
    assert isinstance(net, BLTVS)
    initial = read_checkpoint(last.with_name("initial.pt"))["state_dict"]
    name = "connections.Readout.readout_conv.weight"
    assert not torch.equal(initial[name], contents["state_dict"][name])
    x = torch.rand(2, 3, 128, 128)
    answers = net(x)
    assert len(answers) == (1 if readout_type == "single" else 2)
    torch.testing.assert_close(net.run(x), torch.stack(answers).log_softmax(2))
    if readout_type == "single":
        with pytest.raises(ValueError, match="readout_type 'single'"):
            react(last, data, reporter=QuietReporter())
    # (Of one answer for two states the zones are those of each step's logits.)
    path = extract(last, data, out=tmp_path / "r.h5", areas=("V4.td", "LOC.bu"), reporter=QuietReporter())
    assert ReadoutZoneResult.load(path).timesteps == 2
    if readout_type == "multi":
        assert react(last, data, reporter=QuietReporter())[0].timesteps == 2


def test_published_input_is_what_the_networks_expect() -> None:
    for model, kind in (("blt_vs", "signed"), ("rcnn_sat", "signed"), ("gru_shallow", "imagenet"), ("blt_net_64", "data")):
        made = TrainConfig(data="d", out="o", model=model)
        assert (made.normalise, made.init) == (kind, "xavier" if model == "blt_net_64" else "default")
    made = TrainConfig(data="d", out="o", model="rgc_intermediate_t22_tmaxconf", model_options={"cell_channels": 8})
    assert made.build_options() == {
        "model": "convrnn", "name": "rgc_intermediate_t22_tmaxconf", "cell_channels": 8, "backend": None, "engine": "auto"
    }  # fmt: skip


# ---------------------------------------------------------------- loss, clipping, learning rates, augmentation


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_losses_are_torchs(smoothing: float, weighted: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4, 6, 5, dtype=torch.float64, generator=generator)
    labels = torch.randint(0, 5, (6,), generator=generator)
    weights = torch.rand(5, dtype=torch.float64, generator=generator) if weighted else None
    each = torch.stack([functional.cross_entropy(z, labels, weights, label_smoothing=smoothing) for z in logits])
    for over, expected in (("sum", each.sum()), ("mean", each.mean()), ("last", each[-1])):
        loss = loss_over_time(logits.log_softmax(2), labels, over, label_smoothing=smoothing, class_weights=weights)
        torch.testing.assert_close(loss, expected)


def test_weights_of_classes_are_inverse_frequencies() -> None:
    weights = inverse_frequencies(np.array([0, 0, 0, 1, 2, 2]), 3)
    torch.testing.assert_close(weights, torch.tensor([2.0, 6.0, 3.0]) / 11)
    with pytest.raises(ValueError, match="category 3 has no training images"):
        inverse_frequencies(np.array([0, 1, 2]), 4)


def test_clipping_is_by_tensor() -> None:
    layer = nn.Linear(3, 2)
    layer.weight.grad, layer.bias.grad = torch.full((2, 3), 5.0), torch.full((2,), 1e-6)
    before = layer.weight.grad.clone()
    clip_gradients(layer.parameters(), 0.1)
    most = 0.1 * (layer.weight.norm() + 1e-3)
    torch.testing.assert_close(layer.weight.grad, before * most / (before.norm() + 1e-3))
    assert torch.equal(layer.bias.grad, torch.full((2,), 1e-6))


def rows(losses: list[float]) -> list[EpochMetrics]:
    return [EpochMetrics(k + 1, loss, (0.5,), loss, (0.5,), 1.0, 1.0) for k, loss in enumerate(losses)]


def test_learning_rates() -> None:
    steps = TrainConfig(data="d", out="o", lr=1.0, lr_steps=(2, 3))
    assert [learning_rate(steps, rows([1.0] * n)) for n in range(5)] == pytest.approx([1, 1, 0.1, 0.01, 0.01])
    warm = TrainConfig(data="d", out="o", lr=1e-3, lr_warmup=5, lr_trend=True)
    rates = [learning_rate(warm, rows([1.0] * n)) for n in range(20)]
    assert rates[:5] == pytest.approx([1e-5, 2.575e-4, 5.05e-4, 7.525e-4, 1e-3])
    # A flat loss: five epochs fill the window, the third without a fall ends it: seven epochs a cut.
    assert rates[5:12] == pytest.approx([1e-3] * 7)
    assert rates[12:19] == pytest.approx([5e-4] * 7)
    assert rates[19] == pytest.approx(2.5e-4)
    assert cuts_by_trend([0.9**k for k in range(50)]) == 0
    assert cuts_by_trend([1.0] * 6 + [0.5] * 5) == 0  # the fall comes before the third epoch in a row


def test_training_ends_with_the_learning_rate(images: Path, tmp_path: Path) -> None:
    made = config(images, tmp_path / "run", "rcnn_sat", epochs=5, lr=1e-3, lr_steps=(1, 2), lr_least=1e-4)
    train(made, reporter=QuietReporter())
    assert len(read_metrics(tmp_path / "run")) == 1


def test_last_step_decides_what_is_best_where_the_loss_is_its_own(trained: dict[str, Path]) -> None:
    contents = read_checkpoint(trained["rgc_shallow"].with_name("best.pt"))
    assert contents["config"]["loss"] == "last"
    net, _ = load_checkpoint(trained["rgc_shallow"])
    assert isinstance(net, ConvRNN)


def test_flip_and_blur_change_half_of_the_images(images: Path) -> None:
    with ImageFile(images) as file:
        pixels = torch.cat([file.split(name).read(np.arange(10))[0] for name in ("train", "test")])
    generator = torch.Generator().manual_seed(1)
    flipped = flip(pixels, generator)
    same = (flipped == pixels).flatten(1).all(1)
    assert 3 < int(same.sum()) < 17
    assert torch.equal(flipped[~same], pixels[~same].flip(3))
    blurred = blur(pixels, generator)
    changed = (blurred != pixels).flatten(1).any(1)
    assert 3 < int(changed.sum()) < 17
    stripes = torch.zeros(40, 3, 28, 28, dtype=torch.uint8)
    stripes[..., ::2] = 200  # vertical stripes: nothing changes along a column
    assert torch.equal(blur(stripes, generator), stripes)
    wide = blur(stripes.transpose(2, 3).contiguous(), generator).float()
    assert (wide.std(2) < 50).flatten(1).all(1).any()
    with pytest.raises(ValueError, match="blur takes images of at least 14 px, got 8"):
        blur(torch.zeros(1, 3, 8, 8, dtype=torch.uint8), generator)
    with pytest.raises(ValueError, match="augment: expected one of"):
        augmentation("crop")


def test_single_readout_has_its_weights_in_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rnndyn_fast.models.blt_vs_net.CHANNELS", (2, 2, 4, 4, 4, 2, 2))
    net = blt_vs(6, 3, 1, image_size=128, readout_type="single", bio_unroll=False, backend="native")
    with torch.no_grad():
        net.readout_weights.copy_(torch.arange(6.0))
        x = torch.rand(1, 3, 128, 128)
        every = net.run(x, return_representations=True)[1][..., :3]
    expected = (torch.softmax(torch.arange(6.0), 0)[:, None, None] * every).sum(0)
    torch.testing.assert_close(net(x)[0], expected)
