"""The twenty generated files of `bench.photos`, every mode, size and profile: what was drawn is what is read."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.photos import save_files
from counterlens.engine.images.files import open_picture


@pytest.mark.slow
def test_every_file_shows_what_was_drawn(tmp_path: Path) -> None:
    pytest.importorskip("pillow_heif", reason="needs pillow-heif (the extra `photos`)")
    drawn: dict[str, np.ndarray] = {}
    labels = save_files(tmp_path, drawn=drawn)
    assert len(labels) == 20
    for name, pixels in drawn.items():
        picture = open_picture(tmp_path / name, name)
        assert picture.size == (pixels.shape[1], pixels.shape[0]), name
        if name.startswith(("14", "09")):  # other inks, another grey: they are meant to look different
            continue
        expected = Image.fromarray(pixels)
        if "grey" in name or "sixteen" in name:
            expected = expected.convert("L").convert("RGB")
        middle = tuple(slice(n // 5, n - n // 5) for n in pixels.shape[:2])  # corners may be transparent
        off = np.abs(np.asarray(picture, dtype=int) - np.asarray(expected, dtype=int))[middle]
        assert off.mean() < (12 if "palette" in name else 4), (name, off.mean())
