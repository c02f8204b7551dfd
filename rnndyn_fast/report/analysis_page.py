"""The report of one result: a network's, or that of trajectories from other software."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rnndyn_fast.analysis import ReadoutZoneResult, figures, readout_zones
from rnndyn_fast.analysis.bootstrap import PAIRED, bootstrap
from rnndyn_fast.analysis.figure_files import write_figures
from rnndyn_fast.analysis.outputs import write_tables
from rnndyn_fast.analysis.trajectory_files import load_result
from rnndyn_fast.optional import require
from rnndyn_fast.report.dynamics import claims_section, dynamics_sections, verdict_sentences
from rnndyn_fast.report.page import Cell, Page
from rnndyn_fast.train.checkpoint import versions

REPORT = "report.html"


@dataclass(frozen=True)
class _View:
    trained: ReadoutZoneResult
    untrained: ReadoutZoneResult | None = None
    title: str = ""


def analysis_page(
    result: ReadoutZoneResult, *, untrained: ReadoutZoneResult | None = None, title: str = "", replicates: int = 1000
) -> Page:
    """The page of a result: claims, averages with bootstrap intervals (where samples were kept), all figures and tables."""
    require("matplotlib")
    from matplotlib import rc_context

    view = _View(result, untrained)
    page = Page(
        title or "How representations move through time",
        f"{result.n:,} trajectories of {result.timesteps} time steps among the readout zones of {result.num_classes} classes. "
        f"{verdict_sentences([view])}",
        f"Made by rnndyn_fast {versions()['rnndyn_fast']} from {result.descriptors.get('data', {}).get('path', 'arrays')}.",
    )
    with rc_context(figures.STYLE):
        claims_section(page, [view])
        if result.samples is not None:
            _averages(page, result, replicates)
        dynamics_sections(page, [view])
    return page


def _averages(page: Page, result: ReadoutZoneResult, replicates: int) -> None:
    boot = bootstrap(result, replicates)
    rows: list[list[Cell]] = []
    for measure in PAIRED:
        average = boot.values[f"{measure}.average"]
        row: list[Cell] = [measure.replace("_", " "), float(average[0]), float(average[1])]
        for name in (f"{measure}.difference", f"{measure}.effect"):
            row += [float(x) for x in boot.estimate(name)] if name in boot.values else [None] * 3
        rows.append(row)
    header = ["measure", "first", "second", "difference", "95% low", "95% high", "effect d", "95% low", "95% high"]
    page.section("Averages over time steps").table(
        header,
        rows,
        f"Already stable against not yet stable samples (final vs other: own against others' final classes); intervals from {replicates:,} "
        "bootstrap replicates over samples; d is the difference over the pooled standard deviation.",
    )


def write_report(
    result: ReadoutZoneResult, out_dir: str | os.PathLike[str], *, untrained: ReadoutZoneResult | None = None, title: str = ""
) -> list[Path]:
    """Write ``report.html``, every table (CSV) and every figure (PNG, SVG, PDF) of a result; returns the paths.

    Args:
        result: of `readout_zones`, a reducer, or a file.
        out_dir: folder for the files; made where it does not exist. Files of the same names are replaced.
        untrained: the result of the untrained network, shown beside it.
        title: of the page.

    Raises:
        FileExistsError: `out_dir` is a file.
        ValueError: `untrained` has another number of time steps.
    """
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise FileExistsError(f"out: expected a folder, {os.fspath(out_dir)} is a file")
    if untrained is not None and untrained.timesteps != result.timesteps:
        raise ValueError(f"compare: expected a result of T = {result.timesteps} time steps, got {untrained.timesteps}")
    written = write_tables(result, out_dir) + write_figures(result, out_dir, untrained=untrained)
    return [*written, analysis_page(result, untrained=untrained, title=title).save(Path(out_dir) / REPORT)]


def report_trajectories(
    trajectories: Any,  # [T, N, D]
    readout_weight: Any,  # [C, D]
    labels: Any,  # [N]
    out_dir: str | os.PathLike[str],
    *,
    bias: Any = None,  # [C]
    log_probs: Any = None,  # [T, N, C]
    class_names: list[str] | None = None,
    title: str = "",
) -> ReadoutZoneResult:
    """Analyse trajectories that are at hand and write the report of them; see `readout_zones` and `write_report`.

    >>> report_trajectories(activations, weight, labels, "report")  # doctest: +SKIP
    """
    result = readout_zones(trajectories, readout_weight, labels, bias, log_probs)
    if class_names is not None:
        result.descriptors["class_names"] = list(class_names)
    write_report(result, out_dir, title=title)
    return result


def analyse(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    compare: str | os.PathLike[str] | None = None,
    names: Mapping[str, str] | None = None,
) -> tuple[ReadoutZoneResult, list[Path]]:
    """Write the report of a file: a result of an extraction, or trajectories from other software (see `load_result`).

    Returns the result and the paths written. Raises what `load_result` and `write_report` raise; nothing is written then.
    """
    result = load_result(path, names)
    untrained = None if compare is None else load_result(compare, names)
    return result, write_report(result, out_dir, untrained=untrained)
