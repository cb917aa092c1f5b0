"""Packs: a diffusion model, classifiers and data in one checked folder."""

from __future__ import annotations

import copy
import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from ..errors import CounterlensError, UsageError
from ..models.protocols import SoftmaxClassifier
from ..provenance import digest, session
from ..showing import one_line
from .rendering import choose_markers, draw_markers, render

if TYPE_CHECKING:
    from ..models.backbone import Backbone
    from ..models.latent import ClassConditionalLatentDiffusion
    from ..models.tiny import TinyDecoder
    from .rendering import Marker

SPLITS = ("train", "validation", "test")
TINY = "tiny-decoder"
FEW_STEPS = "few-steps/changes.safetensors"
FORMAT, VERSION = "counterlens-pack", 1


@dataclass(frozen=True)
class Samples:
    """Rendered digits: images [N, 3, 32, 32] in [0, 1], labels, markers, and each sample's id and seed."""

    images: Tensor
    labels: list[int]
    markers: list[Marker | None]
    ids: list[int]
    seeds: list[int]

    __repr__ = one_line


def find_pack(name: str) -> Path:
    """The folder of an embedded pack (`digits`) or of a pack at a path.

    Raises:
        UsageError: neither exists.
    """
    embedded = Path(__file__).parent / name
    for folder in (embedded, Path(name)):
        if (folder / "pack.json").is_file():
            return folder
    raise UsageError(f"pack: {name!r} is neither an embedded pack (digits) nor a folder with a pack.json")


class Pack:
    """A checked pack folder; opening it verifies every file against the manifest.

    Raises:
        CounterlensError: a file is missing or differs from the manifest; the message names it.
    """

    def __init__(self, name: str) -> None:
        self.folder = find_pack(name)
        manifest_path = self.folder / "pack.json"
        try:
            self.manifest: dict[str, Any] = json.loads(manifest_path.read_text())
            self.name: str = self.manifest["name"]
            files: dict[str, str] = self.manifest["files"]
            if (self.manifest["format"], self.manifest["version"]) != (FORMAT, VERSION):
                raise CounterlensError(f"{manifest_path}: expected {FORMAT} version {VERSION}")
        except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, OSError) as error:
            raise CounterlensError(f"{manifest_path}: not a pack manifest ({type(error).__name__}: {error})") from error
        for file, expected in files.items():
            path = self.folder / file
            if not path.is_file():
                raise CounterlensError(f"{path}: missing from the pack; reinstall counterlens or restore the file")
            if hashlib.sha256(path.read_bytes()).hexdigest() != expected:
                raise CounterlensError(f"{path}: differs from the pack's manifest; reinstall or restore the file")

    @cached_property
    def digits(self) -> dict[str, Tensor]:
        """The 1,797 glyphs: `glyph` [N, 8, 8] uint8, `label` [N], `split` [N]."""
        return load_file(self.folder / "digits.safetensors")

    @property
    def mean_colour(self) -> Tensor:
        """Mean colour of the training images: [3] in [0, 1]."""
        return torch.tensor(self.manifest["training"]["mean_colour"])

    def classifier_names(self) -> list[str]:
        """Names that `classifier` takes."""
        return sorted(p.name for p in (self.folder / "classifiers").iterdir() if p.is_dir())

    def classifier(self, name: str) -> SoftmaxClassifier:
        """Load one of the pack's classifiers in float32.

        Raises:
            UsageError: there is none of that name.
        """
        from .architectures import ARCHITECTURES

        if name not in self.classifier_names():
            raise UsageError(f"classifier: {name!r} is not in pack {self.name!r}: {', '.join(self.classifier_names())}")
        folder = self.folder / "classifiers" / name
        config = json.loads((folder / "config.json").read_text())
        module = ARCHITECTURES[config["architecture"]](classes=len(config["labels"]))
        _load(module, folder / "model.safetensors")
        return SoftmaxClassifier(module.eval().requires_grad_(False), config["labels"])

    def diffusion(self, dtype: str = "float32", *, plain: bool = True) -> ClassConditionalLatentDiffusion:
        """Load the diffusion model (it is stored in float16) with weights of this type.

        Args:
            dtype: of the weights.
            plain: take the networks of `models.plain`, where they fit; else diffusers', which have the same results.

        Raises:
            UsageError: there is no such type here.
        """
        from ..models.backbone import vae_dtype
        from ..models.files import check_dtype
        from ..models.latent import ClassConditionalLatentDiffusion
        from ..models.plain import Autoencoder, UNet, fits, scaled_linear

        held = check_dtype(dtype, torch.device("cpu"))
        digits = [str(d) for d in range(10)]
        said = [json.loads((self.folder / part / "config.json").read_text()) for part in ("vae", "unet")]
        scheduler = json.loads((self.folder / "scheduler" / "scheduler_config.json").read_text())
        usual = (scheduler["beta_schedule"], scheduler["trained_betas"], scheduler["rescale_betas_zero_snr"])
        if not plain or usual != ("scaled_linear", None, False) or not all(map(fits, said)):
            return ClassConditionalLatentDiffusion.open(self.folder, held, names=digits)
        vae, unet = Autoencoder(said[0]), UNet(said[1])
        for module, part, kind in ((vae, "vae", vae_dtype(said[0], held)), (unet, "unet", held)):
            _load(module, self.folder / part / "diffusion_pytorch_model.safetensors")
            module.to(kind).eval().requires_grad_(False)
        levels = scaled_linear(scheduler)
        return ClassConditionalLatentDiffusion(vae, unet, levels, digits, scheduler["prediction_type"])

    def distilled(self, diffusion: Backbone) -> Backbone | None:
        """This diffusion model of the pack with the UNet for few steps, if there is one (see `packs.few_steps`).

        The VAE and all else are shared.
        """
        from ..models.low_rank import merged

        if FEW_STEPS not in self.manifest["files"]:
            return None
        other = copy.copy(diffusion)
        other.denoiser = merged(diffusion.denoiser, self.folder / FEW_STEPS)
        return other

    def guidance_decoder(self) -> TinyDecoder | None:
        """The small decoder for gradients, if the pack has one (see `packs.distill`)."""
        from ..models.tiny import open_decoder

        return open_decoder(self.folder / TINY) if (self.folder / TINY).is_dir() else None

    def samples(
        self,
        split: str,
        *,
        count: int | None = None,
        marker: str = "none",
        seed: int = 0,
    ) -> Samples:
        """Render digits of a split; a sample depends on its id, the seed and the marker rule only.

        Args:
            split: `train`, `validation` or `test`.
            count: how many, spread evenly over the classes; all without it.
            marker: `none`, `random`, `matching` or `conflicting` (see `packs.rendering.choose_markers`).
            seed: of the renderings.

        Raises:
            UsageError: the split, the count or the marker rule is not one that there is.
        """
        if split not in SPLITS:
            raise UsageError(f"split: expected one of {', '.join(SPLITS)}, got {split!r}")
        index = (self.digits["split"] == SPLITS.index(split)).nonzero().flatten()
        if count is not None and not 1 <= count <= len(index):
            raise UsageError(f"count: expected 1 to {len(index)} for split {split!r}, got {count}")
        labels = self.digits["label"][index].long()
        # 0, 1, ... 9, 0, 1, ...: the first samples of each class, then the second ones.
        rank = torch.zeros(len(index), dtype=torch.long)
        for c in range(10):
            rank[labels == c] = torch.arange(int((labels == c).sum()))
        index = index[(rank * 10 + labels).argsort()][:count]
        ids = index.tolist()
        # Above every seed that training used.
        seeds = [_sample_seed(seed, i) for i in ids]
        label_list = self.digits["label"][index].tolist()
        try:
            markers = choose_markers(label_list, seeds, marker)
        except ValueError as error:
            raise UsageError(str(error)) from error
        images = draw_markers(render(self.digits["glyph"][index], seeds), markers)
        return Samples((images * 255).round() / 255, label_list, markers, ids, seeds)


def _sample_seed(seed: int, number: int) -> int:
    """A rendering's seed, above every seed that training used; where a run's seed is too large to count up, hashed."""
    if seed < 2**31:
        return 2**32 + 2**16 * seed + number
    return 2**62 + int.from_bytes(hashlib.sha256(f"{seed}/{number}".encode()).digest()[:7], "little")


def _load(module: torch.nn.Module, path: Path) -> None:
    try:
        module.load_state_dict({k: v.float() for k, v in load_file(path).items()})
    except (SafetensorError, RuntimeError) as error:
        raise CounterlensError(f"{path}: {error}") from error


def pack_facts(name: str) -> dict[str, Any]:
    """A pack by name and contents, and the session."""
    pack = Pack(name)
    return {"pack": pack.name, "pack_hash": digest(pack.manifest["files"]), **session()}


def is_pack(name: str | Path) -> bool:
    """Whether a name is that of an embedded pack, or a pack's folder."""
    return str(name) == "digits" or (Path(name) / "pack.json").is_file()
