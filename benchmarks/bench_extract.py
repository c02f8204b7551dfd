"""Extraction: what all reducers cost over the bare forward rollout, and memory over the number of samples.

    pytest benchmarks/bench_extract.py -q

RNNDYN_BENCH_QUICK=1 runs it tiny, to see that it works.
"""

from __future__ import annotations

import os
import shutil
import statistics
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from measure import QUICK, alternate, peak_memory, summary, write_result
from torch import Tensor

from rnndyn_fast.analysis import (
    DecodabilityReducer,
    MomentReducer,
    NormReducer,
    RdmReducer,
    ReadoutZoneReducer,
    Reducer,
    RepresentationChangeReducer,
)
from rnndyn_fast.extract import Activations, load_results, network_forward, stream
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.train import QuietReporter

AREAS = ("v2", "v4", "it", "gap")  # every area that changes in time
# Times per image are differences of two counts of batches. What is done once must take as long with few as with many: tables of 64 samples'
# moments are quicker made than those of 256, and classifiers are tested with all samples until HELD_OUT are there.
HELD_OUT = 256
BATCH, FEW, MANY, ROUNDS = (4, 1, 2, 1) if QUICK else (64, 4, 12, 5)
MEAN = STD = np.full(3, 127.0)


class Noise:
    """Images in memory, as a Source."""

    def __init__(self, count: int, size: int, classes: int = 100) -> None:
        self.class_names = [str(k) for k in range(classes)]
        self.images = torch.randint(0, 256, (count, 3, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        self.labels = torch.arange(count) % classes

    def __len__(self) -> int:
        return len(self.labels)

    def read(self, rows: np.ndarray, /) -> tuple[Tensor, Tensor]:
        return self.images[rows], self.labels[rows]

    def place(self, row: int, /) -> str:
        return f"image {row}"

    def identity(self) -> dict[str, Any]:
        return {"images": len(self)}

    def describe(self) -> dict[str, Any]:
        return {}


def all_reducers(weight: Tensor, timesteps: int, areas: tuple[str, ...], classes: int, held_out: int = 2000) -> list[Reducer]:
    """Every reducer: norms, change and moments of `areas`, the others of the pooled representations."""
    return [
        ReadoutZoneReducer(weight, timesteps=timesteps),
        NormReducer(areas),
        RepresentationChangeReducer(areas),
        MomentReducer(areas),
        RdmReducer(("gap",), classes=range(classes)),
        DecodabilityReducer(("gap",), num_classes=classes, held_out=held_out),
    ]


@pytest.mark.parametrize("kind", ["lateral_additive", "topdown_multiplicative"])
def test_extraction_over_forward(kind: str, tmp_path: Path) -> None:
    """Bare: the network's forward on the same batches, which are in memory, normalised, and nothing kept.

    What is done once per extraction, whatever the number of images (start, classifiers, files), is taken with few batches and shown apart.
    """
    topdown, interaction = kind.startswith("topdown"), kind.rpartition("_")[2]
    options: dict[str, Any] = {"image_size": 16, "widths": (2, 4, 8, 16, 32), "timesteps": 3} if QUICK else {"timesteps": 10}
    net = blt_net_64(topdown_connections=topdown, LT_interaction=interaction, **options).eval()
    source = Noise(BATCH * MANY, options.get("image_size", 64))
    bare, recorded = (network_forward(net, areas, MEAN, STD) for areas in (("gap",), AREAS))
    batches = [source.images[k * BATCH : (k + 1) * BATCH] for k in range(MANY)]
    weight, out = net.readout.weight.detach(), tmp_path / "r.h5"

    def forward(count: int) -> None:
        with torch.inference_mode():
            for images in batches[:count]:
                bare(images)

    def extraction(count: int, save: tuple[str, ...] = ()) -> None:
        reducers = all_reducers(weight, net.timesteps, AREAS, 100, HELD_OUT)
        stream(
            recorded, source, reducers, out=out, save=save, batch_size=BATCH, limit=count * BATCH, overwrite=True, reporter=QuietReporter()
        )

    runs: dict[str, Callable[[int], None]] = {
        "bare_forward": forward,
        "all_reducers": extraction,
        "and_gap_saved": lambda count: extraction(count, ("gap",)),
    }
    contenders = {f"{name}/{count}": partial(run, count) for count in (FEW, MANY) for name, run in runs.items()}
    raw = alternate(contenders, ROUNDS)
    times = {name: [b - a for a, b in zip(raw[f"{name}/{FEW}"], raw[f"{name}/{MANY}"], strict=True)] for name in runs}
    # What `FEW` batches took less what their share of the images took.
    once = statistics.median(
        raw_few - FEW / (MANY - FEW) * taken for raw_few, taken in zip(raw[f"all_reducers/{FEW}"], times["all_reducers"], strict=True)
    )
    extraction(MANY)
    with torch.inference_mode():
        norms = torch.cat([recorded(images).areas["it"].double().flatten(2).norm(dim=2) for images in batches], 1)
    np.testing.assert_allclose(load_results(out)["norms"]["norm"][AREAS.index("it")], norms.mean(1), rtol=1e-5)
    if QUICK:
        return
    result = summary(times, "bare_forward")
    print(f"\n{kind}: " + ", ".join(f"{name} {one['ours_is_faster_by'] - 1:+.1%}" for name, one in result.items()) + f", once {once:.1f} s")
    what = f"extraction of blt_net_64, {kind}"
    sizes = {"batch": BATCH, "timesteps": net.timesteps, "images": BATCH * (MANY - FEW)}
    write_result(f"extract_{kind}", {"what": what, "section": "extraction", **sizes, "once_s": round(once, 2), "contenders": result})


# ---------------------------------------------------------------- memory


class Numbers:
    """Representations that are a function of the sample's number, as a Source of images [32]."""

    class_names = tuple(str(k) for k in range(10))

    def __init__(self, count: int) -> None:
        self.count = count
        self._table = torch.randn(997, 32, generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return self.count

    def read(self, rows: np.ndarray, /) -> tuple[Tensor, Tensor]:
        index = torch.from_numpy(rows)
        return self._table[index % 997] + (index % 10)[:, None] * 0.1, index % 10

    def place(self, row: int, /) -> str:
        return f"sample {row}"

    def identity(self) -> dict[str, Any]:
        return {"samples": self.count}

    def describe(self) -> dict[str, Any]:
        return {}


def stream_samples(count: int, out: str | os.PathLike[str]) -> Path:
    """Stream so many small trajectories [4, N, 32] through all reducers."""
    steps = torch.linspace(0.5, 2.0, 4)[:, None, None]
    weight = torch.randn(10, 32, generator=torch.Generator().manual_seed(1))

    def forward(values: Tensor) -> Activations:
        return Activations({"gap": torch.tanh(values * steps)})

    reducers = all_reducers(weight, 4, ("gap",), 10)
    return stream(forward, Numbers(count), reducers, out=out, batch_size=1000, overwrite=True, reporter=QuietReporter())


COUNTS = (1_000, 5_000) if QUICK else (10_000, 100_000, 1_000_000)


def test_memory_over_samples() -> None:
    folder = Path(tempfile.mkdtemp(prefix="rnndyn-extract-"))
    try:
        baseline = "from bench_extract import stream_samples"
        peaks = {count: peak_memory(f"stream_samples({count}, {str(folder / f'{count}.h5')!r})", baseline=baseline) for count in COUNTS}
        for count in COUNTS:
            assert load_results(folder / f"{count}.h5")["norms"].n == count
    finally:
        shutil.rmtree(folder)
    print("\n" + ", ".join(f"{count:,} samples: {peak / 2**20:.0f} MiB" for count, peak in peaks.items()))
    if QUICK:
        return
    assert peaks[COUNTS[-1]] < peaks[COUNTS[0]] + 2**24  # of allocators, not of samples
    write_result(
        "extract_memory",
        {"what": "peak memory of streaming through all reducers", "section": "extraction", "dims": 32, "timesteps": 4,
         "peak_bytes": {f"{count:,} samples": peak for count, peak in peaks.items()}},
    )  # fmt: skip
