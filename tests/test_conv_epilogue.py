"""The epilogue of convolutions against float64: both engines, every instruction set, awkward shapes, memory poisoned with NaN."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from cases import ADD, DOWN, MUL, UP, identity
from torch import Tensor
from torch.nn import functional

from rnndyn_fast import _core, rollout
from rnndyn_fast.graph import Activation, Area, Connection, Input, Network, Norm, Pool
from rnndyn_fast.ops import core
from rnndyn_fast.ops.amx_conv import AmxMap, amx_conv, pack_amx_weight
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator, can_end
from rnndyn_fast.ops.epilogue import Epilogue
from rnndyn_fast.ops.winograd_conv import WinogradForm, WinogradMap
from rnndyn_fast.program import plan, terms
from rnndyn_fast.program.one_map import OneMap, sum_of_maps

CONV, TRANSPOSE = Operator.CONV, Operator.CONV_TRANSPOSE
SAME3, SAME5, SAME7 = Geometry(CONV, 1, 1), Geometry(CONV, 1, 2), Geometry(CONV, 1, 3)
TWICE3, TWICE5 = Geometry(TRANSPOSE, 2, 1, 1), Geometry(TRANSPOSE, 2, 2, 1)
MAPS: dict[str, tuple[Geometry, int, WinogradMap | AmxMap]] = {
    "F43": (SAME3, 3, WinogradMap(WinogradForm(6, 3), 3)),
    "F63": (SAME3, 3, WinogradMap(WinogradForm(8, 3), 3)),
    "F25": (SAME5, 5, WinogradMap(WinogradForm(6, 5), 5)),
    "F45": (SAME5, 5, WinogradMap(WinogradForm(8, 5), 5)),
    "F54": (SAME7, 7, WinogradMap(WinogradForm(8, 4), 7)),
    "F42T": (TWICE3, 3, WinogradMap(WinogradForm(5, 2), 3, transposed=True)),
    "F43T": (TWICE5, 5, WinogradMap(WinogradForm(6, 3), 5, transposed=True)),
    "amx": (SAME3, 3, AmxMap((3, 3), 1, 1, parts=3)),
    "amxT": (TWICE3, 3, AmxMap((3, 3), 2, 1, transposed=True, parts=3)),
    "amx1": (Geometry(CONV), 1, AmxMap((1, 1), parts=3)),
}
# M, H, W, C_source, C_target
SHAPES = [(1, 1, 1, 1, 1), (2, 5, 7, 17, 33), (1, 8, 8, 33, 3), (3, 6, 13, 16, 32), (17, 2, 2, 5, 40)]
# What else enters: numbers of other drives and modulators, whether the result modulates, biases.
KINDS = {
    "alone": (0, 0, False, False),
    "added": (2, 0, False, True),
    "multiplied": (1, 2, False, True),
    "modulates": (1, 1, True, False),
    "modulates_bias": (3, 0, True, True),
}
TOLERANCE = 1e-5  # relative, in norm, as without an epilogue


class Case:
    """One convolution with other terms of an area, and what must come out, in float64."""

    def __init__(self, name: str, shape: tuple[int, ...], kind: str, *, seed: int = 0, offset: float = 0.0) -> None:
        self.geometry, kernel, self.map = MAPS[name]
        samples, height, width, source, target = shape
        generator = torch.Generator().manual_seed(seed)

        def normal(*size: int) -> Tensor:
            return torch.randn(*size, generator=generator)

        transposed = self.geometry.operator is TRANSPOSE
        self.x = normal(samples, height, width, source)
        channels = (source, target) if transposed else (target, source)
        self.weight = OneMap(
            self.geometry, normal(*channels, kernel, kernel) / (source * kernel**2) ** 0.5, EngineChoice.of(self.map, "test")
        )
        scale = 2 if transposed else 1
        self.size = samples, scale * height, scale * width, target
        drives, modulators, modulates, biases = KINDS[kind]
        self.end = Epilogue(
            [normal(*self.size) + offset for _ in range(drives)],
            [normal(*self.size) for _ in range(modulators)],
            modulates,
            normal(target) if biases else None,
            normal(target) if biases and (modulates or modulators) else None,
            torch.full(self.size, float("nan")) if modulates or modulators else None,
            torch.full((samples,), float("nan")),
            torch.full((samples,), float("nan")),
            1e-5,
        )

    def conv(self) -> Tensor:
        x, weight, g = self.x.double().permute(0, 3, 1, 2), self.weight.weight.double(), self.geometry
        if g.operator is TRANSPOSE:
            y = functional.conv_transpose2d(x, weight, None, g.stride, g.padding, g.output_padding)
        else:
            y = functional.conv2d(x, weight, None, g.stride, g.padding)
        return y.permute(0, 2, 3, 1)

    def expected(self, before: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """The value and the second factor."""
        y, zero = self.conv(), torch.zeros((), dtype=torch.float64)
        drive = sum((d.double() for d in self.end.drives), zero) + (zero if self.end.drive_bias is None else self.end.drive_bias.double())
        factor = 1 + sum((m.double() for m in self.end.modulators), zero)
        factor = factor + (zero if self.end.modulator_bias is None else self.end.modulator_bias.double())
        if before is not None:
            drive = drive + before.double()
        if self.end.modulates:
            factor = factor + y
        else:
            drive = drive + y
        return drive * factor, factor.expand(self.size)

    def run(self, out: Tensor | None = None, **options: bool) -> Tensor:
        core._workspaces.scratch = torch.full((4_000_000,), float("nan"))
        out = torch.full(self.size, float("nan")) if out is None else out
        return sum_of_maps([self.weight], [self.x], out, self.end, **options)

    def check(self, value: Tensor, before: Tensor | None = None) -> None:
        expected, factor = self.expected(before)
        # (Sums and products of few elements may nearly cancel: the convolution's own scale counts as well.)
        scale = torch.maximum(expected.norm(), self.conv().norm())
        assert float((value.double() - expected).norm() / scale) < 2 * TOLERANCE
        if self.end.modulator_sum is not None:
            assert float((self.end.modulator_sum.double() - factor).norm() / torch.maximum(factor.norm(), self.conv().norm())) < TOLERANCE
        assert self.end.mean is not None
        assert self.end.rstd is not None
        # Statistics of the value as it was written.
        flat = value.double().flatten(1)
        assert torch.allclose(self.end.mean.double(), flat.mean(1), rtol=1e-5, atol=1e-6 * float(flat.std(unbiased=False) + 1e-3))
        assert torch.allclose(self.end.rstd.double(), (flat.var(1, unbiased=False) + self.end.eps).rsqrt(), rtol=1e-5, atol=0)


def relative(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b).norm() / b.norm().clamp_min(1e-30))


# Emulated matrix units are the same in every build: once is enough.
ON_EACH = [(name, isa) for isa in _core.build_info()["isa_supported"] for name in MAPS if name[:3] != "amx" or isa in ("portable", "amx")]


@pytest.mark.parametrize(("name", "isa"), ON_EACH, indirect=["isa"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.usefixtures("isa")
def test_value_and_statistics(name: str, shape: tuple[int, ...], kind: str) -> None:
    case = Case(name, shape, kind)
    case.check(case.run())


@pytest.mark.parametrize("name", ["F43", "F42T", "amx", "amxT"])
def test_added_to_what_is_there(name: str) -> None:
    case = Case(name, (2, 3, 5, 9, 20), "added")
    before = torch.randn(case.size)
    case.check(case.run(before.clone(), accumulate=True), before)


@pytest.mark.parametrize("name", MAPS)
def test_threads_do_not_change_a_bit_and_runs_repeat(name: str) -> None:
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 2):
            torch.set_num_threads(threads)
            # (Enough tiles for several blocks, and too few for all threads.)
            for shape in ((5, 6, 5, 20, 40), (1, 3, 4, 33, 17)):
                case = Case(name, shape, "modulates_bias")
                results.append((case.run(), case.end.mean, case.end.rstd, case.end.modulator_sum))
    finally:
        torch.set_num_threads(before)
    for first in (0, 1):
        for other in results[first + 2 :: 2]:
            for a, b in zip(results[first], other, strict=True):
                assert a is not None
                assert b is not None
                assert torch.equal(a, b)


@pytest.mark.parametrize(("name", "isa"), [pair for pair in ON_EACH if pair[0] in ("F43", "F63", "amx")], indirect=["isa"])
@pytest.mark.usefixtures("isa")
def test_a_large_mean_does_not_drown_the_variance(name: str) -> None:
    """E[z^2] - E[z]^2 in float32 would leave no digit of a variance of 10 about a mean of 10,000."""
    case = Case(name, (2, 6, 7, 5, 19), "added", offset=5000.0)
    value = case.run()
    flat = value.double().flatten(1)
    assert case.end.rstd is not None
    torch.testing.assert_close(case.end.rstd.double(), (flat.var(1, unbiased=False) + 1e-5).rsqrt(), rtol=1e-4, atol=0)


def test_what_is_not_finite_shows_in_its_sample_alone() -> None:
    case = Case("F43", (3, 5, 5, 17, 17), "added")
    case.end.drives[0][1, 2, 3, 4] = float("nan")
    value = case.run()
    assert case.end.mean is not None
    assert torch.isnan(value).sum() == 1
    assert torch.isnan(case.end.mean).tolist() == [False, True, False]


def test_bad_arguments_are_named() -> None:
    case = Case("F43", (2, 4, 4, 3, 5), "modulates")
    out = torch.empty(case.size)
    with pytest.raises(ValueError, match=r"drives\[0\]: expected a contiguous CPU tensor \[2, 4, 4, 5\]"):
        sum_of_maps([case.weight], [case.x], out, replace(case.end, drives=[torch.zeros(2, 4, 4, 4)]))
    with pytest.raises(ValueError, match="drives: a modulator needs a drive"):
        sum_of_maps([case.weight], [case.x], out, replace(case.end, drives=[]))
    with pytest.raises(ValueError, match="mean, rstd: expected both or neither"):
        sum_of_maps([case.weight], [case.x], out, replace(case.end, rstd=None))
    with pytest.raises(ValueError, match="modulators: expected at most 6, got 7"):
        sum_of_maps([case.weight], [case.x], out, replace(case.end, modulators=[out] * 7))


def test_pixels_that_nothing_reaches_are_refused() -> None:
    m = AmxMap((2, 2), 3, transposed=True, parts=3)
    weight = torch.randn(3, 4, 2, 2)
    assert not can_end(OneMap(Geometry(TRANSPOSE, 3), weight, EngineChoice.of(m, "test")))
    with pytest.raises(ValueError, match="nothing reaches"):
        amx_conv(torch.zeros(1, 3, 3, 3), pack_amx_weight(m, weight), torch.empty(1, 8, 8, 4), epilogue=Epilogue())


# ---------------------------------------------------------------- an area's step


def area_of(engines: tuple[str | None, ...], *, multiplicative: bool, norm: bool) -> Network:
    """One area: a known drive (multiplicative: and a known modulator), and a convolution of an input for each engine."""
    inputs, connections = [Input("known", 20, 6, 8)], [identity("known", "a")]
    if multiplicative:
        inputs.append(Input("factor", 20, 6, 8))
        connections.append(identity("factor", "a", DOWN, delay=0))
    for k, name in enumerate(engines):
        twice = name in ("amxT", "F42T")
        inputs.append(Input(f"x{k}", 18 + k, *((3, 4) if twice else (6, 8))))
        operator, stride = (TRANSPOSE, 2) if twice else (CONV, 1)
        role = DOWN if multiplicative else UP
        connections.append(Connection(f"x{k}", "a", role, operator, 3, stride, delay=0, parameter=f"w{k}"))
    areas = (Area("a", 20, MUL if multiplicative else ADD, Norm.LAYER if norm else Norm.NONE),
             Area("pooled", 20, norm=Norm.NONE, activation=Activation.IDENTITY))  # fmt: skip
    return Network("one_area", tuple(inputs), areas, (*connections, identity("a", "pooled", pool=Pool.MAX)))


def choose(engines: tuple[str | None, ...]) -> Callable[..., Any]:
    """The engines of the area's convolutions, told by the channels that they read."""

    def chooser(*_: Any) -> Callable[..., EngineChoice]:
        def chosen(geometry: Geometry, shape: tuple[int, ...], *__: Any) -> EngineChoice:
            name = engines[shape[0 if geometry.operator is TRANSPOSE else 1] - 18]
            return EngineChoice.of(MAPS[name][2], "test") if name else EngineChoice(None, "test")

        return chosen

    return chooser


def kinds_of(made: plan.Plan) -> list[tuple[str, bool, bool]]:
    """The forward instructions that compute terms or the area: whether they end with an epilogue, and add to what is there."""
    instrs = made.versions[0].executable.program.part(backward=False)
    return [(i.kind, i.operands.get("ends", False), i.operands.get("accumulate", False)) for i in instrs if "conv" in i.kind]


@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("engines", [("F43", "F43"), ("F43", "amx"), ("amx", "amxT"), (None, "F42T"), (None, None)], ids=str)
@pytest.mark.parametrize("multiplicative", [False, True])
def test_pending_terms_of_an_area(
    norm: bool, engines: tuple[str | None, ...], multiplicative: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Terms computed beforehand and terms computed with the step, by one engine, two, or the vendor's: the same state and gradients."""
    monkeypatch.setattr(terms, "chooser", choose(engines))
    monkeypatch.setattr(plan, "_plans", OrderedDict())
    network = area_of(engines, multiplicative=multiplicative, norm=norm)
    generator = torch.Generator().manual_seed(0)
    inputs = [torch.randn(2, n.channels, n.height, n.width, generator=generator) for n in network.inputs]
    parameters = {}
    for name, shape in network.parameter_shapes.items():
        value = torch.randn(shape, generator=generator)
        parameters[name] = value / (18 * 9) ** 0.5 if name.startswith("w") else value
    results = []
    for dtype, backend in ((torch.float64, "reference"), (torch.float32, "native")):
        leaves = {name: p.to(dtype).requires_grad_() for name, p in parameters.items()}
        xs = [x.to(dtype).requires_grad_() for x in inputs]
        states = rollout(network, 1, xs, leaves, ("a", "pooled"), backend=backend)
        with torch.no_grad():
            again = rollout(network, 1, xs, leaves, ("a", "pooled"), backend=backend)
        sum((s * s).sum() for s in states).backward()
        results.append([*states, *again, *(t.grad for t in (*xs, *leaves.values()))])
    for ours, exact in zip(results[1][:4], results[0][:4], strict=True):
        assert relative(ours.detach(), exact.detach()) < TOLERANCE
    for ours, exact in zip(results[1][4:], results[0][4:], strict=True):
        assert relative(ours, exact) < 20 * TOLERANCE
    for made in plan._plans.values():
        ends = [kind for kind in kinds_of(made) if kind[1]]
        assert len(ends) == (norm and engines != (None, None)), "with a norm one convolution ends with the epilogue"


def test_a_drive_in_the_place_of_the_value(monkeypatch: pytest.MonkeyPatch) -> None:
    """The vendor's convolution is where the value goes, and ours is added to it."""
    monkeypatch.setattr(terms, "chooser", choose((None, "F43")))
    monkeypatch.setattr(plan, "_plans", OrderedDict())
    network = area_of((None, "F43"), multiplicative=False, norm=True)
    inputs = [torch.randn(2, n.channels, n.height, n.width) for n in network.inputs]
    parameters = {n: torch.randn(s) / (18 * 9 if n.startswith("w") else 1) ** 0.5 for n, s in network.parameter_shapes.items()}
    (state,) = rollout(network, 1, inputs, parameters, ("a",), backend="native")
    (made,) = plan._plans.values()
    assert ("conv", True, True) in kinds_of(made)
    double = {name: p.double() for name, p in parameters.items()}
    (exact,) = rollout(network, 1, [x.double() for x in inputs], double, ("a",), backend="reference")
    assert relative(state, exact) < TOLERANCE
