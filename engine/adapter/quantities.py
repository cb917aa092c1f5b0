"""What is explained: a label's probability, or that of a group of labels, as one scalar of the logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..errors import UsageError
from ..labels import find_label
from ..models.protocols import Classifier

LogOdds = Callable[[Tensor, Tensor], Tensor]
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
            index = find_label(text, labels, "quantity", ("class, or groups such as a,b/c,d of labels:",))
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


def check_targets(target: Any, batch: int, labels: int, device: torch.device) -> Tensor:
    """Targets as label indices [B] int64 on `device`, from a number for all, a sequence or a tensor.

    Raises:
        UsageError: there are more or fewer than images, or one is no label's index.
    """
    if isinstance(target, int):
        target = [target] * batch
    try:
        out = torch.as_tensor(target, device=device)
    except (TypeError, ValueError) as error:
        raise UsageError(f"target: expected label indices, got {target!r}") from error
    if out.shape != (batch,) or out.is_floating_point() or out.dtype == torch.bool:
        raise UsageError(f"target: expected {batch} label indices, one per image, got {out.dtype} {list(out.shape)}")
    if batch and (int(out.amin()) < 0 or int(out.amax()) >= labels):
        raise UsageError(f"target: expected 0 to {labels - 1}, got {int(out.amin())} to {int(out.amax())}")
    return out.long()
