"""ctrnn under autograd: registration, compilation, forward mode, Jacobians, and second derivatives."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ctrnn_cases import DIFFERENTIABLE, Case, arguments, run
from torch import Tensor
from torch.func import jacfwd, jvp

from rnndyn_fast.nn import CTRNN
from rnndyn_fast.ops.ctrnn import ctrnn

# ---------------------------------------------------------------- autograd


def op_arguments(case: Case, dtype: torch.dtype = torch.float64) -> tuple[Any, ...]:
    x = arguments(case, dtype)
    tensors = [x[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    seeds = torch.tensor(x["noise_seeds"])
    return (*tensors, x["alpha"], x["noise_std"], seeds, [a.value for a in x["activations"]], 1, 2, True)


def test_opcheck() -> None:
    torch.library.opcheck(torch.ops.rnndyn.ctrnn.default, op_arguments(Case(2, 3, 3, 2, 5)))
    torch.library.opcheck(torch.ops.rnndyn.ctrnn.default, (*op_arguments(Case(2, 3, 3, 2, 5), torch.float32)[:-1], False))


def test_registered_op_and_function_agree() -> None:
    case = Case(2, 5, 3, 2, 6)
    x = arguments(case)
    grads = torch.randn(2, 5, 3, 6, dtype=torch.float64), torch.randn(2, 5, 3, 6, dtype=torch.float64)
    wanted = run(x, "native", grads)
    tensors = [x[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    h0 = tensors[-1]
    names = [a.value for a in x["activations"]]
    rates, states = torch.ops.rnndyn.ctrnn(*tensors[:-1], h0, x["alpha"], x["noise_std"], torch.tensor(x["noise_seeds"]), names, 7, 3, True)
    got = [rates, states, *torch.autograd.grad((rates * grads[0]).sum() + (states * grads[1]).sum(), tensors)]
    torch.testing.assert_close([g.detach() for g in got], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("wanted", [("w_rec",), ("inputs",), ("h0", "b_rec"), ("w_in",)])
def test_gradients_of_some(wanted: tuple[str, ...]) -> None:
    x = arguments(Case(2, 5, 3, 2, 6))
    results = []
    for backend in ("native", "reference"):
        some = {**x, **{name: x[name].clone().requires_grad_() for name in wanted}}
        rates, _ = ctrnn(**some, backend=backend)
        results.append(torch.autograd.grad(rates.square().sum(), [some[name] for name in wanted]))
    torch.testing.assert_close(results[0], results[1], rtol=1e-10, atol=1e-12)


def test_gradcheck() -> None:
    x = arguments(Case(3, 2, 3, 2, 3))
    tensors = [x[name].clone().requires_grad_() for name in DIFFERENTIABLE]
    # (relu's corner is far from every state here: the seed is fixed)
    assert torch.autograd.gradcheck(lambda *t: ctrnn(**{**x, **dict(zip(DIFFERENTIABLE, t, strict=True))}, backend="native"), tensors)


def test_compiles_as_one_graph() -> None:
    x = arguments(Case(2, 4, 3, 2, 5), torch.float32)
    seeds = torch.tensor(x.pop("noise_seeds"))

    def loss(w_rec: Tensor) -> Tensor:
        rates, states = ctrnn(**{**x, "w_rec": w_rec}, noise_seeds=seeds, backend="native")
        assert states is not None
        return (rates * states).sum()

    w = x["w_rec"].clone().requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    results = [torch.autograd.grad(f(w), w)[0] for f in (loss, compiled)]
    torch.testing.assert_close(results[1], results[0])


def test_forward_mode_is_the_references() -> None:
    x = arguments(Case(5, 2, 3, 2, 4))
    for name in DIFFERENTIABLE:
        tangent = torch.randn_like(x[name])
        values = [
            jvp(lambda v, b=backend, name=name: ctrnn(**{**x, name: v}, backend=b)[0], (x[name],), (tangent,))
            for backend in ("native", "reference")
        ]
        assert float(values[0][1].abs().max()) > 1e-3
        torch.testing.assert_close(values[0], values[1], rtol=0, atol=0)


def test_jacobian_of_a_step() -> None:
    """By forward mode, against one step of the op and its equation."""
    net = CTRNN(1, 2, 6, alpha=0.4, seeds=[1]).double()
    h, u = torch.randn(6, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    jacobian = jacfwd(lambda v: net.step(v[None, None], u[None, None])[0, 0])(h)
    wanted = 0.6 * torch.eye(6, dtype=torch.float64) + 0.4 * net.w_rec[0].T * (1 - torch.tanh(h) ** 2)
    torch.testing.assert_close(jacobian, wanted)
    _, states = net.states(u.reshape(1, 1, 1, 2), h0=h.reshape(1, 1, 6))
    torch.testing.assert_close(net.step(h[None, None], u[None, None]), states[:, :, 0])


def test_double_backward_raises_and_names_the_reference() -> None:
    x = arguments(Case(2, 2, 2, 2, 3))
    w = x["w_rec"].clone().requires_grad_()
    for call in (
        lambda: ctrnn(**{**x, "w_rec": w}, backend="native")[0],
        lambda: torch.ops.rnndyn.ctrnn(
            x["inputs"], w, x["b_rec"], x["w_in"], x["h0"], x["alpha"], x["noise_std"], None, ["tanh"] * 2, 0, 0, False
        )[0],
    ):
        (first,) = torch.autograd.grad(call().square().sum(), w, create_graph=True)
        with pytest.raises(RuntimeError, match=r'cannot be differentiated twice; use backend="reference"'):
            torch.autograd.grad(first.square().sum(), w)
    (first,) = torch.autograd.grad(ctrnn(**{**x, "w_rec": w}, backend="reference")[0].square().sum(), w, create_graph=True)
    assert float(torch.autograd.grad(first.square().sum(), w)[0].abs().max()) > 1e-6


def test_gradient_of_alpha_is_refused_not_zero() -> None:
    x = arguments(Case(2, 2, 2, 2, 3))
    for name in ("alpha", "noise_std"):
        value = x[name].clone().requires_grad_()
        with pytest.raises(RuntimeError, match="no gradient of alpha and noise_std"):
            ctrnn(**{**x, name: value}, backend="native")[0].sum().backward()
        assert torch.autograd.grad(ctrnn(**{**x, name: value}, backend="reference")[0].sum(), value)[0].shape == (2,)
