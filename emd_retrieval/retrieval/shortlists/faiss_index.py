"""A FAISS index of any kind as a first stage: one from a file, or over a matrix made here."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_tensor
from emd_retrieval.retrieval.candidates import ABSENT, Candidates, Ids
from emd_retrieval.retrieval.shortlists.base import (
    check_count,
    check_ids_in_store,
    check_unit_norms,
    query_array,
)
from emd_retrieval.retrieval.store import LocalFeatureStore

_READ_AT_ONCE = 2**24
_NORMS = 100
_LOOKED_AT = 10_000
_SHOWN = 5
_FAITHFUL = (
    faiss.IndexFlat, faiss.IndexIVFFlat, faiss.IndexHNSWFlat, faiss.IndexNSGFlat,
    faiss.IndexScalarQuantizer, faiss.IndexIVFScalarQuantizer, faiss.IndexHNSWSQ,
)  # fmt: skip
_MAY_BE_ZERO = ("codes", "ht", "verbose")  # no limit, off
_SHORTENING = (faiss.IndexPQ, faiss.IndexIVFPQ, faiss.IndexHNSWPQ)


# Of FAISS's limit, which is the process's.
_limit = threading.Lock()


def _read_bounded(path: Path) -> Any:
    """Read an index; one that claims more than its file can hold takes no memory for it."""
    if not hasattr(faiss, "set_deserialization_vector_byte_limit"):  # as in earlier releases
        return faiss.read_index(str(path))
    with _limit:
        before = faiss.get_deserialization_vector_byte_limit()
        # Tables that are computed from what is read may be some times as large.
        faiss.set_deserialization_vector_byte_limit(16 * path.stat().st_size + 2**26)
        try:
            return faiss.read_index(str(path))
        finally:
            faiss.set_deserialization_vector_byte_limit(before)


class FaissIndexShortlist:
    """Searches a FAISS index: Flat, IVF, PQ, HNSW and others, with IDMap or IDMap2 or without.

    Inner products are scores as they are. Squared L2 distances become ``1 - distance / 2``, the
    cosine where both sides are of unit norm. Other metrics are refused.

    Args:
        index: The index; :meth:`read` opens a file.
        ids: The store's id of each vector, in the order in which they were added (``store.ids`` for
            an index that was built in the store's order). By default what the index returns are
            the ids.
        normalize: Scale queries to unit norm, as an index of unit vectors wants them.
        parameters: Search parameters by FAISS's names, for instance ``{"nprobe": 16}`` or
            ``{"efSearch": 64}``.
        device: ``"cpu"`` or ``"cuda"`` (with faiss-gpu).
        name: What messages call the index.

    Raises:
        ValueError: If the index is empty, not trained or of another metric, a parameter is not its,
            ``ids`` does not fit, or queries are to be scaled to unit norm while its vectors, which
            it compares by L2, have other norms (as far as the index can give vectors back).

    Example:
        >>> shortlist = FaissIndexShortlist.from_matrix(torch.eye(3), ids=[10, 20, 30])
        >>> shortlist.search(torch.tensor([[0.1, 0.9, 0.2]]), 2).ids
        array([[20, 30]])
    """

    def __init__(
        self,
        index: Any,
        *,
        ids: Sequence[str] | Sequence[int] | NDArray[Any] | None = None,
        normalize: bool = True,
        parameters: Mapping[str, float] | None = None,
        device: str = "cpu",
        name: str = "the index",
    ) -> None:
        self.name = name
        self.normalize = normalize
        self.parameters = dict(parameters or {})
        if index.metric_type not in (faiss.METRIC_INNER_PRODUCT, faiss.METRIC_L2):
            raise ValueError(
                f"index: {name} has FAISS's metric number {index.metric_type}; expected inner "
                f"product ({faiss.METRIC_INNER_PRODUCT}) or L2 ({faiss.METRIC_L2})"
            )
        if not index.is_trained or index.ntotal == 0:
            raise ValueError(
                f"index: {name} {'is empty' if index.is_trained else 'is not trained'}; "
                "train it and add the gallery's vectors first"
            )
        self.channels, self.size = int(index.d), int(index.ntotal)
        self._is_l2 = index.metric_type == faiss.METRIC_L2
        self._kind = type(faiss.downcast_index(index)).__name__
        if normalize and self._is_l2:
            check_unit_norms(*_some_vectors(index), name)
        self._own_ids = _own_ids(index)
        self._counted_up = self._own_ids is not None or _counted_up(index)
        self._names = _names(ids, self.size, name)
        self._order: NDArray[np.int64] | None = None
        if self._names is not None:
            self._order = _order_of(self._own_ids, self._counted_up, name)
        self._index = _on_device(index, device)
        for parameter, value in self.parameters.items():
            _set_parameter(self._index, parameter, value, f"{name} ({self._kind})")

    @staticmethod
    def read(path: str | Path, **settings: Any) -> FaissIndexShortlist:
        """Open an index file with FAISS's own reader.

        Where ``PATH.sha256`` lies beside it (as ``sha256sum`` writes it), the file is held against
        it first: FAISS notices a truncated file, but not altered vectors.

        Args:
            path: The file.
            **settings: The constructor's.

        Raises:
            FileNotFoundError: If there is no such file.
            ValueError: If it is truncated, altered or no FAISS index, or the constructor refuses.
        """
        path = Path(path)
        if not path.is_file():
            raise FileNotFoundError(f"index: no file {str(path)!r}")
        _check_sum(path)
        try:
            index = _read_bounded(path)
        except (RuntimeError, MemoryError, AssertionError) as error:
            raise ValueError(
                f"index: {path.name} ({path.stat().st_size} bytes) is truncated, damaged or no "
                f"FAISS index ({' '.join(str(error).split())[-160:]})"
            ) from error
        return FaissIndexShortlist(index, **{"name": path.name, **settings})

    @staticmethod
    def from_matrix(
        vectors: Tensor | NDArray[Any],
        ids: Sequence[str] | Sequence[int] | NDArray[Any] | None = None,
        *,
        name: str = "the matrix",
    ) -> FaissIndexShortlist:
        """Exact cosine search over the rows of a matrix.

        Args:
            vectors: Global vectors; normalised here. Shape: ``[R, G]``.
            ids: Their ids; by default their numbers. Shape: ``[R]``.
            name: What messages call it.

        Raises:
            TypeError: If ``vectors`` is not floating point.
            ValueError: If it is empty, not 2-D or not finite, or ``ids`` does not fit.
        """
        width = vectors.shape[1] if vectors.ndim == 2 else 0
        if isinstance(vectors, Tensor):
            check_tensor("vectors", vectors, ["R", "G"])
        if 0 in vectors.shape:
            raise ValueError(f"vectors: expected at least one vector, got {list(vectors.shape)}")
        unit = query_array(vectors, width, name, normalize=True)
        index = faiss.IndexFlatIP(unit.shape[1])
        index.add(unit)
        return FaissIndexShortlist(index, ids=ids, name=name)

    def search(self, vectors: Tensor | NDArray[Any], k: int) -> Candidates:
        """The ``k`` nearest of each query, best first, -1 or ``None`` where there are fewer.

        Raises:
            TypeError: If ``vectors`` is not floating point.
            ValueError: If its width is not the index's, or a value is not finite.
        """
        check_count(k)
        queries = query_array(vectors, self.channels, self.name, normalize=self.normalize)
        try:
            found, numbers = self._index.search(queries, k)
        except RuntimeError as error:
            raise ValueError(
                f"index: {self.name} cannot be searched; it may be damaged "
                f"({' '.join(str(error).split())[-160:]})"
            ) from error
        scores = 1 - found / 2 if self._is_l2 else found
        absent = numbers == ABSENT
        scores[absent] = -np.inf
        if np.isnan(scores).any():
            raise ValueError(
                f"index: {self.name} gave scores that are not numbers; its vectors are damaged or "
                "were not finite"
            )
        ids: Any = numbers
        if self._names is not None:
            ids = self._names[self._places_of(numbers)]
            ids[absent] = None if ids.dtype == object else ABSENT
        return Candidates(ids, scores)

    def take_order_of(self, store: LocalFeatureStore) -> None:
        """Take the index's positions for those of the store, which gives them its ids.

        Raises:
            ValueError: If the index has ids of its own, or not as many vectors as the store sets.
        """
        own = self._own_ids
        if own is not None and (own != np.arange(len(own))).any():
            raise ValueError(
                f"ids: {self.name} has whole numbers of its own as ids "
                f"({', '.join(map(str, own[:_SHOWN]))}, ...), the store {store.path.name} has "
                "strings; expected the store's id of each vector, in the order in which they were "
                "added (index_ids, --index-ids FILE), got none"
            )
        if self.size != len(store):
            raise ValueError(
                f"ids: {self.name} has {self.size} vectors, the store {store.path.name} has "
                f"{len(store)} sets, so that the index is not in the store's order; expected the "
                "store's id of each vector (index_ids, --index-ids FILE), got none"
            )
        self._names = _names(store.ids, self.size, self.name)
        self._order = _order_of(own, self._counted_up, self.name)

    def check(self, store: LocalFeatureStore) -> None:
        """Raise unless the index's ids are in the store (ten thousand of them, from end to end).

        Ids inside of inverted lists are not looked at here; each is looked up when it is found.

        Raises:
            ValueError: If some are not, with the numbers.
        """
        what = f"{self.name} ({self.size} vectors)"
        if self._names is not None:
            names = self._names
            check_ids_in_store(names.tolist() if names.dtype == object else names, store, what)
        elif store.manifest.ids == "string":
            raise ValueError(
                f"ids: {what} has numbers, the store {store.path.name} ({len(store)} sets) has "
                "strings as ids; pass the store's id of each position of the index (ids=store.ids "
                "if it was built in the store's order)"
            )
        elif self._own_ids is not None:
            check_ids_in_store(self._own_ids, store, what)

    def describe(self) -> dict[str, Any]:
        """The settings, for a result record."""
        return {
            "first_stage": self._kind,
            "index": self.name,
            "vectors": self.size,
            "dimensions": self.channels,
            "metric": "L2" if self._is_l2 else "inner product",
            **self.parameters,
        }

    def _places_of(self, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which vector, in the order in which they were added, each number is; -1 stays."""
        places = numbers
        if self._order is not None and self._own_ids is not None:
            place = np.searchsorted(self._own_ids, numbers, sorter=self._order)
            places = self._order[place.clip(max=self.size - 1)]
            strange = self._own_ids[places] != numbers
        else:
            strange = (numbers < 0) | (numbers >= self.size)
        strange &= numbers != ABSENT
        if strange.any():
            raise ValueError(
                f"ids: {self.name} returned {int(numbers[strange][0])}, expected a position, 0 to "
                f"{self.size - 1}, of the {self.size} ids; an index that was given other numbers "
                "goes with a store that has these as ids"
            )
        return places


def _own_ids(index: Any) -> NDArray[np.int64] | None:
    """The ids that an index gives its vectors, where that can be told without a search."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    if hasattr(index, "id_map"):
        numbers: NDArray[np.int64] = faiss.vector_to_array(index.id_map)
        return numbers
    if isinstance(index, faiss.IndexIVF):
        return None
    return np.arange(index.ntotal)


def _some_vectors(index: Any) -> tuple[NDArray[np.float32], bool]:
    """Some vectors of an index, and whether its codes may have shortened them.

    There are none where it does not give them back, or gives others than it was given (PCA, LSH).
    Shape: ``[n, G]``.
    """
    index = faiss.downcast_index(index)
    if hasattr(index, "id_map"):
        index = faiss.downcast_index(index.index)
    is_short = isinstance(index, _SHORTENING)
    if not is_short and not isinstance(index, _FAITHFUL):
        return np.empty((0, index.d), np.float32), False
    some = np.empty((min(_NORMS, index.ntotal), index.d), np.float32)
    try:
        if isinstance(index, faiss.IndexIVF):
            places = _ivf_places(index, len(some))
            for row, (number, offset) in zip(some, places, strict=True):
                index.reconstruct_from_offset(number, offset, faiss.swig_ptr(row))
        else:
            for row, place in zip(some, np.linspace(0, index.ntotal - 1, len(some)), strict=True):
                index.reconstruct(int(place), row)
    except RuntimeError:  # of another kind, which keeps no vectors or cannot find them
        return some[:0], False
    return some, is_short


def _ivf_places(index: Any, count: int) -> list[tuple[int, int]]:
    """List and offset of the first vectors of as many inverted lists as it takes."""
    places: list[tuple[int, int]] = []
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        places += [(number, offset) for offset in range(min(size, count - len(places)))]
        if len(places) == count:
            break
    return places


def _names(ids: Any, size: int, name: str) -> Ids | None:
    if ids is None:
        return None
    if isinstance(ids, Tensor):
        ids = ids.cpu().numpy()
    array = np.asarray(ids)
    if array.shape != (size,):
        raise ValueError(
            f"ids: expected one for each of the {size} vectors of {name}, "
            f"got {array.shape[0] if array.ndim == 1 else list(array.shape)}"
        )
    names: Ids = array.astype(np.int64 if array.dtype.kind in "iu" else object)
    return names


def _order_of(
    numbers: NDArray[np.int64] | None, counted_up: bool, name: str
) -> NDArray[np.int64] | None:
    """What sorts the numbers that an index gives its vectors; ``None`` where these are positions.

    Raises:
        ValueError: If a number is there twice, or was chosen for a vector of inverted lists, which
            do not keep the order in which vectors were added.
    """
    if not counted_up:
        raise ValueError(
            f"ids: {name} was given numbers of its own when its vectors were added, and does not "
            "keep their order; expected a store that has these numbers as ids, got an id for each "
            "vector"
        )
    if numbers is None or (numbers == np.arange(len(numbers))).all():
        return None
    order = np.argsort(numbers, kind="stable")
    twice = numbers[order][1:] == numbers[order][:-1]
    if twice.any():
        raise ValueError(
            f"ids: expected each number of {name} once, to give it an id of the store; got "
            f"{int(numbers[order][1:][twice][0])} more than once"
        )
    return order


def _counted_up(index: Any) -> bool:
    """Whether the ids of some inverted lists rise from zero on, as they do without a choice."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        index = faiss.downcast_index(index.index)
    seen = 0
    for number in range(index.nlist):
        size = index.invlists.list_size(number)
        if not size:
            continue
        ids = faiss.rev_swig_ptr(index.invlists.get_ids(number), size)
        if ids[0] < 0 or ids.max() >= index.ntotal or (np.diff(ids) <= 0).any():
            return False
        seen += size
        if seen >= _LOOKED_AT:
            break
    return True


def _on_device(index: Any, device: str) -> Any:
    kind = torch.device(device)
    if kind.type == "cpu":
        return index
    if not hasattr(faiss, "StandardGpuResources"):
        raise ValueError(f"device: {device} needs faiss-gpu; this FAISS is faiss-cpu")
    resources = faiss.StandardGpuResources()
    return faiss.index_cpu_to_gpu(resources, kind.index or 0, index)


def _set_parameter(index: Any, parameter: str, value: float, what: str) -> None:
    # FAISS would cut a fraction off, and count nothing or the wrong way round without a word.
    least = 0 if parameter.split("_")[-1] in _MAY_BE_ZERO else 1
    whole = "factor" in parameter or float(value).is_integer()
    if not (np.isfinite(value) and value >= least and whole):
        raise ValueError(
            f"parameters: expected {parameter!r} to be a whole number of {least} or more, "
            f"got {value:g}"
        )
    on_gpu = type(index).__name__.startswith("Gpu")
    space = faiss.GpuParameterSpace() if on_gpu else faiss.ParameterSpace()
    try:
        space.set_index_parameter(index, parameter, value)
    except (RuntimeError, TypeError) as error:
        raise ValueError(
            f"parameters: {what} takes no search parameter {parameter!r} = {value!r}"
        ) from error


def _check_sum(path: Path) -> None:
    beside = path.with_name(f"{path.name}.sha256")
    if not beside.is_file():
        return
    expected = beside.read_text(encoding="utf-8", errors="replace").split()[:1]
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while part := file.read(_READ_AT_ONCE):
            digest.update(part)
    if expected != [digest.hexdigest()]:
        raise ValueError(f"index: {path.name} was altered: it does not fit {beside.name}")
