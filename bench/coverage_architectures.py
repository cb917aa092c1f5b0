"""41 architectures of transformers at tiny sizes with random weights. Entries are added, never removed."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from bench.coverage_list import Entry, normal

SIZE = 32
WIDTHS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
VIT: dict[str, Any] = {**WIDTHS, "image_size": SIZE, "patch_size": 8}
DINO: dict[str, Any] = {**VIT, "mlp_ratio": 2}
STAGES: dict[str, Any] = {"hidden_sizes": [8, 16, 16, 24], "depths": [1, 1, 2, 1]}
WINDOWS: dict[str, Any] = {
    "image_size": SIZE, "patch_size": 2, "embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 4,
}  # fmt: skip
CHANNELS: dict[str, Any] = {
    "image_size": SIZE, "in_channels": [32, 8, 8], "out_channels": [8, 8, 12], "kernel_sizes": [3, 5, 3],
    "strides": [1, 2, 2], "num_block_repeats": [1, 1, 1], "expand_ratios": [1, 2, 2], "hidden_dim": 1280,
    "width_coefficient": 1.0, "depth_coefficient": 1.0, "depthwise_padding": [1],
}  # fmt: skip

# name: (configuration, model, options of the configuration, size of the image)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any], int]] = {
    "ViT": ("ViTConfig", "ViTForImageClassification", VIT, SIZE),
    "DeiT": ("DeiTConfig", "DeiTForImageClassification", VIT, SIZE),
    "BEiT": (
        "BeitConfig", "BeitForImageClassification",
        {**VIT, "use_relative_position_bias": True, "use_mask_token": False}, SIZE,
    ),
    "Data2VecVision": (
        "Data2VecVisionConfig", "Data2VecVisionForImageClassification",
        {**VIT, "use_shared_relative_position_bias": True}, SIZE,
    ),
    "DINOv2": ("Dinov2Config", "Dinov2ForImageClassification", DINO, 48),
    "DINOv2 with registers": ("Dinov2WithRegistersConfig", "Dinov2WithRegistersForImageClassification", DINO, SIZE),
    "DINOv3 ViT": ("DINOv3ViTConfig", "DINOv3ViTModel", {**VIT, "num_register_tokens": 2}, SIZE),
    "DINOv3 ConvNeXt": ("DINOv3ConvNextConfig", "DINOv3ConvNextModel", STAGES, SIZE),
    "Swin": ("SwinConfig", "SwinForImageClassification", WINDOWS, SIZE),
    "Swinv2": ("Swinv2Config", "Swinv2ForImageClassification", WINDOWS, SIZE),
    "ConvNeXt": ("ConvNextConfig", "ConvNextForImageClassification", STAGES, SIZE),
    "ConvNeXtV2": ("ConvNextV2Config", "ConvNextV2ForImageClassification", STAGES, SIZE),
    "ResNet": ("ResNetConfig", "ResNetForImageClassification", {**STAGES, "embedding_size": 8}, SIZE),
    "RegNet": (
        "RegNetConfig", "RegNetForImageClassification", {**STAGES, "embedding_size": 8, "groups_width": 8}, SIZE,
    ),
    "EfficientNet": ("EfficientNetConfig", "EfficientNetForImageClassification", CHANNELS, SIZE),
    "MobileNetV1": (
        "MobileNetV1Config", "MobileNetV1ForImageClassification", {"depth_multiplier": 0.25, "image_size": SIZE}, SIZE,
    ),
    "MobileNetV2": (
        "MobileNetV2Config", "MobileNetV2ForImageClassification", {"depth_multiplier": 0.25, "image_size": SIZE}, SIZE,
    ),
    "MobileViT": (
        "MobileViTConfig", "MobileViTForImageClassification",
        {"image_size": SIZE, "hidden_sizes": [16, 24, 16], "neck_hidden_sizes": [4, 8, 8, 8, 8, 12, 16],
         "num_attention_heads": 2}, SIZE,
    ),
    "MobileViTV2": (
        "MobileViTV2Config", "MobileViTV2ForImageClassification", {"width_multiplier": 0.25, "image_size": 64}, 64,
    ),
    "LeViT": (
        "LevitConfig", "LevitForImageClassification",
        {"image_size": 64, "hidden_sizes": [16, 24, 32], "num_attention_heads": [2, 2, 2], "depths": [1, 1, 1],
         "key_dim": [8, 8, 8]}, 64,
    ),
    "CvT": (
        "CvtConfig", "CvtForImageClassification",
        {"embed_dim": [8, 16, 24], "num_heads": [1, 2, 2], "depth": [1, 2, 3], "drop_path_rate": [0.0, 0.0, 0.1]},
        SIZE,
    ),
    "PoolFormer": ("PoolFormerConfig", "PoolFormerForImageClassification", {**STAGES, "depths": [1, 1, 1, 1]}, SIZE),
    "SegFormer": (
        "SegformerConfig", "SegformerForImageClassification",
        {**STAGES, "num_attention_heads": [1, 2, 2, 4], "sr_ratios": [4, 2, 1, 1], "mlp_ratios": [2, 2, 2, 2]}, SIZE,
    ),
    "PVT": (
        "PvtConfig", "PvtForImageClassification",
        {**STAGES, "image_size": SIZE, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2],
         "sequence_reduction_ratios": [4, 2, 1, 1]}, SIZE,
    ),
    "PVTv2": (
        "PvtV2Config", "PvtV2ForImageClassification",
        {**STAGES, "image_size": SIZE, "num_attention_heads": [1, 2, 2, 4], "mlp_ratios": [2, 2, 2, 2],
         "sr_ratios": [4, 2, 1, 1]}, SIZE,
    ),
    "SwiftFormer": (
        "SwiftFormerConfig", "SwiftFormerForImageClassification",
        {"image_size": SIZE, "depths": [1, 1, 2, 1], "embed_dims": [8, 8, 12, 16], "mlp_ratio": 2}, SIZE,
    ),
    "BiT": (
        "BitConfig", "BitForImageClassification",
        {**STAGES, "embedding_size": 8, "num_groups": 2, "global_padding": "SAME"}, SIZE,
    ),
    "FocalNet": (
        "FocalNetConfig", "FocalNetForImageClassification",
        {**STAGES, "image_size": SIZE, "embed_dim": 8, "focal_levels": [2, 2, 2, 1]}, SIZE,
    ),
    "HGNetV2": (
        "HGNetV2Config", "HGNetV2ForImageClassification",
        {"embedding_size": 8, "stem_channels": [3, 8, 8], "stage_in_channels": [8, 8, 12, 16],
         "stage_mid_channels": [4, 4, 8, 8], "stage_out_channels": [8, 12, 16, 16], "stage_num_blocks": [1, 1, 1, 1],
         "stage_numb_of_layers": [2, 2, 2, 2], "hidden_sizes": [8, 12, 16, 16]}, SIZE,
    ),
    "PP-LCNet": ("PPLCNetConfig", "PPLCNetForImageClassification", {"scale": 0.25, "class_expand": 32}, SIZE),
    "TextNet": (
        "TextNetConfig", "TextNetForImageClassification",
        {"image_size": [SIZE, SIZE], "stem_out_channels": 8, "hidden_sizes": [8, 8, 8, 12, 16]}, SIZE,
    ),
    "Hiera": (
        "HieraConfig", "HieraForImageClassification",
        {"image_size": [SIZE, SIZE], "embed_dim": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2],
         "masked_unit_size": [8, 8]}, SIZE,
    ),
    "CLIP vision": ("CLIPVisionConfig", "CLIPVisionModel", VIT, SIZE),
    "SigLIP vision": ("SiglipVisionConfig", "SiglipVisionModel", VIT, SIZE),
    "MetaCLIP 2 vision": ("MetaClip2VisionConfig", "MetaClip2VisionModel", VIT, SIZE),
    "AIMv2": ("Aimv2VisionConfig", "Aimv2VisionModel", VIT, SIZE),
    "BLIP vision": ("BlipVisionConfig", "BlipVisionModel", VIT, SIZE),
    "ALIGN vision": ("AlignVisionConfig", "AlignVisionModel", CHANNELS, SIZE),
    "I-JEPA": ("IJepaConfig", "IJepaForImageClassification", VIT, SIZE),
    "ViTMSN": ("ViTMSNConfig", "ViTMSNForImageClassification", VIT, SIZE),
    "Perceiver": (
        "PerceiverConfig", "PerceiverForImageClassificationConvProcessing",
        {"num_latents": 4, "d_latents": 16, "num_self_attends_per_block": 1, "num_self_attention_heads": 2,
         "num_cross_attention_heads": 1}, SIZE,
    ),
}  # fmt: skip


class Logits(nn.Module):
    """The logits of a classifier, the pooled or last hidden states of another model."""

    def __init__(self, net: nn.Module) -> None:
        super().__init__()
        self.net = net

    def forward(self, image: Tensor) -> Tensor:
        out = self.net(image)
        for name in ("logits", "pooler_output", "last_hidden_state"):
            if isinstance(value := getattr(out, name, None), Tensor):
                return value
        raise TypeError(f"no tensor in {type(out).__name__}")


def _make(config: str, model: str, options: dict[str, Any]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        import transformers

        transformers.logging.set_verbosity_error()
        build: Any = getattr(transformers, model)
        return Logits(_spread(build(getattr(transformers, config)(**options)))).eval().requires_grad_(False)

    return make


def _spread(net: nn.Module) -> nn.Module:
    """Weights as large as trained ones: at their first values layer scales and biases hide most of a network."""
    for name, x in net.state_dict().items():
        if not x.is_floating_point():
            continue
        if name.endswith("running_var"):
            x.copy_(torch.rand_like(x) + 0.5)
        elif x.ndim < 2 and name.endswith("weight"):
            x.copy_(1 + torch.randn_like(x) * 0.1)
        elif x.ndim < 2:
            x.copy_(torch.randn_like(x) * 0.2 + (0.5 if "scale" in name or "gamma" in name else 0))
        else:
            x.copy_(torch.randn_like(x) * math.sqrt(2 / max(1, x[0].numel())))
    return net


ENTRIES = [
    Entry(name, "architecture", _make(config, model, options), normal(3, size, size))
    for name, (config, model, options, size) in ARCHITECTURES.items()
]
