"""Training of continuous-time RNNs against the plain loop, in the same run, alternating.

    pytest benchmarks/bench_ctrnn.py

One network: a training step (batch 16, 50 steps, 100 units, noise) with the fused epoch, with the op under autograd and torch.optim, and
the plain loop in PyTorch, eager and compiled. Many networks: an epoch of a sweep (156 steps, the metrics of every batch again after its
step, 56 batches of validation) per network and epoch, against the plain loop one network after another and all of them by batched
matrix products. Losses and gradients are checked against float64 here. Results go to benchmarks/results/*.json
(RNNDYN_BENCH_RESULTS). RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs. RNNDYN_BENCH_COMPILE=0 leaves torch.compile out.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

import pytest
import torch
from measure import QUICK, alternate, summary, write_result
from published_ctrnn import ACTIVITY, PlainCTRNN, metrics, optimiser, training_step
from torch import Tensor

from rnndyn_fast.nn import CTRNN
from rnndyn_fast.ops.ctrnn_train import ctrnn_train
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn_train import CtrnnTraining, ctrnn_loss
from rnndyn_fast.tasks import ModuloArithmetic

BATCH, HIDDEN, ROUNDS = 16, 12 if QUICK else 100, 2 if QUICK else 7
MODELS = 2 if QUICK else 90
BATCHES, VALIDATION = (2, 1) if QUICK else (156, 56)  # batches of an epoch
STEPS = 2 if QUICK else 20  # training steps per measurement of one network
COMPILE = os.environ.get("RNNDYN_BENCH_COMPILE", "1") == "1" and not QUICK
NOISE = 0.05
NAMES = ("w_rec", "w_in", "b_rec", "w_out", "b_out")


def networks(models: int) -> CTRNN:
    return CTRNN(models, 3, HIDDEN, alpha=1.0, noise_std=NOISE, seeds=range(models))


def plain(net: CTRNN, model: int | None = None) -> PlainCTRNN:
    """The plain loop with the weights of one of the networks, or with those of all."""
    p = {name: net.get_parameter(name).detach().clone() for name in NAMES}
    if model is None:
        p["b_rec"], p["b_out"] = p["b_rec"][:, None], p["b_out"][:, None]
    else:
        p = {name: value[model] for name, value in p.items()}
    return PlainCTRNN(p["w_rec"], p["b_rec"], p["w_in"], p["w_out"], p["b_out"], 1.0, NOISE)


def training(net: CTRNN, batches: int, validation: int) -> CtrnnTraining:
    """The networks with the published data, trials in order."""
    task, count = ModuloArithmetic(), net.num_models
    trials, val = task.train_set(0, max(2500, BATCH)), task.validation_set(1)
    rows = torch.cat([net.get_parameter(name).detach().flatten(1) for name in NAMES], 1)
    shown = validation * BATCH
    return CtrnnTraining(
        train_inputs=trials.inputs.repeat(count, 1, 1, 1),
        train_labels=trials.labels.repeat(count, 1),
        order=torch.arange(batches * BATCH).repeat(count, 1),
        val_inputs=val.inputs[:shown].repeat(count, 1, 1, 1),
        val_labels=val.labels[:shown].repeat(count, 1),
        h0=net.h0,
        alpha=net.alpha,
        noise_std=net.noise_std,
        activations=(Activation.TANH,) * count,
        seeds=torch.arange(count),
        epoch=torch.zeros(count, dtype=torch.int64),
        learning_rate=torch.full((count,), 1e-4),
        parameters=rows,
        first_moment=torch.zeros_like(rows),
        second_moment=torch.zeros_like(rows),
        metrics=torch.zeros(count, 3, 3, dtype=torch.float64),
        batch=BATCH,
        metrics_after=validation > 0,
    )


def ours_loss(net: CTRNN, inputs: Tensor, labels: Tensor, seed: int | None) -> Tensor:
    outputs, rates = net(inputs[None], None if seed is None else [seed])
    return ctrnn_loss(outputs[..., 0], rates, labels[None], 3, ACTIVITY)[0].sum()


def check_gradients(net: CTRNN, inputs: Tensor, labels: Tensor) -> None:
    """Of the op, the plain loop and the fused epoch, without noise, against float64."""
    exact = plain(net, 0).double()
    loss = exact.loss(inputs.double(), labels.double(), noise=False)
    truth = dict(zip(NAMES, torch.autograd.grad(loss, [exact.get_parameter(name) for name in NAMES]), strict=True))
    one = net.select([0])
    grads = dict(zip(NAMES, torch.autograd.grad(ours_loss(one, inputs, labels, None), [one.get_parameter(n) for n in NAMES]), strict=True))
    loop = plain(net, 0)
    theirs = dict(
        zip(NAMES, torch.autograd.grad(loop.loss(inputs, labels, noise=False), [loop.get_parameter(n) for n in NAMES]), strict=True)
    )
    run = training(one, 1, 0)
    run.noise_std.zero_()
    ctrnn_train(run, [0])
    fused = dict(zip(NAMES, (10 * run.first_moment[0]).split([truth[name].numel() for name in NAMES]), strict=True))
    for name in NAMES:
        for label, grad in (("op", grads[name][0]), ("plain", theirs[name]), ("fused", fused[name].view_as(truth[name]))):
            error = float((grad.double() - truth[name]).norm() / truth[name].norm())
            assert error < 1e-5, f"{label} {name}: {error:.2g}"
    assert float(run.metrics[0, 0, 0] + ACTIVITY * run.metrics[0, 0, 1]) == pytest.approx(float(loss.detach()), rel=1e-5)


def record(benchmark: Any, file: str, what: str, facts: dict[str, int], calls: dict[str, Callable[[], Any]], divide: float) -> None:
    """Measure, write and print; times are divided by ``divide``."""
    times = {name: [t / divide for t in values] for name, values in alternate(calls, ROUNDS).items()}
    result = summary(times, "rnndyn")
    write_result(file + ("_quick" if QUICK else ""), {"section": "ctrnn", "what": what, **facts, "contenders": result})
    print(f"\n{what}: " + "; ".join(f"{k} {1e3 * v['median_s']:.3f} ms (x{v['ours_is_faster_by']:.1f})" for k, v in result.items()))
    benchmark.pedantic(calls["rnndyn"], rounds=1, warmup_rounds=0)
    benchmark.extra_info.update(facts, contenders=result)


def test_training_step_of_one_network(benchmark: Any) -> None:
    net = networks(1)
    run = training(net, STEPS, 0)
    batches = [(run.train_inputs[0, i : i + BATCH], run.train_labels[0, i : i + BATCH]) for i in range(0, STEPS * BATCH, BATCH)]
    check_gradients(net, *batches[0])
    op = net.select([0])
    op_adamw = optimiser(op, fused=True)
    eager = plain(net, 0)
    eager_adamw = optimiser(eager)
    seeds = iter(range(10**9))

    calls: dict[str, Callable[[], Any]] = {
        "rnndyn": lambda: ctrnn_train(run, [0]),
        "op_and_torch_optim": lambda: [
            training_step(op, lambda x, y: ours_loss(op, x, y, next(seeds)), op_adamw, x, y) for x, y in batches
        ],
        "eager": lambda: [training_step(eager, eager.loss, eager_adamw, x, y) for x, y in batches],
    }
    if COMPILE:
        compiled = plain(net, 0)
        compiled_adamw, compiled_loss = optimiser(compiled, fused=True), torch.compile(compiled.loss)
        calls["compiled"] = lambda: [training_step(compiled, compiled_loss, compiled_adamw, x, y) for x, y in batches]
    facts = {"batch": BATCH, "timesteps": 50, "units": HIDDEN}
    record(benchmark, "ctrnn_training_step", "training step of one continuous-time RNN", facts, calls, STEPS)


def test_epoch_of_a_sweep(benchmark: Any) -> None:
    """Per network and epoch."""
    net = networks(MODELS)
    run = training(net, BATCHES, VALIDATION)
    train = [(run.train_inputs[0, i : i + BATCH], run.train_labels[0, i : i + BATCH]) for i in range(0, BATCHES * BATCH, BATCH)]
    val = [(run.val_inputs[0, i : i + BATCH], run.val_labels[0, i : i + BATCH]) for i in range(0, VALIDATION * BATCH, BATCH)]
    check_gradients(net, *train[0])
    # A share of an epoch of the plain loops, which take long: steps and validation batches in their proportion (3 to 1.08).
    share = 1 if QUICK else 52
    one = plain(net, 0)
    one_adamw = optimiser(one)
    together = plain(net)
    together_adamw = optimiser(together)

    def epoch(loop: PlainCTRNN, adamw: torch.optim.Optimizer, models: int) -> None:
        def batch(x: Tensor) -> Tensor:
            return x if models == 1 else x.expand(models, *x.shape)

        for x, y in train[: len(train) // share]:
            training_step(loop, loop.loss, adamw, batch(x), batch(y))
            metrics(loop, batch(x), batch(y))
        for x, y in val[: len(val) // share]:
            metrics(loop, batch(x), batch(y))

    calls: dict[str, Callable[[], Any]] = {
        "rnndyn": lambda: ctrnn_train(run, range(MODELS)),
        "eager_one_by_one": lambda: epoch(one, one_adamw, 1),
        "eager_batched": lambda: epoch(together, together_adamw, MODELS),
    }
    # Seconds per network and epoch: each contender does another number of networks and another share of an epoch.
    done = {"rnndyn": MODELS, "eager_one_by_one": 1 / share, "eager_batched": MODELS / share}
    times = alternate(calls, ROUNDS)
    result = summary({name: [t / done[name] for t in values] for name, values in times.items()}, "rnndyn")
    what = "epoch of a network in a sweep"
    facts = {"models": MODELS, "batch": BATCH, "timesteps": 50, "units": HIDDEN, "steps": BATCHES, "validation_batches": VALIDATION}
    write_result("ctrnn_sweep_epoch" + ("_quick" if QUICK else ""), {"section": "ctrnn", "what": what, **facts, "contenders": result})
    print(f"\n{what}: " + "; ".join(f"{k} {1e3 * v['median_s']:.1f} ms (x{v['ours_is_faster_by']:.1f})" for k, v in result.items()))
    benchmark.pedantic(lambda: ctrnn_train(run, [0]), rounds=1, warmup_rounds=0)
    benchmark.extra_info.update(facts, contenders=result)
