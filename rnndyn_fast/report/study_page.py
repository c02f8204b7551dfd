"""The page of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis import figures
from rnndyn_fast.analysis.figure_files import save_figure
from rnndyn_fast.analysis.outputs import write_csv
from rnndyn_fast.data import SPLITS, ImageFile
from rnndyn_fast.optional import require
from rnndyn_fast.report.comparison import along_rows, comparison_rows, figure_along, figure_comparison, published_rows, verdict_rows
from rnndyn_fast.report.dynamics import claims_section, dynamics_sections, to_csv, verdict_sentences
from rnndyn_fast.report.figures import figure_training
from rnndyn_fast.report.page import Cell, Page, Picture, Plot, format_cell
from rnndyn_fast.study.run import StudyRecord
from rnndyn_fast.train import versions


def study_page(record: StudyRecord) -> Page:
    """The report of a study: comparison and claims first, then everything they rest on. Also writes the comparison's files."""
    require("matplotlib")
    from matplotlib import rc_context

    runs = record.runs
    page = Page(
        f"How representations move in {len(runs)} recurrent network{'s' if len(runs) > 1 else ''}",
        f"Convolutional recurrent networks analysed over time on {runs[0].trained.n:,} challenging test images. {verdict_sentences(runs)}",
        f"Made by rnndyn_fast {versions()['rnndyn_fast']} with PyTorch {versions()['torch']} and Python "
        f"{versions()['python']} in {sum(record.seconds.values()) / 60:.1f} minutes.",
    )
    with rc_context(figures.STYLE):
        _comparison(page, record)
        claims_section(page, runs)
        _what_was_run(page, record)
        _training(page, record)
        _along(page, record)
        dynamics_sections(page, runs, published=True)
    return page


def _folder(record: StudyRecord) -> Path:
    return Path(record.config.out) / "comparison"


def _with_interval(value: float, low: float, high: float) -> str:
    if not np.isfinite(value):
        return "\N{EN DASH}"
    if not np.isfinite([low, high]).all():
        return format_cell(value)
    return f"{format_cell(value)} ({format_cell(low)} to {format_cell(high)})".replace(" ", "\N{NO-BREAK SPACE}")


def _comparison(page: Page, record: StudyRecord) -> None:
    rows, verdicts = comparison_rows(record.runs), verdict_rows(record.runs)
    section = page.section("The networks compared, beside the published numbers")
    section.text(
        f"Averages over time steps, with 95% intervals from {record.config.bootstrap:,} bootstrap replicates over images. The effect "
        "is Cohen's d: the difference of already stable and not yet stable samples over their pooled standard deviation."
    )
    table: list[list[Cell]] = [
        [row["network"], row["claim"], row["verdict"], _with_interval(row["number"], row["low"], row["high"])] for row in verdicts
    ]
    section.table(
        ["network", "claim", "verdict", "number (95% interval)"],
        table,
        "The published claims, part by part: holds where the whole interval lies above zero (change / norm: above 0.01), does not hold "
        "where it lies below.",
    )
    for measure in dict.fromkeys(row["measure"] for row in rows):
        mine = [row for row in rows if row["measure"] == measure]
        table = [
            [
                row["network"],
                *(_with_interval(row[f"value_{k}"], row[f"low_{k}"], row[f"high_{k}"]) for k in (1, 2)),
                _with_interval(row["difference"], row["difference_low"], row["difference_high"]),
                _with_interval(row["effect"], row["effect_low"], row["effect_high"]),
                row["published_1"],
                row["published_2"],
            ]
            for row in mine
        ]
        columns = [mine[0]["column_1"], mine[0]["column_2"]]
        header = ["network", *columns, "difference", "effect d", *(f"published, {name}" for name in columns)]
        section.table(header, table, f"{measure[0].upper()}{measure[1:]}: {columns[0]} against {columns[1]}.")
    section.text(
        "Means over time steps below the first t_stable with fewer than 1% of the t_stable = 0 count, without steps at which a group is "
        "empty. Published: arXiv 2308.12435, MiniEcoset testplus, 25,000 images of 100 classes, T = 10, widths 32 to 512. Sizes depend "
        "on network, data and number of classes and cannot be compared; what can be is which of two neighbours is the larger."
    )
    figure = figure_comparison(rows)
    _files(record, "comparison", figure, rows)
    write_csv(verdicts, _folder(record) / "claims.csv")
    write_csv(published_rows(), _folder(record) / "published.csv")
    alt = "; ".join(f"{r['network']}, {r['measure']}: {format_cell(r['value_1'])} and {format_cell(r['value_2'])}" for r in rows)
    section.plots([Plot(figure, "Both groups in every network; bars: 95% bootstrap intervals.", f"Dot plots. {alt}.", 6.8, to_csv(rows))])


def _along(page: Page, record: StudyRecord) -> None:
    rows = along_rows(record.runs)
    section = page.section("Along training")
    section.text("The same analysis of checkpoints along training; epoch 0 is the untrained network, the last one the best.")
    figure = figure_along(rows)
    _files(record, "along_training", figure, rows)
    alt = "Four line plots over epochs; numbers in the table below."
    section.plots([Plot(figure, "Accuracy, change after stabilisation, and the two differences, by epoch.", alt, 6.8, to_csv(rows))])
    table: list[list[Cell]] = [
        [
            r[k]
            for k in (
                "network",
                "epoch",
                "accuracy_first",
                "accuracy_last",
                "stable_correct",
                "relative_change",
                "norm_difference",
                "cos_current_difference",
            )
        ]
        for r in rows
    ]
    header = [
        "network",
        "epoch",
        "accuracy, t = 0",
        "last t",
        "stable-correct",
        "change / norm",
        "norm: stable - not yet",
        "cosine: stable - not yet",
    ]
    section.table(header, table, "Along training, per network and epoch.")


def _files(record: StudyRecord, name: str, figure: Any, rows: list[dict[str, Any]]) -> None:
    """A figure as files, and the numbers behind it."""
    save_figure(figure, _folder(record) / name)
    write_csv(rows, _folder(record) / f"{name}.csv")


def _what_was_run(page: Page, record: StudyRecord) -> None:
    section = page.section("What was run")
    with ImageFile(record.data_path) as file:
        sizes = ", ".join(f"{name} {len(file.split(name)):,}" for name in SPLITS)
        section.text(
            f"Images: {file.attrs.get('source_note', 'no note')}; {file.image_size} px, {file.num_classes} categories. "
            f"Splits: {sizes}; no source image is in two of them. `testplus` is the held-out test images under "
            "challenging "
            "conditions: other objects as clutter, fragments as debris, occlusion, low contrast, noise."
        )
        section.gallery(_samples(file))
    config = record.runs[0].config
    section.text(
        f"Networks: `{config.model}` with widths {', '.join(map(str, config.widths))}, T = {config.timesteps} time steps; Adam at "
        f"{config.lr:g}, batches of {config.batch_size}, loss summed over time steps. Training ends when validation accuracy (mean "
        f"over time steps) has not improved for {config.patience} epochs, or after {config.epochs}; the best checkpoint is analysed. "
        "Lateral and top-down terms l, d meet the bottom-up term b as `b + l + d` (additive) or `b * (1 + l + d)` (multiplicative).",
        "The same, command by command:",
    )
    section.commands(record.commands)
    times = (f"{name} {s:.0f} s" if s >= 10 else f"{name} {s:.1f} s" for name, s in record.seconds.items())
    section.text(f"Time taken: {'; '.join(times)}.")


def _samples(file: ImageFile, per_condition: int = 1) -> list[Picture]:
    """Images of testplus, some of each condition where the file knows them."""
    split = file.split("testplus")
    names = [str(name) for name in split.attrs.get("condition_names", [])]
    if names and "condition" in split.extras:
        condition = split.extra("condition")
        picked = [(int(i), names[c]) for c in range(len(names)) for i in np.flatnonzero(condition == c)[:per_condition]]
    else:
        picked = [(int(i), "") for i in range(min(12, len(split)))]
    images, labels = split.read([index for index, _ in picked])
    pictures = []
    for pixels, label, (_, name) in zip(images.numpy(), labels.tolist(), picked, strict=True):
        what, how = file.categories[label], name.replace("_", " ")
        caption = f"{what}, {how}" if how else what
        pictures.append(Picture(pixels.transpose(1, 2, 0), caption, f"Test image of the category {caption}"))
    return pictures


def _training(page: Page, record: StudyRecord) -> None:
    section = page.section("Training")
    plots = []
    rows: list[list[Cell]] = []
    for run in record.runs:
        if not run.metrics:
            continue
        last = max(run.metrics, key=lambda row: row.mean_val_accuracy)
        first, final = (100 * last.val_accuracy[step] for step in (0, -1))
        plots.append(
            Plot(
                figure_training(run.metrics),
                f"{run.title}: loss and validation accuracy per epoch.",
                f"Two line plots over {len(run.metrics)} epochs of the {run.title} network: loss falls to "
                f"{last.train_loss:.2f} "
                f"(training) and {last.val_loss:.2f} (validation); validation accuracy reaches {first:.1f}% at the "
                "first "
                f"and {final:.1f}% at the last time step.",
            )
        )
        speed = f"{np.median([row.images_per_s for row in run.metrics]):.0f}"
        rows.append([run.title, run.parameters, len(run.metrics), last.epoch, f"{first:.1f}%", f"{final:.1f}%", speed])
    if not rows:
        section.text("The checkpoints were given, without metrics.")
        return
    section.plots(plots)
    section.table(
        [
            "network",
            "parameters",
            "epochs",
            "best",
            "validation, t = 0",
            "validation, last t",
            "images/s",
        ],
        rows,
        "Accuracy on plain validation images after the best epoch; median training speed.",
    )
