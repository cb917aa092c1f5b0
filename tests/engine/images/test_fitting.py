"""Pictures of any shape: what of them an image shows, and how the change goes back."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from counterlens.engine.errors import CounterlensError
from counterlens.engine.images.files import load_pixels, open_picture
from counterlens.engine.images.fitting import frame, inside, take
from counterlens.engine.images.restoring import FEATHER, restore, save_restored

SHAPES = [(96, 64), (64, 96), (97, 61), (403, 302), (300, 40), (10, 12)]


def picture(width: int, height: int, seed: int = 0) -> Image.Image:
    """Soft shapes with edges and grain."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)).resize((width, height), 3)
    return Image.fromarray((np.asarray(coarse) // 2 + rng.integers(0, 64, (height, width, 3))).astype(np.uint8))


@pytest.mark.parametrize("shape", SHAPES)
def test_crop_is_resize_and_centre_crop(shape: tuple[int, int]) -> None:
    size, (width, height) = 32, shape
    given = picture(*shape)
    longer = int(size * max(shape) / min(shape))
    resized = given.resize((longer, size) if width > height else (size, longer), Image.Resampling.BILINEAR)
    first = round((longer - size) / 2)
    corner = (first, 0) if width > height else (0, first)
    expected = resized.crop((*corner, corner[0] + size, corner[1] + size))
    got = take(given, frame("crop", shape, size), "bilinear")
    # Pillow resizes a box of the picture as it would the whole, up to where it rounds.
    assert np.abs(np.asarray(got, dtype=int) - np.asarray(expected, dtype=int)).max() <= 1


@pytest.mark.parametrize("shape", SHAPES)
def test_pad_shows_all_of_it_in_the_middle(shape: tuple[int, int]) -> None:
    made = frame("pad", shape, 32)
    left, top, right, bottom = inside(made)
    got = np.asarray(take(picture(*shape), made, colour=(1.0, 0.0, 0.0)))
    assert (right - left, bottom - top)[shape[0] < shape[1]] == 32
    assert abs((right - left) / (bottom - top) - shape[0] / shape[1]) <= 0.5 * shape[0] / shape[1]
    assert abs(left + right - 32) <= 1
    assert abs(top + bottom - 32) <= 1
    outside = np.ones((32, 32), dtype=bool)
    outside[top:bottom, left:right] = False
    assert outside.any()
    assert (got[outside] == [255, 0, 0]).all()
    alone = np.asarray(picture(*shape).resize((right - left, bottom - top), Image.Resampling.LANCZOS))
    assert np.array_equal(got[top:bottom, left:right], alone)


def test_a_square_of_the_own_size_is_not_touched() -> None:
    given = picture(32, 32)
    for fit in ("crop", "pad", "squash", "native"):
        made = frame(fit, (32, 32), 32, factor=8, most=32 * 32)
        assert made.whole
        assert np.array_equal(np.asarray(take(given, made)), np.asarray(given))


@pytest.mark.parametrize(("shape", "most", "expected"), [
    ((4032, 3024), 512 * 512, (576, 448)), ((640, 480), 10**9, (640, 512)), ((200, 150), 512 * 512, (192, 128)),
    ((65, 64), 512 * 512, (64, 64)), ((6000, 500), 256 * 256, (896, 64)),
])  # fmt: skip
def test_native_rounds_to_the_models_factor(shape: tuple[int, int], most: float, expected: tuple[int, int]) -> None:
    made = frame("native", shape, 512, factor=64, most=most)
    assert made.size == expected
    assert made.size[0] * made.size[1] <= most
    assert made.whole


def test_what_is_no_picture_is_one_line(tmp_path: Path) -> None:
    Image.new("RGB", (1, 5000)).save(tmp_path / "a.png")
    with pytest.raises(CounterlensError, match=r"a\.png: 1x5000 pixels, more than 50 times as long as wide") as caught:
        load_pixels(tmp_path / "a.png", 32)
    assert "\n" not in str(caught.value)
    with pytest.raises(CounterlensError, match="60x300 pixels, and fit native takes sides from 64 on"):
        frame("native", (60, 300), 512, factor=64)


def restored(fit: str, shape: tuple[int, int]) -> tuple[np.ndarray, np.ndarray, tuple[int, int, int, int]]:
    """A picture, the same with a change of +0.2 laid over it, and the part that the image showed."""
    given = picture(*shape)
    made = frame(fit, shape, 32, factor=8, most=32 * 32)
    before = np.asarray(take(given, made), dtype=np.float32) / 255
    out = restore(given, before, before + np.float32(0.2), made)
    left, top, width, height = made.box
    box = (
        max(0, round(left)),
        max(0, round(top)),
        min(shape[0], round(left + width)),
        min(shape[1], round(top + height)),
    )
    return np.asarray(given, dtype=int), np.asarray(out, dtype=int), box


@pytest.mark.parametrize("fit", ["crop", "pad", "squash", "native"])
@pytest.mark.parametrize("shape", SHAPES)
def test_restored_changes_what_was_shown_and_nothing_else(fit: str, shape: tuple[int, int]) -> None:
    given, out, (x0, y0, x1, y1) = restored(fit, shape)
    assert out.shape == given.shape
    difference = out - given
    outside = np.ones(given.shape[:2], dtype=bool)
    outside[y0:y1, x0:x1] = False
    assert (difference[outside] == 0).all()
    assert outside.any() == (fit == "crop")
    # in the middle it is the whole change
    middle = difference[(y0 + y1) // 2, (x0 + x1) // 2]
    assert (np.abs(middle - 51) <= 1).all() or (out[(y0 + y1) // 2, (x0 + x1) // 2] == 255).any()


@pytest.mark.parametrize("fit", ["crop", "pad", "squash"])
def test_restored_keeps_the_picture_outside_a_region(fit: str) -> None:
    given, before = picture(403, 302), np.full((32, 32, 3), 0.3, dtype=np.float32)
    made = frame(fit, given.size, 32)
    small, large = np.zeros((32, 32), dtype=bool), np.zeros((302, 403), dtype=bool)
    small[10:20, 8:24] = True
    large[120:180, 130:251] = True  # no whole pixels of the image
    after = before + np.float32(0.2) * small[..., None]
    for region in (small, large):
        out = restore(given, before, after, made, region)
        changed = (np.asarray(out, dtype=int) != np.asarray(given, dtype=int)).any(axis=-1)
        assert changed.any()
        if region is large:
            assert not changed[~large].any()
        else:
            shown = np.asarray(take(Image.fromarray(np.asarray(out)), made, "box"), dtype=int)
            was = np.asarray(take(given, made, "box"), dtype=int)
            near = small.copy()
            near[9:21, 7:25] = True  # the image's pixels do not begin where the picture's do
            assert (shown == was)[~near].all()


def test_no_seam_where_the_box_ends_inside() -> None:
    given, out, (x0, _, x1, _) = restored("crop", (403, 302))
    profile = (out - given)[150, :, 0]
    assert profile[x0] <= 2
    assert profile[x1 - 1] <= 2
    steps = np.abs(np.diff(profile))
    assert steps.max() <= 51 * 2 / (FEATHER * (x1 - x0)) + 2  # it rises over the feather, not at once
    # at the picture's own border nothing fades
    assert (np.abs((out - given)[[0, -1], 201, 0] - 51) <= 1).all()


def test_restored_files_say_srgb_and_no_place(tmp_path: Path) -> None:
    given = picture(20, 30)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned
    exif.get_ifd(0x8825)[1] = "N"  # GPS
    given.save(tmp_path / "a.jpg", exif=exif)
    upright = open_picture(tmp_path / "a.jpg", "a")
    save_restored(upright, tmp_path / "b.png", {"fit": "crop"})
    with Image.open(tmp_path / "b.png") as back:
        assert back.size == (30, 20)
        assert back.info["srgb"] == 1  # the chunk that says so; 1 is relative colorimetric
        assert "icc_profile" not in back.info
        assert dict(back.getexif()) == {}
        assert np.array_equal(np.asarray(back), np.asarray(upright))
    assert np.array_equal(np.asarray(open_picture(tmp_path / "b.png", "b")), np.asarray(upright))
