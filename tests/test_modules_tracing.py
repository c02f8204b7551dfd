"""Tracers that cannot record a rollout name the one that can; exported programs give the same."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from readme_blocks import code_blocks
from torch import Tensor, nn

from rnndyn_fast.models import blt_net_64, convrnn
from rnndyn_fast.nn import CTRNN, BLTConv, ConvCell


def network(backend: str = "native") -> Any:
    torch.manual_seed(0)
    return blt_net_64(timesteps=2, image_size=16, widths=(2, 4, 8, 16, 32), num_classes=3, backend=backend).eval()


class Around(nn.Module):
    """A module that calls one of ours."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x: Tensor) -> Tensor:
        return self.inner(x)


MODULES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "network": (network, (1, 3, 16, 16)),
    "inside another": (lambda: Around(network()), (1, 3, 16, 16)),
    "layer": (lambda: BLTConv(3, 4, 3), (1, 3, 8, 8)),
    "cell": (lambda: ConvCell("gru", 3, 4, (6, 6)), (1, 3, 6, 6)),
    "continuous time": (lambda: CTRNN(2, inputs=3, hidden=8), (2, 4, 10, 3)),
    "published": (
        lambda: convrnn("gru_shallow", image_size=96, num_classes=4, widths=dict(conv1=2, conv2=2, conv3=3, conv4=3, conv5=3)),
        (1, 3, 96, 96),
    ),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.parametrize("name", MODULES)
def test_other_tracers_are_refused(name: str) -> None:
    make, shape = MODULES[name]
    net, x = make(), torch.rand(shape)
    with pytest.raises(TypeError, match=r"torch.jit.trace .* cannot record a rollout; take torch.export.export"):
        torch.jit.trace(net, x)
    with pytest.raises(TypeError, match=r"torch.fx.symbolic_trace cannot record a rollout; take torch.export.export"):
        torch.fx.symbolic_trace(net)
    with pytest.raises(TypeError, match=r"torch.jit.script cannot compile a rollout; take torch.export.export"):
        torch.jit.script(net)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("backend", ["native", "reference"])
def test_export(backend: str) -> None:
    """As one operation, or in PyTorch's; saved and loaded too, with the changes that were made in its layers."""
    net, x = network(backend), torch.rand(2, 3, 16, 16)
    net.v2.lateral_connect, net.it_ln.eps = False, 0.1
    with torch.no_grad():
        expected = net(x)
        program = torch.export.export(net, (x,))
        operations = {str(node.target) for node in program.graph.nodes if node.op == "call_function"}
        assert ("rnndyn.rollout.default" in operations) == (backend == "native")
        torch.testing.assert_close(program.module()(x), expected)
        file = io.BytesIO()
        torch.export.save(program, file)
        file.seek(0)
        torch.testing.assert_close(torch.export.load(file).module()(x), expected)
    names = set(program.state_dict)
    assert "v4.lateral.weight" in names
    assert "it_ln.weight" in names


@pytest.mark.filterwarnings("ignore")
def test_onnx() -> None:
    """The reference is exported in PyTorch's operations; the native operation has no translation."""
    pytest.importorskip("onnxscript")
    runtime = pytest.importorskip("onnxruntime")
    net, x = network("reference"), torch.rand(1, 3, 16, 16)
    with torch.no_grad():
        expected = net(x)
        file = io.BytesIO()
        torch.onnx.export(net, (x,), dynamo=True, verbose=False).save(file)
        session = runtime.InferenceSession(file.getvalue())
        (found,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        torch.testing.assert_close(torch.from_numpy(found), expected)
        net.backend = "native"
        with pytest.raises(Exception, match=r"rnndyn"):
            torch.onnx.export(net, (x,), dynamo=True, verbose=False)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("page", ["docs/modules.md", "docs/interventions.md"])
def test_blocks_of_the_pages_run(page: str) -> None:
    blocks = code_blocks(page, "python")
    assert blocks
    for block in blocks:
        exec(block, {})
