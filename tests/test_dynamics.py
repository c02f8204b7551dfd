"""Dynamics beyond the publication, on systems of which the answer is known."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import ortho_group, spearmanr
from simulated_dynamics import Truth, simulate

from rnndyn_fast.analysis import bootstrap, readout_zones
from rnndyn_fast.analysis.geometry import cka_over_time, compare_rdms, procrustes_over_time
from rnndyn_fast.analysis.lesions import lesion_effects
from rnndyn_fast.analysis.motion import CONVERGES, CYCLES, WANDERS, motion, settle, speed_against_margin, straightness
from rnndyn_fast.analysis.tangent import StateStep, largest_gain, local_lyapunov, spectral_radius
from rnndyn_fast.models import blt_net_64

T = np.arange(60.0)


def plane(angle: float, shrink: float) -> np.ndarray:  # -> [T, 1, 2]
    return (shrink ** T[:, None] * np.stack([np.cos(angle * T), np.sin(angle * T)], 1))[:, None] + 5.0 * (shrink < 1)


# ---------------------------------------------------------------- where trajectories go


def test_kinds_periods_and_rates() -> None:
    logistic = np.empty((60, 1, 1))
    logistic[0] = 0.3
    for t in range(59):
        logistic[t + 1] = 4 * logistic[t] * (1 - logistic[t])
    cases = {
        "node": (1.0 + 0.8 ** T[:, None, None] * np.ones((1, 1, 2)), CONVERGES, 1, 0.8),
        "spiral": (plane(0.7, 0.75), CONVERGES, 1, 0.75),
        "at rest": (np.ones((60, 1, 2)), CONVERGES, 1, np.nan),
        "cycle of 5": (plane(2 * np.pi / 5, 1.0), CYCLES, 5, np.nan),
        "cycle of 2": ((-1.0) ** T[:, None, None], CYCLES, 2, np.nan),
        "quasi-periodic": (plane(1.0, 1.0), WANDERS, 0, np.nan),
        "chaos": (logistic, WANDERS, 0, np.nan),
        "drift": (T[:, None, None] * 0.1, WANDERS, 0, np.nan),
    }
    for name, (r, kind, period, rate) in cases.items():
        found = motion(r)
        assert (found.kind[0], found.period[0]) == (kind, period), name
        np.testing.assert_allclose(found.rate[0], rate, rtol=0.02, err_msg=name)
    found = motion(cases["node"][0])
    np.testing.assert_allclose(found.distance[:20, 0], np.sqrt(2) * 0.8 ** T[:20], rtol=1e-3)
    assert np.isnan(motion(cases["cycle of 2"][0]).distance).all()
    assert motion(np.concatenate([cases["node"][0], plane(2 * np.pi / 5, 1.0)], axis=1)).shares == {
        CONVERGES: 0.5, CYCLES: 0.5, WANDERS: 0.0,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("r", "options", "message"),
    [
        (np.zeros((7, 1, 1)), {}, "T of at least 8"),
        (np.full((9, 1, 1), np.nan), {}, "finite"),
        (np.zeros((9, 1, 1)), {"tolerance": 0.0}, "tolerance: expected more than 0"),
    ],
)
def test_wrong_trajectories(r: np.ndarray, options: dict[str, float], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        motion(r, **options)


def test_straightness_and_curvature() -> None:
    line, curvature = straightness(T[:9, None, None] * np.ones((1, 2, 3)))
    np.testing.assert_allclose(line, 1.0)
    np.testing.assert_allclose(curvature, 0.0, atol=1e-6)
    circle, curvature = straightness(plane(np.pi / 4, 1.0)[:10], start=1)  # once round
    np.testing.assert_allclose(circle, 0.0, atol=1e-12)
    np.testing.assert_allclose(curvature, np.pi / 4)
    with pytest.raises(ValueError, match="start: expected 0 to T - 3"):
        straightness(np.zeros((4, 1, 1)), start=2)


def test_straightness_of_a_result_is_that_of_its_trajectories() -> None:
    r = np.cumsum(np.random.default_rng(0).normal(size=(6, 50, 3)), axis=0) + 50.0 * np.eye(3)[0]
    result = readout_zones(r, np.eye(3), np.zeros(50, int))
    assert result.counts_t_stable_correct[0] == 50
    assert bootstrap(result, 5).values["straightness"] == pytest.approx(straightness(r)[0].mean())


def test_speed_against_margin() -> None:
    result = simulate(Truth(), 300)
    samples = result.samples
    assert samples is not None
    found = speed_against_margin(result)
    rows = samples["time"] <= 3
    assert found["correlation"][3] == pytest.approx(spearmanr(samples["change"][rows, 3], samples["margin"][rows, 3])[0])
    assert found["n"][3] == rows.sum()
    assert np.isnan(found["correlation"][0])
    shown = np.isfinite(found["low"])
    assert shown.sum() == result.timesteps - 2
    assert (found["low"][shown] > -1).all()
    assert (found["high"][shown] < 1).all()
    assert np.isnan(speed_against_margin(simulate(Truth(), 9))["correlation"]).all()


# ---------------------------------------------------------------- local stability


def test_exponents_of_known_maps() -> None:
    def henon(x: torch.Tensor) -> torch.Tensor:
        return torch.stack([1 - 1.4 * x[:, 0] ** 2 + x[:, 1], 0.3 * x[:, 0]], dim=1)

    found = local_lyapunov(henon, torch.zeros(1, 2, dtype=torch.float64), steps=1500, count=2, warm=100)[0]
    assert found[0].item() == pytest.approx(0.419, abs=0.04)
    assert found.sum().item() == pytest.approx(np.log(0.3), abs=1e-6)  # the determinant
    logistic = local_lyapunov(lambda x: 4 * x * (1 - x), torch.full((1, 1), 0.3, dtype=torch.float64), steps=1500, warm=10)
    assert logistic.item() == pytest.approx(np.log(2), abs=0.04)
    matrix = torch.diag(torch.tensor([0.9, 0.5, 0.1], dtype=torch.float64))
    linear = local_lyapunov(lambda x: x @ matrix.T, torch.ones(2, 3, dtype=torch.float64), steps=20, count=3, warm=80)
    np.testing.assert_allclose(linear.exp(), [[0.9, 0.5, 0.1]] * 2, rtol=1e-6)


def test_radius_and_gain_of_known_matrices() -> None:
    rng = np.random.default_rng(0)
    rotation = 0.9 * np.array([[np.cos(1), -np.sin(1)], [np.sin(1), np.cos(1)]])
    shear = np.array([[0.5, 10.0], [0.0, 0.4]])  # stable, and grows much at first
    for matrix in (rotation, shear, rng.normal(size=(6, 6)) / 3):
        m = torch.from_numpy(matrix)
        states = torch.zeros(2, len(matrix), dtype=torch.float64)
        radius = spectral_radius(lambda x, m=m: x @ m.T, states, iterations=600)
        np.testing.assert_allclose(radius, np.abs(np.linalg.eigvals(matrix)).max(), rtol=1e-2)
        gain = largest_gain(lambda x, m=m: x @ m.T, states, iterations=200)
        np.testing.assert_allclose(gain, np.linalg.norm(matrix, 2), rtol=1e-3)
    # At a point of a nonlinear system: each sample has its own Jacobian.
    found = spectral_radius(torch.tanh, torch.tensor([[0.0, 0.0], [1.0, 1.0]], dtype=torch.float64))
    np.testing.assert_allclose(found, [1.0, 1 - np.tanh(1) ** 2], rtol=1e-6)
    with pytest.raises(ValueError, match="iterations: expected at least 1"):
        spectral_radius(torch.tanh, torch.zeros(1, 1), iterations=0)
    with pytest.raises(ValueError, match=r"states: expected floating point \[N, D\]"):
        largest_gain(torch.tanh, torch.zeros(3))


NETWORKS = {
    "lateral": {"topdown_connections": False},
    "topdown": {"topdown_connections": True, "LT_interaction": "multiplicative"},
}


@pytest.mark.parametrize("name", NETWORKS)
def test_state_step_is_the_rollouts(name: str) -> None:
    torch.manual_seed(0)
    net = blt_net_64(image_size=16, widths=(2, 4, 8, 16, 32), timesteps=4, **NETWORKS[name]).double()
    step = StateStep(net, torch.rand(2, 3, 16, 16, dtype=torch.float64))
    state = step.state(3)
    torch.testing.assert_close(step(state), step.state(4), rtol=1e-9, atol=1e-12)
    direction = torch.randn_like(state)
    tangent = torch.func.jvp(step, (state,), (direction,))[1]
    numeric = (step(state + 1e-6 * direction) - step(state - 1e-6 * direction)) / 2e-6
    torch.testing.assert_close(tangent, numeric, rtol=1e-4, atol=1e-5)
    jacobian = torch.func.jacrev(lambda s: step(torch.stack([s, state[1]]))[0])(state[0]) if state.shape[1] < 1500 else None
    if jacobian is not None:
        gain = largest_gain(step, state, iterations=60)
        assert gain[0].item() == pytest.approx(torch.linalg.matrix_norm(jacobian, 2).item(), rel=1e-2)
    assert local_lyapunov(step, state, steps=3, count=2).shape == (2, 2)


def test_network_without_recurrence_or_with_other_steps_is_refused() -> None:
    net = blt_net_64(image_size=16, widths=(2, 4, 8, 16, 32), timesteps=1, lateral_connections=False, topdown_connections=False)
    with pytest.raises(ValueError, match="no connection that reads the step before"):
        StateStep(net, torch.rand(1, 3, 16, 16))


def test_network_settles_where_its_lateral_weights_are_zero() -> None:
    torch.manual_seed(0)
    net = blt_net_64(image_size=16, widths=(2, 4, 8, 16, 32), timesteps=4, topdown_connections=False)
    images = torch.rand(3, 3, 16, 16)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "lateral" in name:
                parameter.zero_()
    found = settle(net, images, steps=12)
    assert found.kind.tolist() == [CONVERGES] * 3
    np.testing.assert_allclose(found.distance, 0.0, atol=1e-5)
    assert settle(net, images, steps=12, area="it").distance.shape == (12, 3)
    with pytest.raises(ValueError, match="steps: expected at least 8"):
        settle(net, images, steps=4)


# ---------------------------------------------------------------- lesions


def test_lesions_against_weights_of_zero() -> None:
    net = blt_net_64(image_size=16, widths=(2, 4, 8, 16, 32), timesteps=4, num_classes=5).eval()
    images, labels = torch.rand(12, 3, 16, 16), torch.arange(12) % 5
    found = lesion_effects(net, images, labels=labels)
    assert "v4:lateral" in found.connections
    assert "v2:top_down" in found.connections
    assert found.change.shape == (len(found.connections), 4)
    assert found.images == 12
    intact_log_probs, intact = net.run(images, return_representations=True)
    with torch.no_grad():
        net.v4.lateral.weight.zero_()
    log_probs, without = net.run(images, return_representations=True)
    row = found.connections.index("v4:lateral")
    expected = (without - intact).norm(dim=2) / intact.norm(dim=2)
    np.testing.assert_allclose(found.change[row], expected.mean(1).detach(), rtol=1e-4, atol=1e-7)
    accuracy = (log_probs.argmax(2) == labels).float().mean(1)
    lost = (intact_log_probs.argmax(2) == labels).float().mean(1) - accuracy
    assert found.accuracy is not None
    np.testing.assert_allclose(found.accuracy[row], accuracy)
    np.testing.assert_allclose(found.accuracy_lost[row], lost, atol=1e-7)
    assert (found.change_low <= found.change).all()
    assert (found.change[:, 0] == 0).all()  # nothing recurrent has acted yet


def test_lesions_refuse_what_they_cannot_say() -> None:
    net = blt_net_64(image_size=16, widths=(2, 4, 8, 16, 32), timesteps=3, topdown_connections=False).eval()
    images = torch.rand(2, 3, 16, 16)
    late = lesion_effects(net, images, connections=["v4:lateral"], steps=2)
    assert (late.change[0, :2] == 0).all()
    assert late.accuracy is None
    for options, message in (
        ({"labels": [1]}, "labels: expected one for each of 2 images"),
        ({"connections": []}, "connections: expected some"),
        ({"connections": ["v4:top_down"]}, "connection: network .* has no 'v4:top_down'"),
    ):
        with pytest.raises(ValueError, match=message):
            lesion_effects(net, images, **options)


# ---------------------------------------------------------------- geometry


def test_cka_and_procrustes_of_known_pairs() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(1, 40, 6)) * np.array([3, 2, 1, 1, 1, 0.5])
    turned = 2.5 * x @ ortho_group.rvs(6, random_state=1) + 7.0
    wide = rng.normal(size=(30, 40, 400))
    np.testing.assert_allclose(cka_over_time(x, turned), 1.0)
    np.testing.assert_allclose(procrustes_over_time(x, turned), 0.0, atol=1e-6)
    # More dimensions than samples: independent ones stay at 0, where the plain estimate is near 1.
    independent = cka_over_time(wide[:15], wide[15:])
    assert abs(independent.mean()) < 0.02
    both = np.concatenate([x, turned])
    assert cka_over_time(both, wide[:3]).shape == (2, 3)
    angles = procrustes_over_time(np.concatenate([x, wide[:2, :, :6]]), np.concatenate([x, wide[:2, :, :6]]))
    np.testing.assert_allclose(angles, angles.T, atol=1e-6)
    assert angles[0, 1] <= angles[0, 2] + angles[2, 1]
    assert np.isnan(cka_over_time(np.ones((1, 9, 2)), rng.normal(size=(1, 9, 2)))).all()
    with pytest.raises(ValueError, match="b: expected the same N >= 4 samples"):
        cka_over_time(x, x[:, :7])


def test_rdms_against_subjects() -> None:
    pytest.importorskip("rsatoolbox")
    rng = np.random.default_rng(0)

    def rdm(points: np.ndarray) -> np.ndarray:
        return np.linalg.norm(points[:, None] - points[None], axis=-1)

    points = rng.normal(size=(12, 5))
    subjects = np.stack([rdm(points + 0.5 * rng.normal(size=points.shape)) for _ in range(6)])
    steps = np.stack([rdm(points + noise * rng.normal(size=points.shape)) for noise in (20.0, 2.0, 0.0)])
    found = compare_rdms(steps, subjects, method="spearman")
    upper = np.triu_indices(12, 1)
    expected = [[spearmanr(step[upper], subject[upper])[0] for subject in subjects] for step in steps]
    np.testing.assert_allclose(found.by_subject, expected, rtol=1e-6)
    assert (np.diff(found.value) > 0).all()
    assert (found.low < found.value).all()
    assert (found.value < found.high).all()
    assert found.ceiling_low < found.ceiling_high
    assert found.value[2] > found.ceiling_low  # what all subjects have in common reaches the ceiling
    assert (found.subjects, found.conditions) == (6, 12)
    for ours, theirs, message in (
        (steps, subjects[:2], "subjects: expected at least 3, got 2"),
        (steps[:, :4, :4], subjects[:, :4, :4], "network: expected at least 5 conditions"),
        (steps, subjects[:, :6, :6], "expected RDMs of 12 conditions"),
        (steps + np.arange(12), subjects, "network: expected symmetric matrices"),
        (steps + 1, subjects, "network: expected dissimilarities"),
    ):
        with pytest.raises(ValueError, match=message):
            compare_rdms(ours, theirs)
