"""xformers' attention: who gets it, what it computes, and that the modules come out as they went in."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models import attention_processor
from torch import Tensor

from counterlens.engine import Engine
from counterlens.engine.errors import UsageError
from counterlens.engine.guidance.step import GuidedStep
from counterlens.engine.models.attention import memory_efficient_attention, not_supported_reasons
from counterlens.engine.runtime.spec import Spec, flat


class Legacy(torch.autograd.Function):
    """Attention as xformers has it: a Function with everything in `forward(ctx, ...)`, which torch.func refuses."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        with torch.enable_grad():
            leaves = [x.detach().requires_grad_() for x in (q, k, v)]
            out = F.scaled_dot_product_attention(*leaves, scale=scale)
        ctx.leaves, ctx.out = leaves, out
        return out.detach()

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return *torch.autograd.grad(ctx.out, ctx.leaves, grad, retain_graph=True), None


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A stand-in for xformers, which needs a GPU; its calls are counted."""
    seen: list[int] = []

    def attend(q: Tensor, k: Tensor, v: Tensor, attn_bias: Any = None, op: Any = None, scale: float = 1.0) -> Tensor:
        assert attn_bias is None
        assert op is None
        seen.append(q.shape[1])
        return Legacy.apply(q, k, v, scale)

    ops = SimpleNamespace(memory_efficient_attention=attend)
    monkeypatch.setattr(attention_processor, "xformers", SimpleNamespace(ops=ops))
    return seen


def test_the_step_is_the_same_and_modules_are_restored(tiny: Any, calls: list[int]) -> None:
    diffusion, classifier = tiny
    inputs = Spec(*tiny).example(2)
    expected = flat(GuidedStep(diffusion, classifier, mode="autograd"))(*inputs)
    before = [m.processor for p in diffusion.modules() for m in p.modules() if hasattr(m, "processor")]
    with memory_efficient_attention(diffusion.modules()):
        got = flat(GuidedStep(diffusion, classifier, mode="autograd"))(*inputs)
        with pytest.raises(RuntimeError, match="setup_context"):
            flat(GuidedStep(diffusion, classifier, mode="functional"))(*inputs)
    assert calls
    torch.testing.assert_close(got[0], expected[0], rtol=1e-4, atol=1e-5)
    assert [m.processor for p in diffusion.modules() for m in p.modules() if hasattr(m, "processor")] == before


def test_reasons_are_told(tiny: Any) -> None:
    assert any("needs CUDA" in reason for reason in not_supported_reasons(tiny[0].modules()))
    with pytest.raises(UsageError, match=r"attention: xformers cannot be used: .*needs CUDA"):
        Engine(*tiny, attention="xformers")
    with pytest.raises(UsageError, match="attention: expected one of sdpa, xformers, got 'flash'"):
        Engine(*tiny, attention="flash")
    with pytest.raises(UsageError, match="attention: xformers runs in eager; runtime 'onnxruntime' cannot"):
        Engine(*tiny, attention="xformers", runtime="onnxruntime")


def test_other_processors_are_refused(tiny: Any) -> None:
    diffusion, _ = tiny
    layer = next(m for p in diffusion.modules() for m in p.modules() if hasattr(m, "processor"))
    before, layer.processor = layer.processor, attention_processor.SpatialNorm
    try:
        with (
            pytest.raises(UsageError, match="has no xformers form; use sdpa"),
            memory_efficient_attention(diffusion.modules()),
        ):
            pass
    finally:
        layer.processor = before


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device and xformers")
def test_xformers_itself_on_a_gpu(tiny: Any) -> None:
    pytest.importorskip("xformers", reason="needs xformers (the extra `gpu`)")
    diffusion, classifier = tiny
    modules = [*diffusion.modules(), classifier.module]
    for module in modules:
        module.cuda()
    try:
        if reasons := not_supported_reasons(diffusion.modules()):
            pytest.skip(f"needs an xformers that was built for this PyTorch: {'; '.join(reasons)}")
        inputs = Spec(*tiny).example(2)
        expected = flat(GuidedStep(diffusion, classifier, mode="autograd"))(*inputs)
        with memory_efficient_attention(diffusion.modules()):
            got = flat(GuidedStep(diffusion, classifier, mode="autograd"))(*inputs)
        torch.testing.assert_close(got[0], expected[0], rtol=1e-3, atol=1e-3)
    finally:
        for module in modules:
            module.cpu()
