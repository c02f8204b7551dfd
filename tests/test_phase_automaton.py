"""Automata: operations on them, and reading them off systems; fixed points and kinds of solution beside them."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from test_phase_systems import shipped

from rnndyn_fast.phase import (
    Automaton,
    DynamicalSystem,
    LineAttractor,
    PlanarOscillator,
    Solution,
    agreement,
    classify,
    detect_oscillation,
    extract_automaton,
    find_cycle,
    find_end_states,
    find_fixed_points,
    modulo_automaton,
    run_trials,
)
from rnndyn_fast.phase.automaton import UNKNOWN, Extraction, cluster, hold_steps
from rnndyn_fast.phase.trajectories import TrialRun
from rnndyn_fast.tasks import ModuloArithmetic


def trials_of(system: DynamicalSystem, per_accept: int = 6, per_reject: int = 3) -> TrialRun:
    drawn = ModuloArithmetic(system.modulus, pulses=3).exhaustive(per_accept, per_reject, 7)
    return run_trials(system, drawn.sequences.numpy(), drawn.onsets.numpy())


def extracted(system: DynamicalSystem) -> Extraction:
    trials = trials_of(system)
    return extract_automaton(system, trials.sequences, trials.onsets, period=detect_oscillation(system).period)


def ring(points: int, modulus: int = 3) -> PlanarOscillator:
    return PlanarOscillator(modulus, period=np.inf, pinning=0.3, points=points, name=f"ring of {points}")


# ---------------------------------------------------------------- operations


@pytest.mark.parametrize("modulus", [2, 3, 7])
def test_modulo_automaton_adds(modulus: int) -> None:
    automaton = modulo_automaton(modulus)
    sequences = np.random.default_rng(0).integers(0, modulus, (50, 9))
    np.testing.assert_array_equal(automaton.run(sequences), sequences.sum(1) % modulus)
    np.testing.assert_array_equal(automaton.answers(sequences), np.where(sequences.sum(1) % modulus == 0, 1, -1))
    assert automaton.is_modulo(modulus)
    assert not automaton.is_modulo(modulus + 1)
    assert automaton.minimised().num_states == modulus


def test_states_with_equal_answers_are_merged() -> None:
    """Sums modulo 6, of which only the remainder by 3 is asked; one more state that nothing leads to."""
    table = (np.arange(6)[:, None] + np.arange(3)) % 6
    table = np.concatenate([table, [[0, 1, 2]]])
    accept = np.array([1, -1, -1, 1, -1, -1, 1])
    # Numbered otherwise, so that the start is not 0.
    order = np.array([3, 5, 0, 1, 2, 4, 6])
    shuffled = np.empty_like(table)
    shuffled[order] = order[table]
    answers = np.empty_like(accept)
    answers[order] = accept
    automaton = Automaton(shuffled, answers, int(order[0]), np.ones_like(table), 1.0)
    assert automaton.is_modulo(3)
    small = automaton.minimised()
    assert small.num_states == 3
    sequences = np.array(list(itertools.product(range(3), repeat=4)))
    np.testing.assert_array_equal(small.answers(sequences), automaton.answers(sequences))


def test_a_wrong_transition_or_answer_is_not_addition() -> None:
    right = modulo_automaton(3)
    for transitions, accept in (
        (np.array([[0, 1, 2], [1, 2, 0], [2, 0, 2]]), right.accept),
        (right.transitions, np.array([1, -1, 1])),
        (np.array([[0, 1, 2], [1, 2, 0], [2, 0, UNKNOWN]]), right.accept),
    ):
        assert not Automaton(transitions, accept, 0, right.support, 1.0).is_modulo(3)


def test_unseen_transitions_give_no_answer() -> None:
    automaton = Automaton(np.array([[0, 1], [UNKNOWN, 0]]), np.array([1, -1]), 0, np.zeros((2, 2)), 1.0)
    np.testing.assert_array_equal(automaton.run(np.array([[1, 0], [1, 1], [1, 0]])), [UNKNOWN, 0, UNKNOWN])
    np.testing.assert_array_equal(automaton.answers(np.array([[1, 0], [1, 1]])), [0, 1])
    assert automaton.minimised().num_states == 2
    # Once lost, lost: what comes after an unseen transition is unknown too.
    assert automaton.run(np.array([[1, 0, 0, 0]])).tolist() == [UNKNOWN]


def test_clusters() -> None:
    rng = np.random.default_rng(0)
    centres = np.array([[0.0, 0], [10, 0], [0, 10], [10, 10], [5, 30]])
    points = np.repeat(centres, 30, axis=0) + rng.normal(0, 0.3, (150, 2))
    labels, silhouette = cluster(points, 12)
    assert silhouette > 0.9
    assert [len(np.unique(labels[k * 30 : (k + 1) * 30])) for k in range(5)] == [1] * 5
    assert len(np.unique(labels)) == 5
    assert len(np.unique(cluster(centres[[0, 1, 1, 2, 2, 0]], 12)[0])) == 3  # exact repetitions
    assert len(np.unique(cluster(np.repeat(centres[:2], 4, axis=0), 12)[0])) == 2
    np.testing.assert_array_equal(cluster(np.ones((9, 2)), 12)[0], np.zeros(9))


def test_hold_is_whole_turns() -> None:
    assert hold_steps(np.nan) == 50
    assert hold_steps(32.0) == 64
    assert abs(hold_steps(32.3) / 32.3 - round(hold_steps(32.3) / 32.3)) < 0.02


# ---------------------------------------------------------------- extraction


@pytest.mark.parametrize("name", ["m3a", "osc"])
def test_phase_code_networks_add_modulo_3(name: str) -> None:
    system = shipped(name)
    found = extracted(system)
    assert found.automaton.num_states == 3
    assert found.automaton.is_modulo(3)
    assert found.automaton.determinism == found.purity == 1.0
    np.testing.assert_array_equal(found.automaton.transitions[0], [0, 1, 2])  # numbered from the start
    short, long = agreement(system, found, (3, 14), trials=100)
    assert (short.network_rule, short.automaton_rule, short.automaton_network) == (1.0, 1.0, 1.0)
    # The automaton goes on adding; the network's phase drifts, as its shifts are not exact thirds.
    assert long.automaton_rule == 1.0
    assert long.network_rule < 0.8
    assert long.timesteps > 50


def test_attractor_network_does_not_add() -> None:
    system = shipped("att")
    found = extracted(system)
    assert not found.automaton.is_modulo(3)
    assert found.automaton.num_states > 3
    (three,) = agreement(system, found, (3,), trials=100)
    assert three.network_rule == 1.0


@pytest.mark.parametrize(
    ("system", "states", "minimal"),
    [
        (PlanarOscillator(period=32.1), 3, 3),
        (PlanarOscillator(period=2.5), 3, 3),
        (PlanarOscillator(5, period=20), 5, 5),
        (PlanarOscillator(2, period=20), 2, 2),
        (ring(3), 3, 3),
        (ring(6), 3, 3),  # three of the six points are never used
        (ring(6, modulus=6), 6, 6),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_constructed_adders(system: PlanarOscillator, states: int, minimal: int) -> None:
    found = extracted(system)
    assert (found.automaton.num_states, found.automaton.minimised().num_states) == (states, minimal)
    assert found.automaton.is_modulo(system.modulus)
    (long,) = agreement(system, found, (15,), trials=60)
    assert (long.network_rule, long.automaton_rule) == (1.0, 1.0)


def test_a_counter_is_told_from_an_adder() -> None:
    found = extracted(LineAttractor(pinning=0.3))
    assert found.automaton.num_states == 7  # sums 0 to 6 of three symbols
    assert not found.automaton.is_modulo(3)
    three, five = agreement(LineAttractor(pinning=0.3), found, (3, 5), trials=100)
    assert three.network_rule == three.automaton_rule == 1.0
    assert five.automaton_rule < 0.9


def test_order_of_onsets_does_not_matter() -> None:
    system = PlanarOscillator()
    sequences = np.array(list(itertools.product(range(3), repeat=3)))
    onsets = np.tile([30, 8, 20], (27, 1))
    backwards = extract_automaton(system, sequences, onsets, period=25.0)
    forwards = extract_automaton(system, sequences[:, [1, 2, 0]], np.sort(onsets, axis=1), period=25.0)
    np.testing.assert_array_equal(backwards.automaton.support, forwards.automaton.support)
    with pytest.raises(ValueError, match="sequences: expected"):
        extract_automaton(system, sequences[:, :0], onsets[:, :0])


# ---------------------------------------------------------------- points and kinds


@pytest.mark.parametrize("points", [3, 5, 6])
def test_fixed_points_of_a_ring(points: int) -> None:
    system = ring(points)
    angle = torch.linspace(0, 2 * np.pi, 61, dtype=torch.float64)[:-1] + 0.01
    starts = torch.cat([r * torch.stack([angle.cos(), angle.sin()], dim=1) for r in (0.9, 1.1)])
    found = find_fixed_points(system, starts)
    assert found.fixed.all()
    on = found.states.norm(dim=1) > 0.5  # the unstable centre is found as well, or not
    assert int(on.sum()) == 2 * points
    assert found.stable.sum() == points
    assert (found.unstable_dims[on.numpy() & ~found.stable] == 1).all()
    stable = found.states[torch.as_tensor(found.stable)]
    angles = torch.atan2(stable[:, 1], stable[:, 0]).numpy() * points / (2 * np.pi)
    np.testing.assert_allclose(angles, angles.round(), atol=1e-6)
    # 1 - a along the ring, exp(-2 mu) across.
    np.testing.assert_allclose(np.sort(np.abs(found.eigenvalues[found.stable]), axis=1)[:, 0], 0.7, atol=1e-6)
    np.testing.assert_allclose(np.abs(found.eigenvalues[found.stable])[:, 0], np.exp(-0.2), atol=1e-6)
    ends = find_end_states(system, starts, steps=400)
    assert len(ends.attractors) == points
    assert not ends.moving.any()
    assert ends.counts.sum() == len(starts)


def test_line_attractor_is_marginal_and_slow_points_are_told_apart() -> None:
    line = find_fixed_points(LineAttractor(), torch.tensor([[0.3, 0.0], [1.7, 0.5], [4.1, 0.2]], dtype=torch.float64))
    assert line.fixed.all()
    assert (line.marginal_dims == 1).all()
    assert not line.stable.any()

    class Ghost(LineAttractor):
        """x -> x + 0.01 + (x - 2)^2: slowest at 2, nowhere at rest."""

        def step(self, states: torch.Tensor, inputs: torch.Tensor | None = None) -> torch.Tensor:
            return torch.stack([states[:, 0] + 0.01 + (states[:, 0] - 2) ** 2, 0.8 * states[:, 1]], dim=1)

    ghost = find_fixed_points(Ghost(), torch.tensor([[1.0, 0.4], [1.5, 0.2], [2.6, 0.1], [3.0, 0.0]], dtype=torch.float64))
    assert len(ghost) == 1
    assert not ghost.fixed[0]
    assert ghost.states[0, 0] == pytest.approx(2, abs=1e-2)
    assert ghost.speed[0] == pytest.approx(0.01, rel=1e-2)
    with pytest.raises(ValueError, match="starts: expected finite"):
        find_fixed_points(Ghost(), torch.full((1, 2), torch.nan))


def kind_of(system: DynamicalSystem) -> Solution:
    trials, found = trials_of(system), detect_oscillation(system)
    cycle = find_cycle(system, oscillation=found) if found.oscillates else None
    moving = find_end_states(system, trials.states[:40, -1], steps=800).moving
    return classify(system, trials, moving, found.period, cycle).solution


@pytest.mark.parametrize(
    ("system", "kind"),
    [
        (PlanarOscillator(period=32.1, mu=0.3), Solution.PHASE_CODE),
        (PlanarOscillator(period=2.5), Solution.STAR),
        (ring(3), Solution.FIXED_POINTS),
        (ring(6, modulus=6), Solution.HEXAGON),
        (ring(9, modulus=9), Solution.LATTICE),
        (LineAttractor(pinning=0.3), Solution.LINE),
        (LineAttractor(), Solution.LINE),
    ],
    ids=lambda value: getattr(value, "name", None),
)
def test_kinds_of_constructed_systems(system: DynamicalSystem, kind: Solution) -> None:
    assert kind_of(system) is kind


@pytest.mark.parametrize(("name", "kind"), [("m3a", Solution.PHASE_CODE), ("osc", Solution.PHASE_CODE), ("att", Solution.LATTICE)])
def test_kinds_of_shipped_networks(name: str, kind: Solution) -> None:
    assert kind_of(shipped(name)) is kind


def test_a_system_that_is_wrong_has_no_kind() -> None:
    system = PlanarOscillator()
    system.readout_bias = system.readout_bias - 1  # type: ignore[assignment]
    assert kind_of(system) is Solution.UNSOLVED
    # A cycle on which the sum is not kept is not a phase code, whatever is answered.
    deaf = PlanarOscillator(name="deaf")
    trials = trials_of(deaf)
    deaf_trials = TrialRun(
        trials.sequences, trials.onsets, trials.labels, deaf.run_free(50).expand(len(trials.labels), -1, -1), trials.rates, trials.outputs
    )
    found = classify(deaf, deaf_trials, np.ones(5, bool), 25.0, find_cycle(deaf))
    assert found.solution is Solution.LIMIT_CYCLE
    assert found.phase_gap < 1e-3
