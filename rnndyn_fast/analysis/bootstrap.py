"""Bootstrap over images: intervals of the measures, and effect sizes, from per-sample tables."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS, divide
from rnndyn_fast.analysis.results import ReadoutZoneResult

NOW_VS_LATER = ("norm", "cos_current", "margin", "boundary_distance")
PAIRED = (*(f"{name}_now_vs_later" for name in NOW_VS_LATER), "cos_final_vs_other")
_CHUNK = 100  # replicates at a time


def poisson_weights(samples: np.ndarray, replicates: range, seed: int) -> np.ndarray:  # [N] -> [B, N] uint8
    """Poisson(1) weights of images in bootstrap replicates, from a hash of (seed, replicate, image number).

    An image's weights depend on nothing else: not on the other images, their order, or the batch or process that an
    image is in. So networks that saw the same images are resampled alike, and their differences are paired.

    Deterministic: yes. Source: splitmix64 (Steele, Lea & Flood, OOPSLA 2014) twice.
    """
    key = np.asarray(samples, np.uint64)[None, :]
    stream = _splitmix(np.asarray(replicates, np.uint64)[:, None] + (np.uint64(seed) << np.uint64(32)))
    uniform = _splitmix(stream ^ _splitmix(key))
    weights = np.zeros(uniform.shape, np.uint8)
    cumulative, term = 0.0, np.exp(-1.0)
    for k in range(1, 16):  # P(w >= 16) is 2e-14
        cumulative += term
        weights += uniform >= np.uint64(min(int(cumulative * 2.0**64), 2**64 - 1))
        term /= k
    return weights


def _splitmix(value: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # arithmetic modulo 2^64 is meant
        value = value + np.uint64(0x9E3779B97F4A7C15)
        value = (value ^ (value >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        value = (value ^ (value >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        return value ^ (value >> np.uint64(31))


@dataclass
class Bootstrap:
    """Replicates of the measures of a result, along a first axis B; see `bootstrap`."""

    replicates: dict[str, np.ndarray]
    values: dict[str, np.ndarray]  # the same measures of the images as they are
    steps: dict[str, np.ndarray] = field(default_factory=dict)  # paired measure -> bool [T], steps that are averaged

    def interval(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Percentiles 2.5 and 97.5 over replicates, NaN where fewer than nine in ten replicates are defined."""
        replicates = self.replicates[name]
        defined = np.isfinite(replicates).mean(0) >= 0.9
        low, high = (np.full(replicates.shape[1:], np.nan) for _ in range(2))
        if np.any(defined):
            low[defined], high[defined] = np.nanpercentile(replicates[:, defined], (2.5, 97.5), axis=0)
        return low, high

    def estimate(self, name: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Value, lower and upper end of the 95% interval."""
        return (self.values[name], *self.interval(name))


def bootstrap(result: ReadoutZoneResult, replicates: int = 1000, *, seed: int = 0) -> Bootstrap:
    r"""Resample the images of a result with replacement, and compute every measure anew each time.

    Each replicate gives image i a weight drawn from Poisson(1); every mean becomes a weighted mean, and the mean over pairs
    (i, j) is weighted with w_i w_j. Steps that are averaged stay those of the result (below ``max_t_analysed``, both
    groups there). Measures, T steps:

    - ``accuracy`` [T], ``groups`` [4] (fractions), ``change_after_stable`` [], ``relative_change_after_stable`` [];
    - for each paired measure: its name [T, 2] and, with these endings, ``.average`` [2] over steps, ``.difference`` [] of
      the averages, and (not for ``cos_final_vs_other``) ``.effect`` []: Cohen's d, the difference of the two groups over
      their pooled standard deviation, averaged over steps.

    Args:
        result: with kept samples.
        replicates: B, how many.
        seed: of the weights.

    Returns:
        Bootstrap.

    Raises:
        ValueError: the result has no kept samples, or `replicates` is below 1.

    Deterministic: yes. Memory: 100 weights and some T scalars per image.

    >>> import numpy as np
    >>> from rnndyn_fast.analysis import readout_zones
    >>> r = readout_zones(np.random.default_rng(0).normal(size=(3, 50, 4)), np.eye(4), np.arange(50) % 4)
    >>> low, high = bootstrap(r, 200).interval("accuracy")
    >>> bool((low <= r.accuracy).all() and (r.accuracy <= high).all())
    True
    """
    if result.samples is None:
        raise ValueError("result: expected one with kept samples (keep_samples=True, --keep-samples), which the bootstrap resamples")
    if replicates < 1:
        raise ValueError(f"replicates: expected at least 1, got {replicates}")
    tables = _Tables(result)
    parts: dict[str, list[np.ndarray]] = {}
    images = np.arange(result.n)
    for start in range(0, replicates, _CHUNK):
        weights = poisson_weights(images, range(start, min(start + _CHUNK, replicates)), seed)
        for name, values in tables.measures(weights.astype(np.float64)).items():
            parts.setdefault(name, []).append(values)
    point = {name: value[0] for name, value in tables.measures(np.ones((1, result.n))).items()}
    return Bootstrap({name: np.concatenate(blocks) for name, blocks in parts.items()}, point, tables.steps)


class _Tables:
    """The samples of a result in columns, of which weighted sums make every measure."""

    def __init__(self, result: ReadoutZoneResult) -> None:
        samples = result.samples
        assert samples is not None
        self.result, self.samples = result, samples
        self.correct = (samples["predicted"] == samples["label"][:, None]).astype(np.float64)  # [N, T]
        self.groups = (samples["group"][:, None] == np.arange(len(GROUPS))).astype(np.float64)
        self.chosen = np.flatnonzero(samples["group"] == 0)
        t_stable = samples["time"][self.chosen]
        self.now = t_stable[:, None] <= np.arange(result.timesteps)  # [M, T]
        transitions = np.maximum(self.now[:, :-1].sum(1), 1)
        change, norm = samples["change"][self.chosen], samples["norm"][self.chosen][:, :-1]
        has = self.now[:, :-1].any(1)
        self.change_after = []
        for values in (change, divide(change, norm)):
            mean = np.where(self.now[:, :-1], values, 0.0).sum(1) / transitions
            self.change_after.append(np.where(has & np.isfinite(mean), mean, np.nan))
        self.steps = {}
        for name in PAIRED:
            table = result.summary(name).mean
            self.steps[name] = np.isfinite(table).all(1) & (np.arange(result.timesteps) < result.max_t_analysed)

    def measures(self, weights: np.ndarray) -> dict[str, np.ndarray]:  # [B, N]
        out: dict[str, np.ndarray] = {}
        total = weights.sum(1, keepdims=True)
        out["accuracy"] = divide(weights @ self.correct, total)
        out["groups"] = divide(weights @ self.groups, total)
        chosen = weights[:, self.chosen]  # [B, M]
        for name, values in zip(("change_after_stable", "relative_change_after_stable"), self.change_after, strict=True):
            finite = np.isfinite(values)
            out[name] = divide(chosen[:, finite] @ values[finite], chosen[:, finite].sum(1))
        for name in NOW_VS_LATER:
            values = self.samples[name][self.chosen]  # [M, T]
            moments = []
            for mask in (self.now, ~self.now):
                mask = mask & np.isfinite(values)
                kept = np.where(mask, values, 0.0)
                moments.append([chosen @ part for part in (mask.astype(np.float64), kept, np.square(kept))])
            self._paired(out, f"{name}_now_vs_later", moments)
        self._final(out, weights, chosen)
        return out

    def _paired(self, out: dict[str, np.ndarray], name: str, moments: list[list[np.ndarray]]) -> None:
        means = [divide(total, count) for count, total, _ in moments]  # [B, T] each
        spread = [
            np.maximum(squares - count * np.nan_to_num(mean) ** 2, 0.0) for (count, _, squares), mean in zip(moments, means, strict=True)
        ]
        pooled = np.sqrt(divide(spread[0] + spread[1], moments[0][0] + moments[1][0] - 2))
        effect = divide(means[0] - means[1], np.nan_to_num(pooled))
        self._averages(out, name, np.stack(means, axis=2))
        out[f"{name}.effect"] = _mean_over(effect[:, self.steps[name]])

    def _averages(self, out: dict[str, np.ndarray], name: str, table: np.ndarray) -> None:  # [B, T, 2]
        # Steps at which a replicate has an empty group are left out of both averages.
        kept = table[:, self.steps[name]]
        kept = np.where(np.isfinite(kept).all(2, keepdims=True), kept, np.nan)
        average = np.stack([_mean_over(kept[:, :, column]) for column in range(2)], axis=1)
        out[name], out[f"{name}.average"], out[f"{name}.difference"] = table, average, average[:, 0] - average[:, 1]

    def _final(self, out: dict[str, np.ndarray], weights: np.ndarray, chosen: np.ndarray) -> None:
        """Cosine to the own and to the others' final classes, as `Accumulators.pairs` with a weight per image."""
        samples, steps, classes = self.samples, self.result.timesteps, self.result.num_classes
        later = ~self.now
        own = divide(chosen @ np.where(later, samples["cos_label"][self.chosen], 0.0), chosen @ later.astype(np.float64))
        other = np.full_like(own, np.nan)
        for t in range(steps):
            rows = np.flatnonzero(samples["later_step"] == t)
            index = samples["later_sample"][rows]
            current, label = samples["predicted"][index, t], samples["label"][index]
            cosine, w = samples["later_cosine"][rows].astype(np.float64), weights[:, index]
            pairs, total = np.zeros(len(w)), np.zeros(len(w))
            for c in np.unique(current):
                inside = np.flatnonzero(current == c)
                wc, members = w[:, inside], (label[inside, None] == np.arange(classes)).astype(np.float64)
                count = wc @ members  # [B, C] n[c, a]
                pairs += count.sum(1) ** 2 - np.square(count).sum(1)
                total += (count * (wc @ cosine[inside] - wc @ (members * cosine[inside]))).sum(1)
            other[:, t] = divide(total, pairs)
        self._averages(out, "cos_final_vs_other", np.stack([own, other], axis=2))


def _mean_over(values: np.ndarray) -> np.ndarray:  # [B, S] -> [B]
    finite = np.isfinite(values)
    return divide(np.where(finite, values, 0.0).sum(1), finite.sum(1))
