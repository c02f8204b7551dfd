"""Training and extraction on a device: which one, in what precision, by CUDA graphs; what goes wrong, with fakes where there is no GPU."""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from device_rollouts import DEVICE, in_harness, on_a_device
from test_cuda_graphs import FakeGraphs
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.analysis import ReadoutZoneResult
from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.extract import extract
from rnndyn_fast.extract.run import network_forward
from rnndyn_fast.job_device import check_precision, choose_device, in_precision, to_device
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import cuda_module
from rnndyn_fast.train import QuietReporter, TrainConfig, read_checkpoint, read_metrics, save_checkpoint, train
from rnndyn_fast.train.loop import _Run
from rnndyn_fast.train.optimizers import load_optimizer, make_optimizer
from rnndyn_fast.train.steps import Steps

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
TINY: dict[str, Any] = {"widths": (4, 6, 8, 10, 12), "timesteps": 3, "epochs": 2, "batch_size": 40, "lr": 3e-3, "augment": "none"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=40, num_test=20, num_testplus=40)


def run(images: Path, out: Path, **options: Any) -> Path:
    return train(TrainConfig(data=str(images), out=str(out), **{**TINY, **options}), reporter=QuietReporter())


# ---------------------------------------------------------------- devices


@in_harness
@pytest.mark.parametrize(
    ("build", "count", "error", "name", "message"),
    [
        (None, 0, None, "cuda", r"none that torch can use \(torch .* is built without CUDA\), got cuda$"),
        (
            "13.0",
            0,
            "Found no NVIDIA driver on your system. Please check that",
            "cuda:0",
            r"none .* \(Found no NVIDIA driver on your system\)",
        ),
        ("13.0", 0, "The NVIDIA driver on your system is too old (found version 11040)", "cuda", r"\(The NVIDIA driver .* is too old"),
        ("13.0", 0, None, "cuda", r"none that torch can use \(CUDA_VISIBLE_DEVICES='' shows none\)"),
        ("13.0", 1, None, "cuda:1", r"this machine's CUDA devices are cuda:0, got cuda:1"),
        ("13.0", 4, None, "cuda:7", r"this machine's CUDA devices are cuda:0 to cuda:3, got cuda:7"),
        ("13.0", 4, None, "gpu", r"device: expected cpu, cuda or cuda:1, ..., mps, or xpu or xpu:1, ..., got 'gpu'"),
        ("13.0", 4, None, "mps", r"device: of Apple's GPUs this machine has none that torch .* can use, got mps"),
        ("13.0", 4, None, "xpu:1", r"device: of Intel's GPUs this machine has none that torch .* can use, got xpu:1"),
    ],
)
def test_a_device_that_is_not_there_says_why(
    build: str | None, count: int, error: str | None, name: str, message: str, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And nothing is written."""

    def init() -> None:
        if error is not None:
            raise RuntimeError(error)

    monkeypatch.setattr(torch.version, "cuda", build)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: count)
    monkeypatch.setattr(torch.cuda, "init", init)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    for work in (lambda: choose_device(name), lambda: run(images, tmp_path / "run", device=name)):
        with pytest.raises(ValueError, match=message):
            work()
    assert not (tmp_path / "run").exists()


@in_harness
def test_the_device_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU where there is one; of several processes of a machine each has its own."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert choose_device() == CPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device() == choose_device("cuda") == torch.device("cuda:1")
    assert choose_device("cpu") == CPU


@in_harness
def test_the_command_line_says_it_in_one_line(images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    status = main(["train", f"--data={images}", f"--out={tmp_path / 'run'}", "--device", "cuda:3", "--epochs", "1"])
    said = capsys.readouterr().err
    assert status != 0
    assert "device: this machine's CUDA devices are none that torch can use" in said
    assert "Traceback" not in said


@in_harness
def test_too_old_a_device_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """It computes with PyTorch's operations, with a warning, unless our kernels were asked for."""
    from rnndyn_fast.ops import core

    monkeypatch.setattr(core, "on_device", lambda tensor: True)
    monkeypatch.setattr(cuda_module, "unavailable", None)
    monkeypatch.setattr(cuda_module, "capability", lambda device: (7, 0))
    net = blt_net_64(timesteps=2, image_size=16, widths=(2, 2, 4, 4, 8), num_classes=5, topdown_connections=False)
    x = torch.rand(1, 3, 16, 16)
    with pytest.warns(UserWarning, match=r"compute capability 7.0; the kernels need 8.0 or later"):
        net(x)
    net.backend = "native"
    with pytest.raises(ValueError, match=r'backend="native": image: cpu has compute capability 7.0; the kernels need 8.0 or later'):
        net(x)


@in_harness
def test_doctor_names_devices_and_why_there_are_none(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    assert main(["doctor"]) == 0
    assert "no device that torch can use (torch " in capfd.readouterr().out
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: ("Tesla V100", "NVIDIA H100")[index])
    monkeypatch.setattr(cuda_module, "capability", lambda device: ((7, 0), (9, 0))[device.index])
    monkeypatch.setattr(cuda_module, "unavailable", None)
    monkeypatch.setattr(cuda_module, "build_info", lambda: {"nvcc": "13.0", "devices": 2})
    for error, said_of_it in ((None, ""), ("the driver is too old", "; the driver is too old: networks run in PyTorch's operations there")):
        monkeypatch.setattr(cuda_module, "device_error", lambda index, error=error: error)
        assert main(["doctor"]) == 0
        said = capfd.readouterr().out
        assert "Tesla V100, compute capability 7.0; too old for the kernels, which need 8.0" in said
        assert f"NVIDIA H100, compute capability 9.0{said_of_it}\n" in said
    monkeypatch.setattr(cuda_module, "build_info", lambda: {"nvcc": "13.0", "devices": 0})
    assert main(["doctor"]) == 0
    assert "nvcc 13.0, devices 0; the driver is too old\n" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("precision", "device", "message"),
    [
        ("float8", CUDA, r"precision: expected one of float32, float16, bfloat16, got 'float8'"),
        ("float16", CPU, r"precision: float16 needs a CUDA device, got cpu; bfloat16 and float32 run on the CPU too"),
    ],
)
def test_bad_precisions_are_refused(precision: str, device: torch.device, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_precision(precision, device)


def test_half_precision_on_the_cpu_is_refused_before_anything_is_written(images: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="precision: float16 needs a CUDA device, got cpu"):
        run(images, tmp_path / "run", device="cpu", precision="float16")
    assert not (tmp_path / "run").exists()


def test_batches_reach_a_gpu_by_pinned_memory() -> None:
    calls = []

    class Batch:
        device = CPU

        def pin_memory(self) -> Batch:
            calls.append("pin_memory")
            return self

        def to(self, device: torch.device, **options: bool) -> Batch:
            calls.append((device, options))
            return self

    to_device(Batch(), CUDA)  # type: ignore[arg-type]
    to_device(Batch(), CPU)  # type: ignore[arg-type]
    assert calls == ["pin_memory", (CUDA, {"non_blocking": True}), (CPU, {})]


# ---------------------------------------------------------------- steps


def network() -> Any:
    torch.manual_seed(1)
    return blt_net_64(timesteps=2, image_size=16, widths=(2, 2, 4, 4, 8), num_classes=5, topdown_connections=False)


def loss_of(log_probs: Tensor, labels: Tensor) -> Tensor:
    return functional.nll_loss(log_probs.flatten(0, 1), labels.repeat(len(log_probs)))


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.rand(4 - i % 2, 3, 16, 16, generator=generator), torch.arange(4 - i % 2)) for i in range(count)]


def steps_of(net: Any, **options: Any) -> Steps:
    def penalty() -> Tensor:
        return 1e-2 * torch.stack([p.square().sum() for p in net.parameters()]).sum()

    def halve() -> None:
        for p in net.parameters():
            if p.grad is not None:
                p.grad.mul_(0.5)

    given: dict[str, Any] = {"penalty": penalty, "before_update": halve, **options}
    return Steps(net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.5), loss_of, CPU, **given)


@in_harness
def test_graphed_steps_are_steps() -> None:
    """Losses, correct labels and parameters of training as it ever was, with CUDA graphs and without; two shapes of a batch."""
    plain = network()
    optimizer = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.5)
    nets = [network() for _ in range(2)]
    fakes: list[FakeGraphs] = []

    def capturing() -> FakeGraphs:
        fakes.append(FakeGraphs(nets[1], all_steps[1].optimizer if len(all_steps) > 1 else None))
        return fakes[-1]

    all_steps = [steps_of(nets[0])]
    all_steps.append(steps_of(nets[1], graphs=capturing))
    fakes[0].optimizer = all_steps[1].optimizer
    for x, labels in batches(10):
        log_probs = plain.run(x)
        loss = loss_of(log_probs, labels)
        optimizer.zero_grad()
        (loss + 1e-2 * torch.stack([p.square().sum() for p in plain.parameters()]).sum()).backward()
        for p in plain.parameters():
            p.grad.mul_(0.5)
        optimizer.step()
        correct = (log_probs.argmax(2) == labels).sum(1).tolist()
        for steps in all_steps:
            told = steps.train(x, labels)
            assert told.images == len(labels)
            assert told.read() == (pytest.approx(float(loss.detach()), rel=1e-5), correct)
    for net in nets:
        torch.testing.assert_close(dict(net.named_parameters()), dict(plain.named_parameters()), rtol=1e-5, atol=1e-6)
    assert fakes[0].captured == 2
    x, labels = batches(1)[0]
    with torch.inference_mode():
        found = [[steps.evaluate(x, labels).read() for _ in range(3)] for steps in all_steps]
    assert found[0] == found[1]
    assert fakes[1].captured == 1


def test_an_overflow_skips_one_step_only() -> None:
    """With a scaler: gradients that ``before_update`` meets are unscaled; infinite ones change no parameter and lower the scale."""
    net, plain = network(), network()
    steps = steps_of(net, penalty=None)
    steps.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x, labels = batches(1)[0]
    steps_of(plain, penalty=None).train(x, labels)
    steps.train(x, labels)
    torch.testing.assert_close(dict(net.named_parameters()), dict(plain.named_parameters()), rtol=1e-5, atol=1e-6)
    before = copy.deepcopy(net.state_dict())
    steps.loss = lambda log_probs, labels: 100 * loss_of(log_probs, labels)
    steps.scaler.update(2.0**127)
    steps.train(x, labels)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert steps.scaler.get_scale() == 2.0**126


def test_bfloat16_on_the_cpu_is_autocast(monkeypatch: pytest.MonkeyPatch) -> None:
    net = network()
    seen = []
    once = net.run
    monkeypatch.setattr(net, "run", lambda *args, **options: seen.append(torch.is_autocast_enabled("cpu")) or once(*args, **options))
    x, labels = batches(1)[0]
    for precision in ("float32", "bfloat16"):
        steps = Steps(net, torch.optim.SGD(net.parameters(), lr=0.0), loss_of, CPU, precision)
        assert steps.scaler is None
        steps.train(x, labels)
    assert seen == [False, True]
    with in_precision("bfloat16", CPU):
        assert torch.get_autocast_dtype("cpu") == torch.bfloat16


def test_a_gpu_is_asked_about_a_batch_when_it_has_the_next() -> None:
    order: list[str] = []
    late = {CUDA: 1, CPU: 0}

    class Told:
        def __init__(self, number: int) -> None:
            self.number = number

    def step(batch: int) -> Any:
        order.append(f"s{batch}")
        return Told(batch)

    for device, expected in ((CUDA, "s0 s1 r0 s2 r1 r2"), (CPU, "s0 r0 s1 r1 s2 r2")):
        order.clear()
        outcomes: Any = _Run.outcomes
        for told in outcomes(SimpleNamespace(late=late[device]), step, range(3)):
            order.append(f"r{told.number}")
        assert order == expected.split()
    order.clear()  # what was begun is asked about before a checkpoint
    for told in outcomes(SimpleNamespace(late=1), step, range(3), lambda: order[-2:] == ["s1", "r0"] or order[-1] == "s1"):
        order.append(f"r{told.number}")
    assert order == ["s0", "s1", "r0", "r1", "s2", "r2"]


# ---------------------------------------------------------------- from device to device


def test_an_optimiser_goes_from_device_to_device() -> None:
    """What a GPU's is asked for beside, and the CPU's must not have."""
    net, config = network(), TrainConfig(data="d", out="o", lr_warmup_steps=3)
    optimizer = make_optimizer(config, net, {}, CPU)
    on_gpu = optimizer.state_dict()
    for group in on_gpu["param_groups"]:
        group |= {"fused": True, "capturable": True, "lr": torch.tensor(2e-3)}
    load_optimizer(optimizer, on_gpu)
    assert [(g["fused"], g["capturable"], g["lr"]) for g in optimizer.param_groups] == [(None, False, pytest.approx(2e-3))]
    assert not isinstance(optimizer.param_groups[0]["lr"], Tensor)
    theirs = torch.optim.Adam(net.parameters(), lr=torch.tensor(1e-3), fused=True, capturable=True)
    rate = theirs.param_groups[0]["lr"]
    load_optimizer(theirs, {**optimizer.state_dict()})
    group = theirs.param_groups[0]
    assert (group["fused"], group["capturable"], float(group["lr"])) == (True, True, pytest.approx(2e-3))
    assert group["lr"] is rate  # graphs read it


def test_a_run_goes_on_on_the_cpu(images: Path, tmp_path: Path) -> None:
    """A checkpoint as a GPU leaves it: the same run as one that never left."""
    whole = run(images, tmp_path / "whole", device="cpu")
    last = run(images, tmp_path / "parts", device="cpu", epochs=1)
    contents = read_checkpoint(last)
    for group in contents["optimizer"]["param_groups"]:
        group |= {"fused": True, "capturable": True}
    contents["config"] |= {"device": "cuda:1"}
    save_checkpoint(last, {k: v for k, v in contents.items() if k not in ("format", "versions")})
    parts = run(images, tmp_path / "parts", device="cpu", resume=True)
    one, two = (read_checkpoint(path)["state_dict"] for path in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)
    with pytest.raises(ValueError, match="precision was 'float32', is 'bfloat16'"):
        run(images, tmp_path / "parts", device="cpu", resume=True, precision="bfloat16")


@in_harness
def test_extraction_by_graphs_is_extraction() -> None:
    net = network().eval()
    mean, std = np.full(3, 120.0), np.full(3, 60.0)
    fake = FakeGraphs(net)
    plain, graphed = network_forward(net, ("gap", "v4"), mean, std), network_forward(net, ("gap", "v4"), mean, std, graphs=fake)
    for i in range(3):
        shown = (255 * torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(i))).to(torch.uint8)
        with torch.inference_mode():
            ours, theirs = graphed(shown), plain(shown)
        torch.testing.assert_close(ours.log_probs, theirs.log_probs)
        torch.testing.assert_close(dict(ours.areas), dict(theirs.areas))
    assert (fake.eager, fake.captured) == (1, 1)


def test_extraction_in_bfloat16_says_so(images: Path, tmp_path: Path) -> None:
    checkpoint = run(images, tmp_path / "run", device="cpu", epochs=1)
    results = {}
    for precision in ("float32", "bfloat16"):
        out = extract(checkpoint, images, out=tmp_path / f"{precision}.h5", device="cpu", precision=precision, reporter=QuietReporter())
        results[precision] = ReadoutZoneResult.load(out)
    assert "precision" not in results["float32"].descriptors
    assert results["bfloat16"].descriptors["precision"] == "bfloat16"
    assert results["bfloat16"].n == results["float32"].n == 40
    with pytest.raises(ValueError, match="precision: float16 needs a CUDA device, got cpu"):
        extract(checkpoint, images, out=tmp_path / "no.h5", device="cpu", precision="float16")


@on_a_device
@pytest.mark.parametrize("precision", ["float32", "float16", "bfloat16"])
def test_training_and_extraction_on_a_device(precision: str, images: Path, tmp_path: Path) -> None:
    """The loss falls as on the CPU, graphs or not; the checkpoint goes on on the CPU; extraction gives the same groups within reason."""
    device = str(DEVICE)
    on_cpu = [row.train_loss for row in read_metrics(run(images, tmp_path / "cpu", device="cpu", epochs=5).parent)]
    for graphs in (True, False):
        out = tmp_path / f"graphs_{graphs}"
        last = run(images, out, device=device, precision=precision, cuda_graphs=graphs, epochs=5)
        losses = [row.train_loss for row in read_metrics(last.parent)]
        assert losses == pytest.approx(on_cpu, rel=0.05)
    result = extract(last, images, out=tmp_path / "r.h5", device=device, precision=precision, reporter=QuietReporter())
    assert ReadoutZoneResult.load(result).n == 40
    if precision == "float32":
        assert len(read_metrics(run(images, out, device="cpu", epochs=6, resume=True).parent)) == 6
