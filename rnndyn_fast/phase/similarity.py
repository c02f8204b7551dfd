"""Dynamical similarity analysis: how far apart two systems' dynamics are when neither knows the other's coordinates.

Ostrow, Eisen, Kozachkov & Fiete (2023), arXiv 2306.10168. All pairs are compared in one batch; the published code takes
them one after the other and a thousand steps of gradient descent for each.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.optional import require
from rnndyn_fast.phase.trajectories import fit_pca


def delay_embedding(data: Tensor, delays: int, interval: int) -> Tensor:  # [N, T, D] -> [N, T - (delays - 1) interval, delays D]
    """Rows (x_t, x_{t - interval}, ..., x_{t - (delays - 1) interval}).

    Raises:
        ValueError: fewer than two rows are left per trial.
    """
    reach = (delays - 1) * interval
    rows = data.shape[1] - reach
    if delays < 1 or interval < 1 or rows < 2:
        raise ValueError(
            f"delays: {delays} delays at intervals of {interval} leave {rows} rows of T = {data.shape[1]}, expected at least 2"
        )
    return torch.cat([data[:, reach - k * interval : reach - k * interval + rows] for k in range(delays)], dim=2)


def linear_dynamics(
    rates: np.ndarray, *, components: int = 10, delays: int = 10, interval: int = 5, rank: int = 25, ridge: float = 0.0
) -> np.ndarray:  # [N, T, R] -> [rank, rank]
    """The linear map that best takes a system one step on, in delay coordinates.

    Rates are reduced to `components` principal components, embedded with delays, whitened and cut to `rank` by a singular value
    decomposition of all rows stacked; the map is the least-squares one between successive rows of the same trial. Defaults as
    published.

    Args:
        rates: trials of the same inputs for all systems that are to be compared.
        components, delays, interval, rank: see above; fewer components are taken where there are fewer rates.
        ridge: weight of the map's squared norm.

    Raises:
        ValueError: not [N, T, R]; delays that do not fit; a rank beyond the embedding's.
    """
    rates = np.asarray(rates, dtype=np.float64)
    if rates.ndim != 3:
        raise ValueError(f"rates: expected [N, T, R], got {list(rates.shape)}")
    pca = fit_pca(rates, min(components, rates.shape[2]))
    rows = delay_embedding(torch.as_tensor(pca.project(rates)), delays, interval)
    left, sizes, _ = torch.linalg.svd(rows.flatten(0, 1), full_matrices=False)
    usable = int((sizes > sizes[0] * 1e-12).sum())
    if not 1 <= rank <= usable:
        raise ValueError(f"rank: expected 1 to {usable}, the rank of the delay embedding, got {rank}")
    coordinates = left[:, :rank].unflatten(0, rows.shape[:2])
    before, after = coordinates[:, :-1].flatten(0, 1), coordinates[:, 1:].flatten(0, 1)
    gram = before.T @ before + ridge * torch.eye(rank, dtype=before.dtype)
    return torch.linalg.lstsq(gram, before.T @ after, driver="gelsd").solution.T.numpy()


@dataclass(frozen=True)
class Similarity:
    """Distances between systems and a map of them."""

    names: list[str]
    distances: np.ndarray  # [M, M] radians

    def embed(self, seed: int = 42) -> np.ndarray:  # -> [M, 2]
        """Metric multidimensional scaling into the plane (scikit-learn, as published)."""
        import inspect

        require("sklearn")

        from sklearn.manifold import MDS

        options = {"n_components": 2, "random_state": seed, "normalized_stress": "auto", "n_init": 4}
        known = inspect.signature(MDS).parameters
        # scikit-learn 1.8 renamed both of these.
        options |= {"metric": "precomputed", "init": "random"} if "metric_mds" in known else {"dissimilarity": "precomputed"}
        return MDS(**options).fit_transform(self.distances)


def similarity(maps: Sequence[np.ndarray], names: Sequence[str] | None = None, **options: int | float) -> Similarity:
    """Distances between all pairs of maps of ``linear_dynamics``; options are those of ``procrustes_distance``."""
    stack = torch.as_tensor(np.stack(maps))
    pairs = list(itertools.combinations(range(len(stack)), 2))
    table = np.zeros((len(stack), len(stack)))
    if pairs:
        first, second = (list(side) for side in zip(*pairs, strict=True))
        found = procrustes_distance(stack[first], stack[second], **options).numpy()  # type: ignore[arg-type]
        table[first, second] = table[second, first] = found
    return Similarity(list(names) if names is not None else [str(k) for k in range(len(stack))], table)


def procrustes_distance(
    a: Tensor, b: Tensor, *, starts: int = 6, iterations: int = 400, screening: int = 40, tolerance: float = 1e-9, seed: int = 0
) -> Tensor:  # [P, n, n] both -> [P]
    r"""Angle between linear maps up to an orthogonal change of coordinates:

    .. math:: d(A, B) = \min_{C \in O(n)} \arccos \frac{\langle A, C B C^T \rangle}{\|A\|\,\|B\|}

    Gradient ascent on O(n) with Nesterov's momentum, the polar factor as retraction, and for every pair its own step size and its own
    restart of the momentum where the similarity would fall: it never does, and both halves of O(n) are searched. It can stop at a
    local maximum, so `starts` starts per pair are tried (the identity, aligned eigenvectors of the symmetric parts with various
    signs, random ones), and the best after `screening` steps goes on.

    Args:
        a, b: P pairs of maps.
        starts: starts per pair.
        iterations, tolerance: at most that many steps after the screening, or until no similarity grows by more than tolerance.
        seed: of the random starts.

    Returns:
        Radians, 0 to pi. An upper bound of the minimum, as with every local search.
    """
    if a.shape != b.shape or a.dim() != 3 or a.shape[1] != a.shape[2]:
        raise ValueError(f"b: expected the shape of a, [P, n, n], got {list(b.shape)} and {list(a.shape)}")
    if starts < 1:
        raise ValueError(f"starts: expected at least 1, got {starts}")
    a, b = a.to(torch.float64), b.to(torch.float64)
    norms = [x.flatten(1).norm(dim=1) for x in (a, b)]
    if not all(bool((n > 0).all()) for n in norms):
        raise ValueError("a, b: expected maps other than 0")
    a, b = (x / n[:, None, None] for x, n in zip((a, b), norms, strict=True))
    best = torch.cat(
        [_search(x, y, starts, iterations, screening, tolerance, seed) for x, y in zip(a.split(512), b.split(512), strict=True)]
    )
    return best.clamp(-1, 1).arccos()


def _search(a: Tensor, b: Tensor, starts: int, iterations: int, screening: int, tolerance: float, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    guesses = _starts(a, b, starts, generator)  # [S, P, n, n]
    count, pairs = guesses.shape[:2]
    aa, bb = a.repeat(count, 1, 1), b.repeat(count, 1, 1)
    c, value = _climb(aa, bb, guesses.flatten(0, 1), screening, tolerance)
    best = value.view(count, pairs).argmax(0)
    chosen = c.view(count, pairs, *c.shape[1:])[best, torch.arange(pairs)]
    return _climb(a, b, chosen, iterations, tolerance)[1]


def _climb(a: Tensor, b: Tensor, c: Tensor, iterations: int, tolerance: float) -> tuple[Tensor, Tensor]:
    """The ascent of ``procrustes_distance``: the last C and its similarity. Pairs that have come to rest leave the batch."""
    best, best_value = c.clone(), (a * (c @ b @ c.mT)).sum((1, 2))
    left = torch.arange(len(a))
    at, bt, value = a.mT, b.mT, best_value.clone()
    step, age = a.new_ones(len(a), 1, 1), a.new_zeros(len(a), 1, 1)
    previous, quiet = c, torch.zeros(len(a), dtype=torch.int64)
    for iteration in range(iterations):
        ahead = _polar(c + age / (age + 3) * (c - previous))
        turn = (a @ ahead @ bt + at @ ahead @ b) @ ahead.mT
        new = _polar(ahead + step * ((turn - turn.mT) / 2) @ ahead)
        new_value = (a * (new @ b @ new.mT)).sum((1, 2))
        better = (new_value >= value)[:, None, None]
        quiet = torch.where(new_value - value > tolerance, 0, quiet + 1)
        previous, c = c, torch.where(better, new, c)
        value = torch.maximum(value, new_value)
        age = torch.where(better, age + 1, torch.zeros_like(age))
        step = torch.where(better, step * 1.05, step / 2)
        if iteration % 10 == 9 or iteration == iterations - 1:
            best[left], best_value[left] = c, value
            active = quiet < 10  # one step without growth may be a restart
            if not bool(active.any()):
                break
            left, a, b, c, previous, value, step, age, quiet = (x[active] for x in (left, a, b, c, previous, value, step, age, quiet))
            at, bt = a.mT, b.mT
    return best, best_value


def _polar(x: Tensor) -> Tensor:
    """Orthogonal polar factor by Newton-Schulz iteration."""
    gram = x.mT @ x
    # The largest row sum bounds the square of the spectral norm, so that the iteration converges; near an orthogonal matrix it is
    # near 1, and a few rounds do.
    bound = gram.abs().sum(2).amax(1)[:, None, None]
    x, gram = x / bound.sqrt(), gram / bound
    for _ in range(30):
        x = 1.5 * x - 0.5 * (x @ gram)
        gram = x.mT @ x
        if float((gram.diagonal(dim1=1, dim2=2) - 1).abs().max()) < 1e-7:
            break
    return x


def _starts(a: Tensor, b: Tensor, starts: int, generator: torch.Generator) -> Tensor:  # -> [S, P, n, n]
    size = a.shape[-1]
    eye = torch.eye(size, dtype=a.dtype).expand(len(a), -1, -1)
    symmetric = torch.linalg.eigh(a + a.mT)[1] @ torch.linalg.eigh(b + b.mT)[1].mT
    guesses = [eye, symmetric]
    while len(guesses) < starts:
        random = torch.linalg.qr(torch.randn(a.shape, dtype=a.dtype, generator=generator))[0]
        # Signs are what aligned eigenvectors leave open: half of the random starts only draw those.
        if len(guesses) % 2:
            signs = torch.randint(0, 2, (len(a), 1, size), generator=generator) * 2.0 - 1
            random = (torch.linalg.eigh(a + a.mT)[1] * signs) @ torch.linalg.eigh(b + b.mT)[1].mT
        guesses.append(random)
    return torch.stack(guesses[:starts])
