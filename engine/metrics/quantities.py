"""What is explained: a classifier's logits, and one number of them for each image.

`Explained` holds a classifier with one, for metrics: any function of logits and targets, as `group_odds` makes
them. What maps are made of is a `Quantity`, a probability by its log-odds, which methods differentiate.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from counterlens.kernels.curve.reference import target_probability
from counterlens.kernels.dispatch import compute_dtype

from ..errors import UsageError
from ..labels import find_label
from ..models.protocols import Classifier

LogOdds = Callable[[Tensor, Tensor], Tensor]
QuantityLike = Literal["probability", "logit", "log_prob", "correct"] | Callable[[Tensor, Tensor], Tensor]
QUANTITIES = ("probability", "logit", "log_prob", "correct")


class Explained:
    """A classifier as a function from images in [0, 1] to logits, and the explained quantity of them.

    Args:
        classifier: a `counterlens.engine.models.protocols.Classifier`, or any module or function from images to logits
            [B, classes]. What has its logits in a field `logits` (Hugging Face) is understood.
        quantity: `probability` (under the classifier's link: softmax, or sigmoid where it says so), `logit`,
            `log_prob`, `correct` (1 where the target is predicted, else 0), or a function of logits [B, classes] and
            targets [B], to [B].

    Raises:
        UsageError: the classifier cannot be called, or the quantity is unknown.
    """

    def __init__(self, classifier: Any, quantity: QuantityLike = "probability") -> None:
        if not callable(quantity) and quantity not in QUANTITIES:
            raise UsageError(f"quantity: expected {', '.join(QUANTITIES)} or a function, got {quantity!r}")
        method = None if isinstance(classifier, nn.Module) else getattr(classifier, "logits", None)
        call = method if callable(method) else classifier
        if not callable(call):
            raise UsageError(f"classifier: expected a module or function from images to logits, got {classifier!r}")
        module = classifier if isinstance(classifier, nn.Module) else getattr(classifier, "module", None)
        self.modules = [module] if isinstance(module, nn.Module) else []
        self.link: str = getattr(classifier, "link", "softmax")
        self.quantity = quantity
        self._call = call

    def logits(
        self,
        images: Tensor,  # [B, C, H, W]
    ) -> Tensor:
        """Logits [B, classes], at least float32.

        Raises:
            UsageError: the classifier returned something else; the message says what.
        """
        out = self._call(images)
        if not isinstance(out, Tensor) and not isinstance(getattr(out, "logits", None), Tensor):
            many = f" of {len(out)}" if isinstance(out, tuple | list | dict) else ""
            raise UsageError(
                f"classifier: expected logits [B, classes], got a {type(out).__name__}{many}; "
                "wrap it in a function that returns the logits"
            )
        logits: Tensor = out if isinstance(out, Tensor) else out.logits
        if logits.ndim != 2 or len(logits) != len(images) or not logits.is_floating_point():
            raise UsageError(
                f"classifier: expected logits [{len(images)}, classes], got {list(logits.shape)} of {logits.dtype}"
            )
        if logits.shape[1] == 1 and self.link == "softmax" and not callable(self.quantity) and self.quantity != "logit":
            raise UsageError("classifier: one logit has no softmax; use quantity='logit', or models.wrap_classifier")
        return logits.to(compute_dtype(logits.dtype))

    def __call__(
        self,
        logits: Tensor,  # [B, classes]
        target: Tensor,  # [B] int64
    ) -> Tensor:
        """The explained quantity [B].

        Raises:
            UsageError: a quantity of the user's own returned another shape.
        """
        if callable(self.quantity):
            value = self.quantity(logits, target)
            if not isinstance(value, Tensor) or value.shape != target.shape:
                got = list(value.shape) if isinstance(value, Tensor) else type(value).__name__
                raise UsageError(f"quantity: expected [{len(target)}] of logits {list(logits.shape)}, got {got}")
            return value.to(logits.dtype).masked_fill(undefined(logits), torch.nan)
        chosen = logits.gather(1, target[:, None])[:, 0]
        if self.quantity == "logit":
            return chosen
        if self.quantity == "correct":
            return (logits.argmax(1) == target).to(logits.dtype).masked_fill(undefined(logits), torch.nan)
        if self.link == "sigmoid":
            return torch.sigmoid(chosen) if self.quantity == "probability" else nn.functional.logsigmoid(chosen)
        if self.quantity == "probability":
            return target_probability(logits, target)
        return torch.log_softmax(logits, dim=1).gather(1, target[:, None])[:, 0]


def undefined(
    logits: Tensor,  # [B, classes]
) -> Tensor:
    """Of which samples a logit is NaN or endless: [B] bool; one of minus infinity is a class that was ruled out."""
    return ~(logits < torch.inf).all(1)


def check_targets(
    target: Tensor | Sequence[int] | int | None,
    logits: Tensor,  # [N, classes], of the whole images
) -> Tensor:
    """Explained classes [N] int64 on the logits' device; without `target`, what the classifier predicts.

    Raises:
        UsageError: see `check_labels`.
    """
    count, classes = logits.shape
    return logits.argmax(1) if target is None else check_labels(target, count, classes, logits.device)


def check_labels(target: Tensor | Sequence[int] | int, count: int, classes: int, device: torch.device) -> Tensor:
    """Label indices [count] int64 on `device`, from one for all, a sequence or a tensor.

    Raises:
        UsageError: a label is out of range, or their number is not `count`.
    """
    try:
        targets = torch.as_tensor(target)
    except (TypeError, ValueError) as error:
        raise UsageError(f"target: expected whole numbers, got {target!r}") from error
    if targets.dtype == torch.bool or targets.is_floating_point():
        raise UsageError(f"target: expected whole numbers, got {targets.dtype}")
    if targets.ndim == 0:
        targets = targets.expand(count)
    if targets.shape != (count,):
        raise UsageError(f"target: expected one label or {count} of them, got {list(targets.shape)}")
    if count and not 0 <= int(targets.min()) <= int(targets.max()) < classes:
        raise UsageError(
            f"target: expected labels from 0 to {classes - 1}, got {int(targets.min())} to {int(targets.max())}"
        )
    return targets.to(device, torch.int64)


def group_odds(
    members: Sequence[int],
    *,
    form: Literal["probability", "log_odds"] = "probability",
    of: Literal["target", "members"] = "target",
) -> Callable[[Tensor, Tensor], Tensor]:
    """A quantity that asks on which side of a divide the classifier sees an image: "5 or more", "a dog of any breed".

    `log_odds` is log p(members) - log p(others) under a softmax, `probability` its sigmoid: p(members). With
    `of="target"` the sign is that of the target's own side, so that an image of the other side is explained as well;
    `members` keeps the sign.

    Args:
        members: classes on one side; the rest is the other.

    Raises:
        UsageError: no member, or (when called) a class out of range or no class on the other side.
    """
    chosen = sorted(set(members))
    if not chosen or chosen[0] < 0:
        raise UsageError(f"members: expected classes, got {list(members)}")
    if form not in ("probability", "log_odds") or of not in ("target", "members"):
        raise UsageError(f"group_odds: expected form probability or log_odds, of target or members: {form!r}, {of!r}")

    def quantity(logits: Tensor, target: Tensor) -> Tensor:
        classes = logits.shape[1]
        if chosen[-1] >= classes or len(chosen) >= classes:
            raise UsageError(f"members: expected some of the classes 0 to {classes - 1}, not all, got {chosen}")
        inside = torch.zeros(classes, dtype=torch.bool, device=logits.device)
        inside[chosen] = True
        odds = logits[:, inside].logsumexp(1) - logits[:, ~inside].logsumexp(1)
        if of == "target":
            odds = torch.where(inside[target], odds, -odds)
        return odds if form == "log_odds" else odds.sigmoid()

    return quantity


MIXED = "/"  # between the groups of a quantity's name


@dataclass(frozen=True)
class Quantity:
    """A probability of the logits, given by its log-odds: p = sigmoid(log-odds).

    Calling it with logits [N, C] and targets [N] gives p [N], in [0, 1]; metrics take it as their `quantity`.

    Attributes:
        name: `class`, groups such as `0,1,2,3,4/5,6,7,8,9` (indices of labels), or a name of your own.
        log_odds: logits [N, C] and targets [N] (label indices) to log p - log(1 - p), [N].
        conditions: how many explained things there are: labels, or groups.
        condition: targets [N] to which of them is meant, [N].
    """

    name: str
    log_odds: LogOdds = field(repr=False)
    conditions: int
    condition: Callable[[Tensor], Tensor] = field(repr=False, default=lambda target: target)

    def __call__(self, logits: Tensor, target: Tensor) -> Tensor:
        """Probability of the explained quantity: [N] in [0, 1]."""
        return torch.sigmoid(self.log_odds(logits, target))


def _inside(logits: Tensor, inside: Tensor) -> Tensor:
    """log p(inside) - log p(outside) under a softmax, for a mask [N, C]: [N]."""
    minus = logits.new_tensor(-torch.inf)
    return torch.logsumexp(torch.where(inside, logits, minus), 1) - torch.logsumexp(
        torch.where(inside, minus, logits), 1
    )


def make_quantity(classifier: Classifier, quantity: str | LogOdds | Quantity = "class") -> Quantity:
    """The explained quantity of a classifier.

    Args:
        classifier: its labels and link decide.
        quantity: `class` (the target label against all others; under a sigmoid its own logit); groups of labels by name
            or index, `0,1,2,3,4/5,6,7,8,9`: the target's group against the others; or any scalar of the logits, a
            function of logits [N, C] and targets [N] that returns log-odds [N].

    Raises:
        UsageError: a label is unknown, stands twice or in no group, or groups are asked of a sigmoid classifier.
    """
    labels = list(classifier.labels)
    if isinstance(quantity, Quantity):
        return quantity
    if not isinstance(quantity, str):
        return Quantity(getattr(quantity, "__name__", "custom"), quantity, len(labels))
    if quantity == "class":
        if classifier.link == "sigmoid":
            return Quantity("class", lambda logits, target: logits.gather(1, target[:, None])[:, 0], len(labels))

        def one(logits: Tensor, target: Tensor) -> Tensor:
            return _inside(logits, torch.arange(logits.shape[1], device=logits.device) == target[:, None])

        return Quantity("class", one, len(labels))
    if classifier.link == "sigmoid":
        raise UsageError("quantity: groups are of labels that exclude each other; this classifier's do not")
    return _grouped(labels, [part.split(",") for part in quantity.split(MIXED)])


def _grouped(labels: list[str], groups: Sequence[Sequence[str]]) -> Quantity:
    group_of = [-1] * len(labels)
    for number, names in enumerate(groups):
        for name in names:
            text = name.strip()
            index = find_label(text, labels, "quantity", ("class", "groups such as a,b/c,d"))
            if group_of[index] >= 0:
                raise UsageError(f"quantity: label {labels[index]!r} stands in two groups")
            group_of[index] = number
    if len(groups) < 2 or -1 in group_of:
        left = [labels[i] for i, g in enumerate(group_of) if g < 0]
        raise UsageError(
            f"quantity: {'one group only' if not left else f'label {left[0]!r} is in no group'}; "
            "every label belongs to one of two or more"
        )
    table = torch.tensor(group_of)

    def of(target: Tensor) -> Tensor:
        return table.to(target.device)[target]

    def log_odds(logits: Tensor, target: Tensor) -> Tensor:
        return _inside(logits, table.to(logits.device) == of(target)[:, None])

    name = MIXED.join(",".join(str(i) for i, g in enumerate(group_of) if g == n) for n in range(len(groups)))
    return Quantity(name, log_odds, len(groups), of)
