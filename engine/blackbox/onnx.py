"""A classifier in an ONNX file, run by ONNX Runtime: what its input wants is read from the file."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from counterlens.export.errors import onnxruntime_errors
from counterlens.export.hashing import file_digest

from ..errors import CounterlensError, UsageError, install_hint
from ..models.preprocessing import Preprocessing
from .options import BoxOptions, numbers
from .reading import Refused

DTYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(uint8)": np.uint8}


class OnnxFile:
    """An ONNX file with one image input, [N, 3, H, W] or [N, H, W, 3], of floats (pixels / 255, normalised) or uint8.

    Images are resized to a size that the file fixes, as Pillow does it. The output is the one with a score for each
    label.

    Raises:
        UsageError: there is no such file, or its input is none for images. CounterlensError: it cannot be opened.
    """

    remote = False

    def __init__(self, name: str, labels: Sequence[str], size: int, options: BoxOptions) -> None:
        path = Path(name)
        if not path.is_file():
            raise UsageError(f"classifier: there is no file {path}")
        try:
            import onnxruntime
        except ImportError as error:
            raise CounterlensError(f"onnxruntime cannot be imported ({error}); {install_hint('cpu')}") from error
        self.name, self.concurrency = name, options.concurrency or 1
        settings = onnxruntime.SessionOptions()
        settings.intra_op_num_threads = torch.get_num_threads()
        settings.log_severity_level = 3
        try:
            self._session = onnxruntime.InferenceSession(str(path), settings, providers=["CPUExecutionProvider"])
        except onnxruntime_errors() as error:
            raise CounterlensError(
                f"classifier: {path}: ONNX Runtime cannot open it ({str(error).splitlines()[0]})"
            ) from error
        inputs = self._session.get_inputs()
        given = [i for i in inputs if len(i.shape) == 4 and i.type in DTYPES]
        if len(inputs) != 1 or not given:
            said = "; ".join(f"{i.name} {i.type} {i.shape}" for i in inputs)
            raise UsageError(
                f"classifier: {path}: expected one input of images [N, 3, H, W] or [N, H, W, 3], got {said}"
            )
        self._input = given[0]
        shape, self._dtype = self._input.shape, DTYPES[self._input.type]
        self._last = shape[3] == 3 and shape[1] != 3
        height, width = (shape[1], shape[2]) if self._last else (shape[2], shape[3])
        wanted = tuple(n if isinstance(n, int) and n > 0 else size for n in (height, width))
        if self._dtype == np.uint8 and (options.mean or options.std):
            raise UsageError(f"classifier_mean: {path} takes pixels of 8 bits as they are")
        mean, std = numbers("mean", options.mean, 0.0), numbers("std", options.std, 1.0)
        self._prepare = Preprocessing(size, resize=(wanted[0], wanted[1]), mean=mean, std=std)
        batch = shape[0]
        self._fixed = batch if isinstance(batch, int) and batch > 0 else None
        self.batch = options.batch or 64
        self._output = self._choose(options.scores, len(labels), path)
        self.identity: dict[str, Any] = {
            "onnx": file_digest(path), "mean": mean, "std": std, "scores": self._output,
        }  # fmt: skip

    def _choose(self, wanted: str | None, labels: int, path: Path) -> int:
        outputs = self._session.get_outputs()
        names = [o.name for o in outputs]
        if wanted is not None:
            if wanted not in names:
                raise UsageError(f"classifier_scores: {path} has no output {wanted!r}; it has {', '.join(names)}")
            return names.index(wanted)
        scored = [i for i, o in enumerate(outputs) if o.shape and o.shape[-1] == labels]
        return scored[0] if scored else 0

    @torch.no_grad()
    def ask(self, images: NDArray[np.uint8]) -> Any:
        """Its output for each image."""
        x = self._prepare(torch.from_numpy(images).permute(0, 3, 1, 2).float() / 255)
        x = x.permute(0, 2, 3, 1) if self._last else x
        if self._dtype == np.uint8:
            x = (x.clamp(0, 1) * 255).round()
        array = np.ascontiguousarray(x.numpy()).astype(self._dtype)
        step = self._fixed or len(array)
        out = []
        try:
            for start in range(0, len(array), step):
                some = array[start : start + step]
                padded = np.concatenate([some, some[:1].repeat(step - len(some), 0)])
                out.append(self._session.run(None, {self._input.name: padded})[self._output][: len(some)])
        except onnxruntime_errors() as error:
            raise Refused(f"fails: {str(error).splitlines()[0][:200]}") from error
        return np.concatenate(out)

    def hide(self, text: str) -> str:
        """As it is."""
        return text
