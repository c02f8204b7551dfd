"""Every 3 x 3 and 5 x 5 convolution of blt_net_64 (batch 16) and blt_net_128 (batch 4), forward and both gradients, against the vendor's.

    pytest benchmarks/bench_convolution.py

Ours is the engine that choose_engine takes, with its transforms, at each precision of products ("highest" and "high" of
torch.set_float32_matmul_precision, and bfloat16); packing its weight, once per rollout, is measured by itself. The peers are PyTorch's
convolution in float32 in both layouts, the faster of which counts, and in bfloat16 (channels_last), all alternating in one run.
Every result is checked against float64. Results go to benchmarks/results/convolutions_*.json (RNNDYN_BENCH_RESULTS); RNNDYN_BENCH_QUICK=1
checks at a tiny size that all of it runs.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from measure import QUICK, alternate, summary, write_result
from torch import Tensor

from rnndyn_fast.ops.amx_conv import AmxMap
from rnndyn_fast.ops.engines import EngineChoice, Geometry, Operator, choose_engine
from rnndyn_fast.program.one_map import OneMap

ROUNDS, WARMUP = (2, 1) if QUICK else (15, 3)
# The largest relative errors in norm that may be: of ours the documented budget, of bfloat16 its 8 bits.
PRECISIONS = {"rnndyn": "auto", "rnndyn_high": "auto:2", "rnndyn_bf16": "auto:1"}
BUDGET = {"rnndyn": 1e-5, "rnndyn_high": 1e-5, "rnndyn_bf16": 2e-2, "contiguous": 1e-5, "channels_last": 1e-5, "bf16": 2e-2}


@dataclass(frozen=True)
class Case:
    """A connection: its source's map (after pooling) and its channels."""

    name: str
    size: int
    source: int
    target: int
    transposed: bool = False


BLT_NET = (
    Case("v1 bottom-up", 64, 32, 64),
    Case("v2 bottom-up", 32, 64, 128),
    Case("v2 lateral", 32, 128, 128),
    Case("v4 bottom-up", 16, 128, 256),
    Case("v4 lateral", 16, 256, 256),
    Case("it bottom-up", 8, 256, 512),
    Case("it lateral", 8, 512, 512),
    Case("v2 top-down", 16, 256, 128, True),
    Case("v4 top-down", 8, 512, 256, True),
)
# Kernel, batch, and how many times larger the maps are.
NETWORKS = {"blt_net_64": (3, 2 if QUICK else 16, 1), "blt_net_128": (5, 1 if QUICK else 4, 2)}
CASES = [pytest.param(network, case, id=f"{network}-{case.name.replace(' ', '_')}") for network in NETWORKS for case in BLT_NET]
Pass = Callable[[], Tensor]


@pytest.fixture(scope="module")
def rows() -> Iterator[dict[str, list[dict[str, Any]]]]:
    """Results by network; a file is written where every convolution of it was measured."""
    found: dict[str, list[dict[str, Any]]] = {network: [] for network in NETWORKS}
    yield found
    for network, results in found.items():
        if len(results) == len(BLT_NET):
            facts = {"kernel": NETWORKS[network][0], "batch": NETWORKS[network][1]}
            write_result(f"convolutions_{network}" + ("_quick" if QUICK else ""), {"what": network, **facts, "convolutions": results})


def products(choice: EngineChoice, case: Case, kernel: int, batch: int) -> tuple[float, float]:
    """Multiplications and additions of the direct convolution, and those done (without the transforms), in 1e9."""
    direct = 2e-9 * batch * case.size**2 * kernel**2 * case.source * case.target
    if choice.map is None:
        return direct, direct
    if isinstance(choice.map, AmxMap):
        return direct, direct * {1: 1, 2: 3, 3: 6}[choice.map.parts]
    # Transposed: of the four phases, by row and by column, those with fewer taps leave one frequency out.
    frequencies = (2 * choice.map.form.patch - 1) ** 2 if choice.map.transposed else choice.map.form.patch**2
    tiles = choice.map.tiles(case.size, case.size)
    return direct, 2e-9 * batch * tiles * frequencies * case.source * case.target


def ours(weight: OneMap, x: Tensor, grad: Tensor) -> dict[str, Pass]:
    """Forward, gradient of the data and gradient of the weight, of maps [N, H, W, C]."""

    def backward(i: int) -> Tensor:
        result = weight.backward(x, grad, need_x=i == 0, need_weight=i == 1)[i]
        assert result is not None
        return result

    return {
        "forward": lambda: weight.forward(x).permute(0, 3, 1, 2),
        "backward data": lambda: backward(0).permute(0, 3, 1, 2),
        "backward weights": lambda: backward(1),
    }


def vendors(geometry: Geometry, weight: Tensor, x: Tensor, grad: Tensor) -> dict[str, Pass]:
    """The same by PyTorch, of maps [N, C, H, W] in the layout and dtype given."""
    transposed = geometry.operator is Operator.CONV_TRANSPOSE
    tail = ([geometry.stride] * 2, [geometry.padding] * 2, [1, 1], transposed, [geometry.output_padding] * 2, 1)
    backward = torch.ops.aten.convolution_backward
    return {
        "forward": lambda: torch.ops.aten.convolution(x, weight, None, *tail),
        "backward data": lambda: backward(grad, x, weight, None, *tail, [True, False, False])[0],
        "backward weights": lambda: backward(grad, x, weight, None, *tail, [False, True, False])[1],
    }


def packing_seconds(geometry: Geometry, weight: Tensor, choice: EngineChoice) -> dict[str, float]:
    """Of the weight for the forward pass and for the gradient of the data."""
    if choice.map is None:
        return {}
    packs = OneMap(geometry, weight, choice)
    calls = {
        "forward": lambda: packs.pack(backward=False)[0],
        "backward": lambda: packs.pack(backward=True)[0],
    }
    return {name: statistics.median(times) for name, times in alternate(calls, ROUNDS, WARMUP).items()}


@pytest.mark.parametrize(("network", "case"), CASES)
def test_convolution(benchmark: Any, rows: dict[str, list[dict[str, Any]]], network: str, case: Case) -> None:
    kernel, batch, scale = NETWORKS[network]
    if QUICK:
        case = Case(case.name, min(case.size, 16), case.source // 8, case.target // 8, case.transposed)
    case = Case(case.name, case.size * scale, case.source, case.target, case.transposed)
    operator, padding = (Operator.CONV_TRANSPOSE, (kernel - 1) // 2) if case.transposed else (Operator.CONV, (kernel - 1) // 2)
    geometry = Geometry(operator, 2, padding, 1) if case.transposed else Geometry(operator, 1, padding)
    torch.manual_seed(0)
    channels = (case.source, case.target) if case.transposed else (case.target, case.source)
    out = case.size * (2 if case.transposed else 1)
    weight = torch.randn(*channels, kernel, kernel) / (case.source * kernel**2) ** 0.5
    x, grad = torch.randn(batch, case.size, case.size, case.source), torch.randn(batch, out, out, case.target)
    choices = {
        name: choose_engine(geometry, tuple(weight.shape), case.size, case.size, torch.float32, engine, batch)
        for name, engine in PRECISIONS.items()
    }
    choice = choices["rnndyn"]

    nhwc = [t.permute(0, 3, 1, 2) for t in (x, grad)]
    layouts = {
        "contiguous": [weight, *(t.contiguous() for t in nhwc)],
        "channels_last": [weight.contiguous(memory_format=torch.channels_last), *nhwc],
        "bf16": [t.bfloat16().contiguous(memory_format=torch.channels_last) for t in (weight, *nhwc)],
    }
    contenders = {name: ours(OneMap(geometry, weight, c), x, grad) for name, c in choices.items()}
    contenders |= {name: vendors(geometry, *tensors) for name, tensors in layouts.items()}
    truth = vendors(geometry, *(t.double() for t in layouts["contiguous"]))

    direct, done = products(choice, case, kernel, batch)
    row: dict[str, Any] = {"name": case.name, "map": case.size, "source": case.source, "target": case.target}
    row["engines"] = {name: str(c) for name, c in choices.items()}
    row |= {
        "engine": str(choice),
        "direct_gflop": direct,
        "done_gflop": done,
        "packing_s": packing_seconds(geometry, weight, choice),
        "passes": {},
    }
    for name, exact in truth.items():
        expected = exact()
        errors = {k: float((v[name]().double() - expected).norm() / expected.norm()) for k, v in contenders.items()}
        # Sums over thousands of tiles with patches of 8: 1.6e-5 measured for the gradient of V1's weight.
        slack = 3.0 if name == "backward weights" else 1.0
        assert all(errors[k] < slack * BUDGET[k] for k in contenders), f"{name}: {errors}"
        times = summary(alternate({k: v[name] for k, v in contenders.items()}, ROUNDS, WARMUP), "rnndyn")
        row["passes"][name] = {k: {**times[k], "relative_error": errors[k]} for k in contenders}
        best = min(times[k]["ours_is_faster_by"] for k in ("contiguous", "channels_last"))
        mine = times["rnndyn"]["median_s"]
        print(f"\n{network} {case.name} {name}, {choice}: {1e3 * mine:.2f} ms, {direct / mine:.0f} GFLOP/s as direct, ", end="")
        print(f"{done / mine:.0f} done; x{best:.2f} of the vendor, x{times['bf16']['ours_is_faster_by']:.2f} of its bf16", end="")
        high, low = times["rnndyn_high"]["median_s"], times["rnndyn_bf16"]["median_s"]
        print(
            f"; high {1e3 * high:.2f} ms x{best * mine / high:.2f}; bf16 {1e3 * low:.2f} ms x{times['bf16']['median_s'] / low:.2f} of its",
            end="",
        )
    rows[network].append(row)
    # pytest-benchmark shows one contender; the alternating measurement of all of them is what counts.
    benchmark.pedantic(contenders["rnndyn"]["forward"], rounds=1, warmup_rounds=0)
    benchmark.extra_info.update(row)
