"""Apple's and Intel's GPUs, of which none is here: what would go there goes to the CPU, and is noted. Nothing may ask for CUDA."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo  # it looks at names of torch.cuda, so before they are replaced
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map

from rnndyn_fast.data import make_dataset
from rnndyn_fast.extract import extract, load_results
from rnndyn_fast.job_device import choose_device
from rnndyn_fast.train import QuietReporter, TrainConfig, load_checkpoint, read_checkpoint, read_metrics, train

TINY: dict[str, Any] = {
    "widths": (2, 4, 6, 8, 10), "timesteps": 2, "epochs": 1, "batch_size": 8, "val_batch_size": 20, "lr": 3e-3, "threads": 1,
    "optimizer": "adamw", "lr_schedule": "cosine", "ema": 0.9, "mixup": 0.2, "clip_norm": 1.0,
}  # fmt: skip
WARNING = "there are no kernels for .* GPUs: networks run on the reference backend there"


class Elsewhere(TorchFunctionMode):
    """Takes a device for the CPU, and notes which functions named it. Pinned memory is refused: it is of NVIDIA's."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.named: set[str] = set()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", str(func))
        assert name not in ("pin_memory", "cuda"), name

        def here(value: Any) -> Any:
            if isinstance(value, torch.device) and value.type == self.kind:
                self.named.add(name)
                return torch.device("cpu")
            return value

        args, kwargs = tree_map(here, (args, kwargs or {}))
        return func(*args, **kwargs)


@pytest.fixture(params=["xpu", "mps"])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Elsewhere:
    """Such a device seems to be there, and whatever of torch.cuda does more than ask whether there is one fails."""
    kind = request.param
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)

    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("torch.cuda")

    for name in ("Event", "Stream", "current_stream", "stream", "synchronize", "graph", "CUDAGraph", "set_device", "get_device_name"):
        monkeypatch.setattr(torch.cuda, name, refuse)
    # A module moves its tensors by a call that modes do not see.
    move = torch.nn.Module.to
    monkeypatch.setattr(torch.nn.Module, "to", lambda self, where: (mode.named.add("Module.to"), move(self, "cpu"))[1])
    mode = Elsewhere(kind)
    return mode


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=40, num_val=20, num_test=20, num_testplus=20)


def run(images: Path, out: Path, **options: Any) -> Path:
    return train(TrainConfig(data=str(images), out=str(out), **{**TINY, **options}), reporter=QuietReporter())


def test_training_resuming_and_extraction(device: Elsewhere, images: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on the CPU, on the reference, with one warning; a checkpoint goes from one to the other."""
    whole = run(images, tmp_path / "cpu", device="cpu", backend="reference", epochs=2)
    kinds: list[str] = []
    autocast = torch.autocast
    # (With a dtype it is ours; tensors themselves say that they are on the CPU.)
    monkeypatch.setattr(torch, "autocast", lambda kind, *a, **k: (kinds.extend([kind] * len(a)), autocast("cpu", *a, **k))[1])
    with device, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        first = run(images, tmp_path / "run", device=device.kind, profile=1)
    assert len([w for w in caught if "no kernels" in str(w.message)]) == 1
    assert "Module.to" in device.named
    assert "to" in device.named  # images and labels
    assert kinds
    assert set(kinds) == {device.kind}
    assert {value.device.type for value in read_checkpoint(first)["state_dict"].values()} == {"cpu"}
    assert (tmp_path / "run" / "trace.json").exists()
    with device, pytest.warns(UserWarning, match=WARNING):
        last = run(images, tmp_path / "resumed", device=device.kind, epochs=2)
    for a, b in zip(read_metrics(whole.parent), read_metrics(last.parent), strict=True):
        assert (a.train_loss, a.val_accuracy) == (pytest.approx(b.train_loss, rel=1e-5), b.val_accuracy)
    results = []
    for where, name in ((device.kind, "there.h5"), ("cpu", "here.h5")):
        with device, warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            path = extract(last, images, "test", out=tmp_path / name, device=where, backend=None if where != "cpu" else "reference")
        assert len([w for w in caught if "no kernels" in str(w.message)]) == (where != "cpu")
        results.append(load_results(path))
    assert np.array_equal(results[0]["readout_zones"].accuracy, results[1]["readout_zones"].accuracy)
    net, _ = load_checkpoint(last)
    assert next(net.parameters()).device.type == "cpu"


def test_random_state_of_the_caller_is_kept_and_precisions_are_checked(device: Elsewhere, images: Path, tmp_path: Path) -> None:
    before = torch.get_rng_state()
    with device, pytest.warns(UserWarning, match=WARNING):
        run(images, tmp_path / "run", device=device.kind, precision="bfloat16")
    assert torch.equal(torch.get_rng_state(), before)
    with pytest.raises(ValueError, match=f"float16 needs a CUDA device, got {device.kind}"):
        run(images, tmp_path / "half", device=device.kind, precision="float16")
    with pytest.raises(ValueError, match=f"backend: on {device.kind} expected reference, got 'native'"):
        run(images, tmp_path / "native", device=device.kind, backend="native")
    assert not (tmp_path / "half").exists()


def test_each_process_has_a_device_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.xpu, "device_count", lambda: 2)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert choose_device("xpu") == torch.device("xpu:1")
    assert choose_device("xpu:0") == torch.device("xpu:0")
