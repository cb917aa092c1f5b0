"""ONNX files of others: read without trusting them, their picture input and answer found, run by ONNX Runtime.

A file is bounded before anything of it is allocated: weights hold as many bytes as their shapes say, and external data
lies in the file's own folder. Operators of one's own (`.so` libraries) are never loaded. A session would have opened
all of that before it could be asked, so package onnx is needed, also by who only asks a file.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from counterlens.export.errors import onnxruntime_errors

from ..errors import CounterlensError, UsageError, install_hint

LARGEST = 2**31 - 1  # bytes that protobuf can hold
LONGEST = 8192  # pixels of a side
MOST = 2**30  # bytes of pixels in a batch that the file fixes
DYNAMIC_BATCH = 64  # images in one run, where the file leaves it open
# Of pictures; what else an input may be is refused.
PIXELS = {"float32": np.float32, "float16": np.float16, "float64": np.float64, "uint8": np.uint8}
GREY = (0.299, 0.587, 0.114)  # of RGB, as Pillow's "L"
Answer = Literal["scores", "maps", "labels"]


@dataclass(frozen=True)
class Picture:
    """How a file takes pictures.

    Attributes:
        name: of the input. dtype: a key of `PIXELS`. last: channels are the last axis. channels: 3, or 1 (grey).
        size: height and width; None where the file leaves them open. batch: None where it is open.
    """

    name: str
    dtype: str
    last: bool
    channels: int
    size: tuple[int, int] | None
    batch: int | None


@dataclass(frozen=True)
class OnnxFile:
    """A file that was read and checked; `model` without its external data, see `tensor`.

    Attributes:
        output: name of the one that answers. answer: it holds scores of each label, maps of label to score (as
            scikit-learn's are exported), or labels alone.
        data: the files beside it that hold weights.
    """

    path: Path
    model: Any
    picture: Picture
    output: str
    answer: Answer
    metadata: Mapping[str, str]
    data: tuple[Path, ...]

    def tensor(self, proto: Any) -> np.ndarray:
        """The values of one of its tensors."""
        import onnx

        if proto.data_location != onnx.TensorProto.EXTERNAL:
            return np.asarray(onnx.numpy_helper.to_array(proto))
        file, offset, length = _external(self.path, proto)
        if proto.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4):  # two in a byte
            raw = np.fromfile(file, np.uint8, length, offset=offset).tobytes()
            own = onnx.TensorProto(data_type=proto.data_type, dims=proto.dims, raw_data=raw)
            return np.asarray(onnx.numpy_helper.to_array(own))
        kind = onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)
        count = math.prod(proto.dims)
        return np.fromfile(file, kind, count, offset=offset).reshape(list(proto.dims))


def read_onnx(path: str | Path, *, output: str | None = None, labels: int | None = None) -> OnnxFile:
    """Read a classifier's file and check it.

    Args:
        path: of the file.
        output: name of the output that answers, where there are several.
        labels: how many there are, where that is known: it tells outputs apart.

    Raises:
        UsageError: there is no such file, it takes no pictures, or there are several outputs that could answer.
        CounterlensError: the file is corrupt or reaches outside its folder, or a package is missing.
    """
    try:
        import onnx
        from google.protobuf.message import DecodeError
    except ImportError as error:
        raise CounterlensError(f"classifier: ONNX files need onnx and onnxruntime; {install_hint('cpu')}") from error
    path = Path(path).expanduser()
    if not path.is_file():
        raise UsageError(f"classifier: {path}: no such file")
    if path.stat().st_size > LARGEST:
        raise CounterlensError(f"classifier: {path}: over 2 GB, which no ONNX file without external data can be")
    try:
        model = onnx.load(path, load_external_data=False)
    except (DecodeError, OSError, ValueError) as error:
        raise CounterlensError(f"classifier: {path}: not an ONNX file ({_line(error)})") from error
    if not model.graph.node or not model.graph.output:
        raise CounterlensError(f"classifier: {path}: not an ONNX file, or one without a graph")
    for proto in tensors(model):
        _check_tensor(path, proto)
    _check_order(path, model.graph)
    metadata = {entry.key: entry.value for entry in model.metadata_props}
    outside = [t for t in tensors(model) if t.data_location == onnx.TensorProto.EXTERNAL]
    data = tuple(sorted({_external(path, proto)[0] for proto in outside}))
    picture, (name, answer) = _picture(path, model.graph), _answer(path, model.graph, output, labels)
    return OnnxFile(path, model, picture, name, answer, metadata, data)


def tensors(model: Any) -> Iterator[Any]:
    """Every tensor in a model: weights, constants and those of subgraphs and functions."""
    pending: list[Any] = [model.graph, *model.functions]
    while pending:
        part = pending.pop()
        yield from getattr(part, "initializer", ())
        for sparse in getattr(part, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in part.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                pending += [attribute.g] if attribute.HasField("g") else []
                pending += attribute.graphs


def _check_order(path: Path, graph: Any) -> None:
    words = [word for n in graph.node for word in (n.name, n.op_type, n.domain, *n.input, *n.output)]
    words += [attribute.name for node in graph.node for attribute in node.attribute]
    words += [part.name for part in (*graph.input, *graph.output, *graph.initializer)]
    if not all(isinstance(word, str) for word in words):  # protobuf leaves as bytes what is no UTF-8
        raise CounterlensError(f"classifier: {path}: not a valid ONNX file: a name in it is no text")
    made = {"", *(v.name for v in graph.input), *(t.name for t in graph.initializer)}
    made |= {sparse.values.name for sparse in graph.sparse_initializer}
    for node in graph.node:
        if missing := [name for name in node.input if name not in made]:
            raise CounterlensError(f"classifier: {path}: not a valid ONNX file: nothing makes {missing[0]!r}")
        made.update(node.output)
    if missing := [value.name for value in graph.output if value.name not in made]:
        raise CounterlensError(f"classifier: {path}: not a valid ONNX file: nothing makes its output {missing[0]!r}")


def _check_tensor(path: Path, proto: Any) -> None:
    import onnx

    where = f"classifier: {path}: weight {proto.name!r}"
    if min(proto.dims, default=1) < 0:
        raise CounterlensError(f"{where} has a negative size")
    if proto.data_type == onnx.TensorProto.STRING:
        return
    try:
        if proto.data_type == onnx.TensorProto.UNDEFINED:
            raise KeyError(proto.data_type)
        width = np.dtype(onnx.helper.tensor_dtype_to_np_dtype(proto.data_type)).itemsize
    except (KeyError, TypeError) as error:
        raise CounterlensError(f"{where} is of an unknown type ({proto.data_type})") from error
    elements = math.prod(proto.dims)
    if proto.data_location == onnx.TensorProto.EXTERNAL:
        _, _, held = _external(path, proto)
    elif proto.HasField("raw_data"):
        held = len(proto.raw_data)
    else:
        return _check_listed(where, proto, elements)
    packed = proto.data_type in (onnx.TensorProto.INT4, onnx.TensorProto.UINT4)
    if held != ((elements + 1) // 2 if packed else elements * width):
        raise CounterlensError(f"{where} {list(proto.dims)} would be {elements * width} bytes, the file holds {held}")


def _check_listed(where: str, proto: Any, elements: int) -> None:
    """Values that are listed one by one: never fewer than half a value for each element (four bits)."""
    listed = sum(len(getattr(proto, f)) for f in ("float_data", "int32_data", "int64_data", "double_data",
                                                    "uint64_data"))  # fmt: skip
    if listed < elements / 2:
        raise CounterlensError(f"{where} {list(proto.dims)} has {elements} elements, the file holds {listed}")


def _external(path: Path, proto: Any) -> tuple[Path, int, int]:
    """File, offset and bytes of a tensor outside the model's file.

    Raises:
        CounterlensError: it lies outside the model's folder, or the file does not hold it.
    """
    said = {entry.key: entry.value for entry in proto.external_data}
    where = f"classifier: {path}: external data of {proto.name!r}"
    location = said.get("location", "")
    file = (path.parent / location).resolve()
    # A hub's cache holds links into one folder of blobs, for the model as for its data.
    inside = any(file.is_relative_to(folder) for folder in (path.parent.resolve(), path.resolve().parent))
    if not location or Path(location).is_absolute() or ".." in Path(location).parts or not inside:
        raise CounterlensError(f"{where} refused: {location!r} lies outside the model's folder")
    if not file.is_file():
        raise CounterlensError(f"{where}: {file} is missing; keep it beside the model")
    try:
        offset = int(said.get("offset", 0))
        length = int(said.get("length", file.stat().st_size - offset))
    except ValueError as error:
        raise CounterlensError(f"{where}: offset or length is no number") from error
    if offset < 0 or length < 0 or offset + length > file.stat().st_size:
        raise CounterlensError(f"{where}: {file.name} has {file.stat().st_size} bytes, not {offset + length}")
    return file, offset, length


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:200] or type(error).__name__


def _shape(value: Any) -> list[int | None] | None:
    """Sizes of an input or output, None where one is open; None where even their number is."""
    kind = value.type.tensor_type
    if not kind.HasField("shape"):
        return None
    return [d.dim_value if d.HasField("dim_value") and d.dim_value > 0 else None for d in kind.shape.dim]


def _type_name(value: Any) -> str:
    import onnx

    kind = value.type.tensor_type.elem_type
    if value.type.sequence_type.elem_type.HasField("map_type"):
        return "maps"
    if not value.type.HasField("tensor_type") or not kind:
        return "no tensor"
    return str(onnx.TensorProto.DataType.Name(kind)).lower().replace("float", "float32").replace("float3216", "float16")


def _picture(path: Path, graph: Any) -> Picture:
    given = {tensor.name for tensor in graph.initializer}
    inputs = [value for value in graph.input if value.name not in given]
    said = ", ".join(f"{v.name} {_type_name(v)} {_shape(v) or '[?]'}".replace("None", "?") for v in inputs)
    if len(inputs) != 1:
        raise UsageError(f"classifier: {path}: takes {len(inputs)} inputs ({said}); expected one, of pictures")
    shape, dtype = _shape(inputs[0]), _type_name(inputs[0]).replace("double", "float64")
    if dtype not in PIXELS:
        raise UsageError(f"classifier: {path}: its input is {said}; expected pictures as {', '.join(PIXELS)}")
    shape = [None] * 4 if shape is None else shape
    if len(shape) != 4:
        raise UsageError(f"classifier: {path}: its input is {said}; expected pictures [B, 3, H, W] or [B, H, W, 3]")
    batch, first, middle, end = shape
    last = first not in (1, 3, None) or (first is None and end in (1, 3)) or (first == 1 and end == 3)
    channels = end if last else first
    if channels not in (1, 3, None):
        raise UsageError(f"classifier: {path}: its input is {said}; expected 3 channels (or 1, grey), not {channels}")
    height, width = (first, middle) if last else (middle, end)
    if (height is None) != (width is None):
        raise UsageError(f"classifier: {path}: its input is {said}, with one of height and width open")
    size = None if height is None or width is None else (height, width)
    if size is not None and max(size) > LONGEST:
        raise UsageError(f"classifier: {path}: its input is {said}, more than {LONGEST} pixels high or wide")
    pixels = math.prod((batch or 1, channels or 3, *(size or (1, 1)))) * np.dtype(PIXELS[dtype]).itemsize
    if pixels > MOST:
        raise UsageError(f"classifier: {path}: its input is {said}, more than {MOST >> 20} MB of pixels at once")
    return Picture(inputs[0].name, dtype, last, channels or 3, size, batch)


def _answer(path: Path, graph: Any, wanted: str | None, labels: int | None) -> tuple[str, Answer]:
    """The output that answers, and what it holds: scores, else maps of them, else labels alone.

    Of several with scores: the one with a score for each label, that is called so, or that is a matrix.
    """
    said = ", ".join(f"{v.name} {_type_name(v)} {_shape(v) or '[?]'}".replace("None", "?") for v in graph.output)
    kinds = {value.name: _kind_of(value) for value in graph.output}
    if wanted is not None:
        if wanted not in kinds:
            raise UsageError(f"scores: {path} has no output {wanted!r}; it has {', '.join(kinds)}")
        if (kind := kinds[wanted]) is None:
            raise UsageError(f"scores: {path} has the outputs {said}; {wanted!r} holds no scores and no labels")
        return wanted, kind
    for answer in ("scores", "maps", "labels"):
        some = {value.name: _shape(value) for value in graph.output if kinds[value.name] == answer}
        each = [name for name, shape in some.items() if labels and shape and shape[-1] == labels]
        called = [name for name in some if name.lower() in ("logits", "scores", "probabilities")]
        matrices = [name for name, shape in some.items() if len(shape or (0, 0)) == 2]
        for found in (list(some), each, called, matrices):
            if len(found) == 1:
                return found[0], answer
        if some:
            break
    raise UsageError(f"scores: {path} has the outputs {said}; say which holds a score for each label")


def _kind_of(value: Any) -> Answer | None:
    """What an output may hold; None where it is no answer."""
    name, shape = _type_name(value), _shape(value) or [None]
    if name == "maps" or "float" in name or "double" in name:
        return "maps" if name == "maps" else "scores"
    alone = len(shape) == 1 or (len(shape) == 2 and shape[1] in (1, None))
    return "labels" if alone and (name == "string" or name.startswith(("int", "uint"))) else None


def to_feed(
    picture: Picture,
    pixels: np.ndarray,  # [B, 3, h, w]
) -> np.ndarray:
    """Preprocessed pixels as a file takes them: [B, C, h, w] or [B, h, w, C], of its type; in [0, 1] for 8 bits."""
    if picture.channels == 1:
        pixels = np.tensordot(pixels, np.asarray(GREY, pixels.dtype), axes=(1, 0))[:, None]
    if picture.last:
        pixels = pixels.transpose(0, 2, 3, 1)
    if picture.dtype == "uint8":
        pixels = (pixels * 255).round().clip(0, 255)
    return np.ascontiguousarray(pixels, PIXELS[picture.dtype])


def open_session(file: OnnxFile, threads: int = 1, most: int = DYNAMIC_BATCH) -> Callable[[np.ndarray], Any]:
    """The file under ONNX Runtime on the CPU: preprocessed pixels [B, 3, h, w] to its scores [B, ...] in float32.

    Of a file that answers with labels alone they are an array [B], of one with maps a list of B. A fixed batch is
    filled up with the last image; of an open one at most `most` images are given to it at once.

    Raises:
        CounterlensError: ONNX Runtime is missing or cannot open it; while it runs, that it failed.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise CounterlensError(f"classifier: ONNX files need onnxruntime; {install_hint('cpu')}") from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3
    # Waiting threads would spin on the cores that torch needs between two calls.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    failures = onnxruntime_errors()
    try:
        session = onnxruntime.InferenceSession(str(file.path), options, providers=["CPUExecutionProvider"])
    except failures as error:
        raise CounterlensError(f"classifier: {file.path}: ONNX Runtime cannot open it ({_line(error)})") from error
    step = file.picture.batch or most

    def run(pixels: np.ndarray) -> Any:
        feed, made = to_feed(file.picture, pixels), []
        for start in range(0, len(feed), step):
            part = feed[start : start + step]
            missing = (file.picture.batch or 0) - len(part)
            full = np.concatenate([part, np.repeat(part[-1:], missing, axis=0)]) if missing > 0 else part
            try:
                out = session.run([file.output], {file.picture.name: full})[0]
            except failures as error:
                raise CounterlensError(
                    f"classifier: {file.path}: fails on {list(full.shape)}: {_line(error)}"
                ) from error
            shape = [len(out)] if isinstance(out, list) else list(out.shape)
            if shape[:1] != [len(full)]:
                raise UsageError(
                    f"classifier: {file.path}: output {file.output!r} is {shape} for {len(full)} images; expected a "
                    "score for each label of each"
                )
            made.append(np.asarray(out[: len(part)], np.float32) if file.answer == "scores" else out[: len(part)])
        return [row for rows in made for row in rows] if file.answer == "maps" else np.concatenate(made)

    return run
