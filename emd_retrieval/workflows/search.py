"""``search``: one image, its answers as a table and as a picture."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps

from emd_retrieval._files import check_folder
from emd_retrieval._tables import utf8_text
from emd_retrieval.datasets import decode_rgb, path_below
from emd_retrieval.matching.clusters import METHODS
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports import MatchPicture, match_figure, save_figure
from emd_retrieval.reports.answers import answer_figure
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.workflows.queries import (
    Queries,
    extraction_of,
    first_stage,
    matcher_of,
    read_queries,
)
from emd_retrieval.workflows.rerank import (
    RerankQueries,
    candidates_of,
    check_alpha,
    check_sizes,
    ranking_table,
    rerank,
    save_ranking,
)

_ITSELF = 0.9999
_SIDE = 200
_PICTURES = ("answer.png", "match.png")


@dataclass(frozen=True, kw_only=True)
class SearchImage(RerankQueries):
    """Settings of :func:`search_image`; ``queries`` is the image.

    Attributes:
        images: The folder in which the store's ids are paths, for pictures of the answers.
    """

    images: Path | None = None
    format: str = "csv"


def search_image(
    settings: SearchImage, output: str | Path | None = None
) -> tuple[ResultRecord, pd.DataFrame]:
    """Search for one image.

    Args:
        settings: What to search for, and where.
        output: Folder for the ranking, the record, ``answer.png`` and, where nodes have a place in
            the image, ``match.png`` with the parts that matched; ``None`` writes nothing.

    Returns:
        The record and the ranking.

    Raises:
        FileNotFoundError: If the image, the store or a folder is missing.
        ValueError: As :func:`rerank_queries`.
    """
    check_sizes(settings.k, settings.shortlist)
    check_alpha(settings.alpha)
    if not settings.queries.is_file():
        raise FileNotFoundError(f"image: no file {str(settings.queries)!r}")
    if settings.images is not None and not settings.images.is_dir():
        raise FileNotFoundError(f"images: no folder {str(settings.images)!r}")
    if output is not None:
        check_folder(output)
    store = LocalFeatureStore.open(settings.store)
    queries = read_queries(settings, store)
    if len(queries) != 1:
        raise ValueError(f"image: expected one image, got {len(queries)}; use rerank for many")
    stage = first_stage(settings, store, queries)
    first = candidates_of(settings, stage, store, queries)
    ranking = ranking_table(queries, rerank(settings, store, queries, first))
    record = ResultRecord(
        name="search",
        title=f"{settings.queries.name} among {len(store)} images of {store.path.name}",
        tables={"answers": ranking.drop(columns="query")},
        settings={
            **stage.describe(),
            **matcher_of(settings, store).describe(),
            "shortlist": settings.shortlist,
            "k": settings.k,
            "alpha": settings.alpha,
        },
        data={"store": store.path.name, "images": len(store), "image": settings.queries.name},
        seed=0,
    )
    if output is not None:
        save_ranking(ranking, Path(output), settings.format)
        for file in _PICTURES:
            (Path(output) / file).unlink(missing_ok=True)  # of an earlier run
        if settings.images is not None:
            figures = _save_pictures(settings, store, queries, ranking, Path(output))
            record = record.with_figures(figures)
        record.save(output)
    return record, ranking


def _save_pictures(
    settings: SearchImage,
    store: LocalFeatureStore,
    queries: Queries,
    ranking: pd.DataFrame,
    output: Path,
) -> list[str]:
    assert settings.images is not None  # noqa: S101 (the caller's condition)
    if ranking.empty:
        return []
    query = decode_rgb(settings.queries)
    names = [str(name) for name in ranking["id"]]
    pictures: list[Image.Image | None] = []
    for name in names:
        try:
            pictures.append(decode_rgb(path_below(settings.images, name)))
        except ValueError:  # unreadable, or an id that leads out of the folder
            pictures.append(None)
    if not any(pictures):
        raise FileNotFoundError(
            f"images: none of the answers' files is in {settings.images}, for instance {names[0]!r}"
        )
    figure = answer_figure(
        np.asarray(ImageOps.contain(query, (2 * _SIDE, 2 * _SIDE))),
        [None if p is None else np.asarray(ImageOps.fit(p, (_SIDE, _SIDE))) for p in pictures],
        [utf8_text(Path(name).stem) for name in names],
        ranking["similarity"].tolist(),
    )
    save_figure(figure, output / "answer.png")
    files = ["answer.png"]
    # An image that is in the gallery finds itself first; what it matches next is of interest.
    similar = ranking["similarity"].to_numpy()
    place = next((i for i in range(len(names)) if similar[i] < _ITSELF), 0)
    shown = pictures[place]
    matcher = matcher_of(settings, store)
    if queries.extractor is None or shown is None or matcher.weights in METHODS:
        return files  # clusters have no place in the image
    made = extraction_of(settings, store)
    boxes = [
        queries.extractor.node_boxes(image, resize=made.resize, crop=made.crop, seed=made.seed)
        for image in (query, shown)
    ]
    if boxes[0] is None or boxes[1] is None:
        return files
    answer = store.nodes(store.rows_of(ranking["id"].tolist()[place : place + 1]))[0]
    match = matcher.match(queries.nodes[0], answer)
    view = queries.extractor.evaluation_view(resize=made.resize, crop=made.crop)
    picture = MatchPicture(
        query=view(query),
        reference=view(shown),
        boxes=boxes[0].numpy(),
        reference_boxes=boxes[1].numpy(),
        query_weights=match.query_weights.numpy(),
        reference_weights=match.reference_weights.numpy(),
        flow=match.flow.numpy(),
        cost=match.cost.numpy(),
        similarity=float(match.similarity),
        title=utf8_text(f"{settings.queries.name} and answer {place + 1}"),
    )
    save_figure(match_figure([picture]), output / "match.png")
    return [*files, "match.png"]
