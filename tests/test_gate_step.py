"""The fused gate kernels against the reference: values, gradients, accuracy, instruction sets, threads, awkward inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rnndyn_fast.ops import launches
from rnndyn_fast.ops.activations import Activation
from rnndyn_fast.ops.cells import LSTM, UGRNN, Cell, Gain, GRUGates, GRUUpdate, IntersectionRNN, ReciprocalGated, TimeDecay
from rnndyn_fast.ops.gate_step import ACTIVATION_NUMBERS, can_run_gate_step, gate_scalars, gate_step
from rnndyn_fast.reference.cells import cell_step

CELLS: dict[str, Cell] = {
    "gru_gates": GRUGates(forget_bias=0.7),
    "gru_gates_norm": GRUGates(layer_norm=True),
    "gru_update": GRUUpdate(),
    "gru_update_norm": GRUUpdate(layer_norm=True),
    "lstm": LSTM(forget_bias=1.3),
    "ugrnn": UGRNN(),
    "intersection_rnn": IntersectionRNN(forget_bias=0.4),
    "intersection_rnn_norm": IntersectionRNN(layer_norm=True),
    "reciprocal": ReciprocalGated(),
    "reciprocal_median": ReciprocalGated(Gain(0.92, -0.92), Gain(0.7, -0.7, Activation.TANH)),
    "reciprocal_constants": ReciprocalGated(Gain(bias=0.7), Gain(0.7, -0.7, Activation.TANH, bias=-0.4), drive_bias=0.3),
    **{f"reciprocal_{a.value}": ReciprocalGated(activation=a) for a in (Activation.IDENTITY, Activation.RELU, Activation.TANH)},
}
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 4), (1, 33, 3, 7), (3, 64, 4, 4)]
by_cell = pytest.mark.parametrize("name", CELLS)


def tensors(
    cell: Cell, shape: tuple[int, ...], terms: int, dtype: torch.dtype, scale: float = 1.0
) -> tuple[dict[str, list[Tensor]], dict[str, Tensor]]:
    """Terms of every port, channels-last, and the cell's parameters."""
    generator = torch.Generator().manual_seed(1)
    n, d, h, w = shape

    def draw(*size: int) -> Tensor:
        return (scale * torch.randn(size, generator=generator, dtype=torch.float64, device="cpu")).to(torch.get_default_device(), dtype)

    ports = {name: [draw(n, h, w, m * d).permute(0, 3, 1, 2).requires_grad_(True) for _ in range(terms)] for name, m in cell.ports.items()}
    parameters = {k: (1 + 0.1 * draw(*s)).detach().requires_grad_(True) for k, s in cell.parameter_shapes(d, h, w).items()}
    return ports, parameters


def results(cell: Cell, shape: tuple[int, ...], terms: int, dtype: torch.dtype, native: bool, scale: float = 1.0) -> dict[str, Tensor]:
    """States, and gradients of a weighted sum of them."""
    ports, parameters = tensors(cell, shape, terms, dtype, scale)
    if native:
        states = gate_step(cell, ports, parameters)
    else:
        states = cell_step(cell, {name: torch.stack(values).sum(0) for name, values in ports.items()}, parameters)
    generator = torch.Generator().manual_seed(2)
    weights = [torch.randn(s.shape, generator=generator, dtype=torch.float64, device="cpu").to(s.device, dtype) for s in states]
    sum((s * w).sum() for s, w in zip(states, weights, strict=True)).backward()
    found = {f"state {name}": s.detach() for name, s in zip(cell.states, states, strict=True)}
    found |= {f"grad {name}[{i}]": t.grad for name, values in ports.items() for i, t in enumerate(values)}
    return {**found, **{f"grad {name}": p.grad for name, p in parameters.items()}}


@by_cell
@pytest.mark.parametrize("terms", [1, 2, 3, 8])
def test_equals_the_reference_in_float64(name: str, terms: int, isa: str) -> None:
    for shape in SHAPES[1:] if "norm" in name else SHAPES:  # (one value, normalised, is rounding alone)
        ours, theirs = results(CELLS[name], shape, terms, torch.float64, True), results(CELLS[name], shape, terms, torch.float64, False)
        for key, expected in theirs.items():
            torch.testing.assert_close(ours[key], expected, rtol=1e-11, atol=1e-12, msg=lambda m, k=key: f"{k}: {m}")


@by_cell
def test_accuracy_in_float32(name: str, isa: str) -> None:
    """Error in norm against float64: at most twice that of plain PyTorch, plus a few roundings."""
    cell, shape = CELLS[name], (3, 64, 4, 4)
    truth = results(cell, shape, 2, torch.float64, False)
    ours, plain = results(cell, shape, 2, torch.float32, True), results(cell, shape, 2, torch.float32, False)
    for key, expected in truth.items():
        error, reference = ((x[key].double() - expected).norm() / expected.norm() for x in (ours, plain))
        assert error <= 2 * reference + 2e-7, (key, error.item(), reference.item())


@by_cell
def test_large_values_saturate(name: str, isa: str) -> None:
    cell = CELLS[name]
    for dtype in (torch.float32, torch.float64):
        ours, theirs = results(cell, (1, 8, 3, 3), 1, dtype, True, 200.0), results(cell, (1, 8, 3, 3), 1, dtype, False, 200.0)
        for key, expected in theirs.items():
            assert ours[key].isfinite().all(), key
            torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=1e-4, msg=lambda m, k=key: f"{k}: {m}")


def test_units_in_the_last_place(isa: str) -> None:
    """Sigmoid and tanh within 3, elu within 2, wherever the result is a normal number; infinities give the limits."""
    wide, near = torch.linspace(-86, 86, 20_011), torch.logspace(-20, 1, 5_003)
    x = torch.cat([wide, near, -near, torch.tensor([torch.inf, -torch.inf])]).view(1, -1, 1, 1)
    zero, one = torch.zeros_like(x), Gain(1.0, 0.0)
    _, sigmoid = gate_step(GRUGates(), {"gates": [torch.cat([x, x], 1)], "memory": [zero]}, {})
    (tanh,) = gate_step(GRUUpdate(), {"candidate": [x], "update": [zero], "memory": [zero]}, {})
    (elu,) = gate_step(ReciprocalGated(one, one), {"drive": [x], "memory": [zero]}, {})
    for found, function, most in ((sigmoid, torch.sigmoid, 3.0), (tanh, torch.tanh, 3.0), (elu, torch.nn.functional.elu, 2.0)):
        truth, finite = function(x.double()), x.isfinite()
        unit = 2.0 ** (torch.frexp(truth[finite]).exponent - 24)
        assert ((found[finite].double() - truth[finite]) / unit).abs().max() < most
        torch.testing.assert_close(found[~finite], truth[~finite].float(), rtol=0, atol=1e-37)


def test_small_values_keep_their_digits(isa: str) -> None:
    """tanh and elu near zero, relative to their size."""
    small = torch.tensor([1e-7, -1e-7, 3e-4, -3e-4, 1e-20, 0.0]).view(1, -1, 1, 1)
    zero = torch.zeros_like(small)
    (h,) = gate_step(GRUUpdate(), {"candidate": [small], "update": [zero], "memory": [zero]}, {})
    torch.testing.assert_close(h, torch.tanh(small), rtol=3e-7, atol=0)
    one = Gain(1.0, 0.0)
    (h,) = gate_step(ReciprocalGated(one, one), {"drive": [small], "memory": [zero]}, {})
    torch.testing.assert_close(h, torch.nn.functional.elu(small), rtol=3e-7, atol=0)


@by_cell
def test_nan_goes_through(name: str, isa: str) -> None:
    ports, parameters = tensors(CELLS[name], (1, 4, 2, 2), 1, torch.float32)
    first = next(iter(ports))
    with torch.no_grad():
        ports[first][0][0, :, 0, 0] = torch.nan
    states = gate_step(CELLS[name], ports, parameters)
    assert states[0][0, :, 0, 0].isnan().all()
    if "norm" not in name:
        assert states[0][0, :, 1, 1].isfinite().all()


def test_absent_ports_and_layouts_and_threads() -> None:
    cell = LSTM()
    gates = torch.randn(2, 12, 6, 5)
    expected = cell_step(cell, {"gates": gates}, {})
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            for layout in (gates, gates.contiguous(memory_format=torch.channels_last), torch.randn(2, 24, 6, 5)[:, ::2] * 0 + gates):
                for a, b in zip(gate_step(cell, {"gates": [layout]}, {}), expected, strict=True):
                    torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("name", [name for name in CELLS if "norm" not in name])
@pytest.mark.parametrize("terms", [1, 3])
def test_biases_and_buffers_in_place(name: str, terms: int, isa: str) -> None:
    """Biases enter the sums; sums over the first terms' buffers, and gradients over the sums', are the same."""
    cell = CELLS[name]
    ports, _ = tensors(cell, (2, 5, 3, 4), terms, torch.float64)
    flat = [[t.detach().permute(0, 2, 3, 1).contiguous() for t in ports[p]] for p in cell.ports]
    biases = [torch.randn(p[0].shape[3], dtype=torch.float64) for p in flat]
    leaves = [(torch.stack(p).sum(0) + b).permute(0, 3, 1, 2).requires_grad_(True) for p, b in zip(flat, biases, strict=True)]
    expected = cell_step(cell, dict(zip(cell.ports, leaves, strict=True)), {})
    weights = [torch.randn_like(s) for s in expected]
    grads = torch.autograd.grad(sum((s * w).sum() for s, w in zip(expected, weights, strict=True)), leaves)
    sums = [p[0] for p in flat]
    states = [torch.empty(2, 3, 4, 5, dtype=torch.float64) for _ in expected]
    added = [b + cell.constants.get(port, 0.0) for port, b in zip(cell.ports, biases, strict=True)]  # (a constant comes as a bias)
    launches.gate_step(gate_scalars(cell), ports=flat, biases=added, sums=sums, states=states)
    for ours, theirs in zip(states, expected, strict=True):
        torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs, rtol=1e-11, atol=1e-12)
    upstream = [w.permute(0, 2, 3, 1).contiguous() for w in weights]
    more = [torch.randn_like(u) if k or terms > 1 else None for k, u in enumerate(upstream)]
    first = [u if m is None else u - m for u, m in zip(upstream, more, strict=True)]
    rows = [torch.full_like(b, torch.nan) if k != 1 else None for k, b in enumerate(biases)]
    launches.gate_step(
        gate_scalars(cell), ports=[[s] for s in sums], states=first, grad_ports=sums, more=more, grad_biases=rows, backward=True
    )
    for ours, theirs, row in zip(sums, grads, rows, strict=True):
        torch.testing.assert_close(ours.permute(0, 3, 1, 2), theirs, rtol=1e-11, atol=1e-12)
        if row is not None:
            torch.testing.assert_close(row, theirs.sum((0, 2, 3)), rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_biases_are_summed_alike_by_any_number_of_threads(dtype: torch.dtype, isa: str) -> None:
    """Over many chunks of pixels, the last of which is not full: the same bits, and those of float64 but for rounding."""
    sums, upstream = [torch.randn(3, 13, 17, m * 5, dtype=dtype) for m in (2, 1)], torch.randn(3, 13, 17, 5, dtype=dtype)
    threads, found = torch.get_num_threads(), []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            grads, rows = [torch.empty_like(s) for s in sums], [torch.empty(m * 5, dtype=dtype) for m in (2, 1)]
            launches.gate_step(
                gate_scalars(UGRNN()), ports=[[s] for s in sums], states=[upstream], grad_ports=grads, grad_biases=rows, backward=True
            )
            found.append(rows)
    finally:
        torch.set_num_threads(threads)
    for rows in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], rows, strict=True))
    for grad, row in zip(grads, rows, strict=True):
        exact = grad.double().sum((0, 1, 2))
        assert (row.double() - exact).norm() <= (2e-7 if dtype == torch.float32 else 1e-15) * grad.double().abs().sum((0, 1, 2)).norm()


_SLOPES = {
    Activation.IDENTITY: torch.ones_like,
    Activation.RELU: lambda y: (y > 0).to(y.dtype),
    Activation.ELU: lambda y: torch.where(y > 0, 1, y + 1),
    Activation.TANH: lambda y: 1 - y * y,
}


@pytest.mark.parametrize("activation", _SLOPES, ids=lambda a: a.value)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_activation_backward(activation: Activation, dtype: torch.dtype, isa: str) -> None:
    """Of one summand and of two, over several chunks of pixels, with the sum for the bias and without."""
    state, one, two = (torch.randn(2, 9, 8, 19, dtype=dtype).tanh() for _ in range(3))
    for more, wanted in ((None, True), (two, True), (two, False)):
        room, row = torch.full_like(state, torch.nan), torch.full((19,), torch.nan, dtype=dtype) if wanted else None
        launches.activation_backward(
            activation=ACTIVATION_NUMBERS[activation], grad=one, more=more, state=state, grad_drive=room, grad_bias=row
        )
        expected = (one if more is None else one + more) * _SLOPES[activation](state)
        torch.testing.assert_close(room, expected, rtol=1e-6 if dtype == torch.float32 else 1e-14, atol=1e-7)
        if row is not None:
            torch.testing.assert_close(row.double(), room.double().sum((0, 1, 2)), rtol=1e-5, atol=1e-5)


def test_activation_backward_of_what_is_not_finite_is_pytorchs(isa: str) -> None:
    """A rectifier cuts infinite gradients to 0, and a NaN value lets its gradient through. (elu's PyTorch passes on or makes NaN, depending
    on the processor.)"""
    state = torch.tensor([0.0, 0.0, 2.0, 2.0, torch.nan, 0.0, -0.5]).expand(1, 1, 3, 7).contiguous()
    grad = torch.tensor([torch.inf, -torch.inf, torch.inf, torch.nan, 3.0, torch.nan, 2.0]).expand(1, 1, 3, 7).contiguous()
    for activation, expected in (
        (Activation.RELU, torch.ops.aten.threshold_backward(grad, state, 0)),
        (Activation.ELU, torch.ops.aten.elu_backward(grad, 1, 1, 1, True, state)),
    ):
        room = torch.full_like(state, -7.0)
        launches.activation_backward(activation=ACTIVATION_NUMBERS[activation], grad=grad, state=state, grad_drive=room)
        expected = torch.where(state.isnan(), grad, expected)
        torch.testing.assert_close(room, expected, equal_nan=True)


def test_gradients_by_finite_differences() -> None:
    for name, cell in CELLS.items():
        ports, parameters = tensors(cell, (1, 2, 2, 1), 1, torch.float64)
        names = list(ports)

        def run(*terms: Tensor, cell: Cell = cell, names: list[str] = names, own: Any = parameters) -> tuple[Tensor, ...]:
            return gate_step(cell, {n: [t] for n, t in zip(names, terms, strict=True)}, own)

        assert torch.autograd.gradcheck(run, [ports[n][0] for n in names]), name


def test_second_derivatives_raise() -> None:
    x = torch.randn(1, 8, 2, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="gate_step cannot be differentiated twice"):
        torch.autograd.grad(gate_step(UGRNN(), {"gates": [x]}, {})[0].sum(), x, create_graph=True)


@pytest.mark.parametrize("name", ["lstm", "gru_gates", "reciprocal_median"])
@pytest.mark.parametrize("terms", [1, 2])
def test_opcheck(name: str, terms: int) -> None:
    """Schema, fake implementation, autograd's registration, and both under torch.compile's dispatch."""
    cell = CELLS[name]
    ports, _ = tensors(cell, (2, 3, 4, 5), terms, torch.float64)
    flat = [t.detach().permute(0, 2, 3, 1).contiguous().requires_grad_(True) for values in ports.values() for t in values]
    rule, forget_bias, tau, gate, activation = gate_scalars(cell)
    key = (rule, activation, [forget_bias, *tau, *gate])
    torch.library.opcheck(torch.ops.rnndyn.gate_step.default, (flat, [terms] * len(ports), *key))
    sums = [t.detach() for t in flat[::terms]]
    grads = [torch.randn(2, 4, 5, 3, dtype=torch.float64) for _ in cell.states]
    torch.library.opcheck(torch.ops.rnndyn.gate_step_backward.default, (sums, grads, *key))


def test_one_graph_when_compiled() -> None:
    """torch.compile takes a step, with its gradient, without a break."""
    cell = CELLS["lstm"]
    ports, _ = tensors(cell, (2, 3, 4, 5), 2, torch.float64)
    leaves = [t for values in ports.values() for t in values]
    compiled = torch.compile(lambda ports: gate_step(cell, ports, {}), fullgraph=True, backend="aot_eager")
    found = [torch.autograd.grad(sum(s.square().sum() for s in run(ports)), leaves)
             for run in (compiled, lambda ports: gate_step(cell, ports, {}))]  # fmt: skip
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-12, atol=1e-13)


def test_sums_that_nobody_keeps(isa: str) -> None:
    """Without a buffer for a port's sum the states are the same."""
    cell = CELLS["lstm"]
    ports, _ = tensors(cell, (2, 5, 3, 4), 3, torch.float64)
    flat = [[t.detach().permute(0, 2, 3, 1).contiguous() for t in values] for values in ports.values()]
    biases = [torch.randn(p[0].shape[3], dtype=torch.float64) for p in flat]
    found = []
    for keep in (False, True):
        states = [torch.full((2, 3, 4, 5), torch.nan, dtype=torch.float64) for _ in cell.states]
        sums = [torch.empty_like(p[0]) if keep else None for p in flat]
        launches.gate_step(gate_scalars(cell), ports=flat, biases=biases, sums=sums, states=states)
        found.append(states)
    for ours, expected in zip(*found, strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("cell", "dtype", "message"),
    [
        (TimeDecay(), torch.float32, "there is no kernel of time_decay"),
        (LSTM(peepholes=True), torch.float32, "no LSTM with a norm of its memory or peepholes"),
        (ReciprocalGated(activation=Activation.SIGMOID), torch.float32, "the kernel has no activation sigmoid"),
        (ReciprocalGated(Gain(nonlinearity=Activation.RELU)), torch.float32, "gains of the sigmoid and of tanh only"),
        (UGRNN(), torch.float16, r"it takes float32 and float64 on the CPU and halves on CUDA devices, not torch.float16 on cpu"),
    ],
)
def test_says_what_it_cannot_run(cell: Cell, dtype: torch.dtype, message: str) -> None:
    example = torch.zeros(1, dtype=dtype)
    assert not can_run_gate_step(cell, example)
    with pytest.raises(ValueError, match=f"gate_step: .*{message}"):
        can_run_gate_step(cell, example, raise_error=True)
