"""Local stability of dynamics by products of the state Jacobian with vectors: exponents, spectral radius, largest gain."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rnndyn_fast.graph.spec.network import Norm
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.program import rollout
from rnndyn_fast.reference.rollout import Maps, term, update_area

Step = Callable[[Tensor], Tensor]  # [N, D] -> [N, D], sample by sample


class StateStep:
    """One time step of a network on constant inputs, as a function of its state: ``h[t + 1] = F(h[t])``, [N, D] -> [N, D].

    The state is everything that a step reads of the step before, in one vector per image. F is the reference rollout's step, term by
    term, at any t from which all areas have a state; so ``torch.func.jvp`` and ``vjp`` of it are those of the rollout.

    Args:
        net: any network whose delays are at most one step, without batch norms (which differ from step to step).
        inputs: [N, C, H, W] each, constant in time.

    Raises:
        ValueError: the network has longer delays, batch norms, inputs with frames, or no recurrence.

    Differentiable: the state. Forward-mode: yes.
    """

    def __init__(self, net: RecurrentNetwork, *inputs: Tensor) -> None:
        now = net.current()
        network = now.network
        delays = {network.delay(c) for c in network.connections}
        if max(delays) > 1:
            raise ValueError(f"net: expected delays of at most one step, got {sorted(delays)}")
        if any(area.norm is Norm.BATCH for area in network.areas) or any(node.frames for node in network.inputs):
            raise ValueError("net: expected no batch norms and no inputs with frames: with them no two steps are the same")
        self.net, self.network, self.inputs = net, network, inputs
        self.parameters = now.parameters
        given = {node.name for node in network.inputs}
        keys = {(c.source, c.state) for c in network.connections if network.delay(c) == 1 and c.source not in given}
        if not keys:
            raise ValueError(f"net: network {network.name!r} has no connection that reads the step before")
        self.keys = sorted(keys, key=lambda key: (key[0], key[1] or ""))
        self.shapes = [tuple(network.shapes[area]) for area, _ in self.keys]
        self.sizes = [int(torch.Size(shape).numel()) for shape in self.shapes]

    @torch.no_grad()
    def state(self, timesteps: int) -> Tensor:  # -> [N, D]
        """The state after so many steps of the network's rollout."""
        names = [area if state is None else f"{area}:{state}" for area, state in self.keys]
        states = rollout(self.network, timesteps, self.inputs, self.parameters, names, backend="reference")
        return torch.cat([values[-1].flatten(1) for values in states], dim=1)

    def __call__(self, state: Tensor) -> Tensor:  # [N, D] -> [N, D]
        """The state one step later."""
        parts = [part.reshape(-1, *shape) for part, shape in zip(state.split(self.sizes, 1), self.shapes, strict=True)]
        before = dict(zip(self.keys, parts, strict=True))
        maps: dict[str, Maps] = {}
        for node, x in zip(self.network.inputs, self.inputs, strict=True):
            maps[node.name] = {None: x if node.off_at is None else torch.full_like(x, node.off_value)}
        for area in self.network.areas:
            terms = []
            for c in self.network.connections:
                if c.target != area.name:
                    continue
                late = self.network.delay(c) == 1 and c.source not in {node.name for node in self.network.inputs}
                source = before[c.source, c.state] if late else maps[c.source][c.state]
                terms.append((c, term(self.network, c, source, self.parameters)))
            updated = update_area(self.network, area, 0, terms, self.parameters, None)
            assert updated is not None
            maps[area.name] = updated
        return torch.cat([maps[area][name].flatten(1) for area, name in self.keys], dim=1)


def _frame(states: Tensor, count: int, seed: int) -> Tensor:  # [N, D] -> [N, D, count]
    generator = torch.Generator().manual_seed(seed)
    raw = torch.randn(*states.shape, count, generator=generator, dtype=torch.float64).to(states.device, states.dtype)
    return torch.linalg.qr(raw)[0]


def _check(states: Tensor, **at_least_one: int) -> None:
    if states.dim() != 2 or not states.is_floating_point():
        raise ValueError(f"states: expected floating point [N, D], got {list(states.shape)} of {states.dtype}")
    for name, value in at_least_one.items():
        if value < 1:
            raise ValueError(f"{name}: expected at least 1, got {value}")


@torch.no_grad()
def local_lyapunov(
    step: Step,
    states: Tensor,  # [N, D]
    *,
    steps: int = 10,
    count: int = 1,
    warm: int = 0,
    seed: int = 0,
) -> Tensor:  # -> [N, count]
    r"""Leading Lyapunov exponents over a stretch of every trajectory, per step, largest first.

    An orthonormal frame Q of `count` tangent vectors is carried along, :math:`J_t Q_t = Q_{t+1} R_{t+1}` (products by forward mode), and
    :math:`\lambda_k = \frac1S \sum_t \ln |R_{t,kk}|` over S = `steps` steps after `warm` ones, in which the frame turns into the leading
    directions. Below 0: neighbours approach, so the stretch contracts; above 0: they part. Local (finite-time): the limit of large S is the
    Lyapunov spectrum.

    Args:
        step: the dynamics, sample by sample, e.g. a `StateStep`.
        states: where the stretch begins.
        seed: of the first frame.

    Raises:
        ValueError: a shape or number is wrong.

    Deterministic: yes on the CPU. Memory: `count` states.
    Source: Benettin, Galgani, Giorgilli & Strelcyn (1980), Meccanica 15:9; of networks: Engelken, Wolf & Abbott (2023), Phys. Rev. Res. 5.

    >>> found = local_lyapunov(lambda x: x * torch.tensor([0.5, 2.0]), torch.ones(1, 2), steps=50, count=2, warm=20)
    >>> found.exp().round(decimals=3).tolist()
    [[2.0, 0.5]]
    """
    _check(states, steps=steps, count=count)
    if warm < 0:
        raise ValueError(f"warm: expected at least 0, got {warm}")
    count = min(count, states.shape[1])
    frame, growth = _frame(states, count, seed), states.new_zeros(len(states), count)
    for k in range(warm + steps):
        columns = [torch.func.jvp(step, (states,), (frame[..., j].contiguous(),)) for j in range(count)]
        frame, triangle = torch.linalg.qr(torch.stack([column[1] for column in columns], dim=2))
        if k >= warm:
            growth += triangle.diagonal(dim1=1, dim2=2).abs().clamp_min(torch.finfo(states.dtype).tiny).log()
        states = columns[0][0]
    return torch.sort(growth / steps, dim=1, descending=True)[0]


@torch.no_grad()
def spectral_radius(
    step: Step,
    states: Tensor,  # [N, D]
    *,
    iterations: int = 100,
    seed: int = 0,
) -> Tensor:  # -> [N]
    r"""Spectral radius of the Jacobian J of one step at each state, by power iteration with products J v (forward mode).

    The growth per iteration, averaged geometrically over the second half: :math:`(\lVert J^n v \rVert / \lVert J^{n/2} v
    \rVert)^{2/n}`, which converges for complex pairs too, where single quotients go up and down. Below 1 at a fixed point: it is stable.

    Raises ValueError where a shape or number is wrong. Deterministic: yes on the CPU. Memory: a few states.
    Source: Gelfand's formula; power iteration: Golub & Van Loan, Matrix Computations, 7.3.
    """
    _check(states, iterations=iterations)
    vector, growth = _frame(states, 1, seed)[..., 0].contiguous(), states.new_zeros(len(states))
    first = iterations // 2
    for k in range(iterations):
        vector = torch.func.jvp(step, (states,), (vector,))[1]
        size = torch.linalg.vector_norm(vector, dim=1, keepdim=True).clamp_min(torch.finfo(states.dtype).tiny)
        vector = vector / size
        if k >= first:
            growth += size[:, 0].log()
    return (growth / (iterations - first)).exp()


def largest_gain(
    step: Step,
    states: Tensor,  # [N, D]
    *,
    iterations: int = 50,
    seed: int = 0,
) -> Tensor:  # -> [N]
    r"""Largest singular value of the Jacobian of one step at each state: the most that a small deviation can grow in it.

    Power iteration on :math:`J^\top J`, with products J v by forward mode and :math:`J^\top u` by reverse mode. At least the spectral
    radius, and above 1 in non-normal dynamics that are stable all the same.

    Raises ValueError where a shape or number is wrong. Deterministic: yes on the CPU. Memory: one step's graph.
    Source: Golub & Van Loan, Matrix Computations, 8.6.
    """
    _check(states, iterations=iterations)
    states = states.detach()
    vector = _frame(states, 1, seed)[..., 0].contiguous()
    gain = states.new_zeros(len(states))
    pull = torch.func.vjp(step, states)[1]
    for _ in range(iterations):
        with torch.no_grad():
            image = torch.func.jvp(step, (states,), (vector,))[1]
        gain = torch.linalg.vector_norm(image, dim=1)
        (vector,) = pull(image)
        size = torch.linalg.vector_norm(vector, dim=1, keepdim=True)
        vector = (vector / size.clamp_min(torch.finfo(states.dtype).tiny)).detach()
    return gain.detach()
