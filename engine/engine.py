"""Engine: opens models, makes counterfactuals, and hands explanations and audits to those who do them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .blackbox.box import BlackBox, as_box
from .blackbox.kinds import is_box, may_convert
from .blackbox.options import BoxOptions
from .config import OFFICIAL_PROMPTS, PRESET_PROMPTS, Config
from .core.core import EngineCore
from .core.factory import EngineFactory
from .core.targets import Targets
from .errors import UsageError
from .models.protocols import Classifier
from .packs import Pack, is_pack
from .runtime.registry import AUTO, find, names
from .runtime.runners import REAL_IMAGES

if TYPE_CHECKING:
    from .audit.results import Results
    from .blackbox.opening import Shown
    from .core.regions import RegionLike
    from .core.result import Counterfactuals
    from .guidance.sampler import Observer
    from .models.backbone import Backbone
    from .outputs import Run
    from .saliency.explain import Explanations
    from .surrogate.rounds import Plan
    from .surrogate.surrogate import Surrogate

QUERIES_EACH = EngineCore.queries_each
OnStage = Callable[[int, int, str, Any], None]
# What `wrap_classifier` is given by `from_pretrained` itself.
OF_THE_ENGINE = ("module", "labels", "image_size")


def _samples(pack: Pack) -> Callable[[int], Tensor]:
    return lambda size: pack.samples("test", count=REAL_IMAGES).images


class Engine(EngineCore):
    __doc__ = EngineCore.__doc__

    @classmethod
    def from_pack(
        cls, name: str = "digits", classifier: str = "clean", config: Config | None = None, **options: Any
    ) -> Engine:
        """Open an embedded pack (`digits`) or a pack's folder, verifying every file; options are those of `Engine`.

        The device is `auto` without one.

        Raises:
            UsageError: there is no such pack or classifier. CounterlensError: a file is missing or was changed.
        """
        if not isinstance(classifier, str):
            raise UsageError(
                f"classifier: from_pack takes the name of one of the pack's, not a {type(classifier).__name__}; for "
                f"your own use Engine.from_pretrained({str(name)!r}, module, labels=[...])"
            )
        pack = Pack(name)
        settings = {mode: pack.manifest["settings"][mode] for mode in ("realistic", "audit")}
        source = {"pack": name, "classifier": classifier}
        plain = options.get("attention") != "xformers"  # which diffusers' own layers call
        models = (pack.diffusion(plain=plain), pack.classifier(classifier))
        options = _of_pack(pack, models[0]) | options
        options["device"] = _device(options)
        engine = cls(*models, config, pack_settings=settings, source=source, **options)
        engine.runners.real_images = pack.samples("test", count=REAL_IMAGES).images
        return engine

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path,
        classifier: str | Path | nn.Module | Classifier | Callable[..., Any],
        config: Config | None = None,
        *,
        labels: Sequence[str] | None = None,
        prompts: str | Sequence[str] | None = None,
        classes: Sequence[int] | None = None,
        preprocessing: dict[str, Any] | None = None,
        head: str | Path | None = None,
        weights: str | Path | None = None,
        image_size: int | None = None,
        dtype: str = "float32",
        box: BoxOptions | None = None,
        shown: Shown | None = None,
        **options: Any,
    ) -> Engine:
        """Explain a classifier with a public diffusion model; everything is checked before the first step.

        All modules, a classifier's of your own too, are moved to the device: CUDA where there is one, else the CPU.

        Args:
            model: folder in diffusers' layout, hub id (`owner/name`), or a pack (`digits`).
            classifier: see `models.image_classifiers.open_classifier`; or your own module; or an ONNX file,
                which guides where its gradient is shown to be right (`blackbox.opening.open_called`); or what can only
                be called, which makes predictions and maps, and guides nothing.
            config: defaults for every call; without a preset or mode, the published ImageNet setting.
            labels: names of the logits, where the classifier does not bring its own.
            prompts: of a text-conditional model and of zero-shot classifiers: a name in
                `models.stable_diffusion.PROMPTS`, a template with {label}, or one prompt per label.
            classes: of a class-conditional model, one per label, where names do not tell.
            preprocessing: of your own module or ONNX file: arguments of `models.image_classifiers.wrap_classifier`.
            head, weights: files, see `open_classifier`.
            image_size: for Stable Diffusion; its own without it.
            dtype: of the diffusion model's weights: float32, bfloat16 or float16. Guidance is summed in float32, and
                the classifier stays in float32: gradients of log p fall below what float16 holds.
            box: how a classifier that can only be called is asked.
            shown: some of your images, [N, 3, H, W] in [0, 1], or what reads them at a size: an ONNX file guides where
                it is shown to be right on these too. Without them a pack's.
            options: of `Engine`: backend, checkpointing, memory_budget, neighbours, guidance_decoder, device (`auto`).

        Raises:
            UsageError: parts or options do not fit. CounterlensError: files are missing or corrupt.
        """
        from .blackbox.opening import open_called
        from .models.image_classifiers import open_classifier, wrap_classifier
        from .models.load import open_diffusion

        config = config or Config()
        if preprocessing is not None:
            if not isinstance(classifier, nn.Module) and not may_convert(classifier):
                raise UsageError(
                    "preprocessing: for a module of your own or an ONNX file; this classifier brings its own"
                )
            if not isinstance(preprocessing, Mapping):
                raise UsageError(
                    f"preprocessing: expected a mapping such as {{'mean': ..., 'std': ...}}, got {preprocessing!r:.80}"
                )
            known = [p for p in inspect.signature(wrap_classifier).parameters if p not in OF_THE_ENGINE]
            if wrong := [key for key in preprocessing if key not in known]:
                raise UsageError(f"preprocessing: {wrong[0]!r} is no key of it; expected some of {', '.join(known)}")
        pack = Pack(str(model)) if is_pack(model) else None
        if pack is None:
            diffusion = open_diffusion(model, dtype=dtype, image_size=image_size)
        elif image_size is not None:
            raise UsageError("image_size: a pack has one image size; only Stable Diffusion takes others")
        else:
            diffusion = pack.diffusion(dtype, plain=options.get("attention") != "xformers")
        said = prompts or PRESET_PROMPTS.get(config.preset or "", "imagenet")
        if config.match_official and diffusion.conditioning == "text" and isinstance(said, str):
            said = OFFICIAL_PROMPTS.get(said, said)
        size = diffusion.image_size
        explained: Classifier
        what: Any = classifier
        function = callable(what) and not isinstance(what, nn.Module) and not hasattr(what, "logits")
        if function or (isinstance(what, str | Path) and is_box(what)):
            named_labels = labels or (diffusion.labels if pack is not None else [])
            if shown is None and pack is not None:
                shown = _samples(pack)
            explained = open_called(
                what, named_labels, image_size=size, options=box, preprocessing=preprocessing, images=shown
            )
        elif isinstance(classifier, str | Path):
            explained = open_classifier(
                classifier, image_size=size, labels=labels, prompts=said, head=head, weights=weights
            )
        elif isinstance(what, nn.Module) and not isinstance(what, BlackBox):
            if labels is None:
                raise UsageError("labels: a module has none; give one name per logit")
            explained = wrap_classifier(what, labels, image_size=size, **(preprocessing or {}))
        else:
            explained = what
        if diffusion.conditioning == "text" and config.preset == "celeba-text" and prompts is None:
            raise UsageError("prompts: celeba-text has two attributes; say smile or age, or give two prompts")
        diffusion.describe(explained.labels, prompts=said, classes=classes)
        tuned = None
        if pack is not None:
            tuned = pack.manifest["settings"]
            options = _of_pack(pack, diffusion) | options
        engine = cls(diffusion, explained, config, pack_settings=tuned, **options | {"device": _device(options)})
        named = str(classifier) if isinstance(classifier, str | Path) else type(explained.module).__name__
        if (opened_box := as_box(explained)) is not None:
            named = opened_box.name
        engine.names = {"model": str(model), "classifier": named}
        if pack is not None:
            engine.runners.real_images = pack.samples("test", count=REAL_IMAGES).images
        return engine

    @classmethod
    def from_black_box(
        cls,
        model: str | Path,
        classifier: str | Path | BlackBox | Callable[..., Any],
        surrogate: str | Path | Surrogate,
        config: Config | None = None,
        *,
        images: Tensor | None = None,  # [N, 3, H, W] in [0, 1]
        plan: Plan | None = None,
        queries_each: int = QUERIES_EACH,
        on_stage: OnStage = lambda *_: None,
        **options: Any,
    ) -> Engine:
        """Explain a classifier that can only be called, through a student of it; the box itself judges every result.

        Args:
            model, config, options: see `from_pretrained`.
            classifier: see `blackbox.box.open_box`; or an open box.
            surrogate: a trained one or its folder; with `images`, one that is not there yet is trained into it.
            images, plan, on_stage: see `train_surrogate`.
            queries_each: see `with_surrogate`.

        Raises:
            UsageError: parts or options do not fit, or there is no surrogate. CounterlensError: the box is not what it
                was when the surrogate was trained; the message says in what.
        """
        from .surrogate.surrogate import is_surrogate

        if may_convert(classifier):
            options["box"] = (options.get("box") or BoxOptions()).model_copy(update={"convert": "never"})
        engine = cls.from_pretrained(model, classifier, config, **options)
        if images is not None and isinstance(surrogate, str | Path) and not is_surrogate(surrogate):
            surrogate = engine.train_surrogate(images, surrogate, plan, on_stage)
        return engine.with_surrogate(surrogate, queries_each=queries_each)

    def train_surrogate(
        self,
        images: Tensor,  # [N, 3, H, W] in [0, 1]
        out: str | Path | None = None,
        plan: Plan | None = None,
        on_stage: OnStage = lambda *_: None,
    ) -> Surrogate:
        """Train a student of this engine's classifier, which can only be called.

        Args:
            images: of the user's, see `surrogate.rounds.train_surrogate`, errors too.
            out: folder; the same call goes on in it.
            plan: every number. Counterfactuals are those of the engine's config, under speed `fast` if it names none.
            on_stage: told (stage, stages, its name, the state) after each stage.
        """
        from .surrogate.rounds import Plan, train_surrogate, untrained

        box, plan = self._called(), plan or Plan()
        engine = self._guided_by(untrained(box, self.image_size, plan))
        engine.box = box
        engine.config = self.config.model_copy(update={"speed": self.config.speed or "fast"})
        pack = self.names.get("model", "")
        hidden: Any = Pack(pack).mean_colour if is_pack(pack) else "blur"
        return train_surrogate(engine, box, images, plan, out=out, hidden=hidden, on_stage=on_stage)

    def with_surrogate(self, surrogate: str | Path | Surrogate, *, queries_each: int = QUERIES_EACH) -> Engine:
        """This engine, guided by a student of its classifier, which can only be called and judges every result.

        Args:
            surrogate: trained on this classifier, or its folder.
            queries_each: that one counterfactual may take, its image's own included.

        Raises:
            UsageError: there is none, or it is of another classifier. CounterlensError: that answers otherwise by now.
        """
        from .surrogate.surrogate import Surrogate, open_surrogate

        if queries_each < 2:
            raise UsageError(f"queries_each: expected 2 or more, one for the image, one to judge; got {queries_each}")
        box = self._called()
        trained = surrogate if isinstance(surrogate, Surrogate) else open_surrogate(surrogate)
        trained.check(box)
        engine = self._guided_by(trained.classifier)
        engine.box, engine.queries_each = box, queries_each
        engine.names |= {"surrogate": trained.digest, "black_box": box.identity, "queries_each": str(queries_each)}
        return engine

    def _called(self) -> BlackBox:
        if (box := as_box(self.classifier)) is None:
            raise UsageError("surrogate: of what can only be called; this classifier guides by its own gradient")
        return box

    def _guided_by(self, classifier: Classifier) -> Engine:
        """An engine of the same parts with another classifier."""
        factory = EngineFactory.of(self)
        engine = type(self)(**factory.parts | {"classifier": classifier, "device": self.device})
        engine.names, engine.slots = dict(self.names), self.slots
        engine.runners.real_images = self.runners.real_images
        return engine

    def counterfactual(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        targets: Targets = "runner-up",
        seeds: Sequence[int] | None = None,
        config: Config | Sequence[Config] | None = None,
        progress: Callable[[int, int, Tensor], None] | None = None,
        on_step: Callable[[int, int], None] | None = None,
        budget_s: float | None = None,
        observe: Observer | None = None,
        whole: bool = True,
        region: RegionLike | Sequence[RegionLike | None] | None = None,
    ) -> Counterfactuals:
        """See `EngineCore.counterfactual`. Through a surrogate, what the box does not confirm is tried again.

        One try it is with several configs or counterfactuals of an image, a budget, or where steps are watched.
        """
        single = (config or self.config) if config is None or isinstance(config, Config) else None
        watched = (progress, budget_s, observe) != (None, None, None)
        if self.box is None or single is None or single.count > 1 or watched:
            return super().counterfactual(
                images, targets, seeds, config, progress, on_step, budget_s, observe, whole, region
            )
        from .surrogate.confirming import counterfactual

        return counterfactual(self, images, targets, seeds, single, region, self.queries_each - 1, on_step)

    def explain(
        self,
        images: Tensor,  # [B, 3, H, W] in [0, 1]
        *,
        explained: Targets | None = None,
        method: str = "lax",
        quantity: str | Callable[[Tensor, Tensor], Tensor] = "class",
        adapter: Any = None,
        baseline: Any = None,
        alpha_min: float = 0.5,
        layer: str | None = None,
        metrics: Sequence[str] | None = None,
        counterfactual: bool = False,
        targets: Targets = "runner-up",
        seeds: Sequence[int] | None = None,
        config: Config | None = None,
    ) -> Explanations:
        """Show where the evidence is, how good that answer is (MSI), and asked for, what would have to change.

        Args:
            images: [B, 3, H, W] in [0, 1] at the model's image size.
            explained: labels whose evidence is shown, as for `counterfactual`; the predictions without it.
            method: `lax`, or one of `saliency.table.METHODS`.
            quantity: `class`, groups of labels (`0,1,2/3,4`), or log-odds as a function of logits and targets; see
                `metrics.quantities.make_quantity`.
            adapter: of `lax`: one that is open, or its folder; the pack's without it.
            baseline: what hides pixels, see `metrics.inputs.make_baseline`; the pack's mean colour, else `blur`.
            alpha_min: of MSI.
            layer: of `gradcam`, see `saliency.methods.explain_with`.
            metrics: names or groups in `metrics.table`; those that cost nothing beside MSI without it.
            counterfactual: compute counterfactuals as well, with `targets`, `seeds` and `config`.

        Raises:
            UsageError: images or an argument do not fit, or there is no adapter. CounterlensError: the adapter is of
                another model, or a package is missing.
        """
        from .metrics.inputs import check_finite
        from .saliency.explain import explain_by

        self.check_images(images)
        check_finite("images", images)
        return explain_by(
            self, images, explained=explained, method=method, quantity=quantity, adapter=adapter, baseline=baseline,
            alpha_min=alpha_min, layer=layer, metrics=metrics, counterfactual=counterfactual, targets=targets,
            seeds=seeds, config=config,
        )  # fmt: skip

    def audit(
        self,
        source: str | Path,
        out: str | Path,
        config: Config | None = None,
        judges: Mapping[str, Classifier] | None = None,
        **options: Any,
    ) -> Results:
        """Explain a whole data set into a folder; the same call again goes on where it was stopped.

        Args:
            source: image folder, CSV or Parquet manifest (image, label, target, id), Parquet with image bytes, or a
                folder of Hugging Face datasets.
            out: the results' folder (`engine.audit.results` says what is in it).
            config: of the counterfactuals, instead of the engine's.
            judges: classifiers that guidance never sees, by name; flips that they confirm count as transferred.
            options: of `engine.audit.plan.Options` and `engine.audit.run.audit`.

        Returns:
            The results: rows, and what the manifest says.

        Raises:
            UsageError: source or options do not fit, or another audit is in `out`. CounterlensError: a file cannot be
                written, or another process works there.
        """
        from .audit.run import audit

        return audit(self, source, out, config, judges, **options)

    def export_counterfactual(
        self, folder: str | Path, config: Config | None = None, *, adapter: Any = None, **options: Any
    ) -> dict[str, Any]:
        """Write a whole counterfactual, loop and all, as one ONNX file with a card that says how to use it.

        Args:
            folder, config, options: see `whole_run.export_counterfactual`, errors too.
            adapter: LAX, or its folder, whose map the pages show beside the counterfactual; the pack's without it.

        Returns:
            What the card, counterfactual.json, holds.
        """
        from .core.whole_run import export_counterfactual

        if options.get("pages"):
            options["saliency"] = self._map_writer(adapter, options.get("say", lambda _: None))
        elif adapter is not None:
            raise UsageError("adapter: its map is shown by a page; `--what saliency` writes it without one")
        return export_counterfactual(self, folder, config, **options)

    def _map_writer(self, adapter: Any, say: Callable[[str], None]) -> Callable[[Run], dict[str, Any]] | None:
        """What writes the map's file beside a page, or None where these models have no adapter."""
        from .saliency.explain import find_adapter, hidden_by, pack_adapters
        from .saliency.one_file import write_saliency

        pack = Pack(self.source["pack"]) if "pack" in self.source else None
        name = self.source.get("classifier", "")
        if adapter is None and (pack is None or (name, "class") not in pack_adapters(pack)):
            return None
        found = find_adapter(adapter, self.classifier, "class", pack, name)
        return lambda run: write_saliency(found, run, baseline=hidden_by(pack), pack=pack, say=say)


def _of_pack(pack: Pack, diffusion: Backbone) -> dict[str, Any]:
    """Options of `Engine` that a pack brings beside its models."""
    return {
        "guidance_decoder": pack.guidance_decoder(),
        "distilled": pack.distilled(diffusion),
        "speeds": pack.manifest.get("speeds"),
    }


def _device(options: dict[str, Any]) -> str | torch.device:
    """The device that options of `Engine` name, or `auto`: the CPU for a runtime that knows no other here."""
    device, runtime = options.get("device") or "auto", options.get("runtime", AUTO)
    if device == "auto" and runtime in names():
        on_gpu, on_cpu = (find(runtime).missing(torch.device(d)) for d in ("cuda", "cpu"))
        return "cpu" if on_gpu and not on_cpu else device
    return device
