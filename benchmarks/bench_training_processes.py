"""Training in two processes: images/s against one process with two threads, and when gradients are ready for the all-reduce.

    pytest benchmarks/bench_training_processes.py -q

RNNDYN_BENCH_QUICK=1 runs it tiny, to see that it works. The file is started by torchrun too, for each process of the second test.

Prediction: two processes of one thread each give 0.95 to 1.10 of the images/s of one process with two threads: kernels share two threads
well already, and what runs in one thread (the loss, the optimiser, the batch's transform) is done twice at once in two processes, but
gradients are summed besides. The rollout is one autograd node: all buckets are ready in the last hundredth of the backward pass, so
nothing overlaps; the all-reduce of some 12 MB through gloo takes less than 2% of a step.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch
from measure import QUICK, summary, write_result

from rnndyn_fast.data import make_dataset
from rnndyn_fast.models import blt_net_64
from rnndyn_fast.train import loss_over_time, read_metrics

SIZE, IMAGES, BATCH, EPOCHS, ROUNDS = (16, 32, 8, 2, 1) if QUICK else (64, 96, 32, 2, 3)
NETWORK: dict[str, Any] = {"widths": (2, 4, 8, 16, 32), "timesteps": 3} if QUICK else {"widths": (32, 64, 128, 256, 512), "timesteps": 10}
STEPS = 2 if QUICK else 4  # measured ones, of each kind


def launched(processes: int, *words: str) -> None:
    """A Python command in so many processes, with two threads in all. (Output is shown where it fails.)"""
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"] if processes > 1 else []
    environment = {**os.environ, "OMP_NUM_THREADS": str(2 // processes)}
    done = subprocess.run([sys.executable, *launcher, *words], capture_output=True, text=True, env=environment, timeout=3000)
    if done.returncode:
        raise RuntimeError(done.stderr[-5000:])


def images_per_s(images: Path, out: Path, processes: int) -> float:
    """Of `rnndyn train`, the median epoch but for the first, in which programs are planned."""
    options = {**NETWORK, "widths": ",".join(map(str, NETWORK["widths"])), "batch_size": BATCH, "epochs": EPOCHS, "threads": 2 // processes}
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    launched(processes, "-m", "rnndyn_fast.cli", "train", "--data", str(images), "--out", str(out), *words)
    return statistics.median(row.images_per_s for row in read_metrics(out)[1:])


def test_two_processes_against_one(tmp_path: Path) -> None:
    """Equal global batches, in turns. The loss curves must be alike."""
    images = make_dataset(tmp_path / "d.h5", source="digits", size=SIZE, num_train=IMAGES, num_val=20, num_test=20, num_testplus=20)
    contenders = {"one process, 2 threads": 1, "two processes, 1 thread each": 2}
    speeds: dict[str, list[float]] = {name: [] for name in contenders}
    for number in range(ROUNDS):
        for name in list(contenders)[:: 1 if number % 2 == 0 else -1]:
            speeds[name].append(images_per_s(images, tmp_path / f"{contenders[name]}_{number}", contenders[name]))
    losses = [[row.train_loss for row in read_metrics(tmp_path / f"{processes}_0")] for processes in (1, 2)]
    assert all(abs(a - b) < 0.05 * a for a, b in zip(*losses, strict=True)), losses
    one, two = speeds.values()
    write_result(
        "training_processes",
        {
            "section": "training processes",
            "batch": BATCH,
            "size": SIZE,
            "rounds": ROUNDS,
            "images_per_s": {name: {"median": statistics.median(v), "min": min(v), "max": max(v)} for name, v in speeds.items()},
            "speed_up": statistics.median(b / a for a, b in zip(one, two, strict=True)),
        },
    )


def test_overlap_of_communication(tmp_path: Path) -> None:
    """When buckets of gradients are ready, as shares of the time from the backward pass's start to the last of them; how long is waited for
    the all-reduce after that; and a step with and without it."""
    told = tmp_path / "told.json"
    launched(2, str(Path(__file__)), str(told))
    found = json.loads(told.read_text())
    for times in found["buckets_ready"]:
        assert all(0 <= share <= 1 for share in times)
    result = summary(found.pop("times"), "with the all-reduce")
    write_result("training_overlap", {"section": "training processes", "batch": BATCH, "size": SIZE, **found, "contenders": result})


def overlap(told: Path) -> None:
    """What one of two processes does; the first writes."""
    from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook

    from rnndyn_fast.processes import processes
    from rnndyn_fast.train.steps import Steps

    torch.set_num_threads(1)
    with processes(torch.device("cpu")) as group:
        torch.manual_seed(0)
        net = blt_net_64(num_classes=10, image_size=SIZE, topdown_connections=False, **NETWORK)
        optimizer = torch.optim.Adam(net.parameters(), lr=1e-3)
        clock: dict[str, Any] = {}

        def loss(log_probs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
            value = loss_over_time(log_probs, labels, "sum")
            clock.update(begin=time.perf_counter(), ready=[])
            return value

        def ended() -> None:
            clock["end"] = time.perf_counter()

        steps = Steps(net, optimizer, loss, torch.device("cpu"), before_update=ended, group=group)
        assert steps._parallel is not None

        def ready(bucket: Any) -> Any:
            clock["ready"].append(time.perf_counter())
            sizes.append(bucket.buffer().numel() * 4)
            return allreduce_hook(None, bucket)

        sizes: list[int] = []
        steps._parallel.register_comm_hook(None, lambda state, bucket: ready(bucket))  # (annotations must not be strings)
        part = BATCH // group.count
        images, labels = torch.rand(part, 3, SIZE, SIZE), torch.arange(part) % 10
        times: dict[str, list[float]] = {"with the all-reduce": [], "without": []}
        backward: dict[str, list[float]] = {name: [] for name in times}
        shares, waits = list[list[float]](), list[float]()
        for number in range(3 + STEPS):  # (three first: programs are planned, buckets are arranged anew)
            for name in times:
                sizes.clear()
                torch.distributed.barrier()
                start = time.perf_counter()
                if name == "without":
                    with steps._parallel.no_sync():
                        steps._train(images, labels, BATCH)
                else:
                    steps._train(images, labels, BATCH)
                if number >= 3:
                    times[name].append(time.perf_counter() - start)
                    backward[name].append(clock["end"] - clock["begin"])
                    if name != "without":
                        last = clock["ready"][-1]
                        shares.append([(one - clock["begin"]) / (last - clock["begin"]) for one in clock["ready"]])
                        waits.append(clock["end"] - last)
                        bucket_bytes = list(sizes)
        if group.rank == 0:
            facts = {
                "times": times, "buckets_ready": shares, "bucket_bytes": bucket_bytes,
                "backward_s": {name: statistics.median(values) for name, values in backward.items()},
                "waited_s": statistics.median(waits),
                "gradient_bytes": sum(p.numel() * 4 for p in net.parameters()),
            }  # fmt: skip
            told.write_text(json.dumps(facts))


if __name__ == "__main__":
    overlap(Path(sys.argv[1]))
