"""A trained run in the place of a backbone: ``--model RUN`` of every command that takes images."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from emd_retrieval.features import Extractor
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
