"""What cannot be sent to another process is refused by name before Ray is started."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from counterlens.engine import Config, Engine
from counterlens.engine.audit.cluster import check_travels
from counterlens.engine.errors import UsageError
from counterlens.engine.images.files import save_png
from counterlens.engine.models.protocols import SoftmaxClassifier

ray = pytest.importorskip("ray", reason="needs ray (the extra `ray`)")
norms = nn.utils.parametrizations


class Holding(nn.Module):
    """A classifier that holds something."""

    def __init__(self, held: Any = None) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.head, self.held = nn.Conv2d(3, 8, 3, stride=2), nn.Linear(8, 10), held

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3))) * 5


def changed(change: Callable[[Any], Any], part: str) -> nn.Module:
    net = Holding()
    change(getattr(net, part))
    return net


STAY: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "weight norm": (lambda: changed(norms.weight_norm, "conv"), r"conv \(ParametrizedConv2d\)"),
    "spectral norm": (lambda: changed(norms.spectral_norm, "head"), r"head \(ParametrizedLinear\)"),
    "orthogonal": (lambda: changed(norms.orthogonal, "head"), r"head \(ParametrizedLinear\)"),
    "lock": (lambda: Holding(threading.Lock()), "lock"),
    "generator": (lambda: Holding(x for x in range(3)), "generator"),
}


@pytest.mark.parametrize("name", STAY)
def test_the_classifier_is_named_before_ray_is_started(
    name: str, tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, words = STAY[name]
    diffusion, _ = tiny
    save_png(torch.rand(3, 16, 16, generator=torch.Generator().manual_seed(0)), tmp_path / "in.png")
    engine = Engine(diffusion, SoftmaxClassifier(make().eval(), diffusion.labels), runtime="eager")
    monkeypatch.setattr(ray, "init", lambda *a, **k: pytest.fail("Ray was started"))
    with pytest.raises(UsageError, match=f"^ray: the classifier cannot be sent to another process.*{words}"):
        engine.audit(tmp_path, tmp_path / "out", Config(), ray="local", workers=1)


def test_lambdas_and_local_classes_travel() -> None:
    class Local(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.act = lambda x: x.relu()

    check_travels({"classifier": SoftmaxClassifier(Local(), ["a"]), "config": Config(), "store": Path("/tmp")})
