"""What turns images into sets, for every command: a backbone and extractor, or a trained run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emd_retrieval.features import Extractor, build_extractor, load_backbone
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.training import load_model
from emd_retrieval.training.model import read_summary


@dataclass(frozen=True)
class ImageModel:
    """An extractor with what belongs to it.

    Attributes:
        extractor: In evaluation mode.
        matcher: The similarity of its sets.
        resize: Short side of the images, in pixels.
        crop: Side of the centre crop, in pixels.
        described: Where it comes from, for records and manifests.
    """

    extractor: Extractor
    matcher: EMDMatcher
    resize: int
    crop: int
    described: Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class FeatureSettings:
    """What makes local features of images: the base of the settings of commands that take images.

    Attributes:
        model: Folder of a trained run: its extractor, views and matching stand in the place of all
            settings of backbone, extractor, views and matcher. Of a frozen trunk the ``weights``
            are still needed.
        backbone: A timm model.
        weights: Local weights file; timm's hub by default.
        layer: Index of an intermediate feature map of the backbone; the last one by default.
        extractor: Local features: ``"fcn"``, ``"grid"`` or ``"sampling"``.
        pyramid: FCN: levels of the feature pyramid.
        include_map: FCN: append the cells of the map itself.
        grid: Grid: levels of the image pyramid.
        context: Grid: how far a cell is enlarged.
        patches: Sampling: patches an image.
        patch_size: Grid and Sampling: side of a patch, in pixels; by default what the backbone was
            trained on.
        resize: Short side of the images, in pixels.
        crop: Side of the centre crop, in pixels.
        device: Torch device of the backbone.
        seed: Seed of random patches, and of a command's own draws.
    """

    model: Path | None = None
    backbone: str = "resnet50"
    weights: Path | None = None
    layer: int | None = None
    extractor: str = "fcn"
    pyramid: Sequence[int] = (3, 2, 1)
    include_map: bool = False
    grid: Sequence[int] = (3, 2)
    context: float = 2.0
    patches: int = 25
    patch_size: int | None = None
    resize: int = 256
    crop: int = 224
    device: str = "cpu"
    seed: int = 0

    def load(self, matcher: EMDMatcher | None = None) -> ImageModel:
        """The trained run, or the backbone under its extractor.

        Args:
            matcher: Goes with a backbone; a trained run has its own.

        Raises:
            FileNotFoundError: If weights or the run are missing.
            ValueError: If the backbone, the weights or the run cannot be used.
        """
        if self.model is not None:
            return load_run(self.model, weights=self.weights)
        extractor = build_extractor(
            self.extractor,
            load_backbone(self.backbone, weights=self.weights, layer=self.layer),
            pyramid=self.pyramid,
            include_map=self.include_map,
            grid=self.grid,
            context=self.context,
            patches=self.patches,
            patch_size=self.patch_size,
        )
        return ImageModel(
            extractor.eval(),
            matcher or EMDMatcher(),
            self.resize,
            self.crop,
            {"weights": self.weights.name if self.weights else "timm's hub"},
        )


def load_run(run: str | Path, *, weights: str | Path | None = None) -> ImageModel:
    """A trained run as a model.

    Args:
        run: The run's folder.
        weights: The weights file of a frozen trunk, where the recipe does not say where it lies.

    Raises:
        FileNotFoundError: If the run has not finished, or a frozen trunk's weights are not there.
        ValueError: If the files do not fit each other.
    """
    run = Path(run)
    model = load_model(run, weights=weights)
    recipe, summary = model.recipe, read_summary(run)
    return ImageModel(
        model.extractor,
        recipe.matching,
        recipe.views.resize,
        recipe.views.crop,
        {
            "model": run.resolve().name,
            "method": recipe.model.method,
            "loss": recipe.loss.name,
            "weights": summary["weights"]["file"],
        },
    )
