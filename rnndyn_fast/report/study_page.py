"""The page of a study."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis import figures
from rnndyn_fast.analysis.accumulators import GROUPS
from rnndyn_fast.analysis.bootstrap import Bootstrap
from rnndyn_fast.analysis.claims import claims_of
from rnndyn_fast.analysis.figure_files import save_figure
from rnndyn_fast.analysis.outputs import claim_rows, estimate_rows, write_csv
from rnndyn_fast.analysis.results import MIN_GROUP
from rnndyn_fast.data import SPLITS, ImageFile
from rnndyn_fast.optional import require
from rnndyn_fast.report.claims import answer, claims_section, networks_line
from rnndyn_fast.report.comparison import along_rows, comparison_rows, figure_along, figure_comparison, flat, published_rows
from rnndyn_fast.report.dynamics import dynamics_sections, to_csv
from rnndyn_fast.report.figures import figure_training
from rnndyn_fast.report.page import Cell, Page, Picture, Plot, format_cell
from rnndyn_fast.report.pdf import print_pdf
from rnndyn_fast.report.provenance import provenance_section
from rnndyn_fast.study.config import TITLES
from rnndyn_fast.study.published import GROUP_COUNTS
from rnndyn_fast.study.record import REPORT, StudyRecord
from rnndyn_fast.train import versions


def write_study_page(record: StudyRecord) -> Path:
    """Write the report of a study, the files of its comparison, and where it is asked for the PDF; returns the page's path."""
    page, out = study_page(record), Path(record.config.out)
    page.write_tables(_folder(record))
    path = page.save(out / REPORT)
    if record.config.pdf:
        print_pdf(path)
    return path


def study_page(record: StudyRecord) -> Page:
    """The report of a study: answer, claims and comparison first, then everything they rest on. Also writes the comparison's files."""
    kinds, boots = record.kinds, record.pooled()
    first = [runs[0] for runs in kinds.values()]
    count = min(len(runs) for runs in kinds.values())
    claims = claims_of(boots)
    page = Page(
        f"How representations move in {len(kinds)} kind{'s' if len(kinds) > 1 else ''} of recurrent network",
        f"{networks_line(count)} {first[0].trained.n:,} challenging test images.",
        f"Made by rnndyn_fast {versions()['rnndyn_fast']} with PyTorch {versions()['torch']} and Python {versions()['python']}.",
    )
    write_csv([row for title, both in claims.items() for row in claim_rows(both, title)], _folder(record) / "claims.csv")
    write_csv([row for title, boot in boots.items() for row in estimate_rows(boot, title)], _folder(record) / "estimates.csv")
    require("matplotlib")
    from matplotlib import rc_context

    with rc_context(figures.STYLE):
        answer(page, boots, claims)
        claims_section(page, claims)
        _comparison(page, record, boots)
        _seeds(page, record)
        _what_was_run(page, record)
        _training(page, record)
        _along(page, record)
        if count > 1:
            page.section("One network of each kind, in detail").text("The figures and tables below are of the first network of each kind.")
        dynamics_sections(page, first)
        _published(page)
        seeds = "; ".join(f"{title}: {', '.join(str(run.seed) for run in runs)}" for title, runs in kinds.items())
        facts = {"data": record.data_path, "seeds of the weights": seeds, "seed of data and bootstrap": record.config.seed}
        facts["time taken, s"] = "; ".join(f"{name} {s:.3g}" for name, s in record.seconds.items())
        provenance_section(page, facts, record.commands, record.config.bootstrap)
    return page


def _folder(record: StudyRecord) -> Path:
    return Path(record.config.out) / "comparison"


def _comparison(page: Page, record: StudyRecord, boots: dict[str, Bootstrap]) -> None:
    rows = comparison_rows(boots)
    section = page.section("The kinds of network compared")
    section.text(
        f"Averages over time steps that have at least {MIN_GROUP} samples in both groups, with the 95% intervals that all of this report "
        "has. The effect is Cohen's d: the difference of the two groups over their pooled standard deviation."
    )
    for measure in dict.fromkeys(row["measure"] for row in rows):
        mine = [row for row in rows if row["measure"] == measure]
        columns = [mine[0]["column_1"], mine[0]["column_2"]]
        table: list[list[Cell]] = [
            [row["network"], row["value_1"].networks, row["value_1"], row["value_2"], row["difference"], row["effect"],
             row["difference"].n] for row in mine
        ]  # fmt: skip
        header = ["kind of network", "networks", *columns, "difference", "effect d", "n late"]
        told = f"{measure[0].upper()}{measure[1:]} ({mine[0]['unit']}), {columns[0]} against {columns[1]}; n late: images that are not "
        section.table(header, table, f"{told}stable from the start, the fewest over networks.")
    figure = figure_comparison(rows)
    _files(record, "comparison", figure, flat(rows))
    write_csv(published_rows(), _folder(record) / "published.csv")
    alt = "; ".join(f"{r['network']}, {r['measure']}: {format_cell(r['value_1'])} and {format_cell(r['value_2'])}" for r in rows)
    caption = "Averages over time steps of both groups in every kind of network; bars: 95% intervals."
    section.plots([Plot(figure, caption, f"Dot plots. {alt}.", 6.8, to_csv(flat(rows)))])


def _seeds(page: Page, record: StudyRecord) -> None:
    """Network by network, where there are several of a kind."""
    if len(record.runs) == len(record.kinds):
        return
    names = ("change_last", "norm_now_vs_later.difference", "norm.within", "cos_current_now_vs_later.difference", "cos_current.within")
    rows: list[list[Cell]] = [
        [run.title, run.seed, run.trained.counts["stable_correct"], *(run.boot.estimate(name) for name in names)] for run in record.runs
    ]
    header = ["kind of network", "seed", "stable-correct images", "change in the last step", "norm, between images", "norm, within images",
              "cosine, between images", "cosine, within images"]  # fmt: skip
    section = page.section("Network by network")
    section.table(header, rows, "What the verdicts rest on in every single network; here intervals are over images only.")


def _published(page: Page) -> None:
    """The published numbers, apart from ours: not a comparison of sizes."""
    section = page.section("Published numbers, for orientation")
    section.text(
        "From arXiv 2308.12435: MiniEcoset testplus, 25,000 images of 100 classes, 10 time steps, widths 32 to 512. Sizes depend on "
        "network, data and number of classes, so these numbers cannot be compared with those above; which of two neighbours is the larger "
        "can. Standard deviations and numbers of networks were not published."
    )
    rows: list[list[Cell]] = [
        [row["network"], row["measure"], row["columns"], str(row["first"]), str(row["second"])] for row in published_rows()
    ]
    section.table(
        ["kind of network", "measure", "columns", "first", "second"], rows, "Published averages over time steps, not of this study."
    )
    groups: list[list[Cell]] = [[TITLES[name], sum(counts), *counts] for name, counts in GROUP_COUNTS.items()]
    header = ["kind of network", "n", *(name.replace("_", "-") for name in GROUPS)]
    section.table(header, groups, "Published numbers of trajectories per group, not of this study.")


def _along(page: Page, record: StudyRecord) -> None:
    rows = along_rows(record.kinds, record.config.bootstrap, record.config.seed)
    section = page.section("Along training")
    section.text("The same analysis of checkpoints along training; epoch 0 is the untrained network, the last one the best.")
    figure = figure_along(rows)
    _files(record, "along_training", figure, flat(rows))
    alt = "Four line plots over epochs; numbers in the table below."
    caption = "Accuracy, change in the last step, and the two differences between images, by epoch; bars: 95% intervals."
    section.plots([Plot(figure, caption, alt, 6.8, to_csv(flat(rows)))])
    keys = (
        "network",
        "epoch",
        "accuracy_first",
        "accuracy_last",
        "stable_correct",
        "change_last",
        "norm_difference",
        "cos_current_difference",
    )
    table: list[list[Cell]] = [[row[key] for key in keys] for row in rows]
    header = ["kind of network", "epoch", "accuracy, t = 0", "accuracy, last t", "stable-correct (share)", "change in the last step",
              "norm: stable - not yet", "cosine: stable - not yet"]  # fmt: skip
    section.table(header, table, "Along training, per kind of network and epoch.")


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
        "Lateral and top-down terms l, d meet the bottom-up term b as `b + l + d` (additive) or `b * (1 + l + d)` (multiplicative)."
    )


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
                f"{run.title}, seed {run.seed}: loss and validation accuracy per epoch.",
                f"Two line plots over {len(run.metrics)} epochs of the {run.title} network: loss falls to "
                f"{last.train_loss:.2f} "
                f"(training) and {last.val_loss:.2f} (validation); validation accuracy reaches {first:.1f}% at the "
                "first "
                f"and {final:.1f}% at the last time step.",
            )
        )
        speed = float(np.median([row.images_per_s for row in run.metrics]))
        rows.append([run.title, run.seed, run.parameters, len(run.metrics), last.epoch, first, final, speed])
    if not rows:
        section.text("The checkpoints were given, without metrics.")
        return
    section.plots(plots)
    section.table(
        [
            "network",
            "seed",
            "parameters",
            "epochs",
            "best",
            "validation (%), t = 0",
            "validation (%), last t",
            "images/s",
        ],
        rows,
        "Accuracy on plain validation images after the best epoch; median training speed.",
    )
