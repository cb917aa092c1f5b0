"""Images that others made: every common kind works, every broken one gets one clear line."""

from __future__ import annotations

import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images import as_saved, load_image, make_folder, save_png

ORANGE = (255, 128, 0)


def test_rgb_comes_back_exactly(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    image = load_image(tmp_path / "a.png", 8)
    torch.testing.assert_close(image, torch.tensor(pixels).permute(2, 0, 1) / 255)


def test_saved_png_is_as_saved(tmp_path: Path) -> None:
    image = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(0))
    save_png(image, tmp_path / "a.png")
    assert torch.equal(load_image(tmp_path / "a.png", 8), as_saved(image))
    assert [p.name for p in tmp_path.iterdir()] == ["a.png"]


@pytest.mark.parametrize("mode", ["RGBA", "P", "CMYK"])
def test_colour_modes(tmp_path: Path, mode: str) -> None:
    path = tmp_path / ("a.jpg" if mode == "CMYK" else "a.png")
    image = Image.new("RGB", (8, 8), ORANGE)
    image = image.quantize(4) if mode == "P" else image.convert(mode)
    image.save(path, **({"quality": 100} if mode == "CMYK" else {}))
    torch.testing.assert_close(
        load_image(path, 8), torch.tensor(ORANGE).reshape(3, 1, 1).expand(3, 8, 8) / 255, atol=0.02, rtol=0
    )


def test_transparency_lies_over_white(tmp_path: Path) -> None:
    Image.new("RGBA", (8, 8), (0, 0, 0, 0)).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 8).min() == 1
    Image.new("LA", (8, 8), (0, 128)).save(tmp_path / "b.png")
    torch.testing.assert_close(load_image(tmp_path / "b.png", 8), torch.full((3, 8, 8), 0.498), atol=0.005, rtol=0)


def test_grey_8_and_16_bits(tmp_path: Path) -> None:
    Image.new("L", (8, 8), 100).save(tmp_path / "a.png")
    torch.testing.assert_close(load_image(tmp_path / "a.png", 8), torch.full((3, 8, 8), 100 / 255))
    Image.fromarray(np.full((8, 8), 40000, dtype=np.uint16)).save(tmp_path / "b.png")
    torch.testing.assert_close(
        load_image(tmp_path / "b.png", 8), torch.full((3, 8, 8), 40000 / 65535), atol=2e-3, rtol=0
    )


def test_exif_rotation_is_applied(tmp_path: Path) -> None:
    image = Image.new("RGB", (8, 8))
    image.paste((255, 255, 255), (0, 0, 8, 4))  # white above
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise: white on the right
    image.save(tmp_path / "a.png", exif=exif)
    loaded = load_image(tmp_path / "a.png", 8)
    assert loaded[:, :, :4].max() == 0
    assert loaded[:, :, 4:].min() == 1


def test_other_sizes_are_resized(tmp_path: Path) -> None:
    Image.new("RGB", (100, 50), ORANGE).save(tmp_path / "a.png")
    assert load_image(tmp_path / "a.png", 32).shape == (3, 32, 32)


def _png_header(width: int, height: int) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


@pytest.mark.parametrize("side", [8001, 40000])
def test_bombs_are_refused_before_decoding(tmp_path: Path, side: int) -> None:
    (tmp_path / "bomb.png").write_bytes(_png_header(side, side))
    with pytest.raises(CounterlensError, match=r"bomb\.png: .*64 megapixels"):
        load_image(tmp_path / "bomb.png", 32)


def test_unreadable_files_are_named(tmp_path: Path) -> None:
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.png").write_text("not an image")
    whole = tmp_path / "whole.png"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    (tmp_path / "cut.png").write_bytes(whole.read_bytes()[:2000])
    (tmp_path / "broken.png").write_bytes(_png_header(64, 64))
    (tmp_path / "folder.png").mkdir()
    Image.fromarray(np.full((8, 8), 0.5, dtype=np.float32)).save(tmp_path / "float.tiff")
    for name in ("empty.png", "text.png", "cut.png", "broken.png", "folder.png", "float.tiff", "absent.png"):
        with pytest.raises(CounterlensError, match=name.replace(".", r"\.")) as caught:
            load_image(tmp_path / name, 32)
        assert "\n" not in str(caught.value)


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"out: .*file"):
        make_folder(tmp_path / "file")
    with pytest.raises(UsageError, match=r"out: .*deeper"):
        make_folder(tmp_path / "file" / "deeper")
    with pytest.raises(CounterlensError, match=r"gone/a\.png"):
        save_png(torch.zeros(3, 4, 4), tmp_path / "gone" / "a.png")
