"""Operators in ONNX: types that runtimes lack, values that rounding loses, geometries where ONNX counts otherwise."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.coverage import alone, entries
from counterlens.export import ExportError, export_onnx

Outputs = tuple[Tensor, ...]


def assert_equal(
    fn: Callable[..., Outputs], make: Callable[[int], Tensor], folder: Path, rtol: float = 1e-5, atol: float = 0.0
) -> None:
    """Each number within `rtol` of itself, at batches 1 and 3."""
    path = export_onnx(fn, [make(2)], folder / "model.onnx")
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    for batch in (1, 3):
        x = make(batch)
        got = session.run(None, {session.get_inputs()[0].name: x.numpy()})
        for i, (a, b) in enumerate(zip(got, fn(x), strict=True)):
            message = lambda text, i=i: f"output {i}, batch {batch}: {text}"  # noqa: E731, B023
            torch.testing.assert_close(torch.as_tensor(a), b, rtol=rtol, atol=atol, equal_nan=True, msg=message)


def gradient(fn: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    y, pull = torch.func.vjp(fn, x)
    return pull(torch.cos(y.detach()))[0]


def test_values_that_rounding_loses(tmp_path: Path) -> None:
    values = torch.tensor([-90.0, -20.0, -3.0, -1e-3, -1e-9, -1e-20, 0.0, 1e-20, 1e-9, 1e-3, 0.7, 3.0, 20.0, 90.0, 1e9])

    def fn(x: Tensor) -> Outputs:
        return (
            torch.log1p(x.clamp(min=-0.999)), torch.expm1(x.clamp(max=80)), F.softplus(x), F.logsigmoid(x), F.elu(x),
            F.softplus(x, 2.0, 5.0), F.selu(x), F.celu(x, 0.5), torch.asinh(x), torch.sinh(x.clamp(-80, 80)),
            torch.atanh(x.clamp(-0.9, 0.9)), torch.acosh(1 + x.abs()), torch.erfc(x.clamp(-9, 9)),
            F.binary_cross_entropy_with_logits(x, torch.ones_like(x), reduction="none"), gradient(F.softplus, x),
            gradient(torch.log1p, x.abs()), gradient(F.logsigmoid, x), torch.logaddexp(x, x.flip(1) - 30),
            torch.hypot(x, x.flip(1)), torch.atan2(x, x.flip(1)),
        )  # fmt: skip

    assert_equal(fn, lambda b: values * torch.linspace(1, 1.1, b)[:, None], tmp_path, rtol=2e-5, atol=1e-37)


def test_whole_numbers(tmp_path: Path) -> None:
    values = torch.tensor([-(2**62), -(2**53) - 1, -7, -3, -1, 0, 1, 2, 3, 8, 2**31, 2**53 + 1, 2**62 + 3])

    def fn(x: Tensor) -> Outputs:
        divisors = [3, -3, 2**40, -7]
        return (
            *(x // d for d in divisors), *(x % d for d in divisors), *(torch.fmod(x, d) for d in divisors),
            *(x.div(d, rounding_mode="trunc") for d in divisors), 100 // (2 * x + 1), x**2, x**5, x**0, x << 3, x >> 5,
            x & 6, x | 9, x ^ 3, ~x, x.clamp(max=9), x.sign(), -x, x.sum(1), x.cumsum(1), x / 4, x.argmax(1), x.prod(1),
            x.sum((0, 1), keepdim=True), x[:, None].sum((1, 2)), x.amax(1), x.sort(1).values,
            (x.to(torch.uint8) + 200), x.to(torch.int8).sum(1), -x.to(torch.int8), x.to(torch.int32) // 5,
            x.to(torch.int32).sort(1).values, x.to(torch.int32).topk(3).values,
        )  # fmt: skip

    assert_equal(fn, lambda b: values.repeat(b, 1) + torch.arange(b)[:, None], tmp_path)


def test_floating_point_remainders(tmp_path: Path) -> None:
    values = torch.tensor([-1e6, -7.0, -0.9, -0.3, 0.0, 0.3, 0.6, 0.9, 2.1, 3.0, 1e6])

    def fn(x: Tensor) -> Outputs:
        divisors = [0.3, -0.3, 2.0, -7.0]
        return (
            *(torch.remainder(x, d) for d in divisors), *(torch.fmod(x, d) for d in divisors),
            *(x.div(d, rounding_mode="floor") for d in divisors), *(x.div(d, rounding_mode="trunc") for d in divisors),
            x // (0 * x), x.trunc(), x.frac(), gradient(lambda v: torch.fmod(v, 0.3) * v, x),
        )  # fmt: skip

    assert_equal(fn, lambda b: values.repeat(b, 1) * (1 + torch.arange(b)[:, None]), tmp_path, rtol=1e-5, atol=1e-6)


def test_masks_compute_like_numbers(tmp_path: Path) -> None:
    def fn(x: Tensor) -> Outputs:
        m, k = x > 0, x < 1
        return (
            m * k, m + k, m & ~k, m.amax(1), m.amin(0), m.any(1), m.all(), m.sum(1), m.cumsum(1), m.prod(1), m < k,
            m >= k, torch.maximum(m, k), torch.where(m, k, m), F.pad(m, (1, 2)), m.roll(2, 1), m[:, [0, 3]], m * 2.5,
            m.masked_fill(k, True), m.count_nonzero(1), x.isfinite(), torch.isposinf(x), torch.cat([m, k], 1),
            m.unfold(1, 3, 2),
            torch.eye(x.shape[0], dtype=torch.bool), m.long() @ torch.ones(9, 2).long(), torch.nan_to_num(x.log()),
        )  # fmt: skip

    def make(b: int) -> Tensor:
        torch.manual_seed(b)
        return torch.randn(b, 9) * 2

    assert_equal(fn, make, tmp_path)


POOLS: list[tuple[Any, ...]] = [  # kernel, stride, padding, ceil_mode
    (2, 3, 1, True), (3, 2, 1, True), (1, 2, 0, True), (3, 3, 1, True), (5, 3, 2, True), ((3, 1), (2, 3), (1, 0), True),
    (3, 2, 0, False),
]  # fmt: skip


def test_pools_count_windows_as_pytorch_does(tmp_path: Path) -> None:
    def fn(x: Tensor) -> Outputs:
        means = [
            lambda v, a=a, r=rest: F.avg_pool2d(v, *a, *r)
            for a in POOLS[:6:2]
            for rest in ((True, None), (False, None), (True, 5))
        ]
        largest = [lambda v, a=a: F.max_pool2d(v, *a[:3], 1, a[3]) for a in POOLS]
        pools = [
            *means, *largest, lambda v: F.max_pool2d(v, 2, 1, 1, 2, True), lambda v: F.adaptive_max_pool2d(v, (5, 7)),
            lambda v: F.max_pool1d(v[:, 0], 3, 2, 1, 1, True), lambda v: F.avg_pool1d(v[:, 0], 3, 2, 1, True),
            lambda v: F.avg_pool3d(v[:, None], (2, 3, 2), 2, (0, 1, 1), True, False),
            lambda v: F.max_pool3d(v[:, None], 2, 2, 1, 1, True),
            lambda v: F.adaptive_avg_pool3d(v[:, None], (1, 5, 3)),
        ]  # fmt: skip
        indices = F.max_pool2d(x, 3, 2, 1, return_indices=True)[1], F.adaptive_max_pool1d(x[:, 0], 5, True)[1]
        # Whole numbers tie, and every tie goes to the first of its window.
        return (*(pool(x) for pool in pools), *(gradient(pool, x) for pool in [means[2], *largest[:2]]), *indices)

    def make(b: int) -> Tensor:
        torch.manual_seed(b)
        return torch.randint(0, 5, (b, 2, 12, 11)).float()

    assert_equal(fn, make, tmp_path, rtol=1e-5, atol=1e-5)


def values_decide(x: Tensor) -> Tensor:
    return F.one_hot((x > 0).long())


def mask_as_index(x: Tensor) -> Tensor:
    return x[x > 0]


def no_such_type(x: Tensor) -> Tensor:
    return F.conv1d(x.double()[:, None], torch.ones(1, 1, 3).double())


def rounded_powers(x: Tensor) -> Tensor:
    return 3 ** x.long().abs()


def no_form(x: Tensor) -> Tensor:
    return torch.lgamma(x)


def attribute_of_the_batch(x: Tensor) -> Tensor:
    return F.conv1d(x[None], torch.ones(1, 1, 3).expand(x.shape[0], 1, 3), groups=x.shape[0])


def groups_of_the_batch(x: Tensor) -> Tensor:
    return F.group_norm(x.reshape(1, -1, 3, 3), x.shape[0])


def norm_over_the_batch(x: Tensor) -> Tensor:
    return F.group_norm(x.reshape(1, -1, 3), 3)


def padding_of_the_batch(x: Tensor) -> Tensor:
    return F.pad(x, (x.shape[0], 0))


def random_pool(x: Tensor) -> Tensor:
    return F.fractional_max_pool2d(x.reshape(-1, 1, 3, 3), 2, output_size=2)


@pytest.mark.parametrize(
    ("fn", "reason"),
    [
        (values_decide, "give num_classes"),
        (mask_as_index, "value"),
        (no_such_type, "no Conv for float64"),
        (rounded_powers, "round powers of whole numbers"),
        (no_form, "lgamma.* has no ONNX form"),
        (attribute_of_the_batch, "group of Conv depends on the batch"),
        (groups_of_the_batch, "number of groups that depends on the batch"),
        (norm_over_the_batch, "size that depends on the batch"),
        (padding_of_the_batch, "padding that depends on the batch"),
        (random_pool, "rand"),
    ],
)
def test_what_cannot_be_written_is_refused_with_its_line(fn: Any, reason: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=reason) as error:
        export_onnx(fn, [torch.randn(2, 9)], tmp_path / "m.onnx")
    first = fn.__code__.co_firstlineno
    assert f"{__file__}:{first + 1}" in str(error.value)
    assert "\n" not in str(error.value)
    assert not list(tmp_path.iterdir())


def _sampled(count: int, seed: int) -> list[Any]:
    # Architectures take longer; `python -m bench.coverage` has them all.
    listed = [e for e in entries() if e.kind != "architecture"]
    return random.Random(seed).sample(listed, count)


@pytest.mark.parametrize("entry", _sampled(3, 1), ids=lambda e: e.name)
def test_entries_of_the_coverage_list(entry: Any) -> None:
    assert alone(entry)[0] in ("agrees", "refused")


@pytest.mark.slow
def test_more_of_the_coverage_list() -> None:
    outcomes = {e.name: alone(e) for e in _sampled(60, 2)}
    bad = {name: found for name, found in outcomes.items() if found[0] not in ("agrees", "refused")}
    assert not bad
    assert sum(found[0] == "agrees" for found in outcomes.values()) >= 50
