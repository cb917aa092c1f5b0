"""What counterfactuals change besides: attributes that an oracle sees, counted, and held against those of the data."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from ..errors import UsageError

ABOVE = 0.5  # an attribute is there where its probability is above this


def attributes_changed(
    before: Tensor,  # [N, A] probabilities
    after: Tensor,  # [N, A]
) -> Tensor:
    """How many attributes are there before and not after, or the other way: [N]; their mean is MNAC.

    Raises:
        UsageError: shapes differ, or a value is no probability.

    Source: Rodriguez et al., DiVE (arXiv 2103.10226); of 40 attributes of CelebA.
    """
    return (present(before) != present(after)).sum(1)


def present(
    probabilities: Tensor,  # [N, A]
) -> Tensor:
    """Which attributes are there: [N, A] bool.

    Raises:
        UsageError: a value is outside [0, 1].
    """
    low, high = probabilities.aminmax() if probabilities.numel() else (torch.zeros(()), torch.zeros(()))
    if low < 0 or high > 1:
        raise UsageError(
            f"oracle: expected probabilities of attributes, in [0, 1], got {low:g} to {high:g}; put the sigmoid into it"
        )
    return probabilities > ABOVE


def correlation_difference(
    before: Tensor,  # [N, A] probabilities
    after: Tensor,  # [N, A]
    query: int,
    expected: Tensor,  # [A]
) -> float:
    """CD: how far attributes that change with the query are from those that go with it in the data; lower is better.

    The sum over attributes of |corr(change of it, change of the query) - corr(it, the query)|, where a change is -1, 0
    or 1, and a correlation with something that never changes is 0.

    Args:
        query: which attribute was to change.
        expected: correlation of each attribute with the query in the data; see `Attributes.correlations`.

    Raises:
        UsageError: shapes do not fit, the query is none of the attributes, or there are fewer than two images.

    Source: Jeanneret et al., DiME (arXiv 2203.15636), section 3.4.
    """
    if before.shape != after.shape or before.ndim != 2 or len(expected) != before.shape[1]:
        raise UsageError(
            f"oracle: expected {len(expected)} attributes of each image, got {list(before.shape)}, {list(after.shape)}"
        )
    if not 0 <= query < before.shape[1]:
        raise UsageError(f"query: expected an attribute from 0 to {before.shape[1] - 1}, got {query}")
    if len(before) < 2:
        raise UsageError(f"CD: a correlation needs two counterfactuals at least, there are {len(before)}")
    change = present(after).double() - present(before).double()
    return (correlations(change, query) - expected.double()).abs().sum().item()


def correlations(
    values: Tensor,  # [N, A]
    query: int,
) -> Tensor:
    """Pearson's correlation of each column with one of them: [A]; 0 where one of the two is constant."""
    centred = values.double() - values.double().mean(0)
    norms = centred.norm(dim=0)
    products = centred.T @ centred[:, query]
    scale = norms * norms[query]
    return torch.where(scale > 0, products / scale.where(scale > 0, torch.ones(())), torch.zeros(()).double())


@dataclass(frozen=True)
class Attributes:
    """Annotations of a data set.

    Attributes:
        names: of the attributes, in order.
        values: [M, A] bool. images: names of the files, in order.
    """

    names: list[str]
    values: Tensor
    images: list[str]

    def index(self, name: str) -> int:
        """Which attribute is called so.

        Raises:
            UsageError: none is.
        """
        if name not in self.names:
            raise UsageError(f"query: {name!r} is none of the attributes {', '.join(self.names)}")
        return self.names.index(name)

    def correlations(self, query: int) -> Tensor:
        """Correlation of each attribute with one of them: [A].

        Raises:
            UsageError: the query is the same in every image.
        """
        if len(set(self.values[:, query].tolist())) < 2:
            raise UsageError(f"attributes: {self.names[query]} is the same in all {len(self.values)} images")
        return correlations(self.values, query)


def read_attributes(path: Path, partition: Path | None = None) -> Attributes:
    """Read CelebA's annotations, or others of their form; only the training split (0) where a partition is given.

    A line of names, then one for each image, of -1 (or 0) and 1, with commas (`list_attr_celeba.csv`) or spaces; before
    them the number of images may stand, as in the .txt files of CelebA and CelebA-HQ.

    Args:
        partition: lines of an image's name and its split: 0 train, 1 validation, 2 test.

    Raises:
        UsageError: a file cannot be read, or a line does not fit; the message names it.
    """
    lines = _rows(path)
    if len(lines) > 1 and len(lines[0][1]) == 1 and lines[0][1][0].isdigit():
        lines = lines[1:]
    if len(lines) < 2:
        raise UsageError(f"attributes: {path} holds no line of names and none of images")
    head, body = lines[0][1], lines[1:]
    names = list(head if len(body[0][1]) == len(head) + 1 else head[1:])
    images, values = [], []
    for number, (image, *said) in body:
        if len(said) != len(names):
            raise UsageError(
                f"attributes: {path}, line {number}: {len(said)} values for {len(names)} attributes ({image})"
            )
        if not set(said) <= {"-1", "0", "1"}:
            wrong = next(value for value in said if value not in ("-1", "0", "1"))
            raise UsageError(f"attributes: {path}, line {number}: expected -1, 0 or 1, got {wrong!r}")
        images.append(image)
        values.append([value == "1" for value in said])
    if partition is not None:
        split = {fields[0]: fields[-1] for _, fields in _rows(partition)}
        if missing := [image for image in images if image not in split]:
            raise UsageError(f"partition: {partition} does not say the split of {missing[0]}")
        kept = [i for i, image in enumerate(images) if split[image] == "0"]
        if not kept:
            raise UsageError(f"partition: {partition} has none of these images in the training split (0)")
        images, values = [images[i] for i in kept], [values[i] for i in kept]
    return Attributes(names, torch.tensor(values), images)


def _rows(path: Path) -> list[tuple[int, Sequence[str]]]:
    """The fields of each line that holds any, with its number."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"{path}: cannot be read ({error})") from error
    lines = [(n, line.replace(",", " ").split()) for n, line in enumerate(text.splitlines(), 1)]
    return [(n, fields) for n, fields in lines if fields]
