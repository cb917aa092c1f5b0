"""Gradient graphs of architectures that people have, from one dynamic file each, at batch 1, 3 and 8."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from counterlens.export import export_onnx
from tests.export.test_onnx import assert_matches, input_gradient

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="needs transformers"),
]


class Logits(nn.Module):
    """A Hugging Face classifier as images to logits."""

    def __init__(self, model: nn.Module, field: str = "logits") -> None:
        super().__init__()
        self.model = model
        self.field = field

    def forward(self, pixels: Tensor) -> Tensor:
        return getattr(self.model(pixel_values=pixels), self.field)


def resnet() -> nn.Module:
    from transformers import ResNetConfig, ResNetForImageClassification

    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", num_labels=5)
    model = ResNetForImageClassification(config)
    for module in model.modules():  # running statistics that are not just 0 and 1
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.2)
            module.running_var.uniform_(0.5, 2.0)
    return Logits(model)


def vit() -> nn.Module:
    from transformers import ViTConfig, ViTForImageClassification

    return Logits(ViTForImageClassification(ViTConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=2, intermediate_size=48, image_size=32, patch_size=8, num_labels=5)))  # fmt: skip # noqa: E501


def convnext() -> nn.Module:
    from transformers import ConvNextConfig, ConvNextForImageClassification

    config = ConvNextConfig(hidden_sizes=[8, 16], depths=[1, 1], num_stages=2, num_labels=5, layer_scale_init_value=0.5)
    return Logits(ConvNextForImageClassification(config))


def swin() -> nn.Module:
    from transformers import SwinConfig, SwinForImageClassification

    config = SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[2, 1], num_heads=[2, 4], window_size=4, num_labels=5)  # fmt: skip # noqa: E501
    return Logits(SwinForImageClassification(config))


def clip() -> nn.Module:
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    config = CLIPVisionConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, image_size=32, patch_size=8, projection_dim=16)  # fmt: skip # noqa: E501
    return Logits(CLIPVisionModelWithProjection(config), "image_embeds")


@pytest.mark.parametrize("make", [resnet, vit, convnext, swin, clip], ids=lambda f: f.__name__)
def test_image_models(make: Callable[[], nn.Module], tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = make().eval().requires_grad_(False)
    assert_matches(input_gradient(net), lambda b: [torch.randn(b, 3, 32, 32)], tmp_path)


def test_cross_attention_block_with_geglu(tmp_path: Path) -> None:
    from diffusers.models.attention import BasicTransformerBlock

    torch.manual_seed(0)
    block = BasicTransformerBlock(16, 2, 8, cross_attention_dim=12, activation_fn="geglu").eval().requires_grad_(False)

    def fn(x: Tensor, context: Tensor) -> tuple[Tensor, ...]:
        y, pull = torch.func.vjp(lambda v: block(v, encoder_hidden_states=context), x)
        return y, pull(torch.cos(y))[0]

    assert_matches(fn, lambda b: [torch.randn(b, 9, 16), torch.randn(b, 5, 12)], tmp_path)


def test_dit_block(tmp_path: Path) -> None:
    from diffusers import DiTTransformer2DModel

    torch.manual_seed(0)
    net = DiTTransformer2DModel(num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=1, sample_size=8, patch_size=2, num_embeds_ada_norm=10, norm_num_groups=4).eval().requires_grad_(False)  # fmt: skip # noqa: E501

    def fn(z: Tensor, t: Tensor, c: Tensor) -> tuple[Tensor, ...]:
        y, pull = torch.func.vjp(lambda v: net(v, timestep=t, class_labels=c).sample, z)
        return y, pull(torch.cos(y))[0]

    def make(b: int) -> list[Tensor]:
        return [torch.randn(b, 4, 8, 8), torch.randint(0, 999, (b,)), torch.randint(0, 10, (b,))]

    assert_matches(fn, make, tmp_path)


def test_vq_decoder_straight_through(tmp_path: Path) -> None:
    from diffusers import VQModel

    torch.manual_seed(0)
    vq = VQModel(block_out_channels=(8, 8), down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, latent_channels=3, num_vq_embeddings=16, norm_num_groups=4, layers_per_block=1, sample_size=16).eval().requires_grad_(False)  # fmt: skip # noqa: E501

    def decode(z: Tensor) -> Tensor:
        rows = z.permute(0, 2, 3, 1).reshape(-1, 3)
        code = vq.quantize.embedding.weight
        nearest = (rows.square().sum(1, keepdim=True) - 2 * rows @ code.T + code.square().sum(1)).argmin(1)
        quantized = code[nearest].reshape(z.shape[0], *z.shape[2:], 3).permute(0, 3, 1, 2)
        through = z + (quantized - z).detach()
        return vq.decoder(vq.post_quant_conv(through))

    assert_matches(input_gradient(decode), lambda b: [torch.randn(b, 3, 8, 8) / 4], tmp_path)


def test_hessian_vector_product_of_a_classifier(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = vit().eval().requires_grad_(False)

    def fn(x: Tensor, v: Tensor) -> tuple[Any, ...]:
        gradient = torch.func.grad(lambda y: torch.log_softmax(net(y), 1)[:, 0].sum())
        with sdpa_kernel(SDPBackend.MATH):  # the fused one has no second derivative
            return (torch.func.vjp(gradient, x)[1](v)[0],)  # the Hessian is symmetric

    assert_matches(fn, lambda b: [torch.randn(b, 3, 32, 32), torch.randn(b, 3, 32, 32)], tmp_path)


def test_export_names_its_file(tmp_path: Path) -> None:
    net = convnext().eval().requires_grad_(False)
    assert export_onnx(net, [torch.randn(2, 3, 32, 32)], tmp_path / "m.onnx") == tmp_path / "m.onnx"
