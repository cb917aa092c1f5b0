"""Images that others made: every common kind works, every broken one gets one clear line."""

from __future__ import annotations

import os
import socket
import struct
import warnings
import zlib
from concurrent.futures import ThreadPoolExecutor
from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.images.files import as_saved, load_image, make_folder, save_png

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
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return _png([(b"IHDR", header), (b"IDAT", zlib.compress(b"\0")), (b"IEND", b"")])


def _png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    )


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
    Image.fromarray(np.full((8, 8), 200, dtype=np.float32)).save(tmp_path / "float.tiff")
    for name in ("empty.png", "text.png", "cut.png", "broken.png", "folder.png", "float.tiff", "absent.png"):
        with pytest.raises(CounterlensError, match=name.replace(".", r"\.")) as caught:
            load_image(tmp_path / name, 32)
        assert "\n" not in str(caught.value)


def _tiff(values: np.ndarray, *, order: str = "<", white_is_zero: bool = False) -> bytes:
    """An uncompressed grey TIFF of any type of number."""
    kind = {"u": 1, "i": 2, "f": 3}[values.dtype.kind]
    data = values.astype(values.dtype.newbyteorder(order)).tobytes()
    height, width = values.shape
    bits = values.dtype.itemsize * 8
    entries = [(256, width), (257, height), (258, bits), (259, 1), (262, 0 if white_is_zero else 1), (273, 8), (277, 1),
               (278, height), (279, len(data)), (339, kind)]  # fmt: skip
    table = struct.pack(f"{order}H", len(entries)) + b"".join(
        struct.pack(f"{order}HHII", tag, 4, 1, value) for tag, value in entries
    )
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return mark + struct.pack(f"{order}I", 8 + len(data)) + data + table + bytes(4)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("kind", "top"),
    [("u1", 255), ("u2", 65535), ("i2", 32767), ("u4", 2**32 - 1), ("i4", 2**31 - 1), ("f4", 1.0)],
)
def test_every_type_of_pixel_by_its_range(kind: str, top: float, order: str) -> None:
    if kind == "u4" and order == ">":
        pytest.skip("Pillow does not open them")
    values = (np.linspace(0, 1, 16).reshape(4, 4) * top).astype(kind)
    expected = torch.linspace(0, 1, 16).reshape(4, 4).expand(3, 4, 4)
    image = load_image(BytesIO(_tiff(values, order=order)), 4)
    torch.testing.assert_close(image, expected, atol=0.5 / 255 + 1e-3, rtol=0)
    if kind in ("u1", "u2", "f4") and not (kind == "u2" and order == ">"):
        image = load_image(BytesIO(_tiff(values, order=order, white_is_zero=True)), 4)
        torch.testing.assert_close(image, 1 - expected, atol=0.5 / 255 + 1e-3, rtol=0)


@pytest.mark.parametrize(
    ("kind", "low", "high"),
    [("u2", 0, 255), ("u2", 7, 3800), ("u2", 0, 4095), ("i2", -5, 3000), ("u4", 0, 65535), ("i4", 0, 255),
     ("f4", 0, 255), ("f4", -1, 1), ("f4", 0, 0.001), ("f4", 0, float("nan"))],
)  # fmt: skip
def test_pixels_of_another_range_are_refused_and_never_black(kind: str, low: float, high: float) -> None:
    values = np.full((4, 4), low, dtype=kind)
    values[0, 0] = high
    with pytest.raises(CounterlensError, match=r"^scan: .*(save it with 8 bits|NaN)"):
        load_image(BytesIO(_tiff(values)), 4, "scan")


def test_colours_of_16_bits_that_hold_fewer() -> None:
    for factor, fine in ((256, True), (1, False)):
        rows = (np.arange(48).reshape(4, 12) * 5 * factor).astype(">u2")
        raw = b"".join(b"\0" + row.tobytes() for row in rows)
        header = struct.pack(">IIBBBBB", 4, 4, 16, 2, 0, 0, 0)
        data = _png([(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")])
        if fine:
            assert load_image(BytesIO(data), 4).max() == 47 * 5 / 255
        else:
            with pytest.raises(CounterlensError, match="scan: 16-bit pixels, all nearly black"):
                load_image(BytesIO(data), 4, "scan")


def test_a_picture_under_full_transparency_is_not_white(tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 4), dtype=np.uint8)
    pixels[..., 3] = 0
    for name in ("a.png", "a.tga"):
        Image.fromarray(pixels).save(tmp_path / name)
        with pytest.raises(CounterlensError, match="every pixel is transparent"):
            load_image(tmp_path / name, 8)


def _exif(entries: list[tuple[int, int, int, bytes]]) -> bytes:
    table, data, at = b"", b"", 8 + 2 + 12 * len(entries) + 4
    for tag, kind, count, value in entries:
        if len(value) <= 4:
            table += struct.pack("<HHI", tag, kind, count) + value.ljust(4, b"\0")
        else:
            table += struct.pack("<HHII", tag, kind, count, at + len(data))
            data += value
    return b"Exif\0\0II*\0" + struct.pack("<IH", 8, len(entries)) + table + bytes(4) + data


@pytest.mark.parametrize(
    "odd",
    [(282, 2, 8, b"72 dpi \0"), (282, 5, 1, struct.pack("<II", 72, 0)), (282, 7, 3, b"abc"), (271, 3, 2, b"\1\0\2\0"),
     (34665, 4, 1, b"\xff\xff\xff\xff"), (37500, 7, 9, b"maker not")],
)  # fmt: skip
def test_exif_with_broken_entries_is_turned_all_the_same(odd: tuple[int, int, int, bytes]) -> None:
    image = Image.new("RGB", (16, 8))
    image.paste((255, 255, 255), (0, 0, 16, 4))  # white above, and turned: on the right
    buffer = BytesIO()
    image.save(buffer, "JPEG", quality=100, exif=_exif([(274, 3, 1, b"\6\0"), odd]))
    loaded = load_image(buffer, 8)
    assert loaded[:, :, :3].max() < 0.1
    assert loaded[:, :, 5:].min() > 0.9


@pytest.mark.parametrize(
    "error",
    [TypeError("x"), RuntimeError("two\nlines"), struct.error("x"), SyntaxError("x"), OverflowError(), KeyError(3),
     ZeroDivisionError("x"), MemoryError(), RecursionError("x"), AssertionError(),
     UnicodeDecodeError("a", b"b", 0, 1, "c"), Image.DecompressionBombError("x")],
)  # fmt: skip
def test_whatever_a_decoder_raises_is_the_files_error(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    buffer = BytesIO()
    Image.new("RGB", (8, 8)).save(buffer, "PNG")
    monkeypatch.setattr("PIL.PngImagePlugin.PngImageFile.load_prepare", broken)
    with pytest.raises(CounterlensError, match=r"^a\.png: ") as caught:
        load_image(buffer, 8, "a.png")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "ending", ["png", "jpg", "webp", "tif", "gif", "bmp", "ppm", "avif", "jp2", "tga", "ico", "pcx"]
)
def test_files_that_were_cut_are_reported_in_every_format(ending: str, tmp_path: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (48, 48, 3), dtype=np.uint8)
    whole = tmp_path / f"whole.{ending}"
    Image.fromarray(pixels).save(whole)
    assert load_image(whole, 48).std() > 0.05
    for share in (0.02, 0.4, 0.7, 0.95):
        cut = BytesIO(whole.read_bytes()[: int(whole.stat().st_size * share)])
        with pytest.raises(CounterlensError, match=r"^cut: "):
            load_image(cut, 48, "cut")


def test_what_is_no_file_is_never_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "self.png").symlink_to(tmp_path / "self.png")
    (tmp_path / "link.png").symlink_to(tmp_path / "pipe.png")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
        for path, words in [
            (tmp_path / "pipe.png", "a named pipe"), (tmp_path / "link.png", "a named pipe"),
            (tmp_path / "socket.png", "a socket"), (Path("/dev/zero"), "a device"), (tmp_path, "a folder"),
            (tmp_path / "self.png", "symbolic links"), (tmp_path / ("x" * 300), "name too long"),
            (tmp_path / "nul\0.png", "null"),
        ]:  # fmt: skip
            with pytest.raises(CounterlensError, match=f"(?i){words}"):
                load_image(path, 8)


def test_names_of_what_is_not_read(tmp_path: Path) -> None:
    for data, words in [
        (b"\0\0\0\x18ftypheic" + bytes(40), r"HEIC; save it as JPEG"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "Git LFS"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n", "not an image"),  # would start ghostscript
    ]:
        with pytest.raises(CounterlensError, match=words):
            load_image(BytesIO(data), 8)
        (tmp_path / "a").write_bytes(data)
        with pytest.raises(CounterlensError, match=words):
            load_image(tmp_path / "a", 8)


@pytest.mark.parametrize("ending", ["gif", "webp", "tif", "png", "avif"])
def test_the_first_of_several_pictures_is_read_and_said(ending: str, tmp_path: Path) -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue", "lime")]
    frames[0].save(tmp_path / f"a.{ending}", save_all=True, append_images=frames[1:])
    with pytest.warns(UserWarning, match=rf"a\.{ending}: 3 pictures; the first is read"):
        red = load_image(tmp_path / f"a.{ending}", 8)
    assert red[0].min() > 0.9
    assert red[1:].max() < 0.1
    frames[0].save(tmp_path / f"one.{ending}")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_image(tmp_path / f"one.{ending}", 8)


def test_text_that_inflates_is_bounded() -> None:
    text = b"comment\0\0" + zlib.compress(bytes(80_000_000), 1)
    header = struct.pack(">IIBBBBB", 1, 1, 8, 0, 0, 0, 0)
    data = _png([(b"IHDR", header), (b"zTXt", text), (b"IDAT", zlib.compress(b"\0\0")), (b"IEND", b"")])
    with pytest.raises(CounterlensError, match="too large"):
        load_image(BytesIO(data), 8)


def test_output_folder_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match=r"out: .*file"):
        make_folder(tmp_path / "file")
    with pytest.raises(UsageError, match=r"out: .*deeper"):
        make_folder(tmp_path / "file" / "deeper")
    with pytest.raises(CounterlensError, match=r"gone/a\.png"):
        save_png(torch.zeros(3, 4, 4), tmp_path / "gone" / "a.png")


def test_many_may_make_one_folder_at_the_same_time(tmp_path: Path) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(make_folder, [tmp_path / "new"] * 400)) == {tmp_path / "new"}
    assert not [*(tmp_path / "new").iterdir()]
