"""The engine: what is wrong with images, activations, disks and files is named, and what was done is kept."""

from __future__ import annotations

import resource
import signal
from pathlib import Path

import pytest
import torch
from extraction import QUIET, Images, Interrupting, contents, forward, reducers, run, set_small_blocks, whole_run

from rnndyn_fast.analysis import NormReducer
from rnndyn_fast.extract import Activations, DatasetSource, load_results, stream


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    set_small_blocks(monkeypatch)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    return whole_run(tmp_path_factory.mktemp("whole"))


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
                assert "free space and run the same command again" in str(error)  # noqa: PT017
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
