"""Programs of traced functions: what is written runs as `run` does, loops and branches inside."""

from __future__ import annotations

import resource
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from counterlens.export.errors import ExportError
from counterlens.export.program import Call, If, Loop, Step, Values, check_file, run, write_program

BATCH = 5


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.SiLU(), nn.Conv2d(8, 3, 3, padding=1))
    return network.half().float().requires_grad_(False)  # so that float16 holds its weights without a loss


def descent(network: nn.Module, rounds: int = 4) -> list[Step]:
    """Follow a gradient for some rounds, in every second one a branch; all of it reads the same weights."""
    rates = torch.linspace(0.1, 0.4, rounds)

    def move(z: Tensor, i: Tensor, image: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.func.grad(lambda v: (network(v) - image).square().sum())(z)
        return z - rates[i] * slope / 100, slope.abs().mean(dim=(1, 2, 3))

    def even(z: Tensor, i: Tensor) -> Tensor:
        return i % 2 == 0

    def turn(z: Tensor) -> Tensor:
        return z.flip(3)

    def keep(z: Tensor) -> Tensor:
        return z * 1

    return [
        Call(network, ("image",), ("z",)),
        Loop(
            rounds,
            "i",
            ("z",),
            (
                Call(move, ("z", "i", "image"), ("moved", "size")),
                Call(even, ("z", "i"), ("now",)),
                If("now", (Call(turn, ("moved",), ("z",)),), (Call(keep, ("moved",), ("z",)),), ("z",)),
            ),
            scans=("size",),
        ),
        Call(network, ("z",), ("out",)),
    ]


def opened(path: Path) -> onnxruntime.InferenceSession:
    return onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])


def example(batch: int = BATCH) -> Values:
    return {"image": torch.rand((batch, 3, 6, 6), generator=torch.Generator().manual_seed(batch))}


@pytest.mark.parametrize(("storage", "share"), [("lossless", "local"), ("float32", "outer")])
def test_a_file_runs_as_its_program_does_at_every_batch(
    network: nn.Module, tmp_path: Path, storage: str, share: str
) -> None:
    program = descent(network)
    path = write_program(
        program,
        example(),
        ["out", "size"],
        tmp_path / "run.onnx",
        storage=storage,
        share=share,  # type: ignore[arg-type]
    )
    check_file(path)
    session = opened(path)
    for batch in (1, 2, BATCH, 8):
        expected = run(program, example(batch))
        assert expected["size"].shape == (batch, 4)
        got = session.run(None, {name: x.numpy() for name, x in example(batch).items()})
        for name, value in zip(("out", "size"), got, strict=True):
            np.testing.assert_allclose(value, expected[name].numpy(), rtol=1e-4, atol=1e-6)


def test_weights_that_parts_share_are_stored_once_and_as_small_as_they_come_back(
    network: nn.Module, tmp_path: Path
) -> None:
    write_program(descent(network), example(), ["out"], tmp_path / "run.onnx")
    held = onnx.load(tmp_path / "run.onnx").graph.initializer
    large = [w for w in held if np.prod(w.dims) > 64]
    # Two convolutions' weights, and the same turned over for their gradients; three functions use them.
    assert len(large) <= 4
    assert {w.data_type for w in large} == {onnx.TensorProto.FLOAT16}
    with torch.no_grad():
        network[0].weight += 1e-4  # type: ignore[operator]
    write_program(descent(network), example(), ["out"], tmp_path / "more.onnx")
    kinds = [w.data_type for w in onnx.load(tmp_path / "more.onnx").graph.initializer if np.prod(w.dims) > 64]
    assert onnx.TensorProto.FLOAT in kinds  # what float16 would change is kept whole


def test_a_closed_batch_has_its_size_alone(network: nn.Module, tmp_path: Path) -> None:
    path = write_program(descent(network), example(2), ["out"], tmp_path / "run.onnx", dynamic_batch=False)
    session = opened(path)
    assert session.get_inputs()[0].shape == [2, 3, 6, 6]
    expected = run(descent(network), example(2))["out"]
    np.testing.assert_allclose(session.run(None, {"image": example(2)["image"].numpy()})[0], expected, atol=1e-5)


def test_what_does_not_fit_is_refused_and_leaves_nothing(network: nn.Module, tmp_path: Path) -> None:
    def shrink(z: Tensor) -> Tensor:
        return z[:, :1]

    loop = Loop(2, "i", ("z",), (Call(shrink, ("z",), ("z",)),))
    with pytest.raises(ExportError, match=r"z leaves a round as torch.float32 \[5, 1, 6, 6\], it came as"):
        write_program([Call(network, ("image",), ("z",)), loop], example(), ["z"], tmp_path / "run.onnx")

    def looks(z: Tensor) -> Tensor:
        return z * 2 if z.sum() > 0 else z

    with pytest.raises(ExportError, match=r"test_program\.py"):
        write_program([Call(looks, ("image",), ("z",))], example(), ["z"], tmp_path / "run.onnx")
    with pytest.raises(ExportError, match="storage: expected one of lossless, float16, float32, got 'int8'"):
        write_program([], example(), ["image"], tmp_path / "run.onnx", storage="int8")  # type: ignore[arg-type]
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_leaves_nothing_half_written(network: nn.Module, tmp_path: Path) -> None:
    image = torch.rand(BATCH, 3, 8, 8)
    now = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, now[1]))
    try:
        with pytest.raises(ExportError, match=r"toy\.onnx: cannot be written \(.*\); nothing was kept"):
            write_program([Call(network, ("image",), ("out",))], {"image": image}, ["out"], tmp_path / "toy.onnx")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, now)
    assert list(tmp_path.iterdir()) == []
