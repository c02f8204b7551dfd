"""``winograd_conv`` against torch's convolution in float64, at awkward shapes, for every form and instruction set."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import addresses, core, engines, kept_packs, winograd_conv
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator, can_run_winograd, choose_engine
from rnndyn_fast.ops.winograd_conv import WinogradForm, WinogradMap, pack_weight, taps
from rnndyn_fast.program import linear
from rnndyn_fast.program.one_map import OneMap, sum_of_maps

MAPS = [
    WinogradMap(WinogradForm(5, 2), 2),
    WinogradMap(WinogradForm(6, 3), 3),
    WinogradMap(WinogradForm(8, 3), 3),
    WinogradMap(WinogradForm(6, 5), 5),
    WinogradMap(WinogradForm(8, 5), 5),
    WinogradMap(WinogradForm(5, 2), 3, transposed=True),
    WinogradMap(WinogradForm(6, 3), 5, transposed=True),
    WinogradMap(WinogradForm(6, 3), 3, turned=True),
    WinogradMap(WinogradForm(8, 5), 5, turned=True),
    WinogradMap(WinogradForm(8, 4), 7),
    WinogradMap(WinogradForm(8, 4), 7, turned=True),
]
# M, H, W, C_source, C_target: one pixel, one channel, partial tiles and partial vectors in every direction, several blocks of tiles.
SHAPES = [
    (1, 1, 1, 1, 1),
    (1, 2, 3, 3, 17),
    (2, 5, 7, 17, 33),
    (1, 8, 8, 33, 3),
    (3, 19, 13, 16, 32),
    (1, 4, 19, 1, 48),
    (5, 12, 12, 40, 24),
    (40, 6, 6, 8, 16),
    (7, 12, 13, 17, 33),
]
TOLERANCE = 1e-5  # relative, in norm; the largest seen over these cases is 6e-6 (F(4, 5) on a map of one pixel)


def _geometry(m: WinogradMap) -> Geometry:
    padding = (m.kernel_size - 1) // 2
    if m.kernel_size == 2:
        return Geometry(Operator.CONV, 1, 0, 1)
    if m.turned:
        return Geometry(Operator.CONV_TRANSPOSE, 1, padding)
    return Geometry(Operator.CONV_TRANSPOSE, 2, padding, 1) if m.transposed else Geometry(Operator.CONV, 1, padding)


def _reference(m: WinogradMap, x: Tensor, weight: Tensor) -> Tensor:
    """[M, C, H, W] in float64."""
    padding = (m.kernel_size - 1) // 2
    if m.transposed or m.turned:
        scale = 2 if m.transposed else 1
        return functional.conv_transpose2d(x, weight, stride=scale, padding=padding, output_padding=scale - 1)
    if m.kernel_size == 2:
        x = functional.pad(x, (0, 1, 0, 1))
    return functional.conv2d(x, weight, padding=padding)


def _case(m: WinogradMap, shape: tuple[int, ...], seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """A source map [M, H, W, C], a weight, and a gradient of the result."""
    samples, height, width, source, target = shape
    generator = torch.Generator().manual_seed(seed)
    scale = 2 if m.transposed else 1
    channels = (source, target) if m.transposed or m.turned else (target, source)
    x = torch.randn(samples, height, width, source, generator=generator)
    weight = torch.randn(*channels, m.kernel_size, m.kernel_size, generator=generator) / (source * m.kernel_size**2) ** 0.5
    return x, weight, torch.randn(samples, scale * height, scale * width, target, generator=generator)


def _relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


def _poison() -> None:
    """Whatever a kernel reads without having written it is now NaN."""
    core._workspaces.scratch = torch.full((4_000_000,), float("nan"))


@pytest.mark.parametrize("m", MAPS, ids=lambda m: f"{m.form}{'T' if m.transposed else ''}")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_forward_and_gradients(m: WinogradMap, shape: tuple[int, ...], isa: str) -> None:
    x, weight, grad = _case(m, shape)
    prepared = OneMap(_geometry(m), weight, EngineChoice.of(m, "test"))
    x64 = x.double().permute(0, 3, 1, 2).requires_grad_()
    weight64 = weight.double().requires_grad_()
    expected = _reference(m, x64, weight64)
    expected_x, expected_weight = torch.autograd.grad(expected, (x64, weight64), grad.double().permute(0, 3, 1, 2))

    _poison()
    y = prepared.forward(x)
    _poison()
    grad_x, grad_weight = prepared.backward(x, grad, need_x=True, need_weight=True)

    assert y.is_contiguous()
    assert y.shape == grad.shape
    assert _relative(y, expected.detach().permute(0, 2, 3, 1)) < TOLERANCE
    assert grad_x is not None
    assert grad_weight is not None
    assert _relative(grad_x, expected_x.permute(0, 2, 3, 1)) < TOLERANCE
    assert grad_weight.shape == weight.shape
    assert _relative(grad_weight, expected_weight) < TOLERANCE
    total = grad_weight.clone()
    assert prepared.backward(x, grad, need_x=False, need_weight=True, weight_into=total)[1] is total
    assert torch.equal(total, 2 * grad_weight)


@pytest.mark.parametrize(
    ("m", "source", "target"),
    [(MAPS[0], 289, 321), (MAPS[1], 161, 330), (MAPS[4], 290, 290), (MAPS[5], 257, 257), (MAPS[8], 161, 329)],
    ids=str,
)
def test_gradients_of_large_weights_by_rows_of_frequencies(m: WinogradMap, source: int, target: int, isa: str) -> None:
    """Sums of all frequencies would be more than 12.5 MiB: two rows at a time, in two blocks of tiles or more, and where
    there are four phases channels of the gradient in parts too; one thread and several."""
    shape = (70, 9 if m.form.outputs < 6 else 13, 3, source, target)
    x, weight, grad = _case(m, shape)
    weight64 = weight.double().requires_grad_()
    expected = _reference(m, x.double().permute(0, 3, 1, 2), weight64)
    (expected_weight,) = torch.autograd.grad(expected, weight64, grad.double().permute(0, 3, 1, 2))
    prepared = OneMap(_geometry(m), weight, EngineChoice.of(m, "test"))
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            core._workspaces.scratch = torch.full((8_000_000,), float("nan"))
            found.append(prepared.backward(x, grad, need_x=False, need_weight=True)[1])
    finally:
        torch.set_num_threads(before)
    grad_weight = found[0]
    assert grad_weight is not None
    assert torch.equal(grad_weight, found[1])
    assert _relative(grad_weight, expected_weight) < TOLERANCE
    total = grad_weight.clone()
    assert prepared.backward(x, grad, need_x=False, need_weight=True, weight_into=total)[1] is total
    torch.testing.assert_close(total, 2 * grad_weight, rtol=1e-5, atol=1e-5 * float(grad_weight.abs().max()))


@pytest.mark.parametrize(("source", "target", "size"), [(1504, 388, 6), (1504, 388, 34), (1024, 1376, 6)])
def test_the_last_part_of_a_large_weight_has_room(source: int, target: int, size: int, isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has fewer channels, takes all rows of frequencies at a time, and so more scratch than the first one."""
    held: list[tuple[Tensor, int]] = []
    beyond = 1 << 20

    def take(nbytes: int) -> int:
        room = torch.full((nbytes // 4 + beyond + 16,), 7.0)
        skip = -addresses.first_element(room) % 64
        held.append((room, (nbytes + skip) // 4))
        return addresses.first_element(room) + skip

    @contextmanager
    def scratch(launch: Any) -> Iterator[tuple[int, int]]:
        yield take(launch.scratch_bytes), take(launch.room_bytes)

    monkeypatch.setattr(core, "scratch", scratch)
    m = WinogradMap(WinogradForm(8, 3), 3)
    x, grad = torch.randn(1, size, size, source), torch.randn(1, size, size, target)
    winograd_conv.winograd_weight_grad(m, x, grad, torch.empty(target, source, 3, 3))
    assert len(held) == 2
    for room, end in held:
        assert bool((room[end:] == 7).all())


@pytest.mark.parametrize("m", [m for m in MAPS if m.form.kernel == 3], ids=str)
@pytest.mark.parametrize("shape", [*SHAPES, (2, 7, 9, 150, 40), (1, 8, 5, 40, 257)], ids=str)
def test_taps_are_transformed_as_they_are_read(m: WinogradMap, shape: tuple[int, ...], isa: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As :func:`test_forward_and_gradients`; two terms of which one is transformed already, chunks of 128 channels and the rest, one thread
    and several."""
    x, weight, grad = _case(m, shape)
    x64, weight64 = x.double().permute(0, 3, 1, 2).requires_grad_(), weight.double()
    expected = _reference(m, x64, weight64)
    (expected_x,) = torch.autograd.grad(expected, x64, grad.double().permute(0, 3, 1, 2))
    transformed, by_taps = (OneMap(_geometry(m), weight, EngineChoice.of(m, "test")) for _ in range(2))
    assert not transformed.dense.packed(backward=False)[1].detail
    for module in (winograd_conv, linear):
        monkeypatch.setattr(module, "packs_taps", lambda *_: True)
    assert by_taps.dense.packed(backward=False)[1].detail
    assert by_taps.dense.packed(backward=True)[1].detail
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            _poison()
            y = by_taps.forward(x)
            _poison()
            twice = sum_of_maps([transformed, by_taps], [x, x])
            _poison()
            grad_x, _ = by_taps.backward(x, grad, need_x=True, need_weight=False)
            assert _relative(y, expected.detach().permute(0, 2, 3, 1)) < TOLERANCE
            assert _relative(twice, 2 * expected.detach().permute(0, 2, 3, 1)) < TOLERANCE
            assert grad_x is not None
            assert _relative(grad_x, expected_x.permute(0, 2, 3, 1)) < TOLERANCE
            found.append((y, twice, grad_x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_large_weights_are_packed_as_taps() -> None:
    """No more bytes than the parameter has (with channels in whole panels); small ones are transformed, and so are other kernels, and large
    ones where transforming them would cost much."""
    small, large = torch.randn(64, 64, 3, 3), torch.randn(320, 256, 3, 3)
    assert not pack_weight(WinogradMap(WinogradForm(6, 3), 3), large).by_taps
    assert pack_weight(WinogradMap(WinogradForm(6, 3), 3), torch.randn(640, 576, 3, 3)).by_taps
    for m in (WinogradMap(WinogradForm(6, 3), 3, hides_transform=True), WinogradMap(WinogradForm(8, 3), 3, hides_transform=True)):
        for backward in (False, True):
            packed = pack_weight(m, large, backward=backward)
            assert packed.by_taps
            assert packed.nbytes == large.nbytes
            assert not pack_weight(m, small, backward=backward).by_taps
    assert not pack_weight(WinogradMap(WinogradForm(8, 5), 5, hides_transform=True), torch.randn(256, 256, 5, 5)).by_taps


@pytest.mark.parametrize(("height", "width"), [(h, 1 + (7 * h) % 19) for h in range(1, 20)])
def test_every_size(height: int, width: int) -> None:
    for m in MAPS:
        x, weight, _ = _case(m, (1, height, width, 3, 17))
        y = OneMap(_geometry(m), weight, EngineChoice.of(m, "test")).forward(x)
        expected = _reference(m, x.double().permute(0, 3, 1, 2), weight.double()).permute(0, 2, 3, 1)
        assert _relative(y, expected) < TOLERANCE, m


@pytest.mark.parametrize("m", MAPS, ids=str)
def test_threads_do_not_change_a_bit(m: WinogradMap) -> None:
    x, weight, grad = _case(m, (3, 9, 10, 48, 40))
    prepared = OneMap(_geometry(m), weight, EngineChoice.of(m, "test"))
    results = []
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            results.append((prepared.forward(x), *prepared.backward(x, grad, need_x=True, need_weight=True)))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], result, strict=True))


@pytest.mark.parametrize("m", [MAPS[0], WinogradMap(WinogradForm(8, 4), 7)], ids=str)
def test_sum_of_maps_is_one_call(m: WinogradMap) -> None:
    x1, w1, _ = _case(m, (2, 7, 6, 20, 24))
    x2, w2, _ = _case(m, (2, 7, 6, 9, 24), seed=1)
    weights = [OneMap(_geometry(m), w, EngineChoice.of(m, "test")) for w in (w1, w2)]
    expected = sum(_reference(m, x.double().permute(0, 3, 1, 2), w.double()) for x, w in ((x1, w1), (x2, w2)))
    assert isinstance(expected, Tensor)
    assert _relative(sum_of_maps(weights, [x1, x2]), expected.permute(0, 2, 3, 1)) < TOLERANCE


@pytest.mark.parametrize(("kernel", "transposed"), [(3, True), (5, True), (7, False)])
def test_every_tap_belongs_to_one_phase(kernel: int, transposed: bool) -> None:
    m = next(m for m in MAPS if m.transposed == transposed and m.kernel_size == kernel)
    used = [tap for tap in itertools.chain.from_iterable(taps(m)) if tap >= 0]
    assert sorted(used) == list(range(kernel**2))


def test_one_network_step_is_accurate() -> None:
    """The error budget of the engine: one step's relative L2 error against float64 at most 1e-5, every area, both interactions."""
    for interaction in ("additive", "multiplicative"):
        net = blt_net_64(LT_interaction=interaction, timesteps=2, widths=(16, 32, 64, 128, 256), engine="winograd")
        exact = blt_net_64(LT_interaction=interaction, timesteps=2, widths=(16, 32, 64, 128, 256), backend="reference").double()
        exact.load_state_dict(net.state_dict())
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            _, ours = net(x, record=("v1", "v2", "v4", "it"))
            _, truth = exact(x.double(), record=("v1", "v2", "v4", "it"))
        for area in ours:
            assert _relative(ours[area], truth[area]) < 1e-5, area


# ---------------------------------------------------------------- choice of engine


@pytest.fixture
def no_matrix_units(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engines, "has_matrix_units", lambda: False)


@pytest.mark.usefixtures("no_matrix_units")
def test_rule() -> None:
    conv, transposed = Geometry(Operator.CONV, 1, 1), Geometry(Operator.CONV_TRANSPOSE, 2, 1, 1)

    def choice(geometry: Geometry, shape: tuple[int, ...], size: int, engine: str = "auto", dtype: torch.dtype = torch.float32) -> str:
        return str(choose_engine(geometry, shape, size, size, dtype, engine))

    assert choice(conv, (128, 64, 3, 3), 32) == "winograd F(4x4,3x3)"
    assert choice(conv, (64, 32, 3, 3), 64) == "winograd F(6x6,3x3)"
    assert choice(Geometry(Operator.CONV, 1, 2), (64, 32, 5, 5), 64) == "winograd F(4x4,5x5)"
    assert choice(transposed, (64, 32, 3, 3), 16) == "winograd F(4x4,2x2)"
    two = Geometry(Operator.CONV, 1, 0, 1)
    assert choice(two, (64, 64, 2, 2), 28) == "winograd F(4x4,2x2)"
    assert choice(two, (64, 64, 2, 2), 14) == "direct"
    assert choice(conv, (32, 3, 3, 3), 64) == "direct"
    assert choice(conv, (32, 3, 3, 3), 64, "winograd") == "winograd F(6x6,3x3)"
    assert choice(conv, (64, 64, 3, 3), 1) == "direct"
    assert choice(conv, (64, 64, 3, 3), 32, "direct") == "direct"
    assert str(choose_engine(conv, (512, 512, 3, 3), 8, 8, torch.float32, samples=1)) == "direct"
    assert str(choose_engine(conv, (512, 512, 3, 3), 8, 8, torch.float32, samples=2)) == "winograd F(4x4,3x3)"
    assert choice(conv, (64, 64, 3, 3), 32, dtype=torch.float64) == "direct"
    assert choice(Geometry(Operator.CONV, 2, 1), (64, 64, 3, 3), 32) == "direct"
    assert choice(Geometry(Operator.LINEAR), (64, 64), 1) == "direct"


def test_reasons_are_given() -> None:
    with pytest.raises(ValueError, match=r'engine="winograd": .*float64'):
        can_run_winograd(Geometry(Operator.CONV, 1, 1), (8, 8, 3, 3), torch.float64, raise_error=True)
    with pytest.raises(ValueError, match="stride 2"):
        can_run_winograd(Geometry(Operator.CONV, 2, 1), (8, 8, 3, 3), torch.float32, raise_error=True)
    assert not can_run_winograd(Geometry(Operator.CONV, 1, 5), (8, 8, 11, 11), torch.float32)
    assert not can_run_winograd(Geometry(Operator.CONV, 1, 1, 1), (8, 8, 2, 2), torch.float32)  # (its zeros are before the map)
    with pytest.raises(ValueError, match="engine: expected one of auto, direct, winograd, amx, fused, triton, got 'fast'"):
        choose_engine(Geometry(Operator.CONV, 1, 1), (8, 8, 3, 3), 8, 8, torch.float32, "fast")
    net = blt_net_64(widths=(2, 4, 8, 16, 32), engine="fast")
    with pytest.raises(ValueError, match="engine: expected one of"):
        net(torch.zeros(1, 3, 64, 64))


def test_engines_agree_in_a_network() -> None:
    torch.manual_seed(1)
    net = blt_net_64(timesteps=3, widths=(16, 16, 32, 64, 128))
    x = torch.randn(2, 3, 64, 64)
    results = {}
    for engine in ("direct", "auto", "winograd"):
        net.engine = engine
        net.zero_grad()
        output = net(x)
        output.exp().square().sum().backward()
        with torch.no_grad():
            inference = net(x)
        torch.testing.assert_close(inference, output, rtol=1e-4, atol=1e-5)
        results[engine] = output.detach(), net.v2.lateral.weight.grad.clone()
    for engine in ("auto", "winograd"):
        torch.testing.assert_close(results[engine][0], results["direct"][0], rtol=1e-4, atol=1e-5)
        assert _relative(results[engine][1], results["direct"][1].double()) < 1e-3  # (a relu that flips moves a gradient this much)


def test_kept_weights_follow_hidden_changes() -> None:
    """Packed weights are kept between inference calls; a change through ``.data``, which no version counter sees, must show."""
    net = blt_net_64(timesteps=2, widths=(16, 16, 32, 64, 128))
    x = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        before = net(x)
        assert torch.equal(net(x), before)
        net.v2.lateral.weight.data.mul_(1.5)
        after = net(x)
        net.engine = "direct"
        torch.testing.assert_close(after, net(x), rtol=1e-4, atol=1e-5)
    assert not torch.equal(after, before)


def test_kept_weights_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_packs, "_KEPT_BYTES", 1_000_000)
    nets = [blt_net_64(timesteps=1, widths=(16, 16, 32, 64, 128)) for _ in range(3)]
    with torch.no_grad():
        for net in nets:
            net(torch.randn(1, 3, 64, 64))
    assert sum(p.nbytes for _, p in kept_packs._kept.values()) <= 1_000_000 or len(kept_packs._kept) == 1
