"""A search on two machines through PostgreSQL: one of them goes down in the middle of a trial."""

from __future__ import annotations

import datetime
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from postgresql import postgresql_server

from rnndyn_fast.cli import main
from rnndyn_fast.data import make_dataset
from rnndyn_fast.search import SearchConfig
from rnndyn_fast.search.storage import WORKER, finished, open_study, retried, storage_url

pytest.importorskip("optuna")
pytest.importorskip("psycopg")

HEARTBEAT_S = 1
OPTIONS: dict[str, Any] = {
    "trials": 5, "epochs": 8, "timesteps": 2, "batch_size": 32, "startup_trials": 3, "pruning_trials": 100, "backend": "reference",
    "heartbeat_s": HEARTBEAT_S,
}  # fmt: skip
# A process that takes itself to be on a machine of that name: whether another's workers live, only their signs of life tell.
ELSEWHERE = "import socket, sys; socket.gethostname = lambda: sys.argv.pop(1); name = socket.gethostname(); "
ELSEWHERE += "socket.gethostname = lambda: name; from rnndyn_fast.cli import main; sys.exit(main())"


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with postgresql_server() as url:
        yield url


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "digits.h5"
    return make_dataset(path, source="digits", size=16, num_train=96, num_val=50, num_test=20, num_testplus=20)


def test_machine_that_goes_down(url: str, images: Path, tmp_path: Path) -> None:
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"cell": ["blt", "simplernn"], "depth": 1, "width": [4, 6], "lr": {"low": 1e-3, "high": 1e-2}}))
    common = {"data": str(images), "space": str(space), "storage": url, **OPTIONS}
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    config = SearchConfig(**common, out=str(tmp_path / "one"))

    def start(machine: str, **more: Any) -> subprocess.Popen[str]:
        words = [f"--{name}={value}" for name, value in {**common, "out": tmp_path / machine, **more}.items()]
        command = [sys.executable, "-c", ELSEWHERE, machine, "search", *words]
        return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    one = start("one")
    others: list[subprocess.Popen[str]] = []
    try:
        deadline = time.monotonic() + 120
        while not (tmp_path / "one" / "trials" / "0000" / "last.pt").exists():
            assert one.poll() is None, one.communicate()[0]
            assert time.monotonic() < deadline
            time.sleep(0.02)
        others.append(start("two", resume=True))
        one.kill()
        killed = datetime.datetime.now()
        told = others[0].communicate(timeout=240)[0]
    finally:
        for process in (one, *others):
            process.kill()
            process.wait()
    assert others[0].returncode == 0, told
    trials = open_study(config, create=False).get_trials()
    assert trials[0].state.name == "FAIL"
    assert trials[0].user_attrs[WORKER]["host"] == "one"
    # Nothing is lost: the trial is there again, with its choices, from the other machine.
    (again,) = [t for t in trials if retried(t) == 0]
    assert again.state.name == "COMPLETE"
    assert again.params == trials[0].params
    assert again.user_attrs[WORKER]["host"] == "two"
    # Not before signs of life have been missing for five beats (the last one may have been a beat before the end).
    assert again.datetime_start is not None
    assert (again.datetime_start - killed).total_seconds() >= 4 * HEARTBEAT_S - 0.5
    # Nothing is counted twice: five trials are finished, and as many networks were trained to their end.
    done = finished(trials)
    assert len(done) == OPTIONS["trials"]
    assert len(trials) == OPTIONS["trials"] + 1
    assert len({t.number for t in done}) == len(done)
    assert "5 finished trials" in (tmp_path / "two" / "report.html").read_text()


def test_two_workers_of_one_machine(url: str, images: Path, tmp_path: Path) -> None:
    """The number of trials is exact, no number is given twice, and both take part."""
    space = tmp_path / "space.yaml"
    space.write_text(yaml.safe_dump({"cell": ["blt"], "depth": 1, "width": 4, "lr": {"low": 1e-3, "high": 1e-2}}))
    options = {**OPTIONS, "trials": 6, "epochs": 4}
    words = ["--data", str(images), "--out", str(tmp_path / "s"), "--space", str(space), "--storage", url, "--study", "pair"]
    words += [f"--{name}={value}" for name, value in options.items()]
    assert main(["search", *words, "--workers", "2"]) == 0
    config = SearchConfig(data=str(images), out=str(tmp_path / "s"), space=str(space), storage=url, study="pair", **options)
    trials = open_study(config, create=False).get_trials()
    assert [t.state.name for t in trials] == ["COMPLETE"] * 6
    assert len({t.user_attrs[WORKER]["pid"] for t in trials}) == 2
    assert all((tmp_path / "s" / "trials" / f"{t.number:04d}" / "best.pt").exists() for t in trials)


def test_servers_that_are_not_there(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    words = ["search", "--data", str(images), "--out", str(tmp_path / "s"), "--storage", f"postgres://me:secret@/x?host={tmp_path}"]
    assert main(words) == 2
    told = capfd.readouterr().err
    assert "storage: postgresql+psycopg://me:***@/x" in told
    assert "cannot be used" in told
    assert "secret" not in told
    assert told.count("\n") == 1


def test_driver_that_is_not_there(images: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)  # importing it fails
    assert main(["search", "--data", str(images), "--out", str(tmp_path / "s"), "--storage", "postgresql://me@host/x"]) == 2
    told = capfd.readouterr().err
    assert "psycopg is needed for trials in a PostgreSQL database" in told
    assert 'pip install "rnndyn-fast[search-postgresql]"' in told
    assert storage_url(SearchConfig(data="d", out="o", storage="postgresql+psycopg2://h/x")) == "postgresql+psycopg2://h/x"
