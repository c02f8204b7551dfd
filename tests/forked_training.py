"""Runs of `rnndyn train` in forks of a process that has everything imported, so that dozens take seconds: kill them, stop them, go on.

Started as a script with one JSON argument: {"data", "out", "options", "task", ...}; prints one line of JSON.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import torch

from rnndyn_fast.cli import main
from rnndyn_fast.train import checkpoint  # noqa: F401  -- imported before the first fork, as all that training needs
from rnndyn_fast.train import loop as train_loop


def words(given: dict[str, Any], *more: str) -> list[str]:
    """The command line."""
    return ["train", "--data", given["data"], "--out", given["out"], *given["options"], *more]


PLACES = ("half-way", "before its renaming", "after its renaming")


def start(arguments: list[str], log: Path, killed_in: int | None = None, place: str = PLACES[0]) -> int:
    """Fork and train; returns the process. `killed_in`: in that write of a checkpoint the process kills itself, at a place of it."""
    process = os.fork()
    if process:
        return process
    if killed_in is not None:
        write, rename, count = Path.write_bytes, os.replace, 0

        def writing(path: Path, data: Any) -> int:
            nonlocal count
            count += path.suffix == ".pt"
            if count == killed_in and place == PLACES[0]:
                write(path, data[: len(data) // 2])
                os.kill(os.getpid(), signal.SIGKILL)
            return write(path, data)

        def renaming(source: Any, target: Any) -> None:
            at = count == killed_in and Path(target).suffix == ".pt"
            if not at or place == PLACES[2]:
                rename(source, target)
            if at:
                os.kill(os.getpid(), signal.SIGKILL)

        Path.write_bytes = writing  # type: ignore[method-assign]
        os.replace = renaming
    os._exit(_logged(arguments, log))


def wait(process: int) -> int:
    """Exit code of a process, or minus the signal that ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def resumable(out: Path) -> list[str]:
    """How to go on."""
    return ["--resume"] if any((out / name).exists() for name in (train_loop.LAST, train_loop.INITIAL)) else []


def kill(given: dict[str, Any]) -> dict[str, Any]:
    """Kill at random moments and in writes of checkpoints (half-way, before and after they are renamed), go on each time, and finish."""
    out, log, draw = Path(given["out"]), Path(given["out"] + ".log"), random.Random(given["seed"])
    ends = []
    for k in range(given["kills"]):
        write = draw.randrange(1, 4) if k % 4 == 3 else None
        process = start(words(given, *resumable(out)), log, write, PLACES[k // 4 % 3])
        if k % 4 != 3:
            time.sleep(draw.uniform(0.05, given["seconds"]))
            with contextlib.suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        ends.append(wait(process))
    ends.append(wait(start(words(given, *resumable(out)), log)))
    return {"ends": ends}


def stop(given: dict[str, Any]) -> dict[str, Any]:
    """Send a signal once the run is at a step within an epoch; go on; how both ended."""
    out, log = Path(given["out"]), Path(given["out"] + ".log")
    process = start(words(given), log)
    deadline = time.monotonic() + 60
    while not (out / train_loop.LAST).exists() and time.monotonic() < deadline:
        time.sleep(0.005)
    os.kill(process, given["signal"])
    stopped = wait(process)
    said = log.read_text()
    kept = torch.load(out / train_loop.LAST, weights_only=True)
    return {"stopped": stopped, "said": said, "progress": kept["progress"]["step"], "ends": [wait(start(words(given, "--resume"), log))]}


def ranks(given: dict[str, Any]) -> dict[str, Any]:
    """Jobs one after another, each in several processes as torchrun would start them; `code` runs in each before. Exit codes and output."""
    found = []
    for number, job in enumerate(given["jobs"]):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        store = torch.distributed.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)  # as the launcher's agent holds it
        logs = [Path(given["logs"]) / f"{number}_{rank}.log" for rank in range(job["count"])]
        processes = []
        for rank, log in enumerate(logs):
            process = os.fork()
            if process == 0:
                place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": job["count"], "LOCAL_WORLD_SIZE": job["count"]}
                os.environ |= {name: str(value) for name, value in place.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
                exec(job.get("code", ""), {})
                os._exit(_logged(job["words"], log))
            processes.append(process)
        if "signal" in job:
            deadline = time.monotonic() + 60
            while not Path(job["until"]).exists() and time.monotonic() < deadline:
                time.sleep(0.01)
            for process in processes:
                os.kill(process, job["signal"])
        found.append({"ends": [wait(process) for process in processes], "said": [log.read_text() for log in logs]})
        del store
    return {"jobs": found}


def _logged(arguments: list[str], log: Path) -> int:
    with open(log, "a") as stream, contextlib.redirect_stdout(stream), contextlib.redirect_stderr(stream):
        return main(arguments)


if __name__ == "__main__":
    torch.set_num_threads(1)
    arguments = json.loads(sys.argv[1])
    print(json.dumps({"kill": kill, "stop": stop, "ranks": ranks}[arguments["task"]](arguments)))
