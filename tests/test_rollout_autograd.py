"""The traps of autograd: registration, compilation, forward mode, transforms, second derivatives, autocast. Right or
an error, never zeros."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import grad, hessian, jacfwd, jacrev, jvp, vmap
from torch.nn.utils import prune
from torch.utils.checkpoint import checkpoint

from rnndyn_fast.models import blt_net_64
from rnndyn_fast.nn import RecurrentNetwork
from rnndyn_fast.program import rollout
from rnndyn_fast.program.rollout_op import Key, Rollout, _plan

SOME = [
    CASES[n]
    for n in (
        "topdown_additive",
        "topdown_multiplicative",
        "biological_loop_multiplicative",
        "several_inputs_additive",
        "shared_norm",
    )
]
some_cases = pytest.mark.parametrize("case", SOME, ids=lambda c: c.name)
parameters_require_grad = pytest.mark.parametrize("requires_grad", [False, True], ids=["frozen", "trainable"])


def op_arguments(case: RolloutCase, training: bool, requires_grad: bool) -> tuple[Any, ...]:
    inputs = [x.requires_grad_(requires_grad) for x in case.inputs()]
    parameters = [p.requires_grad_(requires_grad) for p in case.parameters().values()]
    needs = [training] * (len(inputs) + len(parameters))
    return inputs, parameters, case.network.to_json(), case.timesteps, list(case.record), needs, False, "auto"


def function(case: RolloutCase, backend: str, requires_grad: bool = False) -> tuple[Callable[[Tensor], list[Tensor]], Tensor]:
    """The rollout as a function of its first input."""
    inputs = case.inputs()
    parameters = {k: p.requires_grad_(requires_grad) for k, p in case.parameters().items()}

    def run(x: Tensor) -> list[Tensor]:
        return rollout(case.network, case.timesteps, [x, *inputs[1:]], parameters, case.record, backend=backend)

    return run, inputs[0]


def loss(run: Callable[[Tensor], list[Tensor]]) -> Callable[[Tensor], Tensor]:
    return lambda x: sum((o.pow(2).sum() for o in run(x)), torch.zeros((), dtype=x.dtype))


def close(ours: Any, theirs: Any) -> None:
    """Equal, and not zero."""
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    flat = theirs if isinstance(theirs, (list, tuple)) else [theirs]
    assert any(float(t.abs().max()) > 1e-3 for t in flat)


# ---------------------------------------------------------------- registration


@some_cases
def test_opcheck_training(case: RolloutCase) -> None:
    results = torch.library.opcheck(torch.ops.rnndyn.rollout, op_arguments(case, True, True))
    assert set(results.values()) == {"SUCCESS"}
    assert len(results) == 4


@some_cases
def test_opcheck_inference(case: RolloutCase) -> None:
    assert set(torch.library.opcheck(torch.ops.rnndyn.rollout, op_arguments(case, False, False)).values()) == {"SUCCESS"}


@some_cases
def test_opcheck_backward(case: RolloutCase) -> None:
    arguments = op_arguments(case, True, False)
    results, n = torch.ops.rnndyn.rollout(*arguments), len(case.record)
    grads = [torch.randn(r.shape, dtype=r.dtype) for r in results[:n]]
    given = [True] * n
    assert len(results) > n  # the states, and what backward reads
    checked = (grads, given, results[:n], results[n:], *arguments)
    assert set(torch.library.opcheck(torch.ops.rnndyn.rollout_backward, checked).values()) == {"SUCCESS"}


def test_op_without_training_refuses_a_gradient() -> None:
    outputs = torch.ops.rnndyn.rollout(*op_arguments(SOME[0], False, True))
    with pytest.raises(RuntimeError, match="expected needs=True for every input and parameter whose gradient is wanted"):
        outputs[0].sum().backward()


# ---------------------------------------------------------------- torch.compile


@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::DeprecationWarning")
@pytest.mark.parametrize("compiler", ["aot_eager", "inductor"])
def test_compile_fullgraph(compiler: str) -> None:
    torch.manual_seed(2)
    net = blt_net_64(timesteps=3, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=5, backend="native").double()
    x = torch.randn(2, 3, 16, 16, dtype=torch.float64)
    torch._dynamo.reset()
    compiled = torch.compile(net, fullgraph=True, backend=compiler)
    results = []
    for run in (net, compiled):
        net.zero_grad()
        log_probs, gap = run(x, return_representations=True)
        (log_probs.pow(2).sum() + gap.sum()).backward()
        results.append((log_probs.detach(), {k: p.grad.clone() for k, p in net.named_parameters() if p.grad is not None}))
    torch.testing.assert_close(results[1], results[0], rtol=1e-10, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(compiled(x), results[0][0], rtol=1e-10, atol=1e-10)


# ---------------------------------------------------------------- forward mode


@parameters_require_grad
@some_cases
def test_jvp(case: RolloutCase, requires_grad: bool) -> None:
    results = []
    for backend in ("native", "reference"):
        run, x = function(case, backend, requires_grad)
        tangent = torch.randn(x.shape, generator=torch.Generator().manual_seed(3), dtype=x.dtype)
        primal, tangents = jvp(run, (x,), (tangent,))
        with torch.no_grad():
            silent = jvp(run, (x,), (tangent,))[1]
        with forward_ad.dual_level():
            dual = [forward_ad.unpack_dual(o) for o in run(forward_ad.make_dual(x, tangent))]
        results.append([t.detach() for t in (*primal, *tangents, *silent, *(d.tangent for d in dual))])
    close(*results)


def test_jvp_by_parameters() -> None:
    case = SOME[1]
    parameters, (x,) = case.parameters(), case.inputs()
    tangents = {k: torch.randn_like(p) for k, p in parameters.items()}

    def run(backend: str) -> list[Tensor]:
        return jvp(lambda p: rollout(case.network, 4, [x], p, case.record, backend=backend), (parameters,), (tangents,))[1]

    close(run("native"), run("reference"))


def test_tangent_of_one_tensor_among_plain_ones_and_none_without() -> None:
    run, x = function(SOME[0], "native")
    with forward_ad.dual_level():
        assert all(forward_ad.unpack_dual(o).tangent is None for o in run(x))
        assert all(forward_ad.unpack_dual(o).tangent is not None for o in run(forward_ad.make_dual(x, x))[:2])


def test_function_alone_refuses_forward_mode() -> None:
    """Were the detection to miss: an error, not zeros."""
    case = SOME[0]
    (x,), parameters = case.inputs(), case.parameters()
    tensors, key = (x, *parameters.values()), (case.network.to_json(), 4, case.record, (True,) * (1 + len(parameters)), False, "auto")
    plan, given = _plan(tensors, Key(*key))
    with forward_ad.dual_level(), pytest.raises((RuntimeError, NotImplementedError), match=r"jvp|forward"):
        Rollout.apply(plan, None, tuple(given), forward_ad.make_dual(x, x), *parameters.values())


# ---------------------------------------------------------------- transforms


TRANSFORMS: dict[str, Callable[[Callable[[Tensor], list[Tensor]], Tensor], Any]] = {
    "grad": lambda f, x: grad(loss(f))(x),
    "jacrev": lambda f, x: jacrev(lambda s: f(x * s)[0].mean((0, 1, 3, 4)))(torch.ones(x.shape[-3], 1, 1, dtype=x.dtype)),
    "jacfwd": lambda f, x: jacfwd(lambda s: f(x * s)[0].mean((0, 1, 3, 4)))(torch.ones(x.shape[-3], 1, 1, dtype=x.dtype)),
    "hessian": lambda f, x: hessian(lambda s: loss(f)(x * s))(torch.ones(x.shape[-3], 1, 1, dtype=x.dtype)),
    "vmap": lambda f, x: vmap(f)(torch.stack([x, 2 * x, -x])),
    "vmap over the second axis": lambda f, x: vmap(f, in_dims=1)(torch.stack([x, 2 * x, -x], 1)),
    "vmap of grad": lambda f, x: vmap(grad(loss(f)))(torch.stack([x, 2 * x, -x])),
    "vmap of jvp": lambda f, x: vmap(lambda v: jvp(loss(f), (v,), (x,))[1])(torch.stack([x, 2 * x])),
    "jvp of vmap": lambda f, x: jvp(lambda v: vmap(loss(f))(v), (torch.stack([x, 2 * x]),), (torch.stack([x, x]),))[1],
    "jvp of jvp": lambda f, x: jvp(lambda y: jvp(loss(f), (y,), (x,))[1], (x,), (x,))[1],
    "grad of jvp": lambda f, x: grad(lambda y: jvp(loss(f), (y,), (x,))[1])(x),
    "jvp of grad": lambda f, x: jvp(grad(loss(f)), (x,), (x,))[1],
}


@parameters_require_grad
@pytest.mark.parametrize("transform", TRANSFORMS)
def test_functional_transforms(transform: str, requires_grad: bool) -> None:
    results = []
    for backend in ("native", "reference"):
        result = TRANSFORMS[transform](*function(SOME[1], backend, requires_grad))
        results.append([t.detach() for t in (result if isinstance(result, (list, tuple)) else [result])])
    close(*results)


def test_reverse_over_forward_in_eager() -> None:
    results = []
    for backend in ("native", "reference"):
        run, x = function(SOME[1], backend)
        x = x.clone().requires_grad_()
        with forward_ad.dual_level():
            tangent = forward_ad.unpack_dual(loss(run)(forward_ad.make_dual(x, torch.ones_like(x)))).tangent
            results.append(torch.autograd.grad(tangent, x)[0])
    close(*results)


# ---------------------------------------------------------------- second derivatives


def _grad_of_grad(run: Callable[[Tensor], list[Tensor]], x: Tensor) -> Tensor:
    x = x.clone().requires_grad_()
    (first,) = torch.autograd.grad(loss(run)(x), x, create_graph=True)
    assert float(first.detach().abs().max()) > 1e-3
    (second,) = torch.autograd.grad(first.pow(2).sum(), x)
    return second


def test_double_backward_raises_and_names_the_reference() -> None:
    run, x = function(SOME[0], "native")
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice.*backend="reference"'):
        _grad_of_grad(run, x)
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice.*backend="reference"'):
        grad(lambda y: grad(loss(run))(y).pow(2).sum())(x)


def test_double_backward_raises_through_the_registered_op() -> None:
    inputs, *rest = op_arguments(SOME[0], True, True)
    with pytest.raises(RuntimeError, match=r'cannot be differentiated twice.*backend="reference"'):
        _grad_of_grad(lambda x: torch.ops.rnndyn.rollout([x], *rest)[: len(SOME[0].record)], inputs[0].detach())


def test_double_backward_of_the_reference() -> None:
    run, x = function(SOME[1], "reference")
    second = _grad_of_grad(run, x)
    # Against a central difference of the squared first gradient along a random direction.
    direction, step = torch.randn_like(x), 1e-6

    def squared(y: Tensor) -> Tensor:
        return grad(loss(run))(y).pow(2).sum()

    difference = (squared(x + step * direction) - squared(x - step * direction)) / (2 * step)
    torch.testing.assert_close((second * direction).sum(), difference, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- autocast


def _under_autocast(net: RecurrentNetwork, x: Tensor, training: bool) -> list[tuple[Tensor, ...]]:
    """Results and gradients without and with it."""
    results = []
    for enabled in (False, True):
        with torch.set_grad_enabled(training):
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
                log_probs, gap, recorded = net(x, return_representations=True, record=("v2",))
            # (outside autocast, as PyTorch advises: else the readout's own backward runs in bfloat16)
            grads = torch.autograd.grad(log_probs.sum() + gap.sum(), [net.v2.lateral.weight, net.readout.weight]) if training else ()
            results.append((log_probs.detach(), gap.detach(), recorded["v2"].detach(), *grads))
    return results


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("engine", ["direct", "winograd"])
def test_autocast_changes_nothing(training: bool, engine: str) -> None:
    torch.manual_seed(2)
    net = blt_net_64(timesteps=3, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=5, backend="native", engine=engine)
    plain, autocast = _under_autocast(net, torch.randn(2, 3, 16, 16), training)
    assert autocast[0].dtype == torch.float32
    torch.testing.assert_close(autocast, plain, rtol=0, atol=0)


@pytest.mark.parametrize("training", [True, False])
def test_autocast_asks_matrix_units_for_bfloat16(training: bool) -> None:
    torch.manual_seed(2)
    net = blt_net_64(timesteps=3, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=5, backend="native", engine="amx")
    plain, autocast = _under_autocast(net, torch.randn(2, 3, 16, 16), training)
    for a, b in zip(autocast, plain, strict=True):
        assert a.dtype == torch.float32
        error = float((a - b).norm() / b.norm())
        assert 1e-5 < error < 0.1  # products of 8 bits, but not none


@pytest.mark.parametrize("backend", ["native"])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing(reentrant: bool, backend: str) -> None:
    """Saved tensors are read once, and a forward pass that is run again in backward has its own: the same gradients."""
    torch.manual_seed(0)
    net = blt_net_64(timesteps=3, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=3, backend=backend)
    x = torch.rand(2, 3, 16, 16)

    def gradients(run: Callable[..., Tensor]) -> list[Tensor | None]:
        net.zero_grad(set_to_none=True)
        leaf = x.clone().requires_grad_()
        run(leaf).square().sum().backward()
        return [leaf.grad, *(p.grad for p in net.parameters())]

    expected = gradients(net)
    for _ in range(4):  # as ever, recorded, replayed
        for mine, theirs in zip(gradients(lambda y: checkpoint(net, y, use_reentrant=reentrant)), expected, strict=True):
            assert (mine is None) == (theirs is None)
            assert mine is None or theirs is None or torch.equal(mine, theirs)


def test_hooks_of_submodules_are_refused() -> None:
    net = blt_net_64(timesteps=2, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=3)
    prune.l1_unstructured(net.get_submodule("it.bottom_up"), "weight", amount=0.5)
    with pytest.raises(TypeError, match=r"it.bottom_up._forward_pre_hooks: expected no forward pre-hooks, got 1"):
        net(torch.rand(1, 3, 16, 16))
