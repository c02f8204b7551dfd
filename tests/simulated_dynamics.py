"""Trajectories of which is known what is true of them, for tests of the claims: motion, and place in the readout zone, set apart."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from rnndyn_fast.analysis import ReadoutZoneResult, readout_zones

CLASSES, DIMS = 6, 24
NORM, COSINE = 8.0, 0.6  # of a sample that is in its final zone
NORM_SD, COSINE_SD = 1.0, 0.05  # between images


@dataclass(frozen=True)
class Truth:
    """What is true of simulated trajectories.

    Args:
        motion: of the part that no readout vector sees: "turns" (at a constant speed), "converges" (the change falls by `kept` per
            step), "stops" (nothing moves from step 4 on), "noise" (drawn anew at every step), "still".
        speed: angle per step, in radians.
        kept: of a step's change in the next.
        trait_norm, trait_cosine: by how much images that are late are lower, at all steps.
        state_norm, state_cosine: by how much an image is lower before it is stable.
        late: share of images that are late.
        draw: number of the draw of directions.
    """

    motion: str = "turns"
    speed: float = 0.3
    kept: float = 1.0
    trait_norm: float = 0.0
    trait_cosine: float = 0.0
    state_norm: float = 0.0
    state_cosine: float = 0.0
    late: float = 0.3
    draw: int = 0


def simulate(truth: Truth, n: int = 300, timesteps: int = 8, seed: int = 0) -> ReadoutZoneResult:
    """A result of `n` images, all stable-correct: ``r = norm (cosine e_p + sqrt(1 - cosine^2) u)``, u normal to every readout vector e.

    Images (labels, norms, times of stabilisation) depend on `seed`: with the same one, another truth is another network that sees the
    same images.
    """
    images = np.random.default_rng(seed)
    label = images.integers(0, CLASSES, n)
    other = (label + images.integers(1, CLASSES, n)) % CLASSES
    s = np.where(images.random(n) < truth.late, images.integers(1, timesteps - 2, n), 0)
    norm_i, cosine_i = images.normal(0, NORM_SD, n), images.normal(0, COSINE_SD, n)
    before = np.arange(timesteps)[:, None] < s  # [T, N]
    late = s > 0
    norm = NORM + norm_i - truth.trait_norm * late - truth.state_norm * before + images.normal(0, 0.02, (timesteps, n))
    cosine = COSINE + cosine_i - truth.trait_cosine * late - truth.state_cosine * before
    cosine = np.clip(cosine, 0.05, 0.95)
    predicted = np.where(before, other, label)
    hidden = _directions(truth, np.random.default_rng([seed, truth.draw]), s, timesteps)
    r = norm[..., None] * (cosine[..., None] * np.eye(DIMS)[predicted] + np.sqrt(1 - cosine**2)[..., None] * hidden)
    return readout_zones(r, np.eye(DIMS)[:CLASSES], label)


def _directions(truth: Truth, rng: np.random.Generator, s: np.ndarray, timesteps: int) -> np.ndarray:  # -> [T, N, D]
    """Unit vectors u[t] in the dimensions that the readout does not see."""
    n, hidden = len(s), DIMS - CLASSES
    if truth.motion == "noise":
        raw = rng.normal(size=(timesteps, n, hidden))
        unit = raw / np.linalg.norm(raw, axis=-1, keepdims=True)
    else:
        a, b = rng.normal(size=(2, n, hidden))
        a /= np.linalg.norm(a, axis=1, keepdims=True)
        b -= (b * a).sum(1, keepdims=True) * a
        b /= np.linalg.norm(b, axis=1, keepdims=True)
        steps = np.arange(timesteps - 1)
        speed = truth.speed * rng.uniform(0.8, 1.2, n)
        pace = {"turns": 1.0 + 0 * steps, "converges": truth.kept**steps, "stops": (steps < 4) * 1.0, "still": 0.0 * steps}[truth.motion]
        angle = np.concatenate([np.zeros((1, n)), np.cumsum(pace[:, None] * speed, axis=0)])
        unit = np.cos(angle)[..., None] * a + np.sin(angle)[..., None] * b
    return np.concatenate([np.zeros((timesteps, n, CLASSES)), unit], axis=-1)
