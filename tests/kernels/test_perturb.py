"""Perturbed images against their reference, on every edge."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from counterlens.kernels.perturb import perturb, rank_counts, rank_pixels

THRESHOLDS = [0.0, 0.25, 0.5, 1.0]
MEAN, STD = [0.48, 0.46, 0.41], [0.27, 0.26, 0.28]


def inputs(shape: tuple[int, int, int, int], seed: int = 0) -> tuple[Tensor, Tensor]:
    """An image and a map with many ties, some of them at thresholds."""
    generator = torch.Generator().manual_seed(seed)
    image = torch.rand(shape, generator=generator)
    n, _, h, w = shape
    return image, torch.randint(0, 9, (n, h, w), generator=generator) / 8


@pytest.mark.parametrize("order", ["value", "rank"])
@pytest.mark.parametrize("keep", ["above", "below", "both"])
def test_agrees_with_the_reference(
    backend: str,
    device: torch.device,
    shape: tuple[int, int, int, int],
    keep: str,
    order: str,
    assert_close: Callable[..., None],
) -> None:
    image, saliency = inputs(shape)
    options: dict[str, Any] = {"keep": keep, "order": order, "mean": [0.4] * shape[1], "std": [0.3] * shape[1]}
    actual = perturb(image.to(device), 0.2, saliency.to(device), THRESHOLDS, backend=backend, **options)
    expected = perturb(image.double(), 0.2, saliency.double(), THRESHOLDS, backend="reference", **options)
    assert_close(actual, expected, 1e-6)


@pytest.mark.parametrize("kind", ["number", "channels", "shared", "own", "zero-dimensional"])
def test_baselines(backend: str, device: torch.device, kind: str) -> None:
    image, saliency = inputs((3, 3, 8, 8))
    other = torch.rand(3, 3, 8, 8)
    baseline = {
        "number": 0.5, "channels": other[0, :, 0, 0], "shared": other[:1], "own": other,
        "zero-dimensional": torch.tensor(0.5),
    }[kind]  # fmt: skip
    placed = baseline.to(device) if isinstance(baseline, Tensor) else baseline
    actual = perturb(image.to(device), placed, saliency.to(device), THRESHOLDS, backend=backend)
    assert torch.equal(actual.cpu(), perturb(image, baseline, saliency, THRESHOLDS, backend="reference"))


@pytest.mark.parametrize("given", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("asked", [torch.float16, torch.bfloat16, torch.float32])
def test_dtypes_are_rounded_once(
    backend: str, device: torch.device, given: torch.dtype, asked: torch.dtype, assert_close: Callable[..., None]
) -> None:
    image, saliency = inputs((2, 3, 9, 7))
    image = image.to(given)
    actual = perturb(
        image.to(device), 0.0, saliency.to(device), THRESHOLDS, mean=MEAN, std=STD, out_dtype=asked, backend=backend
    )
    assert actual.dtype == asked
    expected = perturb(image.double(), 0.0, saliency.double(), THRESHOLDS, mean=MEAN, std=STD, backend="reference")
    tolerance = {torch.float32: 1e-6, torch.float16: 2**-11, torch.bfloat16: 2**-8}[asked]
    if backend == "triton" and device.type == "cpu" and asked == torch.bfloat16:
        tolerance *= 2  # the interpreter cuts float32 off where a GPU rounds
    assert_close(actual, expected, tolerance)


def test_double_precision_in_cpp() -> None:
    image, saliency = (x.double() for x in inputs((2, 3, 9, 7)))
    for dtype in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
        actual, expected = (
            perturb(image, 0.1, saliency, THRESHOLDS, mean=MEAN, std=STD, out_dtype=dtype, backend=name)
            for name in ("cpp", "reference")
        )
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_conversions_of_every_16_bit_value_in_cpp(dtype: torch.dtype) -> None:
    """Widening all of them, and narrowing the points between neighbours, where ties are."""
    every = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).reshape(1, 1, 256, 256)
    saliency = torch.ones(1, 256, 256)
    wide = perturb(every, 0.0, saliency, [0.5], keep="above", out_dtype=torch.float32, backend="cpp").reshape(-1)
    assert torch.equal(wide.nan_to_num(7.0), every.float().reshape(-1).nan_to_num(7.0))
    finite = every[every.isfinite()].float().sort().values
    beyond = torch.tensor([1e38, -1e38, torch.nan])
    between = torch.cat([finite, (finite[1:] + finite[:-1]) / 2, finite * 1.0001, beyond])
    image = between.reshape(1, 1, 1, -1)
    narrow = perturb(image, 0.0, torch.ones(1, 1, image.shape[3]), [0.5], keep="above", out_dtype=dtype, backend="cpp")
    assert torch.equal(narrow.reshape(-1).nan_to_num(7.0), between.to(dtype).nan_to_num(7.0))


def test_a_threshold_itself_shows_the_image(backend: str, device: torch.device) -> None:
    image = torch.ones(1, 1, 1, 3, device=device)
    saliency = torch.tensor([[[0.1, 0.7, 0.69999]]], device=device)
    kept, removed = perturb(image, 0.0, saliency, torch.tensor([0.7]), backend=backend)[0, :, 0, 0, 0].cpu()
    assert kept.tolist() == [0, 1, 0]
    assert removed.tolist() == [1, 0, 1]


def test_thresholds_per_sample_and_one_alone(backend: str, device: torch.device) -> None:
    image, saliency = (x.to(device) for x in inputs((3, 2, 5, 6)))
    thresholds = torch.tensor([[0.1], [0.5], [1.0]])
    actual = perturb(image, 0.0, saliency, thresholds, backend=backend)
    assert actual.shape == (3, 2, 1, 2, 5, 6)
    for i in range(3):
        alone = perturb(image[i : i + 1], 0.0, saliency[i : i + 1], thresholds[i], backend=backend)
        assert torch.equal(actual[i : i + 1], alone)


def test_keep_and_remove_are_complementary(backend: str, device: torch.device) -> None:
    image, saliency = (x.to(device) for x in inputs((2, 3, 8, 8)))
    both = perturb(image, -1.0, saliency, THRESHOLDS, backend=backend)
    assert torch.equal(both[:, 0], perturb(image, -1.0, saliency, THRESHOLDS, keep="above", backend=backend))
    assert torch.equal(both[:, 1], perturb(image, -1.0, saliency, THRESHOLDS, keep="below", backend=backend))
    assert torch.equal((both == -1).sum(1), torch.ones_like(both[:, 0], dtype=torch.long))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced", "expanded"])
def test_any_memory_layout(backend: str, device: torch.device, layout: str) -> None:
    views: dict[str, Callable[[Tensor], Tensor]] = {
        "channels_last": lambda x: x.to(memory_format=torch.channels_last) if x.ndim == 4 else x,
        "transposed": lambda x: x.transpose(-1, -2),
        "sliced": lambda x: torch.cat([x, x], -1)[..., ::2],
        "expanded": lambda x: x[:1].expand(3, *x.shape[1:]),
    }
    image, saliency = (views[layout](x.to(device)) for x in inputs((3, 3, 6, 6)))
    actual = perturb(image, 0.25, saliency, THRESHOLDS, backend=backend)
    assert torch.equal(actual.cpu(), perturb(image.cpu(), 0.25, saliency.cpu(), THRESHOLDS, backend="reference"))


def test_into_a_given_buffer(backend: str, device: torch.device) -> None:
    image, saliency = (x.to(device) for x in inputs((2, 3, 5, 7)))
    whole = torch.full((2, 2, 9, 3, 5, 7), float("nan"), device=device)
    out = whole[:, :, 2:6]
    result = perturb(image, 0.0, saliency, THRESHOLDS, out=out, backend=backend)
    assert result is out
    assert torch.equal(out, perturb(image, 0.0, saliency, THRESHOLDS, backend=backend))
    assert whole[:, :, :2].isnan().all()
    assert whole[:, :, 6:].isnan().all()


def test_64_bit_addresses(backend: str, device: torch.device) -> None:
    """Channels of the image and sides of the output 2^31 elements apart; pages in between are never touched."""
    image, saliency = (x.to(device) for x in inputs((1, 2, 4, 4)))
    image = image.half()
    expected = perturb(image, 0.0, saliency, [0.5], backend=backend)

    def far(shape: tuple[int, ...], strides: tuple[int, ...]) -> Tensor:
        storage = torch.UntypedStorage(2 * (2**31 + 64), device=device)
        return torch.tensor([], dtype=torch.float16, device=device).set_(storage, 0, shape, strides)  # type: ignore[call-overload]

    wide_image = far((1, 2, 4, 4), (16, 2**31, 4, 1)).copy_(image)
    wide_out = far((1, 2, 1, 2, 4, 4), (64, 2**31, 32, 16, 4, 1))
    assert torch.equal(perturb(wide_image, 0.0, saliency, [0.5], out=wide_out, backend=backend), expected)


def test_outputs_beyond_the_cache_in_threads() -> None:
    image, saliency = inputs((2, 3, 223, 225))  # planes that are no multiple of a vector: 24 MiB of output
    thresholds = torch.linspace(0.1, 1, 10)
    actual = perturb(image, 0.5, saliency, thresholds, backend="cpp")
    assert actual.numel() * 4 > 2**24
    assert torch.equal(actual, perturb(image, 0.5, saliency, thresholds, backend="reference"))
    half = perturb(image, 0.5, saliency, thresholds, out_dtype=torch.float16, backend="cpp")
    assert torch.equal(half, actual.half())


def test_empty_batch(backend: str, device: torch.device) -> None:
    image, saliency = torch.zeros(0, 3, 4, 4, device=device), torch.zeros(0, 4, 4, device=device)
    for order in ("value", "rank"):
        assert perturb(image, 0.0, saliency, [0.5], order=order, backend=backend).shape == (0, 2, 1, 3, 4, 4)


def test_ranks_descend_and_break_ties_by_the_sample_seed() -> None:
    saliency = torch.tensor([[[0.1, 0.9], [0.5, 0.3]]])
    assert rank_pixels(saliency).tolist() == [[[3, 0], [1, 2]]]
    flat = torch.zeros(2, 16, 16)
    one, two = rank_pixels(flat, [1, 2])
    assert not torch.equal(one, two)
    assert torch.equal(rank_pixels(flat[:1], 2)[0], two)  # the seed counts, not the place in the batch
    assert one.flatten().sort().values.tolist() == list(range(256))
    assert one[:8].float().mean() == pytest.approx(127.5, abs=15)  # no corner is favoured


def test_ties_only_move_within_their_value() -> None:
    _, saliency = inputs((1, 1, 12, 12))
    rank = rank_pixels(saliency, 5)
    assert (saliency.flatten()[rank.flatten().argsort()].diff() <= 0).all()


def test_rank_order_shows_the_asked_number_of_pixels(backend: str, device: torch.device) -> None:
    image = torch.ones(2, 1, 5, 5, device=device)
    saliency = torch.zeros(2, 1, 5, 5, device=device)  # nothing but ties
    thresholds = [0.0, 0.3, 0.5, 0.98, 1.0]  # of 25: 25, 17.5, 12.5, 0.5, 0
    shown = perturb(image, 0.0, saliency, thresholds, keep="above", order="rank", backend=backend).sum((2, 3, 4))
    assert shown.tolist() == [[25, 18, 13, 1, 0]] * 2
    assert rank_counts(torch.tensor(thresholds, dtype=torch.float64), 25).tolist() == [25, 18, 13, 1, 0]


def test_a_given_rank(backend: str, device: torch.device) -> None:
    image = torch.ones(1, 1, 2, 2, device=device)
    rank = torch.tensor([[[2, 0], [3, 1]]], device=device)
    kept = perturb(image, 0.0, image[:, 0], [0.5], keep="above", order="rank", rank=rank, backend=backend)
    assert kept.flatten().tolist() == [0, 1, 0, 1]


def test_infinite_images_do_not_leak_into_what_hides_them(backend: str, device: torch.device) -> None:
    image = torch.tensor([[[[float("inf"), float("nan"), 1.0]]]], device=device)
    saliency = torch.tensor([[[0.0, 0.0, 1.0]]], device=device)
    assert perturb(image, 0.0, saliency, [0.5], keep="above", backend=backend).flatten().tolist() == [0, 0, 1]


def bad(match: str, error: type[Exception] = ValueError, **changes: Any) -> None:
    image, saliency = inputs((2, 3, 4, 4))
    arguments: dict[str, Any] = {"image": image, "baseline": 0.0, "saliency": saliency, "thresholds": [0.5], **changes}
    with pytest.raises(error, match=match):
        perturb(**arguments)


def test_bad_input() -> None:
    image, saliency = inputs((2, 3, 4, 4))
    bad(r"image: expected \[N, C, H, W\], got \[3, 4, 4\]", image=image[0])
    bad("image: expected a floating dtype, got torch.uint8", TypeError, image=(image * 255).byte())
    bad("saliency: expected a floating dtype, got torch.int64", TypeError, saliency=saliency.long())
    bad(r"saliency: expected \[N, H, W\] or \[N, 1, H, W\] beside image", saliency=saliency[:, :3])
    bad("saliency: expected no NaN", saliency=saliency.masked_fill(saliency > 0.9, float("nan")))
    bad("saliency: expected image's device cpu, got meta", saliency=saliency.to("meta"))
    bad(r"baseline: expected a number, \[3\] or \[1 or 2, 3, 4, 4\], got \[4\]", baseline=torch.zeros(4))
    bad("baseline: expected image's dtype", TypeError, baseline=torch.zeros(3, dtype=torch.float64))
    bad(r"thresholds: expected values in \[0, 1\]", thresholds=[0.5, 1.5])
    bad(r"thresholds: expected values in \[0, 1\]", thresholds=[0.5, float("nan")])
    bad("thresholds: expected strictly increasing", thresholds=[0.5, 0.5])
    bad("thresholds: expected strictly increasing", thresholds=torch.tensor([[0.1, 0.2], [0.2, 0.1]]))
    bad(r"thresholds: expected \[K\] or \[2, K\] with K at least 1, got \[3, 1\]", thresholds=torch.zeros(3, 1))
    bad("K at least 1", thresholds=[])
    bad("thresholds: expected a floating dtype", TypeError, thresholds=torch.tensor([0, 1]))
    bad("mean, std: expected both or neither", mean=MEAN)
    bad("mean, std: expected 3 values each, got 2 and 3", mean=MEAN[:2], std=STD)
    bad("std: expected values above 0", mean=MEAN, std=[1.0, 0.0, 1.0])
    bad("keep: expected above, below or both", keep="all")
    bad("order: expected value or rank", order="area")
    bad("rank: expected none with order='value'", rank=saliency.long())
    bad("rank: expected values from 0 to 15, got 0 to 16", order="rank", rank=torch.full((2, 4, 4), 16).tril())
    bad("rank: expected int32 or int64", TypeError, order="rank", rank=saliency)
    bad("seed: expected a number or 2 of them, got 3", order="rank", seed=[1, 2, 3])
    bad("out_dtype: expected a floating dtype", TypeError, out_dtype=torch.uint8)
    bad(r"out: expected \[2, 2, 1, 3, 4, 4\], got \[2, 1, 3, 4, 4\]", out=torch.zeros(2, 1, 3, 4, 4))
    bad("out: expected torch.float16", TypeError, out=torch.zeros(2, 2, 1, 3, 4, 4), out_dtype=torch.float16)
    bad(r"out: expected dense \[H, W\] planes", out=torch.zeros(2, 2, 1, 3, 4, 4).transpose(4, 5))
    bad(r"out: expected dense \[H, W\] planes", out=torch.zeros(2, 2, 1, 1, 4, 4).expand(2, 2, 1, 3, 4, 4))


def test_allocates_its_output_and_nothing_of_its_size_besides() -> None:
    image, saliency = inputs((4, 3, 64, 64))
    thresholds = torch.linspace(0.1, 1, 8)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        result = perturb(image, 0.5, saliency, thresholds, backend="cpp")
    allocated = sum(e.self_cpu_memory_usage for e in profile.events() if e.self_cpu_memory_usage > 0)
    output = result.numel() * result.element_size()
    assert output <= allocated <= 1.05 * output


def test_compiles_as_one_graph(backend: str, device: torch.device) -> None:
    image, saliency = (x.to(device) for x in inputs((2, 3, 8, 8)))
    thresholds = torch.tensor(THRESHOLDS, device=device)

    def run(x: Tensor) -> Tensor:
        return perturb(x + 0, 0.5, saliency, thresholds, mean=MEAN, std=STD, backend=backend) * 2

    assert torch.equal(torch.compile(run, fullgraph=True, backend="aot_eager")(image), run(image))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_runs_in_a_cuda_graph() -> None:
    image, saliency = (x.cuda() for x in inputs((2, 3, 64, 64)))
    thresholds = torch.tensor(THRESHOLDS, device="cuda")
    out = perturb(image, 0.5, saliency, thresholds, mean=MEAN, std=STD)
    expected = out.clone()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        perturb(image, 0.5, saliency, thresholds, mean=MEAN, std=STD, out=out)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


def test_trusted_maps_are_not_looked_at(backend: str, device: torch.device) -> None:
    image, saliency = (x.to(device) for x in inputs((2, 3, 5, 4)))
    rank = rank_pixels(saliency, 1)
    options: dict[str, Any] = {"order": "rank", "rank": rank, "backend": backend}
    looked = perturb(image, 0.2, saliency, THRESHOLDS, **options)
    assert torch.equal(perturb(image, 0.2, saliency * torch.nan, THRESHOLDS, trusted=True, **options), looked)
    with pytest.raises(ValueError, match="NaN"):
        perturb(image, 0.2, saliency * torch.nan, THRESHOLDS, **options)
