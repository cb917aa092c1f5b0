"""Random generators on disk, for the tests of their numbers and of their folders."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
    pytest.importorskip("sentencepiece", reason="needs sentencepiece, which trains the tiny T5 tokenizer")
    from tests.engine.models.generators import Folders

    return Folders(tmp_path_factory.mktemp("generators"))
