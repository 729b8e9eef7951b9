"""What is searched for, and where: queries as images or arrays, and a command's first stage."""

from __future__ import annotations

import os
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader

from emd_retrieval._checks import check_finite
from emd_retrieval._tables import read_arrays
from emd_retrieval.datasets import UnreadableImageError
from emd_retrieval.datasets.image_folder import IMAGE_SUFFIXES
from emd_retrieval.features import Extractor, global_vectors, unpack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.progress import progress_counter
from emd_retrieval.retrieval import (
    CandidateTable,
    FaissIndexShortlist,
    LocalFeatureStore,
    QdrantShortlist,
    Shortlist,
)
from emd_retrieval.workflows.extract import ExtractImages, load_extraction
from emd_retrieval.workflows.images import ImageList, ImageViews, collate_views, read_image_list


@dataclass(frozen=True, kw_only=True)
class SearchSettings:
    """What ``rerank``, ``search`` and ``tune`` have in common.

    Attributes:
        store: The local-feature store of the gallery.
        queries: Images (a folder, a list, a table, one file), or arrays: ``.npy`` of
            ``[Q, N * D]`` or ``[Q, N, D]``, or ``.npz`` with ``nodes`` and optionally
            ``global_vectors`` and ``ids``.
        query_vectors: Global vectors of queries that are arrays, ``.npy``; by default the store's
            rule makes them from the nodes.
        model: The trained run that the store was made with, if it was.
        weights: The backbone's weights file, where the store was made with one.
        index: A FAISS index of the gallery's global vectors. Without it, ``candidates`` or
            ``qdrant``, the store's own global vectors are searched.
        index_ids: Store ids of the index's positions: ``.npy``, or a text file with an id a line.
        index_parameters: Search parameters by FAISS's names.
        normalize: Scale the queries' global vectors to unit norm for an index or Qdrant. ``False``
            where the gallery's have norms of their own and are compared by L2.
        candidates: A ready shortlist, see :meth:`CandidateTable.read`.
        qdrant: A Qdrant server's URL, or the folder of the embedded mode.
        collection: The Qdrant collection.
        id_key: Entry of the points' payload that holds the store's id.
        shortlist: Candidates of a query that are compared by EMD.
        matching: Fields of :class:`EMDMatcher` in place of those of the store's model.
        exclude_self: Leave the query's own id out of its answer.
        device: Torch device of the backbone and of the comparison.
        batch_size: Images a forward pass.
        num_workers: Processes that decode images.
        skip_errors: Leave unreadable query images out, and list them.
    """

    store: Path
    queries: Path
    query_vectors: Path | None = None
    model: Path | None = None
    weights: Path | None = None
    index: Path | None = None
    index_ids: Path | None = None
    index_parameters: Mapping[str, float] = field(default_factory=dict)
    normalize: bool = True
    candidates: Path | None = None
    qdrant: str | None = None
    collection: str | None = None
    id_key: str | None = None
    shortlist: int = 100
    matching: Mapping[str, Any] = field(default_factory=dict)
    exclude_self: bool = False
    device: str = "cpu"
    batch_size: int = 32
    num_workers: int = 0
    skip_errors: bool = False


@dataclass(frozen=True)
class Queries:
    """Queries by id.

    Attributes:
        ids: Names of image files as the source has them, or numbers.
        nodes: Shape: ``[Q, N, D]``.
        vectors: Global vectors. Shape: ``[Q, G]``.
        skipped: Id of each image that was left out, and why.
        extractor: What made the nodes; ``None`` where they came as arrays.
        paths: The images' files; empty where they came as arrays.
    """

    ids: Sequence[Any]
    nodes: Tensor
    vectors: Tensor
    skipped: Mapping[str, str] = field(default_factory=dict)
    extractor: Extractor | None = None
    paths: Sequence[Path] = ()

    def __len__(self) -> int:
        return len(self.nodes)


def matcher_of(settings: SearchSettings, store: LocalFeatureStore) -> EMDMatcher:
    """The similarity that the store's model was trained for, or what the settings put in its place.

    Raises:
        ValueError: If a name is unknown or a number out of range.
    """
    return EMDMatcher(**{**store.manifest.extractor.get("matching", {}), **settings.matching})


def read_queries(settings: SearchSettings, store: LocalFeatureStore) -> Queries:
    """The queries' features, as the store's were made.

    Raises:
        FileNotFoundError: If there is nothing there, or not one image.
        UnreadableImageError: If an image cannot be decoded and ``skip_errors`` is not set.
        ValueError: If arrays do not fit the store, or images would get other features than its.
    """
    if settings.queries.suffix in (".npy", ".npz"):
        return _read_arrays(settings, store)
    if settings.query_vectors is not None:
        raise ValueError("query_vectors: they go with queries that are arrays (.npy, .npz)")
    return _extract(settings, store)


def first_stage(settings: SearchSettings, store: LocalFeatureStore, queries: Queries) -> Shortlist:
    """The first stage that the settings name, held against the store.

    Raises:
        ConnectionError: If the Qdrant server cannot be reached.
        FileNotFoundError: If a file is missing.
        ValueError: If two are named, or the one that is does not fit the store or the queries.
    """
    named = [
        name for name in ("index", "candidates", "qdrant") if getattr(settings, name) is not None
    ]
    if len(named) > 1:
        raise ValueError(f"{named[1]}: there is a first stage already, {named[0]}; pass one")
    for name, owner in (("index_ids", "index"), ("collection", "qdrant"), ("id_key", "qdrant")):
        if getattr(settings, name) is not None and getattr(settings, owner) is None:
            raise ValueError(f"{name}: it goes with {owner}, which was not given")
    if settings.index_parameters and settings.index is None:
        raise ValueError("index_parameters: they go with index, which was not given")
    if not len(store):
        raise ValueError(f"store: expected at least one set in {store.path.name}, got none")
    stage: Shortlist
    if settings.index is not None:
        stage = FaissIndexShortlist.read(
            settings.index,
            ids=_index_ids(settings, store),
            normalize=settings.normalize,
            parameters=settings.index_parameters,
        )
        if settings.index_ids is None and store.manifest.ids == "string":
            # Numbers cannot be ids of this store: they are its positions, or a mistake.
            stage.take_order_of(store)
    elif settings.candidates is not None:
        table = CandidateTable.read(settings.candidates, ids=store.manifest.ids)
        stage = table.of(queries.ids)
    elif settings.qdrant is not None:
        if settings.collection is None:
            raise ValueError("collection: expected the name of the Qdrant collection, got none")
        where = {"url" if "://" in settings.qdrant else "path": settings.qdrant}
        try:
            stage = QdrantShortlist(
                settings.collection,
                id_key=settings.id_key,
                normalize=settings.normalize,
                **where,  # type: ignore[arg-type]
            )
        except ImportError as error:
            raise ValueError(f"qdrant: {error}") from error
    elif store.manifest.global_channels is None:
        raise ValueError(
            f"index: the store {store.path.name} has no global vectors to search; pass an index, "
            "candidates or qdrant"
        )
    else:
        stage = FaissIndexShortlist.from_matrix(
            store.global_vectors(), store.ids, name=f"the matrix of {store.path.name}"
        )
    stage.check(store)
    return stage


def own_ids(queries: Queries, store: LocalFeatureStore) -> NDArray[Any]:
    """The queries' ids in the store, to leave them out of their answers. Shape: ``[Q]``.

    The id of an image is its path below the folder, or the list's, that was passed. The store's may
    begin further up: then the longest end of the file's path that is in the store is meant. Warns
    if not one query is in the store.

    Raises:
        ValueError: If they are of the other kind.
    """
    array = np.asarray(queries.ids)
    is_number = array.dtype.kind in "iu"
    if is_number != (store.manifest.ids == "int64"):
        raise ValueError(
            f"exclude_self: the queries' ids are {'numbers' if is_number else 'names'}, those of "
            f"the store {store.path.name} are not; a query cannot be found in its answer"
        )
    own: NDArray[Any] = array.astype(np.int64 if is_number else object)
    if not is_number and queries.paths:
        own[:] = _names_in_store(own.tolist(), queries.paths, store)
    if len(own) and not bool(store.contains(own).any()):
        warnings.warn(
            f"exclude_self: none of the {len(own)} queries is in the store {store.path.name}, so "
            f"nothing is left out; the first is {own[0]!r}, an id of the store is "
            f"{store.ids_at([0])[0] if len(store) else None!r}",
            stacklevel=2,
        )
    return own


def _names_in_store(
    names: Sequence[str], paths: Sequence[Path], store: LocalFeatureStore
) -> list[str]:
    """For each image the longest end of its path that the store has, or its name as it is."""
    ends: list[list[str]] = []
    for name, path in zip(names, paths, strict=True):
        parts = Path(os.path.abspath(path)).parts[1:]  # noqa: PTH100 (links are not followed)
        some = ["/".join(parts[start:]) for start in range(len(parts))]
        # An id that is no path, of a table for instance, stands for itself.
        ends.append(some if name in some else [name])
    there = iter(store.contains([end for some in ends for end in some]).tolist())
    found = []
    for name, some in zip(names, ends, strict=True):
        known = [end for end in some if next(there)]
        found.append(known[0] if known else name)
    return found


def _index_ids(settings: SearchSettings, store: LocalFeatureStore) -> Any:
    path = settings.index_ids
    if path is None:
        return None
    if not path.is_file():
        raise FileNotFoundError(f"index_ids: no file {str(path)!r}")
    if path.suffix == ".npy":
        array = _load_array(path, "index_ids")
        return array if array.dtype.kind in "iu" else [str(name) for name in array.tolist()]
    text = path.read_bytes().decode("utf-8-sig", errors="surrogateescape")
    names = [line.removesuffix("\r") for line in text.removesuffix("\n").split("\n")]
    if store.manifest.ids == "string":
        return names
    if not all(name.strip().lstrip("-").isdecimal() for name in names):
        raise ValueError(f"index_ids: expected a whole number in every line of {path.name}")
    return np.array([int(name) for name in names], np.int64)


def _read_arrays(settings: SearchSettings, store: LocalFeatureStore) -> Queries:
    path, channels = settings.queries, store.manifest.channels
    if not path.is_file():
        raise FileNotFoundError(f"queries: no file {str(path)!r}")
    vectors: Any = None
    ids: Any = None
    if path.suffix == ".npz":
        archive = _load(path, "queries")
        if isinstance(archive, np.ndarray):
            raise ValueError(f"queries: {path.name} is a single array; rename it to .npy")
        if "nodes" not in archive:
            raise ValueError(
                f"queries: expected an array 'nodes' in {path.name}, "
                f"got {', '.join(sorted(archive)) or 'none'}"
            )
        array, vectors, ids = (archive.get(name) for name in ("nodes", "global_vectors", "ids"))
    else:
        array = _load_array(path, "queries")
    if array.dtype.kind != "f" or array.ndim not in (2, 3) or not array.size:
        raise ValueError(
            f"queries: expected floating-point sets [Q, N*D] or [Q, N, D] in {path.name}, "
            f"got {array.dtype} {list(array.shape)}"
        )
    nodes = _float32(array)
    if nodes.ndim == 2:
        nodes = unpack(nodes, channels, name=f"queries ({path.name})")
    if nodes.shape[2] != channels:
        raise ValueError(
            f"queries: {path.name} has nodes of {nodes.shape[2]} channels, the store "
            f"{store.path.name} of {channels}; both must come from the same extractor"
        )
    check_finite(f"queries ({path.name})", nodes)
    if ids is not None and ids.shape != (len(nodes),):
        raise ValueError(f"queries: expected {len(nodes)} ids, got shape {list(ids.shape)}")
    if ids is not None and len(set(ids.tolist())) < len(ids):
        name, count = Counter(ids.tolist()).most_common(1)[0]
        raise ValueError(
            f"queries: expected each id of {path.name} once, got {name!r} {count} times"
        )
    if settings.query_vectors is not None:
        if not settings.query_vectors.is_file():
            raise FileNotFoundError(f"query_vectors: no file {str(settings.query_vectors)!r}")
        vectors = _load_array(settings.query_vectors, "query_vectors")
    if vectors is None:
        pooled = _pooled(nodes, store)
    else:
        if vectors.dtype.kind != "f" or vectors.ndim != 2 or len(vectors) != len(nodes):
            raise ValueError(
                f"query_vectors: expected floating point of shape [{len(nodes)}, G], "
                f"got {vectors.dtype} {list(vectors.shape)}"
            )
        pooled = _float32(vectors)
        check_finite("query_vectors", pooled)
    return Queries(range(len(nodes)) if ids is None else ids.tolist(), nodes, pooled)


def _pooled(nodes: Tensor, store: LocalFeatureStore) -> Tensor:
    """Global vectors from nodes, as the store's extractor makes them."""
    settings = store.manifest.extractor
    pyramid = [int(size) for size in settings.get("pyramid", ())]
    if settings.get("extractor") == "fcn" and 1 in pyramid:
        place = sum(size * size for size in pyramid[: pyramid.index(1)])
        if place < nodes.shape[1]:
            return nodes[:, place]
    if settings.get("extractor") == "fcn":
        raise ValueError(
            f"queries: the global vectors of the store {store.path.name} are means of the feature "
            "map, which cannot be told from nodes; pass those of the queries as query_vectors "
            "(--query-vectors), or global_vectors in the .npz"
        )
    if settings.get("extractor") in ("grid", "sampling"):
        return nodes.mean(dim=1)
    return global_vectors(nodes)


def _extract(settings: SearchSettings, store: LocalFeatureStore) -> Queries:
    path = settings.queries
    if path.suffix.lower() in IMAGE_SUFFIXES and path.is_file():
        images = ImageList((path,), [path.name])
    else:
        images = read_image_list(path, name="queries")
    made = extraction_of(settings, store)
    extraction = load_extraction(made)
    check_same_extractor(store, extraction.described)
    device = torch.device(settings.device)
    extractor = extraction.extractor.to(device)
    loader: DataLoader[Any] = DataLoader(
        ImageViews(images, extraction.transform),
        batch_size=settings.batch_size,
        num_workers=settings.num_workers,
        collate_fn=collate_views,
    )
    rows: list[int] = []
    nodes: list[Tensor] = []
    pooled: list[Tensor] = []
    skipped: dict[str, str] = {}
    with (
        torch.inference_mode(),
        progress_counter("extracting queries", total=len(images), unit="image") as bar,
    ):
        for good, views, failures in loader:
            for row, reason in failures:
                if not settings.skip_errors:
                    raise UnreadableImageError(
                        f"{images.paths[row]}: {reason}. Restore or remove the image, or set "
                        "skip_errors (--skip-errors) to go on without unreadable ones"
                    )
                skipped[str(images.ids[row])] = reason
            if good:
                with torch.autocast(device.type, dtype=torch.bfloat16, enabled=made.bf16):
                    batch_nodes, batch_pooled = extractor.with_global(views.to(device))
                rows += good
                nodes.append(batch_nodes.float().cpu())
                pooled.append(batch_pooled.float().cpu())
            bar.update(len(good) + len(failures))
    if not rows:
        raise ValueError(
            f"queries: none of the {len(images)} images of {path.name} could be read; the first: "
            f"{next(iter(skipped.values()))}"
        )
    ids = images.ids
    chosen = ids[rows].tolist() if isinstance(ids, np.ndarray) else [ids[row] for row in rows]
    found = torch.cat(nodes).clone(), torch.cat(pooled).clone()
    check_finite("queries", found[0])
    return Queries(chosen, *found, skipped, extractor, [images.paths[row] for row in rows])


def extraction_of(settings: SearchSettings, store: LocalFeatureStore) -> ExtractImages:
    """The settings with which the store's features were extracted, for more images.

    Raises:
        ValueError: If the manifest does not tell them.
    """
    made = store.manifest.extractor
    if "model" in made and settings.model is None:
        raise ValueError(
            f"queries: the features of the store {store.path.name} were made with the trained run "
            f"{made['model']!r}; pass it again (--model RUN), or arrays (.npy) of the same model"
        )
    missing = [name for name in ("extractor", "backbone", "resize", "crop") if name not in made]
    if missing:
        raise ValueError(
            f"queries: the store {store.path.name} does not tell what made its features (no "
            f"{', '.join(missing)} in its manifest), so images cannot be extracted alike; pass "
            "arrays (.npy) of the same extractor"
        )
    if "weights_sha256" in made and "model" not in made and settings.weights is None:
        raise ValueError(
            f"weights: the features of the store {store.path.name} were made with the file "
            f"{made.get('weights')!r}; expected it again (--weights), got none"
        )
    known = ("extractor", "backbone", "layer", "pyramid", "include_map", "grid", "context",
             "patches", "patch_size", "resize", "crop", "bf16", "seed")  # fmt: skip
    return ExtractImages(
        images=settings.queries,
        store=settings.store,
        model=settings.model,
        weights=settings.weights,
        device=settings.device,
        batch_size=settings.batch_size,
        **{name: made[name] for name in known if name in made},
    )


def check_same_extractor(store: LocalFeatureStore, ours: Mapping[str, Any]) -> None:
    """Raise unless the queries' features are made as the store's were.

    Raises:
        ValueError: Naming the first setting that differs.
    """
    made = store.manifest.extractor
    for name in dict.fromkeys([*made, *ours]):
        if f"{name}_sha256" in made and f"{name}_sha256" in ours:
            continue  # the file may have been renamed
        if made.get(name) != ours.get(name):
            hint = ""
            if name.startswith("weights"):
                hint = "; pass the same weights file again (--weights)"
            elif name.startswith("model"):
                hint = "; pass the same run again (--model)"
            raise ValueError(
                f"{name}: the features of the store {store.path.name} were made with "
                f"{made.get(name)!r}, those of the queries would be with {ours.get(name)!r}{hint}"
            )


def _load_array(path: Path, name: str) -> Any:
    """A single array; an archive of several is refused."""
    loaded = _load(path, name)
    if isinstance(loaded, dict):
        raise ValueError(
            f"{name}: expected one array (.npy), got {path.name} with "
            f"{', '.join(sorted(loaded)) or 'none'}"
        )
    return loaded


def _load(path: Path, name: str) -> Any:
    """An array of ``.npy``, or the arrays of ``.npz`` by name; nothing is unpickled."""
    try:
        return read_arrays(path)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _float32(array: NDArray[Any]) -> Tensor:
    return torch.from_numpy(np.require(array, np.float32, ["C", "W"]))


def skipped_table(skipped: Mapping[str, str]) -> pd.DataFrame:
    """The images that were left out, for a file."""
    return pd.DataFrame({"id": list(skipped), "reason": list(skipped.values())})
