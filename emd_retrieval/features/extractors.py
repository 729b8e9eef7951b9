"""Choosing an extractor by name: FCN, Grid or Sampling."""

from __future__ import annotations

from collections.abc import Sequence

from emd_retrieval._checks import check_choice
from emd_retrieval.features.backbones import Backbone
from emd_retrieval.features.extractor import Extractor
from emd_retrieval.features.fcn import FCNExtractor
from emd_retrieval.features.grid import GridExtractor
from emd_retrieval.features.sampling import SamplingExtractor
from emd_retrieval.features.transforms import Span

EXTRACTORS = ("fcn", "grid", "sampling")


def build_extractor(
    name: str,
    backbone: Backbone,
    *,
    pyramid: Sequence[int] = (3, 2, 1),
    include_map: bool = False,
    grid: Sequence[int] = (3, 2),
    patches: int = 25,
    patch_size: int | None = None,
    context: float = 2.0,
    training_context: Span | None = None,
    scale: Span = (0.08, 1.0),
    ratio: Span = (3 / 4, 4 / 3),
    embedding_size: int | None = None,
) -> Extractor:
    """Build an extractor by name; it takes what concerns it.

    Args:
        name: One of :data:`EXTRACTORS`.
        backbone: A dense feature extractor.
        pyramid: FCN: levels of the feature pyramid.
        include_map: FCN: append the cells of the map itself.
        grid: Grid: levels of the image pyramid.
        patches: Sampling: patches an image.
        patch_size: Grid and Sampling: side of a patch, in pixels.
        context: Grid: how far a cell is enlarged for evaluation.
        training_context: Grid: the range of it in training.
        scale: Sampling: area of a patch, as shares of the image.
        ratio: Sampling: width over height of a patch.
        embedding_size: All: channels of the linear embedder, ``None`` for the backbone's own.

    Raises:
        ValueError: If the name is unknown, or a setting of that extractor is out of range.
    """
    check_choice("extractor", name, EXTRACTORS)
    if name == "fcn":
        return FCNExtractor(
            backbone, pyramid=pyramid, include_map=include_map, embedding_size=embedding_size
        )
    if name == "grid":
        return GridExtractor(
            backbone,
            grid=grid,
            patch_size=patch_size,
            context=context,
            training_context=training_context,
            embedding_size=embedding_size,
        )
    return SamplingExtractor(
        backbone,
        patches=patches,
        patch_size=patch_size,
        scale=scale,
        ratio=ratio,
        embedding_size=embedding_size,
    )


__all__ = [
    "EXTRACTORS",
    "Extractor",
    "FCNExtractor",
    "GridExtractor",
    "SamplingExtractor",
    "build_extractor",
]
