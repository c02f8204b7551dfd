"""The page of the demo."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib import rc_context

from rnndyn_fast.analysis import Claim, ReadoutZoneResult, check_claims, figures
from rnndyn_fast.analysis.accumulators import GROUPS
from rnndyn_fast.data import SPLITS, ImageFile
from rnndyn_fast.report.demo import DemoRecord, NetworkRun
from rnndyn_fast.report.figures import figure_training
from rnndyn_fast.report.page import Card, Cell, Page, Picture, Plot, format_cell, lift_note, table_html
from rnndyn_fast.train import versions

# Thorat, Doerig & Kietzmann (2023), arXiv 2308.12435; MiniEcoset testplus, 25,000 images, T = 10. Two columns per
# measure.
PUBLISHED = {
    "lateral, additive": ((8.035, 7.449), (0.2020, 0.1209), (0.0999833, -0.0235295)),
    "lateral, multiplicative": ((24.148, 23.581), (0.1358, 0.0710), (0.0516290, -0.0323338)),
}
PUBLISHED_GROUPS = {"lateral, additive": (12_418, 9_850, 1_295, 1_437)}
MEASURES = ("norm_now_vs_later", "cos_current_now_vs_later", "cos_final_vs_other")


def demo_page(record: DemoRecord) -> Page:
    """The report of a demo: claims first, then everything they rest on."""
    page = Page(
        "How representations move in two small recurrent networks",
        f"Two lateral networks, {_names(record)}, trained on real images in minutes and analysed over time on "
        f"{record.runs[0].trained.n:,} challenging test images. {_verdicts(record)}",
        f"Made by rnndyn_fast {versions()['rnndyn_fast']} with PyTorch {versions()['torch']} and Python "
        f"{versions()['python']} in {sum(record.seconds.values()) / 60:.1f} minutes.",
    )
    with rc_context(figures.STYLE):
        _claims(page, record)
        _what_was_run(page, record)
        _training(page, record)
        _accuracy(page, record)
        _change(page, record)
        _zones(page, record)
        _published(page, record)
    return page


def _names(record: DemoRecord) -> str:
    return " and ".join(f"{run.name}" for run in record.runs)


def _verdicts(record: DemoRecord) -> str:
    """One sentence per published claim."""
    sentences = []
    for claims in zip(*(check_claims(run.trained) for run in record.runs), strict=True):
        verdicts = {claim.verdict for claim in claims}
        if len(verdicts) == 1:
            told = f"{verdicts.pop()} in both"
        else:
            told = ", ".join(f"{claim.verdict} ({run.name})" for claim, run in zip(claims, record.runs, strict=True))
        sentences.append(f"“{claims[0].statement}”: {told}.")
    return " ".join(sentences)


def _claims(page: Page, record: DemoRecord) -> None:
    section = page.section("The two published claims, checked here")
    section.text(
        "Each card says whether the claim holds for one network on these images, by the criterion below it, with the "
        "number "
        "of samples it rests on and 95% intervals. “Stable-correct” samples reach the right class at some time step "
        "and "
        "never leave it; `t_stable` is that step."
    )
    cards = []
    for claims in zip(*(check_claims(run.trained) for run in record.runs), strict=True):
        cards += [_claim_card(claim, run) for claim, run in zip(claims, record.runs, strict=True)]
    section.cards(cards)


def _claim_card(claim: Claim, run: NetworkRun) -> Card:
    header, rows, rest = evidence_table(claim)
    return Card(
        f"{claim.statement} — {run.name}",
        claim.holds,
        f"{claim.verdict[0].upper()}{claim.verdict[1:]} (n = {claim.n:,} stable-correct samples)",
        table=table_html(header, rows, f"What it rests on{rest}."),
        small=f"Criterion: {claim.criterion}.",
    )


def evidence_table(claim: Claim) -> tuple[list[str], list[list[Cell]], str]:
    """Header and rows of a claim's numbers, and in words what is left.

    Where the numbers compare ("x, stable", "x, not yet", "x, difference"), each x is a row, and lone numbers are left
    for words; otherwise each number is a row. "x, 95% low" and "x, 95% high" are the interval of x.
    """
    evidence = dict(claim.evidence)

    def interval(name: str) -> str:
        low, high = (evidence.pop(f"{name}, 95% {end}", np.nan) for end in ("low", "high"))
        # One word to the line breaker.
        return f"{format_cell(low)}\N{NO-BREAK SPACE}to\N{NO-BREAK SPACE}{format_cell(high)}" if np.isfinite([low, high]).all() else ""

    compared = [name.removesuffix(", difference") for name in evidence if name.endswith(", difference")]
    rows: list[list[Cell]] = []
    if compared:
        for name in compared:
            values = [evidence.pop(f"{name}, {part}", np.nan) for part in ("stable", "not yet", "difference")]
            rows.append([name, *values, interval(f"{name}, difference")])
        rest = "; ".join(f"{name}: {format_cell(_number(value))}" for name, value in evidence.items())
        return ["measure", "stable", "not yet", "difference", "95% interval"], rows, f" ({rest})" if rest else ""
    for name in [name for name in evidence if not name.endswith((", 95% low", ", 95% high"))]:
        # An interval bears the name of its measure, or that of the measure without its unit.
        stem = name if f"{name}, 95% low" in evidence else name.removesuffix(" per step")
        rows.append([name, _number(evidence[name]), interval(stem)])
    return ["measure", "value", "95% interval"], rows, ""


def _number(value: float) -> int | float:
    return int(value) if float(value).is_integer() else value


def _what_was_run(page: Page, record: DemoRecord) -> None:
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
        f"Networks: `{config.model}` with widths {', '.join(map(str, config.widths))}, lateral connections, T = "
        f"{config.timesteps} time steps; Adam at {config.lr:g}, batches of {config.batch_size}, "
        f"{config.epochs} epochs, loss summed over time steps, Xavier-uniform weights, no augmentation. The two "
        "differ in how "
        "the lateral term l meets the bottom-up term b: `b + l` (additive) or `b * (1 + l)` (multiplicative).",
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


def _training(page: Page, record: DemoRecord) -> None:
    section = page.section("Training")
    plots = []
    rows: list[list[Cell]] = []
    for run in record.runs:
        last = run.metrics[-1]
        first, final = (100 * last.val_accuracy[step] for step in (0, -1))
        plots.append(
            Plot(
                figure_training(run.metrics),
                f"{run.name}: loss and validation accuracy per epoch.",
                f"Two line plots over {len(run.metrics)} epochs of the {run.name} network: loss falls to "
                f"{last.train_loss:.2f} "
                f"(training) and {last.val_loss:.2f} (validation); validation accuracy reaches {first:.1f}% at the "
                "first "
                f"and {final:.1f}% at the last time step.",
            )
        )
        speed = f"{np.median([row.images_per_s for row in run.metrics]):.0f}"
        rows.append([run.name, run.parameters, last.epoch, f"{first:.1f}%", f"{final:.1f}%", speed])
    section.plots(plots)
    section.table(
        [
            "network",
            "parameters",
            "epochs",
            "validation, t = 0",
            f"validation, t = {len(last.val_accuracy) - 1}",
            "images/s",
        ],
        rows,
        "Accuracy on plain validation images after the last epoch; median training speed.",
    )


def _accuracy(page: Page, record: DemoRecord) -> None:
    section = page.section("Accuracy over time, and kinds of trajectories")
    section.plots(
        [
            *_each(record, figures.figure_accuracy, "accuracy on testplus over time", _accuracy_alt),
            *_each(record, figures.figure_groups, "kinds of trajectories", _groups_alt),
            *_each(record, figures.figure_counts, "stable samples per time of stabilisation", _counts_alt),
        ]
    )
    header = ["network", "n", *(name.replace("_", "-") for name in GROUPS)]
    rows: list[list[Cell]] = []
    for run in record.runs:
        rows.append([f"{run.name}, here", run.trained.n, *_shares([run.trained.counts[name] for name in GROUPS])])
        rows.append([f"{run.name}, untrained", run.untrained.n, *_shares([run.untrained.counts[name] for name in GROUPS])])
    rows += [[f"{name}, published", sum(counts), *_shares(counts)] for name, counts in PUBLISHED_GROUPS.items()]
    section.table(
        header,
        rows,
        "Trajectories per group: stable if the final class is predicted from t_stable on and not before; correct if "
        "that is "
        "the label (unstable-correct: the label was predicted at some step). Published: MiniEcoset, 100 classes.",
    )


def _change(page: Page, record: DemoRecord) -> None:
    section = page.section("Representations after stable correct classification")
    section.text(
        "The distance between successive representations, averaged over stable-correct samples with the same "
        "`t_stable`, for "
        "each network as trained and as it was before training."
    )
    plots = []
    for run in record.runs:
        for state, result in (("trained", run.trained), ("untrained", run.untrained)):
            change = result.summary("change_after_stable")
            plots.append(
                _plot(
                    figures.figure_representation_change(result),
                    f"{run.name}, {state}: representation change per time step, one line per `t_stable`",
                    f"Line plot of the representation change per transition in the {state} {run.name} network; after "
                    f"stabilisation it is {float(change.mean):.3g} per step on average over {int(change.n):,} samples.",
                )
            )
    section.plots(plots)


def _zones(page: Page, record: DemoRecord) -> None:
    section = page.section("Place in the readout zone: already stable against not yet")
    section.text(
        "Stable-correct samples only. At each step, samples that already are in their final class (t_stable ≤ t) are "
        "held "
        "against those that are not there yet (t_stable > t). A readout zone is the region where one class has the "
        "largest "
        "logit; its edge is where another takes over."
    )
    for name, figure, measure in (
        ("norm of the representation", figures.figure_norm, "norm_now_vs_later"),
        ("cosine to the current class", figures.figure_cos_current, "cos_current_now_vs_later"),
        ("logit margin", figures.figure_margin, "margin_now_vs_later"),
        ("distance to the nearest zone boundary", figures.figure_boundary_distance, "boundary_distance_now_vs_later"),
    ):
        section.plots(_each(record, figure, name, _pair_alt(name, measure, "already stable", "not yet stable")))
    section.text(
        "Of samples not yet stable: do they point to the class they will end in, more than to the final classes of "
        "others "
        "that share their current class?"
    )
    alt = _pair_alt("cosine of samples not yet stable", "cos_final_vs_other", "own final class", "others' final classes")
    section.plots(_each(record, figures.figure_cos_final, "cosine to own and to others' final classes", alt))
    section.text("How the readout vectors of the classes lie to each other:")
    section.plots(
        _each(
            record,
            figures.figure_dendrogram,
            "Ward dendrogram of the readout vectors",
            lambda r: _classes_alt(r.num_classes),
        )
    )


def _published(page: Page, record: DemoRecord) -> None:
    section = page.section("Beside the published numbers")
    header = [
        "network",
        "norm: stable",
        "not yet",
        "cosine to current class: stable",
        "not yet",
        "cosine, not yet stable: own final",
        "others' final",
    ]
    rows: list[list[Cell]] = []
    for run in record.runs:
        values = [run.trained.published_summary(measure) for measure in MEASURES]
        rows.append([f"lateral, {run.name}, here", *(float(value) for pair in values for value in pair)])
    rows += [[f"{name}, published", *(value for pair in pairs for value in pair)] for name, pairs in PUBLISHED.items()]
    section.table(
        header,
        rows,
        "Means over time steps below the first t_stable with fewer than 1% of the t_stable = 0 count, without steps "
        "at which a "
        "group is empty. Published: arXiv 2308.12435, MiniEcoset testplus, 25,000 images of 100 classes, T = 10, "
        "networks with "
        "widths 32 to 512.",
    )
    section.text(
        "Sizes depend on network, data and number of classes and cannot be compared; what can be is which of two neighbours is the larger."
    )


def _each(
    record: DemoRecord,
    figure: Callable[[ReadoutZoneResult], Any],
    what: str,
    alt: Callable[[ReadoutZoneResult], str],
) -> list[Plot]:
    """The same figure of every network."""
    # Bars side by side need the width.
    inches = 6.6 if figure is figures.figure_counts else 5.0
    return [_plot(figure(run.trained), f"{run.name}: {what}", f"{run.name}: {alt(run.trained)}", inches) for run in record.runs]


def _plot(figure: Any, caption: str, alt: str, inches: float = 5.0) -> Plot:
    """A figure of an analysis; what it says above its axes goes into the caption."""
    note = lift_note(figure)
    return Plot(figure, f"{caption}; {note}." if note else f"{caption}.", alt, inches)


def _shares(counts: Sequence[int]) -> list[str]:
    total = max(sum(counts), 1)
    return [f"{count:,} ({100 * count / total:.1f}%)" for count in counts]


def _accuracy_alt(result: ReadoutZoneResult) -> str:
    accuracy = 100 * result.accuracy
    return f"line plot of accuracy, {accuracy[0]:.1f}% at t = 0 and {accuracy[-1]:.1f}% at t = {result.timesteps - 1}."


def _groups_alt(result: ReadoutZoneResult) -> str:
    return "bars: " + ", ".join(f"{name.replace('_', '-')} {count:,}" for name, count in result.counts.items()) + "."


def _counts_alt(result: ReadoutZoneResult) -> str:
    counts = ", ".join(f"{count:,}" for count in result.counts_t_stable_correct)
    return f"bars of stable samples per time of stabilisation; stable-correct at t = 0, 1, ...: {counts}."


def _pair_alt(name: str, measure: str, first: str, second: str) -> Callable[[ReadoutZoneResult], str]:
    def alt(result: ReadoutZoneResult) -> str:
        one, two = result.published_summary(measure)
        return f"two lines over time, {name}; on average {first} {one:.3g}, {second} {two:.3g}."

    return alt


def _classes_alt(classes: int) -> str:
    return f"dendrogram of {classes} readout vectors."
