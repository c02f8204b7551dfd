"""Whether training is well: norms and dead units by area and time step, norms of gradients by area, and where NaN and infinity begin."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from rnndyn_fast.graph import Network
from rnndyn_fast.job_device import in_precision
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.train.objective import loss_over_time

if TYPE_CHECKING:
    from rnndyn_fast.train.state import State

FAILURE = "failure.pt"
MEASURED_IMAGES = 16


def areas_of_parameters(network: Network, names: list[str]) -> dict[str, str]:
    """The area that each parameter belongs to: that of the connection's target, or of the norm or cell; the readout's is "readout". A
    published parameter that the spec does not use belongs to the area that its name begins with."""
    owners: dict[str, str] = {}
    for c in network.connections:
        owners |= {name.rpartition(".")[0]: c.target for name in (*c.weights, *c.biases)}
    for area in network.areas:
        owners |= dict.fromkeys(network.norm_prefixes(area), area.name)
        if area.cell_parameter is not None:
            owners[area.cell_parameter] = area.name
    if network.readout is not None and network.readout.parameter is not None:
        owners[network.readout.parameter] = "readout"
    found = {}
    for name in names:
        prefix = name.rpartition(".")[0]
        while prefix and prefix not in owners:
            prefix = prefix.rpartition(".")[0]
        found[name] = owners.get(prefix, name.partition(".")[0])
    return found


def gradient_norms(net: RecurrentNetwork, norms: Tensor) -> dict[str, float]:
    """Norm of the gradient by area, and of "all" parameters, from norms [parameters] in the network's order."""
    squares: dict[str, float] = {}
    names = [name for name, _ in net.named_parameters()]
    owner = areas_of_parameters(net.network, names)
    for name, square in zip(names, norms.cpu().double().square().tolist(), strict=True):
        squares[owner[name]] = squares.get(owner[name], 0.0) + square
    squares["all"] = sum(squares.values())
    return {name: square**0.5 for name, square in squares.items()}


def activity(
    net: RecurrentNetwork,
    images: Tensor,  # [N, C, H, W], normalised
) -> dict[str, dict[str, list[float]]]:
    """By area and time step: "norm", the mean over images of the L2 norm of an area's states, and "dead", the share of its channels that
    are 0 everywhere in all images. Steps before an area's first state are NaN."""
    names = tuple(area.name for area in net.network.areas)
    with torch.inference_mode():
        states = net.run(images, record=names)[-1]
    found: dict[str, dict[str, list[float]]] = {"norm": {}, "dead": {}}
    for name in names:
        state = states[name].float()  # [T', N, C, H, W]
        before = [float("nan")] * (net.timesteps - len(state))
        found["norm"][name] = before + state.flatten(2).norm(dim=2).mean(1).tolist()
        found["dead"][name] = before + (state == 0).all(dim=4).all(dim=3).all(dim=1).float().mean(1).tolist()
    return found


@dataclass(frozen=True)
class Origin:
    """Where what is not finite begins."""

    what: str  # "state", "answer", "loss", "gradient", or "nothing"
    area: str = ""
    step: int | None = None

    def __str__(self) -> str:
        if self.what == "nothing":
            return "all is finite when the batch is computed again"
        where = (f" of {self.area}" if self.area else "") + (f" at time step {self.step}" if self.step is not None else "")
        return f"first not finite: the {self.what}{where}"


def find_origin(state: State, images: Tensor, labels: Tensor) -> Origin:
    """Where the first value that is not finite appears in a training step with a prepared batch; changes nothing.

    States are looked at by time step and, within one, by area; then answers; then the loss; then gradients of the loss of each time step
    alone, of which the last area in the network's order is named, since gradients run backwards.
    """
    net = state.net
    buffers = [(buffer, buffer.clone()) for buffer in net.buffers()]
    training = net.training
    try:
        net.train()
        return _find(state, net, images, labels)
    finally:
        net.train(training)
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _find(state: State, net: RecurrentNetwork, images: Tensor, labels: Tensor) -> Origin:
    names = tuple(area.name for area in net.network.areas)
    with torch.no_grad(), in_precision(state.config.precision, state.device):
        log_probs, states = net.run(images, record=names)
        begins = {name: net.timesteps - len(states[name]) for name in names}
        for t in range(net.timesteps):
            for name in names:
                if t >= begins[name] and not states[name][t - begins[name]].isfinite().all():
                    return Origin("state", name, t)
        first = net.timesteps - len(log_probs)
        for t, answer in enumerate(log_probs):
            if not answer.isfinite().all():
                return Origin("answer", "readout", first + t)
        if not state.loss(log_probs, labels).isfinite():
            return Origin("loss")
    parameters = dict(net.named_parameters())
    owner = areas_of_parameters(net.network, list(parameters))
    order = [*names, "readout"]
    for t in range(len(log_probs)):
        with in_precision(state.config.precision, state.device):
            answer = net.run(images)[t : t + 1]
            loss = loss_over_time(answer, labels, label_smoothing=state.config.label_smoothing, class_weights=state.class_weights)
        grads = torch.autograd.grad(loss, list(parameters.values()), allow_unused=True)
        bad = [owner[name] for name, grad in zip(parameters, grads, strict=True) if grad is not None and not grad.isfinite().all()]
        if bad:
            return Origin("gradient", max(bad, key=lambda name: order.index(name) if name in order else -1), first + t)
    return Origin("nothing")


def keep_failure(state: State, images: Tensor, labels: Tensor) -> Origin:
    """Write ``failure.pt``: the state before the step, and the batch of all processes; the first process finds the origin, for all."""
    parts = [part for part in state.group.all_of((images.cpu(), labels.cpu())) if len(part[1])]
    images, labels = (torch.cat([part[k] for part in parts]) for k in (0, 1))
    origin = Origin("nothing")
    if state.group.rank == 0:
        origin = find_origin(state, images.to(state.device), labels.to(state.device))
        state.save(FAILURE, batch={"images": images, "labels": labels}, origin=vars(origin))
    found: Origin = state.group.all_of(origin)[0]
    return found


def replay(out: str) -> str:
    """Compute the step again that stopped the run in folder `out`; returns what is found, as text. Writes nothing.

    Raises: FileNotFoundError: the run has kept no failure.
    """
    from rnndyn_fast.data.shards import open_images
    from rnndyn_fast.job_device import choose_device
    from rnndyn_fast.train.checkpoint import read_checkpoint
    from rnndyn_fast.train.config import TrainConfig
    from rnndyn_fast.train.setup import threads, training_images
    from rnndyn_fast.train.state import State

    path = Path(out) / FAILURE
    if not path.exists():
        raise FileNotFoundError(f"replay_failure: no {FAILURE} in {out}: no step of that run was not finite")
    contents = read_checkpoint(path)
    config = TrainConfig.from_dict(contents["config"])
    device = choose_device(config.device)
    images_file = training_images(config, lambda _: None)
    with open_images(images_file, ("train", "val"), "data") as data, threads(config.threads):
        state = State(config, data, contents["data"], device)
        state.restore(path, contents)
    images, labels = (contents["batch"][name].to(device) for name in ("images", "labels"))
    origin = find_origin(state, images, labels)
    lines = [f"epoch {contents['epoch'] + 1}, step {contents['progress']['step'] + 1}, {len(labels)} images: {origin}"]
    names = tuple(area.name for area in state.net.network.areas)
    with torch.no_grad(), in_precision(config.precision, device):
        states: dict[str, Any] = state.net.train().run(images, record=names)[-1]
    lines.append("largest magnitude by area and time step:")
    for name, values in states.items():
        largest = values.flatten(1).abs().amax(1)
        lines.append(f"  {name}: {' '.join(f'{value:.3g}' for value in largest.tolist())}")
    return "\n".join(lines)
