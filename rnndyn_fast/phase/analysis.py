"""All analyses of one system in one go, and the file that keeps them."""

from __future__ import annotations

import json
import os
import zipfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rnndyn_fast.file_io import reads, written_whole
from rnndyn_fast.phase.automaton import Extraction, agreement, extract_automaton
from rnndyn_fast.phase.classify import classify, relative_phases
from rnndyn_fast.phase.fixed_points import FixedPoints, find_end_states, find_fixed_points
from rnndyn_fast.phase.handcrafted import PlanarOscillator
from rnndyn_fast.phase.limit_cycle import InvariantCycle, find_cycle, floquet, poincare_returns
from rnndyn_fast.phase.oscillation import Oscillation, detect_oscillation
from rnndyn_fast.phase.phase_response import asymptotic_phase_response, predict_multisets, published_phase_response
from rnndyn_fast.phase.similarity import linear_dynamics
from rnndyn_fast.phase.systems import CTRNNSystem, DynamicalSystem
from rnndyn_fast.phase.trajectories import PCA, TrialRun, fit_pca, pca_phase, run_trials
from rnndyn_fast.tasks import ModuloArithmetic

FORMAT, FORMAT_VERSION = "rnndyn phase analysis", 1
_SHOWN = 27  # trials whose trajectories are kept for figures: one per sequence of three


@dataclass(frozen=True)
class PhaseAnalysis:
    """What was found of one system: `facts` (numbers and words, JSON) and `arrays`, both under flat names.

    docs/phase_analysis.md lists and defines them.
    """

    facts: dict[str, Any]
    arrays: dict[str, np.ndarray]

    @property
    def name(self) -> str:
        """Of the system."""
        return str(self.facts["name"])

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write one .npz file, atomically."""
        path = Path(path)
        if path.suffix != ".npz":
            raise ValueError(f"path: expected a name that ends in .npz, got {path.name}")
        header = json.dumps({"format": FORMAT, "format_version": FORMAT_VERSION, "facts": self.facts})
        with written_whole(path) as file:
            np.savez_compressed(file, **{"header": np.asarray(header), **self.arrays})  # type: ignore[arg-type]
        return path

    @classmethod
    @reads("file of rnndyn phase analyse", 1)
    def load(cls, path: str | os.PathLike[str]) -> PhaseAnalysis:
        """Read a file of ``save``. Raises FileNotFoundError, or ValueError where it is not such a file."""
        if not Path(path).is_file():
            raise FileNotFoundError(f"path: expected a file of rnndyn phase analyse, found no file {path}")
        try:
            with np.load(path) as file:
                arrays = {key: file[key] for key in file.files}
            header = json.loads(str(arrays.pop("header")))
            found = header["format"], header["format_version"]
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise ValueError(f"path: expected a file of rnndyn phase analyse, {path} is none ({error})") from error
        if found != (FORMAT, FORMAT_VERSION):
            raise ValueError(f"path: expected format {FORMAT!r} {FORMAT_VERSION}, got {found[0]!r} {found[1]} in {path}")
        return cls(header["facts"], arrays)


def matched_oscillator(facts: Mapping[str, Any], modulus: int = 3, timesteps: int = 50) -> PlanarOscillator:
    """A handcrafted oscillator with the period of an analysed network, and its return to the cycle (no faster than 1 per step, which
    leaves a sixth of a push after a step). Without an oscillation: the published period."""
    period = facts["oscillation.period"]
    exponent = facts.get("floquet.lyapunov", [0.0, -0.2])[1]
    if period is None or not period > 2:
        return PlanarOscillator(modulus, timesteps=timesteps)
    return PlanarOscillator(modulus, period=period, mu=float(np.clip(-exponent / 2, 0.01, 1.0)), timesteps=timesteps)


def analyse_system(
    system: DynamicalSystem,
    *,
    task: ModuloArithmetic | None = None,
    seed: int = 42,
    per_accept: int = 30,
    per_reject: int = 15,
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8, 12, 20),
    fixed_point_starts: int = 96,
) -> PhaseAnalysis:
    """Every analysis of a system: trials, oscillation, cycle, phase response, fixed points, automaton, kind of solution.

    Args:
        system: the system; its symbols are the task's.
        task: where sequences and onsets come from; None: the published task with the system's modulus.
        seed: of the trials.
        per_accept, per_reject: trials per sequence; the defaults are the published test set (540 trials).
        lengths: sequence lengths on which the automaton is tried.
        fixed_point_starts: starts of the search for fixed points.

    Raises:
        ValueError: the task has another modulus or number of time steps than the system; the system leaves the finite numbers.
    """
    task = task or ModuloArithmetic(system.modulus, timesteps=system.timesteps)
    if (task.modulus, task.timesteps) != (system.modulus, system.timesteps):
        raise ValueError(
            f"task: expected modulus {system.modulus} and {system.timesteps} time steps as {system.name!r} has, "
            f"got {task.modulus} and {task.timesteps}"
        )
    drawn = task.exhaustive(per_accept, per_reject, seed)
    trials = run_trials(system, drawn.sequences.numpy(), drawn.onsets.numpy())
    pca = fit_pca(trials.rates, min(3, trials.rates.shape[2]))
    found = detect_oscillation(system)
    facts: dict[str, Any] = {
        "name": system.name,
        "handcrafted": not isinstance(system, CTRNNSystem),
        "modulus": system.modulus,
        "timesteps": system.timesteps,
        "trials": len(trials.labels),
        "accuracy": trials.accuracy,
        "mean_squared_error": trials.mean_squared_error(),
        "pca.variance_ratio": pca.variance_ratio[:10].tolist(),
    }
    facts |= {f"oscillation.{key}": value for key, value in asdict(found).items()}
    arrays: dict[str, np.ndarray] = {}
    _add_trajectories(arrays, system, trials, pca, found)
    cycle = None
    if found.kind in ("periodic", "quasi-periodic") and np.isfinite(found.period):
        try:
            cycle = find_cycle(system, oscillation=found)
        except ValueError as error:  # an orbit that crosses itself in the plane has a period, but not this phase
            facts["cycle.error"] = str(error)
    if found.published_period >= 2 and found.oscillates:
        _add_published_response(facts, arrays, system, pca, found.published_period)
    if cycle is not None:
        _add_cycle(facts, arrays, system, cycle, trials)
    few = _first_of_each(trials.sequences, 2)
    end = find_end_states(system, trials.states[torch.as_tensor(few), -1], steps=2000)
    facts |= {"end.moving": float(end.moving.mean()), "end.attractors": len(end.attractors)}
    arrays["end.attractors_pc"] = pca.project(system.rates(end.attractors).numpy())
    kind = classify(system, trials, end.moving, found.period, cycle)
    facts |= {f"solution.{key}": value for key, value in asdict(kind).items()} | {"solution.solution": kind.solution.value}
    _add_fixed_points(facts, arrays, system, trials, pca, fixed_point_starts)
    extraction = extract_automaton(system, trials.sequences, trials.onsets, period=found.period)
    _add_automaton(facts, arrays, system, extraction, lengths, task)
    try:
        arrays["dynamics"] = linear_dynamics(trials.rates)
    except ValueError as error:  # too few rates, or too short trials for the published embedding
        facts["dynamics.error"] = str(error)
    return PhaseAnalysis(_plain(facts), arrays)


def _add_trajectories(arrays: dict[str, np.ndarray], system: DynamicalSystem, trials: TrialRun, pca: PCA, found: Oscillation) -> None:
    shown = _first_of_each(trials.sequences, 1)[:_SHOWN]
    null = system.run_free(4 * system.timesteps)[0]
    rates = system.rates(null).numpy()
    arrays["pca.mean"], arrays["pca.components"] = pca.mean, pca.components
    arrays["trials.sequences"], arrays["trials.onsets"] = trials.sequences[shown], trials.onsets[shown]
    arrays["trials.pc"], arrays["trials.outputs"] = pca.project(trials.rates[shown]), trials.outputs[shown]
    arrays["trials.end_pc"], arrays["trials.end_outputs"] = pca.project(trials.rates[:, -1]), trials.outputs[:, -1]
    arrays["trials.end_sums"] = trials.sequences.sum(1) % system.modulus
    arrays["null.pc"], arrays["null.outputs"] = pca.project(rates), system.readout(torch.as_tensor(rates)).numpy()
    if pca.components.shape[0] > 1:
        arrays["trials.pca_phase"], arrays["null.pca_phase"] = pca_phase(pca, trials.rates[shown]), pca_phase(pca, rates)
    # One pulse of each symbol into the settled system: what a symbol does, without the others.
    onset = 10
    start = system.relax(system.initial_state[None], int(found.published_period) if found.published_period > 0 else 0)
    symbols = np.arange(system.modulus)[:, None]
    pulses = system.pulses(symbols, np.full_like(symbols, onset), system.timesteps)
    pulses = torch.cat([torch.zeros_like(pulses[:1]), pulses])
    one = system.run(pulses, start.expand(len(pulses), -1))
    arrays["symbol.pc"] = pca.project(system.rates(one).numpy())
    arrays["symbol.onset"] = np.asarray(onset)


def _add_published_response(facts: dict[str, Any], arrays: dict[str, np.ndarray], system: DynamicalSystem, pca: PCA, period: int) -> None:
    response = published_phase_response(system, pca, period)
    prediction = predict_multisets(response.mean)
    arrays["response.shift"], arrays["response.pulse_phase"] = response.shift, response.pulse_phase
    facts |= {
        "response.mean": response.mean.tolist(),
        "response.circular_mean": response.circular_mean.tolist(),
        "response.flatness": response.flatness.tolist(),
        "response.band": response.band.mean(1).tolist(),
        "response.separates": prediction.separates,
    }
    arrays["prediction.phases"], arrays["prediction.residues"] = prediction.phases, prediction.residues


def _add_cycle(
    facts: dict[str, Any], arrays: dict[str, np.ndarray], system: DynamicalSystem, cycle: InvariantCycle, trials: TrialRun
) -> None:
    response = asymptotic_phase_response(system, cycle)
    multipliers = floquet(cycle)
    arrays["asymptotic.shift"], arrays["asymptotic.pulse_phase"] = response.shift, response.pulse_phase
    arrays["trials.relative_phase"] = relative_phases(system, trials, cycle)
    shown = _first_of_each(trials.sequences, 1)[:_SHOWN]
    states = trials.states[torch.as_tensor(shown)]
    arrays["trials.asymptotic_phase"] = cycle.asymptotic_phase(states)
    facts |= {
        "cycle.turn": cycle.turn,
        "cycle.period": cycle.period,
        "asymptotic.circular_mean": response.circular_mean.tolist(),
        "asymptotic.flatness": response.flatness.tolist(),
        "asymptotic.deviation": response.deviation.tolist(),
        "floquet.lyapunov": multipliers.lyapunov.tolist(),
        "floquet.multipliers": multipliers.multipliers.tolist(),
        "floquet.stable": multipliers.stable,
    }
    if multipliers.closed_orbit is not None:
        orbit = multipliers.closed_orbit
        facts |= {"floquet.closed_steps": orbit.steps, "floquet.closed_turns": orbit.turns, "floquet.closed_residual": orbit.residual}
        arrays["floquet.closed_multipliers"] = orbit.multipliers
    if cycle.period > 4:  # the section is found by interpolation, which takes some steps per turn
        start = cycle.state_at(np.array([np.pi]))
        returns = poincare_returns(cycle, start + 0.02 * cycle.size * torch.ones_like(start) / len(start[0]) ** 0.5, 6)
        arrays["poincare.return_times"], arrays["poincare.distances"] = returns.return_times[0], returns.distances[0]


def _add_fixed_points(
    facts: dict[str, Any], arrays: dict[str, np.ndarray], system: DynamicalSystem, trials: TrialRun, pca: PCA, starts: int
) -> None:
    states = trials.states.flatten(0, 1)
    chosen = np.random.default_rng(0).choice(len(states), min(starts, len(states)), replace=False)
    points: FixedPoints = find_fixed_points(system, states[torch.as_tensor(np.sort(chosen))])
    facts |= {
        "fixed_points.fixed": int(points.fixed.sum()),
        "fixed_points.stable": int(points.stable.sum()),
        "fixed_points.slow": int((~points.fixed).sum()),
        "fixed_points.marginal": int((points.fixed & (points.marginal_dims > 0)).sum()),
    }
    arrays["fixed_points.pc"] = pca.project(system.rates(points.states).numpy())
    arrays["fixed_points.speed"], arrays["fixed_points.eigenvalues"] = points.speed, points.eigenvalues
    arrays["fixed_points.fixed"], arrays["fixed_points.unstable_dims"] = points.fixed, points.unstable_dims


def _add_automaton(
    facts: dict[str, Any],
    arrays: dict[str, np.ndarray],
    system: DynamicalSystem,
    extraction: Extraction,
    lengths: tuple[int, ...],
    task: ModuloArithmetic,
) -> None:
    automaton = extraction.automaton
    small = automaton.minimised()
    facts |= {
        "automaton.states": automaton.num_states,
        "automaton.minimal_states": small.num_states,
        "automaton.is_modulo": automaton.is_modulo(system.modulus),
        "automaton.determinism": automaton.determinism,
        "automaton.purity": extraction.purity,
        "automaton.silhouette": extraction.silhouette,
        "automaton.hold": extraction.hold,
        "automaton.start": automaton.start,
        "agreement": [asdict(row) for row in agreement(system, extraction, lengths, gap=task.gap, first_onset=task.first_onset)],
    }
    arrays["automaton.transitions"], arrays["automaton.accept"] = automaton.transitions, automaton.accept
    arrays["automaton.support"] = automaton.support
    arrays["automaton.minimal_transitions"], arrays["automaton.minimal_accept"] = small.transitions, small.accept
    arrays["automaton.features"], arrays["automaton.labels"] = extraction.features[:, :3], extraction.states
    arrays["automaton.sums"] = extraction.sums


def _first_of_each(sequences: np.ndarray, count: int) -> np.ndarray:
    """Indices of the first `count` trials of every sequence."""
    _, inverse = np.unique(sequences, axis=0, return_inverse=True)
    inverse = inverse.reshape(-1)
    order = np.argsort(inverse, kind="stable")
    starts = np.searchsorted(inverse[order], np.arange(inverse.max() + 1))
    picked = [order[start : start + count][inverse[order[start : start + count]] == k] for k, start in enumerate(starts)]
    return np.concatenate(picked)


def _plain(value: Any) -> Any:
    """As JSON can hold it: no NumPy numbers, None for what is not finite."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not np.isfinite(value):
        return None
    return value
