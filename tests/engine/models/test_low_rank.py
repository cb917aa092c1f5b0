"""Low-rank changes: nothing at first, the same trained beside a network as merged into it, refused elsewhere."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from counterlens.engine.errors import CounterlensError
from counterlens.engine.models.low_rank import attach, merged, save_changes


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.SiLU(), nn.Flatten(), nn.Linear(5 * 16, 2))


def test_merged_is_what_was_trained(tmp_path: Path) -> None:
    student, x = network(), torch.randn(4, 3, 4, 4)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    plain = student(x)
    changes = attach(student, 4, torch.Generator().manual_seed(0))
    assert torch.equal(student(x), plain)
    assert [name for name, p in student.named_parameters() if p.requires_grad] == [
        "0.parametrizations.weight.0.up", "0.parametrizations.weight.0.down",
        "3.parametrizations.weight.0.up", "3.parametrizations.weight.0.down",
    ]  # fmt: skip
    assert changes["3"].up.shape == (2, 2)  # no rank above the weight's own
    optimizer = torch.optim.SGD([p for p in student.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        student(x).square().mean().backward()
        optimizer.step()
    with torch.no_grad():  # as the file holds them
        for change in changes.values():
            for factor in change.parameters():
                factor.copy_(factor.half().float())
    save_changes(changes, tmp_path / "few" / "changes.safetensors")
    own = network()
    other = merged(own, tmp_path / "few" / "changes.safetensors")
    assert torch.allclose(other(x), student(x), atol=1e-6)
    assert not torch.allclose(other(x), plain, atol=1e-3)
    assert all(torch.equal(tensor, before[name]) for name, tensor in own.state_dict().items())


def test_changes_of_another_network_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "changes.safetensors"
    save_changes(attach(network(), 2, torch.Generator()), path)
    with pytest.raises(CounterlensError, match=r"changes\.safetensors: cannot be read as changes of this network"):
        merged(nn.Sequential(nn.Linear(3, 3)), path)
    with pytest.raises(CounterlensError, match="cannot be read"):
        merged(nn.Sequential(nn.Conv2d(3, 4, 3), nn.SiLU(), nn.Flatten(), nn.Linear(2, 2)), path)
    path.write_bytes(b"not safetensors")
    with pytest.raises(CounterlensError, match="cannot be read"):
        merged(network(), path)
