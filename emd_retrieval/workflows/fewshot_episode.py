"""A recorded few-shot episode: its matches with the pictures, in one file without pickles."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._files import whole_file
from emd_retrieval.datasets import ImageCollection
from emd_retrieval.features import Extractor
from emd_retrieval.fewshot import EpisodeMatches, Episodes, episode_matches
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching.clusters import METHODS
from emd_retrieval.reports import MatchPicture, short_label
from emd_retrieval.training.recipe import ViewSettings


@dataclass(frozen=True)
class EpisodeRecord:
    """Matches of an episode's queries with all of its support images.

    Attributes:
        matches: The pairs; ``query`` and ``support`` are rows of the collection.
        rows: Rows of the images that are in them. Shape: ``[I]``.
        names: What these images are called.
        labels: Names of their classes.
        pictures: What the network saw of them. Shape: ``[I, h, w, 3]``, uint8.
    """

    matches: EpisodeMatches
    rows: NDArray[np.int64]
    names: Sequence[str]
    labels: Sequence[str]
    pictures: NDArray[np.uint8]

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all."""
        parts = {
            part.name: getattr(self.matches, part.name).cpu().numpy()
            for part in fields(EpisodeMatches)
        }
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(
                file, allow_pickle=False, rows=self.rows, names=np.array(self.names, np.str_),
                labels=np.array(self.labels, np.str_), pictures=self.pictures, **parts,
            )  # fmt: skip
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> EpisodeRecord:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"episode: no file {str(path)!r}")
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            parts = [part.name for part in fields(EpisodeMatches)]
            return cls(
                matches=EpisodeMatches(**{n: torch.from_numpy(arrays[n]) for n in parts}),
                rows=arrays["rows"],
                names=arrays["names"].tolist(),
                labels=arrays["labels"].tolist(),
                pictures=arrays["pictures"],
            )
        except (KeyError, ValueError, AttributeError, TypeError, EOFError, BadZipFile) as error:
            raise ValueError(
                f"episode: {path.name} is not a recorded episode ({error}); fewshot test --record "
                "writes them"
            ) from error

    def nearest(self) -> list[MatchPicture]:
        """Each query with the support image that is most similar to it."""
        place = {int(row): number for number, row in enumerate(self.rows)}
        found = []
        for query in dict.fromkeys(self.matches.query.tolist()):
            pairs = torch.nonzero(self.matches.query == query).flatten()
            pair = int(pairs[self.matches.similarity[pairs].argmax()])
            own, other = place[query], place[int(self.matches.support[pair])]
            verdict = "right" if bool(self.matches.same_class[pair]) else "wrong"
            labels = [short_label(self.labels[number]) for number in (own, other)]
            found.append(self._picture(pair, own, other, f"{labels[0]} as {labels[1]}, {verdict}"))
        return found

    def _picture(self, pair: int, own: int, other: int, title: str) -> MatchPicture:
        def part(values: Tensor) -> NDArray[Any]:
            array: NDArray[Any] = values[pair].numpy()
            return array

        return MatchPicture(
            query=self.pictures[own],
            reference=self.pictures[other],
            boxes=part(self.matches.query_boxes),
            reference_boxes=part(self.matches.support_boxes),
            query_weights=part(self.matches.query_weights),
            reference_weights=part(self.matches.support_weights),
            flow=part(self.matches.flow),
            cost=part(self.matches.cost),
            similarity=float(self.matches.similarity[pair]),
            title=title,
        )


def check_episodes(numbers: Sequence[int], episodes: Episodes, matcher: EMDMatcher) -> None:
    """Raise unless the matches of these episodes can be recorded.

    Raises:
        ValueError: If there is no episode of a number, or nodes are clusters.
    """
    for number in numbers:
        if not 0 <= number < len(episodes):
            raise ValueError(f"record: expected episodes 0 to {len(episodes) - 1}, got {number}")
    if numbers and matcher.weights in METHODS:
        raise ValueError(f"record: the clusters of {matcher.weights} have no place in an image")


def record_episode(
    matcher: EMDMatcher,
    extractor: Extractor,
    collection: ImageCollection,
    nodes: Tensor,
    episodes: Episodes,
    number: int,
    *,
    views: ViewSettings,
) -> EpisodeRecord:
    """Match the first query of each class with every support image of an episode.

    Args:
        matcher: What compares two sets.
        extractor: What made the nodes.
        collection: The images.
        nodes: Features of all of them. Shape: ``[n, N, D]``.
        episodes: Rows of the collection.
        number: Which episode.
        views: How images were cut.

    Raises:
        ValueError: If the nodes have no place in the image.
    """
    rows = torch.cat([episodes.support[number].flatten(), episodes.query[number, :, 0]]).unique()
    cut: dict[str, Any] = {"resize": views.resize, "crop": views.crop}
    view = extractor.evaluation_view(**cut)
    boxes = torch.zeros(len(nodes), nodes.shape[1], 4)
    pictures = []
    for row in rows.tolist():
        image = collection.load(row)
        places = extractor.node_boxes(image, **cut)
        if places is None:
            raise ValueError("record: the nodes of this extractor have no place in the image")
        boxes[row] = places
        pictures.append(view(image))
    return EpisodeRecord(
        matches=episode_matches(matcher, nodes, episodes, number, boxes=boxes),
        rows=rows.numpy(),
        names=[collection.image_name(row) for row in rows.tolist()],
        labels=[collection.class_names[int(collection.labels[row])] for row in rows.tolist()],
        pictures=np.stack(pictures),
    )
