"""The local-feature store: sets of local features by id, in one folder, read by row."""

from emd_retrieval.retrieval.store.codecs import CODECS, EncodedSets
from emd_retrieval.retrieval.store.lock import StoreLockedError
from emd_retrieval.retrieval.store.manifest import StoreDamagedError, StoreManifest
from emd_retrieval.retrieval.store.parts import create_part, join_parts, part_path, parts_started
from emd_retrieval.retrieval.store.store import LocalFeatureStore
from emd_retrieval.retrieval.store.writer import StoreWriter

__all__ = [
    "CODECS",
    "EncodedSets",
    "LocalFeatureStore",
    "StoreDamagedError",
    "StoreLockedError",
    "StoreManifest",
    "StoreWriter",
    "create_part",
    "join_parts",
    "part_path",
    "parts_started",
]
