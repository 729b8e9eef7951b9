"""A trained run as a model: built from its recipe, compared by its similarity, saved and loaded."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from emd_retrieval._checksums import AlteredError, load_tensors, save_tensors, sealed, unsealed
from emd_retrieval._files import write_text
from emd_retrieval.datasets import ImageCollection, ImageDataset
from emd_retrieval.features import (
    Extractor,
    FeatureSet,
    build_extractor,
    extract_features,
    load_backbone,
    pack,
)
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import LocalFeatureStore, RetrievalScores, rank_by, score_ranking
from emd_retrieval.retrieval.metrics import relevant_counts
from emd_retrieval.training.draws import number_of
from emd_retrieval.training.recipe import RANDOM_WEIGHTS, Recipe, read_flat_recipe
from emd_retrieval.training.trunk_cache import TrunkCache, node_count, state_checksum

WEIGHTS_FILE = "model.safetensors"
RECIPE_FILE = "recipe.yaml"
SUMMARY_FILE = "run.json"
_RECIPE_SEAL = "recipe_sha256"
_CHUNK = 512


@dataclass(frozen=True)
class TrainedModel:
    """An extractor with the similarity it was trained for.

    Attributes:
        extractor: In evaluation mode.
        recipe: What it was trained by.
    """

    extractor: Extractor
    recipe: Recipe

    @property
    def matcher(self) -> EMDMatcher:
        """The EMD similarity of its sets."""
        return self.recipe.matching

    @property
    def similarity(self) -> str:
        """``"emd"`` between sets; ``"mean"`` or, for Raw, ``"pooled"``: cosine of one vector."""
        return "pooled" if self.recipe.model.method == "raw" else self.recipe.similarity

    def embeddings(self, nodes: Tensor, pooled: Tensor) -> Tensor:
        """What a loss gets: packed sets, or vectors.

        Shape:
            ``[B, N, D]`` and ``[B, D]`` to ``[B, N * D]`` or ``[B, D]``.
        """
        return _embeddings(self.similarity, nodes, pooled)

    def similarities(
        self,
        query: FeatureSet,
        reference: FeatureSet | None = None,
        *,
        description: str | None = None,
    ) -> Tensor:
        """The model's own similarity of all pairs. Shape: ``[Q, R]``.

        Args:
            query: Features of this model.
            reference: Others; the queries among themselves by default.
            description: Shows a progress bar under this name.
        """
        if self.similarity == "emd":
            gallery = None if reference is None else reference.nodes
            with torch.inference_mode():
                return self.matcher.all_pairs(query.nodes, gallery, description=description)
        left = self.embeddings(query.nodes, query.global_vectors)
        right = (
            left
            if reference is None
            else self.embeddings(reference.nodes, reference.global_vectors)
        )
        return F.normalize(left, dim=1) @ F.normalize(right, dim=1).mT

    def evaluate(self, features: FeatureSet, *, description: str | None = None) -> RetrievalScores:
        """P@1, RP and MAP@R of images among themselves, all pairs, in percent.

        Raises:
            ValueError: If no class has two images.
        """
        labels = features.labels
        deepest = int(relevant_counts(labels, labels, gallery_includes_query=True).max())
        similarities = self.similarities(features, description=description)
        ranking = rank_by(similarities, max(1, deepest), exclude=torch.arange(len(labels)))
        return score_ranking(ranking, labels)


def build_model(
    recipe: Recipe, *, weights: str | Path | None = None, pretrained: bool = True
) -> TrainedModel:
    """The model of a recipe before training.

    Args:
        recipe: What to build; its seed is that of random weights.
        weights: The backbone's file, in place of the recipe's.
        pretrained: ``False`` loads no weights at all, for a model whose own are loaded next.

    Raises:
        ValueError: If the backbone or a setting of the extractor does not fit.
        FileNotFoundError: If the weights' file is absent.
    """
    settings = recipe.model
    file = settings.weights if weights is None else weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number_of("weights", recipe.seed))
        backbone = load_backbone(
            settings.backbone,
            weights=None if file == RANDOM_WEIGHTS or not pretrained else file,
            pretrained=pretrained and file != RANDOM_WEIGHTS,
            layer=settings.layer,
        )
        torch.manual_seed(number_of("embedder", recipe.seed))
        extractor = build_extractor(
            settings.extractor,
            backbone,
            pyramid=settings.pyramid,
            include_map=settings.include_map,
            grid=settings.grid,
            patches=settings.patches,
            patch_size=settings.patch_size,
            context=settings.context,
            training_context=settings.training_context,
            scale=settings.scale,
            ratio=settings.ratio,
            embedding_size=settings.embedding_size,
        )
    return TrainedModel(extractor.eval(), recipe)


def trained_state(model: TrainedModel) -> dict[str, Tensor]:
    """What training changed: all of the extractor, or with a frozen trunk the embedder alone."""
    state = model.extractor.state_dict()
    if model.recipe.model.frozen_trunk:
        state = {name: value for name, value in state.items() if name.startswith("embedder.")}
    return {name: value.detach().cpu().clone().contiguous() for name, value in state.items()}


def save_state(model: TrainedModel, path: Path) -> None:
    """Write :func:`trained_state` to a safetensors file, whole or not at all."""
    save_tensors(path, trained_state(model))


def load_state(model: TrainedModel, path: Path) -> None:
    """Read back what :func:`save_state` wrote.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it is not the state of such a model, or was altered since.
    """
    try:
        state = load_tensors(path)
    except ValueError as error:
        raise ValueError(f"model: {error}") from error
    wanted = trained_state(model)
    shapes = {name: list(value.shape) for name, value in state.items()}
    expected = {name: list(value.shape) for name, value in wanted.items()}
    if shapes != expected:
        wrong = [
            f"{name} {shapes.get(name, 'missing')} for {expected.get(name, 'none')}"
            for name in sorted({*shapes, *expected})
            if shapes.get(name) != expected.get(name)
        ]
        raise ValueError(
            f"model: {path} does not fit its recipe: {'; '.join(wrong[:3])}"
            f"{'; ...' if len(wrong) > 3 else ''}"
        )
    model.extractor.load_state_dict(state, strict=not model.recipe.model.frozen_trunk)


def load_model(run: str | Path, *, weights: str | Path | None = None) -> TrainedModel:
    """Load a finished run.

    Args:
        run: Its folder, with ``model.safetensors``, ``recipe.yaml`` and ``run.json``.
        weights: The file of a frozen trunk, where it no longer lies where the recipe says.

    Raises:
        FileNotFoundError: If the run has not finished, or the trunk's weights are not there.
        ValueError: If the files do not fit each other, or the trunk's weights are others.
    """
    run = Path(run)
    summary = read_summary(run)
    check_recipe_file(run, summary)
    recipe = read_flat_recipe(run / RECIPE_FILE)
    frozen = recipe.model.frozen_trunk
    try:
        model = build_model(recipe, weights=weights, pretrained=frozen)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{error}; the trunk of the run {run.name} was frozen, so its weights are not in "
            f"{WEIGHTS_FILE}: pass the file {summary['weights']['file']!r} as weights"
        ) from error
    if frozen:
        found = state_checksum(model.extractor.backbone)
        if found != summary["weights"]["backbone_sha256"]:
            raise ValueError(
                f"weights: the run {run.name} was trained on other weights of "
                f"{recipe.model.backbone} ({summary['weights']['file']!r}, backbone "
                f"{summary['weights']['backbone_sha256'][:12]}..., got {found[:12]}...)"
            )
    load_state(model, run / WEIGHTS_FILE)
    return model


def read_summary(run: Path) -> dict[str, Any]:
    """What a finished run says of itself.

    Raises:
        FileNotFoundError: If the run has not finished.
        ValueError: If the file cannot be read, or was altered since.
    """
    path = run / SUMMARY_FILE
    if not path.is_file():
        state = "has not finished; start it again to go on" if run.is_dir() else "is not there"
        raise FileNotFoundError(f"run: {run} {state} (no {SUMMARY_FILE})")
    try:
        summary = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(summary, dict):
            raise ValueError(f"a {type(summary).__name__}")
    except ValueError as error:
        raise ValueError(f"run: {path} is not a summary in JSON ({error})") from error
    return unsealed(summary, f"run: {path}")


def write_summary(run: Path, summary: dict[str, Any]) -> None:
    """Write ``run.json``, the last file of a run: where it is, the run is whole."""
    content = sealed({**summary, _RECIPE_SEAL: _file_sha256(run / RECIPE_FILE)})
    write_text(run / SUMMARY_FILE, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def check_recipe_file(run: Path, summary: Mapping[str, Any]) -> None:
    """Hold the recipe of a finished run against the checksum in its summary.

    Raises:
        FileNotFoundError: If it is not there.
        ValueError: If it was altered since the run.
    """
    path = run / RECIPE_FILE
    if not path.is_file():
        raise FileNotFoundError(f"run: {run} has no {RECIPE_FILE}")
    if summary.get(_RECIPE_SEAL, "") not in ("", _file_sha256(path)):
        raise AlteredError(f"run: {path} was altered since the run: it does not fit {SUMMARY_FILE}")


def embed_collection(
    model: TrainedModel,
    collection: ImageCollection,
    *,
    cache: str | Path | None = None,
    batch_size: int = 32,
    device: str | torch.device = "cpu",
    bf16: bool = False,
    workers: int = 0,
    compiled: bool = False,
    description: str = "embedding",
) -> FeatureSet:
    """Nodes and pooled vectors of a collection, in the evaluation view.

    Args:
        model: Whose.
        collection: Which images.
        cache: Folder of trunk features. Where the model's trunk was frozen they are read from
            there, or made once and kept; rounding them to float16 moves similarities by some 1e-4.
        batch_size: Images a forward pass.
        device: Where the network runs.
        bf16: Run it in bfloat16.
        workers: Decoding processes.
        compiled: Compile a frozen trunk for the features that are still missing.
        description: Name of the progress bar.
    """
    views = model.recipe.views
    if cache is not None and model.recipe.model.frozen_trunk:
        trunk = TrunkCache(
            folder=Path(cache),
            extractor=model.extractor,
            views=views,
            batch_size=batch_size,
            device=device,
            bf16=bf16,
            workers=workers,
            compiled=compiled,
        )
        store = trunk.store(collection)
        return embed_store(model, store, torch.arange(len(store)), _labels(collection))
    transform = model.extractor.evaluation_transform(resize=views.resize, crop=views.crop)
    return extract_features(
        ImageDataset(collection, transform),
        model.extractor,
        batch_size=batch_size,
        device=device,
        bf16=bf16,
        num_workers=workers,
        description=description,
    )


def embed_store(
    model: TrainedModel, store: LocalFeatureStore, rows: Tensor, labels: Tensor
) -> FeatureSet:
    """The embedder's features of cached trunk features.

    Args:
        model: Whose.
        store: Trunk features of a collection.
        rows: Which of its images. Shape: ``[n]``.
        labels: Of those images. Shape: ``[n]``.
    """
    # While training, the embedder alone is moved to the device of its process.
    device = next(model.extractor.embedder.parameters()).device
    nodes, pooled = [], []
    with torch.no_grad():
        for part in rows.split(_CHUNK):
            nodes.append(model.extractor.embed(store.nodes(part).to(device)).cpu())
            pooled.append(model.extractor.embed(store.global_vectors(part).to(device)).cpu())
    return FeatureSet(torch.cat(nodes), torch.cat(pooled), labels, rows)


class ImageEmbedding(nn.Module):
    """Views of images to what a loss gets: the network that full fine-tuning trains."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.extractor = model.extractor
        self.similarity = model.similarity
        self.frozen_batch_norm = model.recipe.model.frozen_batch_norm
        if self.frozen_batch_norm:
            for part in self._batch_norms():
                part.requires_grad_(False)

    def forward(self, views: Tensor) -> Tensor:
        """Shape: views to ``[B, N * D]`` or ``[B, D]``."""
        return _embeddings(self.similarity, *self.extractor.with_global(views))

    def train(self, mode: bool = True) -> ImageEmbedding:
        """Training mode, in which frozen batch norms stay in evaluation mode."""
        super().train(mode)
        if self.frozen_batch_norm:
            for part in self._batch_norms():
                part.eval()
        return self

    def _batch_norms(self) -> list[nn.Module]:
        kinds = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm)
        return [part for part in self.modules() if isinstance(part, kinds)]


class FeatureEmbedding(nn.Module):
    """Cached trunk features to what a loss gets: the embedder alone."""

    def __init__(self, model: TrainedModel) -> None:
        super().__init__()
        self.embedder = model.extractor.embedder

    def forward(self, features: Tensor) -> Tensor:
        """Shape: ``[B, N, C]`` to ``[B, N * D]``, or ``[B, C]`` to ``[B, D]``."""
        embedded: Tensor = self.embedder(features)
        return embedded.flatten(1)


def loss_nodes(model: TrainedModel) -> int | None:
    """N for :func:`emd_retrieval.metric_learning.build_loss`; ``None`` for vectors."""
    return node_count(model.extractor, model.recipe.views) if model.recipe.sets else None


def weights_record(model: TrainedModel, weights: str | Path | None) -> dict[str, Any]:
    """Which weights a run started from, as its summary keeps them."""
    file = model.recipe.model.weights if weights is None else weights
    on_disk = file is not None and file != RANDOM_WEIGHTS
    name = Path(file).name if on_disk and file is not None else model.recipe.model.backbone
    record = {"file": name, "backbone_sha256": state_checksum(model.extractor.backbone)}
    if on_disk and file is not None:
        record["sha256"] = _file_sha256(Path(file))
    return record


def _file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _embeddings(similarity: str, nodes: Tensor, pooled: Tensor) -> Tensor:
    if similarity == "pooled":
        return pooled
    return nodes.mean(dim=1) if similarity == "mean" else pack(nodes)


def _labels(collection: ImageCollection) -> Tensor:
    return torch.from_numpy(collection.labels.copy())
