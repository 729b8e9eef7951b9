"""The metric-learning losses of Table 8, and some beside, on plain vectors (Raw) or on sets.

A loss is written down as :class:`LossSettings` and built by :func:`build_loss`; the formulas are
pytorch-metric-learning's. What is ours: the distance, one proxy vector a node, checks of a batch.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BaseDistance, CosineSimilarity
from pytorch_metric_learning.losses import BaseMetricLossFunction
from pytorch_metric_learning.miners import BaseMiner
from torch import Tensor, nn

from emd_retrieval._checks import check_choice, check_positive, check_tensor
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.metric_learning.deepemd import DeepEMDSimilarity, DeepEMDSNRDistance
from emd_retrieval.metric_learning.regularizers import CentersRegularizer, NodeMeanRegularizer

Parameter = float | int | bool | str


@dataclass(frozen=True)
class _Loss:
    """What :func:`build_loss` must know of a PML loss.

    Attributes:
        kind: PML's class.
        proxies: The attribute that holds the proxies, if the loss has any.
        by_columns: The proxies are the columns of that parameter, not its rows.
        similarity: PML's distance of Raw is the cosine similarity even where the loss's own is not:
            margins then mean the same for vectors and for sets.
        snr: The distance is the signal-to-noise ratio.
        defaults: Where PML's defaults are for another distance.
    """

    kind: type[BaseMetricLossFunction]
    proxies: str | None = None
    by_columns: bool = False
    similarity: bool = False
    snr: bool = False
    defaults: Mapping[str, Parameter] = field(default_factory=dict)


_LOSSES = {
    "normalized_softmax": _Loss(losses.NormalizedSoftmaxLoss, proxies="W", by_columns=True),
    "contrastive": _Loss(
        losses.ContrastiveLoss, similarity=True, defaults={"pos_margin": 1.0, "neg_margin": 0.5}
    ),
    "soft_triple": _Loss(losses.SoftTripleLoss, proxies="fc", by_columns=True),
    "snr_contrastive": _Loss(losses.SignalToNoiseRatioContrastiveLoss, snr=True),
    "arcface": _Loss(losses.ArcFaceLoss, proxies="W", by_columns=True),
    "multi_similarity": _Loss(losses.MultiSimilarityLoss),
    "triplet_margin": _Loss(losses.TripletMarginLoss, similarity=True),
    "ntxent": _Loss(losses.NTXentLoss),
    "proxy_anchor": _Loss(losses.ProxyAnchorLoss, proxies="proxies"),
    "supcon": _Loss(losses.SupConLoss),
}
LOSSES = tuple(_LOSSES)
"""Names of the losses, those of Table 8 first."""

_MINERS: dict[str, type[BaseMiner]] = {
    "multi_similarity": miners.MultiSimilarityMiner,
    "triplet_margin": miners.TripletMarginMiner,
    "batch_hard": miners.BatchHardMiner,
    "batch_easy_hard": miners.BatchEasyHardMiner,
}
MINERS = tuple(_MINERS)
"""Names of the miners."""

_WEIGHT_REGULARIZED = {"soft_triple"}
_EMBEDDING_REGULARIZED = {"snr_contrastive"}
_NOT_SCALAR = {
    "self", "kwargs", "distance", "reducer", "num_classes", "embedding_size", "mat_based_loss",
    "weight_init_func", "weight_regularizer", "weight_reg_weight", "embedding_regularizer",
    "embedding_reg_weight", "collect_stats",
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class LossSettings:
    """A loss and its miner, as a recipe writes them down.

    The parameters have PML's own names, and mean the same for Raw and for sets: similarities, or
    SNR distances, of the same scale. ``contrastive`` and ``triplet_margin`` therefore take margins
    of cosine similarity (an L2 margin m on unit vectors is the similarity ``1 - m^2 / 2``). Besides
    PML's scalars, ``soft_triple`` takes ``weight_reg_weight``, the strength of the pull between the
    centres of a class, and ``snr_contrastive`` takes ``embedding_reg_weight``, that of the pull of
    each vector's (each node's) sum to zero; both are off by default.

    Attributes:
        name: One of :data:`LOSSES`.
        parameters: Arguments of the loss.
        miner: One of :data:`MINERS`; ``None`` takes every pair.
        miner_parameters: Arguments of the miner.

    Raises:
        ValueError: If a name or a parameter is unknown; the nearest is named.
        TypeError: If a parameter is not a number, a truth value or a string.

    Example:
        >>> LossSettings(name="multi_similarity", parameters={"alpha": 2.0, "beta": 40.0}).name
        'multi_similarity'
    """

    name: str
    parameters: Mapping[str, Parameter] = field(default_factory=dict)
    miner: str | None = None
    miner_parameters: Mapping[str, Parameter] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_choice("name", self.name, LOSSES)
        _check_parameters(f"{self.name} loss", self.parameters, loss_parameters(self.name))
        if self.miner is None:
            if self.miner_parameters:
                raise ValueError(
                    f"miner_parameters: expected none without a miner, got {self.miner_parameters}"
                )
            return
        if self.miner == "distance_weighted":
            raise ValueError(
                "miner: distance_weighted samples by the density of L2 distances on the unit "
                "sphere, which similarities of sets do not follow; "
                f"choose one of {', '.join(MINERS)}"
            )
        check_choice("miner", self.miner, MINERS)
        allowed = _scalars(_MINERS[self.miner])
        _check_parameters(f"{self.miner} miner", self.miner_parameters, allowed)


def loss_parameters(name: str) -> tuple[str, ...]:
    """Names of the parameters that a loss takes.

    Example:
        >>> loss_parameters("multi_similarity")
        ('alpha', 'base', 'beta')
    """
    allowed = set(_scalars(_LOSSES[check_choice("loss", name, LOSSES)].kind))
    if name in _WEIGHT_REGULARIZED:
        allowed.add("weight_reg_weight")
    if name in _EMBEDDING_REGULARIZED:
        allowed.add("embedding_reg_weight")
    return tuple(sorted(allowed))


class MetricLoss(nn.Module):
    """A loss and its miner over one distance; made by :func:`build_loss`.

    Works in float32 (or float64 for float64 embeddings) whatever autocast says.

    Attributes:
        loss: PML's loss.
        miner: PML's miner, or ``None``. It holds the loss's own distance, so what it solved is not
            solved again.
        distance: That distance.
        width: What a row of embeddings must have, ``channels`` or ``nodes * channels``.
    """

    def __init__(
        self,
        settings: LossSettings,
        loss: BaseMetricLossFunction,
        miner: BaseMiner | None,
        *,
        num_classes: int,
        width: int,
    ) -> None:
        super().__init__()
        self.settings = settings
        self.loss = loss
        self.miner = miner
        self.num_classes = num_classes
        self.width = width
        self._kind = _LOSSES[settings.name]

    @property
    def distance(self) -> BaseDistance:
        """The distance that loss and miner share."""
        return self.loss.distance

    def forward(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        """The loss of a batch.

        Args:
            embeddings: Vectors, or packed sets. Shape: ``[B, width]``.
            labels: Classes. Shape: ``[B]``, an integer dtype; below ``num_classes`` for a loss with
                proxies.

        Returns:
            A scalar.

        Raises:
            TypeError: If an argument has the wrong type.
            ValueError: If shapes do not fit, a label is not a class, or a loss without proxies gets
                a batch of one class.
        """
        sizes = check_tensor("embeddings", embeddings, ["B", self.width])
        check_tensor("labels", labels, ["B"], sizes=sizes, floating=False)
        self._check_labels(labels)
        with torch.autocast(embeddings.device.type, enabled=False):
            # A proxy loss casts its parameters to the embeddings' dtype; they must stay whole.
            embeddings = embeddings.to(torch.promote_types(embeddings.dtype, torch.float32))
            mined = None if self.miner is None else self.miner(embeddings, labels)
            value: Tensor = self.loss(embeddings, labels, mined)
            return value

    def proxies(self) -> list[nn.Parameter]:
        """The proxies, for a learning rate of their own; none for a loss of pairs."""
        return [] if self._kind.proxies is None else [getattr(self.loss, self._kind.proxies)]

    @torch.no_grad()
    def initialize_proxies(
        self,
        vectors: Tensor,
        *,
        noise: float = 0.0,
        generator: torch.Generator | None = None,
    ) -> None:
        """Start each class's proxies at a vector or set of its own, such as the class's mean.

        Args:
            vectors: Shape: ``[num_classes, width]``.
            noise: Normal noise in units of the vectors' root mean square; a loss with several
                proxies a class needs some, so that these part.
            generator: Of the noise.

        Raises:
            ValueError: If the loss has no proxies, the shape does not fit, or values are not
                finite.
        """
        if self._kind.proxies is None:
            raise ValueError(f"vectors: the {self.settings.name} loss has no proxies")
        check_tensor("vectors", vectors, [self.num_classes, self.width], finite=True)
        check_positive("noise", noise, allow_zero=True)
        (proxies,) = self.proxies()
        rows = proxies.mT if self._kind.by_columns else proxies
        start = vectors.repeat_interleave(len(rows) // self.num_classes, dim=0).to(rows)
        if noise:
            spread = noise * start.square().mean().sqrt()
            draw = torch.randn(start.shape, generator=generator, dtype=start.dtype)
            start = start + spread * draw.to(start.device)
        rows.copy_(start)

    def extra_repr(self) -> str:
        """Shown by ``print``."""
        return f"{self.settings.name}, num_classes={self.num_classes}, width={self.width}"

    def _check_labels(self, labels: Tensor) -> None:
        if labels.is_floating_point() or labels.dtype == torch.bool:
            raise TypeError(f"labels: expected an integer tensor, got dtype {labels.dtype}")
        if len(labels) == 0:
            raise ValueError("labels: expected a batch, got an empty one")
        low, high = (int(part) for part in torch.aminmax(labels))
        if self._kind.proxies is not None:
            if low < 0 or high >= self.num_classes:
                raise ValueError(
                    f"labels: expected classes 0 to {self.num_classes - 1}, the {self.num_classes} "
                    f"with proxies, got {low} to {high}"
                )
        elif low == high:
            raise ValueError(
                f"labels: expected two classes or more in a batch, got {low} alone "
                f"({len(labels)} times): without a negative pair there is nothing to learn"
            )


def build_loss(
    settings: LossSettings,
    *,
    num_classes: int,
    channels: int,
    nodes: int | None = None,
    matcher: EMDMatcher | None = None,
    generator: torch.Generator | None = None,
) -> MetricLoss:
    """Build a loss with its miner over one shared distance.

    Args:
        settings: Which, and its parameters.
        num_classes: Classes that get proxies, where the loss has proxies.
        channels: D, the channels of a vector or of a node.
        nodes: N, for sets: embeddings are then packed, ``[B, N * D]``, compared by DeepEMD, and a
            proxy is a set as well, one vector a node. ``None`` is Raw: vectors ``[B, D]`` under the
            loss's usual distance.
        matcher: Ground cost, node weights and solver of sets; the paper's by default.
            ``snr_contrastive`` takes all of it but the ground cost, which is SNR there.
        generator: Of the proxies' start, which has PML's distribution.

    Returns:
        The loss.

    Raises:
        TypeError: If PML refuses the type of a parameter.
        ValueError: If a size is not positive, or a matcher comes without ``nodes``.

    Example:
        >>> settings = LossSettings(name="normalized_softmax", parameters={"temperature": 0.1})
        >>> loss = build_loss(settings, num_classes=3, channels=8, nodes=5)
        >>> [list(proxy.shape) for proxy in loss.proxies()]
        [[40, 3]]
    """
    check_positive("num_classes", num_classes)
    check_positive("channels", channels)
    kind = _LOSSES[settings.name]
    if nodes is None and matcher is not None:
        raise ValueError(
            "matcher: expected none for plain vectors (nodes=None); a matcher compares sets"
        )
    if nodes is not None:
        check_positive("nodes", nodes)
    distance = _distance(kind, channels, nodes, matcher)
    width = channels * (nodes or 1)
    arguments: dict[str, Any] = {**kind.defaults, **settings.parameters}
    if distance is not None:
        arguments["distance"] = distance
    if kind.proxies is not None:
        arguments |= {"num_classes": num_classes, "embedding_size": width}
        arguments["weight_init_func"] = _seeded(kind.kind, generator)
    arguments |= _regularizers(settings, arguments, distance, num_classes, channels)
    loss = kind.kind(**arguments)
    miner = None
    if settings.miner is not None:
        miner = _MINERS[settings.miner](distance=loss.distance, **settings.miner_parameters)
    return MetricLoss(settings, loss, miner, num_classes=num_classes, width=width)


def _distance(
    kind: _Loss, channels: int, nodes: int | None, matcher: EMDMatcher | None
) -> BaseDistance | None:
    """The distance of a loss; ``None`` leaves it to PML."""
    if nodes is None:
        return CosineSimilarity() if kind.similarity else None
    if not kind.snr:
        return DeepEMDSimilarity(channels, matcher)
    if matcher is not None:
        matcher = replace(matcher, ground_cost="snr")
    return DeepEMDSNRDistance(channels, matcher)


def _regularizers(
    settings: LossSettings,
    arguments: Mapping[str, Any],
    distance: BaseDistance | None,
    num_classes: int,
    channels: int,
) -> dict[str, Any]:
    if arguments.get("weight_reg_weight"):
        centers = int(arguments.get("centers_per_class", 10))
        return {"weight_regularizer": CentersRegularizer(num_classes, centers, distance=distance)}
    if arguments.get("embedding_reg_weight"):
        return {"embedding_regularizer": NodeMeanRegularizer(channels)}
    return {}


def _seeded(
    kind: type[BaseMetricLossFunction], generator: torch.Generator | None
) -> Callable[[Tensor], Tensor]:
    """PML's own initialisation of a loss's proxies, drawn from a generator."""

    def initialize(proxies: Tensor) -> Tensor:
        # The default does not depend on the instance, which is only half made here.
        default = kind.get_default_weight_init_func(None)
        drawn: Tensor = default.init_func(proxies, generator=generator, **default.kwargs)
        return drawn

    return initialize


def _scalars(kind: type[nn.Module]) -> list[str]:
    """Names of the arguments of a PML class that a recipe can write down."""
    names: set[str] = set()
    for base in inspect.getmro(kind):
        if base.__module__.startswith("pytorch_metric_learning"):
            names |= set(inspect.signature(base).parameters)
    return sorted(names - _NOT_SCALAR)


def _check_parameters(
    of: str, parameters: Mapping[str, Parameter], allowed: list[str] | tuple[str, ...]
) -> None:
    for name, value in parameters.items():
        check_choice(f"parameter of the {of}", name, allowed)
        if value is not None and not isinstance(value, (int, float, str)):
            raise TypeError(
                f"{name}: expected a number, a truth value or a string, got {type(value).__name__}"
            )
