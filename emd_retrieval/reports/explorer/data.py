"""What a run keeps for the explorer: queries, neighbours, small pictures and sparse flows.

All of it is one ``.npz`` file without pickles. Nothing here computes a ranking or a match.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from emd_retrieval._files import whole_file

Float = NDArray[np.floating[Any]]

_VERSION = 1


@dataclass(frozen=True)
class Picture:
    """A small picture of an image as the network saw it.

    Attributes:
        name: What the image is called.
        label: Index of its class; -1 where classes are not known.
        size: Width and height, in pixels.
        jpeg: The picture, encoded; empty where it is not at hand.
        boxes: Left, top, right, bottom of each node, as shares of the picture; ``None`` where it
            cannot be told. Shape: ``[N, 4]``.
    """

    name: str
    label: int
    size: tuple[int, int]
    jpeg: bytes
    boxes: Float | None = None


@dataclass(frozen=True)
class Query:
    """A query and its first neighbours by two methods.

    Attributes:
        picture: Index of its picture.
        scores: Its metric by each method, in percent; NaN where classes are not known.
        neighbours: Indices of pictures by each method, best first; -1 where there is none. Shape:
            ``[2, K]``.
        similarities: What each method ranked them by; ``-inf`` where it compared nothing. Shape:
            ``[2, K]``.
    """

    picture: int
    scores: tuple[float, float]
    neighbours: NDArray[np.int32]
    similarities: NDArray[np.float32]


@dataclass(frozen=True)
class Match:
    """One match; of the flow only what moves.

    Attributes:
        similarity: Of the whole match.
        query_weights: Sum to one. Shape: ``[N]``.
        reference_weights: Sum to one. Shape: ``[M]``.
        pairs: Query node and reference node of each flow. Shape: ``[F, 2]``.
        flow: Mass of each, of a total of one. Shape: ``[F]``.
        cost: Ground cost of each. Shape: ``[F]``.
    """

    similarity: float
    query_weights: Float
    reference_weights: Float
    pairs: NDArray[np.uint16]
    flow: Float
    cost: Float


@dataclass(frozen=True)
class ClassResult:
    """A class's mean metric by both methods, over all of its queries, in percent."""

    name: str
    queries: int
    before: float
    after: float


@dataclass(frozen=True)
class ExplorerData:
    """Everything that the explorer shows.

    Attributes:
        methods: Names of the two methods, the baseline first.
        metric: What ``Query.scores`` are.
        class_names: Names of the classes; none where they are not known.
        total: How many queries the run scored.
        pictures: Of queries and neighbours.
        queries: The queries that are kept.
        matches: By query picture and reference picture.
        classes: Results of all classes of all queries.
    """

    methods: tuple[str, str]
    metric: str
    class_names: Sequence[str]
    total: int
    pictures: Sequence[Picture]
    queries: Sequence[Query]
    matches: Mapping[tuple[int, int], Match]
    classes: Sequence[ClassResult]

    @property
    def labelled(self) -> bool:
        """Whether it is known which answers are right."""
        return bool(self.class_names)

    @property
    def changes(self) -> tuple[str, ...]:
        """By what queries are filtered."""
        if self.labelled:
            return ("all", "improved", "worsened", "unchanged")
        return ("all", "new first answer", "reordered", "unchanged")

    def save(self, path: str | Path) -> Path:
        """Write the file, whole or not at all."""
        # Pictures of one crop share their boxes; most of the time there is one set of them.
        boxes: dict[bytes, int] = {}
        layouts: list[Float] = []
        places = []
        for picture in self.pictures:
            place = -1
            if picture.boxes is not None:
                layout = np.asarray(picture.boxes, np.float32)
                place = boxes.setdefault(layout.tobytes(), len(boxes))
                if place == len(layouts):
                    layouts.append(layout)
            places.append(place)
        header = {
            "version": _VERSION,
            "methods": self.methods,
            "metric": self.metric,
            "class_names": list(self.class_names),
            "total": self.total,
            "names": [picture.name for picture in self.pictures],
            "classes": [asdict(result) for result in self.classes],
        }
        matches = list(self.matches.values())
        arrays: dict[str, Any] = {
            "header": np.frombuffer(json.dumps(header).encode(), np.uint8),
            "picture_labels": np.array([p.label for p in self.pictures], np.int32),
            "picture_sizes": np.array([p.size for p in self.pictures], np.int32).reshape(-1, 2),
            "picture_boxes": np.array(places, np.int32),
            "jpegs": np.frombuffer(b"".join(p.jpeg for p in self.pictures), np.uint8),
            "jpeg_ends": np.cumsum([0, *(len(p.jpeg) for p in self.pictures)]),
            **_joined("boxes", layouts, np.float32, 4),
            "query_pictures": np.array([q.picture for q in self.queries], np.int32),
            "query_scores": np.array([q.scores for q in self.queries], np.float32),
            "neighbours": _stacked([q.neighbours for q in self.queries], np.int32),
            "similarities": _stacked([q.similarities for q in self.queries], np.float32),
            "match_pictures": np.array(list(self.matches), np.int32).reshape(-1, 2),
            "match_similarities": np.array([m.similarity for m in matches], np.float32),
            **_joined("query_weights", [m.query_weights for m in matches], np.float16),
            **_joined("reference_weights", [m.reference_weights for m in matches], np.float16),
            **_joined("pairs", [m.pairs for m in matches], np.uint16, 2),
            **_joined("flows", [m.flow for m in matches], np.float16),
            **_joined("costs", [m.cost for m in matches], np.float16),
        }
        with whole_file(path) as partial, partial.open("wb") as file:
            np.savez_compressed(file, allow_pickle=False, **arrays)
        return Path(path)

    @classmethod
    def load(cls, path: str | Path) -> ExplorerData:
        """Read what :meth:`save` wrote.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is not such a file, or of a version this code does not know.
        """
        path = Path(path)
        try:
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
            header = json.loads(arrays["header"].tobytes())
            if header["version"] != _VERSION:
                raise ValueError(f"version {header['version']}, this code reads {_VERSION}")
            return cls._from_arrays(header, arrays)
        except (KeyError, ValueError, IndexError, EOFError, BadZipFile) as error:
            raise ValueError(f"explorer: {path.name} is not readable ({error})") from error

    @classmethod
    def _from_arrays(
        cls, header: Mapping[str, Any], arrays: Mapping[str, NDArray[Any]]
    ) -> ExplorerData:
        layouts = _parts("boxes", arrays)
        jpegs = arrays["jpegs"].tobytes()
        ends = arrays["jpeg_ends"].tolist()
        pictures = [
            Picture(name, int(label), (int(size[0]), int(size[1])), jpegs[start:end],
                    None if place < 0 else layouts[place])
            for name, label, size, place, (start, end) in zip(
                header["names"], arrays["picture_labels"], arrays["picture_sizes"],
                arrays["picture_boxes"], pairwise(ends), strict=True,
            )
        ]  # fmt: skip
        queries = [
            Query(int(picture), (float(scores[0]), float(scores[1])), rows, values)
            for picture, scores, rows, values in zip(
                arrays["query_pictures"], arrays["query_scores"], arrays["neighbours"],
                arrays["similarities"], strict=True,
            )
        ]  # fmt: skip
        names = ("query_weights", "reference_weights", "pairs", "flows", "costs")
        matches = {
            (int(key[0]), int(key[1])): Match(float(similarity), *parts)
            for key, similarity, parts in zip(
                arrays["match_pictures"],
                arrays["match_similarities"],
                zip(*(_parts(name, arrays) for name in names), strict=True),
                strict=True,
            )
        }
        return cls(
            methods=(header["methods"][0], header["methods"][1]),
            metric=header["metric"],
            class_names=tuple(header["class_names"]),
            total=header["total"],
            pictures=pictures,
            queries=queries,
            matches=matches,
            classes=tuple(ClassResult(**result) for result in header["classes"]),
        )


def _stacked(parts: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    return np.stack(parts).astype(dtype) if parts else np.empty((0, 2, 0), dtype)


def _joined(
    name: str, parts: Sequence[NDArray[Any]], dtype: type, width: int | None = None
) -> dict[str, NDArray[Any]]:
    """Arrays of different lengths end to end, with where each ends."""
    empty: NDArray[Any] = np.empty((0,) if width is None else (0, width), dtype)
    joined: NDArray[Any] = np.concatenate([empty, *parts]).astype(dtype)
    return {name: joined, f"{name}_ends": np.cumsum([0, *(len(part) for part in parts)])}


def _parts(name: str, arrays: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
    ends = arrays[f"{name}_ends"].tolist()
    return [arrays[name][start:end] for start, end in pairwise(ends)]
