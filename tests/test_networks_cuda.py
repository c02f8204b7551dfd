"""Cells, norms and grouped convolutions on the CUDA kernels, in the SIMT harness (or on a device), against the reference."""

from __future__ import annotations

import dataclasses
from collections import OrderedDict
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import DEVICE, HALF, LAUNCHES, count_launches, in_harness, send_to_kernels
from test_rollout_half import NoHostSync
from torch import Tensor

from rnndyn_fast.graph import Activation, Network, Pool
from rnndyn_fast.models import blt_vs, convrnn, rcnn_sat
from rnndyn_fast.nn import ConvCell
from rnndyn_fast.ops import cuda_module, launches
from rnndyn_fast.program import plan, rollout

DTYPES = [torch.float32, *HALF]
by_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=str)
STEPS = ("gate_step", "norm_step_forward", "norm_step_backward", "depthwise_conv", "depthwise_weight_grad")


@pytest.fixture
def kernels(simt: Any, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Tensors of all three dtypes go to the CUDA kernels. Returns the names of the launches, as they come."""
    names = (*LAUNCHES, *STEPS)
    return send_to_kernels(monkeypatch, *DTYPES, names=names) if DEVICE is None else count_launches(monkeypatch, names)


@dataclasses.dataclass
class Run:
    """A network with inputs and parameters of float64, that a dtype holds exactly."""

    network: Network
    timesteps: int
    inputs: list[Tensor]
    record: tuple[str, ...]
    training: bool = False

    def parameters(self, held: torch.dtype) -> dict[str, Tensor]:
        generator = torch.Generator().manual_seed(5)
        found = {}
        for name, shape in self.network.parameter_shapes.items():
            value = torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")
            scaled = 0.5 + 0.1 * value if len(shape) == 1 else 0.8 * value / max(1, value[0].numel()) ** 0.5
            found[name] = scaled.to(held).double()
        return found

    def results(
        self, backend: str | None, held: torch.dtype, dtype: torch.dtype, engine: str = "auto", device: str = "cpu"
    ) -> dict[str, Tensor]:
        """States, statistics, and gradients of everything; parameters are float32 at least."""
        wide = torch.float32 if dtype in HALF and backend != "reference" else dtype
        leaves = [x.to(held).to(device, dtype).requires_grad_(True) for x in self.inputs]
        named = {name: p.to(device, wide).requires_grad_(True) for name, p in self.parameters(held).items()}
        generator = torch.Generator().manual_seed(7)
        buffers = {
            n: (torch.rand(s, generator=generator, dtype=torch.float64, device="cpu") + 0.5).to(held).to(device, wide)
            for n, s in self.network.buffer_shapes.items()
        }
        statistics: dict[str, tuple[Tensor, Tensor]] | None = {} if self.training else None
        states = rollout(
            self.network, self.timesteps, leaves, {**named, **buffers}, self.record, backend=backend, engine=engine, statistics=statistics
        )
        assert all(s.dtype == dtype for s in states)
        weights = [torch.randn(s.shape, generator=generator, dtype=torch.float64, device="cpu").to(held).to(device, dtype) for s in states]
        torch.autograd.backward(states, weights)
        with torch.no_grad():
            again = rollout(
                self.network, self.timesteps, leaves, {**named, **buffers}, self.record, backend=backend, engine=engine,
                statistics={} if self.training else None,
            )  # fmt: skip
        found = {f"state {name}": s.detach() for name, s in zip(self.record, states, strict=True)}
        found |= {f"again {name}": s for name, s in zip(self.record, again, strict=True)}
        found |= {f"{kind} {name}": v for name, pair in (statistics or {}).items() for kind, v in zip(("mean", "var"), pair, strict=True)}
        for name, leaf in ({f"input {i}": x for i, x in enumerate(leaves)} | named).items():
            if leaf.grad is not None:
                assert leaf.grad.dtype == leaf.dtype
                found[name] = leaf.grad
        return {name: t.cpu().double() for name, t in found.items()}

    def check(self, dtype: torch.dtype, engine: str = "auto", floor: float = 8.0) -> None:
        """Error in norm against float64: at most twice that of the reference in the same dtype, plus a floor of roundings."""
        truth = self.results("reference", dtype, torch.float64)
        plain = self.results("reference", dtype, dtype)
        ours = self.results("native", dtype, dtype, engine, DEVICE or "cpu")
        for name, expected in truth.items():
            if name not in ours:  # (a term without effect and an area that nobody asks for are not evaluated; unscheduled they are)
                assert not expected.any() or name.startswith(("mean", "var")), name
                continue
            assert not ours[name].isnan().any(), f"{name}: NaN (or something left unwritten)"
            scale = float(expected.norm()) + 1e-6
            error, reference = (float((r[name] - expected).norm()) / scale for r in (ours, plain))
            assert error <= 2 * reference + floor * torch.finfo(dtype).eps, f"{name}: {error:.3g}, plain {reference:.3g}"
        assert not torch.backends.cudnn.allow_tf32, "float32 on a device would have been TF32"


def smooth(network: Network, dtype: torch.dtype) -> Network:
    """In half precision without rectifiers, whose slopes rounding would flip: one flip in a small map is a tenth of a gradient."""
    if dtype not in HALF:
        return network
    areas = []
    for a in network.areas:
        activation = Activation.ELU if a.activation is Activation.RELU else a.activation
        drive = Activation.IDENTITY if a.drive_activation is Activation.RELU else a.drive_activation
        areas.append(dataclasses.replace(a, activation=activation, drive_activation=drive))
    return dataclasses.replace(network, areas=tuple(areas))


def cell_run(kind: str, channels: int = 8, **extra: Any) -> Run:
    cell = ConvCell(kind, channels, channels, (5, 6), **extra)
    shapes = [(*((3, 2) if n.frames else (2,)), n.channels, n.height, n.width) for n in cell.network.inputs]
    generator = torch.Generator().manual_seed(1)
    inputs = [torch.randn(s, generator=generator, dtype=torch.float64, device="cpu") for s in shapes]
    return Run(cell.network, 3, inputs, cell.recorded)


@pytest.mark.parametrize("kind", ["gru", "lstm", "ugrnn", "intersectionrnn", "rgc_median"])
@pytest.mark.parametrize("engine", ["direct", "fused"])
@by_dtype
def test_cells(kind: str, engine: str, dtype: torch.dtype, kernels: list[str]) -> None:
    """With the vendor's convolutions and, in half precision, with ours: all gates' terms in one launch."""
    if engine == "fused" and dtype == torch.float32:
        return
    extra = {"feedback_channels": 8, "residual_channels": 8, "cell_channels": 8} if kind == "rgc_median" else {}
    cell_run(kind, **extra).check(dtype, engine)
    assert "gate_step" in kernels
    assert ("recurrent_conv" in kernels) == (engine == "fused") or DEVICE is not None
    assert ("depthwise_conv" in kernels) == (kind == "rgc_median")


@by_dtype
def test_a_reciprocal_cell_of_many_terms(dtype: torch.dtype, kernels: list[str]) -> None:
    """Dense gates with constants, a layer norm, and feedback through an activation: still the same kernels."""
    options = {"form": "median", "tau_separable": False, "gate_separable": False, "kernel_size": 3, "tau_bias": 0.4, "gate_bias": -0.3}
    options |= {"input_to_gate": True, "residual_to_out_gate": True, "layer_norm": True, "feedback_activation": "tanh"}
    cell_run("rgc", feedback_channels=8, residual_channels=8, cell_channels=8, **options).check(dtype, "direct")
    assert kernels.count("gate_step") == 3 * 2 * 3 or DEVICE is not None  # three steps of two halves: forward, backward, without gradients


@by_dtype
def test_a_cell_with_norms_is_pytorchs(dtype: torch.dtype, kernels: list[str]) -> None:
    cell_run("gru", 4, layer_norm=True).check(dtype)
    assert "gate_step" not in kernels


@pytest.mark.parametrize("training", [False, True])
@by_dtype
def test_rcnn_sat(training: bool, dtype: torch.dtype, kernels: list[str]) -> None:
    """Norms of each time step's batch, and with running statistics."""
    net = rcnn_sat("bl", 5, timesteps=2, image_size=64, width_divisor=48)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(3, 3, 64, 64, generator=generator, dtype=torch.float64, device="cpu")
    network = smooth(net.network, dtype)
    if dtype in HALF:  # (rounding moves maxima too)
        unpooled = tuple(dataclasses.replace(c, pool=Pool.NONE) if c.pool is Pool.MAX else c for c in network.connections)
        image = image[..., :16, :16]
        network = dataclasses.replace(network, inputs=(dataclasses.replace(network.inputs[0], height=16, width=16),), connections=unpooled)
    Run(network, 2, [image], ("layer2", "layer1"), training).check(dtype, floor=16)
    assert {"norm_step_forward", "norm_step_backward"} <= set(kernels)


@by_dtype
def test_blt_vs(dtype: torch.dtype, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Squashed modulators, group norms, depthwise convolutions of several sizes and strides."""
    monkeypatch.setattr("rnndyn_fast.models.blt_vs_net.CHANNELS", (3, 3, 4, 4, 4, 4, 5))
    net = blt_vs(2, 3, 2, bio_unroll=False, image_size=128)
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 128, 128, generator=generator, dtype=torch.float64, device="cpu")
    Run(smooth(net.network, dtype), 2, [image], ("V4.td", "V1.bu")).check(dtype, floor=16)
    assert {"norm_step_forward", "norm_step_backward", "depthwise_conv", "depthwise_weight_grad"} <= set(kernels)


@by_dtype
def test_convrnn(dtype: torch.dtype, kernels: list[str]) -> None:
    """Cells between convolutions, odd pooling, resized maps, an input that goes away."""
    widths = {f"conv{i}": 4 for i in range(1, 6)}
    net = convrnn(
        "rgc_shallow", num_classes=3, image_size=72, widths=widths, cell_channels=4, presentation="custom", timesteps=7, image_off=3
    )
    generator = torch.Generator().manual_seed(1)
    image = torch.randn(1, 3, 72, 72, generator=generator, dtype=torch.float64, device="cpu")
    Run(smooth(net.network, dtype), net.timesteps, [image], ("conv3", "conv5")).check(dtype, floor=16)
    assert "gate_step" in kernels


@pytest.mark.parametrize("case", [CASES[n] for n in ("topdown_multiplicative", "operators_additive")], ids=lambda c: c.name)
def test_areas_of_area_step(case: RolloutCase, kernels: list[str]) -> None:
    Run(case.network, case.timesteps, case.inputs(), case.record).check(torch.float32)


def test_terms_of_one_sum_are_one_launch(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Input and state of an LSTM's gates, in half precision on the fused convolution."""
    monkeypatch.setattr(plan, "_plans", OrderedDict())
    cell_run("lstm").results("native", torch.float16, torch.float16, "fused", DEVICE or "cpu")
    programs = [made.versions[0].executable.program for made in plan._plans.values()]
    assert len(programs) == 2
    forward = [i for program in programs for i in program.part(backward=False) if i.kind == "fused_conv"]
    assert 2 in [len(i.operands["xs"]) for i in forward]


@in_harness
def test_without_a_fitting_device_it_is_the_references(kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """And says why; where the native backend is asked for, that is an error."""
    monkeypatch.setattr(cuda_module, "capability", lambda device: (7, 0))
    run = cell_run("lstm", 4)
    truth = run.results("reference", torch.float32, torch.float64)
    with pytest.warns(UserWarning, match=r"compute capability 7\.0"):
        ours = run.results(None, torch.float32, torch.float32)
    assert kernels == []
    assert all(float((ours[name] - truth[name]).norm()) <= 1e-4 * float(truth[name].norm()) for name in truth)
    with pytest.raises(ValueError, match=r"compute capability 7\.0"):
        run.results("native", torch.float32, torch.float32)
    monkeypatch.setattr(cuda_module, "unavailable", "this build has no CUDA kernels (none)")
    case = CASES["topdown_additive"]
    with pytest.warns(UserWarning, match="this build has no CUDA kernels"):
        rollout(case.network, 2, case.inputs(torch.float32), case.parameters(torch.float32), case.record)


@in_harness
@pytest.mark.parametrize("when", ["forward", "backward"])
def test_out_of_memory_leaves_everything_as_it_was(when: str, kernels: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a rollout: inputs, parameters and gradients are untouched, the error says where, and the next try is whole."""
    run = cell_run("lstm")
    named = {name: p.float().requires_grad_(True) for name, p in run.parameters(torch.float32).items()}
    inputs = [x.float().requires_grad_(True) for x in run.inputs]
    before = [t.detach().clone() for t in (*inputs, *named.values())]
    launch, left = launches.gate_step, [2 if when == "forward" else 4]

    def short_of_memory(*arguments: Any, **options: Any) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        launch(*arguments, **options)

    def step() -> None:
        states = rollout(run.network, run.timesteps, inputs, named, run.record, backend="native")
        torch.autograd.backward(states, [torch.ones_like(s) for s in states])

    monkeypatch.setattr(launches, "gate_step", short_of_memory)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        step()
    assert any("in a native rollout of an input" in note for note in caught.value.__notes__)
    assert all(torch.equal(t.detach(), b) for t, b in zip((*inputs, *named.values()), before, strict=True))
    assert all(t.grad is None for t in (*inputs, *named.values()))
    step()
    truth = run.results("reference", torch.float32, torch.float64)
    for name, p in named.items():
        assert p.grad is not None
        assert p.grad.isfinite().all()
        assert name in truth


def test_kept_graphs_and_second_derivatives(kernels: list[str]) -> None:
    run = cell_run("ugrnn", 4)
    device = DEVICE or "cpu"
    named = {name: p.to(device, torch.float32).requires_grad_(True) for name, p in run.parameters(torch.float32).items()}
    inputs = [x.to(device, torch.float16) for x in run.inputs]
    states = rollout(run.network, run.timesteps, inputs, named, run.record, backend="native")
    loss = sum(s.float().square().sum() for s in states)
    assert isinstance(loss, Tensor)
    found = [torch.autograd.grad(loss, list(named.values()), retain_graph=True) for _ in range(2)]
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    with pytest.raises(RuntimeError, match="native rollout cannot be differentiated twice"):
        torch.autograd.grad(loss, list(named.values()), create_graph=True)


@in_harness
@pytest.mark.parametrize("kind", ["lstm", "rgc_median"])
def test_no_rollout_waits_for_the_device(kind: str, kernels: list[str]) -> None:
    extra = {"feedback_channels": 8, "residual_channels": 8, "cell_channels": 8} if kind == "rgc_median" else {}
    run = cell_run(kind, **extra)
    named = {name: p.float().requires_grad_(True) for name, p in run.parameters(torch.float16).items()}
    inputs = [x.half() for x in run.inputs]
    with NoHostSync():
        states = rollout(run.network, run.timesteps, inputs, named, run.record, backend="native", engine="fused")
        torch.autograd.backward(states, [torch.ones_like(s) for s in states])
        with torch.no_grad():
            rollout(run.network, run.timesteps, inputs, named, run.record, backend="native", engine="fused")


@in_harness
def test_autocast_trains_in_half_with_parameters_of_float32(kernels: list[str]) -> None:
    """The loss falls as in float32 and a scale that overflows skips one step; nothing is NaN."""
    losses: dict[bool, list[float]] = {}
    before = torch.is_autocast_enabled("cuda"), torch.get_autocast_dtype("cuda")
    try:
        for half in (False, True):
            torch.set_autocast_enabled("cuda", half)
            torch.set_autocast_dtype("cuda", torch.float16)
            run = cell_run("lstm")
            named = {name: p.float().requires_grad_(True) for name, p in run.parameters(torch.float32).items()}
            inputs = [x.float() for x in run.inputs]
            optimizer = torch.optim.Adam(list(named.values()), lr=0.02)
            scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
            losses[half] = []
            for step in range(5):
                optimizer.zero_grad(set_to_none=True)
                states = rollout(run.network, run.timesteps, inputs, named, run.record, engine="fused")
                assert states[0].dtype == (torch.float16 if half else torch.float32)
                loss = (states[0].float() - 0.5).square().mean()
                kept = [p.detach().clone() for p in named.values()]
                if step == 3:
                    scaler.update(2.0**126)
                scaler.scale(loss).backward()
                assert {p.grad.dtype for p in named.values() if p.grad is not None} == {torch.float32}
                scaler.step(optimizer)
                scaler.update()
                if step == 3:
                    assert all(torch.equal(p, k) for p, k in zip(named.values(), kept, strict=True)) == half
                    scaler.update(2.0**10)
                losses[half].append(float(loss.detach()))
            assert all(p.isfinite().all() for p in named.values())
    finally:
        torch.set_autocast_enabled("cuda", before[0])
        torch.set_autocast_dtype("cuda", before[1])
    assert losses[True][-1] < losses[True][0]
    assert losses[True][:4] == pytest.approx(losses[False][:4], rel=1e-2)
