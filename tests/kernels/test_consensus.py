"""The consensus filter against its reference, on every edge."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from counterlens.kernels.consensus import MODES, Mode, consensus_filter
from counterlens.kernels.consensus import reference as oracle

TOLERANCE = {torch.float32: 1e-5, torch.float16: 2**-10, torch.bfloat16: 2**-7}  # the last two: one rounding


def pair(shape: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator).to(dtype), torch.randn(shape, generator=generator).to(dtype)


def exact(score: Tensor, reference: Tensor, angle: float, mode: Mode, chunk: int = 1) -> tuple[Tensor, Tensor]:
    """The oracle in float64."""
    return consensus_filter(score.double(), reference.double(), angle, mode=mode, chunk=chunk, backend="reference")


@pytest.mark.parametrize("mode", MODES)
def test_agrees_with_the_reference(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    mode: Mode,
    assert_close: Callable[..., None],
    near_limit: Callable[..., Tensor],
) -> None:
    score, reference = pair(shape)
    filtered, kept = consensus_filter(score.to(device), reference.to(device), 55.0, mode=mode, backend=backend)
    expected, expected_kept = exact(score, reference, 55.0, mode)
    unsure = near_limit(score, reference, 55.0) if mode in ("zero", "project") else torch.zeros_like(expected_kept)
    assert unsure.float().mean() < 0.01
    assert torch.equal(kept.cpu() | unsure, expected_kept | unsure)
    keep = ~unsure[:, None]
    assert_close(filtered.cpu() * keep, expected * keep, TOLERANCE[torch.float32])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_are_rounded_once(
    backend: str,
    device: torch.device,
    mode: Mode,
    dtype: torch.dtype,
    assert_close: Callable[..., None],
    near_limit: Callable[..., Tensor],
) -> None:
    score, reference = pair((5, 4, 33, 31), dtype=dtype)
    filtered, _ = consensus_filter(score.to(device), reference.to(device), 55.0, mode=mode, backend=backend)
    assert filtered.dtype == dtype
    expected, expected_kept = exact(score, reference, 55.0, mode)
    unsure = near_limit(score, reference, 55.0) if mode in ("zero", "project") else torch.zeros_like(expected_kept)
    assert unsure.float().mean() < 0.01
    keep = ~unsure[:, None]
    assert_close(filtered.cpu() * keep, expected * keep, TOLERANCE[dtype])


@pytest.mark.parametrize("mode", MODES)
def test_larger_chunks(
    backend: str,
    device: torch.device,
    mode: Mode,
    assert_close: Callable[..., None],
    near_limit: Callable[..., Tensor],
) -> None:
    score, reference = pair((2, 3, 12, 20))
    filtered, kept = consensus_filter(score.to(device), reference.to(device), 85.0, mode=mode, chunk=4, backend=backend)
    expected, expected_kept = exact(score, reference, 85.0, mode, chunk=4)
    assert not near_limit(score, reference, 85.0, 4).any()
    assert kept.shape == (2, 3, 5)
    assert torch.equal(kept.cpu(), expected_kept)
    assert_close(filtered, expected, TOLERANCE[torch.float32])


def test_double_precision_in_cpp(assert_close: Callable[..., None]) -> None:
    score, reference = (x.double() for x in pair((3, 4, 9, 9)))
    for mode in MODES:
        filtered, kept = consensus_filter(score, reference, 50.0, mode=mode, backend="cpp")
        expected, expected_kept = exact(score, reference, 50.0, mode)
        assert torch.equal(kept, expected_kept)
        assert_close(filtered, expected, 1e-13)


@pytest.mark.parametrize("mode", ["zero", "project"])
def test_vectors_without_an_angle_are_kept(backend: str, device: torch.device, mode: Mode) -> None:
    score, reference = pair((1, 4, 1, 6))
    reference = -score.clone()  # antiparallel: outside any limit
    score[..., 0] = 0
    reference[..., 1] = 0
    score[0, 2, 0, 2] = float("nan")
    reference[0, 1, 0, 3] = float("nan")
    score[0, 0, 0, 4] = float("inf")
    filtered, kept = consensus_filter(score.to(device), reference.to(device), 45.0, mode=mode, backend=backend)
    assert kept.flatten().tolist() == [True] * 5 + [False]
    expected = score.clone()
    expected[..., 5] = 0 if mode == "zero" else score[..., 5]  # antiparallel has no direction to turn in
    assert torch.equal(filtered.cpu().nan_to_num(7.0), expected.nan_to_num(7.0))


def test_global_with_empty_and_broken_samples(backend: str, device: torch.device) -> None:
    score, reference = pair((3, 4, 4, 4))
    score[0] = 0
    score[1, 0, 0, 0] = float("nan")
    filtered, kept = consensus_filter(score.to(device), reference.to(device), 45.0, mode="global", backend=backend)
    assert torch.equal(filtered[0].cpu(), torch.zeros(4, 4, 4))
    assert filtered[1].isnan().all()
    assert kept[:2].all()
    assert filtered[2].isfinite().all()


def test_orthogonal_is_within_ninety_degrees(backend: str, device: torch.device) -> None:
    score, reference = torch.zeros(2, 1, 4, 2, 2, device=device)
    score[:, 0], reference[:, 1] = 1.0, 1.0
    assert consensus_filter(score, reference, 90.0, backend=backend)[1].all()
    assert not consensus_filter(score, reference, 89.99, backend=backend)[1].any()


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_any_memory_layout(backend: str, device: torch.device, layout: str, assert_close: Callable[..., None]) -> None:
    dense = pair((2, 4, 6, 6))
    views = {
        "channels_last": lambda x: x.to(memory_format=torch.channels_last),
        "transposed": lambda x: x.transpose(2, 3),
        "sliced": lambda x: torch.cat([x, x], 3)[..., ::2],
        "expanded": lambda x: x[:1].expand(2, -1, -1, -1),
    }
    score, reference = (views[layout](x.to(device)) for x in dense)
    filtered, kept = consensus_filter(score, reference, 60.0, backend=backend)
    expected, expected_kept = exact(score.cpu(), reference.cpu(), 60.0, "zero")
    assert torch.equal(kept.cpu(), expected_kept)
    assert_close(filtered, expected, TOLERANCE[torch.float32])


def test_a_limit_per_sample(backend: str, device: torch.device) -> None:
    score, reference = (x.to(device) for x in pair((3, 4, 8, 8)))
    angles = [20.0, 90.0, 160.0]
    filtered, kept = consensus_filter(score, reference, torch.tensor(angles), backend=backend)
    for i, angle in enumerate(angles):
        alone = consensus_filter(score[i : i + 1], reference[i : i + 1], angle, backend=backend)
        assert torch.equal(filtered[i : i + 1], alone[0])
        assert torch.equal(kept[i : i + 1], alone[1])


def test_empty_batch(backend: str, device: torch.device) -> None:
    filtered, kept = consensus_filter(*torch.zeros(2, 0, 4, 6, 6, device=device), 45.0, chunk=3, backend=backend)
    assert filtered.shape == (0, 4, 6, 6)
    assert kept.shape == (0, 2, 2)


@settings(max_examples=10, deadline=None)
@given(st.integers(-20, 20), st.integers(-20, 20), st.integers(0, 1000), st.sampled_from([10.0, 45.0, 90.0, 170.0]))
@pytest.mark.parametrize("name", ["cpp", "reference", "triton"])
def test_keeping_does_not_depend_on_scale(name: str, p: int, q: int, seed: int, angle: float) -> None:
    score, reference = pair((1, 4, 5, 5), seed)
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    score, reference = score.to(device), reference.to(device)
    _, kept = consensus_filter(score, reference, angle, backend=name)
    _, scaled = consensus_filter(score * 2.0**p, reference * 2.0**q, angle, backend=name)
    assert torch.equal(kept, scaled)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.sampled_from([torch.float16, torch.bfloat16, torch.float32]))
@pytest.mark.parametrize("name", ["cpp", "reference", "triton"])
def test_off_is_the_identity(name: str, seed: int, dtype: torch.dtype) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    score, reference = (x.to(device) for x in pair((2, 3, 4, 6), seed, dtype))
    filtered, kept = consensus_filter(score, reference, 30.0, mode="off", backend=name)
    assert torch.equal(filtered, score)
    assert kept.all()


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 1000), st.integers(-3, 3))
@pytest.mark.parametrize("name", ["cpp", "reference", "triton"])
def test_180_degrees_keeps_all_but_exact_antiparallel(name: str, seed: int, power: int) -> None:
    device = "cuda" if name == "triton" and torch.cuda.is_available() else "cpu"
    score, reference = (x.to(device) for x in pair((1, 4, 4, 4), seed))
    reference[..., 1, 2] = -score[..., 1, 2] * 2.0**power
    filtered, kept = consensus_filter(score, reference, 180.0, backend=name)
    assert not kept[0, 1, 2]
    assert kept.sum() == 15
    assert (filtered[..., 1, 2] == 0).all()


def test_official_formula(near_limit: Callable[..., Tensor]) -> None:
    """The angle by acos, as the paper writes it, on vectors that are not close to the limit."""
    score, reference = pair((2, 4, 16, 16))
    cosine = (score * reference).sum(1) / (score.norm(dim=1) * reference.norm(dim=1))
    expected = cosine.acos() <= torch.pi / 4
    _, kept = consensus_filter(score, reference, 45.0, backend="reference")
    unsure = near_limit(score, reference, 45.0)
    assert torch.equal(kept | unsure, expected | unsure)


def test_projection_turns_by_the_limit_and_grows() -> None:
    score, reference = (x.double() for x in pair((2, 4, 8, 8)))
    turned, kept = consensus_filter(score, reference, 30.0, mode="project", backend="reference")
    s, t = oracle.to_chunks(score, 1)[~kept], oracle.to_chunks(turned, 1)[~kept]
    angle = oracle.cosine(s, t).acos()
    assert torch.allclose(angle, torch.full_like(angle, torch.pi / 6), atol=1e-9)
    assert torch.allclose(t.norm(dim=-1), s.norm(dim=-1) / torch.cos(torch.tensor(torch.pi / 6).double()))


def test_bad_input() -> None:
    score, reference = pair((2, 4, 6, 6))
    with pytest.raises(ValueError, match=r"reference: expected score's shape .*\[2, 4, 6, 5\] beside \[2, 4, 6, 6\]"):
        consensus_filter(score, reference[..., :5], 45.0)
    with pytest.raises(TypeError, match=r"one floating dtype, got torch\.float32 and torch\.float64"):
        consensus_filter(score, reference.double(), 45.0)
    with pytest.raises(TypeError, match=r"one floating dtype, got torch\.int64"):
        consensus_filter(score.long(), reference.long(), 45.0)
    with pytest.raises(ValueError, match="reference: expected score's device cpu, got meta"):
        consensus_filter(score, reference.to("meta"), 45.0)
    with pytest.raises(ValueError, match="chunk: expected a divisor of height 6 and width 6, got 4"):
        consensus_filter(score, reference, 45.0, chunk=4)
    with pytest.raises(ValueError, match=r"angle_deg: expected degrees in \[0, 180\]"):
        consensus_filter(score, reference, 181.0)
    with pytest.raises(ValueError, match=r"angle_deg: expected degrees in \[0, 180\]"):
        consensus_filter(score, reference, torch.tensor([10.0, float("nan")]))
    with pytest.raises(ValueError, match=r"angle_deg: expected a number or \[2\], got \[3\]"):
        consensus_filter(score, reference, torch.zeros(3))
    with pytest.raises(ValueError, match="mode 'project' needs a limit below 90 degrees"):
        consensus_filter(score, reference, 90.0, mode="project")
    with pytest.raises(ValueError, match="mode: expected one of zero, project, global, off, got 'on'"):
        consensus_filter(score, reference, 45.0, mode="on")  # type: ignore[arg-type]


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    score, reference = (x.to(device) for x in pair((2, 4, 8, 8)))
    angles = torch.tensor([45.0, 60.0], device=device)

    def run(s: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        filtered, kept = consensus_filter(s * 2, r, angles, backend=backend)
        return filtered + 1, kept

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    for actual, expected in zip(compiled(score, reference), run(score, reference), strict=True):
        assert torch.equal(actual, expected)


def test_operator_is_registered_properly() -> None:
    score, reference = pair((2, 4, 6, 6))
    limits = torch.full((2,), 0.7)
    arguments = (score, reference, [limits, limits], [], "zero", 2, "cpp")
    torch.library.opcheck(torch.ops.counterlens.consensus_filter.default, arguments)
