"""Dynamical similarity: what it must not see, what it must see, and small cases with known answers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from conftest import golden
from test_phase_systems import shipped

from rnndyn_fast.phase import LineAttractor, PlanarOscillator, linear_dynamics, procrustes_distance, run_trials, similarity
from rnndyn_fast.phase.similarity import Similarity, delay_embedding
from rnndyn_fast.tasks import ModuloArithmetic


def random_orthogonal(count: int, size: int, seed: int = 0) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(count, size, size, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)))[0]


def test_delay_embedding() -> None:
    data = torch.arange(12.0).reshape(1, 6, 2)
    rows = delay_embedding(data, 3, 2)
    assert rows.shape == (1, 2, 6)
    assert rows[0, 0].tolist() == [8, 9, 4, 5, 0, 1]
    with pytest.raises(ValueError, match=r"delays: 4 delays at intervals of 2 leave 0 rows of T = 6"):
        delay_embedding(data, 4, 2)


def test_map_of_a_linear_system_has_its_eigenvalues() -> None:
    turn = 0.3
    step = 0.97 * np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    start = np.random.default_rng(0).normal(size=(20, 2))
    path = np.stack([start @ np.linalg.matrix_power(step, t).T for t in range(60)], axis=1)
    path -= path.mean((0, 1))  # what the principal components take away
    found = linear_dynamics(path, delays=5, interval=3, rank=3)
    values = np.linalg.eigvals(found)
    expected = 0.97 * np.exp(1j * turn)
    assert min(abs(values - expected)) < 1e-6
    with pytest.raises(ValueError, match="rank: expected 1 to 3, the rank of the delay embedding, got 25"):
        linear_dynamics(path, delays=5, interval=3)
    with pytest.raises(ValueError, match=r"rates: expected \[N, T, R\]"):
        linear_dynamics(path[0])


def test_distance_is_blind_to_coordinates_and_only_to_them() -> None:
    a = torch.randn(6, 8, 8, dtype=torch.float64)
    c = random_orthogonal(6, 8)
    assert procrustes_distance(a, a).max() < 1e-6
    assert procrustes_distance(a, 3.7 * a).max() < 1e-6
    # A start among random ones finds the way back for most, and no start gives less than the distance.
    moved = procrustes_distance(a, c @ a @ c.mT, starts=24)
    assert moved.median() < 1e-4
    other = torch.randn(6, 8, 8, dtype=torch.float64)
    assert procrustes_distance(a, other, starts=24).min() > 0.3


def test_small_maps_against_every_rotation_and_reflection() -> None:
    a, b = torch.randn(40, 2, 2, dtype=torch.float64), torch.randn(40, 2, 2, dtype=torch.float64)
    angle = torch.linspace(0, 2 * np.pi, 4001, dtype=torch.float64)
    turn = torch.stack([torch.stack([angle.cos(), -angle.sin()], 1), torch.stack([angle.sin(), angle.cos()], 1)], 1)
    every = torch.cat([turn, turn @ torch.diag(torch.tensor([1.0, -1.0], dtype=torch.float64))])
    values = torch.einsum("pij,cik,pkl,cjl->pc", a, every, b, every)
    exact = (values.amax(1) / (a.flatten(1).norm(dim=1) * b.flatten(1).norm(dim=1))).arccos()
    found = procrustes_distance(a, b, starts=8)
    assert (found - exact).abs().max() < 1e-3


def test_symmetric_maps_are_compared_by_their_sorted_eigenvalues() -> None:
    """For symmetric maps the best change of coordinates sorts both spectra alike."""
    spectra = torch.randn(2, 10, 6, dtype=torch.float64)
    a, b = (random_orthogonal(10, 6, seed) @ torch.diag_embed(s) @ random_orthogonal(10, 6, seed).mT for seed, s in enumerate(spectra))
    ordered = spectra.sort(dim=2)[0]
    exact = ((ordered[0] * ordered[1]).sum(1) / (ordered[0].norm(dim=1) * ordered[1].norm(dim=1))).arccos()
    torch.testing.assert_close(procrustes_distance(a, b), exact, atol=1e-5, rtol=0)


def test_more_search_never_makes_it_worse() -> None:
    a, b = torch.randn(5, 12, 12, dtype=torch.float64), torch.randn(5, 12, 12, dtype=torch.float64)
    short = procrustes_distance(a, b, starts=2, iterations=0, screening=20)
    long = procrustes_distance(a, b, starts=2, iterations=200, screening=20)
    assert (long <= short + 1e-12).all()
    assert (long < short - 1e-3).any()


def test_shipped_and_handcrafted_systems_lie_as_published_ones_do() -> None:
    """Same kind nearer than another kind; a star farthest of all. Published: phase code to lattice 0.46, to star 0.84."""
    drawn = ModuloArithmetic().exhaustive(8, 4, 3)
    systems = [
        shipped("m3a"),
        shipped("osc"),
        shipped("att"),
        PlanarOscillator(period=32.1, mu=0.3),
        PlanarOscillator(period=2.5, name="star"),
        LineAttractor(pinning=0.3),
    ]
    maps = [linear_dynamics(run_trials(s, drawn.sequences.numpy(), drawn.onsets.numpy()).rates, rank=20) for s in systems]
    table = similarity(maps, [system.name for system in systems], starts=4, iterations=150)
    d = table.distances
    np.testing.assert_array_equal(d, d.T)
    assert (d.diagonal() == 0).all()
    network, first_version, attractor, by_hand, star, line = range(6)
    assert d[network, first_version] < d[network, attractor]
    assert d[first_version, by_hand] < d[attractor, by_hand]
    assert d[attractor, line] == d[attractor][d[attractor] > 0].min()
    for other in (network, first_version, attractor, by_hand, line):
        assert d[star, other] > 2 * np.delete(d[other], [other, star]).max()
    places = table.embed()
    assert places.shape == (6, 2)
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    assert np.corrcoef(apart[np.triu_indices(6, 1)], d[np.triu_indices(6, 1)])[0, 1] > 0.95


def test_map_of_the_published_distances() -> None:
    data = golden("dsa_similarity_m3a")
    published = Similarity([str(k) for k in data["job_id"]], data["similarity"].astype(float))
    places = published.embed()
    apart = np.linalg.norm(places[:, None] - places[None], axis=2)
    assert np.corrcoef(apart[np.triu_indices(91, 1)], published.distances[np.triu_indices(91, 1)])[0, 1] > 0.9
    np.testing.assert_array_equal(places, published.embed())  # seeded


def test_refusals() -> None:
    one = torch.eye(3, dtype=torch.float64)[None]
    for a, b, options, message in (
        (one, one[0], {}, "b: expected the shape of a"),
        (one, one, {"starts": 0}, "starts: expected at least 1"),
        (one, 0 * one, {}, "expected maps other than 0"),
    ):
        with pytest.raises(ValueError, match=message):
            procrustes_distance(a, b, **options)  # type: ignore[arg-type]
    assert similarity([np.eye(2)]).distances.tolist() == [[0.0]]
    assert list(itertools.chain(*similarity([np.eye(2), np.eye(2)]).distances)) == pytest.approx([0] * 4, abs=1e-6)
