"""Qdrant as a first stage: galleries beyond one machine, or its embedded local mode."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
    check_unit_norms,
    query_array,
)
from emd_retrieval.retrieval.store import LocalFeatureStore

_BATCH = 64
_SAMPLED = 1000
_NORMS = 100


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
        normalize: Scale queries to unit norm, as a collection of unit vectors wants them.

    Raises:
        ConnectionError: If the server cannot be reached, or refuses.
        FileNotFoundError: If there is no such folder.
        ImportError: If ``qdrant-client`` is not installed.
        ValueError: If there is no such collection, or its metric or vectors do not fit.

    A client that is opened here is closed by :meth:`close`, as a context manager, or with the
    shortlist's end; the embedded mode lets nobody else into its folder until then.
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
        normalize: bool = True,
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
            elif not Path(str(path)).is_dir():
                # The client would make an empty one.
                raise FileNotFoundError(f"qdrant: no folder {str(path)!r}; expected one, or a URL")
            else:
                client = qdrant.QdrantClient(path=str(path))
            self._close: Callable[[], Any] = weakref.finalize(self, client.close)
        else:
            self._close = _nothing
        self._client = client
        self._models = qdrant.models
        self._refused = import_module("qdrant_client.http.exceptions").ApiException
        self._where = "the client" if url is None and path is None else str(url or path)
        self.collection = collection
        self.vector_name = vector_name
        self.id_key = id_key
        self.search_params = dict(search_params or {})
        self.normalize = normalize
        try:
            self.channels, self.metric = self._vectors()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> QdrantShortlist:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the client, if it was opened here; again is harmless."""
        self._close()

    def _vectors(self) -> tuple[int, str]:
        """Dimensions and metric of the collection."""
        client, collection, vector_name = self._client, self.collection, self.vector_name
        with self._asking():
            if not client.collection_exists(collection):
                names = sorted(c.name for c in client.get_collections().collections)
                raise ValueError(
                    f"qdrant: no collection {collection!r} in {self._where}; there are "
                    f"{', '.join(names) or 'none'}"
                )
            vectors = client.get_collection(collection).config.params.vectors
        if isinstance(vectors, dict):
            if vector_name not in vectors:
                raise ValueError(
                    f"qdrant: the points of {collection!r} have the vectors "
                    f"{', '.join(sorted(vectors))}; pass vector_name, got {vector_name!r}"
                )
            vectors = vectors[vector_name]
        metric = str(vectors.distance.value)
        if metric not in ("Cosine", "Dot", "Euclid"):
            raise ValueError(
                f"qdrant: {collection!r} has the metric {metric}; expected Cosine, Dot or Euclid"
            )
        return int(vectors.size), metric

    def search(self, vectors: Tensor | NDArray[Any], k: int) -> Candidates:
        """The ``k`` nearest of each query, best first.

        Raises:
            TypeError: If ``vectors`` is not floating point.
            ValueError: If its width is not the collection's, a point has no id for the store, or a
                value is not finite.
        """
        check_count(k)
        what = f"collection {self.collection!r}"
        queries = query_array(vectors, self.channels, what, normalize=self.normalize)
        found: list[list[tuple[Any, float]]] = []
        for start in range(0, len(queries), _BATCH):
            some = queries[start : start + _BATCH]
            with self._asking():
                answers = self._client.query_batch_points(
                    self.collection, requests=[self._request(query, k) for query in some]
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
            ValueError: If some are not, with the numbers; or if queries are scaled to unit norm,
                but the points, which are compared by their distance, are not.
        """
        with self._asking():
            points, _ = self._client.scroll(
                self.collection,
                limit=_SAMPLED,
                with_payload=[self.id_key] if self.id_key else False,
                with_vectors=False,
            )
        if self.normalize and self.metric == "Euclid":
            with self._asking():
                some, _ = self._client.scroll(
                    self.collection, limit=_NORMS, with_payload=False, with_vectors=True
                )
            vectors = [point.vector for point in some]
            if self.vector_name is not None:
                vectors = [named[self.vector_name] for named in vectors]
            check_unit_norms(
                np.array(vectors, np.float32), False, f"collection {self.collection!r}"
            )
        names = [self._id_of(point) for point in points]
        ids: Any = names
        if names and not any(isinstance(name, str) for name in names):
            ids = np.array(names, np.int64)
        if not names:
            raise ValueError(f"qdrant: collection {self.collection!r} has no points")
        if isinstance(ids, np.ndarray) and self.id_key is None and store.manifest.ids == "string":
            raise ValueError(
                f"ids: the points of collection {self.collection!r} have whole numbers, the store "
                f"{store.path.name} has strings as ids; expected id_key (--id-key), the payload "
                "entry with the store's id, got none"
            )
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
        payload: dict[str, Any] = point.payload or {}
        if self.id_key not in payload:
            raise ValueError(
                f"qdrant: point {point.id!r} of {self.collection!r} has no {self.id_key!r} in its "
                "payload"
            )
        name = payload[self.id_key]
        if not isinstance(name, int | str):
            raise ValueError(
                f"qdrant: expected a whole number or a string as {self.id_key!r} of point "
                f"{point.id!r} of {self.collection!r}, got {name!r}"
            )
        return name

    @contextmanager
    def _asking(self) -> Iterator[None]:
        """Turns the client's own errors, which are of its HTTP library, into a usual one."""
        try:
            yield
        except self._refused as error:
            reason = " ".join(str(error).split())[:200] or type(error).__name__
            raise ConnectionError(
                f"qdrant: {self._where} cannot be asked for collection {self.collection!r} "
                f"({reason})"
            ) from error


def _nothing() -> None:
    """In place of closing a client that is the caller's."""
