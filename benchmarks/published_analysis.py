"""The published readout-zone analysis as it is computed there: NumPy, one sample and one pair at a time.

Written afresh from a description of the published notebook (arXiv 2308.12435): activations and readout held in memory,
Python loops over samples, and for the cosine to the others' final classes a double loop over samples at every time
step. It is the peer of ``bench_readout_zones.py`` and the oracle of ``tests/test_analysis_reducer.py``.
"""

from __future__ import annotations

from typing import Any

import numpy as np


def cosine(a: np.ndarray, b: np.ndarray) -> float:  # [D], [D]
    """Cosine of two vectors."""
    return float(np.dot(a, b) / (np.linalg.norm(a) * np.linalg.norm(b)))


def trajectory_groups(predicted: np.ndarray, labels: np.ndarray) -> dict[str, list[int]]:  # [T, N], [N]
    """Index sets and times of the four groups, one trajectory at a time."""
    names = ("stable_correct", "t_stable_correct", "stable_incorrect", "t_stable_incorrect", "label_stable_incorrect")
    out: dict[str, list[int]] = {name: [] for name in (*names, "unstable_correct", "t_unstable_correct", "unstable_incorrect")}
    steps = len(predicted)
    for i in range(len(labels)):
        trajectory, label = predicted[:, i], labels[i]
        start = steps - 1
        while start > 0 and trajectory[start - 1] == trajectory[-1]:
            start -= 1
        last_changes = steps > 1 and trajectory[-2] != trajectory[-1]
        first = int(np.where(trajectory == trajectory[-1])[0][0])
        if not last_changes and first == start:
            if trajectory[-1] == label:
                out["stable_correct"].append(i)
                out["t_stable_correct"].append(start)
            else:
                out["stable_incorrect"].append(i)
                out["t_stable_incorrect"].append(start)
                out["label_stable_incorrect"].append(int(trajectory[-1]))
        elif label in trajectory:
            out["unstable_correct"].append(i)
            out["t_unstable_correct"].append(int(np.where(trajectory == label)[0][0]))
        else:
            out["unstable_incorrect"].append(i)
    return out


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def published_analysis(
    trajectories: np.ndarray,  # [T, N, D]
    readout_weight: np.ndarray,  # [C, D]
    labels: np.ndarray,  # [N]
    log_probs: np.ndarray,  # [T, N, C]
) -> dict[str, Any]:
    """Every array that the published analysis computes, under the names of ``ReadoutZoneResult``."""
    steps = len(trajectories)
    predicted = np.argmax(log_probs, axis=-1)  # [T, N]
    out: dict[str, Any] = {"accuracy": np.array([np.mean(predicted[t] == labels) for t in range(steps)])}
    out |= {name: np.array(values, dtype=np.int64) for name, values in trajectory_groups(predicted, labels).items()}
    chosen, times = out["stable_correct"], out["t_stable_correct"]

    change = np.zeros((len(chosen), steps - 1))
    for row, i in enumerate(chosen):
        for t in range(steps - 1):
            change[row, t] = np.linalg.norm(trajectories[t + 1, i] - trajectories[t, i])
    out["representation_change"] = change
    per_time = np.array([np.sum(times == t) for t in range(steps)])
    few = np.where(per_time < 0.01 * per_time[0])[0]
    out["max_t_analysed"] = int(few[0]) if len(few) else steps

    norm, current, final = (np.full((steps, 2), np.nan) for _ in range(3))
    for t in range(steps):
        norms: tuple[list[float], list[float]] = ([], [])
        cosines: tuple[list[float], list[float]] = ([], [])
        later, own, other = [], [], []
        for i, t_stable in zip(chosen, times, strict=True):
            column = 0 if t_stable <= t else 1
            r = trajectories[t, i]
            norms[column].append(float(np.linalg.norm(r)))
            cosines[column].append(cosine(r, readout_weight[predicted[t, i]]))
            if column == 1:
                later.append(i)
                own.append(cosine(r, readout_weight[labels[i]]))
        for i in later:
            for j in later:
                if predicted[t, i] == predicted[t, j] and labels[i] != labels[j]:
                    other.append(cosine(trajectories[t, i], readout_weight[labels[j]]))
        norm[t] = [_mean(values) for values in norms]
        current[t] = [_mean(values) for values in cosines]
        final[t] = _mean(own), _mean(other)
    return out | {"norm_now_vs_later": norm, "cos_current_now_vs_later": current, "cos_final_vs_other": final}
