"""Results at a prompt are one line."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.engine.metrics import calibrate, counterfactual_quality, cout, insertion, msi, perturbation_curve, road
from counterlens.engine.metrics.quantities import make_quantity
from counterlens.engine.metrics.scoring import Scoring
from counterlens.engine.saliency.lax import new_adapter
from tests.engine.audit.test_audit import make_engine

RESULTS: dict[str, Callable[[Any, Tensor, Tensor], Any]] = {
    "Counterfactuals": lambda e, x, s: e.counterfactual(x),
    "Explanations": lambda e, x, s: e.explain(x, method="rise"),
    "LAX": lambda e, x, s: new_adapter(e.classifier, 16),
    "Maps": lambda e, x, s: new_adapter(e.classifier, 16).explain(x),
    "Scoring": lambda e, x, s: Scoring(
        e.classifier, x, s, s, torch.zeros(len(x)).long(), make_quantity(e.classifier), 0.5, 0.5, [0] * len(x)
    ),
    "MSI": lambda e, x, s: msi(e.classifier, x, s),
    "Curves": lambda e, x, s: perturbation_curve(e.classifier, x, s),
    "Faithfulness": lambda e, x, s: (insertion(e.classifier, x, s), road(e.classifier, x, s))[1],
    "Calibration": lambda e, x, s: calibrate(e.classifier, x, s),
    "CounterfactualQuality": lambda e, x, s: counterfactual_quality(e.classifier, x, x.flip(3), 1),
    "Transition": lambda e, x, s: cout(e.classifier, x, x.flip(3), 1),
}


@pytest.mark.parametrize("name", RESULTS)
def test_a_result_is_one_line(name: str, tiny) -> None:
    g = torch.Generator().manual_seed(0)
    images, maps = torch.rand(3, 3, 16, 16, generator=g), torch.rand(3, 16, 16, generator=g)
    text = repr(RESULTS[name](make_engine(tiny), images, maps))
    assert text.startswith(f"{name}(")
    assert "\n" not in text
    assert "tensor" not in text
    assert len(text) < 400
