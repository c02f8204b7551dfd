"""The table of networks in docs/networks.md is what the networks are."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from rnndyn_fast.models import blt_net_64

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "networks.md"


@pytest.fixture
def model_table(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import model_table

    return model_table


def test_page_is_up_to_date(model_table: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["model_table.py", "--check", str(PAGE)])
    assert model_table.main() == 0, capsys.readouterr().out
    rows = model_table.between(PAGE.read_text(encoding="utf-8"))[1].splitlines()[2:-2]
    assert len(rows) == len(model_table.NETWORKS)
    # As published.
    for name, parameters in (
        ("rcnn_sat bl", "27,979,605"),
        ("rgc_intermediate", "15,445,800"),
        ("blt_vs, biological, 224 px", "27,332,427"),
    ):
        assert f"| {name} | {parameters} |" in "\n".join(rows)


def test_check_finds_another_number(model_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_table, "table", lambda: "| a | 1,000 | 2 |\n\nnote")
    page = tmp_path / "page.md"
    monkeypatch.setattr(sys, "argv", ["model_table.py", "--check", str(page)])
    for inside, status in (
        ("| a | 1,000 | 2 |\n\nnote", 0),
        ("| a | 1,000 |  |\n\nnote", 1),
        ("| a | 1,001 | 2 |\n\nnote", 1),
        ("| a | 1,000 | 2 |\n| b | 1 | 1 |\n\nnote", 1),
    ):
        page.write_text(f"before\n{model_table.START}\n{inside}\n{model_table.END}\nafter")
        assert model_table.main() == status, inside
    with pytest.raises(ValueError, match="page: expected one"):
        model_table.between("no marks")


def test_kept_bytes_are_those_of_a_rollout(model_table: Any) -> None:
    """As tensors, what a forward pass really returns for backward is no less, and its arena holds it with what it needs besides."""
    net = blt_net_64(timesteps=3, image_size=32, widths=(16,) * 5, topdown_connections=False, backend="native", engine="direct")
    saved: list[torch.Tensor] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.states([torch.zeros(1, 3, 32, 32)], ["gap"])
    (arena,) = [t for t in saved if t.dtype == torch.uint8]
    kept = model_table.kept_bytes(net)
    assert arena.numel() / 4 < kept <= arena.numel()
    twice = blt_net_64(timesteps=6, image_size=32, widths=(16,) * 5, topdown_connections=False)
    assert 1.1 * kept < model_table.kept_bytes(twice) < 2 * kept


def test_update_puts_the_table_between_the_marks(model_table: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = tmp_path / "page.md"
    page.write_text(f"before\n{model_table.START}\nold\n{model_table.END}\nafter")
    monkeypatch.setattr(model_table, "NETWORKS", {"small": {"model": "rcnn_sat", "kind": "b", "width_divisor": 32, "image_size": 64}})
    monkeypatch.setattr(sys, "argv", ["model_table.py", "--update", str(page)])
    assert model_table.main() == 0
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("\nafter")
    row = text.splitlines()[4].split(" | ")
    assert row[0] == "| small"
    net = model_table.build(model_table.NETWORKS["small"])
    assert row[1] == f"{sum(p.numel() for p in net.parameters()):,}"
    assert torch.is_grad_enabled()
