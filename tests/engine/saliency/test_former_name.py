"""Scripts that import from `counterlens.engine.adapter` get the very same objects."""

from __future__ import annotations

import subprocess
import sys


def test_the_former_name_is_the_package_itself() -> None:
    code = (
        "from counterlens.engine.adapter.methods import explain_with as old\n"
        "from counterlens.engine.saliency.methods import explain_with as new\n"
        "assert old is new\n"
        "import counterlens.engine.adapter.lax as lax, counterlens.engine.saliency.lax as same\n"
        "import counterlens.engine.adapter.quantities as q, counterlens.engine.metrics.quantities as m\n"
        "assert lax is same and q is m"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
