"""Architectures of transformers as torch's own exporter writes them: gradients are those of the original."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from bench.coverage_architectures import ENTRIES
from bench.onnx_classifiers import ASKED, EXACT, MORE, measure, refusals

BY_NAME = {entry.name: entry for entry in ENTRIES}


def row_of(name: str, exporter: str, folder: Path) -> dict[str, object]:
    torch.manual_seed(0)
    entry = BY_NAME[name]
    return measure(name, entry.make(), entry.inputs(1)[0].shape[-1], exporter, folder)  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "exporter"), [("ViT", "torchscript")])
def test_gradients_are_those_of_the_original(name: str, exporter: str, tmp_path: Path) -> None:
    row = row_of(name, exporter, tmp_path)
    assert row["converted"], row["reason"]
    assert row["gradient"] <= EXACT  # type: ignore[operator]


@pytest.mark.slow
@pytest.mark.parametrize("name", [*ASKED, *MORE])
def test_gradients_of_more_architectures(name: str, tmp_path: Path) -> None:
    row = row_of(name, "dynamo", tmp_path)
    assert row["converted"], row["reason"]
    assert row["gradient"] <= EXACT  # type: ignore[operator]


@pytest.mark.slow
def test_what_stays_a_black_box(tmp_path: Path) -> None:
    said = {row["model"]: row["said"] for row in refusals(tmp_path)}
    assert "8-bit pixels" in said["8-bit pixels"]
    assert "(ArgMax)" in said["the label alone"]
    assert "it is quantised, and rounding has no gradient" in said["quantised (QDQ)"]
