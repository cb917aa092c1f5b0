"""Image processors of transformers, measured: the same pixels as theirs on a picture of ours, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from counterlens.engine.errors import CounterlensError, UsageError
from counterlens.engine.models.image_classifiers import open_classifier
from counterlens.engine.models.preprocessing import from_processor
from tests import tiny

transformers = pytest.importorskip("transformers", reason="needs transformers (the extra `models`)")
SIZES = (48, 65)


def square(side: int) -> dict[str, int]:
    return {"height": side, "width": side}


SHORT, CROP = {"shortest_edge": 40}, {"do_center_crop": True, "crop_size": square(36)}
# Fields that change pixels, each in a class that honours it.
SAME: dict[str, tuple[str, dict[str, Any]]] = {
    "vit, bicubic": ("ViT", {"size": square(40), "resample": 3}),
    "vit, lanczos": ("ViT", {"size": square(40), "resample": 1}),
    "vit, nearest": ("ViT", {"size": square(40), "resample": 0}),
    "vit, box": ("ViT", {"size": square(40), "resample": 4}),
    "vit, hamming": ("ViT", {"size": square(40), "resample": 5}),
    "vit, not square": ("ViT", {"size": {"height": 40, "width": 52}}),
    "vit, not resized": ("ViT", {"do_resize": False}),
    "vit, not normalised": ("ViT", {"do_normalize": False, "size": square(40)}),
    "vit, not rescaled": ("ViT", {"do_rescale": False, "size": square(40)}),
    "vit, -1 to 1": ("ViT", {"rescale_factor": 1 / 127.5, "image_mean": [1.0] * 3, "image_std": [1.0] * 3}),
    "vit, mean and std of one number": ("ViT", {"image_mean": 0.4, "image_std": 0.3, "size": square(40)}),
    "levit, 256/224": ("Levit", {"size": {"shortest_edge": 35}, **CROP}),
    "levit, height and width": ("Levit", {"size": square(35), **CROP}),
    "efficientnet, normalised twice": ("EfficientNet", {"size": square(40), "include_top": True}),
    "efficientnet, offset": ("EfficientNet", {"size": square(40), "include_top": False, "rescale_offset": True}),
    "efficientnet, offset and twice": ("EfficientNet", {"size": square(40), "rescale_offset": True, **CROP}),
    "mobilevit, BGR": ("MobileViT", {"size": SHORT, "do_flip_channel_order": True, **CROP}),
    "mobilevit, RGB": ("MobileViT", {"size": SHORT, "do_flip_channel_order": False, **CROP}),
    "mobilevit, crop larger than the image": ("MobileViT", {"size": SHORT, "crop_size": square(47)}),
    "poolformer, shortest edge": ("PoolFormer", {"size": SHORT, "crop_pct": 0.8, "crop_size": square(40)}),
    "poolformer, height and width": ("PoolFormer", {"size": square(40), "crop_pct": 0.8, "crop_size": square(40)}),
    "poolformer, without crop_pct": ("PoolFormer", {"size": SHORT, "crop_pct": None, **CROP}),
    "dpt, multiples": ("DPT", {"size": square(40), "ensure_multiple_of": 16, "keep_aspect_ratio": True}),
    "convnext, resized and cropped": ("ConvNext", {"size": SHORT, "crop_pct": 0.7}),
    "convnext, warped": ("ConvNext", {"size": {"shortest_edge": 384}, "crop_pct": 0.7}),
    "clip": ("CLIP", {"size": SHORT, "crop_size": square(36)}),
    "vilt, both edges": ("Vilt", {"size": {"shortest_edge": 90}, "size_divisor": 32}),
    "glpn, divisor": ("GLPN", {"size_divisor": 32}),
    "chameleon, its factor": ("Chameleon", {"size": SHORT, "crop_size": square(36)}),
    "detr, two edges": ("Detr", {"size": {"shortest_edge": 40, "longest_edge": 38}}),
    "beit, reduced labels": ("Beit", {"size": square(40), "do_reduce_labels": True}),
}
REFUSED = {
    "bit, two means": ("Bit", {"image_mean": [0.5, 0.5], "image_std": [0.5, 0.5]}, "fails on one image"),
    "dpt, grey borders": ("DPT", {"size": square(40), "do_pad": True, "size_divisor": 16}, "size_divisor=16"),
    "vit, resample": ("ViT", {"resample": 9}, "resample 9"),
    "nougat, margins cropped": ("Nougat", {"size": square(40), "do_crop_margin": True}, "do_crop_margin"),
    "perceiver, cropped first": ("Perceiver", {}, "does more than"),
    "zoedepth, another filter": ("ZoeDepth", {}, "ensure_multiple_of"),
    "swin2sr, reflected borders": ("Swin2SR", {"size_divisor": 40}, "size_divisor"),
    "imagegpt, clusters": ("ImageGPT", {"clusters": np.zeros((8, 3)).tolist()}, "one image of"),
    "siglip2, patches": ("Siglip2", {}, r"makes \[1, 256, 768\]"),
}


def picture(size: int) -> Image.Image:
    """Shapes and a gradient, away from black and white, where processors clip what filters overshoot."""
    y, x = np.mgrid[0:size, 0:size] / size
    planes = [0.3 + 0.4 * x, 0.3 + 0.4 * ((x - 0.5) ** 2 + (y - 0.5) ** 2 < 0.1), 0.5 + 0.2 * np.sin(12 * x * y)]
    return Image.fromarray((np.stack(planes, -1) * 255).round().astype(np.uint8))


def make(kind: str, fields: dict[str, Any]) -> Any:
    return getattr(transformers, f"{kind}ImageProcessor")(**fields)


def close(processor: Any, size: int) -> None:
    """Within the rounding of 8 bits, in units of the processor's own normalisation."""
    image = picture(size)
    ours = from_processor(processor, size)
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    expected = processor(image, return_tensors="pt")["pixel_values"]
    apart = (ours(x) - expected).abs() * ours.std
    assert apart.max() < 3 / 255
    assert apart.mean() < 0.5 / 255


@pytest.mark.parametrize("name", SAME)
def test_every_field_that_changes_pixels_is_honoured(name: str) -> None:
    for size in SIZES:
        close(make(*SAME[name]), size)


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_done_is_refused_by_name(name: str) -> None:
    kind, fields, words = REFUSED[name]
    with pytest.raises(UsageError, match=rf"^preprocessing: {kind}ImageProcessor .*{words}") as caught:
        from_processor(make(kind, fields), 48)
    assert "\n" not in str(caught.value)


def known_processors() -> list[str]:
    from transformers.models.auto.image_processing_auto import IMAGE_PROCESSOR_MAPPING_NAMES as names

    return sorted({v["pil"] for v in names.values() if isinstance(v, dict) and "pil" in v})


@pytest.mark.slow
def test_every_processor_of_transformers_is_matched_or_refused() -> None:
    """As they are without arguments; those that need a package which is not here, or arguments, are left out."""
    same, refused = 0, []
    for name in known_processors():
        try:
            processor = getattr(transformers, name)()
        except (ImportError, TypeError, ValueError):
            continue
        try:
            close(processor, 48)
        except UsageError as error:
            refused.append((name.removesuffix("Pil"), str(error)))
        else:
            same += 1
    for name, message in refused:
        assert message.startswith(f"preprocessing: {name}")
    assert same >= 40


class Unknown:
    """Somebody's own processor: what it does beyond its fields decides."""

    def __init__(self, **does: float) -> None:
        self.does = does
        self.gamma = does.get("gamma", 1.0)

    def __call__(self, image: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
        if self.does.get("grey"):
            x = x.mean(1, keepdim=True).expand(-1, 3, -1, -1)
        if self.does.get("stretched"):
            x = (x - x.min()) / (x.max() - x.min()).clamp(min=1e-3)
        if self.does.get("blurred"):
            x = torch.nn.functional.avg_pool2d(x, 3, 1, 1, count_include_pad=False)
        if self.does.get("inverted"):
            x = 1 - x
        return {"pixel_values": x**self.gamma}


@pytest.mark.parametrize("does", ["gamma", "grey", "stretched", "blurred", "inverted"])
def test_unknown_steps_are_seen_in_the_pixels(does: str) -> None:
    close(Unknown(), 48)
    with pytest.raises(UsageError, match=r"^preprocessing: Unknown (does more|mixes or bends)"):
        from_processor(Unknown(**{does: 2.2}), 48)


@pytest.mark.parametrize("name", ["levit, 256/224", "efficientnet, offset", "mobilevit, BGR", "vit, -1 to 1"])
def test_a_folders_classifier_sees_its_processors_pixels(tmp_path: Path, name: str) -> None:
    folder = tiny.save_resnet(tmp_path / "resnet")
    make(*SAME[name]).save_pretrained(folder)
    classifier = open_classifier(folder, image_size=48)
    image = picture(48)
    pixels = transformers.AutoImageProcessor.from_pretrained(folder)(image, return_tensors="pt")["pixel_values"]
    model = transformers.AutoModelForImageClassification.from_pretrained(folder).eval()
    x = torch.from_numpy(np.asarray(image, dtype=np.float32) / 255).permute(2, 0, 1)[None]
    torch.testing.assert_close(classifier.logits(x), model(pixels).logits, rtol=0.02, atol=0.02)


@pytest.mark.parametrize("kind", ["NobodysImageProcessor", "TimmWrapperImageProcessor", None])
def test_processors_that_cannot_be_opened_are_named(tmp_path: Path, kind: str | None) -> None:
    folder = tiny.save_vit(tmp_path / "vit")
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_processor_type": kind} if kind else [1]))
    with pytest.raises(CounterlensError, match=r"preprocessor_config\.json") as caught:
        open_classifier(folder, image_size=48)
    assert "\n" not in str(caught.value)
