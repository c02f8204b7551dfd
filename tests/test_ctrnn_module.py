"""nn.CTRNN: the published networks, initialisation, taking apart and together, and what it refuses."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from conftest import golden
from ctrnn_cases import by_dtype

from rnndyn_fast.nn import CTRNN
from rnndyn_fast.reference.ctrnn import ctrnn as reference_ctrnn
from rnndyn_fast.reference.ctrnn_train import ctrnn_loss
from rnndyn_fast.tasks import ModuloArithmetic, SetGame, Trials

# ---------------------------------------------------------------- golden


@pytest.mark.parametrize("backend", ["native", "reference"])
@by_dtype
def test_published_network(backend: str, dtype: torch.dtype) -> None:
    data = golden("ctrnn_m3a")
    net = CTRNN.from_published(data, backend=backend).to(dtype)
    outputs, rates = net(torch.from_numpy(data["inputs"]).to(dtype))
    # As the golden page allows float32; measured: 3.4e-6 float32, 3.2e-6 float64 (the golden numbers' own rounding).
    np.testing.assert_allclose(outputs[0, :, :, 0].detach(), data["outputs"], rtol=0, atol=2e-5)
    np.testing.assert_allclose(rates[0].detach(), data["rates"], rtol=0, atol=2e-5)
    _, states = net.states(torch.from_numpy(data["inputs"][:6]).to(dtype))
    np.testing.assert_allclose(states[0].detach(), data["hidden_first6"], rtol=1e-5, atol=5e-5)
    outputs, rates = net(torch.zeros(1, 200, 3, dtype=dtype))
    # 200 free-running steps on a limit cycle: phase drifts with rounding; measured 2e-5.
    np.testing.assert_allclose(outputs[0, 0, :, 0].detach(), data["null_outputs"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(rates[0, 0].detach(), data["null_rates"], rtol=0, atol=2e-4)
    last = net(torch.from_numpy(data["inputs"]).to(dtype))[0][0, :, -1, 0]
    said = (last > 0.5).int() - (last < -0.5).int()
    assert said.tolist() == data["labels"].astype(int).tolist()


def test_published_network_on_trials_of_our_own() -> None:
    """Accuracy and error as measured of the published code on other trials, with and without noise, and with five pulses."""
    net = CTRNN.from_published(golden("ctrnn_m3a"))
    three, five = ModuloArithmetic().test_set(seed=42), ModuloArithmetic(pulses=5).balanced(1500, seed=42)

    def score(trials: Trials, seed: int | None = None) -> tuple[float, float]:
        with torch.no_grad():
            outputs, rates = net(trials.inputs, None if seed is None else [seed])
        _, error, _, accuracy = ctrnn_loss(outputs[..., 0], rates, trials.labels[None], 3, 0.0)
        return float(accuracy), float(error)

    accuracy, error = score(three)
    assert accuracy == 1.0
    assert error == pytest.approx(6.2e-5, rel=0.3)  # 540 trials; another draw of them gives another value
    assert score(five)[0] == 1.0
    for seed in (1, 2, 3):
        accuracy, error = score(three, seed)
        assert accuracy == 1.0
        assert error == pytest.approx(2.15e-4, rel=0.2)


def test_published_noise_convention() -> None:
    data = golden("ctrnn_m3a_train")
    net = CTRNN.from_published(data, "a05_tanh_init_", noise_std=float(data["noise_const"]))
    inputs = torch.from_numpy(data["a05_tanh_inputs"][:4]).float()[None]
    noise = torch.from_numpy(data["noise_unit_normal"])[None]
    with torch.no_grad():
        rates, _ = reference_ctrnn(inputs, net.w_rec, net.b_rec, net.w_in, net.h0, net.alpha, net.noise_std, net.activations, noise)
        outputs = net.read_out(rates)
    # Measured: 5e-7.
    np.testing.assert_allclose(rates[0], data["noise_rates"], rtol=0, atol=5e-6)
    np.testing.assert_allclose(outputs[0, :, :, 0], data["noise_outputs"], rtol=0, atol=5e-6)


@pytest.mark.parametrize("prefix", ["osc_", "att_"])
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_published_set_networks(prefix: str, backend: str) -> None:
    data = golden("set_v1_networks")
    net = CTRNN.from_published(data, prefix, backend=backend)
    trials = SetGame(data[f"{prefix}colour_vectors_GPR"]).trials_at(data[f"{prefix}sequences"], data[f"{prefix}pulse_index"])
    assert trials.labels.tolist() == data[f"{prefix}labels"].tolist()
    outputs, rates = net(trials.inputs)
    # Measured: 2e-5 (a hundred unit inputs drive the rates to saturation).
    np.testing.assert_allclose(outputs[0, :, :, 0].detach(), data[f"{prefix}outputs"], rtol=0, atol=2e-4)
    np.testing.assert_allclose(rates[0, :, -1].detach(), data[f"{prefix}final_rates"], rtol=0, atol=2e-4)
    _, rates = net(torch.zeros(1, 200, 100))
    np.testing.assert_allclose(rates[0, 0].detach(), data[f"{prefix}null_rates"], rtol=0, atol=5e-4)


# ---------------------------------------------------------------- module


def test_initialisation_is_the_published_one() -> None:
    net = CTRNN(3, 3, 100, 1, seeds=[1, 2, 1])
    torch.testing.assert_close(net.w_rec[0], net.w_rec[2], rtol=0, atol=0)
    assert not torch.equal(net.w_rec[0], net.w_rec[1])
    for weight, std in ((net.w_rec, 0.1), (net.w_in, 0.1393), (net.w_out, 0.1407)):
        cut = 2 * std / 0.87962566103423978
        assert float(weight.detach().abs().max()) <= cut * 1.0005
        assert float(weight.detach().abs().max()) > 0.95 * cut
    assert float(net.w_rec.detach().std()) == pytest.approx(0.1, rel=0.02)
    assert float(net.b_rec.detach().abs().max()) == float(net.b_out.detach().abs().max()) == 0
    assert float(net.h0.min()) == float(net.h0.max()) == 1
    assert sum(p[0].numel() for p in net.parameters()) == 10501


def test_select_and_stack() -> None:
    net = CTRNN(3, 2, 5, 2, alpha=[0.1, 0.5, 1.0], noise_std=[0.0, 0.1, 0.2], activation=["tanh", "relu", "sigmoid"], seeds=[1, 2, 3])
    x = torch.randn(3, 4, 6, 2)
    outputs, rates = net(x, noise_seeds=[7, 8, 9])
    some = net.select([2, 0])
    torch.testing.assert_close(some(x[[2, 0]], noise_seeds=[9, 7]), (outputs[[2, 0]], rates[[2, 0]]), rtol=0, atol=0)
    again = CTRNN.stack([some, net.select([1])])
    torch.testing.assert_close(again(x[[2, 0, 1]], noise_seeds=[9, 7, 8])[0], outputs[[2, 0, 1]], rtol=0, atol=0)
    assert outputs.shape == (3, 4, 6, 2)
    shared = net(x[0])[0]
    torch.testing.assert_close(shared, net(x[:1].expand(3, 4, 6, 2))[0], rtol=0, atol=0)
    assert not torch.equal(net(x, noise_seeds=1)[0], net(x, noise_seeds=1, stream=1)[0])


def test_bad_options_of_the_module_are_named() -> None:
    for options, message in (
        ({"alpha": 1.5}, "alpha: expected values in"),
        ({"alpha": [0.5, 0.5, 0.5]}, r"alpha: expected one value, or \[M\]"),
        ({"noise_std": float("nan")}, "noise_std: expected finite"),
        ({"activation": "softmax"}, "activation: expected one of tanh"),
        ({"activation": ["tanh"]}, "activation: expected one, or 2"),
        ({"seeds": [1]}, "seeds: expected 2"),
    ):
        with pytest.raises(ValueError, match=message):
            CTRNN(2, 3, 4, **options)
    with pytest.raises(ValueError, match="hidden: expected at least 1, got 0"):
        CTRNN(2, 3, 0)
    with pytest.raises(ValueError, match=r"models: expected indices in \[0, 2\)"):
        CTRNN(2, 3, 4).select([2])
    with pytest.raises(ValueError, match=r"arrays: .*W_rec"):
        CTRNN.from_published({})
    with pytest.raises(ValueError, match=r"nets\[1\]: expected the sizes"):
        CTRNN.stack([CTRNN(1, 3, 4), CTRNN(1, 3, 5)])
