"""PML's testers, inference model, calculators and memory, with sets in place of vectors."""

import pytest
import torch
from pytorch_metric_learning import losses, miners, testers
from pytorch_metric_learning.distances import CosineSimilarity, SNRDistance
from pytorch_metric_learning.utils import loss_and_miner_utils as lmu
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import CustomKNN, InferenceModel, MatchFinder
from support import structured_sets
from torch import nn

from emd_retrieval.features import pack, unpack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.metric_learning import (
    DeepEMDDistance,
    DeepEMDSimilarity,
    DeepEMDSNRDistance,
)
from emd_retrieval.retrieval import EMDKNN

CHANNELS, NODES = 8, 4


@pytest.fixture
def labels():
    return torch.arange(5).repeat_interleave(4)


@pytest.fixture
def sets(generator):
    centers = structured_sets(5, NODES, CHANNELS, generator).repeat_interleave(4, dim=0)
    return pack(centers + 0.7 * torch.randn(centers.shape, generator=generator))


def ranking_metrics(matrix, labels):
    """P@1, RP and MAP@R in plain loops; every class has four members."""
    sums = [0.0, 0.0, 0.0]
    for i, row in enumerate(matrix.fill_diagonal_(-torch.inf)):
        hits = (labels[row.argsort(descending=True)] == labels[i]).double()[:3]
        precision = hits.cumsum(0) / torch.arange(1, 4)
        sums = [
            total + float(part)
            for total, part in zip(
                sums, (hits[0], hits.mean(), (precision * hits).mean()), strict=True
            )
        ]
    return [total / len(labels) for total in sums]


def test_types_that_pml_asks_for():
    assert isinstance(DeepEMDSimilarity(CHANNELS), CosineSimilarity)
    assert isinstance(DeepEMDSNRDistance(CHANNELS), SNRDistance)
    assert not DeepEMDSNRDistance(CHANNELS).is_inverted
    assert not DeepEMDDistance(CHANNELS).is_inverted


def test_distance_weighted_miner_is_refused():
    for distance in (DeepEMDSimilarity, DeepEMDDistance, DeepEMDSNRDistance):
        with pytest.raises(AssertionError, match="requires the distance metric to be LpDistance"):
            miners.DistanceWeightedMiner(distance=distance(CHANNELS))


@pytest.mark.parametrize("ground_cost", ["cosine", "centered_cosine", "snr"])
@pytest.mark.parametrize("weights", ["cross_reference", "uniform", "k_means"])
def test_normalizing_packed_sets_moves_no_score(ground_cost, weights, sets):
    matcher = EMDMatcher(ground_cost=ground_cost, weights=weights, clusters=3)
    scaled = nn.functional.normalize(sets, dim=1)
    torch.testing.assert_close(
        matcher.all_pairs(unpack(scaled, CHANNELS)),
        matcher.all_pairs(unpack(sets, CHANNELS)),
        rtol=1e-4,
        atol=2e-5,
    )


def test_accuracy_calculator(sets, labels):
    expected = ranking_metrics(EMDMatcher().all_pairs(unpack(sets, CHANNELS)), labels)
    for knn in (EMDKNN(CHANNELS, shortlist=None), CustomKNN(DeepEMDSimilarity(CHANNELS))):
        calculator = AccuracyCalculator(
            include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
            k="max_bin_count",
            knn_func=knn,
        )
        metrics = calculator.get_accuracy(sets, labels)
        names = ("precision_at_1", "r_precision", "mean_average_precision_at_r")
        got = [metrics[name] for name in names]
        assert got == pytest.approx(expected)


def test_tester(sets, labels):
    """It L2-normalises the packed sets on the way."""
    tester = testers.GlobalEmbeddingSpaceTester(
        data_device=torch.device("cpu"),
        dataloader_num_workers=0,
        accuracy_calculator=AccuracyCalculator(
            include=("precision_at_1", "mean_average_precision_at_r"),
            k="max_bin_count",
            knn_func=EMDKNN(CHANNELS, shortlist=None),
        ),
    )
    dataset = torch.utils.data.TensorDataset(sets, labels)
    metrics = tester.test({"val": dataset}, 0, nn.Identity(), nn.Identity())["val"]
    expected = ranking_metrics(EMDMatcher().all_pairs(unpack(sets, CHANNELS)), labels)
    assert metrics["precision_at_1_level0"] == pytest.approx(expected[0])
    assert metrics["mean_average_precision_at_r_level0"] == pytest.approx(expected[2])


def test_inference_model(sets):
    matrix = EMDMatcher().all_pairs(unpack(sets, CHANNELS))
    model = InferenceModel(
        nn.Identity(),
        knn_func=EMDKNN(CHANNELS, shortlist=None, reset_before=False, reset_after=False),
        match_finder=MatchFinder(DeepEMDSimilarity(CHANNELS), threshold=0.6),
        data_device=torch.device("cpu"),
    )
    model.train_knn(sets)
    distances, rows = model.get_nearest_neighbors(sets[:5], k=3)
    expected, places = matrix[:5].topk(3)
    assert torch.equal(rows, places)
    torch.testing.assert_close(1 - distances, expected, rtol=0, atol=2e-5)
    clear = (matrix - 0.6).abs() > 1e-4
    assert torch.equal(torch.from_numpy(model.get_matches(sets))[clear], (matrix > 0.6)[clear])


@pytest.mark.parametrize(
    ("loss", "miner"),
    [
        (losses.ContrastiveLoss(1, 0.2, distance=DeepEMDSimilarity(CHANNELS)), None),
        (losses.MultiSimilarityLoss(distance=DeepEMDSimilarity(CHANNELS)), "multi_similarity"),
        (losses.NTXentLoss(distance=DeepEMDSimilarity(CHANNELS)), None),
        (losses.SupConLoss(distance=DeepEMDSimilarity(CHANNELS)), None),
        (
            losses.SignalToNoiseRatioContrastiveLoss(distance=DeepEMDSNRDistance(CHANNELS)),
            None,
        ),
    ],
    ids=lambda part: type(part).__name__,
)
def test_cross_batch_memory(loss, miner, sets, labels, generator):
    """The second batch meets the first in the memory: its loss is that of the two together."""
    if miner is not None:
        miner = miners.MultiSimilarityMiner(distance=loss.distance)
    memory = losses.CrossBatchMemory(loss, NODES * CHANNELS, memory_size=40, miner=miner)
    memory(sets, labels)
    second = (sets + 0.1 * torch.randn(sets.shape, generator=generator)).requires_grad_()
    value = memory(second, labels)
    value.backward()
    assert torch.isfinite(second.grad).all()
    assert second.grad.any()
    both, both_labels = torch.cat([sets, second.detach()]), labels.repeat(2)
    if miner is None:
        chosen = lmu.get_all_pairs_indices(labels, both_labels)
    else:
        chosen = miner(second, labels, both, both_labels)
    chosen = lmu.remove_self_comparisons(chosen, torch.arange(20, 40), 40)
    expected = loss(second, labels, chosen, both, both_labels)
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
