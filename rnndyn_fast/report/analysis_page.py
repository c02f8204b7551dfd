"""The report of one result: a network's, or that of trajectories from other software."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis import ReadoutZoneResult, figures, readout_zones
from rnndyn_fast.analysis.bootstrap import PAIRED, Bootstrap, bootstrap
from rnndyn_fast.analysis.claims import Claim, claims_of
from rnndyn_fast.analysis.figure_files import write_figures
from rnndyn_fast.analysis.outputs import claim_rows, estimate_rows, write_csv, write_tables
from rnndyn_fast.analysis.trajectory_files import load_result
from rnndyn_fast.data import ImageFile
from rnndyn_fast.optional import require
from rnndyn_fast.report.claims import answer, claims_section, networks_line
from rnndyn_fast.report.dynamics import dynamics_sections
from rnndyn_fast.report.motion import motion_section
from rnndyn_fast.report.page import Cell, Page
from rnndyn_fast.report.pdf import find_browser, print_pdf
from rnndyn_fast.report.provenance import provenance_section
from rnndyn_fast.train.checkpoint import versions

REPLICATES = 1000
REPORT = "report.html"


@dataclass(frozen=True)
class _View:
    trained: ReadoutZoneResult
    untrained: ReadoutZoneResult | None = None
    title: str = ""


def analysis_page(
    result: ReadoutZoneResult,
    *,
    untrained: ReadoutZoneResult | None = None,
    title: str = "",
    boot: Bootstrap | None = None,
    replicates: int = REPLICATES,
    commands: Sequence[str] = (),
) -> Page:
    """The page of a result: the answer, claims and averages (where samples were kept), all figures and tables.

    Args:
        boot: `bootstrap` of the result, where it is at hand.
    """
    view = _View(result, untrained)
    page = Page(
        title or "How representations move through time",
        f"{networks_line(1)} {result.n:,} trajectories of {result.timesteps} time steps, {result.num_classes} classes.",
        f"Made by rnndyn_fast {versions()['rnndyn_fast']} from {result.descriptors.get('data', {}).get('path', 'arrays')}.",
    )
    if boot is None and result.samples is not None:
        boot = result_bootstrap(result, untrained, replicates)
    require("matplotlib")
    from matplotlib import rc_context

    with rc_context(figures.STYLE):
        if boot is None:
            page.section("The two claims").text(
                "Inconclusive: the result holds sums only, and the tests need every sample. Run the extraction with `--keep-samples`."
            )
        else:
            claims = claims_of({"": boot})
            answer(page, {"": boot}, claims)
            claims_section(page, claims)
            _averages(page, boot)
        dynamics_sections(page, [view])
        if boot is not None:
            motion_section(page, result, boot)
        provenance_section(page, _facts(result), commands, replicates if boot is None else len(boot.replicates["accuracy"]))
    return page


def result_bootstrap(
    result: ReadoutZoneResult, untrained: ReadoutZoneResult | None, replicates: int = REPLICATES, seed: int = 0
) -> Bootstrap:
    """`bootstrap`, with the untrained network where its samples were kept, and the images' conditions where their file has them."""
    control = untrained if untrained is not None and untrained.samples is not None else None
    return bootstrap(result, replicates, seed=seed, untrained=control, condition=conditions(result))


def conditions(result: ReadoutZoneResult) -> np.ndarray | None:  # -> [N]
    """The condition of each image, where the result says which file they are from, that is there, and it knows conditions."""
    path = result.descriptors.get("data", {}).get("path")
    split = result.descriptors.get("options", {}).get("split")
    if not path or not split or result.samples is None or not Path(path).is_file():
        return None
    try:
        with ImageFile(path, required_splits=(split,)) as file:
            images = file.split(split)
            same = np.array_equal(images.labels, result.samples["label"])
            return images.extra("condition") if same and "condition" in images.extras else None
    except (OSError, ValueError):  # another file by now
        return None


def _facts(result: ReadoutZoneResult) -> dict[str, Any]:
    """What the result says of where it comes from."""
    about, checkpoint = result.descriptors, result.descriptors.get("checkpoint", {})
    facts = {"data": about.get("data", {}).get("path", "arrays"), "seed of the bootstrap": 0}
    if checkpoint:
        facts |= {
            "checkpoint": checkpoint.get("path"),
            "SHA-256 of the checkpoint": checkpoint.get("sha256"),
            "device": about.get("device"),
        }
    return facts


def _averages(page: Page, boot: Bootstrap) -> None:
    rows: list[list[Cell]] = []
    for measure in PAIRED:
        row: list[Cell] = [TITLES[measure]]
        row += [boot.estimate(f"{measure}.average", k) for k in range(2)]
        row += [boot.estimate(name) if (name := f"{measure}.{end}") in boot.values else None for end in ("difference", "effect")]
        rows.append([*row, boot.counts[f"{measure}.difference"], int(boot.steps[measure].sum())])
    header = ["measure", "stable, or own final class", "not yet, or others' final classes", "difference", "effect d", "n late", "steps"]
    page.section("Averages over time steps").table(
        header,
        rows,
        "Means over the time steps that have enough samples in both groups, with 95% intervals: already stable against not yet stable "
        "samples, and (last row) the cosine of those not yet stable to their own final class and to the final classes of others. Effect "
        "d: difference over the pooled standard deviation. n late: images that are not stable from the start.",
    )


TITLES = {
    "norm_now_vs_later": "norm (activation units)",
    "cos_current_now_vs_later": "cosine to the current class",
    "margin_now_vs_later": "margin (logits)",
    "boundary_distance_now_vs_later": "distance to the zone boundary (activation units)",
    "cos_final_vs_other": "cosine to final classes",
}


def write_report(
    result: ReadoutZoneResult,
    out_dir: str | os.PathLike[str],
    *,
    untrained: ReadoutZoneResult | None = None,
    title: str = "",
    boot: Bootstrap | None = None,
    commands: Sequence[str] = (),
    pdf: bool = False,
) -> list[Path]:
    """Write ``report.html``, every table (CSV) and every figure (PNG, SVG, PDF) of a result; returns the paths.

    Args:
        result: of `readout_zones`, a reducer, or a file.
        out_dir: folder for the files; made where it does not exist. Files of the same names are replaced.
        untrained: the result of the untrained network on the same images, shown beside it and held against it.
        title: of the page.
        boot: `bootstrap` of the result, where it is at hand.
        commands: that gave the result, for the record.
        pdf: print the page to ``report.pdf`` too.

    Raises:
        FileExistsError: `out_dir` is a file.
        ValueError: `untrained` has another number of time steps, or is of other images.
        ImportError: `pdf`, and there is no browser that prints.
    """
    if os.path.exists(out_dir) and not os.path.isdir(out_dir):
        raise FileExistsError(f"out: expected a folder, {os.fspath(out_dir)} is a file")
    if pdf:
        find_browser()
    if untrained is not None:
        _check_control(result, untrained)
    if boot is None and result.samples is not None:
        boot = result_bootstrap(result, untrained)
    page = analysis_page(result, untrained=untrained, title=title, boot=boot, commands=commands)
    out = Path(out_dir)
    written = write_tables(result, out) + write_figures(result, out, untrained=untrained)
    if boot is not None:
        written.append(write_csv(claim_rows(claims_of({"": boot})[""]), out / "claims.csv"))
        written.append(write_csv(estimate_rows(boot), out / "estimates.csv"))
    written += [*page.write_tables(out), page.save(out / REPORT)]
    return [*written, print_pdf(out / REPORT)] if pdf else written


def _check_control(result: ReadoutZoneResult, untrained: ReadoutZoneResult) -> None:
    if untrained.timesteps != result.timesteps:
        raise ValueError(f"compare: expected a result of T = {result.timesteps} time steps, got {untrained.timesteps}")
    same = untrained.n == result.n
    if same and untrained.samples is not None and result.samples is not None:
        same = np.array_equal(untrained.samples["label"], result.samples["label"])
    if not same:
        raise ValueError(f"compare: expected a result of the same {result.n:,} images in the same order, got {untrained.n:,} others")


def report_trajectories(
    trajectories: Any,  # [T, N, D]
    readout_weight: Any,  # [C, D]
    labels: Any,  # [N]
    out_dir: str | os.PathLike[str],
    *,
    bias: Any = None,  # [C]
    log_probs: Any = None,  # [T, N, C]
    untrained: Any = None,  # [T, N, D]
    class_names: list[str] | None = None,
    title: str = "",
) -> ReadoutZoneResult:
    """Analyse trajectories that are at hand and write the report of them; see `readout_zones` and `write_report`.

    `untrained`: of the same samples before training, without which the claim that representations keep changing cannot be supported. (Only
    their changes are held against those of `trajectories`; their place in the zones is taken with the same readout.)

    >>> report_trajectories(activations, weight, labels, "report")  # doctest: +SKIP
    """
    result = readout_zones(trajectories, readout_weight, labels, bias, log_probs)
    if class_names is not None:
        result.descriptors["class_names"] = list(class_names)
    control = None if untrained is None else readout_zones(untrained, readout_weight, labels, bias)
    write_report(result, out_dir, untrained=control, title=title)
    return result


def analyse(
    path: str | os.PathLike[str],
    out_dir: str | os.PathLike[str],
    *,
    compare: str | os.PathLike[str] | None = None,
    names: Mapping[str, str] | None = None,
    pdf: bool = False,
) -> tuple[ReadoutZoneResult, list[Claim], list[Path]]:
    """Write the report of a file: a result of an extraction, or anybody's trajectories (see `load_result`); with `pdf` as PDF too.

    Returns the result, the claims (none where no samples were kept), and the paths written. Raises what `load_result` and `write_report`
    raise; nothing is written then.
    """
    result = load_result(path, names)
    untrained = None if compare is None else load_result(compare, names)
    words = ["rnndyn", "analyse", os.fspath(path), "--out", os.fspath(out_dir)]
    words += [] if compare is None else ["--compare", os.fspath(compare)]
    if untrained is not None:
        _check_control(result, untrained)
    boot = None if result.samples is None else result_bootstrap(result, untrained)
    paths = write_report(result, out_dir, untrained=untrained, boot=boot, commands=[shlex.join(words)], pdf=pdf)
    return result, [] if boot is None else claims_of({"": boot})[""], paths
