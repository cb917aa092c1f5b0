"""KServe's protocols, asked by clients that others wrote: Triton's, and kserve's, which pins what we do not."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from bench.serve import Served, pictures

VARIABLE = "COUNTERLENS_KSERVE_PYTHON"


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with Served("--slots", "2") as made:
        yield made


@pytest.mark.slow
@pytest.mark.parametrize("binary", [False, True])
def test_tritons_client(served: Served, binary: bool) -> None:
    triton = pytest.importorskip("tritonclient.http", reason="needs tritonclient[http]")
    client = triton.InferenceServerClient(served.url.removeprefix("http://"))
    assert client.is_server_live()
    assert client.is_server_ready()
    assert client.is_model_ready("digits")
    told = client.get_model_metadata("digits")
    assert {given["name"] for given in told["inputs"]} == {"image", "target"}
    shown = np.full((2, 3, 32, 32), 0.5, dtype=np.float32)
    image, target = triton.InferInput("image", list(shown.shape), "FP32"), triton.InferInput("target", [2], "INT64")
    image.set_data_from_numpy(shown, binary_data=binary)
    target.set_data_from_numpy(np.array([3, 7]), binary_data=binary)
    wanted = [triton.InferRequestedOutput(name, binary_data=binary) for name in ("counterfactual", "probabilities")]
    answer = client.infer("digits", [image, target], outputs=wanted)
    assert answer.as_numpy("counterfactual").shape == shown.shape
    assert answer.as_numpy("probabilities").sum(1) == pytest.approx(1, abs=1e-4)
    with pytest.raises(triton.InferenceServerException, match="image"):
        client.infer("digits", [target], outputs=wanted)
    client.close()


@pytest.mark.slow
def test_kserves_own_client(served: Served, tmp_path: Path) -> None:
    python = os.environ.get(VARIABLE)
    if python is None:
        pytest.skip(f"needs {VARIABLE}, the Python of an environment with kserve (python -m venv E; E/bin/pip install "
                    "kserve)")  # fmt: skip
    (tmp_path / "four.png").write_bytes(pictures(1)[0])
    child = Path(__file__).with_name("kserve_child.py")
    command = [python, str(child), served.url, str(tmp_path / "four.png"), "32"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert (said["ready"], said["live"], said["model_ready"]) == (True, True, True)
    (chances,) = said["predictions"]
    assert sum(chances.values()) == pytest.approx(1, abs=1e-4)
    assert said["explained"]["source"] == max(chances, key=chances.__getitem__)
    assert said["explained"]["target"] != said["explained"]["source"]
    for binary in ("False", "True"):
        assert said[f"v2 {binary}"]["counterfactual"] == [2, 3, 32, 32]
        assert said[f"v2 {binary}"]["probabilities"] == [2, 10]
    assert said["prediction False"] == said["prediction True"]
