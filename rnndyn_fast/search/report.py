"""The report of a search: best architectures, what mattered, accuracy against parameters."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rnndyn_fast.analysis.figures import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE
from rnndyn_fast.analysis.intervals import Estimate
from rnndyn_fast.analysis.outputs import Row, write_csv
from rnndyn_fast.file_io import replaced_atomically, write_text
from rnndyn_fast.graph.spec.network import Network
from rnndyn_fast.graph.spec.yaml_files import network_from_plain, network_yaml
from rnndyn_fast.optional import require
from rnndyn_fast.report.page import Cell, Page, Plot
from rnndyn_fast.search.config import SearchConfig
from rnndyn_fast.search.diagram import network_svg
from rnndyn_fast.search.equations import equations
from rnndyn_fast.search.importance import MIN_FOR_IMPORTANCE, importances, mean_estimate
from rnndyn_fast.search.space import Range, Space
from rnndyn_fast.search.storage import INFEASIBLE, WORKER, accuracy, completed, finished
from rnndyn_fast.train.loop import BEST as BEST_WEIGHTS

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from optuna import Study
    from optuna.trial import FrozenTrial

BEST = 5
CONFIG, TRIALS, REPORT = "search.yaml", "trials", "report.html"
COLOURS = (BLUE, ORANGE, GREEN, PURPLE, "#56B4E9", "#E69F00", "#F0E442", "#000000", GREY)
MARKERS = "os^Dv*PX<"


def trial_rows(study: Study, space: Space) -> list[Row]:
    """Every trial, a row each."""
    rows = []
    for t in study.get_trials(deepcopy=False):
        attributes = t.user_attrs
        row: Row = {"trial": t.number, "state": INFEASIBLE if INFEASIBLE in attributes else t.state.name.lower()}
        row["value"] = accuracy(t) if t.values else float("nan")
        row["epochs"] = len(t.intermediate_values)
        for name in ("parameters", "multiply_adds", "seconds", "same_as"):
            row[name] = attributes.get(name, "")
        rows.append(row | {name: t.params.get(name, "") for name in space.open})
    return rows


def write_report(study: Study, config: SearchConfig, space: Space, more: Callable[[Page], None] | None = None) -> Path:
    """Write ``report.html``, ``trials.csv``, ``best/<rank>.yaml`` and the weights ``best/<rank>.pt`` to the folder of the search; returns
    the report's path. `more` appends to the page.

    Weights of a trial that another machine trained are there; the report says which machine.
    """
    require("matplotlib")

    from matplotlib import rc_context

    out, best = Path(config.out), completed(study)[:BEST]
    write_csv(trial_rows(study, space), out / "trials.csv")
    for rank, trial in enumerate(best, start=1):
        write_text(out / "best" / f"{rank}.yaml", best_yaml(trial, out / "best" / str(rank)))
        _keep_weights(trial, out, out / "best" / f"{rank}.pt")
    for stale in (*(out / "best").glob("*.yaml"), *(out / "best").glob("*.pt")):
        if stale.stem.isdigit() and int(stale.stem) > len(best):
            stale.unlink()
    with rc_context(STYLE):
        page = search_page(study, config, space)
        if more is not None:
            more(page)
        return page.save(out / REPORT)


def weights_path(trial: FrozenTrial, out: Path) -> Path:
    """Where a trial's weights are on the machine that trained it: those of its epoch of highest validation accuracy."""
    return out / TRIALS / f"{trial.number:04d}" / BEST_WEIGHTS


def _keep_weights(trial: FrozenTrial, out: Path, kept: Path) -> None:
    """Copy a trial's weights, or remove those of another trial that had its rank."""
    source = weights_path(trial, out)
    if not source.exists():
        kept.unlink(missing_ok=True)
        return
    with replaced_atomically(kept) as unfinished:
        shutil.copyfile(source, unfinished)


def best_yaml(trial: FrozenTrial, out: Path) -> str:
    """The trial's configuration of training, for a run in another folder."""
    require("yaml")

    import yaml

    return yaml.safe_dump({**train_config(trial), "out": str(out)}, sort_keys=False)


def train_config(trial: FrozenTrial) -> dict[str, Any]:
    require("yaml")

    import yaml

    loaded: dict[str, Any] = yaml.safe_load(trial.user_attrs["config"])
    return loaded


def search_page(study: Study, config: SearchConfig, space: Space) -> Page:
    """The report as a page."""
    trials, best = study.get_trials(deepcopy=False), completed(study)
    done = finished(trials)
    page = Page(
        "Search for architectures",
        f"{len(done)} finished trials on {Path(config.data).name}"
        + (f"; the best reaches {100 * accuracy(best[0]):.2f}% validation accuracy." if best else "."),
        "Accuracies are of validation images, which chose the winners: expect a little less on others.",
    )
    _trials(page, config, space, trials)
    if not best:
        page.section("Nothing to compare").text("No trial was trained to its end.")
        return page
    _best(page, best, space, Path(config.out))
    best_network_section(page, network_from_plain(train_config(best[0])["network"]))
    _choices(page, space, best)
    page.section("Accuracy against parameters").text(
        "Each point is a trial that was trained to its end. The line joins those that no smaller one reaches."
    ).plots(
        [
            Plot(
                figure_parameters(best),
                "Validation accuracy against trained parameters, by kind of cell.",
                "Scatter of accuracy against number of parameters.",
            ),
            Plot(figure_history(done), "Trials in the order in which they were made, and the best so far.", "Accuracy over trials."),
        ]
    )
    return page


SAMPLERS = {
    "tpe": "a tree-structured Parzen estimator after {} random ones",
    "random": "random draws",
    "cmaes": "CMA-ES in the choices of numbers, from a tree-structured Parzen estimator in the others, after {} random ones",
    "nsga2": "evolution (NSGA-II) in generations of {}",
}
PRUNERS = {
    "median": "A trial that is worse than the median of the earlier ones after the same epoch is pruned.",
    "hyperband": "Trials are pruned by successive halving in several brackets (Hyperband).",
    "none": "No trial is pruned for being worse than others.",
}


def _trials(page: Page, config: SearchConfig, space: Space, trials: Sequence[FrozenTrial]) -> None:
    require("yaml")

    import yaml

    passed = [t for t in trials if INFEASIBLE in t.user_attrs]
    states: dict[str, int] = {}
    for t in trials:
        name = "passed over (too large, or no network)" if t in passed else t.state.name.lower()
        states[name] = states.get(name, 0) + 1
    seconds, of_processors = (sum(float(t.user_attrs.get(name, 0.0)) for t in trials) for name in ("seconds", "processor_seconds"))
    section = page.section("What was run")
    goal = "at the last time step" if config.objective == "last" else "mean over time steps"
    section.text(
        f"Every trial trains an architecture for up to {config.epochs} epochs and is worth its best epoch's validation accuracy, {goal}. "
        f"{PRUNERS[config.pruner]} Architectures come from {SAMPLERS[config.sampler].format(config.startup_trials)}. "
        f"Training took {seconds / 60:.1f} minutes in all workers together, {of_processors / 60:.1f} of processors."
    )
    section.table(["trials", "number"], [[name, count] for name, count in sorted(states.items())], "Trials by what became of them.")
    section.text("The space:").code(yaml.safe_dump(space.to_plain(), sort_keys=False, default_flow_style=None).strip())


def _best(page: Page, best: Sequence[FrozenTrial], space: Space, out: Path) -> None:
    section = page.section("Best architectures")
    top = best[:BEST]
    made = [name for name in space.open if any(name in t.params for t in top)]
    rows: list[list[Cell]] = [
        [k, t.number, 100 * accuracy(t), int(t.user_attrs["parameters"]), t.user_attrs["multiply_adds"] / 1e6]
        + [_shown(t.params.get(name)) for name in made]
        for k, t in enumerate(top, start=1)
    ]
    header = ["rank", "trial", "correct (%)", "parameters", "multiply-adds (M)", *made]
    section.table(header, rows, "The best trials and their choices.")
    away = [f"{k} on {t.user_attrs[WORKER]['host']}" for k, t in enumerate(top, start=1) if not weights_path(t, out).exists()]
    if away:
        section.text(f"Weights of ranks that other machines trained are there, in `trials/`: {', '.join(away)}.")
    section.text(
        "`rnndyn train --config best/1.yaml` trains the first of them again, `rnndyn plan best/1.yaml` says what it computes, and "
        "`best/1.pt` holds its weights, which every command takes as a checkpoint. Its spec:"
    )
    section.code(network_yaml(network_from_plain(train_config(top[0])["network"])).strip())


def best_network_section(page: Page, network: Network) -> None:
    """The best network as a drawing and as equations."""
    section = page.section("The best network")
    section.drawing(
        lambda prefix: network_svg(network, prefix),
        "The best network. Boxes are maps (channels x height x width, and what is done to what enters). Solid lines are read within the "
        "time step, dashed ones at the step before; beside them the port of the cell that is entered, pooling (max, mean) and kernel (sep: "
        "depthwise separable, T: transposed).",
    )
    section.text("As equations, in the order in which maps are computed at a time step; names of maps are those of the drawing.")
    section.markup(equations(network).html())


def _shown(value: Any) -> Cell:
    return "" if value is None else ("yes" if value else "no") if isinstance(value, bool) else value


def _choices(page: Page, space: Space, best: Sequence[FrozenTrial]) -> None:
    section = page.section("What mattered")
    shares = importances(best, space)
    if shares:
        section.text(
            "Importance is a choice's share in the variance of accuracy over completed trials (functional analysis of variance on a random "
            f"forest), with 95% intervals over {len(best)} trials drawn anew. Pruned trials do not enter, so choices that fail early look "
            "less important than they are; and a sampler that prefers some values leaves few trials with the others."
        )
        section.plots([Plot(figure_importance(shares), "Importance of each choice; bars: 95% intervals.", "Dots, one per choice.")])
        section.table(
            ["choice", "share of the variance (%)"],
            [[name, _percent(share)] for name, share in shares.items()],
            "Importance of each choice, with 95% intervals.",
        )
    else:
        section.text(f"Fewer than {MIN_FOR_IMPORTANCE} trials were completed: too few to say what mattered.")
    rows: list[list[Cell]] = []
    order = [*shares, *(name for name in space.open if name not in shares)]
    for name in order:
        values = sorted({t.params[name] for t in best if name in t.params}, key=lambda v: (isinstance(v, str), v))
        if len(values) > 10 or (isinstance(space.choices[name], Range) and len(values) == sum(name in t.params for t in best)):
            continue  # (numbers of a range, of which hardly one is there twice)
        for value in values:
            scores = [100 * accuracy(t) for t in best if t.params.get(name) == value]
            rows.append([name, str(_shown(value)), len(scores), mean_estimate(scores), float(np.max(scores))])
    section.table(
        ["choice", "value", "trials", "mean correct (%)", "best correct (%)"],
        rows,
        "Completed trials by value of each choice; means with 95% intervals over trials, in which other choices differ too.",
    )


def _percent(share: Estimate) -> Estimate:
    return Estimate(100 * share.value, 100 * share.low, 100 * share.high, 100 * share.error, share.df, share.n)


def figure_parameters(best: Sequence[FrozenTrial]) -> Figure:
    """Accuracy against parameters, by cell, with the front of those that no smaller trial reaches."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    cells = sorted({str(t.params.get("cell", "network")) for t in best})
    for k, cell in enumerate(cells):
        points = [(t.user_attrs["parameters"], 100 * accuracy(t)) for t in best if str(t.params.get("cell", "network")) == cell]
        style: dict[str, Any] = {"color": COLOURS[k % len(COLOURS)], "marker": MARKERS[k % len(MARKERS)]}
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, 36, label=cell, **style)
    front = [(t.user_attrs["parameters"], 100 * accuracy(t)) for t in pareto_front(best)]
    axes.plot(*zip(*front, strict=True), color=GREY, linewidth=1, zorder=0)
    axes.set_xscale("log")
    axes.set_xlabel("parameters")
    axes.set_ylabel("correct (%)")
    axes.legend(fontsize=8)
    return figure


def pareto_front(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Trials that are better than every one with as many or fewer parameters, by parameters."""
    front: list[FrozenTrial] = []
    for t in sorted(trials, key=lambda t: (t.user_attrs["parameters"], -accuracy(t))):
        if not front or accuracy(t) > accuracy(front[-1]):
            front.append(t)
    return front


def figure_history(done: Sequence[FrozenTrial]) -> Figure:
    """Values in order, completed and pruned, with the best so far."""
    require("matplotlib", "optuna")

    from matplotlib.figure import Figure
    from optuna.trial import TrialState

    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.subplots()
    values = [(t.number, 100 * accuracy(t)) for t in done if t.state is TrialState.COMPLETE]
    pruned = [(t.number, 100 * max(t.intermediate_values.values())) for t in done if t.state is TrialState.PRUNED and t.intermediate_values]
    if pruned:
        x, y = zip(*pruned, strict=True)
        axes.scatter(x, y, 24, color=GREY, marker="x", label="pruned (best epoch)")
    x, y = zip(*values, strict=True)
    axes.scatter(x, y, 24, color=BLUE, label="completed")
    axes.plot([n for n, _ in values], np.maximum.accumulate([v for _, v in values]), color=ORANGE, label="best so far")
    axes.set_xlabel("trial")
    axes.set_ylabel("correct (%)")
    axes.legend(fontsize=8)
    return figure


def figure_importance(shares: dict[str, Estimate]) -> Figure:
    """Dots with their intervals, the largest on top."""
    require("matplotlib")

    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.0 + 0.28 * len(shares)), layout="constrained")
    axes = figure.subplots()
    for y, share in enumerate(shares.values()):
        if share.known:
            axes.plot([100 * share.low, 100 * share.high], [y, y], color=GREY, linewidth=2)
        axes.plot(100 * share.value, y, "o", color=BLUE)
    axes.set_yticks(range(len(shares)), list(shares))
    axes.invert_yaxis()
    axes.set_xlim(left=0)
    axes.set_xlabel("share of the variance (%)")
    return figure
