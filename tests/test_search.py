"""Architecture search: spaces, networks, trials, workers that die, the report."""

from __future__ import annotations

import csv
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.search import SPACES, Architecture, SearchConfig, Space, build_network, count_parameters, load_space, search
from rnndyn_fast.search.architecture import CELLS, GATED
from rnndyn_fast.search.importance import importances
from rnndyn_fast.search.report import pareto_front
from rnndyn_fast.search.run import run_trial
from rnndyn_fast.search.storage import INFEASIBLE, WORKER, completed, died, finished, mark_worker, open_study, recover, retried
from rnndyn_fast.train import read_metrics

optuna = pytest.importorskip("optuna")

SMALL: dict[str, Any] = {
    "cell": ["blt", "gru"],
    "depth": [1, 2],
    "width": 4,
    "feedback_2_1": [False, True],
    "bypass": [False, True],
    "lr": {"low": 1e-3, "high": 1e-2, "log": True},
}
QUICK: dict[str, Any] = {"epochs": 2, "timesteps": 2, "batch_size": 32, "startup_trials": 3, "pruning_trials": 3, "backend": "reference"}


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=50, num_test=20, num_testplus=20)


@pytest.fixture(scope="module")
def space_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("space") / "space.yaml"
    path.write_text(yaml.safe_dump(SMALL))
    return path


# ---------------------------------------------------------------- spaces and networks


def test_choices_that_mean_nothing_are_not_made() -> None:
    space = load_space("cells")
    deep = {"depth": 3, "cell": "lstm", "width": 8, "growth": 1.0, "stem_kernel_size": 3, "kernel_size": 3, "cell_kernel_size": 3}
    deep |= {"bypass": True, "norm": "none", "feedback_2_1": False, "feedback_3_1": True, "feedback_3_2": True, "feedback_kernel_size": 1}
    trial = optuna.trial.FixedTrial(deep | {"lr": 1e-3, "cell_norm": False, "peepholes": True})
    architecture, training = space.suggest(trial)
    assert architecture.feedback == ((3, 1), (3, 2))
    assert architecture.peepholes
    assert training == {"lr": 1e-3}
    assert not {"gating", "interaction"} & trial.params.keys()
    # One layer, no recurrence: nothing is asked for feedback, growth or the recurrent kernel.
    fixed = {name: deep[name] for name in ("width", "stem_kernel_size", "kernel_size", "bypass", "norm")}
    architecture, _ = space.suggest(optuna.trial.FixedTrial(fixed | {"depth": 1, "cell": "feedforward", "lr": 1e-3}))
    assert architecture.feedback == ()


@pytest.mark.parametrize("name", sorted(SPACES))
def test_spaces_round_trip(name: str) -> None:
    space = load_space(name)
    assert Space.from_plain(yaml.safe_load(yaml.safe_dump(space.to_plain()))) == space


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"cel": ["gru"]}, "space: unknown choice 'cel', did you mean 'cell'"),
        ({"cell": ["gruu"]}, r"cell: expected one of .* got 'gruu', did you mean 'gru'"),
        ({"depth": [1.5]}, r"space: depth: expected int, got 1.5"),
        ({"depth": []}, "space: depth: expected a value, a list"),
        ({"depth": [1, 1]}, "space: depth: expected .* a list of different values"),
        ({"kernel_size": [2]}, "kernel_size: expected an odd number"),
        ({"lr": {"low": 1.0}}, "space: lr: expected low and high"),
        ({"lr": {"low": 2.0, "high": 1.0}}, "space: lr: expected low < high"),
        ({"lr": [-1.0]}, "lr: expected a positive finite number"),
        ({"feedback_1_2": [True, False], "depth": 2}, "feedback_1_2: expected feedback from a layer to one below"),
        ({"feedback_3_1": [True, False], "depth": 2}, "feedback_3_1: expected .* at most 2 layers"),
        ({"feedback_2_1": [1, 2], "depth": 2}, "feedback_2_1: expected true or false"),
        ({"epochs": [1, 2]}, "space: unknown choice 'epochs'"),
        ({"norm": ["batch"]}, "norm: expected one of .* got 'batch'"),
    ],
)
def test_bad_spaces(values: dict[str, Any], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        Space.from_plain(values)


def test_unknown_space(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'cells'"):
        load_space("cell")
    with pytest.raises(FileNotFoundError, match="space: no such file"):
        load_space(tmp_path / "absent.yaml")


@pytest.mark.parametrize("bypass", [False, True])
@pytest.mark.parametrize("cell", CELLS)
def test_every_cell_makes_a_network_that_learns_everywhere(cell: str, bypass: bool) -> None:
    architecture = Architecture(depth=3, cell=cell, bypass=bypass, feedback=((2, 1), (3, 1)), width=4, norm="none")
    network = build_network(architecture, image_size=12, num_classes=5)
    net = RecurrentNetwork(network, 4, backend="reference").double()
    log_probs = net(torch.randn(2, 3, 12, 12, dtype=torch.float64))
    assert log_probs.shape == (4, 2, 5)
    log_probs[-1, :, 0].sum().backward()
    assert [name for name, p in net.named_parameters() if p.grad is None or not p.grad.abs().sum() > 0] == []
    assert count_parameters(network) == sum(p.numel() for p in net.parameters())


def test_recurrence_is_what_the_cell_says() -> None:
    """The control gives the same at all time steps, every other cell does not."""
    x = torch.randn(1, 3, 12, 12)
    for cell in CELLS:
        torch.manual_seed(0)
        net = RecurrentNetwork(build_network(Architecture(depth=1, cell=cell), image_size=12, num_classes=5), 3, backend="reference")
        if cell == "timedecay":
            torch.nn.init.constant_(dict(net.named_parameters())["layer1.memory_decay"], 0.5)
        first, *_, last = net(x)
        assert torch.equal(first, last) == (cell == "feedforward"), cell


@pytest.mark.parametrize("cell", ["rgc", "rgc_separable"])
def test_gating_and_bypass_are_switches(cell: str) -> None:
    options: dict[str, Any] = {"depth": 1, "cell": cell, "width": 4}
    gated, ungated = (build_network(Architecture(**options, gating=g), image_size=8, num_classes=5) for g in (True, False))
    assert any(c.port == "gate" for c in gated.connections)
    assert not any(c.port == "gate" for c in ungated.connections)
    assert count_parameters(ungated) < count_parameters(gated)
    bypassed = build_network(Architecture(depth=2, growth=2.0, bypass=True), image_size=8, num_classes=5)
    assert bypassed.parameter_shapes["layer2.bypass.weight"] == (32, 16, 1, 1)
    assert "layer1.bypass.weight" not in bypassed.parameter_shapes  # equal channels: as it is


def test_bad_architectures() -> None:
    for options, message in (
        ({"depth": 0}, "depth: expected an int of at least 1"),
        ({"cell": "ltsm"}, "did you mean 'lstm'"),
        ({"feedback": ((1, 2),)}, "feedback: expected pairs"),
        ({"feedback": ((2, 1), (2, 1))}, "every edge once"),
        ({"growth": 0.0}, "growth: expected a positive finite number"),
    ):
        with pytest.raises(ValueError, match=message):
            Architecture(**options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="4 layers make maps of 8 px smaller than 2 x 2"):
        build_network(Architecture(depth=4), image_size=8, num_classes=5)
    assert set(GATED) < set(CELLS)


# ---------------------------------------------------------------- a search


@pytest.fixture(scope="module")
def searched(images: Path, space_file: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[SearchConfig, list[str]]:
    config = SearchConfig(data=str(images), out=str(tmp_path_factory.mktemp("search") / "s"), space=str(space_file), trials=8, **QUICK)
    lines: list[str] = []
    search(config, say=lines.append)
    return config, lines


def test_search_finishes_as_many_trials_as_asked_for(searched: tuple[SearchConfig, list[str]]) -> None:
    config, lines = searched
    trials = open_study(config, create=False).get_trials()
    assert len(finished(trials)) == len(lines) == 8
    assert sum(t.state.name == "COMPLETE" for t in trials) >= 3
    with (Path(config.out) / "trials.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [int(row["trial"]) for row in rows] == list(range(8))
    assert {row["cell"] for row in rows} <= {"blt", "gru"}


def test_trials_are_reproducible_from_their_yaml(searched: tuple[SearchConfig, list[str]], tmp_path: Path) -> None:
    config, _ = searched
    best = completed(open_study(config, create=False))[0]
    again = tmp_path / "again"
    assert main(["train", "--config", str(Path(config.out) / "best" / "1.yaml"), "--out", str(again)]) == 0
    rows = read_metrics(again)
    assert max(row.val_accuracy[-1] for row in rows) == best.value
    assert [row.val_accuracy[-1] for row in rows] == list(best.intermediate_values.values())
    text = (Path(config.out) / "trials" / f"{best.number:04d}" / "train.yaml").read_text()
    assert yaml.safe_load(text)["network"] == yaml.safe_load(best.user_attrs["config"])["network"]


def test_report_shows_what_was_found(searched: tuple[SearchConfig, list[str]]) -> None:
    config, _ = searched
    text = (Path(config.out) / "report.html").read_text()
    for part in ("Best architectures", "What mattered", "Accuracy against parameters", "connections:", "feedback_2_1"):
        assert part in text
    assert text.count("<svg") >= 2


def test_resume_goes_on_and_checks_what_it_goes_on_with(searched: tuple[SearchConfig, list[str]], tmp_path: Path) -> None:
    config, _ = searched
    values = config.to_dict()
    with pytest.raises(FileExistsError, match="is not empty"):
        search(config)
    with pytest.raises(ValueError, match="other settings: epochs was 2, is 3"):
        search(SearchConfig(**{**values, "epochs": 3, "resume": True}))
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump({**SMALL, "width": 6}))
    with pytest.raises(ValueError, match="other space: width was 4, is 6"):
        search(SearchConfig(**{**values, "space": str(other), "resume": True}))
    lines: list[str] = []
    search(SearchConfig(**{**values, "trials": 9, "resume": True}), say=lines.append)
    assert len(lines) == 1
    with pytest.raises(FileNotFoundError, match=r"resume: no study.db"):
        search(SearchConfig(**{**values, "out": str(tmp_path / "no"), "resume": True}))


def test_folders_share_a_study_in_a_storage(images: Path, tmp_path: Path) -> None:
    """As on two machines with a database between them (which here is SQLite; nothing but the URL differs)."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"cell": ["blt", "feedforward"], "depth": 1, "width": [4, 6, 8]}))
    common = {"data": str(images), "space": str(space), "storage": f"sqlite:///{tmp_path}/shared.db", **QUICK, "epochs": 1}
    search(SearchConfig(**common, out=str(tmp_path / "one"), trials=1), say=lambda _: None)
    with pytest.raises(FileExistsError, match="there is a study 'search' already"):
        search(SearchConfig(**common, out=str(tmp_path / "two"), trials=2))
    with pytest.raises(FileNotFoundError, match="no study 'other'"):
        search(SearchConfig(**common, out=str(tmp_path / "three"), trials=2, study="other", resume=True))
    joined = SearchConfig(**common, out=str(tmp_path / "two"), trials=2, resume=True)
    search(joined, say=lambda _: None)
    trials = finished(open_study(joined, create=False).get_trials())
    assert [t.number for t in trials] == [0, 1]
    folders = [[path.name for path in (tmp_path / name).glob("trials/*")] for name in ("one", "two")]
    assert folders in ([["0000"], ["0001"]], [["0000"], []])  # (nothing to train where the second drew the choices of the first)
    assert not (tmp_path / "one" / "study.db").exists()


def test_same_choices_are_not_trained_twice(searched: tuple[SearchConfig, list[str]]) -> None:
    config, _ = searched
    study = open_study(config, create=False)
    best = completed(study)[0]
    study.enqueue_trial(best.params)
    trial = study.ask()
    value = run_trial(trial, study, config, config.load_space(), {"image_size": 16, "num_classes": 10})
    assert value == best.value
    assert trial.user_attrs["same_as"] == best.number
    study.tell(trial, value)
    assert completed(study)[0].number == best.number


@pytest.mark.parametrize(
    ("options", "params", "attribute"),
    [({"max_parameters": 10}, {"lr": 1e-3}, INFEASIBLE), ({"timesteps": 2}, {"lr": 1e30}, "diverged")],
)
def test_too_large_and_diverging_architectures_are_pruned(
    options: dict[str, Any], params: dict[str, float], attribute: str, images: Path, tmp_path: Path
) -> None:
    config = SearchConfig(**{"data": str(images), "out": str(tmp_path / "s"), **QUICK, **options})
    Path(config.out).mkdir()
    study = open_study(config, create=True)
    trial = study.ask()
    space = Space.from_plain({"depth": 1, "width": 4, "norm": "none", **params})
    with pytest.raises(optuna.TrialPruned):
        run_trial(trial, study, config, space, {"image_size": 16, "num_classes": 10})
    assert attribute in trial.user_attrs
    study.tell(trial, state=optuna.trial.TrialState.PRUNED)
    assert len(finished(study.get_trials())) == (attribute == "diverged")


# ---------------------------------------------------------------- workers that die


def test_only_workers_that_are_gone_have_died() -> None:
    own = mark_worker()
    assert not died(own)
    assert not died(None)
    assert not died({**own, "host": "elsewhere", "started": "0"})
    assert died({**own, "started": "0"})  # another process has its number now
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    assert died({**own, "pid": gone.pid})


def test_trial_of_a_dead_worker_is_queued_once(images: Path, tmp_path: Path) -> None:
    config = SearchConfig(data=str(images), out=str(tmp_path), **QUICK)
    study = open_study(config, create=True)
    alive, dead = study.ask(), study.ask()
    for trial, started in ((alive, mark_worker()["started"]), (dead, "0")):
        trial.suggest_categorical("cell", ["blt", "gru"])
        trial.set_user_attr(WORKER, {**mark_worker(), "started": started})
    assert recover(study) == [dead.number]
    assert recover(study) == []
    states = [t.state.name for t in study.get_trials()]
    assert states == ["RUNNING", "FAIL", "WAITING"]
    again = study.ask()
    # Running, and not signed yet: the dead worker's name must not be on it, or the next look would take it for lost.
    assert WORKER not in again.user_attrs
    assert recover(study) == []
    assert retried(study.get_trials()[again.number]) == dead.number
    assert again.suggest_categorical("cell", ["blt", "gru"]) == dead.params["cell"]


def test_killed_search_goes_on_with_two_workers(images: Path, tmp_path: Path) -> None:
    """Killed in the middle of a trial: that goes on from its last epoch, two workers do the rest, and the number of trials is exact."""
    out, space = tmp_path / "s", tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"cell": ["blt", "simplernn"], "depth": 1, "width": [4, 6], "lr": {"low": 1e-3, "high": 1e-2}}))
    options = {**QUICK, "epochs": 12, "trials": 3, "pruning_trials": 100}
    words = [f"--{name}={value}" for name, value in options.items()]
    command = [sys.executable, "-c", "import sys; from rnndyn_fast.cli import main; sys.exit(main())", "search"]
    command += ["--data", str(images), "--out", str(out), "--space", str(space), *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, env=env, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        deadline = time.monotonic() + 120
        while not (out / "trials" / "0000" / "last.pt").exists():
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        process.kill()
        process.wait()
    config = SearchConfig(data=str(images), out=str(out), space=str(space), **options)
    before = open_study(config, create=False).get_trials()
    assert [t.state.name for t in before] == ["RUNNING"]
    done = subprocess.run([*command, "--resume", "--workers=2"], env=env, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "trials 0 had lost their worker" in done.stdout
    trials = open_study(config, create=False).get_trials()
    assert [t.state.name for t in trials] == ["FAIL", "COMPLETE", "COMPLETE", "COMPLETE"]
    again = trials[1]
    assert retried(again) == 0
    assert again.params == before[0].params
    assert list(again.intermediate_values) == list(range(1, 13))
    # The epochs before the kill are those of the lost trial, not trained anew.
    old, new = (read_metrics(out / "trials" / name) for name in ("0000", "0001"))
    assert 1 <= len(old) < 12
    assert new[: len(old)] == old


# ---------------------------------------------------------------- report


def test_importance_finds_the_choice_that_matters(tmp_path: Path) -> None:
    space = Space.from_plain(
        {"cell": ["gru", "lstm", "blt"], "peepholes": [True, False], "width": [4, 8], "lr": {"low": 1e-3, "high": 1e-2}}
    )
    study = optuna.create_study(direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0))

    def objective(trial: Any) -> float:
        architecture, training = space.suggest(trial)
        trial.set_user_attr("parameters", 100 * architecture.width)
        return {"gru": 0.9, "lstm": 0.5, "blt": 0.1}[architecture.cell] + 0.01 * training["lr"]

    study.optimize(objective, n_trials=40)
    shares = importances(completed(study), space, replicates=20)
    assert next(iter(shares)) == "cell"
    assert shares["cell"].value > 0.7
    assert shares["cell"].low > 0.5
    assert all(0 <= share.low <= share.high <= 1 for share in shares.values())
    assert shares["width"].high < shares["cell"].low
    assert importances(completed(study), space, replicates=20) == shares
    assert not importances(completed(study), space, replicates=0)["cell"].known
    assert set(shares) == {"cell", "peepholes", "width", "lr"}
    front = pareto_front(completed(study))
    assert [t.user_attrs["parameters"] for t in front] == sorted({t.user_attrs["parameters"] for t in front})
    assert front[-1].value == study.best_value
    few = optuna.create_study(direction="maximize")
    assert importances(completed(few), space) == {}


# ---------------------------------------------------------------- options


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"trials": 0}, "trials: expected at least 1"),
        ({"workers": 0}, "workers: expected at least 1"),
        ({"objective": "best"}, r"objective: expected one of \['last', 'mean'\], got 'best'"),
        ({"epochs": 0}, "epochs: expected at least 1"),
        ({"resume": True, "overwrite": True}, "resume, overwrite: expected at most one"),
        ({"storage": "postgresql://h/d", "overwrite": True}, "overwrite: a study in a storage of your own"),
        ({"max_parameters": 0}, "max_parameters: expected at least 1"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        SearchConfig(data="d", out="o", **options)


def test_command_tells_errors_in_one_line(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    common = ["search", "--data", str(images), "--out", str(tmp_path / "s")]
    for more, message in (
        (["--space", "cels"], "did you mean 'cells'"),
        (["--storage", "nonsense"], "storage: expected a database URL"),
        (["--trials", "many"], "--trials: expected a whole number, got many"),
        (["--resume"], "resume: no study.db"),
    ):
        assert main([*common, *more]) == 2
        told = capfd.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert main(["search", "--data", str(tmp_path / "absent.h5"), "--out", str(tmp_path / "s")]) == 2
    assert "no such file" in capfd.readouterr().err
