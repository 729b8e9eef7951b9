import copy
import gc
import pickle
import weakref

import pytest
import torch
from pytorch_metric_learning import losses, miners
from support import structured_sets

from emd_retrieval.features import pack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.matching import pairs as pairs_module
from emd_retrieval.metric_learning import (
    DeepEMDDistance,
    DeepEMDSimilarity,
    DeepEMDSNRDistance,
)

CHANNELS, NODES = 8, 4
HALF = 12 * 13 // 2


@pytest.fixture
def solved(monkeypatch):
    """Counts the problems that go to a solver."""
    counts = []

    def count(cost, *others, **options):
        counts.append(len(cost))
        return solve(cost, *others, **options)

    solve = pairs_module.solve
    monkeypatch.setattr(pairs_module, "solve", count)
    return counts


@pytest.fixture
def labels():
    return torch.arange(4).repeat_interleave(3)


@pytest.fixture
def embeddings(generator):
    return pack(structured_sets(12, NODES, CHANNELS, generator)).requires_grad_()


@pytest.mark.parametrize("kind", [DeepEMDSimilarity, DeepEMDDistance, DeepEMDSNRDistance])
@pytest.mark.parametrize("settings", [{}, {"weights": "uniform"}, {"weight_gradient": False}])
def test_loss_uses_what_its_miner_solved(kind, settings, solved, embeddings, labels):
    if kind is DeepEMDSNRDistance:
        settings = {**settings, "ground_cost": "snr"}
    distance = kind(CHANNELS, EMDMatcher(**settings))
    problems = HALF if distance.matcher.symmetric else 144
    loss = losses.TripletMarginLoss(margin=0.5, distance=distance)
    mined = miners.BatchHardMiner(distance=distance)(embeddings, labels)
    assert sum(solved) == problems
    value = loss(embeddings, labels, mined)
    value.backward()
    assert sum(solved) == problems, "the loss solved again"
    gradient, embeddings.grad = embeddings.grad, None
    alone = losses.TripletMarginLoss(margin=0.5, distance=kind(CHANNELS, distance.matcher))
    expected = alone(embeddings, labels, mined)
    expected.backward()
    assert sum(solved) == 2 * problems
    torch.testing.assert_close(value, expected)
    torch.testing.assert_close(gradient, embeddings.grad)


def test_a_miners_edits_stay_its_own(embeddings, labels):
    """MultiSimilarityMiner overwrites the matrix that it is given."""
    distance = DeepEMDSimilarity(CHANNELS)
    expected = distance(embeddings).detach()
    miners.MultiSimilarityMiner(distance=distance)(embeddings, labels)
    assert torch.equal(distance(embeddings), expected)


def test_several_batches(solved, generator, labels):
    """Each batch is solved once, by its own plan."""
    distance = DeepEMDSimilarity(CHANNELS)
    miner = miners.MultiSimilarityMiner(distance=distance)
    for _ in range(3):
        batch = pack(structured_sets(12, NODES, CHANNELS, generator)).requires_grad_()
        miner(batch, labels)
        torch.testing.assert_close(distance(batch), DeepEMDSimilarity(CHANNELS)(batch))
    assert sum(solved) == 2 * 3 * HALF


def test_an_edited_batch_is_solved_again(solved, embeddings, labels):
    distance = DeepEMDSimilarity(CHANNELS)
    batch = embeddings * 1
    miners.MultiSimilarityMiner(distance=distance)(batch, labels)
    with torch.no_grad():
        batch.neg_()
    got = distance(batch)
    assert sum(solved) == 2 * HALF
    torch.testing.assert_close(got, DeepEMDSimilarity(CHANNELS)(batch))


def test_another_matcher_solves_again(solved, embeddings, labels):
    distance = DeepEMDSimilarity(CHANNELS)
    miners.MultiSimilarityMiner(distance=distance)(embeddings, labels)
    distance.matcher = EMDMatcher(weights="uniform")
    got = distance(embeddings)
    assert sum(solved) == 2 * HALF
    torch.testing.assert_close(got, DeepEMDSimilarity(CHANNELS, distance.matcher)(embeddings))


def test_an_equal_batch_is_another(solved, embeddings, labels):
    distance = DeepEMDSimilarity(CHANNELS)
    miners.MultiSimilarityMiner(distance=distance)(embeddings, labels)
    distance(embeddings.clone())
    assert sum(solved) == 2 * HALF


def test_another_reference_is_another_matrix(solved, embeddings, generator):
    distance = DeepEMDSimilarity(CHANNELS)
    memory = pack(structured_sets(5, NODES, CHANNELS, generator))
    with torch.no_grad():
        distance(embeddings, memory)
    assert sum(solved) == 60
    distance(embeddings, memory)
    assert sum(solved) == 60
    distance(embeddings, memory.clone())
    assert sum(solved) == 120


def test_nothing_outlives_the_batch(embeddings, labels):
    distance = DeepEMDSimilarity(CHANNELS)
    batch = embeddings * 1
    miners.MultiSimilarityMiner(distance=distance)(batch, labels)
    (kept,) = distance._kept._of.values()
    plans = kept[-1]
    assert all(part is None or part.grad_fn is None for part in plans.tensors)
    followed, kept_plans = weakref.ref(batch), weakref.ref(plans)
    del batch, kept, plans
    gc.collect()
    assert followed() is None
    assert kept_plans() is None


def test_nothing_is_kept_without_gradients_to_come(embeddings, labels):
    distance = DeepEMDSimilarity(CHANNELS)
    miners.MultiSimilarityMiner(distance=distance)(embeddings.detach(), labels)
    with torch.inference_mode():
        distance(embeddings * 1)
    distance(embeddings)
    assert not len(distance._kept._of)


def test_copies_and_pickles_drop_what_is_kept(embeddings, labels):
    distance = DeepEMDSimilarity(CHANNELS)
    miners.MultiSimilarityMiner(distance=distance)(embeddings, labels)
    assert len(distance._kept._of) == 1
    for twin in (copy.deepcopy(distance), pickle.loads(pickle.dumps(distance))):  # noqa: S301
        assert not len(twin._kept._of)
        assert torch.equal(twin(embeddings), distance(embeddings))
