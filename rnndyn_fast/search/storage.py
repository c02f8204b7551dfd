"""The study of a search: its storage, and trials whose worker has died."""

from __future__ import annotations

import copy
import fcntl
import os
import re
import socket
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rnndyn_fast.optional import require
from rnndyn_fast.search.config import SearchConfig

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

STORAGE, LOCK = "study.db", ".lock"
WORKER, INFEASIBLE = "worker", "infeasible"
MAX_RETRIES = 3


def import_optuna() -> Any:
    """Optuna, told to be quiet. Raises ImportError that names the extra."""
    require("optuna")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    # Heartbeats and what follows from them are called experimental.
    warnings.filterwarnings("ignore", category=optuna.exceptions.ExperimentalWarning)
    return optuna


def storage_url(config: SearchConfig) -> str:
    """Where the study is kept. PostgreSQL is spoken to by psycopg, unless the URL names another driver."""
    if config.storage is None:
        return f"sqlite:///{(Path(config.out) / STORAGE).absolute()}"
    return re.sub(r"^postgres(ql)?://", "postgresql+psycopg://", config.storage)


def open_study(config: SearchConfig, *, create: bool, sampler_seed: int = 0) -> Study:
    """The study of a search, with its sampler and pruner.

    Raises:
        FileNotFoundError: there is none, and `create` is False. ImportError: optuna, or the database's driver, is missing.
        OSError: the database cannot be reached.
    """
    optuna = import_optuna()
    require("optuna")

    from optuna.storages import RDBStorage
    from sqlalchemy.exc import ArgumentError, NoSuchModuleError, SQLAlchemyError

    url = storage_url(config)
    if url.startswith("postgresql+psycopg:"):
        require("psycopg")
    # Two workers may want to write to an SQLite file at once: one waits for the other.
    engine = {"connect_args": {"timeout": 120}} if url.startswith("sqlite") else {"pool_pre_ping": True}
    sampler, pruner = _sampler(optuna, config, sampler_seed), _pruner(optuna, config)
    try:
        storage = RDBStorage(
            url,
            engine_kwargs=engine,
            heartbeat_interval=config.heartbeat_s,
            grace_period=5 * config.heartbeat_s,
            heartbeat_stale_trial_callback=queue_again,
        )
        if create:
            directions = ["maximize"] if config.minimise == "none" else ["maximize", "minimize"]
            return optuna.create_study(
                storage=storage, sampler=sampler, pruner=pruner, study_name=config.study, directions=directions, load_if_exists=True
            )
        return optuna.load_study(study_name=config.study, storage=storage, sampler=sampler, pruner=pruner)
    except KeyError as error:
        raise FileNotFoundError(f"resume: no study {config.study!r} in {_shown(url)}") from error
    except (ArgumentError, NoSuchModuleError) as error:
        raise ValueError(f"storage: expected a database URL as postgresql://user@host/name, got {_shown(url)!r}: {error}") from error
    except ImportError as error:
        raise ImportError(f"storage: the driver for {_shown(url)} is not installed: {error}") from error
    except SQLAlchemyError as error:
        reason = " ".join(str(error.__cause__ or error).split())  # (of many lines)
        raise OSError(f"storage: {_shown(url)} cannot be used: {reason}") from error


def _shown(url: str) -> str:
    """A URL without its password."""
    return re.sub(r"(//[^:/@]*):[^@]*@", r"\1:***@", url)


def _sampler(optuna: Any, config: SearchConfig, seed: int) -> Any:
    """Optuna's sampler of that name."""
    samplers = optuna.samplers
    tpe = samplers.TPESampler(seed=seed, n_startup_trials=config.startup_trials)
    if config.sampler == "random":
        return samplers.RandomSampler(seed=seed)
    if config.sampler == "nsga2":
        return samplers.NSGAIISampler(seed=seed, population_size=max(2, config.startup_trials))
    if config.sampler == "cmaes":  # of numbers; what is no number, or not asked in every trial, by TPE
        require("cmaes")
        return samplers.CmaEsSampler(
            seed=seed, n_startup_trials=config.startup_trials, independent_sampler=tpe, warn_independent_sampling=False
        )
    return tpe


def _pruner(optuna: Any, config: SearchConfig) -> Any:
    """Optuna's pruner of that name."""
    if config.pruner == "none":
        return optuna.pruners.NopPruner()
    if config.pruner == "hyperband":
        return optuna.pruners.HyperbandPruner(min_resource=max(1, config.pruning_epochs), max_resource=config.epochs)
    return optuna.pruners.MedianPruner(n_startup_trials=config.pruning_trials, n_warmup_steps=config.pruning_epochs)


def mark_worker() -> dict[str, Any]:
    """What tells this process from every other one, before and after it."""
    return {"host": socket.gethostname(), "pid": os.getpid(), "started": _started(os.getpid())}


def _started(pid: int) -> str | None:
    """When a process of this machine started (a number of its own clock), None where there is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except OSError:
        pass
    try:  # no /proc: at least whether there is a process of that number
        os.kill(pid, 0)
    except ProcessLookupError:
        return None
    except PermissionError:
        return "unknown"
    return "unknown"


def died(worker: Mapping[str, Any] | None) -> bool:
    """Whether a trial's worker was on this machine and is no longer there."""
    return worker is not None and worker["host"] == socket.gethostname() and _started(worker["pid"]) != worker["started"]


def recover(study: Study) -> list[int]:
    """Fail the running trials whose workers are gone, and queue them anew; returns their numbers.

    Workers of this machine are looked up at once; of others, signs of life are waited for (`heartbeat_s`).
    """
    require("optuna")

    import optuna
    from optuna.storages import fail_stale_trials
    from optuna.trial import TrialState

    found = []
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        if died(trial.user_attrs.get(WORKER)):
            try:
                study.tell(trial.number, state=TrialState.FAIL)
            except (ValueError, RuntimeError, optuna.exceptions.UpdateFinishedTrialError):  # another worker was faster
                continue
            queue_again(study, study.get_trials()[trial.number])
            found.append(trial.number)
    fail_stale_trials(study)
    return found


def queue_again(study: Study, trial: FrozenTrial, max_retry: int | None = MAX_RETRIES) -> None:
    """Have a trial repeated, by whoever takes the next one: the same choices, and none of what its worker left on record.

    (With the dead worker's name on it, the new trial would look lost itself until its own worker has signed it.)
    """
    require("optuna")

    from optuna.storages import RetryHeartbeatStaleTrialCallback

    bare = copy.deepcopy(trial)
    bare.user_attrs = {}
    RetryHeartbeatStaleTrialCallback(max_retry=max_retry)(study, bare)


def retried(trial: FrozenTrial) -> int | None:
    """Number of the trial that this one repeats because its worker died."""
    require("optuna")

    from optuna.storages import RetryHeartbeatStaleTrialCallback

    history = RetryHeartbeatStaleTrialCallback.retry_history(trial)
    return history[-1] if history else None


def accuracy(trial: FrozenTrial) -> float:
    """What a trial is worth: its validation accuracy, the first (or only) objective; 0 where it came to none."""
    return float(trial.values[0]) if trial.values else 0.0


def finished(trials: list[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that count: completed, or pruned after some training."""
    require("optuna")

    from optuna.trial import TrialState

    return [t for t in trials if t.state in (TrialState.COMPLETE, TrialState.PRUNED) and INFEASIBLE not in t.user_attrs]


def completed(study: Study) -> list[FrozenTrial]:
    """Completed trials, best first; of those that came out equal, the one with fewer parameters first. Repeated ones count once."""
    require("optuna")

    from optuna.trial import TrialState

    done = [t for t in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,)) if "same_as" not in t.user_attrs]
    return sorted(done, key=lambda t: (-accuracy(t), t.user_attrs["parameters"]))


@contextmanager
def locked(folder: Path) -> Iterator[Lock]:
    """A lock between the processes of this machine that work on one folder. It ends with the block, or with its process."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        lock = Lock(file)
        lock.acquire()
        try:
            yield lock
        finally:
            lock.release()


class Lock:
    """A lock on an open file; releasing it twice does no harm."""

    def __init__(self, file: Any) -> None:
        self._file = file

    def acquire(self) -> None:
        """Wait for it."""
        fcntl.flock(self._file, fcntl.LOCK_EX)

    def release(self) -> None:
        """Let the next one have it."""
        fcntl.flock(self._file, fcntl.LOCK_UN)
