"""The Open Inference Protocol (v2): what a model's metadata asks for; tensors as JSON, or as bytes behind the JSON."""

from __future__ import annotations

import json
import math
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .reading import Refused, Unanswered

Pixels = NDArray[np.uint8]
HEADER = "Inference-Header-Content-Length"  # bytes of JSON, of a body with bytes behind it
MOST = 4096  # images in a request
PICTURES = {"FP32": "<f4", "FP16": "<f2", "FP64": "<f8", "UINT8": "u1"}
DTYPES = {
    **PICTURES, "BOOL": "?", "INT8": "i1", "INT16": "<i2", "INT32": "<i4", "INT64": "<i8", "UINT16": "<u2",
    "UINT32": "<u4", "UINT64": "<u8",
}  # fmt: skip


@dataclass(frozen=True)
class Model:
    """A model that takes images and gives scores.

    Attributes:
        name: of its input. datatype: a key of `PICTURES`. last: channels are the last axis.
        alone: it takes one image without a batch. fixed: images that a request has to hold, None where that is open.
        output: name of the one with a score for each label.
    """

    name: str
    datatype: str
    last: bool
    alone: bool
    fixed: int | None
    output: str

    @classmethod
    def of(cls, about: Any, labels: int) -> Model:
        """From a model's metadata.

        Raises:
            Refused: it does not say one input of images, or one output of scores.
        """
        try:
            (given,) = [i for i in about["inputs"] if i["datatype"] in PICTURES and 3 in i["shape"][-3:]]
            shape = [int(n) for n in given["shape"]]
            ends = {str(o["name"]): int(o["shape"][-1]) for o in about["outputs"]}
            name, datatype = str(given["name"]), str(given["datatype"])
        except (KeyError, TypeError, ValueError, IndexError, OverflowError) as error:
            raise Refused("its metadata says no single input of images; say what is sent") from error
        if len(shape) not in (3, 4):
            raise Refused(f"input {name} has shape {shape}, expected [N, 3, H, W]; say what is sent")
        if len(shape) == 4 and shape[0] > MOST:
            raise Refused(f"input {name} has a batch of {shape[0]}, more than {MOST}; say what is sent")
        outputs = [o for o, n in ends.items() if n == labels] or [o for o, n in ends.items() if n == -1]
        if len(outputs) != 1:
            raise Refused(f"{len(outputs)} of its outputs may hold {labels} scores; say which")
        alone = len(shape) == 3  # Triton's models without a batch take one image as it is
        fixed = 1 if alone else shape[0] if shape[0] > 0 else None
        return cls(name, datatype, shape[-1] == 3, alone, fixed, outputs[0])

    @property
    def floats(self) -> bool:
        """Whether it takes floats, and not 8 bits."""
        return self.datatype != "UINT8"

    def array(
        self,
        images: NDArray[Any],  # [n, H, W, 3], floats or 8 bits as it takes them
    ) -> NDArray[Any]:
        """Images as it takes them; a fixed batch is filled up."""
        if self.fixed:
            images = np.concatenate([images, images[:1].repeat(self.fixed - len(images), 0)])
        array = images if self.last else images.transpose(0, 3, 1, 2)
        return np.ascontiguousarray(array[0] if self.alone else array, PICTURES[self.datatype])

    def request(self, array: NDArray[Any]) -> dict[str, Any]:
        """A request as JSON."""
        data = array.ravel().tolist()
        data = [round(x, 7) for x in data] if self.floats else data
        tensor = {"name": self.name, "datatype": self.datatype, "shape": list(array.shape), "data": data}
        return {"inputs": [tensor], "outputs": [{"name": self.output}]}

    def binary_request(self, array: NDArray[Any]) -> tuple[bytes, int]:
        """A request with bytes behind its JSON, and how long that is; scores are wanted likewise."""
        tensor: dict[str, Any] = {"name": self.name, "datatype": self.datatype, "shape": list(array.shape)}
        tensor["parameters"] = {"binary_data_size": array.nbytes}
        wanted = {"name": self.output, "parameters": {"binary_data": True}}
        head = json.dumps({"inputs": [tensor], "outputs": [wanted]}).encode()
        return head + array.tobytes(), len(head)

    def take(self, said: Any, count: int) -> list[Any]:
        """The answers in a response, one for each of so many images.

        Raises:
            Unanswered: there is no such output, or it is none of scores.
        """
        try:
            (output,) = [o for o in said["outputs"] if o["name"] == self.output]
            table = np.asarray(output["data"], dtype=object).reshape((1, -1) if self.alone else output["shape"])
            if not table.size:  # of nothing there may be any number of rows
                raise ValueError("it is empty")
            rows = list(table)
        except (KeyError, TypeError, ValueError) as error:
            raise Unanswered(f"answers without an output {self.output!r} of scores") from error
        rows = rows[:count] if self.fixed == len(rows) else rows
        return [row.tolist() if hasattr(row, "tolist") else row for row in rows]


def read_response(body: bytes, length: str | None) -> Any:
    """The JSON of a response, tensors that stand behind it put in as `data`.

    Args:
        length: what the response's header says of its JSON; None where all of it is.

    Raises:
        Unanswered: lengths are no numbers, or not those of what is there. ValueError: it is no JSON.
    """
    if length is None:
        return json.loads(body.decode("utf-8", errors="replace"))
    if not (length.isascii() and length.isdecimal() and len(length) < 12 and 0 < int(length) <= len(body)):
        raise Unanswered(f"answers with {len(body)} bytes, {length[:20]!r} of them JSON by its {HEADER}")
    said, rest = json.loads(body[: int(length)].decode("utf-8", errors="replace")), body[int(length) :]
    outputs = said.get("outputs") if isinstance(said, Mapping) else None
    for output in outputs if isinstance(outputs, list) else []:
        parameters = output.get("parameters") if isinstance(output, dict) else None
        if not isinstance(parameters, Mapping) or (size := parameters.get("binary_data_size")) is None:
            continue
        name = str(output.get("name"))[:40]
        if not isinstance(size, int) or not 0 <= size <= len(rest):
            raise Unanswered(f"answers with {len(rest)} bytes of {name!r}, {str(size)[:20]} were said")
        output["data"], rest = _values(output, name, rest[:size]), rest[size:]
    if rest:
        raise Unanswered(f"answers with {len(rest)} bytes behind its tensors")
    return said


def _values(output: Mapping[str, Any], name: str, blob: bytes) -> list[Any]:
    """A tensor's values, of bytes."""
    kind, shape = str(output.get("datatype"))[:20], output.get("shape")
    if not isinstance(shape, list) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise Unanswered(f"answers with {name!r} of shape {str(shape)[:40]}")
    if kind == "BYTES":
        texts, at = [], 0
        while at + 4 <= len(blob):
            end = at + 4 + struct.unpack_from("<I", blob, at)[0]
            texts.append(blob[at + 4 : end].decode("utf-8", errors="replace"))
            at = end
        if at != len(blob) or len(texts) != math.prod(shape):
            raise Unanswered(f"answers with {len(blob)} bytes of {name!r}, which are no {math.prod(shape)} texts")
        return texts
    if kind not in DTYPES:
        raise Unanswered(f"answers with {name!r} of {kind}, which is not read")
    if (needed := math.prod(shape) * np.dtype(DTYPES[kind]).itemsize) != len(blob):
        raise Unanswered(f"answers with {len(blob)} bytes of {name!r}, {kind} {shape} are {needed}")
    values: list[Any] = np.frombuffer(blob, DTYPES[kind]).tolist()
    return values
