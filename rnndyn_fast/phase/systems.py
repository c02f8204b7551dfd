"""Dynamical systems that take symbols as pulses: what every analysis of this package runs on."""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rnndyn_fast.file_io import reads
from rnndyn_fast.nn import CTRNN


class DynamicalSystem(ABC):
    r"""A discrete-time system with inputs, rates and one readout:

    .. math:: h_t = F(h_{t-1}, u_t), \qquad r_t = r(h_t), \qquad z_t = g(r_t)

    Symbol k is a pulse: ``symbols[k]`` is added to the input for ``pulse_width`` steps from its onset. Analyses need no more than
    what this class declares, so a trained network and a handcrafted system go through the same code.

    Attributes:
        name: for tables and figures.
        symbols: [K, I] input during a pulse of each symbol; symbol k stands for the number k modulo K.
        initial_state: [H].
        timesteps: T of a trial; the answer is read at its last step.
        pulse_width: steps.
    """

    name: str
    symbols: Tensor  # [K, I]
    initial_state: Tensor  # [H]
    timesteps: int = 50
    pulse_width: int = 2

    @abstractmethod
    def step(self, states: Tensor, inputs: Tensor | None = None) -> Tensor:  # [N, H], [N, I] -> [N, H]
        """F; no input is zero input."""

    @abstractmethod
    def rates(self, states: Tensor) -> Tensor:  # [..., H] -> [..., R]
        """What is recorded of the system, and what the readout reads."""

    @abstractmethod
    def readout(self, rates: Tensor) -> Tensor:  # [..., R] -> [...]
        """The answer: above 0.5 accept, below -0.5 reject."""

    def jacobian(self, states: Tensor) -> Tensor:  # [N, H] -> [N, H, H]
        """Exact derivative of one step without input: element [i, j] is dF_i / dh_j."""
        jacobian = torch.func.vmap(torch.func.jacfwd(lambda state: self.step(state[None])[0]))
        return jacobian(states)

    @property
    def modulus(self) -> int:
        """K, the number of symbols."""
        return len(self.symbols)

    def run(self, inputs: Tensor, initial: Tensor | None = None) -> Tensor:  # [N, T, I], [N, H] -> [N, T, H]
        """States after every step."""
        states = self._initial(initial, len(inputs))
        out = states.new_empty(len(states), inputs.shape[1], states.shape[1])
        with torch.no_grad():
            for t in range(inputs.shape[1]):
                states = self.step(states, inputs[:, t])
                out[:, t] = states
        return out

    def run_free(self, timesteps: int, initial: Tensor | None = None) -> Tensor:  # [N, H] -> [N, T, H]
        """States after every step without input; without ``initial``, one run from ``initial_state``."""
        states = self._initial(initial, 1)
        out = states.new_empty(len(states), timesteps, states.shape[1])
        with torch.no_grad():
            for t in range(timesteps):
                states = self.step(states)
                out[:, t] = states
        return out

    def relax(self, states: Tensor, timesteps: int) -> Tensor:  # [N, H] -> [N, H]
        """States that many steps later, without input."""
        with torch.no_grad():
            for _ in range(timesteps):
                states = self.step(states)
        return states

    def pulses(self, sequences: np.ndarray, onsets: np.ndarray, timesteps: int | None = None) -> Tensor:  # [N, L] both -> [N, T, I]
        """Inputs of trials: symbol ``sequences[n, l]`` from step ``onsets[n, l]`` on.

        Raises:
            ValueError: unequal shapes, a symbol that does not exist, a pulse that does not fit T.
        """
        steps = self.timesteps if timesteps is None else timesteps
        sequences, onsets = np.asarray(sequences), np.asarray(onsets)
        if sequences.shape != onsets.shape or sequences.ndim != 2:
            raise ValueError(f"onsets: expected the shape of sequences [N, L], got {list(onsets.shape)} and {list(sequences.shape)}")
        if sequences.size and not (sequences.min() >= 0 and sequences.max() < self.modulus):
            raise ValueError(f"sequences: expected symbols 0 to {self.modulus - 1}, got {sequences.min()} to {sequences.max()}")
        if onsets.size and not (onsets.min() >= 0 and onsets.max() + self.pulse_width <= steps):
            raise ValueError(
                f"onsets: expected pulses of {self.pulse_width} steps within T = {steps}, got onsets {onsets.min()} to {onsets.max()}"
            )
        inputs = self.symbols.new_zeros(len(sequences), steps, self.symbols.shape[1])
        rows = torch.arange(len(sequences))
        for position in range(sequences.shape[1]):
            pulse = self.symbols[torch.as_tensor(sequences[:, position])]
            for offset in range(self.pulse_width):
                inputs[rows, torch.as_tensor(onsets[:, position] + offset)] += pulse
        return inputs

    def outputs(self, states: Tensor) -> Tensor:  # [..., H] -> [...]
        """The readout of states."""
        return self.readout(self.rates(states))

    def _initial(self, initial: Tensor | None, count: int) -> Tensor:
        if initial is None:
            return self.initial_state.expand(count, -1).clone()
        if initial.dim() != 2 or initial.shape[1] != len(self.initial_state) or count not in (1, len(initial)):
            raise ValueError(f"initial: expected [N, H] = [{count}, {len(self.initial_state)}], got {list(initial.shape)}")
        return initial.to(self.initial_state.dtype)


class CTRNNSystem(DynamicalSystem):
    """One network of a ``CTRNN`` without noise, in float64.

    Args:
        net: networks; a copy is taken.
        model: which of them.
        symbols: [K, I] input of a pulse; None: one-hot times 5, as published.
        name, timesteps, pulse_width: see ``DynamicalSystem``.

    >>> CTRNNSystem(CTRNN(2, inputs=3, hidden=4), model=1).run_free(7).shape
    torch.Size([1, 7, 4])
    """

    def __init__(
        self,
        net: CTRNN,
        model: int = 0,
        *,
        symbols: np.ndarray | Tensor | None = None,
        name: str = "network",
        timesteps: int = 50,
        pulse_width: int = 2,
    ) -> None:
        if net.w_out.shape[2] != 1:
            raise ValueError(f"net: expected one output, got {net.w_out.shape[2]}")
        self.name, self.timesteps, self.pulse_width = name, timesteps, pulse_width
        self.net = net.select([model]).to("cpu", torch.float64).requires_grad_(False)
        channels = self.net.w_in.shape[1]
        chosen = 5 * torch.eye(channels) if symbols is None else torch.as_tensor(symbols)
        if chosen.dim() != 2 or chosen.shape[1] != channels:
            raise ValueError(f"symbols: expected [K, I] with I = {channels}, got {list(chosen.shape)}")
        self.symbols = chosen.to(torch.float64)
        self.initial_state = self.net.h0[0]

    def step(self, states: Tensor, inputs: Tensor | None = None) -> Tensor:  # [N, H], [N, I] -> [N, H]
        """One step of the network."""
        drive = states.new_zeros(len(states), self.symbols.shape[1]) if inputs is None else inputs
        return self.net.step(states[None], drive[None])[0]

    def jacobian(self, states: Tensor) -> Tensor:  # [N, H] -> [N, H, H]
        """(1 - alpha) I + alpha W^T diag(f'(h))."""
        slope = torch.func.jvp(self.rates, (states,), (torch.ones_like(states),))[1]
        alpha = self.net.alpha[0]
        out = alpha * self.net.w_rec[0].T * slope[:, None, :]
        out.diagonal(dim1=1, dim2=2).add_(1 - alpha)
        return out

    def run(self, inputs: Tensor, initial: Tensor | None = None) -> Tensor:  # [N, T, I], [N, H] -> [N, T, H]
        """States after every step, the whole sequence in one call."""
        states = self._initial(initial, len(inputs))
        with torch.no_grad():
            return self.net.states(inputs[None], h0=states[None])[1][0]

    def run_free(self, timesteps: int, initial: Tensor | None = None) -> Tensor:  # [N, H] -> [N, T, H]
        """States after every step without input, the whole sequence in one call."""
        count = 1 if initial is None else len(initial)
        # One row of zeros, seen N times T times.
        return self.run(self.symbols.new_zeros(1, 1, self.symbols.shape[1]).expand(count, timesteps, -1), initial)

    def relax(self, states: Tensor, timesteps: int) -> Tensor:  # [N, H] -> [N, H]
        """States that many steps later, without input, in runs short enough not to keep all of them."""
        for first in range(0, timesteps, 256):
            states = self.run_free(min(256, timesteps - first), states)[:, -1]
        return states

    def rates(self, states: Tensor) -> Tensor:  # [..., H] -> [..., H]
        """f(h)."""
        return self.net.rates(states[None])[0]

    def readout(self, rates: Tensor) -> Tensor:  # [..., H] -> [...]
        """r w + c."""
        return (rates @ self.net.w_out[0] + self.net.b_out[0])[..., 0]


@reads("file of networks")
def load_npz(path: str | os.PathLike[str], prefix: str = "", name: str | None = None) -> CTRNNSystem:
    """A network from a file with the published names W_rec, b_rec, W_in, W_out, b_out and alpha under ``prefix``.

    Optional beside them: activation (default tanh), and the pulses of the symbols as symbols or colour_vectors_GPR (there green,
    purple, red become 1, 2, 0, by which SET is sum = 0 mod 3).

    Raises:
        FileNotFoundError, ValueError: no such file; something is missing.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"path: expected a file of a network, found no file {path}")
    with np.load(path) as file:
        arrays = {key: file[key] for key in file.files if key.startswith(prefix)}
    symbols = arrays.get(f"{prefix}symbols")
    if f"{prefix}colour_vectors_GPR" in arrays:
        symbols = arrays[f"{prefix}colour_vectors_GPR"][[2, 0, 1]]
    net = CTRNN.from_published(arrays, prefix, activation=str(arrays.get(f"{prefix}activation", "tanh")))
    return CTRNNSystem(net, symbols=symbols, name=name or f"{Path(path).stem}{':' + prefix.strip('_') if prefix else ''}")
