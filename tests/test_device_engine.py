"""Which engine computes a convolution on a CUDA device, with times of its own making; and what rollouts there refuse."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import HALF, in_harness, rounded_case, send_to_kernels, widened

from rnndyn_fast.devices import choose_device
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import _launch_cuda, measured
from rnndyn_fast.ops.device_engine import choose_device_engine
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator, choose_engine
from rnndyn_fast.ops.measured import Case, Times
from rnndyn_fast.program import can_run_native, kinds, rollout
from rnndyn_fast.program.describe import describe

pytestmark = in_harness
CONV, DEVICE = Geometry(Operator.CONV, 1, 1), torch.device("cpu")  # (stands for the device)


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """Measurements give the times below. Returns what was measured."""
    asked: list[str] = []

    def measure(case: Case, device: torch.device) -> dict[str, Times]:
        asked.append(str(case))
        return {"forward": Times(1e-3, 2e-3), "data": Times(3e-3, 2e-3), "weight": Times(1e-3, 1e-3)}

    monkeypatch.setenv("RNNDYN_CACHE", str(tmp_path))
    monkeypatch.delenv("RNNDYN_MEASURE", raising=False)
    monkeypatch.setattr(measured, "measure", measure)
    monkeypatch.setattr(measured, "device_name", lambda device: "some GPU")
    monkeypatch.setattr(_launch_cuda, "build_info", lambda: {"nvcc": "13.0"})
    measured.forget()
    yield asked
    measured.forget()


def choose(engine: str = "auto", dtype: torch.dtype = torch.float16, samples: int = 100, device: Any = DEVICE) -> EngineChoice:
    return choose_device_engine(CONV, (64, 128, 3, 3), 16, 16, dtype, engine, samples, device)


def test_each_pass_takes_the_faster_engine(timed: list[str]) -> None:
    choice = choose()
    assert choice.fused == ("forward", "weight")
    assert str(choice) == "fused forward+weight"
    assert (
        choice.reason == "measured on some GPU, ms, fused against the vendor's: forward 1 against 2, data 3 against 2, weight 1 against 1"
    )
    assert timed == ["conv 64x128x3x3 stride 1 padding 1+0 on 16x16 float16 N=128"]


def test_a_shape_is_measured_once_per_machine(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    choose(samples=65)  # the same power of two
    assert len(timed) == 1
    measured.forget()  # another process
    choose()
    assert len(timed) == 1
    choose(samples=64)
    choose(dtype=torch.bfloat16)
    assert len(timed) == 3
    kept = json.loads(measured.cache_file().read_text(encoding="utf-8"))
    assert len(kept) == 3
    assert all(key.startswith(f"some GPU, torch {torch.__version__}, cuDNN ") for key in kept)
    monkeypatch.setattr(measured, "device_name", lambda device: "another GPU")
    choose()
    assert len(timed) == 4


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": {"forward": 1}}'], ids=["empty", "cut", "list", "other"])
def test_a_file_of_another_kind_is_measured_anew(text: str, timed: list[str]) -> None:
    measured.cache_file().write_text(text, encoding="utf-8")
    assert choose().fused
    assert len(timed) == 1


def test_a_folder_that_cannot_be_written_is_no_error(timed: list[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    monkeypatch.setenv("RNNDYN_CACHE", str(tmp_path / "file"))
    assert choose().fused
    choose()
    assert len(timed) == 1


def test_where_nothing_can_be_measured_the_vendor_computes_and_the_reason_says_why(
    timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measured, "capturing", lambda: True)
    assert choose() == EngineChoice(None, "not measured: a CUDA graph is being captured; run once before capturing")
    monkeypatch.setattr(measured, "capturing", lambda: False)

    def no_room(case: Case, device: torch.device) -> dict[str, Times]:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(measured, "measure", no_room)
        assert choose() == EngineChoice(None, "not measured: cpu has too little free memory for it")
    monkeypatch.setenv("RNNDYN_MEASURE", "0")
    assert choose() == EngineChoice(None, "not measured: RNNDYN_MEASURE=0")
    assert timed == []
    assert "as measured at the first rollout" in choose(device=None).reason


def test_asking_overrides_and_what_cannot_run_says_why(timed: list[str]) -> None:
    assert choose("direct") == EngineChoice(None, "asked for")
    assert choose("fused:2").fused == ("forward", "data", "weight")
    assert str(choose("fused")) == "fused"
    assert timed == []
    for geometry, shape, dtype, reason in (
        (CONV, (64, 3, 3, 3), torch.float16, "64 and 3 channels: the fused convolution takes multiples of 8"),
        (CONV, (64, 64, 3, 3), torch.float32, "the fused convolution computes in float16 and bfloat16, not torch.float32"),
        (CONV, (64, 64, 1, 3), torch.float16, "the fused convolution takes square kernels, not 1 x 3"),
        (Geometry(Operator.CONV, 4, 1), (64, 64, 3, 3), torch.float16, "the fused convolution takes strides 1 and 2, not 4"),
    ):
        assert choose_device_engine(geometry, shape, 16, 16, dtype, "fused", 16, DEVICE) == EngineChoice(None, reason)
    for engine in ("winograd", "amx"):
        with pytest.raises(ValueError, match=f"engine='{engine}': it runs on the CPU; on CUDA devices expected one of auto, direct, fused"):
            choose(engine)
    with pytest.raises(ValueError, match='engine="fused": it runs on CUDA devices'):
        choose_engine(CONV, (64, 64, 3, 3), 16, 16, torch.float32, "fused")


def test_both_engines_are_timed_on_each_pass(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is what it says, and both give the same. (Here without a clock.)"""
    launches = send_to_kernels(monkeypatch, torch.float16)
    for geometry, shape in (
        (CONV, (8, 16, 3, 3)),
        (Geometry(Operator.CONV_TRANSPOSE, 2, 1, 1), (16, 8, 3, 3)),
        (Geometry(Operator.LINEAR), (8, 16)),
    ):
        size = 1 if geometry.operator is Operator.LINEAR else 4

        def alternate(contenders: list[Callable[[], Any]], device: torch.device) -> list[float]:
            launches.clear()
            ours = contenders[0]().clone()
            assert launches in (["recurrent_conv"], ["recurrent_conv_weight_grad"])
            theirs = contenders[1]()
            assert len(launches) == 1
            assert ours.abs().sum() > 0
            torch.testing.assert_close(ours.half(), theirs.half(), rtol=1e-2, atol=1e-2)
            return [1.0, 2.0]

        monkeypatch.setattr(measured, "alternate", alternate)
        found = measured.measure(Case(geometry, shape, size, size, torch.float16, 2), DEVICE)
        assert found == {name: Times(1.0, 2.0) for name in ("forward", "data", "weight")}


def mixed(passes: tuple[str, ...]) -> Callable[..., EngineChoice]:
    def choose(*arguments: Any) -> EngineChoice:
        choice = choose_device_engine(*arguments)
        return EngineChoice(None, "test", fused=passes) if choice.fused else choice

    return choose


@pytest.mark.parametrize("passes", [("forward",), ("data",), ("weight",), ("forward", "data")], ids="+".join)
def test_passes_of_both_engines_mix(passes: tuple[str, ...], simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_rollout_half import step, without_relu

    from rnndyn_fast.graph import linear

    case = without_relu(widened(CASES["topdown_multiplicative"]))
    inputs, parameters = rounded_case(case, torch.float16)
    truth = step(case, inputs, parameters, "reference")
    launches = send_to_kernels(monkeypatch, *HALF)
    monkeypatch.setattr(linear, "choose_device_engine", mixed(passes))
    result = step(case, [x.half() for x in inputs], {k: p.half() for k, p in parameters.items()}, "native", "fused")
    assert ("recurrent_conv_weight_grad" in launches) == ("weight" in passes)
    assert ("recurrent_conv" in launches) == (passes != ("weight",))
    for name, grad in result[1].items():
        other = truth[1][name]
        assert grad is not None
        assert other is not None
        assert float((grad.double() - other).norm()) <= 0.01 * float(other.norm()), name


# ---------------------------------------------------------------- the plan


def test_the_plan_for_a_device() -> None:
    net = blt_net_64(timesteps=3)
    lines = [line.strip() for line in describe(net.schedule(), "auto", device="cuda", dtype=torch.float16, samples=1024).splitlines()]
    assert "engine of each connection (float16 on a CUDA device, batches of 1024, engine='auto'):" in lines
    lateral = next(line for line in lines if line.startswith("v2 -> v2 (lateral)"))
    assert lateral.split(")", 1)[1].split(maxsplit=1) == [
        "direct",
        "or fused: whichever is the faster, as measured at the first rollout on the device",
    ]
    first = next(line for line in lines if line.startswith("image -> retina"))
    assert "32 and 3 channels: the fused convolution takes multiples of 8" in first
    assert not any("arena" in line for line in lines), "of the CPU's programs"
    fused = describe(net.schedule(), "fused", device="cuda", dtype=torch.bfloat16)
    assert any(
        line.strip().startswith("v4 -> v2 (top_down)") and line.split()[4:] == ["fused", "asked", "for"] for line in fused.splitlines()
    )


# ---------------------------------------------------------------- bad input


def arguments(case: RolloutCase) -> tuple[Any, ...]:
    inputs, parameters = rounded_case(case, torch.float16)
    return case.network, case.timesteps, [x.half() for x in inputs], {k: p.half() for k, p in parameters.items()}


def test_an_old_device_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    case = widened(CASES["topdown_additive"])
    send_to_kernels(monkeypatch, *HALF, capability=(7, 5))
    monkeypatch.setattr(_launch_cuda, "unavailable", None)
    network, timesteps, inputs, parameters = arguments(case)
    message = r"image: cpu has compute capability 7.5; the kernels need 8.0 or later"
    with pytest.raises(ValueError, match=message):
        rollout(network, timesteps, inputs, parameters, case.record, backend="native")
    assert not can_run_native(network, inputs, parameters)
    with pytest.warns(UserWarning, match=message):
        rollout(network, timesteps, inputs, parameters, case.record)


def test_tensors_on_two_devices_are_refused(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    case = widened(CASES["topdown_additive"])
    send_to_kernels(monkeypatch, *HALF)
    network, timesteps, inputs, parameters = arguments(case)
    away = {**parameters, "v1.lateral.weight": parameters["v1.lateral.weight"].to("meta")}
    with pytest.raises(TypeError, match=r"expected torch.float16 on meta like parameter 'v1.lateral.weight', got torch.float16 on cpu"):
        rollout(network, timesteps, inputs, away, case.record)
    with pytest.raises(ValueError, match=r"v1.lateral.weight is on meta, and the first input on cpu"):
        can_run_native(network, inputs, away, raise_error=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_a_device_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"device: this machine's CUDA devices are none that torch can use \(.+\), got cuda:1"):
        choose_device("cuda:1")


def test_engines_of_the_cpu_are_refused_on_a_device(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    case = widened(CASES["topdown_additive"])
    send_to_kernels(monkeypatch, *HALF)
    for engine in ("winograd", "amx"):
        with pytest.raises(ValueError, match=f"engine='{engine}': it runs on the CPU"):
            rollout(*arguments(case), case.record, backend="native", engine=engine)


@pytest.mark.parametrize("when", [3, 11, 80])
def test_out_of_memory_leaves_everything_as_it_was(when: int, simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a rollout, forward or backward: a clear error, the caller's tensors as before, and the next rollout runs."""
    case = widened(CASES["topdown_multiplicative"])
    send_to_kernels(monkeypatch, *HALF)
    network, timesteps, inputs, parameters = arguments(case)
    for p in parameters.values():
        p.requires_grad_()
    before = [t.detach().clone() for t in (*inputs, *parameters.values())]
    taken = 0

    def scarce(function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **operands: Any) -> Any:
            nonlocal taken
            taken += 1
            if taken == when:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
            return function(*args, **operands)

        return run

    for name, row in kinds.KINDS.items():
        monkeypatch.setitem(kinds.KINDS, name, dataclasses.replace(row, function=scarce(row.function)))

    def step() -> None:
        outputs = rollout(network, timesteps, inputs, parameters, case.record, backend="native", engine="fused")
        sum(o.float().sum() for o in outputs).backward()

    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate") as caught:
        step()
    assert any(
        "in a native rollout of an input [2, 8, 8, 8]" in n or "in a native rollout of an input [2, 3, 8, 8]" in n
        for n in caught.value.__notes__
    )
    assert all(torch.equal(t, b) for t, b in zip((*inputs, *parameters.values()), before, strict=True))
    assert all(p.grad is None for p in parameters.values())
    step()
    assert any(p.grad is not None for p in parameters.values())
