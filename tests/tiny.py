"""Random-weight models, small enough for every test, saved to disk as the real ones are."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel, UNet2DConditionModel, VQModel
from safetensors.torch import save_file
from torch import nn

LABELS = [f"thing {i}" for i in range(10)]
IMAGE_SIZE = 16  # of every tiny model; latents are 4x4
TOKENS = {"vocab_size": 128, "max_position_embeddings": 48, "bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 1}
TOWER = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
WORDS = ["thing", "photo", "of"]


def spread(module: nn.Module, gain: float = 2.0) -> None:
    """Make conditions matter: default initialisation hardly tells them apart, and their difference would be noise."""
    for name, parameter in module.named_parameters():
        if "attn2" in name or "embed" in name or "emb." in name:
            parameter.data.mul_(gain)


def tiny_kl() -> AutoencoderKL:
    """An autoencoder from 16x16 pixels to 4x4 latents of 4 channels."""
    return AutoencoderKL(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        norm_num_groups=4,
        latent_channels=4,
        sample_size=IMAGE_SIZE,
        scaling_factor=0.18215,
    )


def tiny_unet(channels: int, width: int, seed: int = 0) -> UNet2DConditionModel:
    """A text- or class-context UNet with attention at the lower of two levels."""
    torch.manual_seed(seed)
    unet = UNet2DConditionModel(
        sample_size=4,
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=width,
        attention_head_dim=8,
        norm_num_groups=4,
    )
    spread(unet)
    return unet


def save_tokenizer(folder: Path, words: list[str]) -> None:
    """A CLIP tokenizer that knows letters and a few whole words."""
    from transformers import CLIPTokenizer

    letters = [*"abcdefghijklmnopqrstuvwxyz0123456789.,-'"]
    vocab = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{c}</w>" for c in letters), *(f"{w}</w>" for w in words)]
    tokenizer = CLIPTokenizer(vocab={t: i for i, t in enumerate(vocab)}, merges=[], model_max_length=48)
    tokenizer.save_pretrained(folder)


def save_clip_text(folder: Path, suffix: str = "", projected: bool = False, *, seed: int) -> None:
    """A CLIP text tower and its tokenizer."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    save_tokenizer(folder / f"tokenizer{suffix}", WORDS)
    torch.manual_seed(seed)
    config = CLIPTextConfig(**TOWER, **TOKENS, projection_dim=TOWER["hidden_size"])
    text = (CLIPTextModelWithProjection if projected else CLIPTextModel)(config)
    for name, parameter in text.named_parameters():
        if "token_embedding" in name:
            nn.init.normal_(parameter, std=1.0)
    text.save_pretrained(folder / f"text_encoder{suffix}")


def save_scheduler(folder: Path, prediction: str = "epsilon", schedule: str = "scaled_linear") -> None:
    """The scheduler's configuration, as diffusers writes it."""
    start, end = (0.00085, 0.012) if schedule == "scaled_linear" else (1e-4, 0.02)
    DDIMScheduler(beta_start=start, beta_end=end, beta_schedule=schedule, prediction_type=prediction).save_pretrained(
        folder / "scheduler"
    )


def save_stable_diffusion(folder: Path, prediction: str = "epsilon") -> Path:
    """A Stable Diffusion folder: CLIP text encoder and tokenizer, UNet2DConditionModel, AutoencoderKL."""
    save_clip_text(folder, seed=1)
    tiny_kl().save_pretrained(folder / "vae")
    tiny_unet(4, 16).save_pretrained(folder / "unet")
    save_scheduler(folder, prediction)
    index = {
        "_class_name": "StableDiffusionPipeline",
        "scheduler": ["diffusers", "DDIMScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def tiny_vq() -> VQModel:
    """A VQ-f4 first stage like cin256's, with 32 codes of 3 channels."""
    torch.manual_seed(2)
    vq = VQModel(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=2,
        norm_num_groups=4,
        latent_channels=3,
        sample_size=IMAGE_SIZE,
        num_vq_embeddings=32,
        vq_embed_dim=3,
        scaling_factor=1.0,
    )
    nn.init.normal_(vq.quantize.embedding.weight, std=1.0)
    return vq


def save_ldm(folder: Path, classes: int = 10) -> Path:
    """A class-conditional LDM folder as `counterlens convert` writes it: VQModel, UNet, class embedder."""
    tiny_vq().save_pretrained(folder / "vqvae")
    tiny_unet(3, 16, seed=3).save_pretrained(folder / "unet")
    embedder = folder / "class_embedder"
    embedder.mkdir(parents=True, exist_ok=True)
    save_file({"embedding.weight": torch.randn(classes + 1, 16)}, embedder / "model.safetensors")
    (embedder / "config.json").write_text(json.dumps({"classes": classes + 1, "width": 16}))
    save_scheduler(folder)
    index = {"_class_name": "ClassContextLatentDiffusion", "id2label": dict(enumerate(LABELS))}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


def save_dit(folder: Path) -> Path:
    """A DiT folder: DiTTransformer2DModel with learned variance, AutoencoderKL."""
    torch.manual_seed(4)
    transformer = DiTTransformer2DModel(
        num_attention_heads=2,
        attention_head_dim=8,
        in_channels=4,
        out_channels=8,
        num_layers=2,
        sample_size=4,
        patch_size=2,
        num_embeds_ada_norm=10,
    )
    spread(transformer)
    for name, parameter in transformer.named_parameters():
        if "class_embedder" in name:
            nn.init.normal_(parameter, std=1.0)
    transformer.save_pretrained(folder / "transformer")
    tiny_kl().save_pretrained(folder / "vae")
    save_scheduler(folder, schedule="linear")
    index = {
        "_class_name": "DiTPipeline",
        "id2label": dict(enumerate(LABELS)),
        "scheduler": ["diffusers", "DDIMScheduler"],
        "transformer": ["diffusers", "DiTTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


CLASSIFIER_SIZE = 24  # unlike the diffusion models' images, so that every preprocessing resizes
NAMES = {"id2label": dict(enumerate(LABELS)), "label2id": {name: i for i, name in enumerate(LABELS)}}
IMAGENET = {"image_mean": [0.485, 0.456, 0.406], "image_std": [0.229, 0.224, 0.225]}


def save_processor(folder: Path, kind: str, **fields: object) -> None:
    """preprocessor_config.json, as the hub has it."""
    config = {"image_processor_type": kind, "do_resize": True, "do_normalize": True, "do_rescale": True}
    config |= {"rescale_factor": 1 / 255, **IMAGENET, **fields}
    (folder / "preprocessor_config.json").write_text(json.dumps(config))


def wider(module: nn.Module, gain: float = 3.0) -> nn.Module:
    """Random weights large enough for logits that differ between images."""
    for parameter in module.parameters():
        if parameter.ndim > 1:
            parameter.data.mul_(gain)
    return module


def save_resnet(folder: Path, labels: int = 10) -> Path:
    """ResNetForImageClassification with max pooling and batch normalisation; resized to 27, cropped to 24."""
    from transformers import ResNetConfig, ResNetForImageClassification

    torch.manual_seed(5)
    names = NAMES if labels == 10 else {"num_labels": labels}
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 16], depths=[1, 1], layer_type="basic", **names)
    ResNetForImageClassification(config).save_pretrained(folder)
    save_processor(
        folder, "ConvNextImageProcessor", size={"shortest_edge": CLASSIFIER_SIZE}, crop_pct=0.875, resample=3
    )
    return folder


def save_vit(folder: Path) -> Path:
    """ViTForImageClassification with patches of 8 pixels."""
    from transformers import ViTConfig, ViTForImageClassification

    torch.manual_seed(6)
    config = ViTConfig(**TOWER, image_size=CLASSIFIER_SIZE, patch_size=8, **NAMES)
    wider(ViTForImageClassification(config)).save_pretrained(folder)
    save_processor(folder, "ViTImageProcessor", size={"height": CLASSIFIER_SIZE, "width": CLASSIFIER_SIZE}, resample=2)
    return folder


def save_dino(folder: Path, times: int = 2) -> Path:
    """Dinov2Model and, in head.safetensors, a linear head on `times` times its width."""
    from transformers import Dinov2Config, Dinov2Model

    torch.manual_seed(7)
    config = Dinov2Config(
        hidden_size=16,
        num_hidden_layers=4,
        num_attention_heads=2,
        mlp_ratio=2,
        image_size=CLASSIFIER_SIZE,
        patch_size=8,
    )
    wider(Dinov2Model(config)).save_pretrained(folder)
    size, crop = {"shortest_edge": 28}, {"height": CLASSIFIER_SIZE, "width": CLASSIFIER_SIZE}
    save_processor(folder, "BitImageProcessor", size=size, crop_size=crop, do_center_crop=True, resample=3)
    head = {"linear.weight": torch.randn(10, 16 * times), "linear.bias": torch.randn(10)}
    save_file(head, folder / "head.safetensors")
    return folder


def save_clip(folder: Path) -> Path:
    """CLIPModel with its tokenizer; logit scale 100."""
    from transformers import CLIPConfig, CLIPModel

    torch.manual_seed(8)
    vision = {**TOWER, "image_size": CLASSIFIER_SIZE, "patch_size": 8}
    model = CLIPModel(CLIPConfig(text_config={**TOWER, **TOKENS}, vision_config=vision, projection_dim=16))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    nn.init.constant_(model.logit_scale, 4.6052)
    wider(model.vision_model)
    model.save_pretrained(folder)
    save_tokenizer(folder, WORDS)
    size = {"height": CLASSIFIER_SIZE, "width": CLASSIFIER_SIZE}
    save_processor(
        folder, "CLIPImageProcessor", size={"shortest_edge": CLASSIFIER_SIZE}, crop_size=size, do_center_crop=True,
        resample=3,
    )  # fmt: skip
    return folder


def save_siglip(folder: Path) -> Path:
    """SiglipModel with a tokenizer."""
    from transformers import SiglipConfig, SiglipModel

    torch.manual_seed(9)
    vision = {**TOWER, "image_size": CLASSIFIER_SIZE, "patch_size": 8}
    model = SiglipModel(SiglipConfig(text_config={**TOWER, **TOKENS}, vision_config=vision))
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight)
    nn.init.constant_(model.logit_scale, 2.0)
    nn.init.constant_(model.logit_bias, -1.0)
    model.save_pretrained(folder)
    save_tokenizer(folder, WORDS)
    save_processor(
        folder, "SiglipImageProcessor", size={"height": CLASSIFIER_SIZE, "width": CLASSIFIER_SIZE}, resample=3
    )
    return folder


DIFFUSIONS = {
    "sd-eps": save_stable_diffusion,
    "sd-v": lambda folder: save_stable_diffusion(folder, "v_prediction"),
    "ldm": save_ldm,
    "dit": save_dit,
}
