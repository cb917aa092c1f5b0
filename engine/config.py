"""What a counterfactual run is made of: modes, presets and single fields."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, create_model
from pydantic_core import PydanticCustomError

from .chance import TUNED, carried_over
from .errors import MAX_SEED, UsageError
from .multistep import SOLVERS

ModeName = Literal["official", "realistic", "audit"]
SpeedName = Literal["exact", "balanced", "fast", "turbo"]
FitName = Literal["auto", "crop", "pad", "squash", "native"]
PresetName = Literal[
    "imagenet-class", "imagenet-text", "pairs-class", "pairs-text", "celeba-text", "flowers-text", "pets-text"
]


def _known_solver(name: str) -> str:
    if name not in SOLVERS:
        raise PydanticCustomError("solver", "Input should be {names}", {"names": _one_of(map(repr, SOLVERS))})
    return name


def _known_region(text: str) -> str:
    if re.fullmatch(r"[\d\s,;x.+-]*", text) and not re.fullmatch(r"\s*(\d+\s*,\s*){3}\d+\s*", text):
        raise PydanticCustomError("region", "Input should be auto, x,y,w,h in whole pixels, or a mask's file or folder")
    return text


def _one_of(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}"


def declared(model: type[BaseModel]) -> list[str]:
    """A model's fields: its own, then those that it inherits."""
    return sorted(model.model_fields, key=lambda name: name not in model.__annotations__)


class Options(BaseModel):
    """Fields that somebody chose, checked.

    Raises:
        UsageError: naming the field that does not fit, or that there is none of this name.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, defer_build=True)  # --help validates nothing

    def __init__(self, **fields: Any) -> None:
        try:
            super().__init__(**fields)
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(p) for p in first["loc"]) or type(self).__name__
            if first["type"] == "extra_forbidden":
                raise UsageError(
                    f"{field}: no field of {type(self).__name__}; expected some of {', '.join(declared(type(self)))}"
                ) from None
            raise UsageError(f"{field}: {first['msg']}, got {first.get('input')!r}") from None


class StepOptions(Options):
    """What decides the guided step's graph: the options of `GuidedStep`, of what is compiled and of its key."""

    filter: Literal["zero", "project", "global", "off"] = Field("zero", description="zero, project, global or off.")
    gradient: Literal["exact", "detached"] = Field("exact", description="exact or detached.")
    guidance_decoder: Literal["full", "tiny"] = Field(
        "full", description="full, or tiny: a small one, for gradients only."
    )
    denoiser: Literal["own", "distilled"] = Field(
        "own", description="Of guided steps: own, or distilled for few steps."
    )
    distance: Literal["image", "latent"] = Field("image", description="To the input, over image (pixels) or latent.")
    guidance_every: int = Field(1, ge=1, description="Every n-th step asks, the others reuse it.")
    reuse_features: int = Field(1, ge=1, description="Every n-th guided step runs the whole UNet, others its top.")
    reuse_gradients: int = Field(1, ge=1, description="Every n-th guided step has gradients of its own.")

    @property
    def with_guidance(self) -> bool:
        """Whether the step also returns what it added, for steps that reuse it."""
        return self.guidance_every > 1

    @property
    def reuses(self) -> tuple[str, ...]:
        """What some of the steps take from an earlier one: `features`, `gradients`."""
        reused = {"features": self.reuse_features, "gradients": self.reuse_gradients}
        return tuple(name for name, every in reused.items() if every > 1)


class Settings(StepOptions):
    """Every number of a run, decided. A run option is declared once: here, with help text and range, or in `Config`."""

    steps: int = Field(ge=1, description="DDIM steps over the whole process.")
    strength: float = Field(gt=0, le=1, description="Share of the process that is noised, in (0, 1].")
    guidance_scale: float = Field(ge=0, description="Scale of the whole guidance.")
    class_scale: float = Field(ge=0, description="Scale of the classifier's score.")
    distance_scale: float = Field(ge=0, description="Scale of the pull towards the input.")
    angle: float = Field(ge=0, le=180, description="Angle limit of the filter in degrees.")
    noise: Literal["random", "inversion"] = Field("random", description="random or inversion.")
    solver: Annotated[str, AfterValidator(_known_solver)] = Field(
        "ddim", description=f"{_one_of(solver.about for solver in SOLVERS.values())}."
    )
    spacing: Literal["official", "leading", "trailing", "linspace", "logsnr"] = Field(
        "official", description="official, or over the noised part: leading, trailing, linspace, logsnr."
    )
    guidance_start: float = Field(0.0, ge=0, lt=1, description="Share of the run from which steps are guided.")
    guidance_end: float = Field(1.0, gt=0, le=1, description="Share of the run up to which steps are guided.")

    @property
    def graph(self) -> StepOptions:
        """What decides the guided step's graph; samples can share a batch where this is the same."""
        fields = {name: getattr(self, name) for name in StepOptions.model_fields}
        often = ("guidance_every", "reuse_features", "reuse_gradients")  # every third is the same graph as every second
        return StepOptions(**fields | {name: min(fields[name], 2) for name in often})


if TYPE_CHECKING:
    Overrides = Options
else:  # the fields of `Settings`; None where the mode decides
    Overrides = create_model(
        "Overrides",
        __base__=Options,
        **{
            name: (Annotated[Settings.model_fields[name].annotation | None, Settings.model_fields[name]], None)
            for name in declared(Settings)
        },
    )


def _published(strength: float, class_scale: float, distance_scale: float, angle: float) -> Settings:
    return Settings(
        steps=500,
        strength=strength,
        guidance_scale=3.0,
        class_scale=class_scale,
        distance_scale=distance_scale,
        angle=angle,
    )


# The published settings (LDCE, supplement, hyperparameters). The strength of `celeba-text` is not published for the
# tables; 0.502 gives the 251 steps of the released configuration.
PRESETS: dict[str, Settings] = {
    "imagenet-class": _published(0.382, 2.3, 0.3, 45),
    "imagenet-text": _published(0.382, 3.95, 1.2, 50),
    "pairs-class": _published(0.342, 2.0, 0.25, 40),
    "pairs-text": _published(0.382, 3.95, 1.2, 50),
    "celeba-text": _published(0.502, 4.0, 3.3, 55),
    "flowers-text": _published(0.5, 3.4, 1.2, 45),
    "pets-text": _published(0.382, 4.2, 2.4, 45),
}
OFFICIAL_PRESET = "pairs-class"
# How the published text-conditional settings say a label (see `models.stable_diffusion.PROMPTS`). `celeba-text` has two
# attributes, so its prompts must be chosen. Its released configuration file contradicts the paper: guidance is "free"
# there, so that the classifier is never asked; the preset here is the paper's, with the classifier.
PRESET_PROMPTS = {"pets-text": "pets", "flowers-text": "flowers"}
# What the authors' code does where it differs from the published text or from what is better done otherwise; for
# `match_official`. Prompts are names in `models.stable_diffusion.PROMPTS`, ours to theirs.
OFFICIAL_PROMPTS = {"imagenet": "openai-imagenet", "age": "official-age"}
OFFICIAL_CHOICES = (
    "mode official",
    "files are resized bilinearly instead of by Lanczos and cropped to the middle, profiles are ignored",
    "one noise for all images, from the seed itself, instead of one from each image's own pixels",
    "images that the classifier already takes for the target are run instead of skipped",
    "prompts name ImageNet's classes as OpenAI does, and say 'a old person' (text-conditional models)",
)


# How a setting is computed, laid over a mode's or a preset's numbers; never what is asked for: strength, scales, angle
# and filter stay. Of the digits pack, whose own stand in its manifest, these were chosen by `bench.pareto`; of other
# models nobody has chosen any, and these are the same without the tiny decoder, which not every model has.
_EXACT: dict[str, Any] = {
    "gradient": "exact",
    "guidance_decoder": "full",
    "denoiser": "own",
    "distance": "image",
    "guidance_start": 0.0,
    "guidance_end": 1.0,
    "guidance_every": 1,
    "reuse_features": 1,
    "reuse_gradients": 1,
}
SPEEDS: dict[str, dict[str, Any]] = {
    "exact": _EXACT,
    "balanced": _EXACT | {"gradient": "detached", "noise": "inversion", "solver": "dpm++", "spacing": "trailing",
                          "steps": 8},
    "fast": _EXACT | {"gradient": "detached", "noise": "inversion", "solver": "dpm++", "spacing": "trailing",
                      "steps": 7},
    "turbo": _EXACT | {"gradient": "detached", "noise": "inversion", "spacing": "trailing", "steps": 4,
                       "solver": "ddim", "denoiser": "distilled"},
}  # fmt: skip


# Of generators that were distilled to a few steps: from fresh noise, as they were trained, each step on its own.
_FEW: dict[str, Any] = {"gradient": "detached", "noise": "random", "solver": "ddim", "spacing": "trailing"}
FEW_STEP_SPEEDS: dict[str, dict[str, Any]] = {
    "exact": _EXACT,
    "balanced": _EXACT | _FEW | {"steps": 8},
    "fast": _EXACT | _FEW | {"steps": 4},
}


def default_settings(conditioning: str, channels: int = TUNED) -> dict[str, dict[str, Any]]:
    """Settings by mode for models that nobody tuned: the published ImageNet setting, and for `audit` 90 degrees.

    Of more latent `channels` than that was chosen on, `realistic` has the angle that keeps as many random directions
    (see `chance.carried_over`).
    """
    base = PRESETS["imagenet-text" if conditioning == "text" else "imagenet-class"].model_dump()
    realistic = base | {"angle": carried_over(base["angle"], channels)}
    return {"official": base, "realistic": realistic, "audit": base | {"angle": 90.0}}


def preset_misfit(preset: str, conditioning: str, labels: int) -> str | None:
    """Why a preset does not fit a diffusion model and a classifier with that many labels; None if it does."""
    wanted = "text" if preset.endswith("-text") else "class"
    if conditioning != wanted:
        return (
            f"{preset} was published for {wanted}-conditional models, this one is {conditioning}-conditional; "
            f"take one of {', '.join(name for name in PRESETS if name.endswith(f'-{conditioning}'))}"
        )
    if preset == "celeba-text" and labels != 2:
        return f"celeba-text was published for a binary attribute, this classifier has {labels} labels"
    return None


class Config(Overrides):
    """A run as asked for: the fields of `Settings` and these; what is left out comes from the mode.

    `official` is the paper's algorithm with a published preset; `realistic` (45 degrees) and `audit` (90 degrees) are
    the pack's tuned settings: realistic counterfactuals hide part of a non-semantic cause, an audit shows it.
    """

    model_config = ConfigDict(title="Run")

    mode: ModeName | None = Field(None, description="official, realistic (default) or audit.")
    pack: str = Field("digits", description="An embedded pack or a pack's folder.")
    classifier: str = Field("clean", description="The pack's classifier to explain.")
    preset: PresetName | None = Field(None, description="A published setting, such as pairs-class.")
    speed: SpeedName | None = Field(None, description="exact, balanced, fast or turbo: how the setting is computed.")
    match_official: bool = Field(
        False, description="As the authors' code: bilinear resize, one noise, their prompts, ..."
    )
    fit: FitName = Field(
        "auto",
        description="Of files: auto (as the classifier's own processor), crop, pad, squash or native.",
    )
    region: Annotated[str, AfterValidator(_known_region)] | None = Field(
        None, description="Only there it may change: MASK.png, a folder of masks, x,y,w,h, or auto."
    )
    count: int = Field(1, ge=1, le=16, description="Counterfactuals of each image, nearest first.")
    seed: int = Field(
        0, ge=0, le=MAX_SEED, description="Of everything random; combined with each image's own pixels or id."
    )

    @classmethod
    def make(cls, **fields: Any) -> Config:
        """Validate fields; None means not given.

        Raises:
            UsageError: naming the field that does not fit.
        """
        return cls(**{k: v for k, v in fields.items() if v is not None})

    @property
    def mode_name(self) -> ModeName:
        """The mode, which a preset or `match_official` implies to be official."""
        return self.mode or ("official" if self.preset or self.match_official else "realistic")

    @property
    def interpolation(self) -> str:
        """How image files are resized."""
        return "bilinear" if self.match_official else "lanczos"

    @property
    def fit_name(self) -> FitName:
        """How image files are fitted; the authors' code crops."""
        return "crop" if self.match_official else self.fit

    def settings(
        self,
        pack_settings: dict[str, dict[str, Any]],
        speeds: dict[str, dict[str, Any]] = SPEEDS,
    ) -> Settings:
        """Decide every number: single fields over the speed, that over the preset or the pack's setting of the mode.

        Args:
            pack_settings: the pack's tuned settings by mode name.
            speeds: what each speed changes.

        Raises:
            UsageError: fields contradict each other.
        """
        if self.preset and self.mode_name != "official":
            raise UsageError(f"preset: {self.preset} is a published setting and needs mode official, not {self.mode}")
        if self.match_official and (self.mode_name != "official" or self.speed not in (None, "exact")):
            other = f"mode {self.mode}" if self.mode_name != "official" else f"speed {self.speed}"
            raise UsageError(f"match_official: the authors' code has no {other}; leave mode and speed out")
        if self.match_official and self.fit not in ("auto", "crop"):
            raise UsageError(f"match_official: the authors' code crops; leave fit {self.fit} out")
        if self.match_official and self.region is not None:
            raise UsageError("match_official: the authors' code has no region; leave it out")
        if self.mode_name == "official":
            published = PRESETS[self.preset or OFFICIAL_PRESET].model_dump()
            base = published if self.preset else dict(pack_settings.get("official", published))
        else:
            base = dict(pack_settings[self.mode_name])
        if self.speed is not None:
            if self.speed not in speeds:
                raise UsageError(f"speed: this model has no {self.speed}; it has {_one_of(speeds)}")
            base |= speeds[self.speed]
        base |= {name: value for name in Settings.model_fields if (value := getattr(self, name)) is not None}
        settings = Settings(**base)
        if settings.filter in ("project", "global") and settings.angle >= 90:
            raise UsageError(f"angle: filter {settings.filter} needs a limit below 90 degrees, got {settings.angle:g}")
        if settings.guidance_start >= settings.guidance_end:
            raise UsageError(
                f"guidance_start: {settings.guidance_start:g} is not before guidance_end {settings.guidance_end:g}"
            )
        if settings.guidance_every > 1 and settings.reuses:
            raise UsageError(
                f"reuse_{settings.reuses[0]}: with guidance_every {settings.guidance_every} the steps between "
                "ask nothing anyway; give one of both"
            )
        if settings.spacing == "official" and math.floor(settings.strength * settings.steps + 1e-9) < 1:
            raise UsageError(f"strength: {settings.strength:g} of {settings.steps} steps leaves no step to run")
        if settings.solver != "ddim" and settings.spacing == "leading":
            # Its last step spans most of the log-SNR, and a second-order solver extrapolates over it.
            warnings.warn(
                f"spacing: leading with solver {settings.solver} overshoots in its long last step, and few samples "
                "flip; use spacing trailing, or solver ddim",
                stacklevel=2,
            )
        return settings
