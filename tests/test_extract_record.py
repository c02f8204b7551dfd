"""Hooks that record areas of any module over time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from rnndyn_fast.analysis import NormReducer
from rnndyn_fast.extract import Activations, DatasetSource, load_results, record, stream
from rnndyn_fast.train import QuietReporter


class Unrolled(nn.Module):
    """Somebody's network: a cell and a head, run over time by a plain loop."""

    def __init__(self) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(12, 7)
        self.head = nn.Sequential(nn.Linear(7, 5), nn.Tanh())

    def forward(self, images: torch.Tensor) -> list[torch.Tensor]:
        state, outputs = None, []
        for _ in range(4):
            state = self.cell(images.flatten(1), state)
            outputs.append(self.head(state[0]))
        return outputs


def test_record_stacks_calls_over_time() -> None:
    net, images = Unrolled(), torch.randn(6, 3, 2, 2)
    with record(net, {"cell": "cell", "tanh": "head.1", "memory": "cell"}, select=lambda a, y: y[1] if a == "memory" else first(y)) as seen:
        for _ in range(2):  # taken, it begins anew
            outputs = net(images)
            areas = seen.take()
    assert areas["cell"].shape == areas["memory"].shape == (4, 6, 7)
    assert torch.equal(areas["tanh"], torch.stack(outputs))
    assert not areas["tanh"].requires_grad
    assert not torch.equal(areas["cell"], areas["memory"])
    net(images)
    with pytest.raises(ValueError, match="names: module 'cell' was not called"):
        seen.take()  # the hooks are gone
    assert not net.cell._forward_hooks


def first(output: object) -> torch.Tensor:
    return output[0] if isinstance(output, tuple) else output  # type: ignore[return-value]


def test_record_of_the_module_itself_and_of_some_calls() -> None:
    cell = nn.RNNCell(3, 5)
    with record(cell, {"h": ""}, every=2) as seen:
        for _ in range(6):
            last = cell(torch.ones(2, 3))
    assert seen.take()["h"].shape == (3, 2, 5)
    assert last.requires_grad


def test_recorded_module_in_an_extraction(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Unrolled().eval()
    data = [(torch.randn(3, 2, 2), k % 5) for k in range(23)]
    with record(net, ["cell", "head"]) as seen:

        def forward(images: torch.Tensor) -> Activations:
            net(images)
            return Activations(seen.take())

        out = stream(
            forward, DatasetSource(data), [NormReducer(["cell", "head"])], out=tmp_path / "r.h5", batch_size=5, reporter=QuietReporter()
        )  # type: ignore[arg-type]
    with torch.no_grad():
        expected = torch.stack(net(torch.stack([image for image, _ in data]))).norm(dim=2).mean(1)
    np.testing.assert_allclose(load_results(out)["norms"]["norm"][1], expected, rtol=1e-5)


def test_what_is_wrong_is_named() -> None:
    net = Unrolled()
    with pytest.raises(ValueError, match=r"names: no submodule 'body'; there are '', 'cell', 'head'"), record(net, ["body"]):
        pass
    with pytest.raises(TypeError, match="names: expected a sequence"), record(net, "cell"):
        pass
    with pytest.raises(ValueError, match="every: expected an int"), record(net, ["cell"], every=0):
        pass
    with record(nn.Identity(), {"a": ""}) as seen:
        pass
    module = nn.Identity()
    with record(module, {"a": ""}) as seen:
        with pytest.raises(TypeError, match="expected module '' to give a tensor, got dict"):
            module({})
        module(torch.ones(2, 3))
        module(torch.ones(1, 3))
        with pytest.raises(ValueError, match="names: module 'a' gave several shapes over time"):
            seen.take()
