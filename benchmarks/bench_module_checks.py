"""What it costs that every call looks whether layers of a network have been changed: blt_net_64, one image, in the
same run, alternating.

    pytest benchmarks/bench_module_checks.py

The same call with the look at the modules left out (the network and the parameters found once are used again), and
the look alone, many times over. Outputs are compared. Results go to benchmarks/results/*.json
(RNNDYN_BENCH_RESULTS). RNNDYN_BENCH_QUICK=1 checks at a tiny size that all of it runs.
"""

from __future__ import annotations

import statistics
from typing import Any

import torch
from measure import QUICK, alternate, summary, write_result

from rnndyn_fast.models import blt_net_64

ROUNDS, LOOKS = (3, 10) if QUICK else (301, 200)
SIZES: dict[str, Any] = {"widths": (4, 8, 16, 32, 64), "num_classes": 10} if QUICK else {}


def test_one_image(benchmark: Any) -> None:
    """Forward without gradients, and the look alone as a share of it."""
    torch.manual_seed(0)
    net = blt_net_64(timesteps=10, topdown_connections=False, backend="native", **SIZES).eval()
    unchecked = blt_net_64(timesteps=10, topdown_connections=False, backend="native", **SIZES).eval()
    unchecked.load_state_dict(net.state_dict())
    x = torch.randn(1, 3, 64, 64)
    known = unchecked.current()
    vars(unchecked)["current"] = lambda: known  # (in place of the method, so that nothing is looked at)

    def look() -> None:
        for _ in range(LOOKS):
            net.current()

    with torch.no_grad():
        assert torch.equal(net(x), unchecked(x))
        times = benchmark.pedantic(alternate, ({"checked": lambda: net(x), "unchecked": lambda: unchecked(x)}, ROUNDS), rounds=1)
        alone = alternate({"look": look}, ROUNDS)["look"]
    result = summary(times, "unchecked")
    look_s = statistics.median(alone) / LOOKS
    share = look_s / result["unchecked"]["median_s"]
    write_result(
        "module_checks" + ("_quick" if QUICK else ""),
        {
            "section": "module checks",
            "what": "forward of blt_net_64, one image, with and without the look at its modules",
            "batch": 1,
            "timesteps": 10,
            "look_s": look_s,
            "look_share": share,
            "contenders": result,
        },
    )
    more = result["checked"]["ours_is_faster_by"] - 1
    print(f"\nthe look alone: {1e6 * look_s:.2f} us, {100 * share:.3f}% of a call; calls with it: {100 * more:+.2f}%")
