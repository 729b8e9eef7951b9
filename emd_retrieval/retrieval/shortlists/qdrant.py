"""Qdrant as a first stage: galleries beyond one machine, or its embedded local mode."""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval.retrieval.candidates import Candidates, Ids
from emd_retrieval.retrieval.shortlists.base import (
    check_count,
    check_ids_in_store,
    query_array,
)
from emd_retrieval.retrieval.store import LocalFeatureStore

_BATCH = 64
_SAMPLED = 1000


class QdrantShortlist:
    """Searches a Qdrant collection of global vectors (extra ``qdrant``).

    Points are found by their number, or by a value of their payload where the store's ids are
    strings (a Qdrant id is a number or a UUID). Cosine and dot product are scores as they are;
    Euclidean distances become ``1 - distance^2 / 2``; others are refused.

    Args:
        collection: The collection's name.
        url: Of a server, for instance ``"https://qdrant.example:6333"``.
        path: Folder of the embedded local mode; ``":memory:"`` for one that is not kept.
        client: A client that exists already, in place of ``url`` and ``path``.
        api_key: For the server.
        vector_name: Of a collection with several vectors a point.
        id_key: Payload entry that holds the store's id; by default the point's own number.
        search_params: Qdrant's own, for instance ``{"hnsw_ef": 128}``.
        timeout: Seconds to wait for the server.

    Raises:
        ImportError: If ``qdrant-client`` is not installed.
        ValueError: If there is no such collection, or its metric or vectors do not fit.
    """

    def __init__(
        self,
        collection: str,
        *,
        url: str | None = None,
        path: str | Path | None = None,
        client: Any = None,
        api_key: str | None = None,
        vector_name: str | None = None,
        id_key: str | None = None,
        search_params: dict[str, Any] | None = None,
        timeout: int = 60,
    ) -> None:
        try:
            qdrant: Any = import_module("qdrant_client")
        except ImportError as error:
            raise ImportError(
                "the Qdrant shortlist needs qdrant-client: pip install 'emd_retrieval[qdrant]'"
            ) from error
        if sum(part is not None for part in (url, path, client)) != 1:
            raise ValueError("qdrant: expected one of url, path and client")
        if client is None:
            if url is not None:
                client = qdrant.QdrantClient(url=url, api_key=api_key, timeout=timeout)
            elif path == ":memory:":
                client = qdrant.QdrantClient(":memory:")
            else:
                client = qdrant.QdrantClient(path=str(path))
        self._client = client
        self._models = qdrant.models
        self.collection = collection
        self.vector_name = vector_name
        self.id_key = id_key
        self.search_params = dict(search_params or {})
        if not client.collection_exists(collection):
            names = sorted(c.name for c in client.get_collections().collections)
            raise ValueError(
                f"qdrant: no collection {collection!r}; there are {', '.join(names) or 'none'}"
            )
        vectors = client.get_collection(collection).config.params.vectors
        if isinstance(vectors, dict):
            if vector_name not in vectors:
                raise ValueError(
                    f"qdrant: the points of {collection!r} have the vectors "
                    f"{', '.join(sorted(vectors))}; pass vector_name, got {vector_name!r}"
                )
            vectors = vectors[vector_name]
        self.channels = int(vectors.size)
        self.metric = str(vectors.distance.value)
        if self.metric not in ("Cosine", "Dot", "Euclid"):
            raise ValueError(
                f"qdrant: {collection!r} has the metric {self.metric}; expected Cosine, Dot or "
                "Euclid"
            )

    def search(self, vectors: Tensor | NDArray[Any], k: int) -> Candidates:
        """The ``k`` nearest of each query, best first.

        Raises:
            TypeError: If ``vectors`` is not floating point.
            ValueError: If its width is not the collection's, a point has no id for the store, or a
                value is not finite.
        """
        check_count(k)
        what = f"collection {self.collection!r}"
        queries = query_array(vectors, self.channels, what, normalize=True)
        found: list[list[tuple[Any, float]]] = []
        for start in range(0, len(queries), _BATCH):
            answers = self._client.query_batch_points(
                self.collection,
                requests=[self._request(query, k) for query in queries[start : start + _BATCH]],
            )
            found += [
                [(self._id_of(point), float(point.score)) for point in answer.points]
                for answer in answers
            ]
        is_text = any(isinstance(name, str) for answer in found for name, _ in answer)
        ids: Ids
        if is_text:
            ids = np.full((len(found), k), None, object)
        else:
            ids = np.full((len(found), k), -1, np.int64)
        scores = np.full((len(found), k), -np.inf, np.float32)
        for row, answer in enumerate(found):
            for place, (name, score) in enumerate(answer):
                ids[row, place] = name
                scores[row, place] = 1 - score**2 / 2 if self.metric == "Euclid" else score
        return Candidates(ids, scores)

    def check(self, store: LocalFeatureStore) -> None:
        """Raise unless the ids of the collection's first points are in the store.

        Raises:
            ValueError: If some are not, with the numbers.
        """
        points, _ = self._client.scroll(
            self.collection,
            limit=_SAMPLED,
            with_payload=[self.id_key] if self.id_key else False,
            with_vectors=False,
        )
        names = [self._id_of(point) for point in points]
        ids: Any = names
        if names and not any(isinstance(name, str) for name in names):
            ids = np.array(names, np.int64)
        if not names:
            raise ValueError(f"qdrant: collection {self.collection!r} has no points")
        check_ids_in_store(ids, store, f"collection {self.collection!r}")

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "first_stage": "Qdrant",
            "collection": self.collection,
            "dimensions": self.channels,
            "metric": self.metric,
            **self.search_params,
        }

    def _request(self, query: NDArray[np.float32], k: int) -> Any:
        return self._models.QueryRequest(
            query=query.tolist(),
            using=self.vector_name,
            limit=k,
            params=self._models.SearchParams(**self.search_params) if self.search_params else None,
            with_payload=[self.id_key] if self.id_key else False,
        )

    def _id_of(self, point: Any) -> Any:
        if self.id_key is None:
            return point.id
        payload = point.payload or {}
        if self.id_key not in payload:
            raise ValueError(
                f"qdrant: point {point.id!r} of {self.collection!r} has no {self.id_key!r} in its "
                "payload"
            )
        return payload[self.id_key]
