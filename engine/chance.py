"""What an angle limit means where directions are random: the share of them that it keeps, by the number of channels."""

from __future__ import annotations

import math

# The published limits were chosen on latents of 3 and 4 channels.
TUNED = 4


def share_kept(angle_deg: float, channels: int) -> float:
    """The share of random directions within an angle of a given one: in [0, 1].

    A direction is drawn evenly from the sphere in `channels` dimensions: the share is the area of a spherical cap,
    I(sin^2 angle; (channels - 1) / 2, 1 / 2) / 2 up to 90 degrees, with I the regularised incomplete beta function.

    Raises:
        ValueError: the angle is not in [0, 180], or there are fewer than 2 channels.

    Source: Li, Concise formulas for the area and volume of a hyperspherical cap (2011).
    """
    if not 0 <= angle_deg <= 180 or channels < 2:
        raise ValueError(f"expected an angle in [0, 180] and at least 2 channels, got {angle_deg} and {channels}")
    if angle_deg > 90:
        return 1 - share_kept(180 - angle_deg, channels)
    angle, a = math.radians(angle_deg), (channels - 1) / 2
    sine, cosine = math.sin(angle) ** 2, math.cos(angle) ** 2
    if sine <= 0.9:  # small shares lose no digits so
        return _beta(sine, a, 0.5) / 2
    return (1 - _beta(cosine, 0.5, a)) / 2


def angle_of(share: float, channels: int) -> float:
    """The inverse of `share_kept`: the angle in degrees that keeps this share, in [0, 180].

    Raises:
        ValueError: the share is not in [0, 1], or there are fewer than 2 channels.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"expected a share in [0, 1], got {share}")
    low, high = 0.0, 180.0
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if share_kept(middle, channels) < share else (low, middle)
    return high


def carried_over(angle_deg: float, channels: int) -> float:
    """The limit that keeps as many random directions of `channels` as this one keeps of `TUNED`, in degrees.

    With up to `TUNED` channels, on which the published limits were chosen, and from 90 degrees on, which keeps half of
    any, it is the same limit.
    """
    if channels <= TUNED or angle_deg >= 90:
        return angle_deg
    return round(angle_of(share_kept(angle_deg, TUNED), channels), 2)


def _beta(x: float, a: float, b: float) -> float:
    """The regularised incomplete beta function for x well below 1, by its power series."""
    if x == 0:
        return 0.0
    term, total, n = 1.0, 1 / a, 0
    while abs(term) > 1e-18 * total:
        n += 1
        term *= (n - b) / n * x
        total += term / (a + n)
    scale = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
    return total * math.exp(scale + a * math.log(x))
