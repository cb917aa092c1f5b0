"""Networks of `metrics.encoders` from ONNX files: data, where TorchScript and pickles would be code."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from counterlens.export.errors import ExportError

from ..errors import CounterlensError, UsageError
from ..metrics.encoders import ENCODERS, Encoder
from . import onnxruntime


def open_encoder(name: str, path: Path, device: torch.device | None = None) -> Callable[..., Tensor]:
    """A function from images [B, 3, H, W] in [0, 1], of as many batches as the network takes, to what it returns.

    Args:
        name: in `metrics.encoders.ENCODERS`; its convention is laid before the file's network.
        path: of an ONNX file that takes float32 with an open batch; its first output counts.
        device: a CUDA device is used where this onnxruntime can; else the CPU.

    Raises:
        UsageError: there is no such encoder, or the file is none or of another form. CounterlensError: ONNX Runtime is
            missing or cannot open it.
    """
    if name not in ENCODERS:
        raise UsageError(f"encoder: expected one of {', '.join(ENCODERS)}, got {name!r}")
    encoder = ENCODERS[name]
    if path.suffix.lower() != ".onnx":
        raise UsageError(
            f"encoder {name}: {path} is no .onnx file; a checkpoint is exported once, see the page "
            '"Compare with the papers\' tables"'
        )
    if not path.is_file():
        raise UsageError(f"encoder {name}: {path} is no file")
    there = device or torch.device("cpu")
    if there.type == "cuda" and onnxruntime.missing("cuda"):
        there = torch.device("cpu")
    try:
        run = onnxruntime.load(path, provider=onnxruntime.provider_for(there))
    except ExportError as error:
        raise CounterlensError(f"encoder {name}: {error}") from error
    return lambda *batches: _through(encoder, path, run, there, batches)


def _through(
    encoder: Encoder,
    path: Path,
    run: Callable[..., tuple[Tensor, ...]],
    device: torch.device,
    batches: tuple[Tensor, ...],
) -> Tensor:
    given: list[Any] = [encoder.prepare(images.float().to(device)) for images in batches]
    try:
        with torch.no_grad():
            out = run(*given)
    except onnxruntime.failures() as error:
        shapes = ", ".join(str(list(images.shape)) for images in given)
        why = " ".join(str(error).split())[:200]
        raise UsageError(f"encoder {encoder.name}: {path} does not take {shapes} of float32 ({why})") from error
    return out[0]
