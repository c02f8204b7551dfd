"""Continuous-time recurrent networks, many at once, as a module."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from rnndyn_fast.nn.tracing import NotScriptable, refuse_tracers
from rnndyn_fast.ops.ctrnn import check_model_values, ctrnn
from rnndyn_fast.reference.ctrnn import Activation, ctrnn_step, rates

# A normal cut at two standard deviations has this standard deviation.
_TRUNCATED_STD = 0.87962566103423978
# Published names of the parameters, and ours.
PUBLISHED_NAMES = {"W_rec": "w_rec", "b_rec": "b_rec", "W_in": "w_in", "W_out": "w_out", "b_out": "b_out"}
PARAMETERS = tuple(PUBLISHED_NAMES.values())


class CTRNN(NotScriptable, nn.Module):
    r"""M networks of the same size, each with its own weights, leak, noise and activation.

    .. math:: h_t = (1 - \alpha) h_{t-1} + \alpha\,(f(h_{t-1}) W + b + u_t V + \sigma \xi_t), \quad r_t = f(h_t), \quad z_t = r_t w + c

    Parameters, with row vectors and the model axis in front: ``w_rec`` [M, H, H] (``w_rec[m, j, i]`` from j to i), ``b_rec`` [M, H],
    ``w_in`` [M, I, H], ``w_out`` [M, H, O], ``b_out`` [M, O]. Buffers: ``alpha`` and ``noise_std`` [M], ``h0`` [M, H], all ones.

    Args:
        num_models, inputs, hidden, outputs: M, I, H, O.
        alpha: time step over time constant, in (0, 1]; one value, or one per model. So are the next two.
        noise_std: sigma, inside the leak's bracket.
        activation: f.
        seeds: initialisation, one per model: a truncated Glorot normal as published, zero biases. A network's weights depend on its
            own seed alone. None: seeds are drawn from PyTorch's generator.
        backend: "native", "reference" or None (native where it can run).

    Raises:
        ValueError, TypeError: naming the argument, what was expected, what came.

    Source: Murray, arXiv 2310.07908.

    >>> net = CTRNN(2, inputs=3, hidden=8, outputs=1, alpha=[1.0, 0.5])
    >>> outputs, rates = net(torch.zeros(2, 4, 10, 3))
    >>> outputs.shape, rates.shape
    (torch.Size([2, 4, 10, 1]), torch.Size([2, 4, 10, 8]))
    """

    def __init__(
        self,
        num_models: int,
        inputs: int,
        hidden: int,
        outputs: int = 1,
        *,
        alpha: float | Sequence[float] | Tensor = 1.0,
        noise_std: float | Sequence[float] | Tensor = 0.0,
        activation: Activation | str | Sequence[Activation | str] = Activation.TANH,
        seeds: Sequence[int] | None = None,
        backend: str | None = None,
    ) -> None:
        super().__init__()
        for name, size in (("num_models", num_models), ("inputs", inputs), ("hidden", hidden), ("outputs", outputs)):
            if isinstance(size, bool) or not isinstance(size, int):
                raise TypeError(f"{name}: expected an integer, got {type(size).__name__}")
            if size < 1:
                raise ValueError(f"{name}: expected at least 1, got {size}")
        self.backend = backend
        self.activations = _activations(activation, num_models)
        alpha, noise_std = _per_model("alpha", alpha, num_models), _per_model("noise_std", noise_std, num_models)
        check_model_values(alpha, noise_std)
        self.register_buffer("alpha", alpha)
        self.register_buffer("noise_std", noise_std)
        self.register_buffer("h0", torch.ones(num_models, hidden))
        self.alpha: Tensor
        self.noise_std: Tensor
        self.h0: Tensor
        self.w_rec = nn.Parameter(torch.empty(num_models, hidden, hidden))
        self.b_rec = nn.Parameter(torch.empty(num_models, hidden))
        self.w_in = nn.Parameter(torch.empty(num_models, inputs, hidden))
        self.w_out = nn.Parameter(torch.empty(num_models, hidden, outputs))
        self.b_out = nn.Parameter(torch.empty(num_models, outputs))
        self.reset_parameters(seeds)

    @property
    def num_models(self) -> int:
        """M."""
        return self.w_rec.shape[0]

    @torch.no_grad()
    def reset_parameters(self, seeds: Sequence[int] | None = None) -> None:
        """Initialise: weights of variance 2 / (fan_in + fan_out), from a normal that is cut at two of its standard deviations."""
        if seeds is None:
            seeds = torch.randint(2**62, (self.num_models,)).tolist()
        if len(seeds) != self.num_models:
            raise ValueError(f"seeds: expected {self.num_models}, one per model, got {len(seeds)}")
        for m, seed in enumerate(seeds):
            generator = torch.Generator().manual_seed(int(seed))
            for weight in (self.w_rec[m], self.w_in[m], self.w_out[m]):
                std = math.sqrt(2 / (weight.shape[0] + weight.shape[1])) / _TRUNCATED_STD
                drawn = torch.empty(weight.shape)
                nn.init.trunc_normal_(drawn, std=std, a=-2 * std, b=2 * std, generator=generator)
                weight.copy_(drawn)
        self.b_rec.zero_()
        self.b_out.zero_()

    @classmethod
    def from_published(
        cls,
        arrays: Mapping[str, Any],
        prefix: str = "",
        *,
        alpha: float | None = None,
        noise_std: float | None = None,
        activation: Activation | str = Activation.TANH,
        backend: str | None = None,
    ) -> CTRNN:
        """One network from arrays under the published names ``W_rec``, ``b_rec``, ``W_in``, ``W_out``, ``b_out``, after ``prefix``.

        ``alpha`` and ``noise_std`` (None) are those of the arrays ``alpha`` and ``noise_const`` where there are such (noise: else 0).
        Parameters keep their float dtype.
        """
        missing = [prefix + name for name in PUBLISHED_NAMES if prefix + name not in arrays]
        if missing:
            raise ValueError(f"arrays: {missing} are missing")
        found = {ours: torch.as_tensor(np.asarray(arrays[prefix + name])) for name, ours in PUBLISHED_NAMES.items()}
        if alpha is None:
            stem = prefix.removesuffix("init_")
            if stem + "alpha" not in arrays:
                raise ValueError(f"alpha: expected a number, as the arrays hold no {stem}alpha")
            alpha = float(np.asarray(arrays[stem + "alpha"]))
        if noise_std is None:
            noise_std = float(np.asarray(arrays[prefix + "noise_const"])) if prefix + "noise_const" in arrays else 0.0
        inputs, hidden = found["w_in"].shape
        net = cls(
            1, inputs, hidden, found["w_out"].shape[1], alpha=alpha, noise_std=noise_std, activation=activation, seeds=[0], backend=backend
        ).to(found["w_rec"].dtype)
        net.load_state_dict({name: value[None] for name, value in found.items()}, strict=False)
        return net

    @torch.no_grad()
    def select(self, models: Sequence[int] | Tensor) -> CTRNN:
        """These models as a module of their own (a copy), in this order."""
        index = torch.as_tensor(models, dtype=torch.int64)
        if index.dim() != 1 or len(index) == 0 or int(index.min()) < 0 or int(index.max()) >= self.num_models:
            raise ValueError(f"models: expected indices in [0, {self.num_models}), at least one, got {models}")
        _, inputs, hidden = self.w_in.shape
        chosen = [self.activations[i] for i in index.tolist()]
        net = CTRNN(len(index), inputs, hidden, self.w_out.shape[2], activation=chosen, seeds=[0] * len(index), backend=self.backend)
        net = net.to(self.w_rec.dtype)
        net.load_state_dict({name: value[index] for name, value in self.state_dict().items()})
        return net

    @classmethod
    def stack(cls, nets: Sequence[CTRNN]) -> CTRNN:
        """The models of several modules of the same sizes in one (a copy)."""
        if not nets:
            raise ValueError("nets: expected at least one, got none")
        for i, net in enumerate(nets):
            if net.w_in.shape[1:] != nets[0].w_in.shape[1:] or net.w_out.shape[1:] != nets[0].w_out.shape[1:]:
                raise ValueError(f"nets[{i}]: expected the sizes of nets[0], {nets[0].extra_repr()}, got {net.extra_repr()}")
        _, inputs, hidden = nets[0].w_in.shape
        chosen = [a for net in nets for a in net.activations]
        result = cls(
            len(chosen), inputs, hidden, nets[0].w_out.shape[2], activation=chosen, seeds=[0] * len(chosen), backend=nets[0].backend
        ).to(nets[0].w_rec.dtype)
        states = [net.state_dict() for net in nets]
        result.load_state_dict({name: torch.cat([state[name] for state in states]) for name in states[0]})
        return result

    def forward(
        self,
        inputs: Tensor,  # [M, N, T, I] or [N, T, I]
        noise_seeds: int | Sequence[int] | Tensor | None = None,
        *,
        stream: int = 0,
        first_trial: int = 0,
        h0: Tensor | None = None,  # [M, H] or [M, N, H]
    ) -> tuple[Tensor, Tensor]:
        """Run the networks through a sequence.

        Args:
            inputs: per model, or shared by all of them.
            noise_seeds: one per model, or one for all (models then still draw different numbers); None: no noise, whatever
                ``noise_std`` is.
            stream, first_trial: which numbers of a seed are drawn, see :func:`rnndyn_fast.ops.ctrnn.ctrnn`.
            h0: states to start from; None: the module's, all ones.

        Returns: outputs [M, N, T, O] and rates [M, N, T, H].
        """
        rates_, _ = self._run(inputs, noise_seeds, stream, first_trial, h0, with_states=False)
        return self.read_out(rates_), rates_

    def states(
        self,
        inputs: Tensor,  # [M, N, T, I] or [N, T, I]
        noise_seeds: int | Sequence[int] | Tensor | None = None,
        *,
        stream: int = 0,
        first_trial: int = 0,
        h0: Tensor | None = None,  # [M, H] or [M, N, H]
    ) -> tuple[Tensor, Tensor]:
        """Rates and states after each step, both [M, N, T, H]; arguments as in ``forward``."""
        rates_, states = self._run(inputs, noise_seeds, stream, first_trial, h0, with_states=True)
        assert states is not None
        return rates_, states

    def _run(
        self,
        inputs: Tensor,  # [M, N, T, I] or [N, T, I]
        noise_seeds: int | Sequence[int] | Tensor | None,
        stream: int,
        first_trial: int,
        h0: Tensor | None,  # [M, H] or [M, N, H]
        *,
        with_states: bool,
    ) -> tuple[Tensor, Tensor | None]:
        refuse_tracers(type(self).__name__, (inputs, h0))
        if isinstance(inputs, Tensor) and inputs.dim() == 3:
            inputs = inputs.expand(self.num_models, *inputs.shape)
        if isinstance(noise_seeds, int):
            noise_seeds = [noise_seeds + m for m in range(self.num_models)]
        return ctrnn(
            inputs,
            self.w_rec,
            self.b_rec,
            self.w_in,
            self.h0 if h0 is None else h0,
            self.alpha,
            self.noise_std,
            self.activations,
            noise_seeds,
            stream=stream,
            first_trial=first_trial,
            with_states=with_states,
            backend=self.backend,
        )

    def step(self, state: Tensor, inputs: Tensor) -> Tensor:  # [M, N, H], [M, N, I]
        """The noise-free map h -> F(h, u) of one step, [M, N, H], in plain PyTorch: for Jacobians of any kind."""
        return ctrnn_step(state, inputs, self.w_rec, self.b_rec, self.w_in, self.alpha, self.activations)

    def rates(self, state: Tensor) -> Tensor:  # [M, ...]
        """f of states."""
        return rates(state, self.activations)

    def read_out(self, rates: Tensor) -> Tensor:  # [M, N, T, H]
        """Outputs of rates: [M, N, T, O]."""
        return rates @ self.w_out[:, None] + self.b_out[:, None, None]

    def extra_repr(self) -> str:
        """Shown by ``print(net)``."""
        _, inputs, hidden = self.w_in.shape
        return f"num_models={self.num_models}, inputs={inputs}, hidden={hidden}, outputs={self.w_out.shape[2]}, backend={self.backend!r}"


def _activations(value: Activation | str | Sequence[Activation | str], num_models: int) -> tuple[Activation, ...]:
    several: Sequence[Activation | str] = [value] * num_models if isinstance(value, Activation | str) else value
    if len(several) != num_models:
        raise ValueError(f"activation: expected one, or {num_models} (one per model), got {len(several)}")
    try:
        return tuple(Activation(a) for a in several)
    except ValueError as error:
        raise ValueError(f"activation: expected one of {', '.join(a.value for a in Activation)}: {error}") from None


def _per_model(name: str, value: float | Sequence[float] | Tensor, num_models: int) -> Tensor:
    result = torch.as_tensor(value, dtype=torch.get_default_dtype())
    if result.dim() == 0:
        return result.repeat(num_models)
    if tuple(result.shape) != (num_models,):
        raise ValueError(f"{name}: expected one value, or [M] = [{num_models}], got {list(result.shape)}")
    return result.clone()
