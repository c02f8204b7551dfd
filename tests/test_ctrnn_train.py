"""ctrnn_train: golden steps, the native epoch against the reference, independence of networks, and what is refused."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch
from conftest import golden
from torch import Tensor

from rnndyn_fast.ops import core
from rnndyn_fast.ops.ctrnn_train import ctrnn_train
from rnndyn_fast.reference.ctrnn import Activation
from rnndyn_fast.reference.ctrnn_train import AdamW, CtrnnTraining, split_parameters

NAMES = {"w_rec": "W_rec", "w_in": "W_in", "b_rec": "b_rec", "w_out": "W_out", "b_out": "b_out"}
GOLDEN = {"a1_tanh_": (1.0, Activation.TANH), "a05_tanh_": (0.5, Activation.TANH), "a01_relu_": (0.1, Activation.RELU)}


def flat(data: dict[str, np.ndarray], prefix: str) -> np.ndarray:
    return np.concatenate([data[prefix + name].ravel() for name in NAMES.values()])


def golden_run(repeats: int, dtype: torch.dtype) -> CtrnnTraining:
    """The three golden networks, with the golden batch as every batch of an epoch and as validation."""
    data = golden("ctrnn_m3a_train")
    inputs = torch.from_numpy(np.stack([data[p + "inputs"] for p in GOLDEN])).float()
    labels = torch.from_numpy(np.stack([data[p + "labels"] for p in GOLDEN])).float()
    parameters = torch.from_numpy(np.stack([flat(data, p + "init_") for p in GOLDEN])).to(dtype)
    return CtrnnTraining(
        train_inputs=inputs,
        train_labels=labels,
        order=torch.arange(16).repeat(3, repeats),
        val_inputs=inputs,
        val_labels=labels,
        h0=torch.ones(3, 100, dtype=dtype),
        alpha=torch.tensor([alpha for alpha, _ in GOLDEN.values()], dtype=dtype),
        noise_std=torch.zeros(3, dtype=dtype),
        activations=tuple(f for _, f in GOLDEN.values()),
        seeds=torch.zeros(3, dtype=torch.int64),
        epoch=torch.zeros(3, dtype=torch.int64),
        learning_rate=torch.full((3,), 1e-4, dtype=dtype),
        parameters=parameters,
        first_moment=torch.zeros_like(parameters),
        second_moment=torch.zeros_like(parameters),
        metrics=torch.full((3, 3, 3), torch.nan, dtype=torch.float64),
    )


@pytest.mark.parametrize("backend", ["native", "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=["float32", "float64"])
def test_published_steps(backend: str, dtype: torch.dtype) -> None:
    """Loss, gradient, and parameters after 1 and 20 steps."""
    data = golden("ctrnn_m3a_train")
    one, twenty = golden_run(1, dtype), golden_run(20, dtype)
    ctrnn_train(one, [0, 1, 2], backend)
    ctrnn_train(twenty, [0, 1, 2], backend)
    for m, prefix in enumerate(GOLDEN):
        # Measured: 5e-7 relative; the golden numbers are float32.
        assert float(one.metrics[m, 0, 0]) == pytest.approx(float(data[f"{prefix}error"]), rel=3e-6)
        assert float(one.metrics[m, 0, 1]) == pytest.approx(float(data[f"{prefix}activity"]), rel=3e-6)
        grad, wanted = one.first_moment[m].double().numpy() / 0.1, flat(data, f"{prefix}grad_")
        # Measured: 1.4e-6 of the largest.
        np.testing.assert_allclose(grad, wanted, rtol=0, atol=1e-5 * np.abs(wanted).max())
        # After one step Adam moves by about lr * sign(gradient), so that a tiny gradient's rounding counts: measured at most 4e-6, and
        # 1.5e-8 for all but one in a thousand. The step itself is 1e-4.
        after1 = np.abs(one.parameters[m].numpy() - flat(data, f"{prefix}after1_"))
        assert after1.max() < 3e-5
        assert np.quantile(after1, 0.999) < 1e-7
        after20 = np.abs(twenty.parameters[m].numpy() - flat(data, f"{prefix}after20_"))
        assert after20.max() < 5e-5
        assert np.quantile(after20, 0.99) < 1e-5  # measured 5e-7 with AVX-512, 4.4e-6 with AVX2
        # Validation is the same batch with the last parameters; measured 1.2e-5 (of an error that is itself about 1).
        assert float(twenty.metrics[m, 2, 0]) == pytest.approx(float(data[f"{prefix}error_after20"]), rel=1e-4)
        assert float(twenty.metrics[m, 2, 1]) == pytest.approx(float(data[f"{prefix}activity_after20"]), rel=1e-4)


def small_run(dtype: torch.dtype = torch.float64, *, models: int = 5, batch: int = 20, **changes: Any) -> CtrnnTraining:
    """Every activation, noise, a batch that fills a tile and a part of one, validation trials that do not fill one."""
    generator = torch.Generator().manual_seed(3)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    hidden, inputs, steps, trials = 7, 2, 6, 45
    parameters = (normal(models, (hidden + inputs + 1) * hidden + hidden + 1) * 0.3).to(dtype)

    def signs(*shape: int) -> Tensor:
        return torch.sign(normal(*shape)).float()

    run = CtrnnTraining(
        train_inputs=normal(models, trials, steps, inputs).float(),
        train_labels=signs(models, trials),
        order=torch.stack([torch.randperm(trials, generator=generator)[: 2 * batch] for _ in range(models)]),
        val_inputs=normal(models, 19, steps, inputs).float(),
        val_labels=signs(models, 19),
        h0=torch.ones(models, hidden, dtype=dtype),
        alpha=torch.linspace(0.2, 1, models, dtype=dtype),
        noise_std=torch.linspace(0, 0.4, models, dtype=dtype),
        activations=tuple(Activation)[:models],
        seeds=torch.arange(models) * 2**33 + 5,
        epoch=torch.arange(models) % 3,
        learning_rate=torch.linspace(1e-3, 1e-2, models, dtype=dtype),
        parameters=parameters,
        first_moment=0.01 * torch.ones_like(parameters),
        second_moment=0.01 * torch.ones_like(parameters),
        metrics=torch.full((models, 3, 3), torch.nan, dtype=torch.float64),
        batch=batch,
        loss_steps=2,
        activity_weight=0.05,
    )
    return dataclasses.replace(run, **changes)


def state(run: CtrnnTraining) -> tuple[Tensor, ...]:
    return run.parameters, run.first_moment, run.second_moment, run.metrics


@pytest.mark.usefixtures("isa")
@pytest.mark.parametrize("batch", [20, 16, 5])
@pytest.mark.parametrize("clip_norm", [0.0, 0.05], ids=["unclipped", "clipped"])
def test_native_epoch_matches_the_reference(batch: int, clip_norm: float) -> None:
    """In float64, through two batches."""
    options = AdamW(beta1=0.8, beta2=0.99, eps=1e-6, weight_decay=0.1, clip_norm=clip_norm)
    native, reference = (small_run(batch=batch, optimiser=options) for _ in range(2))
    ctrnn_train(native, range(5), "native")
    ctrnn_train(reference, range(5), "reference")
    assert bool(torch.isfinite(reference.metrics).all())
    torch.testing.assert_close(state(native), state(reference), rtol=1e-9, atol=1e-11)


def test_native_epoch_in_float32() -> None:
    native, exact = small_run(torch.float32), small_run(torch.float64)
    ctrnn_train(native, range(5), "native")
    ctrnn_train(exact, range(5), "reference")
    for ours, truth in zip(state(native), state(exact), strict=True):
        # Parameters and noise are rounded to float32 to begin with; measured 3e-6.
        torch.testing.assert_close(ours.double(), truth, rtol=1e-4, atol=2e-5)


def test_all_right_is_exactly_one() -> None:
    """Over batches and tiles whose counts are no powers of two."""
    run = small_run(torch.float32, batch=7, learning_rate=torch.zeros(5))
    run.parameters[:, -8:] = torch.tensor([0.0] * 7 + [1.0])  # the output is its bias
    run = dataclasses.replace(
        run,
        train_labels=torch.ones(5, 45),
        val_inputs=run.train_inputs,
        val_labels=torch.ones(5, 45),
        order=torch.arange(42).repeat(5, 1),
    )
    ctrnn_train(run, range(5))
    assert (run.metrics[..., 2] == 1.0).all()


def test_a_network_depends_on_itself_alone() -> None:
    """Bit for bit: on no other network, no number of threads, no order; those that are not chosen are not touched."""
    before = torch.get_num_threads()
    whole = small_run(torch.float32)
    untouched = [value.clone() for value in state(whole)]
    try:
        torch.set_num_threads(2)
        ctrnn_train(whole, [4, 1, 2])
        torch.set_num_threads(1)
        for m in (1, 2, 4):
            alone = small_run(torch.float32)
            ctrnn_train(alone, [m])
            torch.testing.assert_close([v[m] for v in state(alone)], [v[m] for v in state(whole)], rtol=0, atol=0)
    finally:
        torch.set_num_threads(before)
    for m in (0, 3):
        torch.testing.assert_close([v[m] for v in state(whole)], [v[m] for v in untouched], rtol=0, atol=0, equal_nan=True)


def test_scratch_is_written_before_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    clean, poisoned = small_run(torch.float32), small_run(torch.float32)
    ctrnn_train(clean, range(5))

    def workspace(floats: int) -> tuple[Tensor, int]:
        scratch = torch.full((floats + 16,), torch.nan)
        return scratch, -(-scratch.data_ptr() // 64) * 64

    monkeypatch.setattr(core, "workspace_of", workspace)
    ctrnn_train(poisoned, range(5))
    torch.testing.assert_close(state(poisoned), state(clean), rtol=0, atol=0)


def test_epochs_draw_fresh_noise_and_count_steps() -> None:
    first, second = small_run(), small_run()
    second.epoch.add_(1)
    for run in (first, second):
        ctrnn_train(run, range(5), "native")
    assert not torch.equal(first.metrics[4, 2], second.metrics[4, 2])
    again = small_run()
    again.epoch.add_(1)
    ctrnn_train(again, range(5), "reference")
    torch.testing.assert_close(state(second), state(again), rtol=1e-9, atol=1e-11)


def test_metrics_after_and_validation_may_be_left_out() -> None:
    full, less = small_run(), small_run(metrics_after=False, val_inputs=torch.empty(5, 0, 6, 2), val_labels=torch.empty(5, 0))
    for run in (full, less):
        ctrnn_train(run, range(5), "native")
    torch.testing.assert_close(less.parameters, full.parameters, rtol=0, atol=0)
    torch.testing.assert_close(less.metrics[:, 0], full.metrics[:, 0], rtol=0, atol=0)
    assert float(less.metrics[:, 1:].abs().max()) == 0


def test_split_parameters_are_views() -> None:
    rows = torch.zeros(2, (4 + 3 + 1) * 4 + 4 + 1)
    parts = split_parameters(rows, 3, 4)
    assert {name: tuple(part.shape) for name, part in parts.items()} == {
        "w_rec": (2, 4, 4),
        "w_in": (2, 3, 4),
        "b_rec": (2, 4),
        "w_out": (2, 4, 1),
        "b_out": (2, 1),
    }
    for part in parts.values():
        part += 1
    assert float(rows.min()) == float(rows.max()) == 1


@pytest.mark.parametrize(
    ("changes", "chosen", "message"),
    [
        ({"order": torch.zeros(5, 39, dtype=torch.int64)}, [0], "order: expected"),
        ({"order": torch.full((5, 40), 45)}, [0], r"order: expected indices in \[0, 45\)"),
        ({"loss_steps": 7}, [0], r"loss_steps: expected a number in \[1, 6\]"),
        ({}, [5], r"chosen: expected indices in \[0, 5\)"),
        ({}, [1, 1], "chosen: expected every model once"),
        ({"activations": (Activation.TANH,)}, [0], "activations: expected 5"),
        ({"epoch": torch.full((5,), 2**30)}, [0], "epoch: expected"),
        ({"alpha": torch.ones(4, dtype=torch.float64)}, [0], r"alpha: expected a contiguous CPU tensor \[5\]"),
        ({"parameters": torch.zeros(5, 9, dtype=torch.float64)}, [0], "parameters: expected"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], chosen: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ctrnn_train(small_run(**changes), chosen)


def test_what_the_native_backend_does_not_take() -> None:
    run = small_run(torch.float16)
    with pytest.raises(ValueError, match=r"backend='native': parameters have dtype torch\.float16"):
        ctrnn_train(run, [0], "native")
    with pytest.raises(ValueError, match="backend: expected"):
        ctrnn_train(run, [0], "cuda")
