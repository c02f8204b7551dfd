"""Weights from elsewhere: however they were saved, they give the same numbers, and what is none is told for what it is."""

from __future__ import annotations

import argparse
import io
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.extract import load_results
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.train import load_checkpoint, read_checkpoint
from rnndyn_fast.train.checkpoint import load_weights

WIDTHS = (2, 4, 8, 16, 32)


class Published(torch.nn.Module):
    """A class that is pickled whole."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(2, 2)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=20, num_val=20, num_test=20, num_testplus=20)


@pytest.fixture(scope="module")
def net() -> Any:
    torch.manual_seed(1)
    return blt_net_64(num_classes=10, image_size=16, widths=WIDTHS, LT_interaction="multiplicative", timesteps=3, backend="reference")


def prefixed(state: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {prefix + name: value for name, value in state.items()}


SAVED = {
    "bare": lambda s: s,
    "data parallel": lambda s: prefixed(s, "module."),
    "compiled": lambda s: prefixed(s, "_orig_mod."),
    "both": lambda s: prefixed(s, "module._orig_mod."),
    "a part compiled": lambda s: {name.replace("v2.", "v2._orig_mod."): value for name, value in s.items()},
    "script": lambda s: {"epoch": 3, "model_state_dict": s, "optimizer": {"state": {}, "param_groups": []}},
    "lightning": lambda s: {
        "epoch": 1, "pytorch-lightning_version": "2.5", "state_dict": prefixed(s, "model.") | {"metric.total": torch.zeros(1)},
        "optimizer_states": [], "hyper_parameters": {"lr": 0.1},
    },
}  # fmt: skip
OPTIONS = ["--model", "blt_net_64", "--model-options", "{lt-interaction: multiplicative, timesteps: 3}"]


@pytest.mark.parametrize("saved", SAVED)
def test_import_gives_the_same_network(saved: str, net: Any, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(SAVED[saved](net.state_dict()), tmp_path / "w.pth")
    assert main(["import", str(tmp_path / "w.pth"), "--data", str(images), "--out", str(tmp_path), *OPTIONS]) == 0
    told = capfd.readouterr().out
    assert ("metric.total" in told) == (saved == "lightning")  # (what is left out is said)
    ours, contents = load_checkpoint(tmp_path / "imported.pt", backend="reference")
    assert contents["data"]["categories"][:2] == ["zero", "one"]
    x = torch.rand(2, 3, 16, 16)
    torch.testing.assert_close(ours(x), net.eval()(x), rtol=0, atol=0)


def test_commands_take_weights_with_a_model(net: Any, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    weights = tmp_path / "w.pth"
    torch.save(net.state_dict(), weights)
    assert main(["extract", str(weights), str(images), "--out", str(tmp_path / "r.h5"), "--reducers", "norms", *OPTIONS]) == 0
    assert load_results(tmp_path / "r.h5")["norms"].n == 20
    assert main(["react", str(weights), str(images), "--out", str(tmp_path / "react"), *OPTIONS]) == 0
    assert main(["analyse", str(weights), "--data", str(images), "--out", str(tmp_path / "analysis"), *OPTIONS]) == 0
    assert (tmp_path / "analysis" / "report.html").exists()
    np.savez(tmp_path / "recordings.npz", responses=np.random.default_rng(0).random((3, 20, 2, 3)))
    predict = ["predict", str(weights), str(tmp_path / "recordings.npz"), "--data", str(images), "--out", str(tmp_path / "p"), *OPTIONS]
    assert main([*predict, "--areas", "gap", "--num-splits", "5"]) == 0
    assert (tmp_path / "p" / "gap.npz").exists()
    capfd.readouterr()
    for words, message in (
        (predict, "--areas: expected areas of the network"),
        (["analyse", str(weights), "--out", str(tmp_path / "a")], "--data: expected the images to run through the network"),
        (
            ["analyse", str(tmp_path / "r.h5"), "--data", str(images), "--out", str(tmp_path / "a")],
            "--data: expected only with",
        ),
    ):
        assert main(words) == 2
        assert message in capfd.readouterr().err
    assert main(["extract", str(weights), str(images), "--out", str(tmp_path / "s.h5")]) == 2
    assert "holds weights from elsewhere (a state_dict); say of which network: --model" in capfd.readouterr().err


def test_checkpoints_of_other_versions(net: Any, tmp_path: Path) -> None:
    torch.save({"format": "rnndyn_fast.checkpoint/99", "state_dict": net.state_dict()}, tmp_path / "c.pt")
    with pytest.raises(ValueError, match=r"is of another version of rnndyn: expected the format rnndyn_fast.checkpoint/1, got .*/99"):
        read_checkpoint(tmp_path / "c.pt")


@pytest.mark.parametrize("dtype", [torch.int64, torch.complex64])
def test_weights_that_are_no_floats(dtype: torch.dtype, net: Any) -> None:
    """They would be cast without a word."""
    state = net.state_dict()
    before = state["v1.lateral.weight"].clone()
    with pytest.raises(ValueError, match=rf"other kinds of numbers: v1.lateral.weight {dtype}"):
        load_weights(net, {**state, "v1.lateral.weight": before.to(dtype)}, "w.pth")
    assert torch.equal(net.state_dict()["v1.lateral.weight"], before)


def test_what_is_assumed_is_said(net: Any, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    torch.save(net.state_dict(), tmp_path / "w.pth")
    assert main(["import", str(tmp_path / "w.pth"), "--data", str(images), "--out", str(tmp_path), "--model", "blt_net_64"]) == 0
    told = capfd.readouterr().out
    assert "LT_interaction is taken to be additive" in told.replace("--lt-interaction", "LT_interaction")
    assert "timesteps is taken to be 10" in told
    assert read_checkpoint(tmp_path / "imported.pt")["model"]["widths"] == list(WIDTHS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"classes": 12}, "expected 12 categories, those of the readout, "),
        ({"model": "blt_net_65"}, "unknown model 'blt_net_65', did you mean 'blt_net_64'"),
        ({"model_options": "{widths: [1, 2, 4, 8, 16]}"}, "widths is 2, 4, 8, 16, 32 by the shapes of the weights"),
        ({"model_options": "{depth: 3}"}, "unknown option 'depth'"),
        ({"model": "rcnn_sat"}, "image_size: expected at least 64"),
        ({"drop": "it_ln.weight"}, "is of another architecture; missing: it_ln.weight"),
    ],
)
def test_weights_that_do_not_fit(
    options: dict[str, Any], message: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    one = blt_net_64(num_classes=options.get("classes", 10), image_size=16, widths=WIDTHS)
    state = {name: value for name, value in one.state_dict().items() if name != options.get("drop")}
    torch.save(state, tmp_path / "w.pth")
    words = ["--model", options.get("model", "blt_net_64"), "--model-options", options.get("model_options", "{}")]
    assert main(["import", str(tmp_path / "w.pth"), "--data", str(images), "--out", str(tmp_path / "o.pt"), *words]) == 2
    told = capfd.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not (tmp_path / "o.pt").exists()


def test_a_folder_of_images_needs_a_normalisation(net: Any, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    for k in range(10):
        (tmp_path / "f" / str(k)).mkdir(parents=True)
        Image.new("RGB", (16, 16), (20 * k, 0, 9)).save(tmp_path / "f" / str(k) / "a.png")
    torch.save(net.state_dict(), tmp_path / "w.pth")
    words = ["import", str(tmp_path / "w.pth"), "--data", str(tmp_path / "f"), "--out", str(tmp_path / "o.pt"), *OPTIONS]
    assert main(words) == 2
    assert "--normalise: " in capfd.readouterr().err
    assert main([*words, "--normalise", "imagenet"]) == 0
    assert main(["extract", str(tmp_path / "o.pt"), str(tmp_path / "f"), "--out", str(tmp_path / "r.h5"), "--reducers", "norms"]) == 0
    assert "10 images of 10 files" in capfd.readouterr().out


def files(folder: Path) -> dict[str, tuple[bytes, str]]:
    """What people hand over for a checkpoint, and what is said of it."""

    def saved(value: Any) -> bytes:
        buffer = io.BytesIO()
        torch.save(value, buffer)
        return buffer.getvalue()

    archive = io.BytesIO()
    np.savez(archive, a=np.zeros(3))
    script = io.BytesIO()
    with zipfile.ZipFile(script, "w") as file:
        file.writestr("net/constants.pkl", b"")
    good = saved({"a": torch.zeros(1000)})
    header = b'{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}'
    return {
        "pickled": (saved(Published()), "holds a pickled module (test_foreign.Published)"),
        "namespace": (saved({"state_dict": {}, "args": argparse.Namespace(lr=1)}), "holds a pickled object (argparse.Namespace)"),
        "lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "is a Git LFS pointer, not the file itself; git lfs pull"),
        "annex": (b"/annex/objects/SHA256E-s12--0.pt\n", "is a git-annex pointer"),
        "html": (b"<!DOCTYPE html>\n<html><body>Sign in</body></html>", "is an HTML page, not the file itself"),
        "empty": (b"", "is empty (0 bytes)"),
        "gzip": (b"\x1f\x8b\x08\x00aaaa", "is packed (gzip); unpack it first"),
        "npz": (archive.getvalue(), "is an NPZ file of NumPy"),
        "hdf5": (b"\x89HDF\r\n\x1a\n" + bytes(100), "is an HDF5 file"),
        "script": (script.getvalue(), "is a TorchScript archive"),
        "safetensors": (len(header).to_bytes(8, "little") + header + bytes(4), "is a safetensors file"),
        "truncated": (good[:-200], "is truncated or not a PyTorch file"),
        "text": (b"hello there, this is no checkpoint", "is truncated or not a PyTorch file"),
        "list": (saved([1, 2]), "expected a state_dict"),
        "numbers": (saved({"epoch": 1}), "expected a state_dict, or one under state_dict, model_state_dict"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", list(files(Path())))
def test_what_is_no_checkpoint_is_told_for_what_it_is(kind: str, images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    content, message = files(tmp_path)[kind]
    (tmp_path / "w.pt").write_bytes(content)
    assert main(["import", str(tmp_path / "w.pt"), "--data", str(images), "--out", str(tmp_path / "o.pt"), "--model", "blt_net_64"]) == 2
    told = capfd.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    words = {
        "extract": [str(images), "--out", str(tmp_path / "r.h5")], "react": [str(images), "--out", str(tmp_path / "re")],
        "plan": [],
    }  # fmt: skip
    for command, rest in words.items():
        assert main([command, str(tmp_path / "w.pt"), *rest]) == 2
        told = capfd.readouterr().err
        assert told.count("\n") == 1
        assert "w.pt" in told
