"""Systems made by hand: the published phase oscillator, an oscillator with amplitude dynamics, attractors with known answers."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.phase.systems import DynamicalSystem

# Steps of 10 ms: the published handcrafted oscillator has two cycles in its 0.5 s.
PUBLISHED_PERIOD = 25


def phase_shifts(modulus: int) -> np.ndarray:  # [K] radians
    """The ideal shift of symbol k, 2 pi k / modulus wrapped to (-pi, pi]: 0, 2 pi / 3, -2 pi / 3 for modulus 3.

    >>> phase_shifts(3).round(3).tolist()
    [0.0, 2.094, -2.094]
    """
    if modulus < 2:
        raise ValueError(f"modulus: expected at least 2, got {modulus}")
    shifts = 2 * np.pi * np.arange(modulus) / modulus
    return np.where(shifts > np.pi, shifts - 2 * np.pi, shifts)


def published_oscillation(
    sequences: np.ndarray, onsets: np.ndarray, *, modulus: int = 3, steps: int = 51, cycles: float = 2.0
) -> np.ndarray:  # [N, L], [N, L] -> [N, T]
    r"""The published handcrafted oscillator:

    .. math:: x(t) = \cos(\omega t + \phi(t)), \qquad \phi(t) = \sum_{l:\, o_l \le t} \Delta_{s_l}

    The phase jumps at the onset o_l of a symbol s_l by its share of the circle (``phase_shifts``) and is kept; nothing else
    happens to it. `steps` samples, first and last included, cover `cycles` cycles (published: 51 samples of 10 ms, two cycles).

    >>> published_oscillation(np.array([[1, 1, 1]]), np.array([[5, 12, 30]]))[0, -1].round(6)
    np.float64(1.0)
    """
    sequences, onsets = np.asarray(sequences), np.asarray(onsets)
    if sequences.shape != onsets.shape or sequences.ndim != 2:
        raise ValueError(f"onsets: expected the shape of sequences [N, L], got {list(onsets.shape)} and {list(sequences.shape)}")
    time = np.arange(steps)
    jumps = phase_shifts(modulus)[sequences]
    phase = (jumps[:, :, None] * (onsets[:, :, None] <= time)).sum(1)
    return np.cos(2 * np.pi * cycles * time / (steps - 1) + phase)


class PlanarOscillator(DynamicalSystem):
    r"""An oscillator with amplitude dynamics whose phase is moved by pulses (a Stuart-Landau oscillator, one step exactly):

    .. math:: \dot\rho = \mu\rho\,(1 - \rho^2), \qquad \dot\theta = \omega + \beta\,(1 - \rho^2) + \kappa\cdot u

    Without input it returns to the unit circle (multiplier :math:`e^{-2\mu}` per step) and turns by :math:`\omega`. A pulse of symbol k
    shifts its asymptotic phase :math:`\theta - (\beta/\mu)\log\rho` by 2 pi k / K in all, and pushes the amplitude by the factor
    ``amplitude_kick`` per step. The rates are those of `units` cells with evenly spaced preferred phases,
    tanh(2 rho cos(theta - p_j)); the linear readout is 1 for sum = 0 at the last step of a trial, and for its neighbours on the
    circle -1.

    With ``pinning`` a > 0 each step also draws the phase to the nearest of ``points`` evenly spaced ones,
    theta -> theta - a sin(n theta) / n, which with omega = 0 makes a ring of n fixed points (contraction 1 - a per step).

    Args:
        modulus: K, at least 2.
        period: steps per cycle; math.inf for omega = 0.
        mu: strength of the return to the circle, per step.
        shear: beta, radians per step: how the amplitude changes the frequency (it bends the isochrons).
        amplitude_kick: factor of the amplitude per step of a pulse.
        pinning, points: see above; 0 leaves the phase free.
        units: number of cells.
        timesteps, pulse_width, name: see ``DynamicalSystem``.

    >>> system = PlanarOscillator()
    >>> trial = system.pulses(np.array([[1, 1, 1], [1, 1, 0]]), np.array([[5, 14, 30], [5, 14, 30]]))
    >>> system.outputs(system.run(trial)[:, -1]).sign()
    tensor([ 1., -1.], dtype=torch.float64)
    """

    def __init__(
        self,
        modulus: int = 3,
        *,
        period: float = PUBLISHED_PERIOD,
        mu: float = 0.1,
        shear: float = 0.0,
        amplitude_kick: float = 1.0,
        pinning: float = 0.0,
        points: int = 0,
        units: int = 100,
        timesteps: int = 50,
        pulse_width: int = 2,
        name: str = "handcrafted oscillator",
    ) -> None:
        shifts = torch.as_tensor(phase_shifts(modulus))
        if not period > 1:
            raise ValueError(f"period: expected more than one step, got {period}")
        if not mu > 0:
            raise ValueError(f"mu: expected a positive number, got {mu}")
        if pinning and points < 1:
            raise ValueError(f"points: expected at least 1 with pinning = {pinning}, got {points}")
        if not 0 <= pinning <= 1:
            raise ValueError(f"pinning: expected a number in [0, 1], got {pinning}")
        if not amplitude_kick > 0:
            raise ValueError(f"amplitude_kick: expected a positive number, got {amplitude_kick}")
        self.name, self.timesteps, self.pulse_width = name, timesteps, pulse_width
        self.omega, self.mu, self.shear = 2 * math.pi / period, mu, shear
        self.pinning, self.points = pinning, points
        # Input channel 0 turns, channel 1 pushes the amplitude: a symbol is a row of both.
        # theta - (beta / mu) log rho advances evenly (it is the asymptotic phase): what the push takes from it is given back.
        push = math.log(amplitude_kick)
        self.symbols = torch.stack([shifts / pulse_width + shear / mu * push, torch.full_like(shifts, push)], dim=1)
        self.initial_state = torch.tensor([1.0, 0.0], dtype=torch.float64)
        self.preferred = 2 * math.pi * torch.arange(units, dtype=torch.float64) / units
        self._tuning = 2 * torch.stack([self.preferred.cos(), self.preferred.sin()])  # [2, R]
        # The answer is read where the undisturbed oscillator is at the last step.
        final = self.omega * timesteps
        weight = torch.cos(self.preferred - final)
        where = torch.tensor([final, final + 2 * math.pi / modulus])
        cycle = torch.stack([where.cos(), where.sin()], dim=1).to(torch.float64)
        own, neighbour = self.rates(cycle) @ weight
        self.readout_weight = weight * 2 / (own - neighbour)
        self.readout_bias = 1 - 2 * own / (own - neighbour)

    def step(self, states: Tensor, inputs: Tensor | None = None) -> Tensor:  # [N, 2], [N, 2] -> [N, 2]
        """The flow over one step, then the turn and push of the input."""
        x, y = states[:, 0], states[:, 1]
        squared = x * x + y * y
        # Closed solution of the amplitude equation, and of the turn that the amplitude adds: log(growth) is mu times the
        # integral of 1 - rho^2.
        decay = math.exp(-2 * self.mu)
        growth = torch.rsqrt(squared + (1 - squared) * decay)
        turn = self.omega + (self.shear / self.mu) * growth.log()
        if inputs is not None:
            turn, growth = turn + inputs[:, 0], growth * inputs[:, 1].exp()
        if self.pinning:
            angle = torch.atan2(y, x) + turn
            turn = turn - self.pinning * torch.sin(self.points * angle) / self.points
        cos, sin = torch.cos(turn), torch.sin(turn)
        return torch.stack([growth * (x * cos - y * sin), growth * (x * sin + y * cos)], dim=1)

    def run_free(self, timesteps: int, initial: Tensor | None = None) -> Tensor:  # [N, 2] -> [N, T, 2]
        """States after every step without input; without pinning all of them at once, as the flow is known for any time."""
        if self.pinning:
            return super().run_free(timesteps, initial)
        start = self._initial(initial, 1)
        return self._flow(start[:, None], torch.arange(1, timesteps + 1, dtype=start.dtype)[None])

    def relax(self, states: Tensor, timesteps: int) -> Tensor:  # [N, 2] -> [N, 2]
        """States that many steps later, without input."""
        if self.pinning:
            return super().relax(states, timesteps)
        return self._flow(states, states.new_full((), timesteps))

    def _flow(self, states: Tensor, steps: Tensor) -> Tensor:  # [..., 2], [...] -> [..., 2]
        x, y = states[..., 0], states[..., 1]
        squared = x * x + y * y
        growth = torch.rsqrt(squared + (1 - squared) * torch.exp(-2 * self.mu * steps))
        turn = self.omega * steps + (self.shear / self.mu) * growth.log()
        cos, sin = torch.cos(turn), torch.sin(turn)
        return torch.stack([growth * (x * cos - y * sin), growth * (x * sin + y * cos)], dim=-1)

    def rates(self, states: Tensor) -> Tensor:  # [..., 2] -> [..., R]
        """Cells with preferred phases."""
        return torch.tanh(states @ self._tuning)

    def readout(self, rates: Tensor) -> Tensor:  # [..., R] -> [...]
        """Projection on the phase of sum = 0 at the last step."""
        return rates @ self.readout_weight + self.readout_bias


class LineAttractor(DynamicalSystem):
    r"""A counter: a position that every pulse moves on by its symbol and nothing brings back,

    .. math:: x_t = x_{t-1} + \kappa\cdot u_t - a\,\sin(2\pi x_{t-1}) / 2\pi

    with a second, decaying dimension. With a = 0 every position is a fixed point (a line attractor); with a > 0 whole numbers
    are stable. It solves modulo-K sums of a few symbols by counting: the rates are ramps along the line, and the readout reads 1 at
    multiples of K up to ``longest`` and -1 elsewhere. Beyond that it fails, as its automaton shows: it has no cycle.

    >>> system = LineAttractor()
    >>> trial = system.pulses(np.array([[1, 1, 1], [1, 1, 0]]), np.array([[5, 14, 30], [5, 14, 30]]))
    >>> system.outputs(system.run(trial)[:, -1]).sign()
    tensor([ 1., -1.], dtype=torch.float64)
    """

    def __init__(
        self,
        modulus: int = 3,
        *,
        pinning: float = 0.0,
        longest: int = 6,
        timesteps: int = 50,
        pulse_width: int = 2,
        name: str = "line attractor",
    ) -> None:
        if modulus < 2:
            raise ValueError(f"modulus: expected at least 2, got {modulus}")
        if not 0 <= pinning <= 1:
            raise ValueError(f"pinning: expected a number in [0, 1], got {pinning}")
        self.name, self.timesteps, self.pulse_width, self.pinning = name, timesteps, pulse_width, pinning
        # An odd symbol stops half way, on the unstable point between two stable ones, for one step: nothing moves it there.
        self.symbols = torch.arange(modulus, dtype=torch.float64)[:, None] / pulse_width
        self.initial_state = torch.tensor([0.0, 1.0], dtype=torch.float64)
        self._centres = torch.arange(0.0, longest + 1, dtype=torch.float64)
        positions = torch.arange(0, longest + 1, dtype=torch.float64)
        wanted = torch.where(positions % modulus == 0, 1.0, -1.0).to(torch.float64)
        states = torch.stack([positions, torch.zeros_like(positions)], dim=1)
        self.readout_weight = torch.linalg.pinv(self.rates(states)) @ wanted

    def step(self, states: Tensor, inputs: Tensor | None = None) -> Tensor:  # [N, 2], [N, 1] -> [N, 2]
        """One step of the counter."""
        position = states[:, 0] - self.pinning * torch.sin(2 * math.pi * states[:, 0]) / (2 * math.pi)
        if inputs is not None:
            position = position + inputs[:, 0]
        return torch.stack([position, 0.8 * states[:, 1]], dim=1)

    def rates(self, states: Tensor) -> Tensor:  # [..., 2] -> [..., R]
        """Ramps along the line, and the decaying dimension."""
        ramps = torch.tanh((states[..., :1] - self._centres) / 3)
        return torch.cat([ramps, states[..., 1:]], dim=-1)

    def readout(self, rates: Tensor) -> Tensor:  # [..., R] -> [...]
        """Linear in the ramps."""
        return rates @ self.readout_weight
