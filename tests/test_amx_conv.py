"""``amx_conv`` against torch's convolutions in float64, at awkward shapes, for every precision and instruction set.

Without matrix units the same kernels run on emulated ones: slowly, so the shapes are small.
"""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast import _core
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import core, engines
from rnndyn_fast.ops.amx_conv import AmxMap, amx_conv, amx_weight_grad, pack_amx_weight
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator, can_run_amx, can_sum, choose_engine, with_precision
from rnndyn_fast.program.one_map import OneMap, sum_of_maps

# operator, kernel, stride, padding, output padding; then M, H, W, C_source, C_target.
CONV, TRANSPOSE = Operator.CONV, Operator.CONV_TRANSPOSE
CASES = [
    (CONV, 1, 1, 0, 0, (1, 1, 1, 1, 1)),
    (CONV, 3, 1, 1, 0, (2, 8, 8, 32, 33)),
    (CONV, 3, 1, 1, 0, (3, 5, 7, 17, 3)),
    (CONV, 3, 1, 1, 0, (17, 2, 2, 40, 17)),
    (CONV, 3, 1, 1, 0, (1, 3, 35, 5, 16)),
    (CONV, 3, 1, 1, 0, (1, 7, 8, 33, 40)),  # one sample on a narrow map: tiles reach into the next row
    (CONV, 5, 1, 2, 0, (1, 9, 5, 17, 3)),
    (CONV, 7, 1, 3, 0, (4, 3, 3, 8, 8)),
    (CONV, 5, 2, 2, 0, (5, 9, 6, 3, 18)),
    (CONV, 3, 3, 0, 0, (2, 19, 13, 4, 5)),
    (CONV, 4, 1, 2, 0, (2, 6, 6, 16, 16)),
    (CONV, 2, 4, 0, 0, (2, 9, 8, 3, 3)),
    (CONV, 1, 1, 0, 0, (37, 1, 1, 50, 20)),
    (TRANSPOSE, 3, 2, 1, 1, (2, 4, 4, 33, 17)),
    (TRANSPOSE, 3, 2, 1, 1, (1, 5, 7, 20, 33)),
    (TRANSPOSE, 3, 2, 1, 1, (9, 4, 4, 33, 17)),  # a group of eight samples and one of one; taps two columns apart share lines
    (TRANSPOSE, 5, 2, 2, 1, (3, 4, 5, 20, 3)),
    (TRANSPOSE, 2, 3, 0, 0, (2, 3, 5, 4, 4)),
    (TRANSPOSE, 3, 1, 1, 0, (1, 6, 3, 3, 9)),
]
# Relative, in norm, by parts of a value; the largest seen are 5e-3, 5e-6 and 6e-7 (emulated: one product after another).
TOLERANCE = {1: 1e-2, 2: 1e-5, 3: 1e-6}
ISAS = ("portable", *(isa for isa in _core.build_info()["isa_supported"] if isa == "amx"))


def _prepared(operator: Operator, kernel: int, stride: int, padding: int, output_padding: int, parts: int, weight: Tensor) -> OneMap:
    m = AmxMap((kernel, kernel), stride, padding, operator is TRANSPOSE, parts)
    return OneMap(Geometry(operator, stride, padding, output_padding), weight, EngineChoice.of(m, "test"))


def _reference(operator: Operator, x: Tensor, weight: Tensor, stride: int, padding: int, output_padding: int) -> Tensor:
    if operator is TRANSPOSE:
        return functional.conv_transpose2d(x, weight, None, stride, padding, output_padding)
    return functional.conv2d(x, weight, None, stride, padding)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def _poison() -> None:
    """Whatever a kernel reads without having written it is now NaN."""
    core._workspaces.scratch = torch.full((4_000_000,), float("nan"))


def _operands(operator: Operator, kernel: int, shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    samples, height, width, source, target = shape
    generator = torch.Generator().manual_seed(3)
    channels = (source, target) if operator is TRANSPOSE else (target, source)
    x = torch.randn(samples, height, width, source, generator=generator)
    return x, torch.randn(*channels, kernel, kernel, generator=generator)


@pytest.mark.parametrize("isa", ISAS, indirect=True)
@pytest.mark.parametrize("case", CASES, ids=lambda c: f"{c[0].value}{c[1]}-{c[2]}-{'x'.join(map(str, c[5]))}")
@pytest.mark.parametrize("parts", [1, 2, 3])
def test_forward_and_gradients(case: tuple[Operator, int, int, int, int, tuple[int, ...]], parts: int, isa: str) -> None:
    operator, kernel, stride, padding, output_padding, shape = case
    x, weight = _operands(operator, kernel, shape)
    prepared = _prepared(operator, kernel, stride, padding, output_padding, parts, weight)
    x64, weight64 = x.double().permute(0, 3, 1, 2).requires_grad_(), weight.double().requires_grad_()
    expected = _reference(operator, x64, weight64, stride, padding, output_padding)
    grad = torch.randn(expected.permute(0, 2, 3, 1).shape, generator=torch.Generator().manual_seed(4))
    expected_x, expected_weight = torch.autograd.grad(expected, (x64, weight64), grad.double().permute(0, 3, 1, 2))

    _poison()
    y = prepared.forward(x)
    _poison()
    grad_x, grad_weight = prepared.backward(x, grad, need_x=True, need_weight=True)

    assert y.is_contiguous()
    assert y.shape == grad.shape
    assert _relative(y, expected.detach().permute(0, 2, 3, 1)) < TOLERANCE[parts]
    assert grad_x is not None
    assert grad_weight is not None
    assert _relative(grad_x, expected_x.permute(0, 2, 3, 1)) < TOLERANCE[parts]
    assert grad_weight.shape == weight.shape
    assert _relative(grad_weight, expected_weight) < TOLERANCE[parts]
    total = grad_weight.clone()
    assert prepared.backward(x, grad, need_x=False, need_weight=True, weight_into=total)[1] is total
    assert torch.equal(total, 2 * grad_weight)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", [*CASES, (CONV, 3, 1, 1, 0, (2, 4, 4, 450, 70))], ids=str)
def test_packed_in_every_call_is_the_same(case: tuple[Operator, int, int, int, int, tuple[int, ...]], threads: int) -> None:
    """Weights packed a piece at a time give the same bits (450 channels are two pieces), and hold nothing."""
    operator, kernel, stride, padding, output_padding, shape = case
    x, weight = _operands(operator, kernel, shape)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = []
        for late in (False, True):
            ahead = _prepared(operator, kernel, stride, padding, output_padding, 3, weight)
            assert isinstance(ahead.choice.map, AmxMap)
            w = OneMap(ahead.geometry, weight, EngineChoice.of(replace(ahead.choice.map, packs_late=late), "test"))
            y = w.forward(x)
            found.append((y, w.backward(x, y, need_x=True, need_weight=False)[0]))
            assert bool(w.dense.packed(backward=False)[1].detail) == (w.dense.packed_bytes == 0) == late
    finally:
        torch.set_num_threads(before)
    for a, b in zip(*found, strict=True):
        assert a is not None
        assert b is not None
        assert torch.equal(a, b)


def test_weight_gradients_in_slices() -> None:
    """Sums of more than 10 MiB are taken for some input channels at a time."""
    torch.manual_seed(0)
    x, grad, weight = torch.randn(3, 1, 2, 1700), torch.randn(3, 1, 2, 1600), torch.randn(1600, 1700, 1, 1)
    w = _prepared(CONV, 1, 1, 0, 0, 3, weight)
    _, found = w.backward(x, grad, need_x=False, need_weight=True)
    assert found is not None
    right = grad.double().flatten(0, 2).t() @ x.double().flatten(0, 2)
    assert _relative(found[:, :, 0, 0], right) < TOLERANCE[3]


def test_very_large_weights_are_packed_late(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_matrix_units", lambda: True)
    geometry = Geometry(CONV, 1, 1, 0)

    def late(channels: int, size: int, samples: int, reads: int = 10) -> bool:
        m = choose_engine(geometry, (channels, channels, 3, 3), size, size, torch.float32, "amx", samples, reads).map
        assert isinstance(m, AmxMap)
        return m.packs_late

    assert late(1024, 4, 4)
    assert not late(1024, 4, 64)  # many pixels: packing ahead is cheap beside the products
    assert not late(512, 4, 4)
    assert late(512, 8, 4, 3)  # few reads pay for little
    assert not late(512, 8, 8, 3)
    assert not late(128, 4, 4, 3)


def test_emulated_and_real_units_agree() -> None:
    x, weight = _operands(CONV, 3, (2, 7, 9, 40, 20))
    prepared = _prepared(CONV, 3, 1, 1, 0, 2, weight)
    before = _core.build_info()["isa"]
    results = []
    for name in ("portable", before):
        _core.select_isa(name)
        results.append(OneMap(prepared.geometry, weight, prepared.choice).forward(x))
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=1e-5 * float(results[0].abs().max()))


def test_sums_of_different_maps() -> None:
    x, weight = _operands(CONV, 3, (2, 8, 8, 20, 24))
    above, transposed = _operands(TRANSPOSE, 3, (2, 4, 4, 33, 24))
    weights = [_prepared(CONV, 3, 1, 1, 0, 3, weight), _prepared(TRANSPOSE, 3, 2, 1, 1, 3, transposed)]
    assert can_sum(weights)
    expected = _reference(CONV, x.double().permute(0, 3, 1, 2), weight.double(), 1, 1, 0)
    expected = expected + _reference(TRANSPOSE, above.double().permute(0, 3, 1, 2), transposed.double(), 2, 1, 1)
    assert _relative(sum_of_maps(weights, [x, above]), expected.permute(0, 2, 3, 1)) < TOLERANCE[3]


@pytest.mark.parametrize("parts", [2, 3])
def test_large_blocks(parts: int) -> None:
    """Several bands, several pieces of the sum over channels, several blocks and chunks of the weight's gradient."""
    if _core.build_info()["isa"] != "amx":
        pytest.skip("too slow on emulated matrix units")
    for shape, kernel in (((3, 40, 40, 96, 64), 3), ((5, 8, 8, 600, 520), 5)):
        x, weight = _operands(CONV, kernel, shape)
        prepared = _prepared(CONV, kernel, 1, kernel // 2, 0, parts, weight)
        x64, weight64 = x.double().permute(0, 3, 1, 2).requires_grad_(), weight.double().requires_grad_()
        expected = functional.conv2d(x64, weight64, padding=kernel // 2)
        expected_x, expected_weight = torch.autograd.grad(expected, (x64, weight64), expected.detach())
        y = prepared.forward(x)
        grad = expected.detach().permute(0, 2, 3, 1).float().contiguous()
        grad_x, grad_weight = prepared.backward(x, grad, need_x=True, need_weight=True)
        assert grad_x is not None
        assert grad_weight is not None
        assert _relative(y, expected.detach().permute(0, 2, 3, 1)) < TOLERANCE[parts]
        assert _relative(grad_x, expected_x.permute(0, 2, 3, 1)) < 2 * TOLERANCE[parts]
        assert _relative(grad_weight, expected_weight) < 2 * TOLERANCE[parts]


@pytest.mark.parametrize(
    "shape", [(5, 9, 9, 40, 70), (1, 5, 8, 96, 96), (24, 2, 4, 352, 352)], ids=["bands", "panels", "one chunk of sums"]
)
def test_independent_of_the_number_of_threads(shape: tuple[int, ...]) -> None:
    if shape[-1] > 300 and _core.build_info()["isa"] != "amx":
        pytest.skip("too slow on emulated matrix units")
    x, weight = _operands(CONV, 3, shape)
    prepared = _prepared(CONV, 3, 1, 1, 0, 2, weight)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            y = prepared.forward(x)
            results.append((y, *prepared.backward(x, y, need_x=True, need_weight=True)))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_what_is_not_finite_stays_so_and_where_it_is() -> None:
    x, weight = torch.ones(1, 1, 3, 32), torch.ones(32, 32, 1, 1)
    x[0, 0, 0, 5], x[0, 0, 1, 5] = float("inf"), float("nan")
    for parts in (1, 2, 3):
        y = _prepared(CONV, 1, 1, 0, 0, parts, weight).forward(x)
        assert not torch.isfinite(y[0, 0, 0]).any()  # (NaN with several parts: infinity times the zero of a part)
        assert torch.isnan(y[0, 0, 1]).all()
        assert torch.equal(y[0, 0, 2], torch.full((32,), 32.0))


def test_rule(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_matrix_units", lambda: True)
    conv, transposed = Geometry(CONV, 1, 1), Geometry(TRANSPOSE, 2, 1, 1)

    def choice(geometry: Geometry, shape: tuple[int, ...], engine: str = "auto") -> str:
        return str(choose_engine(geometry, shape, 32, 32, torch.float32, engine))

    assert choice(conv, (128, 64, 3, 3)) == "winograd F(4x4,3x3)"
    grad_map = choose_engine(conv, (128, 64, 3, 3), 32, 32, torch.float32).grad_map
    assert isinstance(grad_map, AmxMap)
    assert grad_map.parts == 3
    assert choice(conv, (128, 64, 3, 3), "auto:2") == "amx bfloat16 x 3"
    assert choice(conv, (128, 64, 3, 3), "auto:1") == "amx bfloat16"
    assert choice(transposed, (128, 64, 3, 3)) == "amx bfloat16 x 6"
    assert choice(Geometry(CONV, 2, 3), (64, 32, 7, 7)) == "amx bfloat16 x 6"
    assert choice(Geometry(Operator.LINEAR), (64, 32)) == "amx bfloat16 x 6"
    assert choice(conv, (64, 3, 3, 3)) == "direct"
    assert choice(conv, (64, 3, 3, 3), "amx") == "amx bfloat16 x 6"
    assert choice(conv, (64, 64, 3, 3), "direct:2") == "direct"
    with pytest.raises(ValueError, match=r'engine="amx": .*float64'):
        can_run_amx(conv, (8, 8, 3, 3), torch.float64, raise_error=True)
    assert not can_run_amx(Geometry(CONV, 5, 0), (8, 8, 3, 3), torch.float32)
    assert not can_run_amx(Geometry(CONV, 1, 5), (8, 8, 12, 12), torch.float32)


def test_precision_is_torchs() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        for precision, expected in (("highest", "auto"), ("high", "auto:2"), ("medium", "auto:1")):
            torch.set_float32_matmul_precision(precision)
            assert with_precision("auto") == expected
            with torch.autocast("cpu", dtype=torch.bfloat16):
                assert with_precision("auto") == "auto:1"
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("precision", "tolerance"), [("highest", 2e-6), ("high", 3e-5), ("medium", 5e-2)])
def test_network(precision: str, tolerance: float) -> None:
    """All terms, forward and gradients, against float64."""
    torch.manual_seed(5)
    options = {"timesteps": 3, "topdown_connections": True, "image_size": 16, "widths": (4, 8, 16, 32, 64), "num_classes": 5}
    net = blt_net_64(**options, backend="native", engine="amx")
    truth = blt_net_64(**options, backend="reference").double()
    truth.load_state_dict(net.state_dict())
    x = torch.randn(2, 3, 16, 16)
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision(precision)
        log_probs = net(x)
        log_probs.sum().backward()
    finally:
        torch.set_float32_matmul_precision(before)
    expected = truth(x.double())
    expected.sum().backward()
    assert _relative(log_probs.detach(), expected.detach()) < tolerance
    weight, exact = net.v2.lateral.weight.grad, truth.v2.lateral.weight.grad
    assert weight is not None
    assert exact is not None
    assert _relative(weight, exact) < 100 * tolerance  # (a relu or a maximum decides a near tie otherwise)


SMALL = [(1, 1), (2, 1), (5, 2), (1, 4)]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_maps_smaller_than_kernels(kernel: int, stride: int, transposed: bool) -> None:
    """With padding and without: grids of results may be wider than what they read, and have pixels that nothing reaches."""
    function = functional.conv_transpose2d if transposed else functional.conv2d
    for padding, (h, w), extra in itertools.product(sorted({0, kernel // 2}), SMALL, (0, 1) if transposed and stride > 1 else (0,)):
        options = {"stride": stride, "padding": padding, **({"output_padding": extra} if transposed else {})}
        x, weight = torch.randn(2, h, w, 5), torch.randn(*((5, 3) if transposed else (3, 5)), kernel, kernel)
        leaves = [x.permute(0, 3, 1, 2).double().requires_grad_(True), weight.double().requires_grad_(True)]
        try:
            exact = function(*leaves, **options)
        except RuntimeError:  # the kernel does not fit
            continue
        if not exact.numel():
            continue
        grad = torch.randn(exact.shape)
        grad_x, grad_weight = torch.autograd.grad(exact, leaves, grad.double())
        m, grad = AmxMap((kernel, kernel), stride, padding, transposed, 3), grad.permute(0, 2, 3, 1).contiguous()
        ours = amx_conv(x, pack_amx_weight(m, weight), torch.zeros(grad.shape))
        ours_x = amx_conv(grad, pack_amx_weight(m, weight, backward=True), torch.zeros(x.shape))
        ours_weight = amx_weight_grad(m, x, grad, torch.zeros(weight.shape))
        for found, expected in ((ours, exact), (ours_x, grad_x), (ours_weight.permute(0, 2, 3, 1), grad_weight)):
            torch.testing.assert_close(found.permute(0, 3, 1, 2).double(), expected, rtol=1e-4, atol=1e-4)
