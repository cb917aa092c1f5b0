"""An audit by command: killed and gone on with, and of a server that fails (`python -m bench.blackbox`)."""

from __future__ import annotations

import pytest

from bench.blackbox import SECTIONS


@pytest.mark.slow
@pytest.mark.parametrize("section", ["resume", "flaky"])
def test_a_section_finds_nothing_bad(section: str) -> None:
    assert SECTIONS[section](8)["bad"] == []
