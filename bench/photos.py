"""Does `--fit auto` show a classifier what its own pipeline shows it? Twenty generated files, of every kind.

    python -m bench.photos                    # measures; bench/results/photos.json with --record
    python -m bench.photos --keep photos      # also leaves the files and the models there

Four small classifiers in the true on-disk formats, with processors that squash (ViT, SigLIP) and that crop (ConvNeXt by
its crop_pct, CLIP), are trained for a minute each on generated classes: a colour and a texture that fill the picture.
Random weights would do for neither: their margins are near 0.05 whatever they see. What is compared with is not ours:
Pillow, transformers' own `load_image`, processor and model.
"""

from __future__ import annotations

import json
import os
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
import typer
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from counterlens.engine import Config, Engine
from tests import tiny

from .colour_profiles import ADOBE_RGB, DISPLAY_P3, GREY, SRGB, Space, cmyk_profile, matrix_profile
from .record import say, write_result

SIDE = 64  # of what the classifiers see
IMAGE_SIZE = 128  # of what the diffusion model makes
LABELS = ["red rows", "green rows", "blue rows", "red dots", "green dots", "blue dots"]
COLOURS = np.array([[190, 70, 60], [70, 165, 80], [65, 90, 190]], dtype=np.float64)
MARGIN = 0.05  # of the own pipeline's two likeliest labels; below it nothing is asked
ASKED = 19
POOL = 400  # pictures that each classifier is trained on


def draw(label: int, width: int, height: int, rng: np.random.Generator) -> NDArray[np.uint8]:
    """A picture of a class: rows or dots in a colour, on a ground with a slope of light, grain and a dark edge."""
    short = min(width, height)
    y, x = np.mgrid[:height, :width] / short
    period = rng.uniform(0.16, 0.24)
    phase = rng.uniform(0, 1, 2)
    rows = np.sin(2 * np.pi * (y / period + phase[0]))
    if label >= 3:
        rows = np.minimum(rows, np.sin(2 * np.pi * (x / period + phase[1]))) + 0.3
    ink = 1 / (1 + np.exp(-6 * rows))
    light = 1 + 0.15 * (rng.uniform(-1, 1) * x / (width / short) + rng.uniform(-1, 1) * y / (height / short))
    ground = np.array([150.0, 150, 150]) + rng.uniform(-25, 25, 3)
    colour = COLOURS[label % 3] + rng.uniform(-20, 20, 3)
    out = (ground + (colour - ground) * ink[..., None]) * light[..., None]
    out += rng.normal(0, 5, (height, width, 1))
    edge = int(width * 0.55)
    out[: height // 3, edge : edge + max(2, width // 60)] *= 0.4
    return np.asarray(out.clip(0, 255).round(), dtype=np.uint8)


def moved(pixels: NDArray[np.uint8], space: Space) -> NDArray[np.uint8]:
    """The numbers that say in a space what these say in sRGB."""
    light = SRGB.decode(pixels / 255) @ (np.linalg.inv(space.to_xyz()) @ SRGB.to_xyz()).T
    light = light.clip(0, 1)
    if space.gamma is not None:
        values = light ** (1 / space.gamma)
    else:
        values = np.where(light <= 0.0031308, 12.92 * light, 1.055 * light ** (1 / 2.4) - 0.055)
    return np.asarray((255 * values).round(), dtype=np.uint8)


TURNED: dict[int, Callable[[NDArray[np.uint8]], NDArray[np.uint8]]] = {  # stored so that EXIF's turn is upright
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1],
    5: lambda a: a.transpose(1, 0, 2), 6: lambda a: np.rot90(a), 7: lambda a: np.rot90(a[:, ::-1], -1),
    8: lambda a: np.rot90(a, -1),
}  # fmt: skip


def save_files(folder: Path, seed: int = 0, drawn: dict[str, NDArray[np.uint8]] | None = None) -> dict[str, int]:
    """Twenty files in every mode, size and profile, with their labels; the same for the same seed.

    `drawn` is filled with what each of them shows, in sRGB and upright.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    labels: dict[str, int] = {}

    def add(name: str, width: int, height: int, change: Callable[[Image.Image], Image.Image] = lambda i: i,
            turn: int | None = None, space: Space | None = None, **options: Any) -> None:  # fmt: skip
        label = len(labels) % len(LABELS)
        pixels = draw(label, width, height, rng)
        if drawn is not None:
            drawn[name] = pixels
        if space is not None:
            pixels, options["icc_profile"] = moved(pixels, space), matrix_profile(space)
        if turn is not None:
            pixels = TURNED[turn](pixels)
            exif = Image.Exif()
            exif[0x0112] = turn
            options["exif"] = exif.tobytes() if name.endswith((".heic", ".avif")) else exif
        change(Image.fromarray(np.ascontiguousarray(pixels))).save(folder / name, **options)
        labels[name] = label

    def corners(image: Image.Image) -> Image.Image:
        """Round corners, as of a window."""
        alpha = Image.new("L", image.size, 255)
        radius = min(image.size) // 6
        y, x = np.mgrid[:radius, :radius]
        quarter = np.where((radius - x) ** 2 + (radius - y) ** 2 > radius**2, 0, 255).astype(np.uint8)
        for flip_x in (False, True):
            for flip_y in (False, True):
                part = quarter[:: -1 if flip_y else 1, :: -1 if flip_x else 1]
                place = (image.width - radius if flip_x else 0, image.height - radius if flip_y else 0)
                alpha.paste(Image.fromarray(np.ascontiguousarray(part)), place)
        image = image.copy()
        image.putalpha(alpha)
        return image

    def deep(image: Image.Image) -> Image.Image:
        return Image.fromarray(np.asarray(image.convert("L"), dtype=np.uint16) * 257)

    add("01 landscape.jpg", 960, 640, turn=1, quality=92)
    add("02 upside down.jpg", 640, 900, turn=3, quality=90)
    add("03 progressive.jpg", 900, 600, turn=6, progressive=True)
    add("04 grey on its side.jpg", 800, 600, lambda i: i.convert("L"), turn=8, quality=95)
    add("05 mirrored.tif", 500, 400, turn=2, compression="tiff_deflate")
    add("06 flipped.png", 450, 300, turn=4)
    add("07 transposed.webp", 400, 640, turn=5, quality=90)
    add("08 transversed.jpg", 640, 480, turn=7, quality=90)
    add("09 grey.png", 300, 420, lambda i: i.convert("L"), icc_profile=GREY)
    add("10 grey and alpha.png", 420, 300, lambda i: corners(i).convert("LA"))
    add("11 palette.png", 600, 400, lambda i: i.quantize(64))
    add("12 palette, clear.png", 400, 600, lambda i: corners(i).quantize(64))
    add("13 rgba.png", 512, 384, corners)
    add("14 inks.jpg", 480, 640, lambda i: i.convert("CMYK"), quality=95, icc_profile=cmyk_profile())
    add("15 sixteen bits.png", 640, 480, deep)
    add("16 display p3.jpg", 1008, 756, space=DISPLAY_P3, quality=95)
    add("17 adobe rgb.tif", 600, 800, space=ADOBE_RGB)
    add("18 panorama.avif", 1200, 300, quality=90)
    import pillow_heif

    pillow_heif.register_heif_opener()
    add("19 telephone.heic", 756, 1008, space=DISPLAY_P3, quality=90)
    add("20 tiny.webp", 30, 24, lossless=True)
    return labels


# The classifiers, in their own formats


def _save_models(folder: Path) -> dict[str, dict[str, Any]]:
    """Untrained ones of the four kinds; what `open_classifier` needs beside the folder."""
    import transformers as t

    size = {"height": SIDE, "width": SIDE}
    names = {"id2label": dict(enumerate(LABELS)), "label2id": {n: i for i, n in enumerate(LABELS)}}
    tower = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4}
    eye = {**tower, "image_size": SIDE, "patch_size": 8}
    text = {**tiny.TOWER, **tiny.TOKENS}
    torch.manual_seed(0)
    made: dict[str, Any] = {
        "vit": t.ViTForImageClassification(t.ViTConfig(**eye, **names)),
        "convnext": t.ConvNextForImageClassification(
            t.ConvNextConfig(hidden_sizes=[16, 24, 32, 48], depths=[1, 1, 1, 1], **names)
        ),
        "clip": t.CLIPModel(t.CLIPConfig(text_config=text, vision_config=eye, projection_dim=32)),
        "siglip": t.SiglipModel(
            t.SiglipConfig(text_config={**text, "hidden_size": 48, "projection_size": 48}, vision_config=eye)
        ),
    }
    nn.init.constant_(made["siglip"].logit_scale, 2.0)
    nn.init.constant_(made["siglip"].logit_bias, -2.0)
    for name, model in made.items():
        model.save_pretrained(folder / name)
    tiny.save_processor(folder / "vit", "ViTImageProcessor", size=size, resample=2)
    tiny.save_processor(folder / "convnext", "ConvNextImageProcessor", size={"shortest_edge": SIDE}, crop_pct=0.875,
                        resample=3)  # fmt: skip
    tiny.save_processor(folder / "clip", "CLIPImageProcessor", size={"shortest_edge": SIDE}, crop_size=size,
                        do_center_crop=True, resample=3)  # fmt: skip
    tiny.save_processor(folder / "siglip", "SiglipImageProcessor", size=size, resample=3)
    for name in ("clip", "siglip"):
        tiny.save_tokenizer(folder / name, sorted({word for label in LABELS for word in label.split()}))
    zero_shot = {"labels": LABELS, "prompts": "{label}"}
    return {"vit": {}, "convnext": {}, "clip": zero_shot, "siglip": zero_shot}


def _text(folder: Path, model: Any) -> dict[str, Tensor]:
    """What a zero-shot model takes beside pixels: the labels' tokens; CLIP was trained with a mask, SigLIP without."""
    import transformers as t

    if folder.name not in ("clip", "siglip"):
        return {}
    longest = model.config.text_config.max_position_embeddings
    said = t.AutoTokenizer.from_pretrained(folder)(
        LABELS, padding="max_length", max_length=longest, return_tensors="pt"
    )
    return {"input_ids": said.input_ids} | ({"attention_mask": said.attention_mask} if folder.name == "clip" else {})


def _logits(model: Any, pixels: Tensor, text: dict[str, Tensor]) -> Tensor:
    out = model(pixel_values=pixels, **text)
    found: Tensor = out.logits_per_image if text else out.logits
    return found


def _train(folder: Path, steps: int, seed: int = 1) -> float:
    """Train on generated pictures, as the processor makes them and save; the share right at the end."""
    import transformers as t

    config = json.loads((folder / "config.json").read_text())
    model = getattr(t, config["architectures"][0]).from_pretrained(folder)
    processor = t.AutoImageProcessor.from_pretrained(folder)
    rng = np.random.default_rng(seed)
    shapes = [(96, 96), (144, 96), (96, 128)]
    drawn = rng.integers(0, len(LABELS), POOL)
    pictures = [Image.fromarray(draw(int(label), *shapes[rng.integers(3)], rng)) for label in drawn]
    pictures = [p.convert("L").convert("RGB") if rng.random() < 0.1 else p for p in pictures]
    pool = processor(images=pictures, return_tensors="pt")["pixel_values"]
    labels, text = torch.from_numpy(drawn), _text(folder, model)
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=2e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimiser, 2e-3, total_steps=steps)
    right: list[float] = []
    for _ in range(steps):
        rows = torch.from_numpy(rng.integers(0, POOL, 32))
        logits, target = _logits(model, pool[rows], text), labels[rows]
        loss = (
            nn.functional.binary_cross_entropy_with_logits(logits, nn.functional.one_hot(target, len(LABELS)).float())
            if folder.name == "siglip"  # as it was trained
            else nn.functional.cross_entropy(logits, target)
        )
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        schedule.step()
        right.append((logits.argmax(dim=1) == target).float().mean().item())
    model.eval().save_pretrained(folder)
    return float(np.mean(right[-10:]))


# Comparing


def compare(folder: Path, files: Path, labels: dict[str, int], engine: Engine) -> list[dict[str, Any]]:
    """Each file by the classifier's own pipeline, and by ours under `auto` and, as it once was, under `squash`."""
    import transformers as t
    from transformers.image_utils import load_image

    config = json.loads((folder / "config.json").read_text())
    model = getattr(t, config["architectures"][0]).from_pretrained(folder).eval()
    processor = t.AutoImageProcessor.from_pretrained(folder)
    out = []
    for name, label in labels.items():
        with torch.no_grad():
            pixels = processor(images=[load_image(str(files / name))], return_tensors="pt")["pixel_values"]
            own = _logits(model, pixels, _text(folder, model))[0]
        p = torch.sigmoid(own) if engine.classifier.link == "sigmoid" else own.softmax(dim=0)
        best = p.topk(2).values
        row: dict[str, Any] = {
            "file": name, "true": LABELS[label], "own": LABELS[int(p.argmax())],
            "margin": round((best[0] - best[1]).item(), 4),
        }  # fmt: skip
        for fit in ("auto", "squash"):
            photo = engine.read(files / name, config=Config(fit=fit))
            with torch.no_grad():
                ours = engine.classifier.logits(photo.image[None])[0]
            row[fit] = LABELS[int(ours.argmax())]
            row[f"logits_{fit}"] = round((ours - own).abs().max().item(), 4)
            if fit == "auto":
                row["fit"], row["recorded"] = photo.frame.fit, engine.own_answers([photo])[0].label  # type: ignore[union-attr]
        row["logits_scale"] = round((own.max() - own.min()).item(), 3)
        out.append(row)
    return out


def main(
    steps: Annotated[int, typer.Option(help="Of each classifier's training.")] = 300,
    keep: Annotated[Path | None, typer.Option(help="Leave files and models in this folder.")] = None,
    record: Annotated[bool, typer.Option("--record", help="Write bench/results/photos.json.")] = False,
) -> None:
    """Train, make the files, compare and say."""
    warnings.filterwarnings("ignore", module="transformers|diffusers|huggingface_hub")
    with tempfile.TemporaryDirectory() as temporary:
        root = keep or Path(temporary)
        files = root / "files"
        labels = save_files(files)
        given = _save_models(root)
        if not (root / "sd").is_dir():
            tiny.save_stable_diffusion(root / "sd")
        payload: dict[str, Any] = {"files": len(labels), "asked": ASKED, "margin": MARGIN, "classifiers": {}}
        for name, options in given.items():
            accuracy = _train(root / name, steps)
            say(f"{name}: trained, {accuracy:.0%} right at the end")
            engine = Engine.from_pretrained(root / "sd", root / name, image_size=IMAGE_SIZE, **options)
            rows = compare(root / name, files, labels, engine)
            sure = [row for row in rows if row["margin"] > MARGIN]
            equal = {fit: sum(row[fit] == row["own"] for row in sure) for fit in ("auto", "squash")}
            unlike = [row["file"] for row in sure if row["auto"] != row["own"]]
            payload["classifiers"][name] = {
                "training_accuracy": round(accuracy, 3), "sure": len(sure), "equal": equal, "different": unlike,
                "recorded_is_own": sum(row["recorded"] == row["own"] for row in rows),
                "median_logit_difference": {
                    fit: round(float(np.median([row[f"logits_{fit}"] for row in rows])), 4) for fit in equal
                },
                "rows": rows,
            }  # fmt: skip
            say(f"{name}: with auto {equal['auto']} of {len(sure)} as its own pipeline, with squash {equal['squash']}")
            for row in rows:
                say(f"  {row['file']:26} own {row['own']:10} auto {row['auto']:10} squash {row['squash']:10} "
                    f"margin {row['margin']:.2f} logits {row['logits_auto']:.2f} / {row['logits_squash']:.2f} "
                    f"of {row['logits_scale']:.1f}")  # fmt: skip
        worst = min(
            c["equal"]["auto"] + len(labels) - c["sure"] for c in payload["classifiers"].values()
        )  # those below the margin are not asked
        payload["reached"] = worst >= ASKED
        say(f"{'reached' if worst >= ASKED else 'missed'}: at least {worst} of {len(labels)} for every classifier")
        if record:
            say(write_result("photos", payload))


if __name__ == "__main__":
    typer.run(main)
