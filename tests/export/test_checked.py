"""No file is there that was not checked: the open batch, changes in place, sizes of memory, and what is left behind."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterlens.export import ExportError, export_onnx, lowering
from counterlens.export.check import compare, sample
from tests.export.test_onnx import run

Function = Callable[[Tensor], Any]

BATCH_DEPENDENT: dict[str, Function] = {
    "another branch at 1": lambda x: x * 2 if x.shape[0] == 1 else x * 3,
    "another branch at 3": lambda x: x * 2 if x.shape[0] == 3 else x * 3,
    "above 2": lambda x: x * 2 if x.shape[0] > 2 else x * 3,
    "above 4": lambda x: x.sin() if x.shape[0] > 4 else x.cos(),
    "above 7": lambda x: x.sin() if len(x) > 7 else x.cos(),
    "above 16": lambda x: x.sin() if x.size(0) > 16 else x.cos(),
    "odd": lambda x: x * (x.shape[0] % 2),
    "halves": lambda x: x[x.shape[0] // 2 :].sum(0) + x,
    "in eights": lambda x: x * (1 + x.shape[0] // 16),
    "at most 2": lambda x: x * min(x.shape[0], 2),
    "squared": lambda x: x.sum() * x.shape[0] ** 2,
    "root": lambda x: x.sum() / x.shape[0] ** 0.5,
    "inverse": lambda x: x.sum(0) * (1 / x.shape[0]),
    "squeeze of everything": lambda x: x.sum(1, keepdim=True).squeeze(),
    "squeeze of the batch": lambda x: x.sum(1).squeeze(0),
    "a tensor of it": lambda x: x * torch.tensor(x.shape[0]),
    "a loop": lambda x: torch.stack([row * 2 for row in x]),
}
BATCH_FREE: dict[str, Function] = {
    "divided": lambda x: x.sum() / x.shape[0],
    "multiplied": lambda x: x * len(x),
    "an offset": lambda x: x.sum(0) / (2 * x.shape[0] - 1),
    "variance of everything": lambda x: x / x.var(),
    "deviation over the batch": lambda x: (x - x.mean(0)) / (x.std(0) + 1),
    "statistics": lambda x: F.softmax(x, 0) + x.cumsum(0),
    "filled": lambda x: x.sum() * torch.full((), x.shape[0]),
    "a range": lambda x: x + torch.arange(x.shape[0])[:, None],
    "the unit matrix": lambda x: torch.eye(x.shape[0]) @ x,
    "the last row": lambda x: x + x[x.shape[0] - 1] + x[-1],
    "pairs": lambda x: (x[:, None] - x[None]).square().sum(-1),
    "distances, otherwise in large batches": lambda x: torch.cdist(x, x + 1),
    "sorted": lambda x: x.sort(0)[0],
    "another way to the same": lambda x: x * 2 if x.shape[0] >= 16 else x + x,
}


def rows(batch: int) -> Tensor:
    return torch.randn(batch, 5, generator=torch.Generator().manual_seed(batch))


def assert_right(fn: Function, path: Path) -> None:
    for batch in (1, 2, 3, 8, 30):
        expected = fn(rows(batch))
        for a, b in zip(run(path, rows(batch)), expected if isinstance(expected, tuple) else (expected,), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5, equal_nan=True)


@pytest.mark.parametrize("kind", BATCH_DEPENDENT)
def test_what_depends_on_the_batch_is_refused_with_its_line(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"batch \d.*test_checked\.py:\d+"):
        export_onnx(BATCH_DEPENDENT[kind], [rows(2)], tmp_path / "m.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", BATCH_FREE)
def test_what_is_right_at_every_batch(kind: str, tmp_path: Path) -> None:
    path = export_onnx(BATCH_FREE[kind], [rows(2)], tmp_path / "m.onnx")
    assert_right(BATCH_FREE[kind], path)


@pytest.mark.parametrize("kind", ["another branch at 1", "squeeze of everything", "squared"])
def test_a_closed_batch_takes_them(kind: str, tmp_path: Path) -> None:
    report: dict[str, Any] = {}
    fn = BATCH_DEPENDENT[kind]
    path = export_onnx(fn, [rows(3)], tmp_path / "m.onnx", dynamic_batch=False, report=report)
    torch.testing.assert_close(run(path, rows(3))[0], fn(rows(3)))
    assert report["batches"] == [3]


WEIGHT = torch.randn(5, 5, generator=torch.Generator().manual_seed(0))
BIAS = nn.Parameter(torch.randn(5, generator=torch.Generator().manual_seed(1)), requires_grad=False)


def written(x: Tensor, change: Callable[[Tensor], Any]) -> Tensor:
    table = WEIGHT.exp()
    change(table)
    return x @ table


IN_PLACE: dict[str, Function] = {
    "relu of a product of weights": lambda x: x @ F.relu(WEIGHT @ WEIGHT, inplace=True),
    "a copy": lambda x: x * BIAS.clone().add_(1).clamp_(0, 2),
    "a row": lambda x: written(x, lambda t: t[0].zero_()),
    "a block": lambda x: written(x, lambda t: t[1:3, ::2].mul_(3)),
    "a column": lambda x: written(x, lambda t: t.__setitem__((slice(None), 1), BIAS)),
    "through a transpose": lambda x: written(x, lambda t: t.T[0].sub_(1)),
    "through a view": lambda x: written(x, lambda t: t.view(-1)[3:7].fill_(2)),
    "by a mask": lambda x: written(x, lambda t: t.masked_fill_(t > 1, -1.0)),
    "by indices": lambda x: written(x, lambda t: t.index_put_((torch.tensor([0, 2]),), BIAS)),
    "added up": lambda x: written(x, lambda t: t.index_add_(0, torch.tensor([1, 1]), WEIGHT[:2])),
    "with the input": lambda x: written(x, lambda t: t[0].copy_(x.sum(0))),
    "a range": lambda x: x * torch.arange(5.0).mul_(2),
    "one hot": lambda x: x @ torch.zeros(5, 5).scatter_(1, torch.tensor([[1], [0], [3], [2], [4]]), 1.0),
    "into empty memory": lambda x: x * torch.add(BIAS, 1, out=torch.empty(5)),
    "a triangle": lambda x: x @ torch.full((5, 5), 1.0).triu_(1),
    "read before and after": lambda x: (lambda t: x * t + x * t.mul_(2))(BIAS * 1.5),
    "a value of the input's": lambda x: (x * 2).add_(1).clamp_(0),
}


@pytest.mark.parametrize("kind", IN_PLACE)
def test_changes_in_place_of_what_is_made_inside(kind: str, tmp_path: Path) -> None:
    def fn(x: Tensor) -> tuple[Tensor, ...]:
        if kind == "read before and after":  # autograd refuses that in eager too
            return (IN_PLACE[kind](x),)
        y, pull = torch.func.vjp(IN_PLACE[kind], x)
        return y, pull(torch.cos(y))[0]

    before = WEIGHT.clone(), BIAS.clone()
    path = export_onnx(fn, [rows(2)], tmp_path / "m.onnx")
    assert_right(fn, path)
    assert torch.equal(WEIGHT, before[0])
    assert torch.equal(BIAS, before[1])


OF_PYTORCH: dict[str, Function] = {  # operators that change their own tensors in place
    "circular 1-d": lambda x: F.pad(x[:, None], (2, 1), mode="circular"),
    "circular 2-d": lambda x: F.pad(x[:, None, None].expand(-1, 2, 3, -1), (1, 2, 0, 3), mode="circular"),
    "circular 3-d": lambda x: F.pad(x[:, None, None, None].expand(-1, 1, 2, 3, -1), (1,) * 6, mode="circular"),
    "circular, cut": lambda x: F.pad(x[:, None], (-1, 2), mode="circular"),
    "rms_norm": lambda x: F.rms_norm(x, (5,)),
    "rms_norm with weights": lambda x: F.rms_norm(x, (5,), BIAS, 1e-3),
    "circular after rms_norm": lambda x: F.pad(F.rms_norm(x, (5,))[:, None], (1, 1), mode="circular"),
}


@pytest.mark.parametrize("kind", OF_PYTORCH)
def test_operators_that_change_their_own_tensors_without_a_gradient(kind: str, tmp_path: Path) -> None:
    assert_right(OF_PYTORCH[kind], export_onnx(OF_PYTORCH[kind], [rows(2)], tmp_path / "m.onnx"))


def test_the_line_is_kept_after_such_an_operator(tmp_path: Path) -> None:
    def fn(x: Tensor) -> Tensor:
        wide = F.pad(x[:, None], (2, 1), mode="circular")
        return torch.linalg.svdvals(wide)

    with pytest.raises(ExportError, match=r"svd.*at .*test_checked\.py:\d+: return torch\.linalg\.svdvals"):
        export_onnx(fn, [rows(2)], tmp_path / "m.onnx")


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.add_(1),
        lambda x: x.relu_() * 2,
        lambda x: (x.__setitem__((0, 0), 1.0), x * 2)[1],
        lambda x: (x.view(-1).mul_(2), x)[1],
        lambda x: (x.T[0].zero_(), x.sum(1))[1],
        lambda x: (F.relu(x, inplace=True), x.sum(1))[1],
    ],
)
def test_a_changed_input_is_refused_with_its_line(fn: Function) -> None:
    example = rows(2)
    before = example.clone()
    with pytest.raises(ExportError, match=r"an input is changed in place, at .*test_checked\.py:\d+; work on a copy"):
        export_onnx(fn, [example], "never.onnx")
    assert torch.equal(example, before)


def throws(error: Exception) -> Function:
    def fn(x: Tensor) -> Tensor:
        if x.shape[0] > 4:
            raise error
        return x

    return fn


@pytest.mark.parametrize("error", [KeyError("k"), AssertionError("no"), AttributeError("a"), ZeroDivisionError("z")])
def test_whatever_the_function_raises_is_told_with_its_line(error: Exception, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=rf"fails on inputs \[7, 5\]: {type(error).__name__}.*test_checked\.py:\d+"):
        export_onnx(throws(error), [rows(2)], tmp_path / "m.onnx")


READS: dict[str, Function] = {
    "a number": lambda x: x * x.sum().item(),
    "a list": lambda x: x * torch.tensor(x[0].tolist()),
    "an array": lambda x: torch.from_numpy(x.numpy()) * 2,
    "a branch": lambda x: x if x.sum() > 0 else -x,
}


@pytest.mark.parametrize("kind", READS)
def test_values_that_are_read_are_told_with_the_line(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"value.*test_checked\.py:\d+"):
        export_onnx(READS[kind], [rows(2)], tmp_path / "m.onnx")


def test_the_report_tells_what_was_compared(tmp_path: Path) -> None:
    report: dict[str, Any] = {}
    export_onnx(lambda x: x.softmax(1), [rows(2)], tmp_path / "m.onnx", report=report)
    assert report["batches"] == [1, 3, 8]
    assert report["worst"] < report["tolerance"] == 1e-4
    assert report["left_out"] == {}
    assert report["versions"]["onnxruntime"]


def test_sizes_beyond_the_memory_are_left_out_by_name(tmp_path: Path) -> None:
    report: dict[str, Any] = {}
    with pytest.warns(UserWarning, match=r"not compared with the function: batch 8 takes about"):
        export_onnx(lambda x: x.exp() * 2, [torch.rand(2, 1000)], tmp_path / "m.onnx", memory=40_000, report=report)
    assert report["batches"] == [1, 3]
    assert list(report["left_out"]) == ["8"]


def test_a_batch_that_the_function_cannot_take_is_left_out_by_name(tmp_path: Path) -> None:
    fn = lambda x: x.topk(3, 0)[0].sum(0) + x  # noqa: E731
    with pytest.warns(
        UserWarning, match=r"batch 1 cannot be run by the function itself \(selected index k out of range"
    ):
        path = export_onnx(fn, [rows(4)], tmp_path / "m.onnx")
    torch.testing.assert_close(run(path, rows(8))[0], fn(rows(8)))


def test_without_onnxruntime_the_file_is_written_and_that_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.warns(UserWarning, match="onnxruntime is not installed"):
        export_onnx(lambda x: x * 2, [rows(2)], tmp_path / "m.onnx")
    assert (tmp_path / "m.onnx").exists()


def wrong(g: Any, node: Any, x: Any) -> Any:
    return g.op("Mul", g.op("Tanh", x), g.constant(1.01, torch.float32))


def misshapen(g: Any, node: Any, x: Any) -> Any:
    return g.op("Reshape", g.op("Tanh", x), g.constant([7, 3]))


@pytest.mark.parametrize(
    ("broken", "said"),
    [(wrong, "aten.tanh.default comes out differently in ONNX Runtime"), (misshapen, "cannot load|invalid|fails")],
)
def test_a_wrong_operator_is_named_with_its_line(
    broken: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(lowering.LOWERINGS, torch.ops.aten.tanh.default, broken)
    (tmp_path / "m.onnx").write_text("what was there before")
    with pytest.raises(ExportError, match=rf"({said}).*test_checked\.py:\d+"):
        export_onnx(lambda x: (x + 1).tanh().exp(), [rows(2)], tmp_path / "m.onnx")
    assert [p.name for p in tmp_path.iterdir()] == ["m.onnx"]
    assert (tmp_path / "m.onnx").read_text() == "what was there before"


def test_a_path_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(ExportError, match=r"m\.onnx: cannot be written"):
        export_onnx(lambda x: x * 2, [rows(2)], tmp_path / "file" / "m.onnx")


def test_inputs_are_drawn_from_the_examples_own_ranges() -> None:
    examples = [
        torch.rand(2, 3) * 4 + 2,
        torch.tensor([3, 9]),
        torch.zeros(2),
        torch.tensor([True, False]),
        torch.ones(5),
    ]
    x, i, zero, flag, other = sample(examples, [0, 1, 2, 3], 50, seed=0)
    assert 2 <= x.min() < x.max() <= 6
    assert {*i.tolist()} <= set(range(3, 10))
    assert x.shape == (50, 3)
    assert zero.max() > 0
    assert flag.dtype == torch.bool
    assert other is examples[4]


def test_rounding_is_told_from_faults() -> None:
    """Ties and noise around zero are left out; a result that is really another is not."""
    x = torch.rand(4, 6)
    ties = compare(
        [torch.tensor([0, 1, 0, 0])], lambda x: (x * 0 + torch.tensor([[1.0, 1.0]] * 4)).argmax(1), [x[:, :2]]
    )
    assert ties.fault
    noise = compare([torch.full((4, 6), 2e-8)], lambda x: (x * 3 - x - x - x) + 1e-9 * x, [x])
    assert not noise.fault
    nan = compare([torch.tensor([[float("nan"), 1.0]])], lambda x: torch.tensor([[float("nan"), 1.0]]), [x])
    assert not nan.fault
    assert compare([x * 1.001], lambda v: v, [x]).fault
    assert compare([x[:3]], lambda v: v, [x]).fault
    assert compare([x.double()], lambda v: v, [x]).fault
    assert compare([x * float("nan")], lambda v: v, [x]).fault


def test_a_kink_that_rounding_has_crossed_is_no_fault() -> None:
    """A step just beside every sample, on whose other side the file is: few nudges would not reach it for all."""
    x = torch.linspace(1, 2, 8)[:, None]
    step = x * (1 + 2e-7)
    found = compare([torch.ones(8, 1)], lambda v: (v > step) * 1.0, [x])
    assert not found.fault
    assert found.unstable == 1
    apart = compare([torch.ones(8, 1)], lambda v: (v > step + 1e-5) * 1.0, [x])
    assert apart.fault
