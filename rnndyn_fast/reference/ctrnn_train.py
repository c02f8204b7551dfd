"""Training of continuous-time recurrent networks in plain PyTorch: the specification of ``ops.ctrnn_train``."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rnndyn_fast.reference.ctrnn import Activation, ctrnn
from rnndyn_fast.reference.philox import unit_normals

PARAMETERS = ("w_rec", "w_in", "b_rec", "w_out", "b_out")  # in the order in which a flat row [P] holds them


@dataclass(frozen=True)
class AdamW:
    """AdamW with decoupled decay on every parameter, biases too (the defaults are the published ones), after an optional clipping of
    the gradient's norm over all parameters (0: none). The learning rate is a number per model, elsewhere."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    weight_decay: float = 1e-4
    clip_norm: float = 0.0


@dataclass(frozen=True)
class CtrnnTraining:
    """Networks in training: what an epoch reads and writes. Parameters and moments of a network are one row [P], in the order of
    ``PARAMETERS``; data is float32 whatever the dtype of the parameters is."""

    train_inputs: Tensor  # [M, N_train, T, I] float32
    train_labels: Tensor  # [M, N_train] float32, +1 or -1
    order: Tensor  # [M, batches * batch] int64: trials of the next epoch, in their order
    val_inputs: Tensor  # [M, N_val, T, I] float32, N_val may be 0
    val_labels: Tensor  # [M, N_val] float32
    h0: Tensor  # [M, H]
    alpha: Tensor  # [M]
    noise_std: Tensor  # [M]
    activations: tuple[Activation, ...]
    seeds: Tensor  # [M] int64, of the noise
    epoch: Tensor  # [M] int64: epochs done; numbers the optimiser's steps and the streams of noise
    learning_rate: Tensor  # [M]
    parameters: Tensor  # [M, P], updated
    first_moment: Tensor  # [M, P], updated
    second_moment: Tensor  # [M, P], updated
    metrics: Tensor  # [M, 3, 3] float64, written: before each step, after it, validation; error, activity, accuracy
    batch: int = 16
    loss_steps: int = 3
    activity_weight: float = 1e-4
    metrics_after: bool = True
    optimiser: AdamW = dataclasses.field(default_factory=AdamW)


def split_parameters(
    rows: Tensor,  # [M, P]
    inputs: int,
    hidden: int,
) -> dict[str, Tensor]:
    """The parameters of rows as views: w_rec [M, H, H], w_in [M, I, H], b_rec [M, H], w_out [M, H, 1], b_out [M, 1]."""
    shapes = {"w_rec": (hidden, hidden), "w_in": (inputs, hidden), "b_rec": (hidden,), "w_out": (hidden, 1), "b_out": (1,)}
    sizes = [torch.Size(shape).numel() for shape in shapes.values()]
    return {name: part.unflatten(1, shape) for (name, shape), part in zip(shapes.items(), rows.split(sizes, 1), strict=True)}


def ctrnn_loss(
    outputs: Tensor,  # [M, N, T]
    rates: Tensor,  # [M, N, T, H]
    labels: Tensor,  # [M, N]
    loss_steps: int,
    activity_weight: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss, error, activity and accuracy of each model [M].

    ``error = mean over trials and the last loss_steps steps of (z - y)^2``, ``activity = mean over trials, steps and units of r^2``,
    ``loss = error + activity_weight * activity``. A trial is right if the last output is above 0.5 with label +1, or below -0.5 with -1.
    """
    error = (outputs[:, :, -loss_steps:] - labels[:, :, None]).square().mean((1, 2))
    activity = rates.square().mean((1, 2, 3))
    last = outputs[:, :, -1]
    said = (last > 0.5).to(labels.dtype) - (last < -0.5).to(labels.dtype)
    return error + activity_weight * activity, error, activity, (said == labels).to(torch.float64).mean(1)


def adamw_step(
    parameters: Tensor,  # [P], updated, as are the next two
    first: Tensor,
    second: Tensor,
    grad: Tensor,  # [P]
    step: int,
    learning_rate: float,
    options: AdamW,
) -> None:
    """One step, the ``step``-th from 1 on."""
    norm = float(grad.norm())
    if options.clip_norm > 0 and norm > options.clip_norm:
        grad = grad * (options.clip_norm / norm)
    first.mul_(options.beta1).add_(grad, alpha=1 - options.beta1)
    second.mul_(options.beta2).addcmul_(grad, grad, value=1 - options.beta2)
    update = (first / (1 - options.beta1**step)) / ((second / (1 - options.beta2**step)).sqrt() + options.eps)
    parameters.sub_(learning_rate * (update + options.weight_decay * parameters))


def _evaluate(
    run: CtrnnTraining, m: int, parameters: Tensor, inputs: Tensor, labels: Tensor, stream: int
) -> tuple[Tensor, tuple[float, ...]]:
    """Loss of model m (a scalar with a graph), and error, activity, accuracy."""
    dtype, hidden = parameters.dtype, run.h0.shape[1]
    p = split_parameters(parameters[None], inputs.shape[2], hidden)
    one = slice(m, m + 1)
    noise = None
    if float(run.noise_std[m]) != 0:
        noise = unit_normals(run.seeds[one], inputs.shape[0], inputs.shape[1], hidden, stream=stream, dtype=dtype)
    u = inputs[None].to(dtype)
    rates, _ = ctrnn(
        u, p["w_rec"], p["b_rec"], p["w_in"], run.h0[one], run.alpha[one], run.noise_std[one], run.activations[m : m + 1], noise
    )
    outputs = (rates @ p["w_out"][:, None])[..., 0] + p["b_out"][:, None]
    loss, *parts = ctrnn_loss(outputs, rates, labels[None].to(dtype), run.loss_steps, run.activity_weight)
    return loss[0], tuple(float(part[0].detach()) for part in parts)


def ctrnn_train(run: CtrnnTraining, chosen: Sequence[int]) -> None:
    """One epoch of the chosen models.

    For each batch of ``order``: gradient of the loss, AdamW step, and (``metrics_after``) the metrics of the same batch again with the
    new parameters and fresh noise; then the metrics of the validation trials, with noise. ``epoch`` is left as it is.
    """
    batches = run.order.shape[1] // run.batch
    for m in chosen:
        rows: list[list[tuple[float, ...]]] = [[], []]
        first_step = int(run.epoch[m]) * batches
        for b, trials in enumerate(run.order[m].view(batches, run.batch)):
            inputs, labels, step = run.train_inputs[m, trials], run.train_labels[m, trials], first_step + b
            theta = run.parameters[m].detach().clone().requires_grad_()
            loss, parts = _evaluate(run, m, theta, inputs, labels, 2 * step)
            rows[0].append(parts)
            (grad,) = torch.autograd.grad(loss, theta)
            with torch.no_grad():
                adamw_step(
                    run.parameters[m],
                    run.first_moment[m],
                    run.second_moment[m],
                    grad,
                    step + 1,
                    float(run.learning_rate[m]),
                    run.optimiser,
                )
                if run.metrics_after:
                    rows[1].append(_evaluate(run, m, run.parameters[m], inputs, labels, 2 * step + 1)[1])
        run.metrics[m].zero_()
        for k, values in enumerate(rows):
            if values:
                run.metrics[m, k] = torch.tensor(values, dtype=torch.float64).mean(0)
        if run.val_labels.shape[1]:
            with torch.no_grad():
                stream = 2**31 + int(run.epoch[m])
                run.metrics[m, 2] = torch.tensor(
                    _evaluate(run, m, run.parameters[m], run.val_inputs[m], run.val_labels[m], stream)[1], dtype=torch.float64
                )
