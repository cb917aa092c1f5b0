"""Colour profiles written by hand, for pictures in other spaces than sRGB; and what their colours are, without lcms."""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np

D50 = np.array([0.9642, 1.0, 0.8249])
BRADFORD = np.array([[0.8951, 0.2664, -0.1614], [-0.7502, 1.7135, 0.0367], [0.0389, -0.0685, 1.0296]])


@dataclass(frozen=True)
class Space:
    """Primaries and white as x, y; the curve is sRGB's where gamma is None."""

    name: str
    red: tuple[float, float]
    green: tuple[float, float]
    blue: tuple[float, float]
    gamma: float | None = None
    white: tuple[float, float] = (0.3127, 0.3290)

    def to_xyz(self) -> np.ndarray:
        """The matrix from linear RGB to XYZ under D50."""

        def xyz(x: float, y: float) -> np.ndarray:
            return np.array([x / y, 1.0, (1 - x - y) / y])

        primaries = np.stack([xyz(*p) for p in (self.red, self.green, self.blue)], axis=1)
        white = xyz(*self.white)
        matrix = primaries * np.linalg.solve(primaries, white)
        adapt = np.linalg.inv(BRADFORD) @ np.diag((BRADFORD @ D50) / (BRADFORD @ white)) @ BRADFORD
        return adapt @ matrix

    def decode(self, values: np.ndarray) -> np.ndarray:
        """Numbers in [0, 1] to linear light."""
        if self.gamma is not None:
            return values**self.gamma
        return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


SRGB = Space("sRGB", (0.64, 0.33), (0.30, 0.60), (0.15, 0.06))
DISPLAY_P3 = Space("Display P3", (0.680, 0.320), (0.265, 0.690), (0.150, 0.060))
ADOBE_RGB = Space("Adobe RGB (1998)", (0.64, 0.33), (0.21, 0.71), (0.15, 0.06), gamma=563 / 256)


def linear(space: Space, colour: tuple[int, int, int]) -> np.ndarray:
    """A colour of 8 bits in a space, as sRGB of 8 bits."""
    return from_xyz(space.to_xyz() @ space.decode(np.array(colour) / 255))


def from_xyz(xyz: np.ndarray) -> np.ndarray:
    """XYZ under D50 as sRGB of 8 bits."""
    light = np.linalg.solve(SRGB.to_xyz(), xyz).clip(0, 1)
    return 255 * np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)


def from_lab(lightness: float, a: float, b: float) -> np.ndarray:
    """L*a*b* as sRGB of 8 bits."""
    y = (lightness + 16) / 116
    t = np.array([y + a / 500, y, y - b / 200])
    return from_xyz(D50 * np.where(t > 6 / 29, t**3, 3 * (6 / 29) ** 2 * (t - 4 / 29)))


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(values: np.ndarray) -> bytes:
    return b"XYZ \0\0\0\0" + b"".join(map(_fixed, values))


def _curve(gamma: float | None) -> bytes:
    if gamma is None:  # sRGB's own, as a parametric curve
        return b"para\0\0\0\0\0\3\0\0" + b"".join(map(_fixed, (2.4, 1 / 1.055, 0.055 / 1.055, 1 / 12.92, 0.04045)))
    return b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"


def _text(name: str) -> bytes:
    data = name.encode() + b"\0"
    return b"desc\0\0\0\0" + struct.pack(">I", len(data)) + data + bytes(78)


def _profile(kind: bytes, space: bytes, pcs: bytes, tags: dict[bytes, bytes]) -> bytes:
    """ICC 2.4: header, table, data."""
    start, table, data = 128 + 4 + 12 * len(tags), b"", b""
    for name, content in tags.items():
        content += bytes(-len(content) % 4)
        table += name + struct.pack(">II", start + len(data), len(content))
        data += content
    size = start + len(data)
    head = struct.pack(">I4sI4s4s4s12s4s", size, b"lcms", 0x02400000, kind, space, pcs, bytes(12), b"acsp")
    head += bytes(28) + b"".join(map(_fixed, D50)) + bytes(48)
    return head + struct.pack(">I", len(tags)) + table + data


def matrix_profile(space: Space) -> bytes:
    """The profile of a space."""
    matrix = space.to_xyz()
    tags = {b"desc": _text(space.name), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50)}
    tags |= {name: _xyz(matrix[:, i]) for i, name in enumerate((b"rXYZ", b"gXYZ", b"bXYZ"))}
    tags |= dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(space.gamma))
    return _profile(b"mntr", b"RGB ", b"XYZ ", tags)


GREY_GAMMA = 1.8
GREY = _profile(
    b"mntr", b"GRAY", b"XYZ ",
    {b"desc": _text("grey"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50), b"kTRC": _curve(GREY_GAMMA)},
)  # fmt: skip


def cmyk_profile() -> bytes:
    """Inks that darken more than they should: a table from CMYK to Lab of 8 bits, two steps a side."""
    corners = []
    for c in (0, 1):
        for m in (0, 1):
            for y in (0, 1):
                for k in (0, 1):
                    light = 255 * (0.25 if k else 1.0) * (0.7 if c else 1) * (0.65 if m else 1) * (0.95 if y else 1)
                    a = 128 + (-60 if c else 0) + (70 if m else 0)
                    b = 128 + (-40 if c else 0) + (-5 if m else 0) + (85 if y else 0)
                    corners += [round(light), 128 if k else min(a, 255), 128 if k else min(b, 255)]
    ramp = bytes(range(256))
    identity = b"".join(map(_fixed, (1, 0, 0, 0, 1, 0, 0, 0, 1)))
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes(corners) + ramp * 3
    tags = {b"desc": _text("dark inks"), b"cprt": b"text\0\0\0\0none\0", b"wtpt": _xyz(D50), b"A2B0": table}
    return _profile(b"prtr", b"CMYK", b"Lab ", tags)
