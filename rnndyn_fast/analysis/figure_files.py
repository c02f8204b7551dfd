"""The figures of a result as files: SVG, PDF and PNG, each with its table (CSV) beside it."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from rnndyn_fast.analysis import breakdown_figures, figures
from rnndyn_fast.analysis.results import ReadoutZoneResult
from rnndyn_fast.file_io import replaced_atomically
from rnndyn_fast.optional import require

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Names are those of the tables that they are drawn from.
FIGURES: dict[str, Callable[[ReadoutZoneResult], Figure]] = {
    "accuracy": figures.figure_accuracy,
    "groups": figures.figure_groups,
    "counts": figures.figure_counts,
    "representation_change_by_t_stable": figures.figure_representation_change,
    "norm_now_vs_later": figures.figure_norm,
    "cos_current_now_vs_later": figures.figure_cos_current,
    "cos_final_vs_other": figures.figure_cos_final,
    "margin_now_vs_later": figures.figure_margin,
    "boundary_distance_now_vs_later": figures.figure_boundary_distance,
    "norm_by_t_stable": breakdown_figures.figure_norm_by_t_stable,
    "plane": breakdown_figures.figure_plane,
    "classes": breakdown_figures.figure_classes,
    "confusion": breakdown_figures.figure_confusion,
    "readout_dendrogram": figures.figure_dendrogram,
}


def save_figure(figure: Figure, stem: str | os.PathLike[str]) -> list[Path]:
    """Write a figure to ``<stem>.png``, ``.svg`` and ``.pdf``, atomically; returns the paths."""
    written = []
    for suffix in ("png", "svg", "pdf"):
        path = Path(f"{os.fspath(stem)}.{suffix}")
        # No dates: the same result makes the same file.
        metadata = {"svg": {"Date": None}, "pdf": {"CreationDate": None, "ModDate": None}}.get(suffix)
        with replaced_atomically(path) as temporary:
            figure.savefig(temporary, metadata=metadata)
        written.append(path)
    return written


def write_figures(result: ReadoutZoneResult, out_dir: str | os.PathLike[str], *, untrained: ReadoutZoneResult | None = None) -> list[Path]:
    """Write each of FIGURES to ``out_dir/<name>.png``, ``.svg`` and ``.pdf``; returns the paths."""
    require("matplotlib")

    from matplotlib import rc_context

    written = []
    for name, make in FIGURES.items():
        with rc_context(figures.STYLE):
            if make is figures.figure_representation_change:
                figure = figures.figure_representation_change(result, untrained)
            else:
                figure = make(result)
            written += save_figure(figure, Path(out_dir) / name)
    return written
