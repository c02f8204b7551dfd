"""What a search has found: drawings, equations, weights that every command takes, published cells beside the best."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ET
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from browser import visit

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.graph.spec.network import Network, Operator
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.search import Architecture, SearchConfig, build_network, search
from rnndyn_fast.search.architecture import CELLS
from rnndyn_fast.search.diagram import arcs, lanes, network_svg
from rnndyn_fast.search.equations import DOT, MINUS, STAR, equations
from rnndyn_fast.search.found import FoundConfig, report_found, with_cell
from rnndyn_fast.search.storage import completed, open_study
from rnndyn_fast.train import read_checkpoint, read_metrics

pytest.importorskip("optuna")

SPACE: dict[str, Any] = {
    "cell": "reciprocal", "depth": 2, "width": 4, "bypass": [False, True], "feedback_2_1": True, "rgc_gate_kernel_size": 3,
    "rgc_tau_kernel_size": 3, "lr": {"low": 0.002, "high": 0.02, "log": True},
}  # fmt: skip


def plain(text: str) -> str:
    """HTML as text."""
    return re.sub("<[^>]+>", "", text)


def networks() -> list[tuple[str, Network]]:
    made = [(cell, Architecture(depth=2, cell=cell, width=4, feedback=((2, 1),), bypass=True)) for cell in CELLS]
    normed = Architecture(depth=2, cell="lstm", width=4, cell_norm=True, peepholes=True, norm="group")
    made += [("lstm with norm", normed), ("blt", Architecture(depth=3, width=4, interaction="multiplicative", feedback=((3, 1),)))]
    options = (("rgc_residual_to_out_gate", True), ("rgc_feedback_entry", "cell"), ("rgc_layer_norm", True), ("rgc_tau_bias", -1.5),
               ("rgc_tau_separable", False))  # fmt: skip
    made.append(("options", Architecture(depth=2, cell="reciprocal", width=4, feedback=((2, 1),), reciprocal=options)))
    return [(name, build_network(one, image_size=12, num_classes=5)) for name, one in made]


# ---------------------------------------------------------------- drawing


@pytest.mark.parametrize(("name", "network"), networks())
def test_drawing_has_every_map_and_connection(name: str, network: Network) -> None:
    svg = ET.fromstring(network_svg(network, "a-"))
    ns = "{http://www.w3.org/2000/svg}"
    maps = [one.name for one in (*network.inputs, *network.areas)]
    texts = [element.text for element in svg.iter(f"{ns}text")]
    assert len(list(svg.iter(f"{ns}rect"))) == len(maps)
    assert set(maps) <= set(texts)
    lines = [p for p in svg.iter(f"{ns}path") if p.get("marker-end")]
    pairs = {(c.source, c.target, network.delay(c) > 0) for c in network.connections}
    assert len(lines) == len(pairs)
    assert sum("dash" in " ".join(p.keys()) for p in lines) == sum(later for *_, later in pairs)
    # Lines that pass the same boxes on the same side have lanes of their own.
    _, found = arcs(network)
    curved = [arc for arc in found if arc.later or arc.target != arc.source + 1]
    lane = lanes(curved)
    for one in curved:
        for other in curved:
            overlap = one.span[0] <= other.span[1] and other.span[0] <= one.span[1]
            assert one == other or one.later != other.later or not overlap or lane[one] != lane[other]
    # Nothing is outside the drawing.
    left, top, width, height = map(float, svg.attrib["viewBox"].split())
    for element in svg.iter(f"{ns}text"):
        x, y = float(element.attrib["x"]), float(element.attrib["y"])
        assert left <= x <= left + width
        assert top <= y <= top + height


# ---------------------------------------------------------------- equations


@pytest.mark.parametrize(("name", "network"), networks())
def test_every_letter_of_the_equations_is_defined(name: str, network: Network) -> None:
    found = equations(network)
    text = "\n".join(found.lines)
    letters = set(found.letters)
    used = set(re.findall(r'<span class="map">[^<]*</span>', text)) | set(re.findall(r"<var>\w</var><sub>[^<]*</sub>", text))
    assert used <= letters
    # Whatever is left of the lines, once their letters are taken out, is arithmetic.
    rest = re.sub(r'<span class="map">[^<]*</span>|<var>\w</var>(<sub>[^<]*</sub>)?', "", text)
    for function in sorted((letter for letter in letters if "<" not in letter), key=len, reverse=True):  # (elu is in relu)
        rest = rest.replace(function, "")
    assert re.fullmatch(rf"[\s()=+{MINUS},.0-9\u1d40]*", rest), rest
    # Each weight is there, once for every part of it that a connection uses; and what is defined is used.
    weights = {(c.parameter, c.concat) for c in network.connections if c.operator is not Operator.IDENTITY}
    assert sum(plain(letter).startswith("W") for letter in letters) == len(weights)
    for letter in letters - {"<var>t</var>", STAR, DOT}:
        assert plain(letter) in plain(text), letter


def test_equations_of_a_reciprocal_gated_layer_are_what_the_network_computes() -> None:
    """Evaluated by hand from the lines, in NumPy: one layer, 1 x 1 kernels, two steps."""
    choices = tuple((f"rgc_{name}_kernel_size", 1) for name in ("tau", "gate", "ff", "in_out"))
    choices += (("rgc_tau_separable", False), ("rgc_gate_separable", False), ("rgc_tau_bias", 0.5))
    network = build_network(Architecture(depth=1, cell="reciprocal", width=2, norm="none", reciprocal=choices), image_size=4, num_classes=3)
    torch.manual_seed(0)
    net = RecurrentNetwork(network, 2, backend="reference").double()
    x = torch.randn(1, 3, 4, 4, dtype=torch.float64)
    wanted = net(x).detach().numpy()
    found = equations(network)
    numbers = {name: value.detach().numpy() for name, value in net.named_parameters()}
    environment: dict[str, Any] = {
        "relu": lambda v: np.maximum(v, 0),
        "elu": lambda v: np.where(v > 0, v, np.expm1(np.minimum(v, 0))),
        "tanh": np.tanh,
        "logistic": lambda v: 1 / (1 + np.exp(-v)),
        "mean": lambda v: v.mean((1, 2), keepdims=True),
    }
    for letter, text in found.letters.items():
        parameter = re.search(r"parameter ([\w.]+)\)", text)
        if parameter:
            environment[plain(letter)] = Kernel(numbers[f"{parameter[1]}.weight"])
            environment[plain(letter).replace("W", "b")] = numbers.get(f"{parameter[1]}.bias", np.zeros(1))[:, None, None]
    maps: dict[tuple[str, int], np.ndarray] = {("image", t): x[0].numpy() for t in range(2)}
    environment["at"] = lambda name, when: maps.get((name, when), np.zeros((2, 4, 4)))
    for t in range(2):
        for line in map(plain, found.lines[:-1]):
            left, right = line.split(" = ")
            # A convolution binds as a product does, which `@` is in Python.
            python = right.replace(DOT, "*").replace(STAR, "@").replace(MINUS, "-").replace("\u03c3", "logistic")
            python = re.sub(r"([\w.]*[a-z][\w.]*)\(t( - 1)?\)", rf"at('\1', {t}\2)", python)
            python = re.sub(r"(\d) (?=(logistic|tanh)\()", r"\1 * ", python)
            maps[left.removesuffix("(t)"), t] = eval(python, environment)
        readout = {name: numbers[f"readout.{name}"] for name in ("weight", "bias")}
        logits = readout["weight"] @ maps["gap", t][:, 0, 0] + readout["bias"]
        assert np.allclose(logits - np.log(np.exp(logits).sum()), wanted[t, 0], atol=1e-12), t


class Kernel:
    """A weight that `@` convolves with."""

    def __init__(self, weight: np.ndarray) -> None:
        self.weight = torch.tensor(weight)

    def __matmul__(self, value: np.ndarray) -> np.ndarray:
        return np.asarray(torch.nn.functional.conv2d(torch.tensor(value)[None], self.weight, padding=self.weight.shape[-1] // 2)[0])


# ---------------------------------------------------------------- a search, its weights, and published cells


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=50, num_test=60, num_testplus=20)


@pytest.fixture(scope="module")
def searched(images: Path, tmp_path_factory: pytest.TempPathFactory) -> SearchConfig:
    folder = tmp_path_factory.mktemp("search")
    (folder / "space.yaml").write_text(yaml.safe_dump(SPACE))
    config = SearchConfig(
        data=str(images), out=str(folder / "s"), space=str(folder / "space.yaml"), trials=3, epochs=2, timesteps=2, batch_size=32,
        pruner="none",
    )  # fmt: skip
    search(config, say=lambda _: None)
    return config


def test_weights_of_the_best_are_kept(searched: SearchConfig, tmp_path: Path) -> None:
    out = Path(searched.out)
    best = completed(open_study(searched, create=False))
    for rank, trial in enumerate(best, start=1):
        kept = read_checkpoint(out / "best" / f"{rank}.pt")
        own = read_checkpoint(out / "trials" / f"{trial.number:04d}" / "best.pt")
        assert kept["state_dict"].keys() == own["state_dict"].keys()
        assert all(torch.equal(value, own["state_dict"][name]) for name, value in kept["state_dict"].items())
    assert sorted(path.name for path in (out / "best").glob("*.pt")) == ["1.pt", "2.pt", "3.pt"]


def test_every_command_takes_them(searched: SearchConfig, images: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    best, data = str(Path(searched.out) / "best" / "1.pt"), str(images)
    rng = np.random.default_rng(0)
    recordings = tmp_path / "recordings.npz"
    np.savez(recordings, responses=rng.poisson(3, (2, 60, 6, 4)).astype(float), bin_edges_ms=np.arange(3) * 10.0)
    extraction = str(tmp_path / "extraction.h5")
    for words in (
        ["plan", best],
        ["extract", best, data, "--split", "test", "--areas", "layer2,layer1.c", "--save", "layer2", "--keep-samples", "--out", extraction],
        ["analyse", extraction, "--out", str(tmp_path / "analysis")],
        ["react", best, data, "--split", "test", "--out", str(tmp_path / "reactions")],
        ["predict", best, str(recordings), "--data", data, "--split", "test", "--areas", "layer2", "--num-splits", "4", "--out",
         str(tmp_path / "predictions")],
        ["report", str(Path(searched.out) / "trials" / "0000"), "--out", str(tmp_path / "page.html")],
    ):  # fmt: skip
        assert main(words) == 0, (words, capsys.readouterr().err)
    assert (tmp_path / "analysis" / "report.html").exists()


def test_published_cells_beside_the_best(searched: SearchConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(searched.out)
    words = ["search", "report", str(out), "--cells", "gru,rgc", "--bootstrap", "20"]
    assert main(words) == 0, capsys.readouterr().err
    text = (out / "report.html").read_text()
    for part in ("The best network", "Beside published cells", "already stable / not yet stable", "test, t = 1 (%)", "<dl class="):
        assert part in text
    assert capsys.readouterr().out.count("parameters") == 2
    # Trained as the best was: same images, epochs and options.
    best = yaml.safe_load((out / "best" / "1.yaml").read_text())
    for cell in ("gru", "rgc"):
        own = yaml.safe_load((out / "published" / cell / "train.yaml").read_text())
        assert {k for k in best if best[k] != own[k]} == {"network", "out"}
        assert len(read_metrics(out / "published" / cell)) == searched.epochs
    # Once more: nothing is trained or run again.
    before = {path: path.stat().st_mtime_ns for folder in ("published", "found") for path in (out / folder).rglob("*.*")}
    assert main(words) == 0
    assert {path: path.stat().st_mtime_ns for path in before} == before


@pytest.mark.parametrize("width", [400, 1280])
def test_page_fits_its_window(searched: SearchConfig, width: int, tmp_path: Path) -> None:
    page = Path(searched.out) / "report.html"
    script = """
      var out = [], all = document.querySelectorAll('main *');
      for (var i = 0; i < all.length; i++) {
        var box = all[i].getBoundingClientRect();
        if (box.right > window.innerWidth + 1 && !all[i].closest('.table, .plot > div')) out.push(all[i].tagName);
      }
      return [document.documentElement.scrollWidth <= window.innerWidth, out.slice(0, 5), document.querySelectorAll('.equations p').length];
    """
    (fits, outside, lines), errors = visit(page, script, width, tmp_path)
    assert fits
    assert outside == []
    assert lines > 5
    assert errors == []


def test_cell_in_place_of_another() -> None:
    layers = ((1, "cell", "gru"), (2, "width", 6), (2, "rgc_out_residual", True))
    one = Architecture(depth=2, cell="reciprocal", reciprocal=(("rgc_out_residual", True),), layers=layers, bypass=True, feedback=((2, 1),))
    other = with_cell(one, "lstm")
    assert other.cell == other.layer(1).cell == "lstm"
    assert other.widths == one.widths
    assert other.bypass
    assert other.feedback == one.feedback
    assert other.reciprocal == ()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"cells": ("gruu",)}, "cells: unknown cell 'gruu', did you mean 'gru'"),
        ({"cells": ()}, "cells: expected different ones, at least one"),
        ({"cells": ("gru", "gru")}, "cells: expected different ones"),
        ({"split": "train"}, "split: expected test or testplus, got 'train'"),
        ({"bootstrap": 1}, "bootstrap: expected at least 2"),
        ({"limit": 0}, "limit: expected at least 2"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        FoundConfig(search=str(tmp_path), **options)
    with pytest.raises(FileNotFoundError, match=r"search: no search.yaml"):
        report_found(FoundConfig(search=str(tmp_path)))
