"""Bootstrap over images and networks: intervals of the measures, and effect sizes, from per-sample tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS, divide
from rnndyn_fast.analysis.claim_measures import ClaimTables
from rnndyn_fast.analysis.intervals import LEVEL, Estimate, student
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
    """Replicates of the measures of a network, or of networks of one kind, along a first axis B; see `bootstrap`, `pool`."""

    replicates: dict[str, np.ndarray]
    values: dict[str, np.ndarray]  # the same measures of the images as they are
    steps: dict[str, np.ndarray] = field(default_factory=dict)  # paired measure -> bool [T], steps that are averaged
    counts: dict[str, int] = field(default_factory=dict)  # images that a measure rests on
    lag_counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))  # images of `change_by_lag`
    scales: dict[str, float] = field(default_factory=dict)  # standard deviation of a measure between images, at one step
    between: dict[str, np.ndarray] = field(default_factory=dict)  # variance of the mean over networks
    networks: int = 1

    def _spread(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """Standard error and degrees of freedom of a measure; NaN where fewer than nine in ten replicates are defined.

        Variance of images V_i (over replicates, in which all networks see the same resampled images) and of networks V_k = s^2 / K
        add; degrees of freedom are Satterthwaite's, n - 1 for V_i and K - 1 for V_k.
        """
        replicates = self.replicates[name]
        finite = np.isfinite(replicates)
        defined = finite.mean(0) >= 0.9
        kept, count = np.where(finite, replicates, 0.0), finite.sum(0)
        mean = divide(kept.sum(0), count)
        images = divide(np.where(finite, (replicates - np.nan_to_num(mean)) ** 2, 0.0).sum(0), count - 1)
        images = np.where(defined, images, np.nan)
        rounding = np.square(1e-12 * np.nan_to_num(self.values[name]))
        images = np.where(images <= rounding, 0.0, images)
        of_images = np.full(images.shape, max(self.counts.get(name, self.counts["images"]) - 1, 0), np.float64)
        if self.networks == 1:
            return np.sqrt(images), of_images
        networks = self.between[name]
        parts = divide(images**2, of_images) + networks**2 / (self.networks - 1)
        df = np.where(parts > 0, divide((images + networks) ** 2, parts), of_images)
        return np.sqrt(images + networks), df

    def interval(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """95% interval: the value and t times its standard error to either side; NaN where that is not known."""
        error, df = self._spread(name)
        half = student(1 - (1 - LEVEL) / 2, df) * error
        return self.values[name] - half, self.values[name] + half

    def estimate(self, name: str, index: Any = ()) -> Estimate:
        """A measure, or an entry of one that is a table, with its interval."""
        tables = (self.values[name], *self.interval(name), *self._spread(name))
        value, low, high, error, df = (float(np.asarray(table)[index]) for table in tables)
        return Estimate(value, low, high, error, df, self.counts.get(name, self.counts["images"]), self.networks)


def pool(boots: Sequence[Bootstrap]) -> Bootstrap:
    """Networks of one kind that saw the same images: means over networks, with the networks as the units that were drawn.

    Networks (seeds) and images are crossed: all networks saw the same images, so their errors have a part in common that more
    networks do not remove. It comes from the replicates, in which the networks are resampled alike; the rest is the variance between
    networks. (That holds some of the images' variance too, so the interval is on the wide side.)

    Raises ValueError where images or replicates differ in number, or there is no network.
    """
    if not boots:
        raise ValueError("boots: expected at least one network, got none")
    if len(boots) == 1:
        return boots[0]
    sizes = {(boot.counts["images"], len(boot.replicates["accuracy"])) for boot in boots}
    if len(sizes) > 1:
        raise ValueError(f"boots: expected the same images and number of replicates in every network, got {sorted(sizes)}")
    names = [name for name in boots[0].values if all(name in boot.values for boot in boots)]
    stacked = {name: np.stack([boot.values[name] for boot in boots]) for name in names}
    return Bootstrap(
        {name: np.mean([boot.replicates[name] for boot in boots], axis=0) for name in names},
        {name: values.mean(0) for name, values in stacked.items()},
        {name: np.logical_and.reduce([boot.steps[name] for boot in boots]) for name in boots[0].steps},
        {name: min(boot.counts[name] for boot in boots) for name in boots[0].counts if all(name in boot.counts for boot in boots)},
        np.min([boot.lag_counts for boot in boots], axis=0),
        {name: float(np.mean([boot.scales[name] for boot in boots])) for name in boots[0].scales},
        {name: values.var(0, ddof=1) / len(boots) for name, values in stacked.items()},
        len(boots),
    )


def bootstrap(
    result: ReadoutZoneResult,
    replicates: int = 1000,
    *,
    seed: int = 0,
    untrained: ReadoutZoneResult | None = None,
    condition: Any = None,  # [N]
    pairs: bool = True,
) -> Bootstrap:
    r"""Resample the images of a result with replacement, and compute every measure anew each time.

    Each replicate gives image i a weight drawn from Poisson(1); every mean becomes a weighted mean, and the mean over pairs
    (i, j) is weighted with w_i w_j. Steps that are averaged stay those of the result (``analysed_steps``). Measures, T steps:

    - ``accuracy`` [T], ``groups`` [4] (fractions), ``change_after_stable`` [], ``relative_change_after_stable`` [];
    - for each paired measure: its name [T, 2] and, with these endings, ``.average`` [2] over steps, ``.difference`` [] of
      the averages, and (not for ``cos_final_vs_other``) ``.effect`` []: Cohen's d, the difference of the two groups over
      their pooled standard deviation, averaged over steps;
    - what the claims rest on, see `ClaimTables`.

    Args:
        result: with kept samples.
        replicates: B, how many.
        seed: of the weights.
        untrained: the same images through the untrained network, with kept samples.
        condition: [N] of each image, any integers; images are then matched for it too.
        pairs: whether to take the mean over pairs, which takes most of the time.

    Returns:
        Bootstrap.

    Raises:
        ValueError: a result has no kept samples, `untrained` is of other images, or `replicates` is below 2.

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
    if replicates < 2:
        raise ValueError(f"replicates: expected at least 2, got {replicates}")
    tables = _Tables(result, pairs)
    claims = ClaimTables(result, tables.steps, untrained, condition)
    parts: dict[str, list[np.ndarray]] = {}
    images = np.arange(result.n)
    for start in range(0, replicates, _CHUNK):
        weights = poisson_weights(images, range(start, min(start + _CHUNK, replicates)), seed).astype(np.float64)
        for name, values in {**tables.measures(weights), **claims.measures(weights)}.items():
            parts.setdefault(name, []).append(values)
    ones = np.ones((1, result.n))
    point = {name: value[0] for name, value in {**tables.measures(ones), **claims.measures(ones)}.items()}
    counts = {"images": result.n, **tables.counts, **claims.counts}
    stacked = {name: np.concatenate(blocks) for name, blocks in parts.items()}
    return Bootstrap(stacked, point, tables.steps, counts, claims.lag_counts, claims.scales)


class _Tables:
    """The samples of a result in columns, of which weighted sums make every measure."""

    def __init__(self, result: ReadoutZoneResult, pairs: bool) -> None:
        samples = result.samples
        assert samples is not None
        self.result, self.samples, self.pairs = result, samples, pairs
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
        self.steps = {name: result.analysed_steps(name) for name in PAIRED}
        # A difference of two groups rests on no more images than the smaller one has: those that are late.
        late = int((t_stable > 0).sum())
        self.counts = {f"{name}{end}": late for name in PAIRED for end in (".average", ".difference", ".effect")}

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
        if self.pairs:
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
