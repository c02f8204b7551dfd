"""The SET task as first published: colours as fixed random input vectors."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from rnndyn_fast.tasks.modulo_arithmetic import ModuloArithmetic, check_sizes
from rnndyn_fast.tasks.trials import Trials

COLOURS = ("green", "purple", "red")


def draw_colours(seed: int, dims: int = 100) -> NDArray[np.float32]:
    """Three input vectors [3, dims] of independent unit normals: green, purple, red."""
    check_sizes(dims=dims)
    return np.random.default_rng(seed).standard_normal((len(COLOURS), dims)).astype(np.float32)


@dataclass(frozen=True, eq=False)
class SetGame:
    """Three balls, each of one of three colours; accepted where the colours are all equal or all different, that is where their numbers
    (green 0, purple 1, red 2) sum to 0 modulo 3. A colour is an input vector, added at two steps from the onset on; onsets lie in
    3 .. 39, at least 5 apart; T = 50.

    Args:
        colours: input vectors [3, I] of green, purple and red, as of :func:`draw_colours`.

    Source: Murray, arXiv 2310.07908v1.

    >>> task = SetGame(draw_colours(seed=0))
    >>> task.train_set(seed=1).inputs.shape
    torch.Size([1080, 50, 100])
    """

    colours: NDArray[np.float32]

    def __post_init__(self) -> None:
        if np.ndim(self.colours) != 2 or len(self.colours) != len(COLOURS):
            raise ValueError(f"colours: expected [3, I], got {list(np.shape(self.colours))}")
        if not np.isfinite(self.colours).all():
            raise ValueError("colours: expected finite numbers")

    @property
    def inputs(self) -> int:
        """Input channels."""
        return self.colours.shape[1]

    @property
    def rule(self) -> ModuloArithmetic:
        """The same task with one-hot symbols: the rule, the sequences, the onsets."""
        return ModuloArithmetic(first_onset=3, window=37)

    def train_set(self, seed: int, per_reject: int = 30) -> Trials:
        """Every rejected sequence ``per_reject`` times and every accepted one twice as often: 1080 trials by default."""
        return self._with_colours(self.rule.exhaustive(2 * per_reject, per_reject, seed))

    def trials_at(self, sequences: NDArray[np.int64], onsets: NDArray[np.int64]) -> Trials:  # [N, 3] both
        """Trials of given colours (by number) and onsets."""
        return self._with_colours(self.rule.trials_at(sequences, onsets))

    def _with_colours(self, trials: Trials) -> Trials:
        one_hot = trials.inputs / self.rule.amplitude
        return Trials(one_hot @ torch.from_numpy(np.asarray(self.colours, np.float32)), trials.labels, trials.sequences, trials.onsets)
