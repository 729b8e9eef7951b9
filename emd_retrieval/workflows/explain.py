"""``explain``: which part of one image matches which part of another, as figures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch

from emd_retrieval._checks import check_choice, check_positive
from emd_retrieval._files import check_folder
from emd_retrieval.datasets import decode_rgb
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching.clusters import METHODS
from emd_retrieval.reports import MatchPicture, match_figure, save_figure
from emd_retrieval.reports.flows import flows_figure
from emd_retrieval.reports.rebuilt import rebuilt_figure
from emd_retrieval.workflows.fewshot_episode import EpisodeRecord
from emd_retrieval.workflows.models import FeatureSettings

FORMATS = ("png", "svg")


@dataclass(frozen=True, kw_only=True)
class ExplainImages(FeatureSettings):
    """Settings of :func:`explain_images`; those of features as in :class:`FeatureSettings`.

    Attributes:
        query: An image file.
        reference: The image file it is compared with.
        matcher: The EMD similarity; a trained run has its own.
    """

    query: Path
    reference: Path
    matcher: EMDMatcher = field(default_factory=EMDMatcher)


def explain_images(
    settings: ExplainImages,
    output: str | Path | None = None,
    *,
    formats: Sequence[str] = ("png",),
) -> tuple[MatchPicture, list[Path]]:
    """Match two images and draw the match.

    Args:
        settings: Which images, and how.
        output: Folder for ``match``, ``rebuilt`` (Figure 6) and ``flows`` (Figure 7); ``None``
            writes nothing.
        formats: ``"png"``, ``"svg"`` or both.

    Returns:
        The match, for :func:`match_figure`, :func:`rebuilt_figure` and :func:`flows_figure`, and
        the files written.

    Raises:
        FileNotFoundError: If a file is missing.
        ValueError: If an image cannot be read, settings do not fit, or the nodes have no place in
            the image.
    """
    for name in formats:
        check_choice("formats", name, FORMATS)
    for option, path in (("query", settings.query), ("reference", settings.reference)):
        if not path.is_file():
            raise FileNotFoundError(f"{option}: no file {str(path)!r}")
    if output is not None:
        check_folder(output)
    model = settings.load(settings.matcher)
    extractor = model.extractor.to(settings.device)
    transform = extractor.evaluation_transform(
        resize=model.resize, crop=model.crop, seed=settings.seed
    )
    view = extractor.evaluation_view(resize=model.resize, crop=model.crop)
    images = [decode_rgb(path) for path in (settings.query, settings.reference)]
    boxes = [
        extractor.node_boxes(image, resize=model.resize, crop=model.crop, seed=settings.seed)
        for image in images
    ]
    if boxes[0] is None or boxes[1] is None or model.matcher.weights in METHODS:
        raise ValueError(
            "extractor: the nodes of these settings are clusters, which have no place in the "
            "image, so there is nothing to draw"
        )
    with torch.inference_mode():
        views = torch.stack([transform(image) for image in images]).to(settings.device)
        nodes = extractor(views).float().cpu()
    match = model.matcher.match(nodes[0], nodes[1])
    picture = MatchPicture(
        query=view(images[0]),
        reference=view(images[1]),
        boxes=boxes[0].numpy(),
        reference_boxes=boxes[1].numpy(),
        query_weights=match.query_weights.numpy(),
        reference_weights=match.reference_weights.numpy(),
        flow=match.flow.numpy(),
        cost=match.cost.numpy(),
        similarity=float(match.similarity),
        title=f"{settings.query.stem} and {settings.reference.stem}",
    )
    return picture, [] if output is None else _save([picture], Path(output), formats)


def explain_episode(
    episode: str | Path,
    output: str | Path | None = None,
    *,
    formats: Sequence[str] = ("png",),
    rows: int = 3,
) -> tuple[list[MatchPicture], list[Path]]:
    """Draw the matches of a recorded few-shot episode: queries and their nearest support images.

    Args:
        episode: What ``fewshot test --record`` wrote.
        output: Folder for ``match``, ``rebuilt`` (Figure 6) and ``flows`` (Figure 7); ``None``
            writes nothing.
        formats: ``"png"``, ``"svg"`` or both.
        rows: At most so many queries, the first ones.

    Returns:
        The matches, a row each, and the files written.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no recorded episode, or ``formats`` or ``rows`` are not valid.
    """
    for name in formats:
        check_choice("formats", name, FORMATS)
    check_positive("rows", rows)
    if output is not None:
        check_folder(output)
    pictures = EpisodeRecord.load(episode).nearest()[:rows]
    return pictures, [] if output is None else _save(pictures, Path(output), formats)


def _save(pictures: Sequence[MatchPicture], output: Path, formats: Sequence[str]) -> list[Path]:
    figures = {
        "match": match_figure(pictures),
        "rebuilt": rebuilt_figure(pictures),
        "flows": flows_figure(pictures),
    }
    return [
        save_figure(figure, output / f"{name}.{ending}")
        for name, figure in figures.items()
        for ending in formats
    ]
