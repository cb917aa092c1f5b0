"""Results that draw themselves: outlines on paper, signed changes, figures of real results."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine import Engine
from counterlens.engine.core.result import Counterfactuals
from counterlens.engine.images import figures
from counterlens.engine.images.drawing import change_map
from counterlens.engine.packs import Pack
from counterlens.engine.portable.overlay import FULL_CHANGE, outline, side_by_side

matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")


def test_an_outline_has_no_inner_lines() -> None:
    region = np.zeros((4, 5), dtype=bool)
    region[1:3, 1:4] = True
    assert len(outline(region)) == 2 * (2 + 3)
    assert not outline(np.zeros((3, 3), dtype=bool))
    assert len(outline(np.ones((3, 3), dtype=bool))) == 12  # the border of the image


def test_an_outlined_overlay_differs_at_the_region_alone() -> None:
    image, saliency, region = np.full((3, 32, 32), 0.4), np.zeros((32, 32)), np.zeros((32, 32), dtype=bool)
    region[10:20, 4:9] = True
    plain, outlined = (np.asarray(side_by_side(image, saliency, r), dtype=int) for r in (None, region))
    rows, columns, _ = np.nonzero(plain != outlined)
    assert rows.min() >= 10 * 8 - 4
    assert rows.max() <= 20 * 8 + 4
    assert columns.min() >= (32 + 4) * 8 - 4
    assert columns.max() <= (32 + 9) * 8 + 4


def test_changes_say_which_way() -> None:
    before = torch.full((1, 3, 1, 4), 0.5)
    after = before.clone()
    after[..., 1] += FULL_CHANGE  # brighter
    after[..., 2] -= FULL_CHANGE  # darker
    after[0, 0, 0, 3], after[0, 1, 0, 3] = 1, 0  # as bright as before, another colour
    r, g, b = change_map(before, after)[0, :, 0]
    assert max(r[0], g[0], b[0]) - min(r[0], g[0], b[0]) < 0.01
    assert r[0] > 0.9
    assert r[1] > g[1] + 0.3
    assert b[2] > r[2] + 0.3
    assert max(r[3], g[3], b[3]) - min(r[3], g[3], b[3]) > 0.2


@pytest.fixture(scope="module")
def engine() -> Engine:
    return Engine.from_pack("digits")


def test_explanations_draw_themselves(engine: Engine, monkeypatch: pytest.MonkeyPatch) -> None:
    images = Pack("digits").samples("test", count=3, marker="random").images
    found = engine.explain(images, method="lax")
    assert found.regions.flatten(1).sum(1).tolist() == [round(a * 1024) for a in found.msi.sufficient_area.tolist()]
    assert (found.scores[0][found.regions[0]].min() >= found.scores[0][~found.regions[0]].max()).item()
    picture = found.to_pil(most=2)
    assert isinstance(picture, Image.Image)
    texts = [text.get_text() for axes in found.figure().axes for text in (axes.title, *axes.texts)]
    assert "where the evidence is (lax)" in texts
    assert any(text.startswith("MSI ") for text in texts)
    html = found._repr_html_()
    assert html is not None
    assert "data:image/png;base64," in html
    none = figures.explanations_figure(found, 0)
    assert none.texts[0].get_text() == "no images"
    monkeypatch.setitem(__import__("sys").modules, "matplotlib.figure", None)
    assert found._repr_html_() is None  # a notebook shows the text


def test_counterfactuals_draw_themselves(engine: Engine) -> None:
    images = Pack("digits").samples("test", count=2, marker="random").images
    made: Counterfactuals = engine.counterfactual(images, targets=[int(engine.probabilities(images[:1]).argmax()), 3])
    assert made.errors[0] is not None
    figure = made.figure()
    texts = [text.get_text() for axes in figure.axes for text in (axes.title, *axes.texts)]
    assert made.errors[0] in texts
    assert any(f"“{made.labels[int(made.prediction[1])]}”" in text for text in texts)
    width, height = made.to_pil().size
    assert width > 500
    assert height > 500
    # Titles stand inside the picture.
    renderer = figure.canvas.get_renderer() if hasattr(figure.canvas, "get_renderer") else None
    if renderer is not None:
        boxes = [text.get_window_extent(renderer) for axes in figure.axes for text in axes.texts if text.get_text()]
        assert all(box.y1 <= figure.bbox.height and box.y0 >= 0 for box in boxes)
