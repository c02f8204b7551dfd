"""The engine: any number of processes and any interruption give the same bytes; what is wrong is named."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import torch
from extraction import CLASSES, HERE, Images, Interrupting, contents, forward, run, set_small_blocks, start, whole_run

from rnndyn_fast.extract import load_results, trajectories_path
from rnndyn_fast.train import QuietReporter


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_small_blocks(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole_run(tmp_path_factory.mktemp("whole"))


# ---------------------------------------------------------------- what is written


def test_files_hold_what_the_forward_gives(tmp_path: Path) -> None:
    out = run(tmp_path / "r.h5", limit=50)
    rows = np.arange(50) * 110 // 50
    images = torch.stack([Images(110)[int(row)][0] for row in rows])
    expected = forward(images)
    with h5py.File(trajectories_path(out)) as file:
        np.testing.assert_array_equal(file["index"][()], rows)
        np.testing.assert_array_equal(file["labels"][()], rows * 7 % CLASSES)
        np.testing.assert_allclose(file["trajectories/map"][()], expected.areas["map"])
        np.testing.assert_allclose(file["trajectories/gap"][()], expected.areas["gap"], atol=1e-6)
        np.testing.assert_array_equal(file["predictions"][()], expected.log_probs.argmax(2))
        assert file["trajectories/map"].compression == "gzip"
    results = load_results(out)
    assert list(results) == ["decodability", "moments", "norms", "rdm", "readout_zones"]
    np.testing.assert_allclose(results["norms"]["norm"][1], expected.areas["gap"].norm(dim=2).double().mean(1), rtol=1e-6)
    assert all(result.n == 50 for result in results.values())
    assert results["norms"].descriptors["data"]["images"] == 50


@pytest.mark.parametrize("count", [1, 3, 4, 13])
def test_few_images(tmp_path: Path, count: int) -> None:
    """Fewer than a batch, a chunk, a block, the shards."""
    out = run(tmp_path / "r.h5", Images(count), dtype="float16")
    with h5py.File(trajectories_path(out)) as file:
        expected = forward(torch.stack([Images(count)[i][0] for i in range(count)])).areas["map"]
        np.testing.assert_array_equal(file["trajectories/map"][()], expected.half().numpy())
    assert load_results(out)["norms"].n == count


def test_data_hash_depends_on_the_data_alone(tmp_path: Path) -> None:
    hashes = set()
    for k, batch_size in enumerate((4, 11)):
        out = run(tmp_path / f"{k}.h5", batch_size=batch_size, save=())
        hashes.add(load_results(out)["norms"].descriptors["data"]["sha256"])
    assert len(hashes) == 1
    changed = run(tmp_path / "c.h5", Images(109), save=())
    assert load_results(changed)["norms"].descriptors["data"]["sha256"] not in hashes


# ---------------------------------------------------------------- interruptions


@pytest.mark.parametrize("after", [0, 1, 4, 17, 27])
def test_interrupted_and_resumed_is_uninterrupted(whole: dict[str, bytes], tmp_path: Path, after: int) -> None:
    out = tmp_path / "r.h5"
    with pytest.raises(KeyboardInterrupt):
        run(out, reporter=Interrupting(after))
    assert not out.exists()
    assert contents(run(out)) == whole


def mortal(moment: int) -> Callable[[], int]:
    """Kill this process before or after the moment-th thing that it does to the disk; returns how many it has done."""
    count = 0

    def pulse() -> None:
        nonlocal count
        count += 1
        if count == moment:
            os.kill(os.getpid(), signal.SIGKILL)

    def around(function: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            pulse()
            result = function(*args, **kwargs)
            pulse()
            return result

        return called

    os.replace, os.fsync, shutil.rmtree = around(os.replace), around(os.fsync), around(shutil.rmtree)  # type: ignore[assignment]
    Path.rename = around(Path.rename)  # type: ignore[method-assign]
    torch.save, h5py.File = around(torch.save), around(h5py.File)
    return lambda: count


def run_forked(out: Path, moment: int) -> int:
    """Run in a forked process that is killed at its moment (0: never); its exit code."""
    child = os.fork()
    if not child:
        count = mortal(moment)
        run(out)
        out.with_suffix(".count").write_text(str(count()))
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def die_everywhere(folder: Path) -> None:
    """One extraction killed again and again, each time a little later; and several killed once, at one of the last moments."""
    assert run_forked(folder / "count.h5", 0) == 0
    last = int((folder / "count.count").read_text())
    assert last > 60
    moment = 1
    while run_forked(folder / "again.h5", moment) == -signal.SIGKILL:
        moment += 1 + moment // 2
    assert moment > 10
    for before_last in (0, 1, 2, 3, 5, 8, 11):
        out = folder / f"late{before_last}.h5"
        assert run_forked(out, last - before_last) == -signal.SIGKILL
        if not out.exists() or out.with_name(out.name + ".partial").exists():
            assert run_forked(out, 0) == 0


def test_killed_at_any_moment(whole: dict[str, bytes], tmp_path: Path) -> None:
    """kill -9 before and after renames, in a part, in a commit, in the assembly, while tidying up."""
    process = start(tmp_path / "script.h5", end=f"t.die_everywhere(Path({str(tmp_path)!r}))")
    _, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    for out in (tmp_path / "again.h5", *tmp_path.glob("late?.h5"), *tmp_path.glob("late??.h5")):
        assert contents(out) == whole, out
    assert len(list(tmp_path.glob("late*_trajectories.h5"))) == 7


def test_killed_from_outside(whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "r.h5"
    process = start(out, slow=0.05)
    partial = out.with_name("r.h5.partial")
    try:
        deadline = time.monotonic() + 60
        while not list(partial.glob("shard_*.pt")) and time.monotonic() < deadline:
            time.sleep(0.01)
    finally:
        process.kill()
        process.communicate()
    assert list(partial.glob("shard_*.pt"))
    assert not out.exists()
    reporter = Counting()
    run(out, Images(110), reporter=reporter)
    assert 0 < reporter.first < 110  # it did go on, and not begin anew
    assert contents(out) == whole


class Counting(QuietReporter):
    first = 0

    def advance(self, images: int, text: str) -> None:
        self.first = self.first or images


def test_other_options_do_not_go_on(tmp_path: Path) -> None:
    out = tmp_path / "r.h5"
    with pytest.raises(KeyboardInterrupt):
        run(out, reporter=Interrupting(10))
    with pytest.raises(ValueError, match=r"out: .*r.h5.partial holds unfinished work of another kind \(batch_size: 4, now 5\)"):
        run(out, batch_size=5)
    with pytest.raises(ValueError, match=r"data.images: 110, now 111"):
        run(out, Images(111))
    run(out, batch_size=5, overwrite=True)
    assert load_results(out)["norms"].n == 110
    with pytest.raises(FileExistsError, match=r"out: .* exists"):
        run(out)


# ---------------------------------------------------------------- several processes


@pytest.mark.parametrize("count", [2, 4])
def test_several_processes_give_the_bytes_of_one(whole: dict[str, bytes], tmp_path: Path, count: int) -> None:
    out = tmp_path / "r.h5"
    launcher = ("-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}")
    process = start(out, launcher=launcher)
    _, errors = process.communicate(timeout=240)
    assert process.returncode == 0, errors[-5000:]
    assert contents(out) == whole


def test_a_process_that_fails_stops_all(tmp_path: Path) -> None:
    out = tmp_path / "r.h5"
    more = "t.Images.__init__.__defaults__ = (None, 109, 0.0)"
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")
    process = start(out, launcher=launcher, more=more)
    _, errors = process.communicate(timeout=240)
    assert process.returncode != 0
    assert "Images[109]: no such sector" in errors
    assert not out.exists()


def test_more_processes_than_shards_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rnndyn_fast.processes import Processes

    monkeypatch.setattr(Processes, "__init__", lambda self: self.__dict__.update(rank=0, count=5))
    monkeypatch.setattr(Processes, "all_of", lambda self, value: [value] * 5)
    with pytest.raises(ValueError, match="shards: expected at least one for each of 5 processes, got 4"):
        run(tmp_path / "r.h5")


def test_backend_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnndyn_fast import processes

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert processes.choose_backend() == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(processes.dist, "is_nccl_available", lambda: True)
    for local, backend in (("2", "nccl"), ("3", "gloo")):  # NCCL wants a GPU per process
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert processes.choose_backend() == backend


# ---------------------------------------------------------------- memory


def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path) -> None:
    """Fresh processes, ten times the images: the peaks differ by less than the states of a few hundred samples."""
    peaks = {}
    code = """
        import sys
        sys.path.insert(0, {here!r})
        import torch
        torch.set_num_threads(1)
        from bench_extract import stream_samples
        stream_samples({count}, {out!r})
        print([line.split()[1] for line in open("/proc/self/status") if line.startswith("VmHWM")][0])
    """
    for count in (10_000, 100_000):
        text = textwrap.dedent(code).format(here=str(HERE.parent / "benchmarks"), count=count, out=str(tmp_path / f"{count}.h5"))
        done = subprocess.run([sys.executable, "-c", text], capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr
        peaks[count] = int(done.stdout.split()[-1])
    assert peaks[100_000] - peaks[10_000] < 12_000  # KiB
