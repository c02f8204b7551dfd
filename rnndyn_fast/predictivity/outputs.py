"""From files to files: features and recordings in, results, tables, a figure and a report out."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rnndyn_fast.analysis.outputs import Row, write_csv
from rnndyn_fast.file_io import reads, replaced_atomically
from rnndyn_fast.optional import require
from rnndyn_fast.predictivity.predictivity import predictivity
from rnndyn_fast.predictivity.recordings import load_recordings
from rnndyn_fast.predictivity.results import PredictivityResult
from rnndyn_fast.suggestions import others

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rnndyn_fast.report import Page

REPORT = "report.html"


class Features(NamedTuple):
    """An area's activations [T, S, ...]; ``values[0]`` is of time step ``first_step``."""

    values: np.ndarray
    first_step: int


@reads("file of trajectories")
def load_features(path: str | os.PathLike[str], areas: Sequence[str] = ()) -> dict[str, Features]:
    """Activations of the areas (all there are if none is named) of a file.

    Args:
        path: trajectories of ``rnndyn extract --save`` (HDF5), or an NPZ file with one array [T, S, ...] per area.
        areas: names.

    Raises:
        FileNotFoundError: no such file.
        ValueError: not such a file, or an unknown area (with the nearest names).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"features: no such file: {path}")
    if path.suffix == ".npz":
        with np.load(path, allow_pickle=False) as data:
            _check_areas(path, areas, data.files)
            return {name: Features(data[name], 0) for name in areas or data.files}
    require("h5py")

    import h5py

    if not h5py.is_hdf5(path):
        raise ValueError(f"features: expected trajectories of rnndyn extract (HDF5) or a .npz file, got {path}")
    with h5py.File(path, "r") as file:
        if not isinstance(file.get("trajectories"), h5py.Group):
            raise ValueError(f"features: {path} holds no trajectories; write some with rnndyn extract --save AREAS")
        names = list(file["trajectories"])
        _check_areas(path, areas, names)
        first = json.loads(file.attrs.get("descriptors", "{}")).get("first_step", {})
        return {name: Features(file[f"trajectories/{name}"][()], int(first.get(name, 0))) for name in areas or names}


def _check_areas(path: Path, areas: Sequence[str], there: Sequence[str]) -> None:
    for name in areas:
        if name not in there:
            raise ValueError(f"areas: no area {name!r} in {path}{others(name, there)}")


def predict(
    features: str | os.PathLike[str],
    recordings: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    areas: Sequence[str] = (),
    table: str = "trials",
    stimulus_column: str = "stimulus_id",
    start_ms: float = 0.0,
    stop_ms: float = 260.0,
    bin_ms: float = 10.0,
    **options: Any,
) -> list[PredictivityResult]:
    """Compare areas of a model with recordings, and write what comes of it to the folder ``out``.

    Files: per area ``<area>.npz`` (:meth:`PredictivityResult.load`); ``predictivity.csv`` (area x bin), ``neurons.csv`` (area x bin x
    neuron), ``predictivity.png`` and ``.svg``, ``report.html``. Files of these names are replaced.

    Args:
        features, areas: see :func:`load_features`.
        recordings, table, stimulus_column, start_ms, stop_ms, bin_ms: see :func:`load_recordings`.
        options: of :func:`predictivity`.

    Raises: what those functions raise.
    """
    out = Path(out)
    if out.exists() and not out.is_dir():
        raise FileExistsError(f"out: expected a folder, {out} is a file")
    recorded = load_recordings(recordings, table=table, stimulus_column=stimulus_column, start_ms=start_ms, stop_ms=stop_ms, bin_ms=bin_ms)
    results = [
        predictivity(found.values, recorded, area=name, first_step=found.first_step, **options)
        for name, found in load_features(features, areas).items()
    ]
    write_results(results, out)
    return results


def write_results(results: Sequence[PredictivityResult], out: str | os.PathLike[str]) -> list[Path]:
    """Write results, tables, figure and report to the folder ``out``; returns the paths."""
    require("matplotlib")

    from matplotlib import rc_context

    from rnndyn_fast.analysis.figures import STYLE

    out = Path(out)
    paths = [result.save(out / f"{result.area}.npz") for result in results]
    paths += [
        write_csv(rows, out / f"{name}.csv") for name, rows in (("predictivity", bin_rows(results)), ("neurons", neuron_rows(results)))
    ]
    with rc_context(STYLE):
        for suffix in ("png", "svg"):
            with replaced_atomically(out / f"predictivity.{suffix}") as temporary:
                figure_predictivity(results).savefig(temporary)
        paths.append(report_page(results).save(out / REPORT))
    return paths


def bin_rows(results: Sequence[PredictivityResult]) -> list[Row]:
    """Median over neurons per area and time bin, with intervals and n."""
    rows = []
    for result in results:
        tables = {name: result.summary(name) for name in ("corrected", "correlation", "reliability")}
        for b in range(len(result.bins)):
            row: Row = {"area": result.area, "bin": int(result.bins[b]), "step": int(result.steps[b])}
            edges = (np.nan, np.nan) if result.bin_edges_ms is None else result.bin_edges_ms[b]
            row |= {"start_ms": float(edges[0]), "stop_ms": float(edges[1])}
            for name, summary in tables.items():
                row |= {f"{name}_{part}": float(getattr(summary, part)[b]) for part in ("median", "low", "high")}
                row[f"{name}_n"] = int(summary.n[b])
            rows.append(row)
    return rows


def neuron_rows(results: Sequence[PredictivityResult]) -> list[Row]:
    """Every neuron in every time bin."""
    return [
        {
            "area": result.area,
            "bin": int(bin_),
            "neuron": name,
            **{table: float(getattr(result, table)[b, k]) for table in ("corrected", "correlation", "reliability")},
        }
        for result in results
        for b, bin_ in enumerate(result.bins)
        for k, name in enumerate(result.neurons)
    ]


def figure_predictivity(results: Sequence[PredictivityResult]) -> Figure:
    """Corrected correlation over time, a line per area, and the reliability of the recording."""
    require("matplotlib")

    from matplotlib.figure import Figure

    from rnndyn_fast.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    colours, markers = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00"), "os^Dv*"
    for i, result in enumerate(results):
        corrected = ~np.isnan(result.corrected).all()
        summary = result.summary("corrected" if corrected else "correlation")
        label = result.area if corrected else f"{result.area} (not corrected)"
        x = _middle(result)
        style = {"color": colours[i % 6], "marker": markers[i % 6], "markersize": 4}
        axes.plot(x, summary.median, label=label, **style)  # type: ignore[arg-type]
        axes.fill_between(x, summary.low, summary.high, color=colours[i % 6], alpha=0.2, linewidth=0)
    reliability = results[0].summary("reliability").median
    if not np.isnan(reliability).all():
        axes.plot(
            _middle(results[0]), np.sqrt(np.maximum(reliability, 0)), color=GREY, linestyle=":", label="noise ceiling before correction"
        )
    axes.set_xlabel("time bin" if results[0].bin_edges_ms is None else "time after onset (ms)")
    axes.set_ylabel("correlation, median over neurons")
    axes.axhline(0, color=GREY, linewidth=0.8)
    axes.legend()
    return figure


def _middle(result: PredictivityResult) -> np.ndarray:
    return result.bins if result.bin_edges_ms is None else result.bin_edges_ms.mean(1)


def report_page(results: Sequence[PredictivityResult]) -> Page:
    """The report: what was compared, the medians over all bins, and their course over time."""
    from rnndyn_fast.report import Page, Plot
    from rnndyn_fast.report.page import Cell

    first = results[0]
    options = first.descriptors
    page = Page(
        "How well the model predicts recorded neurons",
        f"{len(first.neurons):,} neurons, {options['stimuli']:,} stimuli, up to {options['repeats']} repeats, {len(first.bins)} time bins.",
    )
    section = page.section("Medians over neurons")
    method = "ridge regression" if options["method"] == "ridge" else "partial least squares"
    mapping = "one map for all time bins" if options["mapping"] == "fixed" else "a map per time bin"
    section.text(
        f"Responses were fitted from each area's activations by {method} ({mapping}), cross-validated over "
        f"{options['num_folds']} folds of stimuli. `corrected` is the correlation of held-out predictions with responses divided by "
        "the square root of the responses' split-half reliability (Spearman-Brown)"
        + (" and by what the noise of the recording costs the fit" if options["correct_fit"] else "")
        + f"; neurons with a reliability below {options['min_reliability']:g} in a bin do not count there. Intervals: 95%, "
        "bootstrap over neurons."
    )
    rows: list[list[Cell]] = []
    for result in results:
        corrected, plain, reliability = (result.over_bins(name) for name in ("corrected", "correlation", "reliability"))
        interval = "" if np.isnan(corrected.low) else f"{corrected.low:.3f} to {corrected.high:.3f}"
        rows.append([result.area, float(corrected.median), interval, int(corrected.n), float(plain.median), float(reliability.median)])
    header = ["area", "corrected", "95% interval", "neurons", "correlation", "reliability"]
    section.table(header, rows, "Means over time bins, median over neurons.")
    if np.isnan(first.reliability).all():
        section.text("The recordings have no repeats, so there is no reliability and nothing is corrected.")
    page.section("Over time").plots(
        [
            Plot(
                figure_predictivity(results),
                "Median over neurons per time bin; bands: 95% intervals.",
                "Lines of correlation over time, one per model area.",
            )
        ]
    )
    return page
