"""The engine: any number of processes and any interruption give the same bytes; what is wrong is named."""

from __future__ import annotations

import os
import resource
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
from torch.utils.data import Dataset

from rnndyn_fast.analysis import DecodabilityReducer, MomentReducer, NormReducer, RdmReducer, ReadoutZoneReducer, Reducer
from rnndyn_fast.extract import Activations, DatasetSource, engine, load_results, plan, stream, trajectories_path
from rnndyn_fast.train import QuietReporter

QUIET = QuietReporter()
HERE = Path(__file__).resolve().parent
CLASSES = 5


class Images(Dataset[tuple[torch.Tensor, int]]):
    """Images that are a function of their number alone."""

    def __init__(self, count: int, nan_at: int | None = None, fail_at: int | None = None, slow: float = 0.0) -> None:
        self.count, self.nan_at, self.fail_at, self.slow = count, nan_at, fail_at, slow

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        if index == self.fail_at:
            raise OSError("no such sector")
        time.sleep(self.slow)
        values = torch.rand(3, 4, 4, generator=torch.Generator().manual_seed(index))
        if index == self.nan_at:
            values[0, 0, 0] = float("nan")
        return values, index * 7 % CLASSES


WEIGHT = torch.randn(CLASSES, 6, generator=torch.Generator().manual_seed(1))
MIXING = torch.randn(48, 6, generator=torch.Generator().manual_seed(2))


def forward(images: torch.Tensor) -> Activations:
    """A network of sorts: three steps of a map and of representations."""
    maps = torch.stack([(images - 0.4 * t).relu() for t in range(3)])
    gap = torch.stack([torch.tanh(images.flatten(1) @ MIXING * (t + 1)) for t in range(3)])
    return Activations({"map": maps, "gap": gap}, torch.log_softmax(gap @ WEIGHT.T, 2))


def reducers() -> list[Reducer]:
    both = ("map", "gap")
    return [
        ReadoutZoneReducer(WEIGHT, timesteps=3, keep_samples=True),
        NormReducer(both),
        MomentReducer(both, units=8, exact=10),
        RdmReducer(both, classes=range(CLASSES)),
        DecodabilityReducer(both, num_classes=CLASSES, held_out=20),
    ]


def run(out: Path, images: Dataset[Any] | None = None, **options: Any) -> Path:
    source = DatasetSource(Images(110) if images is None else images)
    given = {"batch_size": 4, "save": ("map", "gap"), "shards": 4, "reporter": QUIET, **options}
    return stream(forward, source, reducers(), out=out, **given)


def contents(out: Path) -> dict[str, bytes]:
    assert not out.with_name(out.name + ".partial").exists()
    return {path.name[len(out.stem) :]: path.read_bytes() for path in (out, trajectories_path(out))}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "BLOCK_IMAGES", 12)
    monkeypatch.setattr(engine, "COMMIT_SECONDS", 0.0)
    monkeypatch.setattr(engine, "COMMIT_SHARE", float("inf"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of a run that nothing interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plan, "BLOCK_IMAGES", 12)
        return contents(run(tmp_path_factory.mktemp("whole") / "r.h5"))


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


class Interrupting(QuietReporter):
    def __init__(self, after: int) -> None:
        self.left = after

    def advance(self, images: int, text: str) -> None:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize("after", [0, 1, 4, 17, 27])
def test_interrupted_and_resumed_is_uninterrupted(whole: dict[str, bytes], tmp_path: Path, after: int) -> None:
    out = tmp_path / "r.h5"
    with pytest.raises(KeyboardInterrupt):
        run(out, reporter=Interrupting(after))
    assert not out.exists()
    assert contents(run(out)) == whole


SCRIPT = """
    import sys
    sys.path.insert(0, {here!r})
    from pathlib import Path
    import torch
    torch.set_num_threads(1)
    import test_extract_engine as t
    from rnndyn_fast.extract import engine, plan
    plan.BLOCK_IMAGES, engine.COMMIT_SECONDS, engine.COMMIT_SHARE = 12, 0.0, float("inf")
    {more}
    {end}
"""


def start(out: Path, slow: float = 0.0, more: str = "", launcher: tuple[str, ...] = (), end: str = "") -> subprocess.Popen[str]:
    path = out.with_suffix(".py")
    end = end or f"t.run(Path({str(out)!r}), t.Images(110, slow={slow}))"
    path.write_text(textwrap.dedent(SCRIPT).format(here=str(HERE), more=more, end=end))
    command, pipe = [sys.executable, *launcher, str(path)], subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, env=os.environ | {"OMP_NUM_THREADS": "1"})


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
    with pytest.raises(ValueError, match=r"out: .*r.h5.partial holds an unfinished extraction of another kind \(batch_size: 4, now 5\)"):
        run(out, batch_size=5)
    with pytest.raises(ValueError, match=r"data.images: 110, now 111"):
        run(out, Images(111))
    run(out, batch_size=5, overwrite=True)
    assert load_results(out)["norms"].n == 110
    with pytest.raises(FileExistsError, match=r"out: .* exists"):
        run(out)


# ---------------------------------------------------------------- what goes wrong


def test_bad_images_are_named_and_what_was_done_is_kept(whole: dict[str, bytes], tmp_path: Path) -> None:
    out = tmp_path / "r.h5"
    with pytest.raises(ValueError, match=r"Images\[77\]: image holds NaN or infinite values"):
        run(out, Images(110, nan_at=77))
    with pytest.raises(OSError, match=r"Images\[90\]: no such sector"):
        run(out, Images(110, fail_at=90))
    assert contents(run(out)) == whole  # the blocks before were kept, and none was counted twice
    assert load_results(out)["norms"].n == 110


def test_nothing_is_left_where_nothing_was_done(tmp_path: Path) -> None:
    with pytest.raises(OSError, match=r"Images\[0\]: no such sector"):
        run(tmp_path / "r.h5", Images(110, fail_at=0))
    assert list(tmp_path.iterdir()) == []


def test_activations_with_nan_are_named(tmp_path: Path) -> None:
    def broken(images: torch.Tensor) -> Activations:
        areas, log_probs = forward(images)
        areas["map"][2, images[:, 0, 0, 0] == Images(110)[30][0][0, 0, 0]] = float("inf")
        return Activations(areas, log_probs)

    with pytest.raises(ValueError, match=r"Images\[30\]: the activation of area 'map' holds NaN or infinite values at time step 2"):
        stream(broken, DatasetSource(Images(110)), reducers(), out=tmp_path / "r.h5", batch_size=4, reporter=QUIET)


def test_images_of_another_shape_are_named(tmp_path: Path) -> None:
    class Ragged(Images):
        def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
            image, label = super().__getitem__(index)
            return (image[:, :3] if index == 9 else image), label

    with pytest.raises(ValueError, match=r"Ragged\[8\] and the 3 after it: expected an image \[3, 4, 4\] .*got \[3, 3, 4\]"):
        run(tmp_path / "r.h5", Ragged(110))


def test_half_precision_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    def large(images: torch.Tensor) -> Activations:
        return Activations({"gap": 1e5 * torch.ones(1, len(images), 2)})

    with pytest.raises(ValueError, match=r"dtype: activations of 'gap' exceed float16 \(65504\); use float32"):
        stream(large, DatasetSource(Images(9)), [NormReducer()], out=tmp_path / "r.h5", save=["gap"], dtype="float16", reporter=QUIET)


def test_full_disk(whole: dict[str, bytes], tmp_path: Path) -> None:
    """Writes fail, first of a part, then of a state, then of the final files; room is made, and it goes on."""
    out = tmp_path / "r.h5"
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        for size in (1000, 5000, 20_000, 60_000):
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
            try:
                run(out)
            except OSError as error:
                assert "r.h5.partial: cannot be written" in str(error)  # noqa: PT017
                assert "make room and run the same again" in str(error)  # noqa: PT017
            else:
                pytest.fail(f"{size} bytes were enough")
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)
            assert not out.exists()
    finally:
        signal.signal(signal.SIGXFSZ, handler)
    assert contents(run(out)) == whole


def test_damaged_states_and_parts_are_named(tmp_path: Path) -> None:
    out = tmp_path / "r.h5"
    with pytest.raises(KeyboardInterrupt):
        run(out, reporter=Interrupting(26))
    partial = out.with_name("r.h5.partial")
    part = partial / "part_000001.bin"
    good = part.read_bytes()
    part.write_bytes(good[:40] + b"?" + good[41:])
    with pytest.raises(ValueError, match=r"part_000001.bin: damaged"):
        run(out)
    part.write_bytes(good[:-3])
    with pytest.raises(ValueError, match=r"part_000001.bin: damaged"):
        run(out)
    part.write_bytes(good)
    state = partial / "shard_0000.pt"
    kept = state.read_bytes()
    state.write_bytes(kept[: len(kept) // 2])
    with pytest.raises(ValueError, match=r"shard_0000.pt: damaged"):
        run(out)
    state.write_bytes(kept)
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
    from rnndyn_fast.extract.distributed import Processes

    monkeypatch.setattr(Processes, "__init__", lambda self: self.__dict__.update(rank=0, count=5))
    monkeypatch.setattr(Processes, "all_of", lambda self, value: [value] * 5)
    with pytest.raises(ValueError, match="shards: expected at least one for each of 5 processes, got 4"):
        run(tmp_path / "r.h5")


def test_backend_of_the_process_group(monkeypatch: pytest.MonkeyPatch) -> None:
    from rnndyn_fast.extract import distributed

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert distributed.choose_backend() == "gloo"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(distributed.dist, "is_nccl_available", lambda: True)
    for local, backend in (("2", "nccl"), ("3", "gloo")):  # NCCL wants a GPU per process
        monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
        assert distributed.choose_backend() == backend


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
