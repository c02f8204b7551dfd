"""The readout-zone analysis of 25,000 trajectories (T 10, C 100, D 512) against the published loops, in the same run.

    pytest benchmarks/bench_readout_zones.py --benchmark-json=readout_zones.json

RNNDYN_BENCH_SAMPLES sets another number of trajectories. Every contender's tables are checked against the native ones.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from published_analysis import published_analysis

from rnndyn_fast.analysis import ReadoutZoneReducer, ReadoutZoneResult, readout_zones

SAMPLES = int(os.environ.get("RNNDYN_BENCH_SAMPLES", "25000"))
STEPS, CLASSES, DIMS = 10, 100, 512
NAMES = ("accuracy", "stable_correct", "t_stable_correct", "stable_incorrect", "unstable_correct", "unstable_incorrect")
TABLES = ("norm_now_vs_later", "cos_current_now_vs_later", "cos_final_vs_other")

Data = dict[str, np.ndarray]


# Published numbers of trajectories out of 25,000: per t_stable of the stable-correct, then the other three groups.
PUBLISHED_T_STABLE = (9609, 917, 627, 411, 285, 219, 159, 103, 88, 0)
PUBLISHED_STABLE_INCORRECT, PUBLISHED_UNSTABLE_CORRECT = 9850, 1295


@pytest.fixture(scope="module")
def data() -> Data:
    """Trajectories with the published numbers per group and time: each step lies in a prescribed zone, with noise."""
    rng = np.random.default_rng(0)
    share = SAMPLES / 25000
    labels, start = rng.integers(0, CLASSES, SAMPLES), rng.integers(0, CLASSES, (STEPS, SAMPLES))
    t_stable = np.repeat(np.arange(STEPS), [round(n * share) for n in PUBLISHED_T_STABLE])[:SAMPLES]
    correct, incorrect, unstable = np.cumsum(
        [len(t_stable), round(PUBLISHED_STABLE_INCORRECT * share), round(PUBLISHED_UNSTABLE_CORRECT * share)]
    )
    zone = (labels + 1 + start % (CLASSES - 1)) % CLASSES  # any class but the label
    late = np.arange(STEPS)[:, None] >= t_stable
    zone[:, :correct] = np.where(late, labels[:correct], zone[0, :correct])
    zone[:, correct:incorrect] = zone[0, correct:incorrect]
    zone[STEPS // 2, incorrect:unstable] = labels[incorrect:unstable]
    order = rng.permutation(SAMPLES)
    labels, zone = labels[order], zone[:, order]

    weight = (rng.standard_normal((CLASSES, DIMS)) / np.sqrt(DIMS)).astype(np.float32)
    base = rng.standard_normal((SAMPLES, DIMS)).astype(np.float32)
    trajectories = np.empty((STEPS, SAMPLES, DIMS), np.float32)
    for t in range(STEPS):
        noise = rng.standard_normal((SAMPLES, DIMS), np.float32) * np.float32(0.2)
        trajectories[t] = base + noise + np.float32(8) * weight[zone[t]] + np.float32(2) * weight[labels]
    logits = trajectories @ weight.T
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return {"trajectories": trajectories, "readout_weight": weight, "labels": labels, "log_probs": log_probs}


@pytest.fixture(scope="module")
def expected(data: Data) -> ReadoutZoneResult:
    return readout_zones(**data, backend="native")


def _streamed(data: Data) -> ReadoutZoneResult:
    """As inside an extraction: batches of 250, no samples kept."""
    reducer = ReadoutZoneReducer(data["readout_weight"], timesteps=STEPS)
    for start in range(0, SAMPLES, 250):
        block = slice(start, start + 250)
        reducer.update(data["trajectories"][:, block], data["labels"][block], data["log_probs"][:, block])
    return reducer.result()


CONTENDERS: dict[str, tuple[Callable[[Data], Any], int]] = {
    "native": (lambda data: readout_zones(**data, backend="native"), 5),
    "native_streamed": (_streamed, 5),
    "reference": (lambda data: readout_zones(**data, backend="reference"), 3),
    "published_loops": (lambda data: published_analysis(**data), 1),
}


@pytest.mark.parametrize("name", CONTENDERS)
def test_readout_zones(benchmark: Any, data: Data, expected: ReadoutZoneResult, name: str) -> None:
    run, rounds = CONTENDERS[name]
    if name == "published_loops":  # outside the measured time
        weight = data["readout_weight"].astype(np.float64)
        data = {key: value.astype(np.float64) for key, value in data.items() if key in ("trajectories", "log_probs")} | {
            "labels": data["labels"],
            "readout_weight": np.ascontiguousarray(weight.T).T,  # there, classes are columns of [D, C]
        }
    result = benchmark.pedantic(run, args=(data,), rounds=rounds, warmup_rounds=int(rounds > 1))
    benchmark.extra_info.update(samples=SAMPLES, steps=STEPS, classes=CLASSES, dims=DIMS, **expected.counts)
    read = result.get if isinstance(result, dict) else lambda key: getattr(result, key)
    for key in NAMES:
        if read(key) is not None:  # the streamed form keeps no samples
            np.testing.assert_array_equal(read(key), getattr(expected, key))
    for key in TABLES:
        # float32 sums of 512 products, taken in another order: measured differences are below 2e-6 of a cosine.
        np.testing.assert_allclose(read(key), getattr(expected, key), rtol=1e-4, atol=5e-6)
