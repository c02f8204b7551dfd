"""The result of a readout-zone analysis: measures under their published names, and the file that carries them."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS, Accumulators, Summary
from rnndyn_fast.file_io import reads, replaced_atomically
from rnndyn_fast.optional import require

# A mean over fewer samples is neither drawn nor compared: its interval would not deserve the name.
MIN_GROUP = 10
FORMAT = "rnndyn_fast.readout_zones"
FORMAT_VERSION = 3


def _per_step(dtype: type, fewer: int = 0) -> Callable[[int], np.ndarray]:
    return lambda timesteps: np.zeros((0, timesteps - fewer), dtype)


def _per_sample(timesteps: int) -> np.ndarray:
    return np.zeros(0, np.int64)


# Per-sample tables that are kept on request, as makers of their empty form; rows are samples in the order of update.
SAMPLE_TABLES: dict[str, Callable[[int], np.ndarray]] = {
    "label": _per_sample,  # [N]
    "group": _per_sample,  # [N] index into GROUPS
    "time": _per_sample,  # [N] t_stable, or the first correct step of unstable-correct samples, or -1
    "predicted": _per_step(np.int64),  # [N, T]
    "norm": _per_step(np.float64),  # [N, T]
    "cos_current": _per_step(np.float64),  # [N, T] cosine to the readout vector of the predicted class
    "cos_label": _per_step(np.float64),  # [N, T]
    "margin": _per_step(np.float64),  # [N, T]
    "boundary_distance": _per_step(np.float64),  # [N, T]
    "change": _per_step(np.float64, fewer=1),  # [N, T - 1]
    # [N, T (T - 1) / 2] ||r[t] - r[s]||, s < t, in the order of np.tril_indices(T, -1)
    "distance": lambda timesteps: np.zeros((0, timesteps * (timesteps - 1) // 2)),
}

# Kept with them, one row per not-yet-stable sample and step (see `later_cosines`).
LATER_TABLES: dict[str, Callable[[int], np.ndarray]] = {
    "later_sample": lambda classes: np.zeros(0, np.int64),  # [K]
    "later_step": lambda classes: np.zeros(0, np.int64),  # [K]
    "later_cosine": lambda classes: np.zeros((0, classes), np.float32),  # [K, C]
}

# Measures [T, 2]: first column samples already stable at the step, second those not yet.
_NOW_VS_LATER = {
    "norm_now_vs_later": "norm",
    "cos_current_now_vs_later": "cos_current",
    "margin_now_vs_later": "margin",
    "boundary_distance_now_vs_later": "boundary_distance",
}
_BREAKDOWN = (
    "class_t_stable",  # [C]
    "class_norm",  # [C]
    "class_boundary_distance",  # [C]
    "norm_by_t_stable",  # [T, T]: t_stable, step
    "boundary_distance_by_t_stable",  # [T, T]
    "plane_across",  # [T, T]
    "plane_along",  # [T, T]
)
MEASURES = (
    "accuracy",  # [T]
    *_NOW_VS_LATER,  # [T, 2] each
    "cos_final_vs_other",  # [T, 2] not yet stable: own final class, final classes of the others
    "representation_change_by_t_stable",  # [T, T - 1]: t_stable, transition t -> t + 1
    "change_after_stable",  # []
    "relative_change_after_stable",  # []
    *_BREAKDOWN,
)


@dataclass
class ReadoutZoneResult:
    """Measures of the readout-zone analysis of n trajectories of T steps, with C classes and D-dimensional
    representations.

    Attributes named as in the published analysis (NaN where a group is empty):

    - ``accuracy`` [T]; ``max_t_analysed``: the first t_stable with fewer than 1% of the samples that have t_stable =
      0, else T.
    - ``norm_now_vs_later``, ``cos_current_now_vs_later`` [T, 2]: means over stable-correct samples that are already
      stable (t_stable <= t) and not yet (t_stable > t). Ours: ``margin_now_vs_later``,
      ``boundary_distance_now_vs_later``.
    - ``cos_final_vs_other`` [T, 2]: of those not yet stable, cosine to the readout vector of their own final class,
      and to those of others with the same current class and another final class (mean over ordered pairs).
    - With kept samples, else None: ``stable_correct``, ``stable_incorrect``, ``unstable_correct``,
      ``unstable_incorrect`` (indices), ``t_stable_correct``, ``t_stable_incorrect``, ``t_unstable_correct`` (first
      correct step), ``label_stable_incorrect`` (the wrong class they settle in), ``representation_change``
      [stable-correct, T - 1].

    ``summary(name)`` adds standard deviation, count and 95% interval to each of ``MEASURES``.
    """

    sums: Accumulators
    readout_weight: np.ndarray  # [C, D] float64
    bias: np.ndarray | None = None  # [C] float64
    samples: dict[str, np.ndarray] | None = None  # SAMPLE_TABLES and LATER_TABLES, where kept
    descriptors: dict[str, Any] = field(default_factory=dict)  # provenance, anything JSON can hold

    @property
    def n(self) -> int:
        """Number of trajectories."""
        return int(self.sums.samples)

    @property
    def timesteps(self) -> int:
        """T."""
        return self.sums.timesteps

    @property
    def num_classes(self) -> int:
        """C."""
        return self.sums.classes

    @property
    def counts(self) -> dict[str, int]:
        """Trajectories per group."""
        return {name: int(count) for name, count in zip(GROUPS, self.sums.groups, strict=True)}

    @property
    def counts_t_stable_correct(self) -> np.ndarray:
        """[T] stable-correct samples per t_stable."""
        return self.sums.t_stable_correct.copy()

    @property
    def counts_t_stable_incorrect(self) -> np.ndarray:
        """[T] stable-incorrect samples per t_stable."""
        return self.sums.t_stable_incorrect.copy()

    @property
    def counts_t_unstable_correct(self) -> np.ndarray:
        """[T] unstable-correct samples per first correct step."""
        return self.sums.t_unstable_correct.copy()

    @property
    def max_t_analysed(self) -> int:
        """First t_stable with fewer than 1% of the t_stable = 0 count; T where there is none."""
        below = self.sums.t_stable_correct < 0.01 * self.sums.t_stable_correct[0]
        return int(below.argmax()) if below.any() else self.timesteps

    def summary(self, name: str) -> Summary:
        """Mean, standard deviation, count and 95% half-width of one of MEASURES.

        The second column of ``cos_final_vs_other`` counts ordered pairs; its interval is that of
        ``Accumulators.pairs``.
        """
        if name in _NOW_VS_LATER:
            return getattr(self.sums, _NOW_VS_LATER[name]).summary()
        if name == "cos_final_vs_other":
            own, (other, _) = self.sums.cos_final.summary(), self.sums.pairs()
            return Summary(*(np.stack(columns, axis=1) for columns in zip(own, other, strict=True)))
        moments = {
            "accuracy": self.sums.accuracy,
            "representation_change_by_t_stable": self.sums.change,
            "change_after_stable": self.sums.change_after,
            "relative_change_after_stable": self.sums.relative_change_after,
            **{name: getattr(self.sums, name) for name in _BREAKDOWN},
        }
        if name not in moments:
            raise ValueError(f"name: expected one of {', '.join(MEASURES)}, got {name!r}")
        return moments[name].summary()

    @property
    def accuracy(self) -> np.ndarray:
        """[T] fraction of correct predictions."""
        return self.summary("accuracy").mean

    @property
    def norm_now_vs_later(self) -> np.ndarray:
        """[T, 2] mean L2 norm, stable-correct samples already stable and not yet."""
        return self.summary("norm_now_vs_later").mean

    @property
    def cos_current_now_vs_later(self) -> np.ndarray:
        """[T, 2] mean cosine to the readout vector of the current class, already stable and not yet."""
        return self.summary("cos_current_now_vs_later").mean

    @property
    def margin_now_vs_later(self) -> np.ndarray:
        """[T, 2] mean logit margin, already stable and not yet."""
        return self.summary("margin_now_vs_later").mean

    @property
    def boundary_distance_now_vs_later(self) -> np.ndarray:
        """[T, 2] mean distance to the nearest zone boundary, already stable and not yet."""
        return self.summary("boundary_distance_now_vs_later").mean

    @property
    def cos_final_vs_other(self) -> np.ndarray:
        """[T, 2] of those not yet stable: mean cosine to the own final class, and to the others' final classes."""
        return self.summary("cos_final_vs_other").mean

    @property
    def confusion(self) -> np.ndarray:
        """[T, C, C] samples per label and predicted class."""
        return self.sums.confusion.copy()

    @property
    def norm_t_stable_correlation(self) -> float:
        """Pearson correlation of the norm at t = 0 with t_stable, over stable-correct samples; NaN where undefined."""
        norm, s = self.sums.norm_by_t_stable, np.arange(self.timesteps, dtype=np.float64)
        count, total, squares = (part[:, 0].astype(np.float64) for part in (norm.count, norm.total, norm.squares))
        n = count.sum()
        if n < 2:
            return float("nan")
        covariance = (s * total).sum() / n - (s * count).sum() / n * total.sum() / n
        variances = (s**2 * count).sum() / n - ((s * count).sum() / n) ** 2, squares.sum() / n - (total.sum() / n) ** 2
        return float(covariance / np.sqrt(variances[0] * variances[1])) if min(variances) > 0 else float("nan")

    def published_summary(self, name: str) -> np.ndarray:  # -> [2]
        """A [T, 2] measure averaged as the publication does: over steps below ``max_t_analysed`` with no missing
        value."""
        table = self.summary(name).mean[: self.max_t_analysed]
        kept = table[np.isfinite(table).all(1)]
        return kept.mean(0) if len(kept) else np.full(2, np.nan)

    def analysed_steps(self, name: str) -> np.ndarray:  # -> bool [T]
        """Steps at which the two columns of a [T, 2] measure are compared: below ``max_t_analysed``, ``MIN_GROUP`` samples in both."""
        enough = (self.summary(name).n >= MIN_GROUP).all(1)
        return enough & (np.arange(self.timesteps) < self.max_t_analysed)

    def _members(self, group: str) -> np.ndarray | None:
        return None if self.samples is None else np.flatnonzero(self.samples["group"] == GROUPS.index(group))

    def _of_members(self, group: str, table: str) -> np.ndarray | None:
        members = self._members(group)
        return None if members is None or self.samples is None else self.samples[table][members]

    @property
    def stable_correct(self) -> np.ndarray | None:
        """Indices of stable-correct samples."""
        return self._members("stable_correct")

    @property
    def t_stable_correct(self) -> np.ndarray | None:
        """t_stable of stable-correct samples."""
        return self._of_members("stable_correct", "time")

    @property
    def stable_incorrect(self) -> np.ndarray | None:
        """Indices of stable-incorrect samples."""
        return self._members("stable_incorrect")

    @property
    def t_stable_incorrect(self) -> np.ndarray | None:
        """t_stable of stable-incorrect samples."""
        return self._of_members("stable_incorrect", "time")

    @property
    def label_stable_incorrect(self) -> np.ndarray | None:
        """The (wrong) class that stable-incorrect samples settle in."""
        predicted = self._of_members("stable_incorrect", "predicted")
        return None if predicted is None else predicted[:, -1]

    @property
    def unstable_correct(self) -> np.ndarray | None:
        """Indices of unstable-correct samples."""
        return self._members("unstable_correct")

    @property
    def t_unstable_correct(self) -> np.ndarray | None:
        """First correct step of unstable-correct samples."""
        return self._of_members("unstable_correct", "time")

    @property
    def unstable_incorrect(self) -> np.ndarray | None:
        """Indices of unstable-incorrect samples."""
        return self._members("unstable_incorrect")

    @property
    def representation_change(self) -> np.ndarray | None:
        """[stable-correct, T - 1] L2 distance between successive representations."""
        return self._of_members("stable_correct", "change")

    def require_same_readout(self, other: ReadoutZoneResult, name: str) -> None:
        """Raises ValueError where another result (called ``name``) has other sizes, readout, bias or sample tables."""
        mine, theirs = ({"timesteps T": r.timesteps, "readout_weight [C, D]": list(r.readout_weight.shape)} for r in (self, other))
        for what, value in mine.items():
            if theirs[what] != value:
                raise ValueError(f"{name}: expected {what} = {theirs[what]}, got {value}")
        mine_bias, other_bias = (np.zeros(r.num_classes) if r.bias is None else r.bias for r in (self, other))
        same_weight = np.array_equal(self.readout_weight, other.readout_weight)
        if not same_weight or not np.array_equal(mine_bias, other_bias):
            raise ValueError(f"{name}: expected the same readout_weight [C, D] and bias [C], got other values")
        if (self.samples is None) != (other.samples is None):
            wanted = "without" if other.samples is None else "with"
            raise ValueError(f"{name}: expected one {wanted} kept samples (keep_samples)")

    def merge(self, other: ReadoutZoneResult) -> ReadoutZoneResult:
        """The result of both sets of trajectories; the other's samples come after these. Descriptors are this one's."""
        if not isinstance(other, ReadoutZoneResult):
            raise TypeError(f"other: expected a ReadoutZoneResult, got {type(other).__name__}")
        other.require_same_readout(self, "other")
        sums = self.sums.copy()
        sums.add(other.sums)
        samples = None
        if self.samples is not None and other.samples is not None:
            samples = {name: np.concatenate([self.samples[name], other.samples[name]]) for name in (*SAMPLE_TABLES, *LATER_TABLES)}
            samples["later_sample"][len(self.samples["later_sample"]) :] += self.n
        return ReadoutZoneResult(sums, self.readout_weight, self.bias, samples, dict(self.descriptors))

    def arrays(self) -> dict[str, np.ndarray]:
        """Every array that makes up the result, under flat names."""
        out = {"timesteps": np.asarray(self.timesteps), "readout_weight": self.readout_weight}
        if self.bias is not None:
            out["bias"] = self.bias
        out.update({f"accumulators/{name}": value for name, value in self.sums.arrays()})
        for name, value in (self.samples or {}).items():
            out[f"samples/{name}"] = value
        return out

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, np.ndarray], descriptors: Mapping[str, Any] | None = None) -> ReadoutZoneResult:
        """The inverse of ``arrays``; raises ValueError where something is missing or does not fit."""
        for name in ("timesteps", "readout_weight"):
            if name not in arrays:
                raise ValueError(f"state: expected an array {name!r}, which is missing")
        weight, steps = np.array(arrays["readout_weight"]), int(arrays["timesteps"])
        if weight.ndim != 2 or steps < 1:
            raise ValueError(f"state: expected readout_weight [C, D] and T of at least 1, got {list(weight.shape)} and {steps}")
        sums = Accumulators(steps, weight.shape[0])
        prefix = "accumulators/"
        sums.load({name.removeprefix(prefix): value for name, value in arrays.items() if name.startswith(prefix)})
        samples: dict[str, np.ndarray] | None = None
        if any(name.startswith("samples/") for name in arrays):
            samples = {}
            for name, empty in SAMPLE_TABLES.items():
                value = arrays.get(f"samples/{name}")
                wanted = (int(sums.samples), *empty(steps).shape[1:])
                if value is None or value.shape != wanted:
                    raise ValueError(f"state: expected per-sample table {name!r} {list(wanted)}, got {getattr(value, 'shape', None)}")
                samples[name] = np.array(value)
            for name in LATER_TABLES:
                if f"samples/{name}" not in arrays:
                    raise ValueError(f"state: expected a table {name!r} of samples, which is missing")
                samples[name] = np.array(arrays[f"samples/{name}"])
        bias = np.array(arrays["bias"]) if "bias" in arrays else None
        return cls(sums, weight, bias, samples, dict(descriptors or {}))

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the result to an HDF5 file, atomically; an existing file is replaced only when the new one is
        complete.

        The file holds the arrays of ``arrays()``, the descriptors (attribute ``descriptors``, JSON), and for other
        readers the measures under their names in the group ``measures``.
        """
        from rnndyn_fast.hdf5_out import hdf5_out

        descriptors = json.dumps(self.descriptors)  # before anything is written: it may not be JSON
        with replaced_atomically(path) as temporary, hdf5_out(temporary) as (file, _):
            file.attrs["descriptors"] = descriptors
            self.write(file)
        return Path(path)

    def write(self, group: Any) -> None:
        """Write all but the descriptors to an HDF5 group."""
        from rnndyn_fast.hdf5_out import checked

        group.attrs.update({"format": FORMAT, "format_version": FORMAT_VERSION})
        for name, value in self.arrays().items():
            group.create_dataset(name, data=value, **checked(value))
        for name in MEASURES:
            for part, value in self.summary(name)._asdict().items():
                group.create_dataset(f"measures/{name}/{part}", data=value)

    @classmethod
    @reads("result of the readout-zone analysis", 1)
    def load(cls, path: str | os.PathLike[str]) -> ReadoutZoneResult:
        """Read a file written by ``save`` or by an extraction. Raises FileNotFoundError, or ValueError where it is not such a file or
        truncated."""
        require("h5py")

        import h5py

        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected an analysis file written by ReadoutZoneResult.save, found no file {path}")
        try:
            with h5py.File(path, "r") as file:
                group = file.get("readout_zones", file)  # a file of an extraction holds several results
                found = group.attrs.get("format"), group.attrs.get("format_version")
                if found != (FORMAT, FORMAT_VERSION):
                    raise ValueError(
                        f"path: expected an HDF5 file with attributes format = {FORMAT!r} and "
                        f"format_version = {FORMAT_VERSION}, got {found[0]!r} and {found[1]!r} in {path}"
                    )
                arrays: dict[str, np.ndarray] = {}

                def collect(name: str, item: Any) -> None:
                    if isinstance(item, h5py.Dataset) and not name.startswith("measures/"):
                        arrays[name] = item[()]

                group.visititems(collect)
                descriptors = json.loads(file.attrs["descriptors"])
        except (OSError, KeyError) as error:
            raise ValueError(f"path: expected a readable HDF5 file, {path} is truncated or none ({error})") from error
        return cls.from_arrays({name: np.asarray(value) for name, value in arrays.items()}, descriptors)
