"""What the metrics of `table` compute: N maps of one method and one value for each, passes through the model shared."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from torch import Tensor

from ..errors import UsageError
from ..models.holding import switched
from ..showing import one_line
from . import faithfulness, localisation, robust, shape
from .imputation import road
from .inputs import Baseline, said
from .msi_score import MSI, msi
from .paths import Faithfulness, deletion, insertion
from .quantities import Quantity
from .stability import Explain, Sensitivity, sensitivity
from .table import METRICS

STEPS = 32  # of the insertion and deletion curves
RADIUS = 0.02  # of the noise of sensitivity: 5 of 255
SUBSET = 1 / 8  # share of pixels in the subsets of faithfulness correlation

Curve = tuple[Sequence[float], Sequence[float]]  # x and y [K]


@dataclass
class Scoring:
    """N saliency maps to be scored, and what several metrics share, computed once when it is asked for.

    Attributes:
        classifier: see `curves.perturbation_curve`; images: [N, 3, H, W] in [0, 1]; target: [N].
        saliency: [N, H, W] in [0, 1], compared by value. scores: [N, H, W] as the method gives them, compared by rank.
        quantity: what is explained. baseline: what hides pixels, see `inputs.make_baseline`.
        alpha_min: of MSI. seeds: of ties, one per image. batch: images in a forward pass.
        judge: another classifier of the same labels, for group `judge`. masks: [N, H, W] bool, for group `masks`.
        explain: the method, from images and targets to maps, for group `stability`.
    """

    classifier: Any
    images: Tensor
    saliency: Tensor
    scores: Tensor
    target: Tensor
    quantity: Quantity
    baseline: Baseline
    alpha_min: float
    seeds: Sequence[int]
    batch: int = 64
    judge: Any = None
    masks: Tensor | None = None
    explain: Explain | None = None

    __repr__ = one_line

    @property
    def options(self) -> dict[str, Any]:
        """What every perturbation metric is given."""
        return {"quantity": self.quantity, "seeds": self.seeds, "batch_size": self.batch}

    @cached_property
    def msi(self) -> MSI:
        """MSI by value and by area."""
        return msi(
            self.classifier, self.images, self.saliency, self.target, alpha_min=self.alpha_min, scores=self.scores,
            baseline=self.baseline, **self.options,
        )  # fmt: skip

    @cached_property
    def inserted(self) -> Faithfulness:
        """The insertion curve of `scores`."""
        return insertion(
            self.classifier, self.images, self.scores, self.target, steps=STEPS, baseline=self.baseline, **self.options
        )

    @cached_property
    def removed(self) -> Faithfulness:
        """The deletion curve of `scores`."""
        return deletion(
            self.classifier, self.images, self.scores, self.target, steps=STEPS, baseline=self.baseline, **self.options
        )

    @cached_property
    def imputed(self) -> Faithfulness:
        """ROAD of `scores`."""
        return road(self.classifier, self.images, self.scores, self.target, **self.options)

    @cached_property
    def neighbours(self) -> list[Scoring]:
        """The maps moved by one pixel, in eight directions."""
        pairs = zip(robust.neighbours(self.saliency), robust.neighbours(self.scores), strict=True)
        return [replace(self, saliency=saliency, scores=scores) for saliency, scores in pairs]

    @cached_property
    def smoothed(self) -> list[Scoring]:
        """The maps' 3x3 means: one."""
        return [replace(self, saliency=robust.smooth(self.saliency), scores=robust.smooth(self.scores))]

    @cached_property
    def judged(self) -> Scoring:
        """The same maps asked of the judge."""
        return replace(self, classifier=self.judge)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Change of the maps under noise."""
        assert self.explain is not None
        return sensitivity(
            self.explain, self.images, self.saliency, self.target, radius=RADIUS, seeds=self.seeds,
            batch_size=self.batch,
        )  # fmt: skip

    @property
    def shape(self) -> Any:
        """What is measured of a map alone."""
        return shape

    @property
    def patch(self) -> int:
        """Side of the squares of `field` metrics: an eighth of the image's."""
        return max(1, min(self.images.shape[2:]) // 8)

    @property
    def per_step(self) -> int:
        """Pixels in a step of `field` metrics: as many steps as the curves have."""
        return max(1, self.images.shape[2] * self.images.shape[3] // STEPS)

    @property
    def subset(self) -> int:
        """Pixels in the subsets of faithfulness correlation."""
        return max(1, round(SUBSET * self.images.shape[2] * self.images.shape[3]))

    def field(self, name: str, **conventions: Any) -> Any:
        """A metric of `faithfulness`, of `saliency`."""
        return getattr(faithfulness, name)(
            self.classifier, self.images, self.saliency, self.target, baseline=self.baseline, **self.options,
            **conventions,
        )  # fmt: skip

    def inside(self, name: str) -> Tensor:
        """A metric of `localisation`."""
        assert self.masks is not None
        maps = self.saliency if name == "relevance_mass" else self.scores
        return getattr(localisation, name)(maps, self.masks)

    @property
    def difference(self) -> Curve:
        """The mean of Ins - Del over MSI's thresholds."""
        curves = self.msi.curves
        assert curves.keep is not None
        assert curves.remove is not None
        return curves.abscissae.mean(0).tolist(), (curves.keep - curves.remove).mean(0).tolist()

    def curves(self, names: Sequence[str]) -> dict[str, Curve]:
        """What is drawn of those metrics that bring a curve."""
        return {name: curve(self) for name in names if (curve := METRICS[name].curve) is not None}

    def values(self, names: Sequence[str]) -> dict[str, Tensor]:
        """Metrics by name, [N] each.

        Raises:
            UsageError: sizes do not fit, a map holds NaN, or a metric gives another shape. NotFinite: the classifier
                gives NaN or infinity.
        """
        assert self.msi is not None  # first: that maps are constant is said once, of the values
        with switched(said, True):
            found = {name: METRICS[name].function(self) for name in names}
        for name, values in found.items():
            if not isinstance(values, Tensor) or values.shape != (len(self.images),):
                got = list(values.shape) if isinstance(values, Tensor) else type(values).__name__
                raise UsageError(f"metric {name}: expected [{len(self.images)}] of as many maps, got {got}")
        return found
