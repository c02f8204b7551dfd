"""Tables (CSV) of a readout-zone analysis."""

from __future__ import annotations

import csv
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from rnndyn_fast.analysis.accumulators import GROUPS
from rnndyn_fast.analysis.bootstrap import PAIRED, Bootstrap
from rnndyn_fast.analysis.breakdown_figures import class_rows
from rnndyn_fast.analysis.claims import Claim
from rnndyn_fast.analysis.figures import readout_tree
from rnndyn_fast.analysis.intervals import Estimate
from rnndyn_fast.analysis.results import ReadoutZoneResult
from rnndyn_fast.file_io import replaced_atomically

Row = dict[str, Any]

_PAIRED = {  # measure -> names of its two columns
    "norm_now_vs_later": ("stable", "not_yet_stable"),
    "cos_current_now_vs_later": ("stable", "not_yet_stable"),
    "margin_now_vs_later": ("stable", "not_yet_stable"),
    "boundary_distance_now_vs_later": ("stable", "not_yet_stable"),
    "cos_final_vs_other": ("own_final", "others_final"),
}


def _cell(prefix: str, summary: Any, index: Any) -> Row:
    names = ("mean", "sd", "n", "ci95_low", "ci95_high")
    mean, sd, count, half = (part[index] for part in summary)
    values = (float(mean), float(sd), int(count), float(mean - half), float(mean + half))
    return {f"{prefix}{name}": value for name, value in zip(names, values, strict=True)}


def tables(result: ReadoutZoneResult) -> dict[str, list[Row]]:
    """Every measure as a list of rows: means with standard deviation, n and 95% interval; NaN where a group is empty.

    In ``cos_final_vs_other``, ``others_final_n`` counts ordered pairs, and ``others_final_n_effective`` the samples
    that they are worth. ``published_summary`` has the averages over steps that the publication prints.
    """
    steps, total = range(result.timesteps), max(result.n, 1)
    out: dict[str, list[Row]] = {}
    out["groups"] = [{"group": g, "n": result.counts[g], "fraction": result.counts[g] / total} for g in GROUPS]
    accuracy = result.summary("accuracy")
    out["accuracy"] = [{"t": t} | _cell("", accuracy, t) for t in steps]
    out["counts"] = [
        {
            "t": t,
            "stable_correct": int(result.counts_t_stable_correct[t]),
            "stable_incorrect": int(result.counts_t_stable_incorrect[t]),
            "unstable_correct": int(result.counts_t_unstable_correct[t]),
        }
        for t in steps
    ]
    effective = result.sums.pairs()[1]
    for measure, columns in _PAIRED.items():
        summary = result.summary(measure)
        out[measure] = [
            {"t": t} | {k: v for c, name in enumerate(columns) for k, v in _cell(f"{name}_", summary, (t, c)).items()} for t in steps
        ]
    for row, value in zip(out["cos_final_vs_other"], effective, strict=True):
        row["others_final_n_effective"] = float(value)
    change = result.summary("representation_change_by_t_stable")
    out["representation_change_by_t_stable"] = [
        {"t_stable": s, "t": t} | _cell("", change, (s, t)) for s in steps for t in range(result.timesteps - 1)
    ]
    out["change_after_stable"] = [
        {"measure": name} | _cell("", result.summary(name), ()) for name in ("change_after_stable", "relative_change_after_stable")
    ]
    norm, across, along = (result.summary(name) for name in ("norm_by_t_stable", "plane_across", "plane_along"))
    out["norm_by_t_stable"] = [{"t_stable": s, "t": t} | _cell("", norm, (s, t)) for s in steps for t in steps]
    out["plane"] = [
        {"t_stable": s, "t": t} | _cell("across_", across, (s, t)) | _cell("along_", along, (s, t)) for s in steps[1:] for t in steps
    ]
    out["correlations"] = [{"measure": "norm at t = 0 with time of stabilisation", "value": result.norm_t_stable_correlation}]
    out["classes"] = class_rows(result)
    labels, predicted = np.nonzero(result.sums.confusion.any(0))
    out["confusion"] = [
        {"label": int(a), "predicted": int(p), **{f"t{t}": int(result.sums.confusion[t, a, p]) for t in steps}}
        for a, p in zip(labels, predicted, strict=True)
    ]
    out["readout_dendrogram"] = [
        {"merge": k, "left": int(row[0]), "right": int(row[1]), "distance": float(row[2]), "leaves": int(row[3])}
        for k, row in enumerate(readout_tree(result))
    ]
    out["published_summary"] = [
        {
            "measure": m,
            "columns": " / ".join(names),
            **dict(zip(("first", "second"), map(float, result.published_summary(m)), strict=True)),
        }
        for m, names in _PAIRED.items()
    ]
    return out


def spread(prefix: str, estimate: Estimate) -> Row:
    """An estimate as columns."""
    names = ("value", "low", "high", "n", "networks")
    return {f"{prefix}{name}": getattr(estimate, name) for name in names}


def claim_rows(claims: Sequence[Claim], network: str = "") -> list[Row]:
    """Every number that claims rest on, with its interval, bound and p, and those that are shown beside them."""
    rows: list[Row] = []
    for claim in claims:
        head: Row = {"network": network, "claim": claim.name, "verdict": claim.verdict, "reason": claim.reason}
        head |= {"stable_correct": claim.n, "p_for": claim.p_for, "p_against": claim.p_against, "family": claim.family}
        for part in (*claim.parts, *claim.other):
            row = head | {"measure": part.name, "label": part.label} | spread("", part.estimate)
            rows.append(row | {"bound": part.bound, "p_above": part.above, "p_below": part.below, "speaks": part.status(len(claim.parts))})
    return rows


def estimate_rows(boot: Bootstrap, network: str = "") -> list[Row]:
    """Averages over time steps, differences and effects, and change by step after stabilisation, with their intervals."""
    rows: list[Row] = []
    for measure in PAIRED:
        if f"{measure}.average" not in boot.values:
            continue
        for name, index in ((".average", 0), (".average", 1), (".difference", ()), (".effect", ())):
            if f"{measure}{name}" in boot.values:
                which = ["first", "second"][index] if isinstance(index, int) else ""
                row = {"network": network, "measure": f"{measure}{name}", "which": which}
                rows.append(row | spread("", boot.estimate(f"{measure}{name}", index)))
    for name in ("change_by_lag", "change_untrained_by_lag"):
        for k in range(len(boot.lag_counts) if name in boot.values else 0):
            row = {"network": network, "measure": name, "which": str(k)} | spread("", boot.estimate(name, k))
            rows.append(row | {"n": int(boot.lag_counts[k])})
    return rows


def _text(value: Any) -> str:
    # repr of a float reads back as the same float; an empty field is what spreadsheets and pandas take for missing.
    if isinstance(value, float):
        return "" if np.isnan(value) else repr(value)
    return str(value)


def write_csv(rows: Iterable[Row], path: str | os.PathLike[str]) -> Path:
    """Write rows with the same keys to a CSV file, atomically; NaN becomes an empty field."""
    rows = list(rows)
    with replaced_atomically(path) as temporary, temporary.open("w", newline="", encoding="utf-8") as file:
        write_rows(rows, file)
    return Path(path)


def write_rows(rows: Sequence[Row], file: TextIO) -> None:
    """Write rows with the same keys as CSV; NaN becomes an empty field."""
    writer = csv.writer(file)
    writer.writerow(rows[0].keys() if rows else [])
    writer.writerows([_text(value) for value in row.values()] for row in rows)


def write_tables(result: ReadoutZoneResult, out_dir: str | os.PathLike[str]) -> list[Path]:
    """Write each of ``tables(result)`` to ``out_dir/<name>.csv``."""
    return [write_csv(rows, Path(out_dir) / f"{name}.csv") for name, rows in tables(result).items()]
