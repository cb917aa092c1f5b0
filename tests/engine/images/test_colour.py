"""Colour profiles: what a picture's numbers mean, in sRGB."""

from __future__ import annotations

import warnings
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bench.colour_profiles import (
    ADOBE_RGB,
    D50,
    DISPLAY_P3,
    GREY,
    GREY_GAMMA,
    SRGB,
    cmyk_profile,
    from_lab,
    from_xyz,
    linear,
    matrix_profile,
)
from counterlens.engine.errors import CounterlensError
from counterlens.engine.images.files import load_image, open_both, open_picture

COLOURS = [(200, 60, 40), (30, 160, 70), (60, 80, 190), (128, 128, 128), (250, 250, 250), (5, 5, 5)]


def swatches(mode: str = "RGB") -> Image.Image:
    """16 pixels of each colour in a row."""
    row = np.repeat(np.array(COLOURS, dtype=np.uint8), 16, axis=0)[None].repeat(16, axis=0)
    return Image.fromarray(row).convert(mode)


def read(image: Image.Image, kind: str = "png", **options: object) -> np.ndarray:
    file = BytesIO()
    image.save(file, kind, **options)
    return np.asarray(open_picture(file, "a"), dtype=int)[8, 8::16][: len(COLOURS)]


@pytest.mark.parametrize("space", [DISPLAY_P3, ADOBE_RGB])
@pytest.mark.parametrize("kind", ["png", "webp", "tiff", "avif"])
def test_wide_colours_become_srgb(space: object, kind: str) -> None:
    options = (
        {"lossless": True} if kind == "webp" else {"quality": 100, "subsampling": "4:4:4"} if kind == "avif" else {}
    )
    got = read(swatches(), kind, icc_profile=matrix_profile(space), **options)
    expected = np.array([linear(space, colour) for colour in COLOURS])  # by matrices and curves, without lcms
    assert np.abs(got - expected).max() <= (2 if kind != "avif" else 5)
    assert np.abs(got[0] - COLOURS[0]).max() > 8  # it matters
    assert np.abs(got[3] - COLOURS[3]).max() <= 8  # grey stays grey


def test_srgb_keeps_every_bit() -> None:
    rng = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    for profile in (matrix_profile(SRGB), None):
        file = BytesIO()
        Image.fromarray(rng).save(file, "png", **({"icc_profile": profile} if profile else {}))
        assert np.array_equal(np.asarray(open_picture(file, "a")), rng)


def test_transparent_pictures_are_converted_before_they_are_laid_over_white() -> None:
    image = swatches("RGBA")
    image.putalpha(128)
    got = read(image, icc_profile=matrix_profile(DISPLAY_P3))
    opaque = np.array([linear(DISPLAY_P3, colour) for colour in COLOURS])
    assert np.abs(got - (opaque * 128 + 255 * 127) / 255).max() <= 2


def test_grey_profiles() -> None:
    for mode in ("L", "LA"):
        got = read(swatches().convert(mode), icc_profile=GREY)
        grey = np.asarray(swatches().convert("L"))[8, 8::16]
        expected = np.array([from_xyz(D50 * (value / 255) ** GREY_GAMMA) for value in grey])
        assert np.abs(got - expected).max() <= 2
        assert np.abs(got[0] - grey[0]).max() > 8


def test_cmyk_profiles() -> None:
    inks = [(0, 0, 0, 0), (255, 0, 0, 0), (0, 255, 0, 0), (0, 0, 255, 0), (0, 0, 0, 255)]
    expected = [from_lab(*lab) for lab in [(100, 0, 0), (70, -60, -40), (65, 70, -5), (95, 0, 85), (25, 0, 0)]]
    for ink, colour in zip(inks, expected, strict=True):
        file = BytesIO()
        Image.new("CMYK", (16, 16), ink).save(file, "jpeg", quality=100, icc_profile=cmyk_profile())
        got = np.asarray(open_picture(file, "a"), dtype=int)[8, 8]
        assert np.abs(got - colour).max() <= 24, ink  # black point compensation darkens, a little near white
        plain = np.asarray(open_both(file, "a")[1], dtype=int)[8, 8]
        assert np.abs(got - colour).max() < np.abs(plain - colour).max() or ink == inks[0]


@pytest.mark.parametrize("profile", [b"no profile", matrix_profile(SRGB)[:200], cmyk_profile()])
def test_a_broken_profile_is_a_warning_that_names_the_file(profile: bytes, tmp_path: Path) -> None:
    swatches().save(tmp_path / "a.png", icc_profile=profile)
    with pytest.warns(UserWarning, match=r"a\.png: its colour profile cannot be used .*taken for sRGB") as said:
        image = load_image(tmp_path / "a.png", 16)
    assert "\n" not in str(said[0].message)
    with warnings.catch_warnings(action="error"):
        swatches().save(tmp_path / "b.png")
        assert np.array_equal(image, load_image(tmp_path / "b.png", 16))


def test_as_other_programs_read_it(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 3
    swatches().save(tmp_path / "a.png", icc_profile=matrix_profile(DISPLAY_P3), exif=exif)
    ours, plain = open_both(tmp_path / "a.png", "a")
    assert np.array_equal(np.asarray(plain), np.asarray(swatches().rotate(180)))
    assert np.array_equal(np.asarray(ours), np.asarray(open_picture(tmp_path / "a.png", "a")))
    assert not np.array_equal(np.asarray(ours), np.asarray(plain))
    unmanaged = open_picture(tmp_path / "a.png", "a", managed=False)
    assert np.array_equal(np.asarray(unmanaged), np.asarray(plain))


def test_heic(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    heif = pytest.importorskip("pillow_heif", reason="needs pillow-heif (the extra `photos`)")
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = swatches().rotate(-90, expand=True)
    heif.from_pillow(swatches()).save(tmp_path / "a.heic", quality=-1, exif=exif.tobytes())
    got = np.asarray(open_picture(tmp_path / "a.heic", "a"), dtype=int)
    assert np.abs(got - np.asarray(upright)).max() <= 6
    monkeypatch.setitem(__import__("sys").modules, "pillow_heif", None)  # as where it is not installed
    with pytest.raises(
        CounterlensError, match=r"a\.heic: not an image .*\(HEIC; save it as JPEG.*pip install pillow-heif"
    ):
        open_picture(tmp_path / "a.heic", tmp_path / "a.heic")
