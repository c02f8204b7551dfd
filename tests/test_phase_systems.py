"""Systems that take symbols as pulses: shipped networks against golden numbers, handcrafted ones against their formulas."""

from __future__ import annotations

import itertools
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden

from rnndyn_fast.nn import CTRNN
from rnndyn_fast.phase import CTRNNSystem, DynamicalSystem, LineAttractor, PlanarOscillator, load_npz, load_systems, published_oscillation
from rnndyn_fast.phase.handcrafted import phase_shifts
from rnndyn_fast.phase.trajectories import answers, fit_pca, run_trials
from rnndyn_fast.tasks import ModuloArithmetic
from rnndyn_fast.train.phase_results import NetworkResult, save_networks


def shipped(name: str) -> CTRNNSystem:
    """A shipped network: m3a, osc or att."""
    file = "ctrnn_m3a" if name == "m3a" else "set_v1_networks"
    golden(file)  # skips or fails where there is none
    return load_npz(GOLDEN / f"{file}.npz", "" if name == "m3a" else f"{name}_")


def test_shipped_network_reproduces_its_golden_trials() -> None:
    data, system = golden("ctrnn_m3a"), shipped("m3a")
    run = run_trials(system, data["sequences"], data["pulse_index"])
    np.testing.assert_array_equal(run.labels, data["labels"])
    np.testing.assert_allclose(run.outputs, data["outputs"], atol=1e-5)  # float64 against float32: 2.7e-6 measured
    np.testing.assert_allclose(run.rates, data["rates"], atol=1e-5)
    assert run.accuracy == 1.0
    null = system.run_free(200)[0]
    np.testing.assert_allclose(system.rates(null).numpy(), data["null_rates"], atol=1e-5)


@pytest.mark.parametrize("name", ["osc", "att"])
def test_first_version_networks_reproduce_theirs(name: str) -> None:
    data, system = golden("set_v1_networks"), shipped(name)
    # There green, purple, red are 0, 1, 2; here they are 1, 2, 0, so that SET is sum = 0 modulo 3.
    run = run_trials(system, np.array([1, 2, 0])[data[f"{name}_sequences"]], data[f"{name}_pulse_index"])
    np.testing.assert_array_equal(run.labels, data[f"{name}_labels"])
    np.testing.assert_allclose(run.outputs, data[f"{name}_outputs"], atol=1e-4)
    np.testing.assert_allclose(run.rates[:, -1], data[f"{name}_final_rates"], atol=1e-4)


@pytest.mark.parametrize(("pulses", "trials"), [(3, 540), (5, 1500)])
def test_shipped_network_is_right_on_every_trial(pulses: int, trials: int) -> None:
    task = ModuloArithmetic(pulses=pulses)
    drawn = task.test_set(42) if pulses == 3 else task.balanced(trials, 42)
    run = run_trials(shipped("m3a"), drawn.sequences.numpy(), drawn.onsets.numpy())
    assert len(run.labels) == trials
    np.testing.assert_array_equal(run.labels, drawn.labels.numpy())
    assert run.accuracy == 1.0
    if pulses == 3:
        assert 3e-5 < run.mean_squared_error() < 1.2e-4  # published 6.2e-5 on other onsets
        np.testing.assert_allclose(fit_pca(run.rates).variance_ratio[:3], [0.418, 0.312, 0.042], atol=0.006)


def test_published_oscillator_is_exact() -> None:
    data = golden("handcrafted_oscillator_v1")
    onsets = np.array([np.flatnonzero(row)[:3] for row in data["inputs"]])
    symbols = {2: 1, 1: 2, -1: 0}  # green, purple, red
    shown = np.array([[symbols[int(v)] for v in row[at]] for row, at in zip(data["inputs"], onsets, strict=True)])
    np.testing.assert_allclose(published_oscillation(shown, onsets), data["oscillations"], atol=1e-12)
    np.testing.assert_allclose(published_oscillation(shown[:1, :0], onsets[:1, :0])[0], data["reference"], atol=1e-12)
    assert (np.isclose(published_oscillation(shown, onsets)[:, -1], 1) == (data["labels"] > 0)).all()


def test_oscillator_with_amplitude_reduces_to_the_published_one() -> None:
    """On the circle, and with pulses of one step, x is the published oscillation one sample later: a step turns, then the input."""
    system = PlanarOscillator(pulse_width=1, timesteps=50)
    sequences = np.array(list(itertools.product(range(3), repeat=3)))
    onsets = np.tile([4, 13, 31], (27, 1))
    x = system.run(system.pulses(sequences, onsets))[:, :, 0].numpy()
    np.testing.assert_allclose(x, published_oscillation(sequences, onsets + 1)[:, 1:], atol=1e-12)


def test_oscillator_step_is_the_flow_of_its_equation() -> None:
    system = PlanarOscillator(period=20.0, mu=0.3, shear=0.2)
    z = complex(1.4, -0.3)
    state, small = z, 1e-5
    for _ in range(round(1 / small)):  # Euler's method, a hundred thousand little steps
        grow = 1 - abs(state) ** 2
        state += small * state * (0.3 * grow + 1j * (2 * np.pi / 20 + 0.2 * grow))
    ours = system.step(torch.tensor([[z.real, z.imag]], dtype=torch.float64))[0]
    assert complex(*ours.tolist()) == pytest.approx(state, abs=1e-4)


@pytest.mark.parametrize("modulus", [2, 3, 4, 7])
@pytest.mark.parametrize("options", [{}, {"shear": 0.1, "amplitude_kick": 1.5, "mu": 0.3}, {"period": np.inf}, {"period": 2.5}])
def test_oscillator_solves_the_task_for_any_modulus(modulus: int, options: dict[str, float]) -> None:
    system = PlanarOscillator(modulus, **options)  # type: ignore[arg-type]
    task = ModuloArithmetic(modulus, pulses=4)
    drawn = task.balanced(200, 1)
    run = run_trials(system, drawn.sequences.numpy(), drawn.onsets.numpy())
    # The readout was made for the circle itself: pushes in amplitude that have not decayed at the last step cost a little.
    assert run.accuracy == 1.0
    assert set(answers(run.outputs[:, -1])) == {-1, 1}


@pytest.mark.parametrize(
    "system", [PlanarOscillator(shear=0.1), PlanarOscillator(period=np.inf, pinning=0.3, points=6), LineAttractor(pinning=0.2)]
)
def test_jacobians_are_those_of_finite_differences(system: DynamicalSystem) -> None:
    state = torch.tensor([[0.8, 0.5]], dtype=torch.float64)
    step = 1e-6
    columns = [(system.step(state + step * e) - system.step(state - step * e))[0] / (2 * step) for e in torch.eye(2, dtype=torch.float64)]
    torch.testing.assert_close(system.jacobian(state)[0], torch.stack(columns, dim=1), atol=1e-8, rtol=0)


@pytest.mark.parametrize("activation", ["tanh", "relu", "softplus"])
def test_network_jacobian_is_that_of_autograd(activation: str) -> None:
    system = CTRNNSystem(CTRNN(1, inputs=3, hidden=7, alpha=0.4, activation=activation))
    states = torch.randn(5, 7, dtype=torch.float64)
    torch.testing.assert_close(system.jacobian(states), DynamicalSystem.jacobian(system, states))


def test_long_runs_in_pieces_are_the_run() -> None:
    system = CTRNNSystem(CTRNN(1, inputs=3, hidden=7, alpha=0.4))
    start = torch.randn(4, 7, dtype=torch.float64)
    torch.testing.assert_close(system.relax(start, 600), system.run_free(600, start)[:, -1])


def test_files_of_a_run_and_published_files_load_the_same(tmp_path: Path) -> None:
    net = CTRNN(3, inputs=3, hidden=6, alpha=[0.1, 0.5, 1.0], activation=["tanh", "relu", "tanh"])
    rows = [NetworkResult(job, 1, 0.5, 0.5, None, 0.5, 0.0, "tanh") for job in (4, 7, 9)]
    save_networks(tmp_path / "networks.npz", net, rows)
    systems = load_systems(tmp_path, jobs=[9, 7])
    assert [system.name for system in systems] == ["job 9", "job 7"]
    torch.testing.assert_close(systems[1].run_free(5), CTRNNSystem(net, 1).run_free(5))
    one = {name: getattr(net, ours)[1].detach().numpy() for name, ours in (("W_rec", "w_rec"), ("b_rec", "b_rec"), ("W_in", "w_in"))}
    one |= {"W_out": net.w_out[1].detach().numpy(), "b_out": net.b_out[1].detach().numpy(), "alpha": np.float32(0.5)}
    np.savez(tmp_path / "one.npz", activation="relu", **{f"a_{k}": v for k, v in one.items()}, a_activation="relu")
    torch.testing.assert_close(load_npz(tmp_path / "one.npz", "a_").run_free(5), systems[1].run_free(5))
    with pytest.raises(ValueError, match=r"jobs: expected some of 4 to 9, .* has no 5"):
        load_systems(tmp_path, jobs=[5])
    with pytest.raises(ValueError, match=r"jobs: .* holds one network"):
        load_systems(tmp_path / "one.npz", "a_", jobs=[0])
    (tmp_path / "torn.npz").write_bytes(b"PK")
    with pytest.raises(ValueError, match=r"truncated or not an \.npz file"):
        load_systems(tmp_path / "torn.npz")
    with pytest.raises(FileNotFoundError, match="networks: expected a file"):
        load_systems(tmp_path / "nothing")


def test_refusals() -> None:
    system = PlanarOscillator()
    with pytest.raises(ValueError, match="sequences: expected symbols 0 to 2, got 0 to 3"):
        system.pulses(np.array([[0, 3]]), np.array([[5, 10]]))
    with pytest.raises(ValueError, match=r"onsets: expected pulses of 2 steps within T = 50, got onsets 5 to 49"):
        system.pulses(np.array([[0, 1]]), np.array([[5, 49]]))
    with pytest.raises(ValueError, match="onsets: expected the shape of sequences"):
        system.pulses(np.array([[0, 1]]), np.array([[5]]))
    with pytest.raises(ValueError, match="initial: expected"):
        system.run(torch.zeros(2, 3, 2), torch.zeros(3, 2))
    for make, message in (
        (lambda: PlanarOscillator(1), "modulus: expected at least 2"),
        (lambda: PlanarOscillator(period=1.0), "period: expected more than one step"),
        (lambda: PlanarOscillator(mu=0.0), "mu: expected a positive"),
        (lambda: PlanarOscillator(pinning=0.1), "points: expected at least 1"),
        (lambda: PlanarOscillator(pinning=1.5, points=3), "pinning: expected a number in"),
        (lambda: LineAttractor(1), "modulus: expected at least 2"),
        (lambda: CTRNNSystem(CTRNN(1, 3, 4, outputs=2)), "net: expected one output"),
        (lambda: CTRNNSystem(CTRNN(1, 3, 4), symbols=np.eye(2)), r"symbols: expected \[K, I\] with I = 3"),
        (lambda: phase_shifts(1), "modulus: expected at least 2"),
    ):
        with pytest.raises(ValueError, match=message):
            make()
