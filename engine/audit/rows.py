"""What an audit says of a sample: the columns of a row, declared once, with their types and meaning."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from types import NoneType, UnionType
from typing import Annotated, Any, NamedTuple, get_args, get_type_hints

import torch
from torch import Tensor

from ..images.files import as_saved
from ..images.sources import need

CHANGED = 0.1  # mean absolute difference over channels from which a pixel counts as changed
GRID = 8  # cells a side of `change_grid`
# The columns that name a file beside the rows, and what the file's name says of it.
PICTURES = {
    "image": "input", "counterfactual": "counterfactual", "true_counterfactual": "true", "away_counterfactual": "away",
    "saliency": "saliency",
}  # fmt: skip


@dataclass(kw_only=True, slots=True)
class Row:
    """One sample of an audit. Pictures are files; their columns hold paths relative to the audit's folder."""

    number: Annotated[int, "Place in the plan, from 0."]
    id: Annotated[str, "The sample's id: its path in the source's folder, or the source's own id."]
    file: Annotated[str | None, "Path of the image, where it is a file."] = None
    slices: Annotated[dict[str, str], "Groups of the sample: columns of the source that --slice names."]
    fit: Annotated[str | None, "How the picture became the image: crop, pad, squash or native."] = None
    photo: Annotated[list[float] | None, "Width and height of the picture, upright, in pixels."] = None
    box: Annotated[list[float] | None, "Left, top, width and height of what the image shows of it, in pixels."] = None
    own_prediction: Annotated[str | None, "What the classifier's own processor makes it say of the untouched file."] = (
        None
    )
    own_confidence: Annotated[float | None, "Probability of that."] = None
    label: Annotated[str | None, "True label, where the source says one."] = None
    prediction: Annotated[str | None, "What the classifier says of the image."] = None
    confidence: Annotated[float | None, "Probability of the prediction."] = None
    correct: Annotated[bool | None, "The prediction is the true label."] = None
    status: Annotated[str, "done, skipped (the target was the prediction already) or failed."] = "done"
    error: Annotated[str | None, "Why the sample was skipped or failed."] = None
    retried: Annotated[bool, "It was run again alone, because its batch failed."] = False
    target: Annotated[str | None, "The label that the counterfactual was to have."] = None
    counterfactual_prediction: Annotated[str | None, "What the classifier says of the saved counterfactual."] = None
    counterfactual_confidence: Annotated[float | None, "Probability of that prediction."] = None
    target_confidence: Annotated[float | None, "Probability of the target, for the counterfactual."] = None
    flipped: Annotated[bool | None, "The counterfactual's prediction is the target."] = None
    transfer: Annotated[bool | None, "All judges say the target too."] = None
    judges: Annotated[dict[str, str], "What each judge says of the counterfactual."] = field(default_factory=dict)
    student_prediction: Annotated[str | None, "What a black box's surrogate says of the counterfactual."] = None
    student_target_confidence: Annotated[float | None, "Its probability of the target."] = None
    attempts: Annotated[int | None, "Candidates that were made of it, of a black box through its surrogate."] = None
    attempt: Annotated[int | None, "Which of its ladder's settings made it, 1 for those that were asked for."] = None
    queries: Annotated[int | None, "What the box was asked for it, the image itself included."] = None
    l1: Annotated[float | None, "Mean absolute change per pixel and channel, in [0, 1]."] = None
    l2: Annotated[float | None, "Root mean square change per pixel and channel, in [0, 1]."] = None
    changed_area: Annotated[float | None, f"Share of pixels that change by more than {CHANGED} on average."] = None
    region_area: Annotated[float | None, "Share of pixels where the image could change (--region)."] = None
    l1_inside: Annotated[float | None, "l1 of the pixels in the region."] = None
    l1_outside: Annotated[float | None, "l1 of the pixels outside; these are the image's own."] = None
    change_grid: Annotated[list[float] | None, f"Mean change in each of {GRID}x{GRID} cells, row by row."] = None
    kept_fraction: Annotated[float | None, "Share of latent locations that the consensus filter kept."] = None
    image: Annotated[str | None, "File of the image, at the model's size."] = None
    counterfactual: Annotated[str | None, "File of the counterfactual."] = None
    true_flipped: Annotated[bool | None, "Of a wrong prediction: the way to the true label arrived."] = None
    true_l1: Annotated[float | None, "Of a wrong prediction: l1 of the way to the true label."] = None
    true_grid: Annotated[list[float] | None, "Of a wrong prediction: change_grid of the way to the true label."] = None
    true_counterfactual: Annotated[str | None, "File of the counterfactual towards the true label."] = None
    away_target: Annotated[str | None, "Of a wrong prediction: the target of the smallest change away from it."] = None
    away_prediction: Annotated[str | None, "What the classifier says after that change."] = None
    away_l1: Annotated[float | None, "l1 of that change."] = None
    away_grid: Annotated[list[float] | None, "change_grid of that change."] = None
    away_counterfactual: Annotated[str | None, "File of the image with that change."] = None
    saliency: Annotated[str | None, "File of the saliency map of the prediction (--saliency METHOD)."] = None
    msi: Annotated[float | None, "MSI of the saliency map, in [-2, 1]."] = None
    msi_base: Annotated[float | None, "Its base score, without the penalty for what is marked."] = None
    sufficient_area: Annotated[float | None, "Smallest share of pixels, by rank, that carries the prediction."] = None
    insertion_curve: Annotated[list[float] | None, "Probability if only what is marked stays, by threshold."] = None
    deletion_curve: Annotated[list[float] | None, "Probability if what is marked is hidden, by threshold."] = None
    scores: Annotated[dict[str, float] | None, "Of the saliency map, by metric: those of --metrics."] = None
    brittle: Annotated[bool | None, "Moved by one pixel, the map loses over 0.1 of a score (--metrics robust)."] = None
    seed: Annotated[int | None, "Seed of the counterfactual's noise."] = None
    part: Annotated[int, "The part, and file, that the row is in."]
    config_hash: Annotated[str, "Of settings and options."]
    model_hash: Annotated[str, "Of the models."]
    seconds: Annotated[float | None, "Its share of the counterfactuals' batched operations."] = None
    wall_seconds: Annotated[float | None, "Of the whole part, divided by its samples."] = None

    def record(self) -> dict[str, Any]:
        """The row by column."""
        return {column.name: getattr(self, column.name) for column in COLUMNS}

    def update(self, **values: Any) -> None:
        """Fill in columns."""
        for name, value in values.items():
            setattr(self, name, value)

    def fail(self, error: str, **values: Any) -> None:
        """Say that the sample failed, and why."""
        self.update(status="failed", error=error, **values)


class Column(NamedTuple):
    """A column: its name, its type, and what it says."""

    name: str
    kind: str
    says: str


KINDS: dict[Any, str] = {
    int: "int64", str: "string", bool: "bool", float: "float32", list[float]: "list<float32>",
    dict[str, str]: "map<string, string>", dict[str, float]: "map<string, float32>",
}  # fmt: skip


def _columns() -> Iterator[Column]:
    for name, hint in get_type_hints(Row, include_extras=True).items():
        kind, says = get_args(hint)
        held = [k for k in get_args(kind) if k is not NoneType] if isinstance(kind, UnionType) else [kind]
        yield Column(name, KINDS[held[0]], says)


COLUMNS = list(_columns())


def schema() -> Any:
    """The Arrow schema of a row."""
    pa = need("pyarrow", "an audit's results")
    types = {
        "int64": pa.int64(), "string": pa.string(), "bool": pa.bool_(), "float32": pa.float32(),
        "list<float32>": pa.list_(pa.float32()), "map<string, string>": pa.map_(pa.string(), pa.string()),
        "map<string, float32>": pa.map_(pa.string(), pa.float32()),
    }  # fmt: skip
    return pa.schema([(column.name, types[column.kind]) for column in COLUMNS])


def table_bytes(rows: Sequence[Row], metadata: dict[str, str]) -> bytes:
    """Rows as a Parquet file."""
    pa, pq = need("pyarrow", "an audit's results"), need("pyarrow.parquet", "an audit's results")
    table = pa.Table.from_pylist([row.record() for row in rows], schema=schema().with_metadata(metadata))
    buffer = io.BytesIO()
    pq.write_table(table, buffer, compression="zstd")
    return buffer.getvalue()


def changes(
    before: Tensor,  # [3, H, W] in [0, 1]
    after: Tensor,  # [3, H, W] in [0, 1]
) -> dict[str, Any]:
    """Where a counterfactual differs: share of changed pixels, and the mean change in each cell of a grid."""
    difference = (as_saved(after) - before).abs().mean(dim=0)
    cells = torch.nn.functional.adaptive_avg_pool2d(difference[None], GRID)[0]
    return {"changed_area": (difference > CHANGED).float().mean().item(), "change_grid": cells.flatten().tolist()}
