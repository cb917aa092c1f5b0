"""Overlays: what is marked can be told from any picture under it, and the picture is still there."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from counterlens.engine.images.maps import heat, overlay

SIZE = 24
PICTURES = {
    "white": torch.ones(3, SIZE, SIZE),
    "grey": torch.full((3, SIZE, SIZE), 0.5),
    "black": torch.zeros(3, SIZE, SIZE),
    "bright": 0.7 + 0.3 * torch.rand(3, SIZE, SIZE, generator=torch.Generator().manual_seed(0)),
    "yellow": torch.tensor([1.0, 1.0, 0.0])[:, None, None].expand(3, SIZE, SIZE),
}


def luminance(image: Tensor) -> Tensor:
    linear = torch.where(image <= 0.04045, image / 12.92, ((image + 0.055) / 1.055) ** 2.4)
    return torch.tensordot(torch.tensor([0.2126, 0.7152, 0.0722]), linear, dims=([0], [-3]))


@pytest.mark.parametrize("name", PICTURES)
def test_marked_pixels_have_a_colour_of_their_own(name: str) -> None:
    saliency = torch.zeros(SIZE, SIZE)
    saliency[4:9, 4:9], saliency[14:19, 14:19] = 1, 0.6
    shown = overlay(PICTURES[name], saliency)
    spread = shown.amax(0) - shown.amin(0)
    assert spread[saliency == 1].min() > 0.5
    assert spread[saliency == 0.6].min() > 0.2
    assert spread[saliency == 0].max() < 1e-6  # the rest is grey
    # Without any colour vision: the strongest are the brightest.
    assert luminance(shown)[saliency == 1].min() > 1.3 * luminance(shown)[saliency == 0].max()


def test_the_picture_is_still_visible_under_the_map() -> None:
    picture = torch.zeros(3, SIZE, SIZE)
    picture[:, :, 12:] = 1
    for strength in (0.0, 0.5, 1.0):
        shown = overlay(picture, torch.full((SIZE, SIZE), strength))
        assert (shown[:, 0, 12] - shown[:, 0, 11]).min() > 0.1


def test_colours_are_plasmas() -> None:
    matplotlib = pytest.importorskip("matplotlib", reason="needs matplotlib")
    x = torch.linspace(0, 1, 256)
    expected = torch.tensor([matplotlib.colormaps["plasma"](v)[:3] for v in x.tolist()]).T
    assert (heat(x[None])[:, 0] - expected).abs().max() < 0.02
    assert (luminance(heat(x[None]))[0].diff() > 0).all()
