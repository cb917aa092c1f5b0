"""From what a box says of images to probabilities of its labels, or why that is no answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import CounterlensError, UsageError
from ..labels import find_label

Row = NDArray[np.float32]
OUTPUTS = ("probabilities", "logits", "independent")


class Unusable(CounterlensError):
    """A box answers nothing any more; what it answered is kept, and the same command goes on."""


class NoAnswer(CounterlensError):
    """A box was asked about one image alone, and gave no answer."""


class Refused(Exception):
    """A box cannot answer this request; asking again gives the same."""


class Unanswered(Refused):
    """A request failed, and may not fail again: a time-out, an error of the server, nonsense.

    Attributes:
        after: seconds that the server wants to be left alone.
    """

    def __init__(self, why: str, after: float = 0.0) -> None:
        super().__init__(why)
        self.after = after


def plain(answers: Any, count: int) -> list[Any]:
    """One answer for each image.

    Raises:
        Unanswered: there are more or fewer.
    """
    if callable(getattr(answers, "detach", None)):
        answers = answers.detach().cpu()
    if not isinstance(answers, Mapping | str | bytes) and hasattr(answers, "__array__"):
        answers = np.asarray(answers).tolist()
    if not isinstance(answers, Sequence) or isinstance(answers, str | bytes):
        raise Unanswered(f"answers with {_kind(answers)}, not with a list of {count}, one for each image")
    if len(answers) != count:
        raise Unanswered(f"answers for {len(answers)} images, {count} were sent")
    return list(answers)


def read(answer: Any, labels: Sequence[str], output: str) -> tuple[Row, bool] | str:
    """Probabilities [labels] of one image and whether the answer was a label alone; or what is wrong with it.

    Args:
        answer: scores in the order of the labels, scores by label, a list of {"label", "score"}, or a label: its name,
            else its place. Of two labels one score is the second one's.
        output: what scores are, see `BoxOptions`.
    """
    if isinstance(answer, np.generic):
        answer = answer.item()
    if isinstance(answer, list) and answer and all(isinstance(a, Mapping) for a in answer):
        pairs = [(a.get("label"), a.get("score", a.get("probability"))) for a in answer]
        answer = {str(name): score for name, score in pairs}
        if len(answer) != len(pairs):
            return "says one label twice"
    try:
        if isinstance(answer, Mapping):
            places = {find_label(str(name), labels, "answers with a label"): value for name, value in answer.items()}
            if len(places) != len(labels):
                return f"says {len(places)} of the {len(labels)} labels; all are needed"
            answer = [places[i] for i in range(len(labels))]
        if isinstance(answer, str) or (isinstance(answer, int) and not isinstance(answer, bool)):
            return np.eye(len(labels), dtype=np.float32)[find_label(str(answer), labels, "answers")], True
    except (UsageError, ValueError) as error:  # a number of thousands of digits
        return str(error)
    try:
        scores = np.atleast_1d(np.asarray(answer, dtype=np.float64))
    except (TypeError, ValueError, OverflowError):
        return f"answers with {_kind(answer)}, not with scores or a label"
    if scores.shape == (1,) and len(labels) == 2 and output != "logits":
        scores = np.array([1 - scores[0], scores[0]])
    if scores.shape == (1,) and len(labels) == 2:
        scores = np.array([0.0, scores[0]])
    if scores.shape != (len(labels),):
        return f"answers with {list(scores.shape)} scores, there are {len(labels)} labels"
    if not np.isfinite(scores).all():
        return "answers with NaN or infinity"
    if output == "logits":
        scores = np.exp(scores - scores.max())
        return (scores / scores.sum()).astype(np.float32), False
    if scores.min() < -1e-6 or scores.max() > 1 + 1e-3:
        return f"answers with scores from {scores.min():.3g} to {scores.max():.3g}, which are no probabilities{_HINT}"
    scores = scores.clip(0, 1)
    if output == "independent":
        return scores.astype(np.float32), False
    total = scores.sum()
    if abs(total - 1) > max(0.01, 5e-5 * len(labels)):  # rounded ones are near it
        return f"answers with probabilities that sum to {total:.3g}{_HINT}"
    return (scores / total).astype(np.float32), False


_HINT = "; where that is meant, say --classifier-output logits or independent"


def _kind(value: Any) -> str:
    shown = f" ({str(value)!r})" if isinstance(value, str | int | float | bool | None) else ""
    return f"a {type(value).__name__}{shown}"
