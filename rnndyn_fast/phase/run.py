"""Analyse files of networks, and read the analyses of a folder."""

from __future__ import annotations

import csv
import io
import os
import re
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.file_io import write_text
from rnndyn_fast.phase.analysis import PhaseAnalysis, analyse_system, matched_oscillator
from rnndyn_fast.phase.systems import CTRNNSystem, DynamicalSystem, load_npz
from rnndyn_fast.train.phase_results import NETWORKS, NETWORKS_FORMAT, load_networks
from rnndyn_fast.train.progress import Reporter

TABLE = "analysis.csv"
HANDCRAFTED = "handcrafted oscillator"
# Columns of the table: facts that are single numbers or words.
COLUMNS = (
    "name", "handcrafted", "accuracy", "mean_squared_error", "solution.solution", "solution.moving", "oscillation.kind",
    "oscillation.period", "oscillation.published_period", "solution.phase_gap", "solution.phase_spread", "solution.end_clusters",
    "solution.line_share", "solution.hull", "end.attractors", "fixed_points.fixed", "fixed_points.stable", "fixed_points.slow",
    "automaton.states", "automaton.minimal_states", "automaton.is_modulo", "automaton.determinism", "automaton.purity",
)  # fmt: skip


def load_systems(path: str | os.PathLike[str], prefix: str = "", jobs: Sequence[int] | None = None) -> list[DynamicalSystem]:
    """The networks of a file as systems.

    Args:
        path: folder or ``networks.npz`` of rnndyn phase train or sweep, or an .npz file with the published names.
        prefix: of the names, in the latter.
        jobs: job ids to take; None: all.

    Raises:
        FileNotFoundError, ValueError: no such file, not such a file, no such job.
    """
    path = Path(path)
    file = path / NETWORKS if path.is_dir() else path
    if not file.is_file():
        raise FileNotFoundError(f"networks: expected a file of networks, or the folder of a run with {NETWORKS}, found no file {file}")
    try:
        with np.load(file, allow_pickle=False) as arrays:
            ours = "format" in arrays.files and str(arrays["format"]) == NETWORKS_FORMAT
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise ValueError(f"networks: {file} is truncated or not an .npz file: {error}") from error
    if not ours:
        if jobs is not None:
            raise ValueError(f"jobs: {file} holds one network, not the jobs of a run")
        return [load_npz(file, prefix)]
    net, rows = load_networks(file)
    ids = [row.job_id for row in rows]
    missing = [job for job in jobs or () if job not in ids]
    if missing:
        raise ValueError(f"jobs: expected some of {min(ids)} to {max(ids)}, {file} has no {', '.join(map(str, missing))}")
    chosen = range(len(ids)) if jobs is None else [ids.index(job) for job in jobs]
    return [CTRNNSystem(net, index, name=f"job {ids[index]}") for index in chosen]


def analyse_networks(
    networks: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    prefix: str = "",
    jobs: Sequence[int] | None = None,
    handcrafted: bool = True,
    seed: int = 42,
    overwrite: bool = False,
    reporter: Reporter | None = None,
) -> list[PhaseAnalysis]:
    """Analyse every network of a file, one result file each, and write a table of all results in the folder.

    A network whose result is already there is not analysed again, so that an interrupted call continues where it stopped. A network
    that cannot be analysed (one that left the finite numbers in training) is told and left out.

    Args:
        networks, prefix, jobs: see ``load_systems``.
        out: folder of the results; those of other files can be there too.
        handcrafted: also analyse a handcrafted oscillator, matched to the first phase code or limit cycle there is.
        seed: of the trials.
        overwrite: analyse again what is there.
        reporter: shows progress.

    Returns:
        The analyses of this call, handcrafted last.
    """
    out = Path(out)
    systems = load_systems(networks, prefix, jobs)
    results = []
    for number, system in enumerate(systems, start=1):
        path = result_path(out, system.name)
        if path.exists() and not overwrite:
            results.append(PhaseAnalysis.load(path))
            continue
        try:
            result = analyse_system(system, seed=seed)
        except ValueError as error:
            if len(systems) == 1:
                raise
            _tell(reporter, f"{system.name}: left out, {error}")
            continue
        result.save(path)
        results.append(result)
        _tell(reporter, f"{number}/{len(systems)} {system.name}: {result.facts['solution.solution']}, {result.facts['solution.reason']}")
    if handcrafted and results:
        path = result_path(out, HANDCRAFTED)
        if overwrite or not path.exists():
            model = next((r for r in results if "cycle.period" in r.facts and r.facts["cycle.period"] >= 8), results[0])
            by_hand = matched_oscillator(model.facts, int(model.facts["modulus"]), int(model.facts["timesteps"]))
            analyse_system(by_hand, seed=seed).save(path)
        results.append(PhaseAnalysis.load(path))
    write_table(out)
    return results


def result_path(folder: Path, name: str) -> Path:
    """File of a system's analysis; jobs sort by number."""
    job = re.fullmatch(r"job (\d+)", name)
    stem = f"job_{int(job[1]):03d}" if job else re.sub(r"[^A-Za-z0-9.-]+", "_", name)
    return folder / f"{stem}.npz"


def load_analyses(folder: str | os.PathLike[str]) -> list[PhaseAnalysis]:
    """Every analysis of a folder, trained systems first, in the order of their files.

    Raises:
        FileNotFoundError: there is none.
    """
    files = sorted(Path(folder).glob("*.npz"))
    if not files:
        raise FileNotFoundError(f"analyses: expected a folder with results of rnndyn phase analyse, found none in {folder}")
    return sorted((PhaseAnalysis.load(file) for file in files), key=lambda record: bool(record.facts["handcrafted"]))


def write_table(folder: Path) -> Path:
    """analysis.csv: a line per analysis of the folder."""
    table = io.StringIO()
    writer = csv.writer(table, lineterminator="\n")
    writer.writerow(COLUMNS)
    for record in load_analyses(folder):
        values: list[Any] = [record.facts.get(name) for name in COLUMNS]
        writer.writerow(["" if value is None else value for value in values])
    return write_text(folder / TABLE, table.getvalue())


def _tell(reporter: Reporter | None, line: str) -> None:
    if reporter is not None:
        reporter.line(line)
