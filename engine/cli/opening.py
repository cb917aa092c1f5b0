"""The options of commands that open an engine, and the engine that they describe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import ConfigDict, Field

from ..blackbox.kinds import is_box, may_convert
from ..blackbox.options import BoxOptions
from ..config import OFFICIAL_CHOICES, Config, Options
from ..errors import UsageError
from .generated import prefixed, without
from .options import RUNTIMES, errors

if TYPE_CHECKING:
    from ..blackbox.opening import Shown
    from ..engine import Engine

# A run as a command takes it: which models are meant, `EngineOptions` say.
RunOptions = Annotated[Config, without("pack", "classifier")]

# How a black box is asked, as a command takes it.
AskedBox = Annotated[BoxOptions, prefixed("classifier_", "max_queries")]

OF_PRETRAINED = ("labels", "prompts", "classes", "head", "weights", "image_size", "dtype")


class EngineOptions(Options):
    """What an engine is opened from and how it computes, as a person types it; `Engine` checks what fits together."""

    model_config = ConfigDict(title="Models and machine")

    pack: str = Field("digits", description="An embedded pack (digits) or a pack's folder.")
    classifier: str | None = Field(
        None,
        description="What to explain: of the pack (clean); with --model a folder, hub id, torchvision:NAME; or a black "
        "box: model.onnx, python:module:function, https://...",
    )
    surrogate: Path | None = Field(
        None, description="Of a black box: the folder of its student, which guides (counterlens surrogate train)."
    )
    queries_each: int | None = Field(
        None, ge=2, description="Of a black box, for one counterfactual through its surrogate; 4 without it."
    )
    model: str | None = Field(None, description="Diffusion model instead of the pack's: a diffusers folder or hub id.")
    labels: str | None = Field(None, description="Names of the logits: a,b,c or a .txt file, one a line.")
    prompts: str | None = Field(
        None,
        description="imagenet, openai-imagenet, pets, flowers, smile, age, a template with {label}, or a .txt file of "
        "prompts.",
    )
    classes: str | None = Field(None, description="The diffusion model's class of each label: 3,7,...")
    head: Path | None = Field(None, description="Safetensors file: linear head on a backbone.")
    weights: Path | None = Field(None, description="Weights of a torchvision or timm model.")
    neighbours: Path | None = Field(None, description="Nearest labels: JSON, or CSV label,nearest,...")
    image_size: int | None = Field(None, ge=8, description="Side in pixels, for Stable Diffusion.")
    dtype: str | None = Field(None, description="Of the model's weights: float32, bfloat16 or float16.")
    tiny_decoder: str | None = Field(None, description="AutoencoderTiny for --guidance-decoder tiny.")
    device: str = Field("auto", description="auto (CUDA where there is one), cpu, cuda or cuda:N.")
    runtime: str = Field("auto", description=f"{RUNTIMES}.")
    store: Path | None = Field(None, description="Store of artefacts; the user's cache without it.")
    attention: str = Field("sdpa", description="Of UNet and VAE: sdpa, or xformers (CUDA).")
    checkpointing: bool | None = Field(None, description="Recompute activations: less memory, more time.")
    memory_budget: float | None = Field(None, gt=0, description="GB; the largest batch that fits is used.")

    def of_engine(self) -> dict[str, Any]:
        """The keyword arguments of every `Engine`; what was not given is left to it."""
        from ..images.collect import read_neighbours

        given = {
            "neighbours": None if self.neighbours is None else read_neighbours(self.neighbours),
            "guidance_decoder": self.tiny_decoder,
            "memory_budget": None if self.memory_budget is None else self.memory_budget * 1e9,
            **{name: getattr(self, name) for name in ("device", "runtime", "store", "attention", "checkpointing")},
        }
        return {name: value for name, value in given.items() if value is not None}

    def of_pretrained(self) -> dict[str, Any]:
        """What describes --model and --classifier, as `Engine.from_pretrained` takes it; only what was given."""
        from ..images.collect import read_names

        given = {name: value for name in OF_PRETRAINED if (value := getattr(self, name)) is not None}
        if self.labels is not None:
            given["labels"] = read_names(self.labels)
        if self.prompts is not None and self.prompts.endswith(".txt"):
            given["prompts"] = _lines(Path(self.prompts))
        if self.classes is not None:
            given["classes"] = _numbers(self.classes)
        return given


def open_engine(
    config: Config,
    options: EngineOptions,
    box: BoxOptions | None = None,
    *,
    guides: bool = False,
    shown: Shown | None = None,
) -> Engine:
    """The engine of a pack, or of --model and --classifier with what describes them; says what --match-official sets.

    Args:
        box: how a black box is asked, of a command that takes one.
        guides: the command needs a gradient, which an ONNX file may have.
        shown: reads some of the command's images, on which that gradient is held to the file.

    Raises:
        UsageError: an option has no use here, or does not fit.
    """
    from ..engine import QUERIES_EACH, Engine

    for choice in OFFICIAL_CHOICES if config.match_official else ():
        errors.print(f"note: match-official: {choice}")
    if options.surrogate is not None and not is_box(options.classifier):
        raise UsageError("surrogate: of a black box; name it (--classifier model.onnx, python:module:function, ...)")
    if options.surrogate is not None and box is None:
        raise UsageError(
            "surrogate: this command asks no black box; counterfactual, audit, saliency, evaluate and serve do"
        )
    if options.queries_each is not None and options.surrogate is None:
        raise UsageError("queries_each: of counterfactuals through a surrogate; give --surrogate FOLDER")
    if options.surrogate is not None:
        box = only_called(options.classifier, box)
    box = check_box(options.classifier, box, guides=guides and options.surrogate is None)
    if box is not None:
        given = options.of_pretrained()
        if options.model is None and (unused := [name for name in given if name != "labels"]):
            raise UsageError(f"{unused[0]}: needs --model; the pack's models have their own")
        engine = Engine.from_pretrained(
            options.model or options.pack, options.classifier or "", config, box=box, shown=shown,
            **given, **options.of_engine(),
        )  # fmt: skip
    elif options.model is None:
        if unused := [name for name in OF_PRETRAINED if getattr(options, name) is not None]:
            raise UsageError(f"{unused[0]}: needs --model; the pack's models have their own")
        engine = Engine.from_pack(options.pack, options.classifier or "clean", config, **options.of_engine())
    elif options.classifier is None:
        raise UsageError("classifier: --model needs one to explain; give a folder, a hub id or torchvision:NAME")
    else:
        engine = Engine.from_pretrained(
            options.model, options.classifier, config, **options.of_pretrained(), **options.of_engine()
        )
    if options.tiny_decoder is not None and engine.settings(config).guidance_decoder != "tiny":
        raise UsageError("tiny_decoder: it is not used; add --guidance-decoder tiny")
    if options.surrogate is not None:
        engine = engine.with_surrogate(options.surrogate, queries_each=options.queries_each or QUERIES_EACH)
    return engine


def only_called(classifier: str | None, box: BoxOptions | None) -> BoxOptions | None:
    """How a black box is asked that is never differentiated, an ONNX file either."""
    return (box or BoxOptions()).model_copy(update={"convert": "never"}) if may_convert(classifier) else box


def check_box(classifier: str | None, box: BoxOptions | None, *, guides: bool = False) -> BoxOptions | None:
    """How a black box is asked, None of another classifier; refuses a box where a gradient is needed.

    Raises:
        UsageError: see above.
    """
    if is_box(classifier):
        guides = guides or box is None
        if guides and may_convert(classifier) and (box is None or box.convert != "never"):
            return (box or BoxOptions()).model_copy(update={"convert": "always"})
        if guides:
            from ..blackbox.box import no_gradient

            raise UsageError(f"classifier: {no_gradient(str(classifier))}")
        return box
    if box is not None and box.model_fields_set:
        name = min(box.model_fields_set)
        option = name if name == "max_queries" else f"classifier_{name}"
        raise UsageError(f"{option}: for black boxes alone (model.onnx, python:module:function, https://...)")
    return None


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8-sig").rstrip().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"prompts: {path} cannot be read ({error})") from error


def _numbers(text: str) -> list[int]:
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise UsageError(f"classes: expected numbers separated by commas, got {text!r}") from error
