"""Whole analyses: their files, their page, and the commands that make them."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path

import numpy as np
import pytest
from conftest import GOLDEN, golden

from rnndyn_fast.cli import main
from rnndyn_fast.nn import CTRNN
from rnndyn_fast.phase import LineAttractor, PhaseAnalysis, PlanarOscillator, analyse_networks, analyse_system, load_analyses
from rnndyn_fast.phase.analysis import matched_oscillator
from rnndyn_fast.phase.figures import figure_automaton
from rnndyn_fast.report.phase_page import phase_page, write_phase_page
from rnndyn_fast.tasks import ModuloArithmetic
from rnndyn_fast.train.phase_results import NetworkResult, save_networks


def small(system: PlanarOscillator | LineAttractor) -> PhaseAnalysis:
    return analyse_system(system, per_accept=6, per_reject=3, lengths=(3, 5, 9), fixed_point_starts=20)


@pytest.fixture(scope="module")
def records() -> list[PhaseAnalysis]:
    systems = (
        PlanarOscillator(period=32.1, mu=0.3, name="by hand"),
        PlanarOscillator(period=2.5, name="star <&>"),
        LineAttractor(pinning=0.3),
        PlanarOscillator(period=np.inf, pinning=0.3, points=3, name="three points"),
    )
    return [small(system) for system in systems]


def test_analysis_of_the_shipped_network(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    golden("ctrnn_m3a")
    assert main(["phase", "analyse", str(GOLDEN / "ctrnn_m3a.npz"), "--out", str(tmp_path / "a")]) == 0
    said = capsys.readouterr().out
    assert "ctrnn_m3a: phase code" in said
    assert "automaton addition modulo 3" in said
    network, by_hand = load_analyses(tmp_path / "a")
    assert network.facts["accuracy"] == 1.0
    assert network.facts["trials"] == 540
    np.testing.assert_allclose(network.facts["pca.variance_ratio"][:3], [0.418, 0.312, 0.042], atol=0.004)
    np.testing.assert_allclose(network.facts["response.mean"], [-0.112, 1.902, -2.272], atol=2e-3)
    assert network.facts["automaton.is_modulo"]
    assert by_hand.facts["handcrafted"]
    # Made like the network: same period, same answers, flatter response.
    assert by_hand.facts["cycle.period"] == pytest.approx(network.facts["cycle.period"], rel=1e-9)
    assert by_hand.facts["solution.solution"] == network.facts["solution.solution"] == "phase code"
    assert max(by_hand.facts["asymptotic.flatness"]) < 0.01 < min(network.facts["asymptotic.flatness"])
    assert main(["phase", "report", str(tmp_path / "a"), "--out", str(tmp_path / "report.html")]) == 0
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert page.count("<svg") >= 16
    assert "-0.112" in page


def test_file_keeps_everything(tmp_path: Path, records: list[PhaseAnalysis]) -> None:
    path = records[0].save(tmp_path / "deep" / "one.npz")
    back = PhaseAnalysis.load(path)
    assert back.facts == records[0].facts
    assert json.loads(json.dumps(back.facts)) == back.facts
    assert back.arrays.keys() == records[0].arrays.keys()
    for name, value in back.arrays.items():
        np.testing.assert_array_equal(value, records[0].arrays[name])
    for spoil, error in ((b"", ValueError), (path.read_bytes()[:200], ValueError)):
        (tmp_path / "bad.npz").write_bytes(spoil)
        with pytest.raises(error, match="expected a file of rnndyn phase analyse"):
            PhaseAnalysis.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "other.npz", a=np.ones(3))
    with pytest.raises(ValueError, match="expected a file of rnndyn phase analyse"):
        PhaseAnalysis.load(tmp_path / "other.npz")
    with pytest.raises(FileNotFoundError, match="found no file"):
        PhaseAnalysis.load(tmp_path / "none.npz")
    with pytest.raises(ValueError, match=r"path: expected a name that ends in \.npz"):
        records[0].save(tmp_path / "one.json")


def test_page_shows_every_system(tmp_path: Path, records: list[PhaseAnalysis]) -> None:
    page = phase_page(records).html()
    assert "star &lt;&amp;&gt;" in page
    assert "star <&>" not in page
    for kind in ("phase code", "star", "line", "fixed points"):
        assert kind in page
    assert re.search(r"http|src=\"(?!data:)", re.sub(r'xmlns(:\w+)?="[^"]*"', "", page)) is None  # needs nothing else
    # Numbers in the tables are those of the analyses.
    gap = f"{records[0].facts['solution.phase_gap']:.3g}"
    assert gap in page
    only = phase_page(records, featured=["line attractor"]).html()
    assert only.count("<svg") < page.count("<svg")
    with pytest.raises(ValueError, match="featured: expected names among by hand"):
        phase_page(records, featured=["nobody"])
    with pytest.raises(ValueError, match="records: expected at least one"):
        phase_page([])
    with pytest.raises(FileNotFoundError, match="analyses: expected a folder"):
        write_phase_page(tmp_path, tmp_path / "r.html")


def test_automata_of_any_size_are_drawn() -> None:
    for states, symbols in ((1, 2), (2, 2), (3, 5), (20, 3)):
        table = (np.arange(states)[:, None] * 2 + np.arange(symbols)) % states
        table[-1, 0] = -1
        figure = figure_automaton(table, np.resize([1, -1, 0], states), 0)
        (axes,) = figure.axes
        circles = [patch for patch in axes.patches if type(patch).__name__ == "Circle"]
        arrows = [patch for patch in axes.patches if type(patch).__name__ == "FancyArrowPatch"]
        assert len(circles) == states + sum(np.resize([1, -1, 0], states) == 1)
        assert len([a for a in arrows if a in axes.patches]) >= (table >= 0).sum()
        figure.canvas.draw()


def test_sweep_of_networks(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Untrained networks, one of them broken: analysed, left out, resumed, reported with the table of training."""
    net = CTRNN(3, inputs=3, hidden=8, alpha=[0.1, 0.5, 1.0], activation=["tanh", "relu", "tanh"], seeds=[1, 2, 3])
    net.w_rec.data[1] = float("nan")
    rows = [
        NetworkResult(0, 1, 0.9, 0.1, 40, 0.1, 0.0, "tanh", 41, "reached"),
        NetworkResult(1, 2, None, None, None, 0.5, 0.0, "relu", 3, "diverged"),
        NetworkResult(2, 3, 0.9, 0.1, None, 1.0, 0.05, "tanh", 60, "running"),
    ]
    save_networks(tmp_path / "run" / "networks.npz", net, rows)
    published = tmp_path / "published.csv"
    published.write_text("job_id,seed,best_loss,best_accuracy,final_epoch,alpha,noise,activation_fn\n0,7,0.001,1.0,55.0,0.1,0.0,tanh\n")
    out = tmp_path / "analyses"
    results = analyse_networks(tmp_path / "run", out, handcrafted=False)
    assert [result.name for result in results] == ["job 0", "job 2"]
    assert all(result.facts["solution.solution"] == "unsolved" for result in results)
    with (out / "analysis.csv").open(newline="") as file:
        assert [row["name"] for row in csv.DictReader(file)] == ["job 0", "job 2"]
    # What is there is not analysed again.
    monkeypatch.setattr("rnndyn_fast.phase.run.analyse_system", lambda *args, **kwargs: pytest.fail("analysed again"))
    words = ["phase", "analyse", str(tmp_path / "run"), "--out", str(out), "--jobs", "0,2", "--handcrafted", "false"]
    assert main(words) == 0
    assert "job 2: unsolved" in capsys.readouterr().out
    report = tmp_path / "report.html"
    words = ["phase", "report", str(out), "--out", str(report), "--sweep", str(tmp_path / "run"), "--published", str(published)]
    assert main(words) == 0
    text = report.read_text(encoding="utf-8")
    assert "1 of 3 networks reached the stopping loss, after 40 epochs" in text
    assert "1 are still in training" in text
    assert "Published: 1 of 1, median 55" in text
    assert main(["phase", "analyse", str(tmp_path / "nothing"), "--out", str(out)]) == 2
    assert "networks: expected a file of networks" in capsys.readouterr().err


def test_a_system_and_its_task_must_fit() -> None:
    with pytest.raises(ValueError, match="task: expected modulus 3 and 50 time steps"):
        analyse_system(PlanarOscillator(), task=ModuloArithmetic(4))
    assert matched_oscillator({"oscillation.period": None}).omega == pytest.approx(2 * np.pi / 25)
    slow = matched_oscillator({"oscillation.period": 40.0, "floquet.lyapunov": [0.0, -0.3]})
    assert (slow.omega, slow.mu) == pytest.approx((2 * np.pi / 40, 0.15))
