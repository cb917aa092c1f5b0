"""How a black box is asked: declared once, for Python and the command line."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, Field

from ..config import Options
from ..errors import UsageError

Output = Literal["probabilities", "logits", "independent"]


class BoxOptions(Options):
    """How a classifier that can only be called is asked, and how often."""

    model_config = ConfigDict(title="Black boxes: --classifier model.onnx, python:module:function, https://...")

    output: Output = Field(
        "probabilities", description="What it answers: probabilities, logits, or independent (no sum of 1)."
    )
    convert: Literal["auto", "always", "never"] = Field(
        "auto",
        description="An ONNX file: differentiated where that is shown to be right (auto), or else an error (always), "
        "or only called (never).",
    )
    scores: str | None = Field(None, description="An ONNX file's output with a score for each label, of several.")
    template: Path | None = Field(
        None, description="JSON file: the request, with $png, $pixels or $floats for an image, and the answer's path."
    )
    header: str | None = Field(
        None, description="'Authorization: Bearer $TOKEN': of variables alone; several with ; between."
    )
    mean: str | None = Field(None, description="Of pixels in [0, 1], 0.485,0.456,0.406: for inputs of floats.")
    std: str | None = Field(None, description="Likewise.")
    timeout: float = Field(30.0, gt=0, description="Seconds for one request.")
    retries: int = Field(5, ge=0, le=100, description="Requests again after one that failed.")
    rate: float | None = Field(None, gt=0, description="Requests a second, at most.")
    concurrency: int | None = Field(None, ge=1, le=64, description="Requests at once; 4 of an endpoint, else 1.")
    batch: int | None = Field(None, ge=1, le=4096, description="Images in one request.")
    max_queries: int | None = Field(None, ge=1, description="Images that may be sent, in all sessions of --out.")
    binary: bool = Field(
        False, description="Open Inference Protocol: tensors as bytes, of a server with that extension."
    )
    insecure: bool = Field(False, description="Allow http:// to other machines.")


def numbers(name: str, text: str | None, default: float) -> list[float]:
    """Three numbers of an option, one for each channel."""
    if text is None:
        return [default] * 3
    try:
        values = [float(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"classifier_{name}: expected three numbers such as 0.5,0.5,0.5, got {text!r}") from error
    if len(values) != 3 or not all(map(math.isfinite, values)) or (name == "std" and min(values) <= 0):
        raise UsageError(f"classifier_{name}: expected three numbers such as 0.5,0.5,0.5, got {text!r}")
    return values


def normalising(options: BoxOptions, preprocessing: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """What stands before an ONNX file, mean and std of the options in it; None where nobody says anything."""
    if not options.mean and not options.std:
        return preprocessing
    own = {"mean": numbers("mean", options.mean, 0.0), "std": numbers("std", options.std, 1.0)}
    return {**(preprocessing or {}), **own}
