"""The finite-state automaton inside a system: states, transitions, and whether they are those of addition modulo K."""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np
import torch

from rnndyn_fast.optional import require
from rnndyn_fast.phase.systems import DynamicalSystem
from rnndyn_fast.phase.trajectories import PCA, answers, fit_pca
from rnndyn_fast.tasks.trials import draw_onsets

UNKNOWN = -1
_CLUSTERED = 600  # points that are clustered; the others join the nearest centre


@dataclass(frozen=True)
class Automaton:
    """A deterministic finite automaton over symbols 0..K-1.

    Attributes:
        transitions: [Q, K] next state; UNKNOWN where never seen.
        accept: [Q] +1 accepts, -1 rejects, 0 gives no answer.
        start: state before the first symbol.
        support: [Q, K] how many times each transition was seen.
        determinism: share of the seen transitions that agree with `transitions`: 1 if the state and the symbol decide what follows.
    """

    transitions: np.ndarray
    accept: np.ndarray
    start: int
    support: np.ndarray
    determinism: float

    @property
    def num_states(self) -> int:
        """Q."""
        return len(self.transitions)

    def run(self, sequences: np.ndarray) -> np.ndarray:  # [N, L] -> [N]
        """State after every sequence; UNKNOWN once an unseen transition was needed.

        >>> modulo_automaton(3).run(np.array([[1, 1], [2, 2]])).tolist()
        [2, 1]
        """
        sequences = np.asarray(sequences)
        states = np.full(len(sequences), self.start)
        table = np.concatenate([self.transitions, np.full((1, self.transitions.shape[1]), UNKNOWN)])
        for symbols in sequences.T:
            states = table[states, symbols]
        return states

    def answers(self, sequences: np.ndarray) -> np.ndarray:  # [N, L] -> [N]
        """+1, -1, or 0 for no answer."""
        return np.append(self.accept, 0)[self.run(sequences)]

    def minimised(self) -> Automaton:
        """The smallest automaton that gives the same answers (Moore's refinement of the partition by answer), without states that
        cannot be reached."""
        block = np.append(self.accept, 2)  # UNKNOWN is a block of its own
        while True:
            signature = np.column_stack([block[:-1], block[self.transitions]])
            _, new = np.unique(signature, axis=0, return_inverse=True)
            new = np.append(new.reshape(-1), new.max() + 1)
            if len(np.unique(new)) == len(np.unique(block)):
                break
            block = new
        block = block[:-1]
        # Numbered in the order in which a walk from the start meets them.
        names: dict[int, int] = {int(block[self.start]): 0}
        queue, rows = [self.start], []
        while queue:
            state = queue.pop(0)
            row = []
            for following in self.transitions[state]:
                if following != UNKNOWN and int(block[following]) not in names:
                    names[int(block[following])] = len(names)
                    queue.append(int(following))
                row.append(UNKNOWN if following == UNKNOWN else names[int(block[following])])
            rows.append((row, self.accept[state], self.support[block == block[state]].sum(0)))
        return Automaton(
            np.array([row for row, _, _ in rows]),
            np.array([accept for _, accept, _ in rows]),
            0,
            np.array([support for _, _, support in rows]),
            self.determinism,
        )

    def is_modulo(self, modulus: int) -> bool:
        """Whether, minimised, it is the automaton of sums modulo `modulus` that accepts 0."""
        small = self.minimised()
        return (
            small.num_states == modulus
            and bool((small.transitions != UNKNOWN).all())
            and np.array_equal(small.transitions, modulo_automaton(modulus).minimised().transitions)
            and np.array_equal(small.accept, modulo_automaton(modulus).minimised().accept)
        )


def modulo_automaton(modulus: int) -> Automaton:
    """Running sum modulo `modulus`; start and accepting state 0."""
    if modulus < 2:
        raise ValueError(f"modulus: expected at least 2, got {modulus}")
    table = (np.arange(modulus)[:, None] + np.arange(modulus)) % modulus
    accept = np.where(np.arange(modulus) == 0, 1, -1)
    return Automaton(table, accept, 0, np.zeros_like(table), 1.0)


@dataclass(frozen=True)
class Extraction:
    """An automaton with what it was read from.

    Attributes:
        automaton: as found; ``automaton.minimised()`` merges states that give the same answers.
        hold: steps added to the trials.
        pca: of the states' features.
        features: [P, D] where each prefix of each trial would be at a common late time if nothing more came.
        states: [P] its state.
        symbols_seen: [P] length of the prefix.
        sums: [P] sum of its symbols modulo K.
        silhouette: of the states, -1 to 1; how clearly they are apart.
    """

    automaton: Automaton
    hold: int
    pca: PCA
    features: np.ndarray
    states: np.ndarray
    symbols_seen: np.ndarray
    sums: np.ndarray
    silhouette: float

    @property
    def centres(self) -> np.ndarray:  # [Q, D]
        """Mean feature per state."""
        return np.stack([self.features[self.states == q].mean(0) for q in range(self.automaton.num_states)])

    @property
    def purity(self) -> float:
        """Share of prefixes whose state is mostly of their own sum modulo K: 1 if no state mixes sums."""
        counts = np.zeros((self.automaton.num_states, int(self.sums.max()) + 1), dtype=int)
        np.add.at(counts, (self.states, self.sums), 1)
        return float(counts.max(1).sum() / counts.sum())


def hold_steps(period: float, least: int = 50, most: int = 250) -> int:
    """Steps to wait so that an oscillation of this period is back where it was: the whole number in the range that comes closest to
    whole turns; `least` without an oscillation (NaN).

    >>> hold_steps(25.0)
    50
    >>> hold_steps(2.5)
    50
    """
    if not np.isfinite(period):
        return least
    candidates = np.arange(least, most + 1)
    turns = candidates / period
    # A little worse but sooner is better: drift and slow decay are not of interest.
    return int(candidates[(np.abs(turns - np.round(turns)) + 1e-4 * candidates / least).argmin()])


def extract_automaton(
    system: DynamicalSystem,
    sequences: np.ndarray,  # [N, L]
    onsets: np.ndarray,  # [N, L]
    *,
    period: float = float("nan"),
    most_states: int = 24,
    components: int = 8,
    seed: int = 0,
) -> Extraction:
    """Read the automaton off a system.

    Every prefix of every trial (the first l symbols, then nothing) is run to the same late time, some steps past the end of a
    trial (`hold_steps`). Two histories that leave the system at the same place there are the same state: on a limit cycle
    that place is the relative phase, among fixed points it is the attractor, and nothing need be known of either. Places are
    clustered (``cluster``, on principal components of the rates), the state after l symbols and the next symbol are counted into
    transitions, and a state accepts if most full trials that end in it are answered so.

    Args:
        system: the system.
        sequences, onsets: trials.
        period: of the undisturbed oscillation, NaN for none.
        most_states: at most that many clusters are tried.
        components: principal components kept.
        seed: of the subset that is clustered where there are more prefixes than ``cluster`` takes.

    Raises:
        ValueError: no trials.
    """
    sequences, onsets = np.asarray(sequences), np.asarray(onsets)
    if sequences.ndim != 2 or not sequences.size:
        raise ValueError(f"sequences: expected [N, L], at least one symbol, got {list(sequences.shape)}")
    count, length = sequences.shape
    hold = hold_steps(period)
    full = system.pulses(sequences, onsets, system.timesteps + hold)
    runs = []
    spoken = np.zeros((count, system.timesteps + hold), dtype=bool)
    for position in range(length + 1):
        # The onsets of a trial may come in any order: the first l symbols are those of the l earliest.
        cut = np.sort(onsets, axis=1)[:, position] if position < length else np.full(count, system.timesteps + hold)
        spoken = np.arange(system.timesteps + hold) < cut[:, None]
        states = system.run(full * torch.as_tensor(spoken)[:, :, None])
        runs.append(system.rates(states[:, -1]).numpy())
        if position == length:
            said = answers(system.outputs(states[:, system.timesteps - 1]).numpy())
    ordered = np.take_along_axis(sequences, np.argsort(onsets, axis=1), axis=1)
    rates = np.stack(runs)  # [L + 1, N, R]
    pca = fit_pca(rates, min(components, rates.shape[2]))
    features = pca.project(rates)
    labels, silhouette = cluster(features.reshape(-1, features.shape[2]), most_states, seed=seed)
    state = labels.reshape(length + 1, count)
    automaton = _count_transitions(state, ordered, said, system.modulus)
    names = _names_from_start(automaton)
    labels, state = names[labels], names[state]
    automaton = _count_transitions(state, ordered, said, system.modulus)
    sums = np.concatenate([np.zeros((count, 1), dtype=int), ordered.cumsum(1)], axis=1).T % system.modulus
    seen = np.repeat(np.arange(length + 1), count)
    return Extraction(automaton, hold, pca, features.reshape(len(seen), -1), labels, seen, sums.reshape(-1), silhouette)


def cluster(points: np.ndarray, most: int, *, enough: float = 0.95, seed: int = 0) -> tuple[np.ndarray, float]:  # [P, D] -> [P]
    """Agglomerative clusters (average linkage) and their silhouette: the fewest, of 2 to `most`, whose silhouette is at least `enough`
    of the best. A single one where all points are one.

    The fewest, because on a cycle histories of equal sums lie close but not on each other: finer clusters have silhouettes as good
    as the coarse ones.
    """
    require("scipy", "sklearn")

    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import pdist, squareform
    from sklearn.metrics import silhouette_score

    spread = float(np.sqrt(((points - points.mean(0)) ** 2).sum(1).mean()))
    if spread < 1e-6 * max(1.0, float(np.abs(points).max())):
        return np.zeros(len(points), dtype=int), 0.0
    chosen = points[np.sort(np.random.default_rng(seed).permutation(len(points))[:_CLUSTERED])]
    distinct = len(np.unique((chosen / spread).round(6), axis=0))
    distances = pdist(chosen)
    tree, table = linkage(distances, "average"), squareform(distances)
    tried = []
    for number in range(2, min(most, distinct, len(chosen) - 1) + 1):
        labels = fcluster(tree, number, "maxclust") - 1
        if labels.max() + 1 == number:  # fewer where branches join at the same height
            tried.append((float(silhouette_score(table, labels, metric="precomputed")), labels))
    if not tried:  # two points
        return np.unique((points / spread).round(6), axis=0, return_inverse=True)[1].reshape(-1), 1.0
    best = max(score for score, _ in tried)
    score, labels = next((score, labels) for score, labels in tried if score >= enough * best)
    centres = np.stack([chosen[labels == k].mean(0) for k in range(labels.max() + 1)])
    return ((points[:, None] - centres[None]) ** 2).sum(2).argmin(1), score


def _names_from_start(automaton: Automaton) -> np.ndarray:  # [Q]
    """Numbers of the states in the order in which a walk from the start meets them, symbol by symbol."""
    met = [automaton.start]
    for state in met:  # grows as it goes
        met += [int(q) for q in dict.fromkeys(automaton.transitions[state]) if q != UNKNOWN and q not in met]
    met += [q for q in range(automaton.num_states) if q not in met]
    return np.argsort(met)


def _count_transitions(state: np.ndarray, symbols: np.ndarray, said: np.ndarray, modulus: int) -> Automaton:
    """From states [L + 1, N] before and after symbols [N, L], and what full trials were answered [N]."""
    states = int(state.max()) + 1
    counts = np.zeros((states, modulus, states), dtype=int)
    for before, after, symbol in zip(state[:-1], state[1:], symbols.T, strict=True):
        np.add.at(counts, (before, symbol, after), 1)
    support = counts.sum(2)
    transitions = np.where(support > 0, counts.argmax(2), UNKNOWN)
    votes = np.zeros((states, 3), dtype=int)
    np.add.at(votes, (state[-1], said + 1), 1)
    accept = np.where(votes.sum(1) > 0, votes.argmax(1) - 1, 0)
    return Automaton(transitions, accept, int(np.bincount(state[0]).argmax()), support, float(counts.max(2).sum() / support.sum()))


@dataclass(frozen=True)
class Agreement:
    """How often an automaton, a system and the rule give the same answer, on sequences of one length."""

    length: int
    trials: int
    network_rule: float
    automaton_rule: float
    automaton_network: float
    timesteps: int


def agreement(
    system: DynamicalSystem,
    extraction: Extraction,
    lengths: tuple[int, ...] = (1, 2, 3, 4, 5, 6, 7, 8),
    *,
    trials: int = 300,
    gap: int = 5,
    first_onset: int = 5,
    seed: int = 1,
) -> list[Agreement]:
    """Answers on new trials: random sequences of each length at random onsets.

    Where the pulses do not fit a trial, it is made longer by as many `hold` steps as needed, so that an oscillation is read at the phase
    for which its readout was trained.
    """
    out = []
    for length in lengths:
        steps = system.timesteps
        last = system.timesteps - 5  # as published: the last onset leaves room for the pulse and an answer
        while (length - 1) * gap + 1 > last - first_onset:
            steps, last = steps + extraction.hold, last + extraction.hold
        rng = np.random.default_rng([seed, length])
        every = system.modulus**length
        sequences = rng.integers(0, system.modulus, (trials, length))
        if every <= trials:  # all of them, as often as there is room
            sequences = np.array(list(itertools.product(range(system.modulus), repeat=length)))
            sequences = np.tile(sequences, (trials // every, 1))
        onsets = draw_onsets(rng, len(sequences), length, first=first_onset, window=last - first_onset, gap=gap)
        final = system.run(system.pulses(sequences, onsets, steps))[:, -1]
        said = answers(system.outputs(final).numpy())
        rule = np.where(sequences.sum(1) % system.modulus == 0, 1, -1)
        predicted = extraction.automaton.answers(sequences)
        network_rule, automaton_rule, automaton_network = (
            float((a == b).mean()) for a, b in ((said, rule), (predicted, rule), (predicted, said))
        )
        out.append(Agreement(length, len(sequences), network_rule, automaton_rule, automaton_network, steps))
    return out
