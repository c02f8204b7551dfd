"""Streaming readout-zone analysis: trajectories go in batch by batch (or step by step), and only sums stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.analysis.accumulators import Accumulators, Trajectories, accumulate, classify, later_cosines
from rnndyn_fast.analysis.breakdown import accumulate_breakdown
from rnndyn_fast.analysis.inputs import (
    as_floats,
    as_labels,
    require_finite,
    require_finite_norms,
    require_log_probs,
)
from rnndyn_fast.analysis.protocol import Batch, Reducer
from rnndyn_fast.analysis.results import LATER_TABLES, SAMPLE_TABLES, ReadoutZoneResult
from rnndyn_fast.ops.readout_zones import readout_zones as measure_readout_zones
from rnndyn_fast.reference.readout_zones import ReadoutZoneMeasures, readout_distance

_SCALARS = ("predicted", "norm", "cos_predicted", "cos_label", "margin", "boundary_distance", "change")


class _PendingBatch:
    """What is kept of a batch that comes step by step: scalars, cosines, and the steps before."""

    def __init__(self, labels: Tensor) -> None:  # [N]
        self.labels = labels
        self.previous: list[Tensor] = []  # [N, D] each, our own copies: the caller may reuse the buffer; where samples are kept, all steps
        self.distances: list[Tensor] = []  # t tables [N] of step t
        self.measures: list[ReadoutZoneMeasures] = []  # one per step, tables [1, N] and cosine [1, N, C]


def _distances(earlier: Tensor, current: Tensor) -> Tensor:  # [t, N, D], [N, D] -> [t, N]
    """Distances of a step to every earlier one, float64."""
    return torch.linalg.vector_norm(current - earlier, dim=-1, dtype=torch.float64)


class ReadoutZoneReducer(Reducer):
    r"""Readout-zone analysis of any number of trajectories in memory that does not grow with them.

    Per sample and step the measures of ``reference.readout_zones``; per trajectory of predictions its group (stable or
    unstable, correct or incorrect) and time; over samples counts, sums, sums of squares and C x C tables in float64,
    which
    add up: ``merge`` of reducers over any split of the samples gives the result of one pass. The published mean over
        all
    ordered pairs (i, j) of samples that are not yet stable, share the current class c and differ in label is

        sum_{c, a} n[c, a] (A[c, a] - B[c, a])  /  sum_c ((sum_a n[c, a])^2 - sum_a n[c, a]^2)

    with n[c, a] samples of class c and label a, A[c, k] their summed cosines to readout vector k, and B[c, a] to their
    own.

    Args:
        readout_weight: [C, D], floating point, NumPy or torch; row c is the readout vector of class c.
        bias: [C] or None for zero.
        timesteps: T, the length of every trajectory.
        area: whose representations ``add`` takes from a batch.
        keep_samples: also keep every sample's scalars over time, so that the result has index sets and per-sample
            tables; memory then grows by about 60 T + 4 T^2 bytes per sample,
            and 4 C per sample and step of those not yet stable.
        backend: "native", "reference" or None (native where it can run; see ``ops.can_run_readout_zones``).

    Raises:
        ValueError: a shape or value is wrong (NaN or infinite values, labels outside [0, C), steps out of order, ...);
        the
            reducer is then as it was before the call.
        TypeError: a dtype is wrong.

    Differentiable: no; inputs are detached.
    Forward-mode: no.
    Double backward: no.
    Deterministic: yes on the CPU; sums depend on the order of the samples by rounding only.
    Memory: 40 T C^2 bytes, and per batch the cosines [T, N, C].

    Source: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435.

    >>> import torch
    >>> reducer = ReadoutZoneReducer(torch.eye(2), timesteps=1)
    >>> reducer.update(torch.tensor([[[3.0, 4.0], [1.0, 0.0]]]), torch.tensor([1, 1]))
    >>> reducer.result().accuracy.tolist()
    [0.5]
    """

    name = "readout_zones"

    def __init__(
        self,
        readout_weight: Any,  # [C, D]
        bias: Any = None,  # [C]
        timesteps: int | None = None,
        *,
        area: str = "gap",
        keep_samples: bool = False,
        backend: str | None = None,
    ) -> None:
        if timesteps is None or isinstance(timesteps, bool) or not isinstance(timesteps, int | np.integer):
            raise TypeError(f"timesteps: expected an integer T, got {type(timesteps).__name__}")
        if timesteps < 1:
            raise ValueError(f"timesteps: expected T of at least 1, got {timesteps}")
        if backend not in (None, "native", "reference"):
            raise ValueError(f"backend: expected 'native', 'reference' or None, got {backend!r}")
        weight = as_floats("readout_weight", readout_weight, "[C, D]", (None, None))
        require_finite("readout_weight", weight)
        self._weight = weight.to("cpu", torch.float64, copy=True)  # [C, D]
        self._bias: Tensor | None = None
        if bias is not None:
            bias = as_floats("bias", bias, "[C]", (weight.shape[0],))
            require_finite("bias", bias)
            self._bias = bias.to("cpu", torch.float64, copy=True)  # [C]
        self.timesteps = int(timesteps)
        self.num_classes, self.num_dims = self._weight.shape
        self.area = area
        self.keep_samples = keep_samples
        self.backend = backend
        self._distance = readout_distance(self._weight)  # [C, C]
        self._sums = Accumulators(self.timesteps, self.num_classes)
        self._samples: dict[str, list[np.ndarray]] = {name: [] for name in (*SAMPLE_TABLES, *LATER_TABLES)}
        self._pending: _PendingBatch | None = None

    def __len__(self) -> int:
        """Number of trajectories taken in."""
        return int(self._sums.samples)

    def __repr__(self) -> str:
        sizes = f"timesteps={self.timesteps}, classes={self.num_classes}, dims={self.num_dims}"
        return f"{type(self).__name__}({sizes}, samples={len(self)}, keep_samples={self.keep_samples})"

    @property
    def requires(self) -> tuple[str, ...]:
        """The area of the representations."""
        return (self.area,)

    @property
    def options(self) -> dict[str, Any]:
        """What it was made with, readout aside."""
        return {"area": self.area, "timesteps": self.timesteps, "keep_samples": self.keep_samples}

    def add(self, batch: Batch) -> None:
        """Take in a batch of an extraction: as ``update``."""
        self.update(batch.area(self.area).flatten(2), batch.labels, batch.log_probs)

    @torch.no_grad()
    def update(
        self,
        representations: Any,  # [T, N, D]
        labels: Any,  # [N]
        log_probs: Any = None,  # [T, N, C]
    ) -> None:
        """Take in whole trajectories [T, N, D] with labels [N] and, where predictions come from them, log_probs [T, N,
        C]."""
        self._require_no_pending("update")
        representations = as_floats("representations", representations, "[T, N, D]", (self.timesteps, None, self.num_dims))
        samples = representations.shape[1]
        labels = as_labels("labels", labels, samples, self.num_classes)
        if log_probs is not None:
            log_probs = as_floats("log_probs", log_probs, "[T, N, C]", (self.timesteps, samples, self.num_classes))
            require_log_probs("log_probs", log_probs)
        measures = self._measure(representations, labels, log_probs, None)
        require_finite_norms("representations", representations, measures.norm)
        distances: list[Tensor] = []
        if self.keep_samples:
            distances = [_distances(representations[:t], representations[t]) for t in range(1, self.timesteps)]
        self._take_in(labels, [measures], distances)

    @torch.no_grad()
    def step(
        self,
        t: int,
        representations_t: Any,  # [N, D]
        labels: Any,  # [N]
        log_probs_t: Any = None,  # [N, C]
    ) -> None:
        """Take in time step t of one batch; t runs 0, 1, .., T - 1 with the same labels, and T - 1 completes the batch.

        The representations are copied, so their buffer may be reused for the next step. ``discard_batch`` drops a
        batch that will not be completed.
        """
        pending = self._pending
        expected = 0 if pending is None else len(pending.measures)
        if t != expected:
            raise ValueError(f"t: expected time step {expected} of {self.timesteps}, got {t}; steps come in order")
        representations = as_floats("representations_t", representations_t, "[N, D]", (None, self.num_dims))
        samples = representations.shape[0]
        labels = as_labels("labels", labels, samples, self.num_classes)
        if log_probs_t is not None:
            log_probs_t = as_floats("log_probs_t", log_probs_t, "[N, C]", (samples, self.num_classes))
            require_log_probs("log_probs_t", log_probs_t)
            log_probs_t = log_probs_t.unsqueeze(0)
        if pending is None:
            pending = _PendingBatch(labels.clone())
        elif labels.shape != pending.labels.shape or not torch.equal(labels.cpu(), pending.labels.cpu()):
            raise ValueError(f"labels: expected the labels [N] = [{len(pending.labels)}] given at t = 0, got others at t = {t}")
        place: dict[str, Any] = {"device": representations.device, "dtype": representations.dtype}
        previous = pending.previous[-1].to(**place) if pending.previous else None
        measures = self._measure(representations.unsqueeze(0), labels, log_probs_t, previous)
        require_finite_norms("representations_t", representations, measures.norm[0])
        pending.measures.append(measures)
        if self.keep_samples and t > 0:
            pending.distances.append(_distances(torch.stack([step.to(**place) for step in pending.previous]), representations))
        if len(pending.measures) < self.timesteps:
            kept = pending.previous if self.keep_samples else []
            pending.previous = [*kept, representations.clone()]
            self._pending = pending
            return
        self._pending = None
        self._take_in(pending.labels, pending.measures, pending.distances)

    def discard_batch(self) -> None:
        """Drop a batch whose steps are not complete, if there is one."""
        self._pending = None

    def merge(self, other: ReadoutZoneReducer) -> None:
        """Add what another reducer of the same readout and length took in; its samples come after ours."""
        if not isinstance(other, ReadoutZoneReducer):
            raise TypeError(f"other: expected a ReadoutZoneReducer, got {type(other).__name__}")
        self._require_no_pending("merge")
        other._require_no_pending("merge of other")
        merged = self._result_view({}).merge(other._result_view({}))
        self._adopt(merged)

    def result(self, descriptors: Mapping[str, Any] | None = None) -> ReadoutZoneResult:
        """The result so far, independent of what comes later; ``descriptors`` say where it comes from (kept in
        files)."""
        self._require_no_pending("result")
        view = self._result_view(dict(descriptors or {}))
        view.sums = view.sums.copy()
        return view

    def state_dict(self) -> dict[str, Tensor]:
        """Everything taken in so far, as tensors for ``torch.save``."""
        self._require_no_pending("state_dict")
        return {name: torch.from_numpy(np.array(value)) for name, value in self._result_view({}).arrays().items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Replace what was taken in by a saved state of a reducer with the same readout, length and
        ``keep_samples``."""
        arrays = {name: np.asarray(value) for name, value in state.items()}
        loaded = ReadoutZoneResult.from_arrays(arrays)
        loaded.require_same_readout(self._result_view({}), "state")
        self._pending = None
        self._adopt(loaded)

    def _require_no_pending(self, what: str) -> None:
        if self._pending is not None:
            raise ValueError(
                f"{what}: a batch given step by step is complete up to t = {len(self._pending.measures) - 1} of "
                f"{self.timesteps}; complete it or call discard_batch()"
            )

    def _measure(
        self,
        representations: Tensor,  # [T, N, D]
        labels: Tensor,  # [N]
        log_probs: Tensor | None,  # [T, N, C]
        previous: Tensor | None,  # [N, D]
    ) -> ReadoutZoneMeasures:
        place: dict[str, Any] = {"device": representations.device, "dtype": representations.dtype}
        return measure_readout_zones(
            representations,
            self._weight.to(**place),
            labels.to(representations.device),
            None if self._bias is None else self._bias.to(**place),
            None if log_probs is None else log_probs.to(representations.device),
            previous,
            self._distance.to(**place),
            backend=self.backend,
        )

    def _take_in(self, labels: Tensor, measures: list[ReadoutZoneMeasures], distances: list[Tensor]) -> None:  # [N]
        def table(name: str) -> np.ndarray:  # -> [T, N]
            values = torch.cat([getattr(m, name) for m in measures]).cpu()
            return values.numpy() if name == "predicted" else values.double().numpy()

        predicted, norm, cos_current, cos_label, margin, boundary_distance, change = map(table, _SCALARS)
        cosine = tuple(step.cpu() for m in measures for step in m.cosine.unbind(0))
        batch = Trajectories(labels.cpu().numpy(), predicted, norm, cos_current, cos_label, margin, boundary_distance, change[1:], cosine)
        group, time = classify(predicted, batch.label)
        accumulate(self._sums, batch, group, time)
        accumulate_breakdown(self._sums, batch, group, time, self._weight.numpy(), None if self._bias is None else self._bias.numpy())
        if self.keep_samples:
            offset = int(self._sums.samples) - len(group)
            for name, values in later_cosines(batch, group, time, offset).items():
                self._samples[name].append(values)
            for name, values in batch._asdict().items():
                if name in SAMPLE_TABLES:
                    self._samples[name].append(values.T)
            between = np.concatenate([np.zeros((0, len(group))), *(steps.cpu().numpy() for steps in distances)])
            self._samples["distance"].append(between.T)
            self._samples["group"].append(group)
            self._samples["time"].append(time)

    def _result_view(self, descriptors: dict[str, Any]) -> ReadoutZoneResult:
        samples = None
        if self.keep_samples:
            for name, empty in SAMPLE_TABLES.items():
                blocks = self._samples[name] or [empty(self.timesteps)]
                self._samples[name] = [np.concatenate(blocks)]
            for name, empty in LATER_TABLES.items():
                self._samples[name] = [np.concatenate(self._samples[name] or [empty(self.num_classes)])]
            samples = {name: blocks[0] for name, blocks in self._samples.items()}
        bias = None if self._bias is None else self._bias.numpy()
        return ReadoutZoneResult(self._sums, self._weight.numpy(), bias, samples, descriptors)

    def _adopt(self, result: ReadoutZoneResult) -> None:
        self._sums = result.sums
        if result.samples is not None:
            self._samples = {name: [values] for name, values in result.samples.items()}


def readout_zones(
    trajectories: Any,  # [T, N, D]
    readout_weight: Any,  # [C, D]
    labels: Any,  # [N]
    bias: Any = None,  # [C]
    log_probs: Any = None,  # [T, N, C]
    backend: str | None = None,
    *,
    samples_per_block: int = 1024,
) -> ReadoutZoneResult:
    """Readout-zone analysis of trajectories that are at hand; the equations are at ``ReadoutZoneReducer``.

    Args:
        trajectories: [T, N, D], floating point; NumPy, torch, or anything that slices like them (an HDF5 dataset is
            read block by block).
        readout_weight: [C, D], floating point.
        labels: [N], integers in [0, C).
        bias: [C] or None for zero.
        log_probs: [T, N, C]: predictions are their argmax; None: predictions are those of the logits.
        backend: "native", "reference" or None (native where it can run).
        samples_per_block: samples taken in at a time; bounds the memory.

    Returns:
        ReadoutZoneResult with index sets and per-sample tables.

    Raises:
        ValueError: a shape or value is wrong.
        TypeError: a dtype is wrong.

    Differentiable: no.
    Forward-mode: no.
    Double backward: no.
    Deterministic: yes on the CPU.
    Memory: 40 T C^2 bytes, about 60 T + 4 T^2 bytes per sample, and one block.

    Source: Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435.

    >>> import numpy as np
    >>> readout_zones(np.array([[[3.0, 4.0]], [[5.0, 4.0]]]), np.eye(2), np.array([1])).accuracy.tolist()
    [1.0, 0.0]
    """
    if samples_per_block < 1:
        raise ValueError(f"samples_per_block: expected at least 1, got {samples_per_block}")
    if not hasattr(trajectories, "shape"):
        trajectories = np.asarray(trajectories)
    shape = tuple(trajectories.shape)
    if len(shape) != 3 or 0 in shape:
        raise ValueError(f"trajectories: expected shape [T, N, D] with no empty dimension, got {list(shape)}")
    reducer = ReadoutZoneReducer(readout_weight, bias, shape[0], keep_samples=True, backend=backend)
    if shape[2] != reducer.num_dims:
        raise ValueError(
            f"trajectories: expected shape [T, N, D] = [any, any, {reducer.num_dims}] as readout_weight [C, D], got {list(shape)}"
        )
    targets = as_labels("labels", labels, shape[1], reducer.num_classes)
    if log_probs is not None:
        if not hasattr(log_probs, "shape"):
            log_probs = np.asarray(log_probs)
        expected = (*shape[:2], reducer.num_classes)
        if tuple(log_probs.shape) != expected:
            raise ValueError(f"log_probs: expected shape [T, N, C] = {list(expected)}, got {list(log_probs.shape)}")
    for start in range(0, shape[1], samples_per_block):
        block = slice(start, start + samples_per_block)
        try:
            reducer.update(trajectories[:, block], targets[block], None if log_probs is None else log_probs[:, block])
        except (TypeError, ValueError) as error:
            message = str(error).replace("representations:", f"trajectories[:, {start}:]:", 1)
            raise type(error)(message) from error
    return reducer.result()
