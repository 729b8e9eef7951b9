"""What a first stage is to the re-ranker, and what the stages have in common."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from emd_retrieval._checks import check_tensor
from emd_retrieval.retrieval.candidates import Candidates
from emd_retrieval.retrieval.store import LocalFeatureStore, StoreDamagedError

_SAMPLED = 10_000
_UNIT = 0.05
_SHOWN = 5


class Shortlist(Protocol):
    """A first stage: query vectors in, candidates by the ids of a store out."""

    def search(self, vectors: Tensor | NDArray[Any], k: int) -> Candidates:
        """The ``k`` nearest of each query, scored higher is better. Shape: ``[Q, G]``.

        Raises:
            ValueError: If the vectors do not fit what is searched.
        """
        ...

    def check(self, store: LocalFeatureStore) -> None:
        """Raise unless what is searched and the store are the same gallery.

        Raises:
            ValueError: If ids are of another kind, or not in the store.
        """
        ...

    def describe(self) -> Mapping[str, Any]:
        """The settings, for a result record."""
        ...


def query_array(
    vectors: Tensor | NDArray[Any], channels: int, what: str, *, normalize: bool
) -> NDArray[np.float32]:
    """Query vectors as contiguous float32, of unit norm if asked for.

    Raises:
        TypeError: If they are not floating point.
        ValueError: If their shape does not fit, or a value is not finite.
    """
    if isinstance(vectors, np.ndarray):
        if vectors.dtype.kind != "f":
            raise TypeError(f"vectors: expected floating point, got {vectors.dtype}")
        vectors = torch.from_numpy(np.require(vectors, np.float32, ["C", "W"]))
    width = check_tensor("vectors", vectors, ["Q", "G"], finite=True)["G"]
    if width != channels:
        raise ValueError(
            f"vectors: {what} has {channels} dimensions, the queries' global vectors have {width}; "
            "both must come from the same model and layer"
        )
    array: NDArray[np.float32] = vectors.detach().float().cpu().contiguous().numpy()
    if normalize:
        lengths = np.sqrt(np.einsum("qg,qg->q", array, array))
        array = array / np.maximum(lengths, np.float32(1e-12))[:, None]
    return array


def check_unit_norms(vectors: NDArray[np.float32], is_short: bool, what: str) -> None:
    """Raise if vectors that are compared by L2 with queries of unit norm have other norms.

    The order of L2 distances to a query depends on its norm unless all vectors have one norm.

    Args:
        vectors: Some of what is searched. Shape: ``[n, G]``.
        is_short: They come from codes that may have shortened them: only longer ones count.
        what: What messages call it.

    Raises:
        ValueError: With the smallest and the largest norm.
    """
    norms = np.linalg.norm(vectors, axis=1)
    usual = float(np.median(norms)) if len(norms) else 1.0
    if usual > 1 + _UNIT or (usual < 1 - _UNIT and not is_short):
        raise ValueError(
            f"normalize: {what} compares by L2 and its vectors are not of unit norm ({len(norms)} "
            f"looked at: {norms.min():.3g} to {norms.max():.3g}), so queries must not be scaled to "
            "it: pass normalize=False (--no-normalize)"
        )


def check_count(k: int) -> None:
    """Raise unless ``k`` is a positive whole number."""
    if not isinstance(k, int | np.integer) or k < 1:
        raise ValueError(f"k: expected a whole number of 1 or more, got {k!r}")


def check_ids_in_store(ids: Any, store: LocalFeatureStore, what: str) -> None:
    """Raise unless ids, or ten thousand of them from end to end, are in the store.

    Raises:
        StoreDamagedError: If some are not found because a file of the store was altered.
        ValueError: If some are not, or are of the other kind; with the numbers.
    """
    kind = store.manifest.ids
    is_text = not (isinstance(ids, np.ndarray) and ids.dtype.kind in "iu")
    if is_text != (kind == "string"):
        raise ValueError(
            f"ids: {what} has {'strings' if is_text else 'whole numbers'} as ids, the store "
            f"{store.path.name} {'strings' if kind == 'string' else 'whole numbers'}"
        )
    count = len(ids)
    sample = ids
    if count > _SAMPLED:
        places = np.linspace(0, count - 1, _SAMPLED).astype(np.int64)
        sample = ids[places] if isinstance(ids, np.ndarray) else [ids[i] for i in places]
    missing = np.flatnonzero(~store.contains(sample).numpy())
    if len(missing):
        values = sample.tolist() if isinstance(sample, np.ndarray) else sample
        try:
            store.rows_of([values[i] for i in missing.tolist()])
        except StoreDamagedError:
            raise
        except ValueError:
            pass  # which knows of the ids, but not whose they are
        shown = ", ".join(repr(values[i]) for i in missing[:_SHOWN].tolist())
        checked = f"{len(sample)} checked" if count > _SAMPLED else f"its {count}"
        raise ValueError(
            f"ids: {len(missing)} of {checked} ids of {what} are not in the store "
            f"{store.path.name} ({len(store)} sets): {shown}"
            f"{', ...' if len(missing) > _SHOWN else ''}"
        )
