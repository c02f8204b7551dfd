"""Peak memory of the readout-zone analysis of 25,000 trajectories (T 10, C 100, D 512) that are at hand, beyond their own.

    pytest benchmarks/bench_readout_zones_memory.py -s

RNNDYN_BENCH_SAMPLES sets another number of trajectories.
"""

from __future__ import annotations

import os

from measure import peak_memory, write_result

SAMPLES = int(os.environ.get("RNNDYN_BENCH_SAMPLES", "25000"))
STEPS, CLASSES, DIMS = 10, 100, 512
PEAK_LIMIT = 200 * 2**20
_ANALYSE = """
import numpy as np
from rnndyn_fast.analysis import readout_zones
rng = np.random.default_rng(0)
samples, steps, classes, dims = {samples}, {steps}, {classes}, {dims}
trajectories = np.empty((steps, samples, dims), np.float32)
for step in trajectories:  # written step by step: no temporary array of the size of all
    rng.standard_normal(out=step, dtype=np.float32)
weight, labels = rng.standard_normal((classes, dims), np.float32), rng.integers(0, classes, samples)
readout_zones(trajectories[:, :64], weight, labels[:64])  # what is loaded at first use
"""


def test_peak_memory() -> None:
    """What the analysis adds to the peak of a process that holds its inputs."""
    baseline = _ANALYSE.format(samples=SAMPLES, steps=STEPS, classes=CLASSES, dims=DIMS)
    added = peak_memory("readout_zones(trajectories, weight, labels)", baseline=baseline)
    sizes = {"samples": SAMPLES, "steps": STEPS, "classes": CLASSES, "dims": DIMS}
    if SAMPLES == 25000:  # other sizes do not count
        write_result("readout_zones_memory", {"what": "peak memory of the analysis", **sizes, "peak_bytes": {"rnndyn": added}})
    print(f"peak memory above the inputs: {added / 2**20:.0f} MiB")
    assert added < PEAK_LIMIT
