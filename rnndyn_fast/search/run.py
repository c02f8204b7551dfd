"""Running a search: workers that take trials from the study until enough of them are finished."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnndyn_fast.data import ImageFile
from rnndyn_fast.file_io import write_text
from rnndyn_fast.graph.schedule import compile_schedule
from rnndyn_fast.graph.spec.yaml_files import network_to_plain
from rnndyn_fast.optional import require
from rnndyn_fast.search.architecture import build_network, count_parameters
from rnndyn_fast.search.config import SearchConfig
from rnndyn_fast.search.report import CONFIG, REPORT, TRIALS, write_report
from rnndyn_fast.search.space import Space
from rnndyn_fast.search.storage import (
    INFEASIBLE,
    LOCK,
    STORAGE,
    WORKER,
    accuracy,
    finished,
    import_optuna,
    locked,
    mark_worker,
    open_study,
    queue_again,
    recover,
    retried,
)
from rnndyn_fast.search.training import train_quietly
from rnndyn_fast.train import EpochMetrics, config_yaml
from rnndyn_fast.train.loop import LAST

if TYPE_CHECKING:
    from optuna import Study, Trial

WAIT_S = 1.0  # between looks at trials that other workers still run
Say = Callable[[str], None]


def search(config: SearchConfig, *, say: Say = print) -> Path:
    """Search architectures.

    In the folder ``config.out``: ``study.db`` (unless there is another storage), ``trials/<number>/`` (each a training run with
    its ``train.yaml``), ``search.yaml``, and at the end ``report.html``, ``trials.csv`` and ``best/<rank>.yaml``. A search that was
    killed continues with ``resume``: trials whose worker is gone are run again from their last epoch.

    Args:
        config: what to do.
        say: takes a line for every finished trial (in worker processes they are printed).

    Returns:
        The path of the report.

    Raises:
        FileExistsError: ``out`` holds a search, and neither `resume` nor `overwrite` is set.
        FileNotFoundError: no data, no space file, or nothing to resume.
        ValueError: the study was begun with other options or another space; bad data.
        ChildProcessError: workers ended before the search did.

    Deterministic: every trial is, on a CPU, from its ``train.yaml``; which trials are made depends, with several workers, on their timing.
    """
    out, space = Path(config.out), config.load_space()
    with ImageFile(config.data, required_splits=("train", "val"), argument="data"):
        pass
    _prepare(config, out)
    study = open_study(config, create=config.storage is None or not config.resume)
    _check_record(study, config, space)
    write_text(out / CONFIG, _yaml({**config.to_dict(), "resume": False, "overwrite": False}))
    again = recover(study)
    if again:
        say(f"trials {', '.join(map(str, again))} had lost their worker and are run again")
    if config.workers == 1:
        work(config, 0, say=say)
    else:
        _workers(config)
    done = finished(study.get_trials(deepcopy=False))
    if len(done) < config.trials:
        raise ChildProcessError(f"search: {len(done)} of {config.trials} trials are finished; --resume continues")
    return write_report(study, config, space)


def _prepare(config: SearchConfig, out: Path) -> None:
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    own = [out / name for name in (STORAGE, TRIALS, CONFIG, REPORT, "best", "trials.csv", LOCK)]
    if config.overwrite:
        for path in own:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif config.resume:
        if config.storage is None and not (out / STORAGE).exists():
            raise FileNotFoundError(f"resume: no {STORAGE} in {out}")
    elif out.exists() and any(out.iterdir()):
        raise FileExistsError(f"out: {out} is not empty; use --resume to continue or --overwrite to replace the search")
    out.mkdir(parents=True, exist_ok=True)


def _check_record(study: Study, config: SearchConfig, space: Space) -> None:
    """The study's settings are those of this search, or it has none yet."""
    own = {"settings": config.settings(), "space": space.to_plain()}
    for name, values in own.items():
        before = study.user_attrs.get(name)
        if name == "settings" and before is not None:  # (options that came later had their defaults)
            before = {f.name: f.default for f in dataclasses.fields(config) if f.name in values} | before
        if before is None:
            study.set_user_attr(name, values)
        elif before != values:
            keys = [key for key in {**before, **values} if before.get(key) != values.get(key)]
            told = "; ".join(f"{key} was {before.get(key)!r}, is {values.get(key)!r}" for key in sorted(keys))
            raise ValueError(f"resume: the search was begun with other {name}: {told}")
    if not config.resume and config.storage is not None and study.get_trials(deepcopy=False):
        raise FileExistsError(f"storage: there is a study {config.study!r} already; use --resume to join it, or another name (study)")


def _yaml(values: dict[str, Any]) -> str:
    require("yaml")

    import yaml

    return yaml.safe_dump(values, sort_keys=False)


def _workers(config: SearchConfig) -> None:
    """Run the workers, each in a process of its own, and wait for them."""
    context = multiprocessing.get_context("spawn")
    processes = [context.Process(target=_worker, args=(config, index, os.getpid()), daemon=True) for index in range(config.workers)]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    except BaseException:
        for process in processes:
            process.terminate()
        for process in processes:
            process.join(timeout=10)
        raise


def _worker(config: SearchConfig, index: int, parent: int) -> None:
    try:
        work(config, index, parent=parent)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def work(config: SearchConfig, index: int, *, parent: int | None = None, say: Say = lambda text: print(text, flush=True)) -> None:
    """Take trials until enough are finished.

    Args:
        config: the search.
        index: of the worker: its sampler draws other numbers than that of the others.
        parent: process without which the worker stops.
        say: takes a line for every finished trial.
    """
    optuna = import_optuna()
    out, space = Path(config.out), config.load_space()
    study = open_study(config, create=False)
    begun = len(study.get_trials(deepcopy=False))
    # Another seed in every worker, and after every resume: equal ones would propose equal trials.
    study = open_study(config, create=False, sampler_seed=((config.seed * 1009 + index) * 100_003 + begun) % 2**32)
    with ImageFile(config.data, required_splits=("train", "val"), argument="data") as file:
        image = {"image_size": file.image_size, "num_classes": file.num_classes}
    while True:
        _check_parent(parent)
        # Held until the trial runs: no two workers take the last one.
        with locked(out) as lock:
            recover(study)
            trials = study.get_trials(deepcopy=False)
            done = len(finished(trials))
            if done >= config.trials:
                return
            running = sum(t.state == optuna.trial.TrialState.RUNNING for t in trials)
            if done + running < config.trials:

                def objective(trial: Trial, release: Callable[[], None] = lock.release) -> float | tuple[float, float]:
                    trial.set_user_attr(WORKER, mark_worker())
                    release()
                    try:
                        return run_trial(trial, study, config, space, image, parent)
                    except KeyboardInterrupt:
                        queue_again(study, study.get_trials()[trial.number], None)  # stopping by hand costs no try
                        raise

                study.optimize(objective, n_trials=1, catch=(), callbacks=[lambda s, t: say(_line(t))])
                continue
        time.sleep(WAIT_S)  # one of those that run may yet fail


def _check_parent(parent: int | None) -> None:
    if parent is not None and os.getppid() != parent:
        raise KeyboardInterrupt  # as if stopped by hand


def run_trial(
    trial: Trial, study: Study, config: SearchConfig, space: Space, image: dict[str, Any], parent: int | None = None
) -> float | tuple[float, float]:
    """Train the architecture that the trial chooses; returns the best epoch's validation accuracy, with what is minimised
    beside it.

    Raises:
        optuna.TrialPruned: the pruner ends it, its loss is not finite, or it is passed over (too large, or no network).
    """
    optuna = import_optuna()
    architecture, training = space.suggest(trial)
    try:
        network = build_network(architecture, **image)
    except ValueError as error:
        raise _infeasible(trial, str(error)) from error
    folder = Path(config.out) / TRIALS / f"{trial.number:04d}"
    options = config.trial_config(str(folder), network_to_plain(network), training)
    assert options.timesteps is not None  # (a spec has a default)
    schedule = compile_schedule(network, options.timesteps, ("gap",))
    parameters = count_parameters(network)
    for name, value in (("parameters", parameters), ("multiply_adds", schedule.multiplications()[0]), ("config", config_yaml(options))):
        trial.set_user_attr(name, value)
    if config.max_parameters is not None and parameters > config.max_parameters:
        raise _infeasible(trial, f"{parameters:,} parameters, more than {config.max_parameters:,}")
    twin = _twin(trial, study)
    if twin is not None:
        trial.set_user_attr("same_as", twin.number)
        for epoch, value in twin.intermediate_values.items():
            trial.report(value, epoch)
        return _objectives(trial, accuracy(twin), config)

    told = 0  # epochs; after a resume those before it are told first
    began = time.process_time()

    def on_epoch(rows: Sequence[EpochMetrics]) -> None:
        nonlocal told
        _check_parent(parent)
        for row in rows[told:] if config.minimise == "none" else ():  # (Optuna takes no reports where there are two objectives)
            trial.report(_score(row, config), row.epoch)
        told = len(rows)
        trial.set_user_attr("seconds", sum(row.seconds for row in rows))
        trial.set_user_attr("processor_seconds", time.process_time() - began)  # of this worker; a lost one's are lost with it
        if config.pruner != "none" and len(rows) < options.epochs and trial.should_prune():
            raise optuna.TrialPruned(f"worse than others ({config.pruner}) after epoch {len(rows)}")

    _take_over(trial, folder)
    try:
        rows = train_quietly(options, on_epoch)
    except FloatingPointError as error:
        trial.set_user_attr("diverged", str(error))
        raise optuna.TrialPruned(str(error)) from error
    if not told:  # all epochs were done before its worker died
        on_epoch(rows)
    return _objectives(trial, max(_score(row, config) for row in rows), config)


def _objectives(trial: Trial, value: float, config: SearchConfig) -> float | tuple[float, float]:
    return value if config.minimise == "none" else (value, float(trial.user_attrs[config.minimise]))


def _score(row: EpochMetrics, config: SearchConfig) -> float:
    return row.val_accuracy[-1] if config.objective == "last" else row.mean_val_accuracy


def _infeasible(trial: Trial, reason: str) -> Exception:
    trial.set_user_attr(INFEASIBLE, reason)
    pruned: Exception = import_optuna().TrialPruned(reason)
    return pruned


def _twin(trial: Trial, study: Study) -> Any:
    """A completed trial with the same choices: it would come out the same."""
    optuna = import_optuna()
    done = study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.COMPLETE,))
    return next((other for other in done if other.params == trial.params), None)


def _take_over(trial: Trial, folder: Path) -> None:
    """Copy what the trial that this one repeats has left behind, if it is there."""
    before = retried(trial.study.get_trials(deepcopy=False)[trial.number])
    if before is not None and not folder.exists():
        old = folder.with_name(f"{before:04d}")
        if (old / LAST).exists():
            folder.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:  # atomically
                shutil.copytree(old, Path(scratch) / folder.name)
                os.replace(Path(scratch) / folder.name, folder)


def _line(trial: Any) -> str:
    """A finished trial in one line."""
    attributes = trial.user_attrs
    choices = ", ".join(f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}" for name, value in trial.params.items())
    if INFEASIBLE in attributes:
        return f"trial {trial.number}: passed over, {attributes[INFEASIBLE]}"
    value = f" {100 * accuracy(trial):.2f}%" if trial.values else ""
    again = f" (same as trial {attributes['same_as']})" if "same_as" in attributes else ""
    what = f"{attributes.get('parameters', 0):,} parameters, {attributes.get('seconds', 0):.0f} s"
    return f"trial {trial.number}: {trial.state.name.lower()}{value}{again}, {what}; {choices}"
