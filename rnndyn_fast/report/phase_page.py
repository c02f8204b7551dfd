"""The page of a phase analysis: one network beside a handcrafted oscillator, or a whole sweep."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from rnndyn_fast.analysis.figures import STYLE
from rnndyn_fast.optional import require
from rnndyn_fast.phase import figures
from rnndyn_fast.phase.analysis import PhaseAnalysis
from rnndyn_fast.phase.run import load_analyses
from rnndyn_fast.phase.similarity import Similarity, similarity
from rnndyn_fast.report.page import Card, Cell, Page, Plot, Section, format_cell, table_html
from rnndyn_fast.report.sweep_section import sweep_section
from rnndyn_fast.train import versions
from rnndyn_fast.train.phase_results import NetworkResult, load_networks, read_published

# Murray, arXiv 2310.07908 and its published code and data: the shipped phase-code network, noise-free.
PUBLISHED: dict[str, Any] = {
    "accuracy": 1.0,
    "mean_squared_error": 6.2e-5,
    "pca.variance_ratio": [0.418, 0.312, 0.042],
    "oscillation.published_period": 32,
    "response.mean": [-0.112, 1.902, -2.272],
    "response.flatness": [0.066, 0.095, 0.068],
}
MOST_FEATURED = 4  # systems that get a section of their own


def write_phase_page(
    analyses: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    sweep: str | os.PathLike[str] | None = None,
    published: str | os.PathLike[str] | None = None,
    featured: Sequence[str] | None = None,
) -> Path:
    """One HTML page of a folder of analyses.

    Args:
        analyses: folder of ``analyse_networks``.
        out: file to write.
        sweep: run whose networks these are, for the table of training.
        published: the published table of results, to be set beside it.
        featured: names of systems shown in full.
    """
    rows = load_networks(sweep)[1] if sweep is not None else []
    theirs = read_published(published) if published is not None else []
    return phase_page(load_analyses(analyses), featured=featured, sweep=rows, published=theirs).save(out)


def phase_page(
    records: Sequence[PhaseAnalysis],
    *,
    featured: Sequence[str] | None = None,
    sweep: Sequence[NetworkResult] = (),
    published: Sequence[NetworkResult] = (),
) -> Page:
    """The report of analysed systems.

    Args:
        records: analyses, of the same task.
        featured: names of the systems shown in full; None: the first few and one of every kind of solution.
        sweep: training results of the networks called "job <id>".
        published: those of the published sweep, to be set beside them.

    Raises:
        ValueError: no records; a featured name that is none of theirs.
    """
    require("matplotlib")
    from matplotlib import rc_context

    if not records:
        raise ValueError("records: expected at least one analysis, got none")
    chosen = _featured(records, featured)
    kinds = Counter(record.facts["solution.solution"] for record in records)
    told = ", ".join(f"{count} {kind}" for kind, count in kinds.most_common())
    page = Page(
        "Phase codes: how recurrent networks add up symbols",
        f"{len(records)} systems that answer whether the sum of a few symbols is 0 modulo {records[0].facts['modulus']}: {told}. "
        "Each was run without noise; the same analyses were made of all, handcrafted ones included.",
        f"Made by rnndyn_fast {versions()['rnndyn_fast']}. Definitions and criteria: docs/phase_analysis.md.",
    )
    with rc_context(STYLE):
        _overview(page, chosen)
        for record in chosen:
            _system(page, record)
        _comparison(page, chosen)
        _map(page, records, chosen)
        _table(page, records)
        if sweep:
            sweep_section(page, records, sweep, published)
    return page


def _featured(records: Sequence[PhaseAnalysis], names: Sequence[str] | None) -> list[PhaseAnalysis]:
    by_name = {record.name: record for record in records}
    if names is not None:
        missing = [name for name in names if name not in by_name]
        if missing:
            raise ValueError(f"featured: expected names among {', '.join(by_name)}, got {', '.join(missing)}")
        return [by_name[name] for name in names]
    if len(records) <= MOST_FEATURED:
        return list(records)
    # The first of every kind in the order given; handcrafted ones apart, after the trained.
    chosen: dict[tuple[bool, str], PhaseAnalysis] = {}
    for record in records:
        chosen.setdefault((record.facts["handcrafted"], record.facts["solution.solution"]), record)
    return sorted(chosen.values(), key=lambda record: bool(record.facts["handcrafted"]))


def _overview(page: Page, records: Sequence[PhaseAnalysis]) -> None:
    section = page.section("What each system does")
    section.text(
        "A phase code keeps the running sum as the phase of an oscillation: each symbol shifts it by its share of the circle, whenever it "
        "comes. The alternative is to stand still in one of many places. Each card names the kind of solution, by the criteria of "
        "docs/phase_analysis.md, and the automaton that was read off the system."
    )
    section.cards([_card(record) for record in records])


def _card(record: PhaseAnalysis) -> Card:
    facts = record.facts
    modulus = facts["modulus"]
    same = facts["automaton.is_modulo"]
    lengths = [row for row in facts["agreement"] if row["length"] in (3, 5, 8, 20)]
    rows: list[list[Cell]] = [[row["length"], *(100 * row[k] for k in ("network_rule", "automaton_rule"))] for row in lengths]
    words = f"{facts['automaton.states']} states, {facts['automaton.minimal_states']} after merging those with equal answers"
    verdict = f"Its automaton is addition modulo {modulus}" if same else f"Its automaton is not addition modulo {modulus}"
    return Card(
        f"{record.name}: {facts['solution.solution']}",
        same,
        verdict,
        [
            f"{facts['solution.reason'][0].upper()}{facts['solution.reason'][1:]}.",
            f"Accuracy on {facts['trials']} trials: {100 * facts['accuracy']:.1f}%. Automaton: {words}; state and symbol decide what "
            f"follows in {100 * facts['automaton.determinism']:.1f}% of the transitions.",
        ],
        table=table_html(["symbols", "network right, %", "automaton right, %"], rows, "New sequences, by length."),
    )


def _system(page: Page, record: PhaseAnalysis) -> None:
    section = page.section(record.name)
    facts = record.facts
    section.text(_dynamics_text(facts))
    plots = [
        _plot(
            figures.figure_symbols(record),
            "One pulse of each symbol in the plane of the first two principal components; the marker is where the run ends.",
            f"{record.name}: trajectories after one pulse of each symbol, in PC space",
        ),
        _plot(
            figures.figure_ends(record),
            "Trials at their last step: colour and marker are the sum; filled if accepted; grey, the undisturbed run.",
            f"{record.name}: end points of trials coloured by sum",
        ),
        _plot(
            figures.figure_phase_time(record),
            _time_caption(record),
            f"{record.name}: {'relative phase' if 'trials.asymptotic_phase' in record.arrays else 'output'} of trials against time",
        ),
    ]
    if "response.shift" in record.arrays or "asymptotic.shift" in record.arrays:
        plots.append(
            _plot(
                figures.figure_response(record),
                "Phase response. Markers and band: published phase, mean and standard deviation over the times of reading. Lines: "
                "asymptotic phase. Dotted: ideal shifts.",
                f"{record.name}: phase shift per symbol against the phase of the pulse",
            )
        )
    if "prediction.phases" in record.arrays:
        plots.append(
            _plot(
                figures.figure_prediction(record),
                "Sums of the mean shifts for every multiset of three symbols, as they predict the end phase.",
                f"{record.name}: predicted end phases on the circle, coloured by sum",
                4.0,
            )
        )
    plots.append(_automaton_plot(record))
    plots.append(
        _plot(
            figures.figure_agreement(record),
            "Answers on new sequences of each length. What no longer fits a trial runs longer.",
            f"{record.name}: share of equal answers against sequence length",
        )
    )
    if len(record.arrays["fixed_points.speed"]):
        plots.append(
            _plot(
                figures.figure_eigenvalues(record),
                f"Eigenvalues at the fixed points ({facts['fixed_points.fixed']}, of them stable: {facts['fixed_points.stable']}) and slow "
                f"points ({facts['fixed_points.slow']}) found.",
                f"{record.name}: eigenvalues in the complex plane with the unit circle",
                4.2,
            )
        )
    section.plots(plots)
    _support_table(section, record)


def _dynamics_text(facts: dict[str, Any]) -> str:
    kind = facts["oscillation.kind"]
    if kind == "fixed point":
        return f"Undisturbed, it comes to rest. Trials end in {facts['end.attractors']} different places if nothing more comes."
    text = f"Without input it continues indefinitely ({kind})"
    if facts["oscillation.period"] is not None:
        text += f", one turn in {facts['oscillation.period']:.4f} steps (published detector: {facts['oscillation.published_period']})"
    if "floquet.multipliers" in facts:
        first, second = facts["floquet.multipliers"][:2]
        text += f". Per turn, its phase keeps {first:.6f} of a push, the slowest other direction {second:.2g}"
    if "floquet.closed_steps" in facts:
        text += f"; the orbit closes after {facts['floquet.closed_steps']} steps and {facts['floquet.closed_turns']} turns"
    elif kind == "quasi-periodic":
        text += f"; the orbit does not close, and comes within {100 * facts['oscillation.closest_return']:.2g}% of its size of where it was"
    return text + "."


def _time_caption(record: PhaseAnalysis) -> str:
    if "trials.asymptotic_phase" in record.arrays:
        return "Asymptotic phase of one trial per sequence relative to the undisturbed run: a staircase of shifts, colour by final sum."
    return "Output of one trial per sequence, colour by final sum."


def _automaton_plot(record: PhaseAnalysis) -> Plot:
    arrays = record.arrays
    transitions, accept, start = arrays["automaton.transitions"], arrays["automaton.accept"], int(record.facts["automaton.start"])
    note = "as found"
    if len(transitions) > 12:
        transitions, accept, start, note = arrays["automaton.minimal_transitions"], arrays["automaton.minimal_accept"], 0, "minimised"
    return _plot(
        figures.figure_automaton(transitions, accept, start),
        f"The automaton, {note}: double rings accept, dashed ones give no answer; an arrow per symbol.",
        f"{record.name}: automaton with {len(transitions)} states",
        4.4 if len(transitions) <= 12 else 6.0,
    )


def _support_table(section: Section, record: PhaseAnalysis) -> None:
    transitions, support = record.arrays["automaton.transitions"], record.arrays["automaton.support"]
    words = {1: "accepts", -1: "rejects", 0: "no answer"}
    rows: list[list[Cell]] = []
    for state, answer in enumerate(record.arrays["automaton.accept"]):
        row: list[Cell] = [state, words[int(answer)]]
        for following, seen in zip(transitions[state], support[state], strict=True):
            row.append("never seen" if following < 0 else f"{following} ({seen:,})")
        rows.append(row)
    header = ["state", "answer", *(f"symbol {k}" for k in range(transitions.shape[1]))]
    section.table(header, rows, f"{record.name}: transitions, with the number of times seen. Start: {record.facts['automaton.start']}.")


_COMPARED = (
    ("accuracy", "accuracy on trials of three"),
    ("mean_squared_error", "squared error, last 3 steps"),
    ("pca.variance_ratio", "variance of PC1, PC2, PC3"),
    ("oscillation.published_period", "period, published detector (steps)"),
    ("oscillation.period", "period, rotation number (steps)"),
    ("response.mean", "shift per symbol, published phase (rad)"),
    ("asymptotic.circular_mean", "shift per symbol, asymptotic phase (rad)"),
    ("response.flatness", "std of the shift over phases, published (rad)"),
    ("asymptotic.flatness", "std of the shift over phases, asymptotic (rad)"),
    ("response.band", "std over times of reading, published (rad)"),
    ("asymptotic.deviation", "distance from the ideal shift (rad)"),
    ("floquet.multipliers", "multipliers per turn"),
    ("automaton.minimal_states", "states of the minimal automaton"),
    ("automaton.determinism", "determinism of the transitions"),
    ("solution.phase_gap", "least gap between sums (rad)"),
    ("solution.phase_spread", "largest spread within a sum (rad)"),
)


def _comparison(page: Page, records: Sequence[PhaseAnalysis]) -> None:
    section = page.section("Side by side")
    section.text(
        "The same numbers of every system shown, trained or made by hand. The first column is what was published of the shipped phase-code "
        "network."
    )
    rows: list[list[Cell]] = []
    for key, label in _COMPARED:
        rows.append([label, _words(PUBLISHED.get(key)), *(_words(record.facts.get(key)) for record in records)])
    table = _distances(records)
    for record in records:
        if table is not None and record.name in table.names and len(table.names) > 1:
            row = table.names.index(record.name)
            cells = [
                _words(float(table.distances[row, table.names.index(r.name)])) if r.name in table.names else _words(None) for r in records
            ]
            rows.append([f"dynamical distance to {record.name} (rad)", _words(None), *cells])
    section.table(["", "published", *(record.name for record in records)], rows, "Noise-free; radians and steps. A dash: does not apply.")


def _words(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(format_cell(item) for item in value[:3])
    return format_cell(value)


def _distances(records: Sequence[PhaseAnalysis]) -> Similarity | None:
    with_dynamics = [record for record in records if "dynamics" in record.arrays]
    if len(with_dynamics) < 2:
        return None
    return similarity([record.arrays["dynamics"] for record in with_dynamics], [record.name for record in with_dynamics])


def _map(page: Page, records: Sequence[PhaseAnalysis], featured: Sequence[PhaseAnalysis]) -> None:
    section = page.section("Map of solutions")
    table = _distances(records)
    if table is None or len(table.names) < 3:
        section.text("A map takes three systems or more whose dynamics fit the published embedding.")
        return
    kinds = {record.name: record.facts["solution.solution"] for record in records}
    shown = {record.name for record in featured}
    labelled = [k for k, name in enumerate(table.names) if name in shown]
    section.text(
        "Dynamical similarity analysis: a linear map is fitted to each system's rates in delay coordinates, and two maps are compared up "
        "to rotation and reflection. The plane keeps these distances as well as a plane can."
    )
    figure = figures.figure_solution_map(table.embed(), table.names, [kinds[name] for name in table.names], labelled)
    section.plots([_plot(figure, "Multidimensional scaling of the distances.", "Map of systems by dynamical similarity", 6.6)])
    groups = sorted(set(kinds.values()))
    rows: list[list[Cell]] = []
    for first in groups:
        row: list[Cell] = [first, sum(kinds[name] == first for name in table.names)]
        for second in groups:
            one, other = (np.array([kinds[name] == kind for name in table.names]) for kind in (first, second))
            pairs = table.distances[np.ix_(one, other)]
            pairs = pairs[pairs > 0]
            row.append(float(pairs.mean()) if pairs.size else None)
        rows.append(row)
    section.table(["kind", "systems", *groups], rows, "Mean distance (rad) between systems of two kinds.")


def _table(page: Page, records: Sequence[PhaseAnalysis]) -> None:
    section = page.section("All systems")
    rows: list[list[Cell]] = []
    for record in records:
        facts = record.facts
        rows.append(
            [
                record.name,
                facts["solution.solution"],
                facts["accuracy"],
                facts["oscillation.kind"],
                facts["oscillation.period"],
                facts["end.attractors"],
                facts["solution.end_clusters"],
                facts["automaton.minimal_states"],
                "yes" if facts["automaton.is_modulo"] else "no",
                next((row["network_rule"] for row in facts["agreement"] if row["length"] == 5), None),
            ]
        )
    header = [
        "system",
        "kind",
        "accuracy",
        "undisturbed",
        "period",
        "rests",
        "end clusters",
        "minimal states",
        "adds",
        "accuracy, 5 symbols",
    ]
    section.table(header, rows, "Every system analysed; “adds”: its minimal automaton is addition modulo the number of symbols.")


def _plot(figure: Any, caption: str, alt: str, inches: float = 5.0) -> Plot:
    return Plot(figure, caption, alt, inches)
