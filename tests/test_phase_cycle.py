"""Oscillation, limit cycle, multipliers, phase and its response: golden numbers, and oscillators with known answers."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import golden
from test_phase_systems import shipped

from rnndyn_fast.phase import (
    PCA,
    CTRNNSystem,
    InvariantCycle,
    LineAttractor,
    PlanarOscillator,
    asymptotic_phase_response,
    detect_oscillation,
    find_closed_orbit,
    find_cycle,
    floquet,
    lyapunov_exponents,
    poincare_returns,
    predict_multisets,
    published_period,
    published_phase_response,
)
from rnndyn_fast.phase.oscillation import birkhoff_weights
from rnndyn_fast.phase.phase_response import circular_std
from rnndyn_fast.phase.trajectories import circular_mean, fit_pca, wrap


@pytest.fixture(scope="module")
def network() -> CTRNNSystem:
    return shipped("m3a")


@pytest.fixture(scope="module")
def network_cycle(network: CTRNNSystem) -> InvariantCycle:
    return find_cycle(network)


def published_pca() -> PCA:
    data = golden("ctrnn_m3a_prc")
    as_double = {key: data[f"pca_{key}"].astype(float) for key in ("mean", "components", "explained_variance_ratio")}
    return PCA(as_double["mean"], as_double["components"], as_double["explained_variance_ratio"])


def oscillator(**options: float) -> PlanarOscillator:
    """A period that no whole number of steps divides, and a strongly sheared return to the circle."""
    return PlanarOscillator(**{"period": 20 * (1 + 5**0.5) / 2, "mu": 0.05, "shear": 0.08, "amplitude_kick": 1.3, **options})  # type: ignore[arg-type]


# ---------------------------------------------------------------- golden numbers


def test_published_phase_response(network: CTRNNSystem) -> None:
    data = golden("ctrnn_m3a_prc")
    response = published_phase_response(network, published_pca(), 32)
    np.testing.assert_allclose(response.shift, data["prc_tensor"], atol=1e-5)  # 1.8e-6 measured
    np.testing.assert_allclose(response.pulse_phase, data["pulse_phase"], atol=1e-5)
    np.testing.assert_allclose(response.mean, [-0.112, 1.902, -2.272], atol=5e-4)
    np.testing.assert_allclose(response.circular_mean, [-0.112, 1.897, -2.271], atol=5e-4)
    np.testing.assert_allclose(response.curve.std(1), [0.066, 0.095, 0.068], atol=1e-3)
    np.testing.assert_allclose(response.band.mean(1), [0.05, 0.48, 0.51], atol=5e-3)
    prediction = predict_multisets(response.mean)
    ranges = [(5.71, 5.95), (1.53, 1.68), (3.64, 3.79)]
    for residue, (low, high) in enumerate(ranges):
        phases = prediction.phases[prediction.residues == residue]
        assert (phases.min(), phases.max()) == pytest.approx((low, high), abs=0.006)
    assert prediction.separates


def test_published_period_of_the_network(network: CTRNNSystem) -> None:
    found = detect_oscillation(network)
    assert found.published_period == published_period(golden("ctrnn_m3a_prc")["null_rates_pc"][:, 0]) == 32
    assert found.kind == "quasi-periodic"
    assert found.period == pytest.approx(32.11, abs=0.01)
    # Steps per turn over a long run, counted: the same to the end of one turn in 300.
    states = network.relax(network.initial_state[None], 1000)
    plane = fit_pca(network.rates(network.run_free(10_000, states))[0].numpy(), 2)
    angle = np.unwrap(np.angle(plane.project(network.rates(network.run_free(10_000, states))[0].numpy()) @ [1, 1j]))
    assert abs(10_000 * 2 * np.pi / (angle[-1] - angle[0])) == pytest.approx(found.period, rel=1 / 300)


def test_asymptotic_phase_of_the_network(network: CTRNNSystem, network_cycle: InvariantCycle) -> None:
    """The definitions agree on the shifts; the asymptotic phase does not ask when it is read."""
    response = asymptotic_phase_response(network, network_cycle)
    np.testing.assert_allclose(response.circular_mean, [-0.112, 1.902, -2.270], atol=2e-3)
    states = network.run_free(120, network_cycle.state_at(np.array([1.0])) * 1.02)[0]
    steps = np.arange(1, 121)
    even = wrap(network_cycle.asymptotic_phase(states) - steps * network_cycle.turn)
    assert np.abs(wrap(even - even[-1])).max() < 2e-3
    published = np.unwrap(np.angle(published_pca().project(network.rates(states).numpy()) @ [1, 1j, 0]))
    assert np.ptp(published - np.sign(published[-1] - published[0]) * steps * network_cycle.turn) > 0.2


def test_cycle_of_the_network_is_stable_and_not_locked(network: CTRNNSystem, network_cycle: InvariantCycle) -> None:
    found = floquet(network_cycle)
    assert found.closed_orbit is None
    assert found.multipliers[0] == pytest.approx(1, abs=1e-4)
    assert found.multipliers[1] < 1e-5
    assert found.stable
    # The volume of a small box shrinks by what the exponents add up to, all of them.
    state = network_cycle.state_at(np.zeros(1))[0]
    every = lyapunov_exponents(network, state, steps=60, count=100)
    orbit = torch.cat([state[None], network.run_free(59, state[None])[0]])[6:]
    volume = torch.linalg.slogdet(network.jacobian(orbit))[1].numpy()
    assert every.sum() == pytest.approx(birkhoff_weights(54) @ volume, rel=1e-6)


# ---------------------------------------------------------------- known answers


def test_period_and_multipliers_of_the_oscillator() -> None:
    system = oscillator()
    found = detect_oscillation(system)
    assert found.kind == "quasi-periodic"
    assert found.period == pytest.approx(20 * (1 + 5**0.5) / 2, rel=1e-9)
    result = floquet(find_cycle(system, oscillation=found))
    np.testing.assert_allclose(result.lyapunov, [0, -2 * 0.05], atol=1e-6)
    np.testing.assert_allclose(result.multipliers, [1, np.exp(-0.1 * found.period)], rtol=1e-4)


def test_asymptotic_phase_of_the_oscillator_is_its_formula() -> None:
    """theta - (shear / mu) log rho, everywhere in the basin."""
    system = oscillator()
    cycle = find_cycle(system)
    rho, theta = np.meshgrid([0.4, 0.9, 1.0, 1.6], np.linspace(-3, 3, 9))
    states = torch.as_tensor(np.stack([rho * np.cos(theta), rho * np.sin(theta)], axis=-1).reshape(-1, 2))
    exact = wrap((theta - 0.08 / 0.05 * np.log(rho)).reshape(-1))
    assert np.abs(wrap(cycle.asymptotic_phase(states) - exact)).max() < 1e-3
    assert cycle.asymptotic_phase(system.initial_state[None])[0] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("modulus", [2, 3, 5])
def test_response_of_the_oscillator_is_flat_and_ideal(modulus: int) -> None:
    system = oscillator(modulus=modulus)
    response = asymptotic_phase_response(system, find_cycle(system), points=16)
    assert response.flatness.max() < 2e-3
    assert response.deviation.max() < 2e-3


def test_poincare_returns_shrink_by_the_multiplier() -> None:
    system = PlanarOscillator(period=25.3, mu=0.02)
    cycle = find_cycle(system)
    returns = poincare_returns(cycle, cycle.state_at(np.array([2.0])) * 1.05, 5)
    np.testing.assert_allclose(returns.return_times[0], 25.3, atol=0.01)
    # Between steps the section is found by interpolation, to about 1e-4 of the cycle's size.
    assert returns.distances[0, 3] / returns.distances[0, 0] == pytest.approx(np.exp(-3 * 0.04 * 25.3), rel=0.1)
    with pytest.raises(ValueError, match="states: expected 6 passages"):
        poincare_returns(cycle, torch.zeros(1, 2, dtype=torch.float64), 5)


def test_a_locked_cycle_has_a_closed_orbit() -> None:
    """Pinning at 7 points turns a rotation of about 2 in 7 into one of exactly that, with hyperbolic closed orbits."""
    system = PlanarOscillator(period=3.5 * 1.002, pinning=0.1, points=7, mu=0.1)
    found = detect_oscillation(system, transient=500, steps=1000)
    assert found.kind == "periodic"
    assert found.closest_return_steps == 7
    assert found.period == pytest.approx(3.5, abs=1e-9)
    result = floquet(find_cycle(system, oscillation=found, transient=500, steps=1000), steps=1000)
    assert result.closed_orbit is not None
    assert (result.closed_orbit.steps, result.closed_orbit.turns) == (7, 2)
    assert result.closed_orbit.residual < 1e-9
    first = result.closed_orbit.multipliers[0]
    assert first.imag == 0
    assert 0.1 < first.real < 0.9  # the phase is drawn to the orbit: not neutral any more
    # Two ways to the same number: eigenvalues of the product, exponents per step.
    np.testing.assert_allclose(np.exp(7 * result.lyapunov), np.abs(result.closed_orbit.multipliers), rtol=1e-6)


def test_closed_orbit_refuses_where_there_is_none() -> None:
    with pytest.raises(ValueError, match="state: no orbit of 7 steps near it"):
        find_closed_orbit(oscillator(), torch.tensor([1.0, 0.0], dtype=torch.float64), 7, iterations=1)


@pytest.mark.parametrize(
    ("system", "kind", "period"),
    [
        (PlanarOscillator(period=2.5), "periodic", 2.5),
        (PlanarOscillator(period=25), "periodic", 25),
        (PlanarOscillator(period=10 * 2**0.5), "quasi-periodic", 10 * 2**0.5),
        (PlanarOscillator(period=np.inf), "fixed point", np.nan),
        (PlanarOscillator(period=np.inf, pinning=0.2, points=6), "fixed point", np.nan),
        (LineAttractor(), "fixed point", np.nan),
    ],
)
def test_kinds_of_long_runs(system: PlanarOscillator, kind: str, period: float) -> None:
    found = detect_oscillation(system, transient=300, steps=1000)
    assert found.kind == kind
    assert found.period == pytest.approx(period, nan_ok=True, rel=1e-9)
    if kind == "fixed point":
        with pytest.raises(ValueError, match=r"expected a limit cycle, .* ends in a fixed point"):
            find_cycle(system, oscillation=found)


def test_no_phase_off_the_cycle() -> None:
    system = PlanarOscillator()
    phases = find_cycle(system).asymptotic_phase(torch.tensor([[0.0, 0.0], [0.3, 0.0]], dtype=torch.float64))
    assert np.isnan(phases[0])
    assert phases[1] == pytest.approx(0, abs=1e-3)


def test_small_tools() -> None:
    assert published_period(np.tile([0, 1, 2, 3, 2, 1, 0, 0.0], 5)) == 8
    assert published_period(np.concatenate([np.eye(40)[5], np.eye(40)[10]])) == 45
    angles = np.array([np.pi - 0.2, -np.pi + 0.2])
    assert abs(circular_mean(angles)) == pytest.approx(np.pi)
    assert circular_std(angles, 0) == pytest.approx(0.2, abs=2e-3)
    assert birkhoff_weights(50).sum() == pytest.approx(1)
    assert not predict_multisets(np.array([0.0, 0.3, 0.6])).separates
    with pytest.raises(ValueError, match="period: expected at least 2 steps, got -1"):
        published_phase_response(PlanarOscillator(), fit_pca(np.eye(100), 2), -1)
    with pytest.raises(ValueError, match="rates: expected finite"):
        fit_pca(np.full((4, 2), np.nan), 1)
