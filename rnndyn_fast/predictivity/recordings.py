"""Recorded responses: neurons, time bins and repeated presentations of stimuli, from NPZ files or NWB files."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.file_io import reads
from rnndyn_fast.optional import require
from rnndyn_fast.suggestions import others


@dataclass(frozen=True)
class Recordings:
    """Responses of neurons to repeated stimuli.

    Args:
        responses: float [B, S, R, K] (time bins, stimuli, repeats, neurons), or [B, S, K]: averages over repeats. NaN where a stimulus
            has fewer repeats than another; such a repeat is missing in all time bins.
        bin_edges_ms: float [B + 1], relative to stimulus onset; None where unknown.
        rows: int [S], the row of each stimulus in the features it is compared with; None: stimulus s is row s, and
            the features have as many rows as there are stimuli.
        neurons: K names; None: "0", "1", ...

    Raises:
        TypeError, ValueError: naming the argument, what was expected, what came.

    >>> Recordings(np.zeros((2, 5, 3, 4))).num_repeats
    3
    """

    responses: np.ndarray
    bin_edges_ms: np.ndarray | None = None
    rows: np.ndarray | None = None
    neurons: Sequence[str] | None = None
    in_order: bool = field(init=False)  # no rows were given

    def __post_init__(self) -> None:
        responses = np.asarray(self.responses)
        if responses.dtype.kind not in "fiu":
            raise TypeError(f"responses: expected numbers [time, stimuli, repeats, neurons], got dtype {responses.dtype}")
        if responses.ndim == 3:
            responses = responses[:, :, None]
        if responses.ndim != 4 or 0 in responses.shape:
            raise ValueError(
                "responses: expected shape [time, stimuli, neurons] or [time, stimuli, repeats, neurons] with no empty dimension, "
                f"got {list(np.shape(self.responses))}"
            )
        responses = responses.astype(np.float64)
        if np.isinf(responses).any():
            raise ValueError(f"responses: expected finite values (or NaN for missing repeats), got inf at {_first(np.isinf(responses))}")
        missing = np.isnan(responses)
        if (missing != missing[:1]).any():
            where = _first(missing != missing[:1])
            raise ValueError(
                f"responses: a missing repeat (NaN) must be missing in all time bins; [time, stimulus, repeat, neuron] {where}"
            )
        if missing[0].all(1).any():
            where = _first(missing[0].all(1))
            raise ValueError(
                f"responses: expected at least one repeat of every stimulus for every neuron, none at [stimulus, neuron] {where}"
            )
        bins, stimuli, _, neurons = responses.shape
        object.__setattr__(self, "responses", responses)
        object.__setattr__(self, "bin_edges_ms", _edges(self.bin_edges_ms, bins))
        object.__setattr__(self, "in_order", self.rows is None)
        object.__setattr__(self, "rows", _rows(self.rows, stimuli))
        names = tuple(map(str, range(neurons) if self.neurons is None else self.neurons))
        if len(names) != neurons:
            raise ValueError(f"neurons: expected {neurons} names, one per neuron of responses, got {len(names)}")
        object.__setattr__(self, "neurons", names)

    @property
    def num_bins(self) -> int:
        """B."""
        return int(self.responses.shape[0])

    @property
    def num_stimuli(self) -> int:
        """S."""
        return int(self.responses.shape[1])

    @property
    def num_repeats(self) -> int:
        """R, the largest number of repeats of a stimulus."""
        return int(self.responses.shape[2])

    @property
    def num_neurons(self) -> int:
        """K."""
        return int(self.responses.shape[3])

    def mean(self) -> np.ndarray:
        """Responses averaged over the repeats there are, [B, S, K]."""
        return np.nanmean(self.responses, axis=2)


def _first(where: np.ndarray) -> list[int]:
    return [int(index) for index in np.argwhere(where)[0]]


def _edges(value: Any, bins: int) -> np.ndarray | None:
    if value is None:
        return None
    edges = np.asarray(value, dtype=np.float64)
    if edges.shape != (bins + 1,) or not np.isfinite(edges).all() or (np.diff(edges) <= 0).any():
        raise ValueError(f"bin_edges_ms: expected {bins + 1} increasing numbers for {bins} time bins, got {edges.tolist()}")
    return edges


def _rows(value: Any, stimuli: int) -> np.ndarray:
    if value is None:
        return np.arange(stimuli)
    rows = np.asarray(value)
    if rows.dtype.kind not in "iu":
        raise TypeError(f"rows: expected integers [stimuli], got dtype {rows.dtype}")
    if rows.shape != (stimuli,) or rows.min() < 0 or len(np.unique(rows)) != stimuli:
        raise ValueError(f"rows: expected {stimuli} different row numbers >= 0, one per stimulus, got shape {list(rows.shape)}")
    return rows.astype(np.int64)


@reads("file of recordings")
def load_recordings(
    path: str | os.PathLike[str],
    *,
    table: str = "trials",
    stimulus_column: str = "stimulus_id",
    start_ms: float = 0.0,
    stop_ms: float = 260.0,
    bin_ms: float = 10.0,
) -> Recordings:
    """Read recordings.

    NPZ: ``responses`` (required), ``bin_edges_ms``, ``rows``, ``neurons``, as in :class:`Recordings`. NWB: spike times of all units
    around every presentation, counted per bin and divided by its length (spikes/s); presentations of one stimulus are its repeats.
    The values of ``stimulus_column`` are the rows of the stimuli where they are different integers >= 0; other values (names) are
    sorted, and stimulus s is row s.

    Args:
        path: .npz or .nwb file.
        table: (NWB) the table of presentations: "trials", or a table of intervals.
        stimulus_column: (NWB) its column that tells stimuli apart.
        start_ms, stop_ms, bin_ms: (NWB) range and width of the bins, relative to the start of a presentation. The last bin ends at or
            before ``stop_ms``.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, or what it should hold is missing (tells what there is).
        ImportError: an NWB file, and pynwb is not installed.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"recordings: no such file: {path}")
    if path.suffix == ".npz":
        return _load_npz(path)
    if path.suffix == ".nwb":
        if not (np.isfinite([start_ms, stop_ms, bin_ms]).all() and bin_ms > 0 and stop_ms - start_ms >= bin_ms):
            raise ValueError(f"bin_ms: expected start_ms + bin_ms <= stop_ms, got start_ms {start_ms}, stop_ms {stop_ms}, bin_ms {bin_ms}")
        bins = int(np.floor((stop_ms - start_ms) / bin_ms + 1e-9))
        return _load_nwb(path, table, stimulus_column, start_ms + bin_ms * np.arange(bins + 1))
    raise ValueError(f"recordings: expected a .npz or .nwb file, got {path}")


def _load_npz(path: Path) -> Recordings:
    try:
        with np.load(path, allow_pickle=False) as data:
            contents = {name: data[name] for name in data.files}
    except (OSError, ValueError, EOFError) as error:
        raise ValueError(f"recordings: {path} is not an NPZ file: {error}") from error
    known = ("responses", "bin_edges_ms", "rows", "neurons")
    unknown = [name for name in contents if name not in known]
    if "responses" not in contents:
        raise ValueError(f"recordings: {path} has no array 'responses'{others('responses', contents)}")
    if unknown:
        raise ValueError(f"recordings: {path}: unknown array {unknown[0]!r}{others(unknown[0], known)}")
    return Recordings(**contents)


def _load_nwb(path: Path, table: str, column: str, edges_ms: np.ndarray) -> Recordings:
    require("pynwb")
    from pynwb import NWBHDF5IO

    try:
        io = NWBHDF5IO(path, "r", load_namespaces=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"recordings: {path} is not an NWB file: {error}") from error
    with io:
        file = io.read()
        tables = dict(file.intervals or {})
        if file.trials is not None:
            tables["trials"] = file.trials
        if table not in tables:
            raise ValueError(f"table: {path} has no table of presentations {table!r}{others(table, tables)}")
        if column not in tables[table].colnames:
            raise ValueError(f"stimulus_column: table {table!r} has no column {column!r}{others(column, tables[table].colnames)}")
        if file.units is None or "spike_times" not in file.units.colnames:
            raise ValueError(f"recordings: {path} has no units with spike_times")
        starts = np.asarray(tables[table]["start_time"][:], dtype=np.float64)
        stimuli = np.asarray(tables[table][column][:])
        spikes = [np.sort(np.asarray(times, dtype=np.float64)) for times in file.units["spike_times"][:]]
        names = [str(name) for name in file.units.id[:]]
    shown = np.isfinite(starts)
    if not shown.any() or not spikes:
        raise ValueError(f"recordings: {path}: expected units and presentations, got {len(spikes)} units, {int(shown.sum())} presentations")
    return _from_spikes(spikes, names, starts[shown], stimuli[shown], edges_ms)


def _from_spikes(
    spikes: Sequence[np.ndarray], names: Sequence[str], starts: np.ndarray, stimuli: np.ndarray, edges_ms: np.ndarray
) -> Recordings:
    """Firing rates in spikes/s; spikes of each neuron in ascending order, starts in seconds."""
    ids, which = np.unique(stimuli, return_inverse=True)
    counts = np.bincount(which)
    repeat = np.empty(len(which), np.int64)
    for s in range(len(ids)):
        repeat[which == s] = np.arange(counts[s])
    bounds = starts[:, None] + edges_ms / 1000  # [presentations, B + 1]
    rates = np.full((len(edges_ms) - 1, len(ids), counts.max(), len(spikes)), np.nan)
    for k, times in enumerate(spikes):
        per_bin = np.diff(np.searchsorted(times, bounds), axis=1) / (np.diff(edges_ms) / 1000)
        rates[:, which, repeat, k] = per_bin.T
    rows = ids.astype(np.int64) if ids.dtype.kind in "iu" and ids.min() >= 0 else None
    return Recordings(rates, edges_ms, rows, names)
