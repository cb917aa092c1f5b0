"""Classifiers that others made, behind our protocol: any module, Hugging Face folders, linear heads, zero-shot."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ..errors import CounterlensError, UsageError
from . import norms
from .files import find_folder, id2label_names, read_json, read_part, read_tensors
from .freezing import frozen
from .gradient_check import check_gradient
from .preprocessing import Geometry, Preprocessing, difference, from_processor, measured_geometry, pixels_of
from .processors import keep_processor
from .protocols import SigmoidClassifier, SoftmaxClassifier
from .stable_diffusion import make_prompts
from .text import import_transformers, open_tokenizer

ImageClassifier = SoftmaxClassifier | SigmoidClassifier
Output = Literal["softmax", "sigmoid", "binary"]
OUTPUTS: tuple[Output, ...] = ("softmax", "sigmoid", "binary")
# Names of autograd's nodes that change shape or type alone.
SHAPING = ("Cat", "Clone", "Reshape", "Squeeze", "Slice", "Select", "T", "ToCopy", "Unsafe", "Unsqueeze", "View")
FLAT = ("round", "floor", "ceil", "trunc", "sign", "heaviside")  # differentiable on paper, zero everywhere

ROUNDING = (*FLAT, "fake_quantize", "quantize_per", "_fake_quantize")


class Logits(nn.Module):
    """Preprocessing, a module, and its logits; the module may return them, or an object that has them."""

    def __init__(self, preprocessing: nn.Module, module: nn.Module, output: Output = "softmax") -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.module = module
        self.binary = output == "binary"

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        return self.of_pixels(self.preprocessing(image))

    def of_pixels(
        self,
        pixels: Tensor,  # [B, 3, h, w], preprocessed
    ) -> Tensor:
        """Logits [B, labels]."""
        logits = logits_of(self.module(like(pixels, self.module))).to(pixels.dtype)
        if self.binary:
            # softmax of (0, x) is (1 - sigmoid(x), sigmoid(x)): its log is what binary cross-entropy asks for.
            logits = logits.reshape(len(logits), 1)
            logits = torch.cat([torch.zeros_like(logits), logits], dim=1)
        return logits  # [B, labels]


class LinearOnFeatures(nn.Module):
    """A linear head on a self-supervised vision transformer's features.

    The head's width tells the features, for the backbone's width D: D is the class token; 2 D the class token and the
    mean of the patches (DINOv2; DINO ViT-B); 4 D the class tokens of the last four blocks (DINO ViT-S); 5 D those and
    the mean of the last patches (DINOv2, four blocks).

    Raises:
        UsageError: the head's width is none of them.
    """

    def __init__(self, preprocessing: nn.Module, backbone: nn.Module, weight: Tensor, bias: Tensor) -> None:
        super().__init__()
        width = int(backbone.config.hidden_size)  # type: ignore[union-attr, arg-type]
        if weight.shape[1] not in (width, 2 * width, 4 * width, 5 * width):
            raise UsageError(f"head: {weight.shape[1]} inputs are not 1, 2, 4 or 5 times the backbone's {width}")
        self.blocks = 4 if weight.shape[1] >= 4 * width else 1
        self.patches = weight.shape[1] in (2 * width, 5 * width)
        # DINOv2 with registers: they stand between the class token and the patches.
        self.skip = 1 + int(getattr(backbone.config, "num_register_tokens", 0))
        self.preprocessing = preprocessing
        self.backbone = backbone
        self.head = nn.Linear(weight.shape[1], weight.shape[0])
        self.head.load_state_dict({"weight": weight, "bias": bias})

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        return self.of_pixels(self.preprocessing(image))

    def of_pixels(
        self,
        pixels: Tensor,  # [B, 3, h, w], preprocessed
    ) -> Tensor:
        """Logits [B, labels]."""
        dtype, pixels = pixels.dtype, like(pixels, self.backbone)
        if self.blocks == 1:
            out = [self.backbone(pixels).last_hidden_state]
        else:
            hidden = self.backbone(pixels, output_hidden_states=True).hidden_states[-self.blocks :]
            out = [self.backbone.layernorm(h) for h in hidden]  # type: ignore[operator]
        features = [h[:, 0] for h in out] + ([out[-1][:, self.skip :].mean(dim=1)] if self.patches else [])
        return self.head(torch.cat(features, dim=1)).to(dtype)  # [B, labels]


class ZeroShot(nn.Module):
    """CLIP or SigLIP: scaled cosines between an image and the labels' prompts, which are encoded once."""

    prompts: Tensor

    def __init__(self, preprocessing: nn.Module, model: nn.Module, prompts: Tensor, scale: float, bias: float) -> None:
        super().__init__()
        self.preprocessing = preprocessing
        self.model = model
        self.register_buffer("prompts", prompts)  # [labels, width], unit length
        self.scale, self.bias = scale, bias

    def forward(
        self,
        image: Tensor,  # [B, 3, H, W] in [0, 1]
    ) -> Tensor:
        return self.of_pixels(self.preprocessing(image))

    def of_pixels(
        self,
        pixels: Tensor,  # [B, 3, h, w], preprocessed
    ) -> Tensor:
        """Logits [B, labels]."""
        features = self.model.vision_model(like(pixels, self.model)).pooler_output  # type: ignore[operator]
        if hasattr(self.model, "visual_projection"):
            features = self.model.visual_projection(features)  # type: ignore[operator]
        features = nn.functional.normalize(features, dim=-1)
        return (self.scale * features @ self.prompts.to(features.dtype).T + self.bias).to(pixels.dtype)  # [B, labels]


def logits_of(out: Any) -> Tensor:
    """The logits in what a module returns: a tensor, or an object or dict that names them.

    Raises:
        UsageError: none of these; the message says what it is and what to do.
    """
    named = out.get("logits") if isinstance(out, Mapping) else getattr(out, "logits", None)
    found = out if isinstance(out, Tensor) else named
    if isinstance(found, Tensor):
        return found
    if isinstance(out, Mapping):
        what, one = f"a dict of {', '.join(map(repr, out))}", f"[{next(iter(out), 'logits')!r}]"
    elif isinstance(out, list | tuple):
        shapes = (str(list(o.shape)) if isinstance(o, Tensor) else type(o).__name__ for o in out)
        what, one = f"a {type(out).__name__} of {', '.join(shapes)}", "[0]"
    else:
        what, one = f"a {type(out).__name__}", ".logits"
    raise UsageError(
        f"classifier: the module returns {what}, not logits [B, labels]; give a module whose forward returns them "
        f"alone, such as model(x){one}"
    )


def like(image: Tensor, module: nn.Module) -> Tensor:
    """The image in the data type of the module's parameters, if it has any."""
    first = next((p for p in module.parameters() if p.is_floating_point()), None)
    return image if first is None else image.to(first.dtype)


def wrap_classifier(
    module: nn.Module,
    labels: Sequence[str],
    *,
    image_size: int,
    output: Output = "softmax",
    resize: int | tuple[int, int] | None = None,
    crop: int | tuple[int, int] | None = None,
    mean: Sequence[float] = (0.0, 0.0, 0.0),
    std: Sequence[float] = (1.0, 1.0, 1.0),
    interpolation: str = "bilinear",
) -> ImageClassifier:
    """Any module as a classifier; the module itself is not changed, and is tried once to see that it fits.

    Args:
        module: from preprocessed images [B, 3, h, w] to logits [B, labels], or to an object with `.logits`.
        labels: a name for each logit; for `binary` two names, that of the negative first.
        image_size: side of the images that the diffusion model makes.
        output: `softmax` for labels that exclude each other, `sigmoid` for labels that do not, `binary` for one logit.
        resize, crop, mean, std, interpolation: see `Preprocessing`.

    Raises:
        UsageError: the module cannot be run or differentiated, or has more or fewer logits than labels.
    """
    if output not in OUTPUTS:
        raise UsageError(f"output: expected one of {', '.join(OUTPUTS)}, got {output!r}")
    preprocessing = recipe(image_size, resize=resize, crop=crop, mean=mean, std=std, interpolation=interpolation)
    classifier = finish(Logits(preprocessing, module, output), labels, image_size, output)
    if resize is not None:
        keep_processor(classifier, preprocessing.of_picture)
    return classifier


def recipe(
    image_size: int,
    *,
    resize: int | tuple[int, int] | None = None,
    crop: int | tuple[int, int] | None = None,
    **normalise: Any,
) -> Preprocessing:
    """Preprocessing as torchvision reads its sizes: one number is of the shorter side. See `Preprocessing`."""
    one_side = isinstance(resize, int) or (resize is None and crop is not None)
    geometry: Geometry = "crop" if one_side else "squash"
    return Preprocessing(image_size, resize=resize, crop=crop, geometry=geometry, **normalise)


def finish(module: nn.Module, labels: Sequence[str], image_size: int, output: Output = "softmax") -> ImageClassifier:
    """Check a whole classifier on one image and put it behind the protocol.

    Raises:
        UsageError: see `check_classifier`.
    """
    classifier = SigmoidClassifier(module, labels) if output == "sigmoid" else SoftmaxClassifier(module, labels)
    check_classifier(classifier, image_size)
    return classifier


class _Trail(TorchFunctionMode):
    """Notes operations that take something differentiable and return something that is not."""

    def __init__(self) -> None:
        super().__init__()
        self.broken: list[str] = []
        self.flat: list[str] = []
        self.rounded: list[str] = []  # where a straight-through gradient may follow

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = getattr(func, "__name__", str(func))
        if name == "__get__":  # a property of a tensor, such as .data
            name = getattr(getattr(func, "__self__", None), "__name__", name)
        if isinstance(out, Tensor) and any(
            isinstance(a, Tensor) and a.requires_grad for a in tree_leaves((args, kwargs))
        ):
            if not out.requires_grad and out.dtype != torch.bool:
                cause = name if torch.is_grad_enabled() else f"{name} under torch.no_grad"
                self.broken.append(f"{cause}{_where()}")
            if name in FLAT:
                self.flat.append(f"{name}{_where()}")
        if name.startswith(ROUNDING) and isinstance(out, Tensor) and out.is_floating_point():
            self.rounded.append(name)
        return out


def _where() -> str:
    """File and line of the nearest caller outside torch and what watches it."""
    own = (__file__, norms.__file__, str(Path(torch.__file__).parent), "<")
    frame = sys._getframe(1)
    while frame is not None:
        file = frame.f_code.co_filename
        if not file.startswith(own):
            return f" ({Path(file).name}, line {frame.f_lineno})"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


def check_classifier(classifier: ImageClassifier, image_size: int) -> None:
    """Run and differentiate a classifier on a random image, and hold its gradient to the classifier itself.

    Raises:
        UsageError: it fails, returns another number of logits than there are labels, mixes data types, or is not
            differentiable; the message names the operation that broke the gradient. See `check_gradient` as well.
    """
    dtypes = {str(p.dtype).removeprefix("torch.") for p in classifier.module.parameters() if p.is_floating_point()}
    if len(dtypes) > 1:
        raise UsageError(f"classifier: its weights mix {' and '.join(sorted(dtypes))}; convert them to one")
    parameter = next(classifier.module.parameters(), torch.empty(0))
    shape = (1, 3, image_size, image_size)
    image = torch.rand(shape, generator=torch.Generator().manual_seed(0)).to(parameter.device).requires_grad_()
    trail = _Trail()
    with frozen(classifier.module), torch.enable_grad():
        try:
            with trail:
                logits = classifier.logits(image)
        except UsageError:
            raise
        except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
            if "requires grad" in str(error):
                raise UsageError(f"classifier: not differentiable: {error}") from error
            raise UsageError(
                f"classifier: fails on an image {list(shape)}: {str(error).splitlines()[0]}; is its preprocessing "
                "(resize, crop) missing?"
            ) from error
        if not isinstance(logits, Tensor) or logits.ndim != 2:
            got = list(logits.shape) if isinstance(logits, Tensor) else type(logits).__name__
            raise UsageError(f"classifier: expected logits [B, {len(classifier.labels)}], got {got}")
        if logits.shape[1] != len(classifier.labels):
            raise UsageError(f"labels: {len(classifier.labels)} names for {logits.shape[1]} logits; give one for each")
        if said := probabilities_for_logits(logits, classifier.link):
            raise UsageError(
                f"classifier: its outputs are probabilities ({said}), not logits, and would go through another "
                f"{classifier.link}; leave the last {classifier.link} out of the module"
            )
        if not logits.requires_grad:
            raise UsageError(f"classifier: not differentiable; the gradient ends at {_first(trail.broken)}")
        gradient = torch.autograd.grad(logits.sum() + logits[0, 0], image)[0]
    if not gradient.any() and trail.flat:
        raise UsageError(f"classifier: its gradient is zero everywhere; {_first(trail.flat)} may be why")
    suspects = [*trail.broken, *trail.flat]
    check_gradient(classifier, image_size, suspects=suspects, rounds=bool(trail.rounded))


def probabilities_for_logits(
    logits: Tensor,  # [B, labels]
    link: str,
) -> str:
    """Why a classifier's outputs are taken for probabilities; empty where they are not."""
    values = logits.detach()
    if not ((values >= 0) & (values <= 1)).all():
        return ""
    if link == "softmax" and logits.shape[1] > 1 and ((values.sum(dim=1) - 1).abs() < 1e-3).all():
        return "from 0 to 1, and of each image they sum to 1"
    # Logits may lie there by chance: only what comes straight out of a sigmoid is told from them.
    node = logits.grad_fn
    while node is not None and not (name := node.name()).startswith(("Sigmoid", "Softmax")):
        following = [n for n, _ in node.next_functions if n is not None]
        node = following[0] if len(following) == 1 and name.startswith(SHAPING) else None
    return "" if node is None else f"the module ends in a {node.name().removesuffix('Backward0').lower()}"


def _first(operations: list[str]) -> str:
    return operations[0] if operations else "an operation that torch does not see (numpy, for one)"


def open_classifier(
    name: str | Path,
    *,
    image_size: int,
    labels: Sequence[str] | None = None,
    prompts: str | Sequence[str] = "imagenet",
    head: str | Path | None = None,
    weights: str | Path | None = None,
) -> ImageClassifier:
    """Open a classifier from a Hugging Face folder or id, or by name from torchvision or timm.

    An image-classification model brings its labels; CLIP and SigLIP need yours, a backbone (DINO, DINOv2) a head.

    Args:
        name: folder, `owner/name`, `torchvision:NAME` or `timm:NAME`.
        image_size: side of the images that the diffusion model makes.
        labels: instead of the model's own; needed for zero-shot and linear heads. Two for one logit, negative first.
        prompts: how labels are said to CLIP and SigLIP (see `make_prompts`).
        head: safetensors file with a linear head's weight [labels, D] and bias, for a backbone.
        weights: file for a torchvision or timm model; without it they download their own.

    Raises:
        UsageError: an option does not fit. CounterlensError: files are missing or corrupt, or a package is.
    """
    source, _, model = str(name).partition(":")
    if source in ("torchvision", "timm") and model:
        return (_torchvision if source == "torchvision" else _timm)(model, image_size, labels, weights)
    folder = find_folder(name, "classifier")
    config = read_json(folder / "config.json")
    transformers = import_transformers()
    architecture = str((config.get("architectures") or [""])[0])
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(folder, local_files_only=True)
    except (ImportError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        why = " ".join(str(error).split())[:200]
        raise CounterlensError(f"{folder}: no preprocessor_config.json that can be read ({why})") from error
    preprocessing, process = from_processor(processor, image_size), pixels_of(processor)
    if not hasattr(transformers, architecture):
        raise UsageError(
            f"classifier: {folder / 'config.json'}: architecture {architecture!r} is not one of transformers'"
        )
    loader = getattr(transformers, architecture)
    if architecture in ("CLIPModel", "SiglipModel"):
        if not labels:
            raise UsageError(f"labels: {architecture} is zero-shot, it has none of its own; give them")
        module = read_part(loader, folder, torch.float32)
        zero_shot = _zero_shot(preprocessing, module, folder, make_prompts(labels, prompts))
        made = finish(zero_shot, labels, image_size, "softmax" if architecture == "CLIPModel" else "sigmoid")
        return keep_processor(made, process)
    if architecture.endswith("ForImageClassification"):
        if head is not None:
            raise UsageError(f"head: {architecture} has a head of its own")
        module = read_part(loader, folder, torch.float32)
        output: Output = "sigmoid" if config.get("problem_type") == "multi_label_classification" else "softmax"
        names = list(labels) if labels else id2label_names(module.config.id2label) or []
        if module.config.num_labels == 1:
            output, names = "binary", names if len(names) == 2 else [f"not {names[0]}", names[0]]
        return keep_processor(finish(Logits(preprocessing, module, output), names, image_size, output), process)
    if head is None:
        raise UsageError(f"head: {architecture} has no classes; give the safetensors file of a linear head")
    return keep_processor(_linear(preprocessing, loader, folder, Path(head), labels, image_size), process)


def _zero_shot(preprocessing: Preprocessing, model: Any, folder: Path, prompts: list[str]) -> ZeroShot:
    longest = model.config.text_config.max_position_embeddings
    tokens = open_tokenizer(folder)(prompts, padding="max_length", max_length=longest, return_tensors="pt")
    if tokens.input_ids.shape[1] > longest:
        raise UsageError(f"prompts: the longest has {tokens.input_ids.shape[1]} tokens, the model reads {longest}")
    clip = hasattr(model, "text_projection")
    with torch.no_grad():
        # SigLIP was trained without a mask, CLIP with one.
        mask = {"attention_mask": tokens.attention_mask} if clip else {}
        text = model.text_model(tokens.input_ids, **mask).pooler_output
        text = nn.functional.normalize(model.text_projection(text) if clip else text, dim=-1)
        bias = 0.0 if clip else model.logit_bias.item()
        return ZeroShot(preprocessing, model, text, model.logit_scale.exp().item(), bias)


def _linear(
    preprocessing: Preprocessing,
    loader: Any,
    folder: Path,
    head: Path,
    labels: Sequence[str] | None,
    image_size: int,
) -> ImageClassifier:
    tensors = read_tensors(head)
    weight = [t for t in tensors.values() if t.ndim == 2]
    bias = [t for t in tensors.values() if t.ndim == 1]
    if len(tensors) != 2 or len(weight) != 1 or len(bias) != 1 or weight[0].shape[0] != bias[0].shape[0]:
        shapes = ", ".join(f"{k} {list(v.shape)}" for k, v in tensors.items())
        raise UsageError(f"head: {head}: expected a weight [labels, D] and a bias [labels], got {shapes}")
    if not labels:
        raise UsageError(f"labels: a linear head has none; give {weight[0].shape[0]} names")
    backbone = read_part(loader, folder, torch.float32, ignore=r"pooler\.")
    return finish(LinearOnFeatures(preprocessing, backbone, weight[0].float(), bias[0].float()), labels, image_size)


def _fill(module: nn.Module, weights: str | Path) -> nn.Module:
    try:
        module.load_state_dict(read_tensors(Path(weights)))
    except RuntimeError as error:
        raise CounterlensError(f"{weights}: {error}") from error
    return module


def _build(make: Callable[[], nn.Module], name: str) -> nn.Module:
    try:
        return make().eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise CounterlensError(
            f"classifier: {name} cannot be made or its weights not fetched ({error}); give a file with weights="
        ) from error


def _torchvision(
    name: str, image_size: int, labels: Sequence[str] | None, weights: str | Path | None
) -> ImageClassifier:
    try:
        from torchvision import models
    except ImportError as error:
        raise CounterlensError("torchvision is not installed; pip install torchvision") from error
    if name not in models.list_models():
        raise UsageError(f"classifier: torchvision has no model {name!r}")
    published = models.get_model_weights(name).DEFAULT
    recipe = published.transforms()
    if not hasattr(recipe, "crop_size"):
        raise UsageError(f"classifier: torchvision's {name} is no image classifier")
    known = published.meta.get("categories", [])
    names = list(labels or known)
    if weights is None:
        module = _build(lambda: models.get_model(name, weights=published), name)
    else:
        module = _fill(_build(lambda: models.get_model(name, num_classes=len(names)), name), weights)
    classifier = wrap_classifier(
        module.requires_grad_(False), names, image_size=image_size, resize=recipe.resize_size[0],
        crop=recipe.crop_size[0], mean=recipe.mean, std=recipe.std, interpolation=recipe.interpolation.value,
    )  # fmt: skip
    return _held(classifier, recipe, image_size, f"torchvision's transforms of {name}")


def _held(
    classifier: ImageClassifier, transform: Callable[[Any], Tensor], image_size: int, what: str
) -> ImageClassifier:
    """The classifier, whose preprocessing makes the same pixels as a transform of Pillow's images.

    Raises:
        UsageError: it does not.
    """
    preprocessing: Any = classifier.module.preprocessing
    if found := difference(preprocessing, transform, image_size):
        raise UsageError(f"preprocessing: {what} do more than resize, centre crop and normalise ({found})")
    preprocessing.geometry = measured_geometry(preprocessing, transform, image_size)
    return keep_processor(classifier, transform)


def _timm(name: str, image_size: int, labels: Sequence[str] | None, weights: str | Path | None) -> ImageClassifier:
    try:
        import timm
    except ImportError as error:
        raise CounterlensError("timm is not installed; pip install timm") from error
    if not timm.is_model(name.split(".")[0]):
        raise UsageError(f"classifier: timm has no model {name!r}")
    if not labels:
        raise UsageError("labels: timm's models carry no names; give them")
    if weights is None:
        module = _build(lambda: timm.create_model(name, pretrained=True), name)
    else:
        module = _fill(_build(lambda: timm.create_model(name, num_classes=len(labels)), name), weights)
    recipe = timm.data.resolve_model_data_config(module)
    channels, height, width = recipe["input_size"]
    if channels != 3 or height != width:
        raise UsageError(f"classifier: timm's {name} takes {channels}x{height}x{width}; expected 3 channels, a square")
    classifier = wrap_classifier(
        module.requires_grad_(False), labels, image_size=image_size, resize=int(width / recipe["crop_pct"]), crop=width,
        mean=recipe["mean"], std=recipe["std"], interpolation=recipe["interpolation"],
    )  # fmt: skip
    try:
        transform = timm.data.create_transform(**recipe)
    except ImportError:  # timm's transforms need torchvision, its models do not
        return classifier
    return _held(classifier, transform, image_size, f"timm's transforms of {name}")
