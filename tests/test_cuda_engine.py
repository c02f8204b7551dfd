"""Which engine computes a convolution on a CUDA device, with times of its own making; and what rollouts there refuse."""

from __future__ import annotations

import dataclasses
import json
import re
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from cases import CASES, RolloutCase
from device_rollouts import HALF, in_harness, rounded_case, send_to_kernels, widened

from rnndyn_fast.job_device import choose_device
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.ops import cuda_module, engine_timing, fused_conv, triton_conv
from rnndyn_fast.ops.cells import GRUGates
from rnndyn_fast.ops.cuda_engine import choose_device_engine
from rnndyn_fast.ops.device_kernels import can_run_triton
from rnndyn_fast.ops.engine_timing import Case, Times
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator, choose_engine
from rnndyn_fast.ops.gate_step import can_run_gate_step
from rnndyn_fast.ops.readout_zones import can_run_readout_zones
from rnndyn_fast.ops.trajectory_norms import can_run_trajectory_norms
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
        fused = {"forward": 1e-3, "data": 3e-3, "weight": 1.96e-3}
        triton = {"forward": 0.98e-3, "data": 1.5e-3, "weight": 1.9e-3}
        given = {name: {"fused": fused[name], "triton": triton[name], "direct": 2e-3} for name in fused}
        return {name: Times({engine: t[engine] for engine in (*case.engines, "direct")}) for name, t in given.items()}

    monkeypatch.setenv("RNNDYN_CACHE", str(tmp_path))
    monkeypatch.delenv("RNNDYN_MEASURE", raising=False)
    monkeypatch.setattr(engine_timing, "measure", measure)
    monkeypatch.setattr(engine_timing, "device_name", lambda device: "some GPU")
    monkeypatch.setattr(engine_timing, "driver", lambda: "580.1")
    monkeypatch.setattr(engine_timing, "build_id", lambda: "abc")
    monkeypatch.setattr(cuda_module, "capability", lambda device: (8, 9))
    monkeypatch.setattr(triton_conv, "unavailable", lambda: "no Triton")
    monkeypatch.setattr(triton_conv, "build_id", lambda: "none")
    engine_timing.forget()
    yield asked
    engine_timing.forget()


def choose(engine: str = "auto", dtype: torch.dtype = torch.float16, samples: int = 100, device: Any = DEVICE) -> EngineChoice:
    return choose_device_engine(CONV, (64, 128, 3, 3), 16, 16, dtype, engine, samples, device)


def test_each_pass_takes_the_faster_engine(timed: list[str]) -> None:
    choice = choose()
    assert choice.fused == ("forward",)  # (the weight's gradient is the faster one by 2%, which another measurement may not find)
    assert str(choice) == "fused forward"
    assert choice.reason == "measured on some GPU, ms: forward fused 1, direct 2; data fused 3, direct 2; weight fused 1.96, direct 2"
    assert timed == ["conv 64x128x3x3 stride 1 padding 1+0 on 16x16 float16 N=128"]


def test_triton_is_one_more_candidate(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """It is measured anew where it has come, or gone, or changed; a later engine must be faster by more than 3%."""
    choose()
    monkeypatch.setattr(triton_conv, "unavailable", lambda: None)
    monkeypatch.setattr(triton_conv, "build_id", lambda: "3.9.0 abc")
    choice = choose()
    assert len(timed) == 2
    assert (choice.fused, choice.triton) == (("forward",), ("data", "weight"))
    assert str(choice) == "fused forward, triton data+weight"
    assert [choice.kernels(p) for p in ("forward", "data", "weight")] == ["fused", "triton", "triton"]
    assert "data fused 3, triton 1.5, direct 2;" in choice.reason
    assert choose() == choice
    assert len(timed) == 2
    engine_timing.forget()  # another process
    assert choose() == choice
    assert len(timed) == 2
    monkeypatch.setattr(triton_conv, "build_id", lambda: "3.9.0 def")
    choose()
    assert len(timed) == 3
    monkeypatch.setattr(triton_conv, "unavailable", lambda: "gone")
    assert choose().triton == ()
    assert len(timed) == 4


def test_what_only_triton_computes_is_measured_too(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Other channels and strides, and float32 in TF32; full float32 is the vendor's."""
    monkeypatch.setattr(triton_conv, "unavailable", lambda: None)
    for geometry, shape, dtype in (
        (CONV, (64, 3, 3, 3), torch.float16),
        (Geometry(Operator.CONV, 4, 1), (64, 64, 3, 3), torch.float16),
        (CONV, (64, 64, 3, 3), torch.float32),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(torch.backends.cudnn, "allow_tf32", True)
            choice = choose_device_engine(geometry, shape, 16, 16, dtype, "auto", 16, DEVICE)
        assert (choice.fused, choice.triton) == ((), ("forward", "data", "weight"))
    assert len(timed) == 3
    choice = choose_device_engine(CONV, (64, 64, 3, 3), 16, 16, torch.float32, "auto", 16, DEVICE)
    assert choice == EngineChoice(
        None,
        "the fused convolution computes in float16 and bfloat16, not torch.float32; in full float32 the Triton convolution has no use for "
        "tensor cores",
    )
    product = choose_device_engine(Geometry(Operator.LINEAR), (64, 64), 1, 1, torch.float32, "auto", 16, DEVICE)
    assert "in full float32" in product.reason  # (whatever cuDNN may: torch.set_float32_matmul_precision)
    assert len(timed) == 3


def test_a_shape_is_measured_once_per_machine(timed: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    choose()
    choose(samples=65)  # the same power of two
    assert len(timed) == 1
    engine_timing.forget()  # another process
    choose()
    assert len(timed) == 1
    choose(samples=64)
    choose(dtype=torch.bfloat16)
    assert len(timed) == 3
    kept = json.loads(engine_timing.cache_file().read_text(encoding="utf-8"))
    assert len(kept) == 3
    assert all(key.startswith(f"some GPU, driver 580.1, torch {torch.__version__}, cuDNN ") and "kernels abc" in key for key in kept)
    for count, name in enumerate(("device_name", "driver", "build_id"), 4):
        monkeypatch.setattr(engine_timing, name, lambda *_: "another")
        choose()
        assert len(timed) == count


@pytest.mark.parametrize("capability", [(9, 0), (10, 0), (12, 1)], ids=str)
def test_from_hopper_on_the_vendor_computes_until_a_measurement_says_otherwise(
    capability: tuple[int, int], timed: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_module, "capability", lambda device: capability)
    assert choose() == EngineChoice(
        None, "not measured: the vendor's is the default from compute capability 9.0 on; RNNDYN_MEASURE=1 measures"
    )
    assert timed == []
    assert choose("fused").fused == ("forward", "data", "weight")
    monkeypatch.setenv("RNNDYN_MEASURE", "1")
    assert choose().fused == ("forward",)
    assert len(timed) == 1
    monkeypatch.delenv("RNNDYN_MEASURE")
    engine_timing.forget()  # another process, which finds the measurement in the file
    assert choose().fused == ("forward",)
    assert len(timed) == 1


@pytest.mark.parametrize("text", ["", "{", "[]", '{"x": {"forward": 1}}'], ids=["empty", "cut", "list", "other"])
def test_a_file_of_another_kind_is_measured_anew(text: str, timed: list[str]) -> None:
    engine_timing.cache_file().write_text(text, encoding="utf-8")
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
    monkeypatch.setattr(engine_timing, "capturing", lambda: True)
    assert choose() == EngineChoice(None, "not measured: a CUDA graph is being captured; run once before capturing")
    monkeypatch.setattr(engine_timing, "capturing", lambda: False)

    def no_room(case: Case, device: torch.device) -> dict[str, Times]:
        raise torch.OutOfMemoryError("no room")

    with monkeypatch.context() as patch:
        patch.setattr(engine_timing, "measure", no_room)
        assert choose() == EngineChoice(None, "not measured: cpu has too little free memory for it")
    monkeypatch.setenv("RNNDYN_MEASURE", "0")
    assert choose() == EngineChoice(None, "not measured: RNNDYN_MEASURE=0")
    assert timed == []
    assert "as measured at the first rollout" in choose(device=None).reason


def test_asking_overrides_and_what_cannot_run_says_why(timed: list[str]) -> None:
    assert choose("direct") == EngineChoice(None, "asked for")
    assert choose("fused:2").fused == ("forward", "data", "weight")
    assert str(choose("fused")) == "fused"
    assert choose("triton") == EngineChoice(None, "no Triton")
    assert timed == []
    for geometry, shape, dtype, reason in (
        (CONV, (64, 3, 3, 3), torch.float16, "64 and 3 channels: the fused convolution takes multiples of 8"),
        (CONV, (64, 64, 3, 3), torch.float32, "the fused convolution computes in float16 and bfloat16, not torch.float32"),
        (CONV, (64, 64, 1, 3), torch.float16, "the fused convolution takes square kernels, not 1 x 3"),
        (Geometry(Operator.CONV, 4, 1), (64, 64, 3, 3), torch.float16, "the fused convolution takes strides 1 and 2, not 4"),
    ):
        assert choose_device_engine(geometry, shape, 16, 16, dtype, "fused", 16, DEVICE) == EngineChoice(None, reason)
    for engine in ("winograd", "amx"):
        message = f"engine='{engine}': it runs on the CPU; on CUDA devices expected one of auto, direct, fused, triton"
        with pytest.raises(ValueError, match=message):
            choose(engine)
    for engine in ("fused", "triton"):
        with pytest.raises(ValueError, match=f'engine="{engine}": it runs on CUDA devices'):
            choose_engine(CONV, (64, 64, 3, 3), 16, 16, torch.float32, engine)


def test_asking_for_triton_says_what_it_cannot_run(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_conv, "unavailable", lambda: None)
    assert choose("triton").triton == ("forward", "data", "weight")
    assert choose("triton", torch.float32).triton == ("forward", "data", "weight")
    for geometry, shape, dtype, reason in (
        (CONV, (64, 64, 3, 3), torch.float64, "the Triton convolution computes in float32, float16 and bfloat16, not torch.float64"),
        (CONV, (64, 64, 1, 3), torch.float16, "the Triton convolution takes square kernels, not 1 x 3"),
        (Geometry(Operator.CONV, 17, 1), (64, 64, 3, 3), torch.float16, "the Triton convolution takes strides 1, 2, 4, 8 and 16, not 17"),
        (Geometry(Operator.CONV, 3, 1), (64, 64, 3, 3), torch.float16, "the Triton convolution takes strides 1, 2, 4, 8 and 16, not 3"),
        (Geometry(Operator.IDENTITY), (), torch.float16, "nothing to compute"),
    ):
        assert choose_device_engine(geometry, shape, 16, 16, dtype, "triton", 16, DEVICE) == EngineChoice(None, reason)
        assert not can_run_triton(geometry, shape, dtype)
        with pytest.raises(ValueError, match=re.escape(f'engine="triton": {reason}')):
            can_run_triton(geometry, shape, dtype, raise_error=True)
    assert can_run_triton(CONV, (64, 3, 3, 3), torch.bfloat16, raise_error=True)


def test_all_engines_are_timed_on_each_pass(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is timed is what it says, and all give the same. (Here without a clock, and with the fused convolution for Triton's.)"""
    launches = send_to_kernels(monkeypatch, torch.float16)
    for name in ("recurrent_conv", "recurrent_conv_weight_grad"):

        def instead(*arguments: Any, name: str = name) -> None:
            launches.append(f"triton {name}")
            getattr(fused_conv, name)(*arguments)

        monkeypatch.setattr(triton_conv, name, instead)
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
            assert torch.equal(contenders[1](), ours)
            assert launches[1:] == [f"triton {launches[0]}", launches[0]]
            theirs = contenders[2]()
            assert len(launches) == 3
            assert ours.abs().sum() > 0
            torch.testing.assert_close(ours.half(), theirs.half(), rtol=1e-2, atol=1e-2)
            return [1.0, 3.0, 2.0]

        monkeypatch.setattr(engine_timing, "alternate", alternate)
        found = engine_timing.measure(Case(geometry, shape, size, size, torch.float16, 2, ("fused", "triton")), DEVICE)
        assert found == {name: Times({"fused": 1.0, "triton": 3.0, "direct": 2.0}) for name in ("forward", "data", "weight")}
        assert list(found["forward"].seconds) == ["fused", "triton", "direct"]


class Eager:
    """In place of CUDA graphs and the clock of a device: replays run, and take as long as a table says."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.captured = 0
        self.taken = 2e-4
        patch.setattr(engine_timing, "CudaGraphs", lambda: self)
        patch.setattr(engine_timing, "seconds", self.seconds)

    def check(self, tensors: Any) -> None:
        """Any tensors will do."""

    def aside(self, run: Callable[[], Any]) -> Any:
        return run()

    def capture(self, run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
        self.captured += 1
        return run, None

    def seconds(self, run: Callable[[], object], device: torch.device) -> float:
        run()
        return self.taken


def test_what_is_timed_are_replays_of_several_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    eager, calls = Eager(monkeypatch), [0, 0]

    def contender(i: int) -> Callable[[], None]:
        def run() -> None:
            calls[i] += 1

        return run

    # A call of 0.2 ms: five in a graph; two before, one replay to begin with, then the rounds.
    assert engine_timing.alternate([contender(0), contender(1)], DEVICE) == [2e-4 / 5] * 2
    assert calls == [2 + 5 * (1 + engine_timing.ROUNDS)] * 2
    assert eager.captured == 2
    eager.taken, calls[:] = 1.0, [0, 0]
    assert engine_timing.alternate([contender(0)], DEVICE) == [1.0]
    assert calls[0] == 2 + 1 + engine_timing.ROUNDS


def test_a_kernel_that_fails_leaves_its_pass_to_the_vendor(simt: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With one warning that names kernel and error; nothing of it is kept, and the other passes are timed."""
    send_to_kernels(monkeypatch, torch.float16, capability=(8, 0))
    Eager(monkeypatch)
    monkeypatch.setenv("RNNDYN_CACHE", str(tmp_path))
    monkeypatch.delenv("RNNDYN_MEASURE", raising=False)
    monkeypatch.setattr(engine_timing, "device_name", lambda device: "some GPU")
    monkeypatch.setattr(engine_timing, "driver", lambda: "580.1")
    engine_timing.forget()

    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("recurrent_conv_kernel: invalid argument")

    monkeypatch.setattr(fused_conv, "recurrent_conv", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = choose_device_engine(CONV, (8, 8, 3, 3), 4, 4, torch.float16, "auto", 2, DEVICE)
        choose_device_engine(CONV, (16, 8, 3, 3), 4, 4, torch.float16, "auto", 2, DEVICE)
    (said,) = caught  # names the first pass; the same error is not told again
    start = "the fused convolution failed, and the fastest of the others takes its place (forward of conv 8x8x3x3 "
    assert str(said.message).startswith(start)
    assert str(said.message).endswith("): recurrent_conv_kernel: invalid argument")
    assert choice.fused == ()
    assert "forward fused failed, direct 0.04; data fused failed, direct 0.04; weight fused 0.04, direct 0.04" in choice.reason
    assert json.loads(engine_timing.cache_file().read_text(encoding="utf-8")) == {}
    # The vendor's own failure is its own: the rollout goes on to meet it, or not.
    monkeypatch.setattr(torch, "convolution", failing)
    assert choose_device_engine(CONV, (24, 8, 3, 3), 4, 4, torch.float16, "auto", 2, DEVICE) == EngineChoice(
        None, "not measured: recurrent_conv_kernel: invalid argument"
    )
    engine_timing.forget()


def test_a_triton_kernel_that_fails_leaves_its_pass_to_the_others(simt: object, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Whatever fails in it, compiling or launching: one warning, and the times of the others."""
    send_to_kernels(monkeypatch, torch.float16, capability=(8, 0), triton=True)
    Eager(monkeypatch)
    monkeypatch.setenv("RNNDYN_CACHE", str(tmp_path))
    monkeypatch.delenv("RNNDYN_MEASURE", raising=False)
    monkeypatch.setattr(engine_timing, "device_name", lambda device: "some GPU")
    monkeypatch.setattr(engine_timing, "driver", lambda: "580.1")
    monkeypatch.setattr(triton_conv, "unavailable", lambda: None)
    monkeypatch.setattr(triton_conv, "build_id", lambda: "3.9.0 abc")

    def descending(contenders: list[Callable[[], object]], device: torch.device) -> list[float]:
        for run in contenders:
            run()
        return [1.0 / (1 + i) for i in range(len(contenders))]

    monkeypatch.setattr(engine_timing, "alternate", descending)
    engine_timing.forget()

    def failing(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("recurrent_conv_kernel of the Triton convolution: OutOfResources: shared memory")

    monkeypatch.setattr(triton_conv, "recurrent_conv", failing)
    monkeypatch.setattr(triton_conv, "recurrent_conv_weight_grad", failing)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        choice = choose_device_engine(CONV, (8, 8, 3, 3), 4, 4, torch.float16, "auto", 2, DEVICE)
        other = choose_device_engine(CONV, (8, 5, 3, 3), 4, 4, torch.float16, "auto", 2, DEVICE)  # which only Triton computes
    (said,) = caught
    assert str(said.message).startswith(
        "the Triton convolution failed, and the fastest of the others takes its place (forward of conv 8x8x3x3"
    )
    assert str(said.message).endswith("OutOfResources: shared memory")
    assert choice.reason.startswith(
        "measured on some GPU, ms: forward fused 1e+03, triton failed, direct 500; data fused 1e+03, triton failed,"
    )
    assert (choice.triton, other.triton) == ((), ())
    failures = "; ".join(f"{name} triton failed, direct 1e+03" for name in ("forward", "data", "weight"))
    assert other.reason == f"measured on some GPU, ms: {failures}"
    engine_timing.forget()


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


def test_the_plan_for_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_conv, "unavailable", lambda: None)
    net = blt_net_64(timesteps=3)
    lines = [line.strip() for line in describe(net.schedule(), "auto", device="cuda", dtype=torch.float16, samples=1024).splitlines()]
    assert "engine of each connection (float16 on a CUDA device, batches of 1024, engine='auto'):" in lines
    lateral = next(line for line in lines if line.startswith("v2 -> v2 (lateral)"))
    assert lateral.split(")", 1)[1].split(maxsplit=1) == [
        "direct",
        "or fused or triton: whichever is the fastest, as measured at the first rollout on the device (before sm_90)",
    ]
    first = next(line for line in lines if line.startswith("image -> retina"))
    assert "or triton: whichever is the fastest" in first  # (the fused convolution takes multiples of 8 channels)
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
    monkeypatch.setattr(cuda_module, "unavailable", None)
    network, timesteps, inputs, parameters = arguments(case)
    message = r"image: cpu has compute capability 7.5; the kernels need 8.0 or later"
    with pytest.raises(ValueError, match=message):
        rollout(network, timesteps, inputs, parameters, case.record, backend="native")
    assert not can_run_native(network, inputs, parameters)
    with pytest.warns(UserWarning, match=message):
        rollout(network, timesteps, inputs, parameters, case.record)


class OldDriver:
    """A module built by a newer toolkit than the driver supports: it imports."""

    def device_error(self, device: int) -> str:
        return "CUDA driver version is insufficient for CUDA runtime version"

    def build_info(self) -> dict[str, Any]:
        return {"nvcc": "13.0", "architectures": "80,90", "driver": 12040}


def test_a_driver_that_is_too_old_is_named_and_the_next_engine_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    case = widened(CASES["topdown_additive"])
    send_to_kernels(monkeypatch, *HALF)
    monkeypatch.setattr(cuda_module, "unavailable", None)
    monkeypatch.setattr(cuda_module, "_module", OldDriver())
    cuda_module.device_error.cache_clear()
    network, timesteps, inputs, parameters = arguments(case)
    message = (
        r"image: the CUDA kernels cannot run on cuda:0: CUDA driver version is insufficient for CUDA runtime version "
        r"\(built by nvcc 13.0 for 80,90; the driver supports CUDA 12.4\)"
    )
    try:
        with pytest.raises(ValueError, match=message):
            rollout(network, timesteps, inputs, parameters, case.record, backend="native")
        with pytest.warns(UserWarning, match=message):
            ours = rollout(network, timesteps, inputs, parameters, case.record)
        assert all(o.isfinite().all() for o in ours)
        for can_run in (can_run_readout_zones, can_run_trajectory_norms):
            assert not can_run(torch.zeros(2, 3, 8).half())
        with pytest.raises(ValueError, match="cannot run on cuda:0"):
            can_run_gate_step(GRUGates(), torch.zeros(1).half(), raise_error=True)
    finally:
        cuda_module.device_error.cache_clear()


def test_tensors_on_two_devices_are_refused(simt: object, monkeypatch: pytest.MonkeyPatch) -> None:
    case = widened(CASES["topdown_additive"])
    send_to_kernels(monkeypatch, *HALF)
    network, timesteps, inputs, parameters = arguments(case)
    away = {**parameters, "v1.lateral.weight": parameters["v1.lateral.weight"].to("meta")}
    with pytest.raises(TypeError, match=r"v1.lateral.weight: expected torch.float16 on cpu like 'image', got torch.float16 on meta"):
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
