"""Black boxes of a run: where their answers are kept, how often they were asked, and what they did not say."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from ..errors import NotFinite
from .options import print_json, text_console

if TYPE_CHECKING:
    from ..blackbox.box import BlackBox
    from ..models.protocols import Classifier
    from ..outputs import Run


@contextmanager
def asking(run: Run, classifiers: Sequence[Classifier | None], as_json: bool) -> Iterator[list[BlackBox]]:
    """Keep the answers of black boxes in a run's folder, and say how often they were asked, however the run ends."""
    from ..blackbox.answers import FILE
    from ..blackbox.box import as_box, said

    boxes = [box for one in classifiers if (box := as_box(one)) is not None]
    for box in boxes:
        box.keep(run.folder / FILE)
    try:
        yield boxes
    finally:
        if boxes:
            run.description["queries"] = [box.record() for box in boxes]
            run.save()
        for record in run.description.get("queries", []):
            text_console(as_json).print(said(record))
            if as_json:
                print_json({"queries": record})


def undefined(error: NotFinite, boxes: Sequence[BlackBox]) -> str:
    """Why there is no number for an image: NaN, or no answer of a black box."""
    why = next(filter(None, (box.why() for box in boxes)), "")
    return f"{error.what}: no answer, it {why}" if why else f"{error.what}: NaN or infinity for this image"
