import pytest
import torch
from pytorch_metric_learning import losses, miners
from pytorch_metric_learning.distances import BatchedDistance
from pytorch_metric_learning.utils.inference import CustomKNN, MatchFinder
from support import structured_sets

from emd_retrieval.features import pack, unpack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.metric_learning import DeepEMDDistance, DeepEMDSimilarity

CHANNELS, NODES = 8, 4


@pytest.fixture
def labels():
    return torch.arange(4).repeat_interleave(3)


@pytest.fixture
def embeddings(generator):
    return pack(structured_sets(12, NODES, CHANNELS, generator))


def pair_and_triplet_losses():
    for distance in (DeepEMDSimilarity, DeepEMDDistance):
        inverted = distance is DeepEMDSimilarity
        pair = {"pos_margin": 1, "neg_margin": 0.2} if inverted else {"neg_margin": 0.8}
        yield losses.ContrastiveLoss(distance=distance(CHANNELS), **pair)
        yield losses.TripletMarginLoss(margin=0.3, distance=distance(CHANNELS))
        yield losses.NTXentLoss(temperature=0.1, distance=distance(CHANNELS))
    yield losses.MultiSimilarityLoss(distance=DeepEMDSimilarity(CHANNELS))


@pytest.mark.parametrize(
    "loss",
    list(pair_and_triplet_losses()),
    ids=lambda loss: f"{type(loss).__name__}-{type(loss.distance).__name__}",
)
def test_losses_train_on_packed_sets(loss, embeddings, labels):
    embeddings.requires_grad_()
    value = loss(embeddings, labels)
    value.backward()
    assert torch.isfinite(value)
    assert value > 0
    assert torch.isfinite(embeddings.grad).all()
    moved = unpack(embeddings.grad, CHANNELS).norm(dim=2) > 0
    assert moved.any(dim=1).all(), "every set has a part in some pair"
    stepped = embeddings.detach() - 0.05 * embeddings.grad / embeddings.grad.norm()
    assert loss(stepped, labels) < value, "the gradient leads down"


@pytest.mark.parametrize(
    "miner",
    [
        miners.MultiSimilarityMiner(distance=DeepEMDSimilarity(CHANNELS)),
        miners.BatchHardMiner(distance=DeepEMDSimilarity(CHANNELS)),
        miners.BatchHardMiner(distance=DeepEMDDistance(CHANNELS)),
        miners.TripletMarginMiner(margin=0.3, distance=DeepEMDSimilarity(CHANNELS)),
        miners.TripletMarginMiner(margin=0.3, distance=DeepEMDDistance(CHANNELS)),
    ],
    ids=lambda miner: f"{type(miner).__name__}-{type(miner.distance).__name__}",
)
def test_miners_work_with_a_loss(miner, embeddings, labels):
    embeddings.requires_grad_()
    loss = losses.TripletMarginLoss(margin=0.5, distance=DeepEMDSimilarity(CHANNELS))
    mined = miner(embeddings, labels)
    assert all(len(indices) > 0 for indices in mined)
    loss(embeddings, labels, mined).backward()
    assert torch.isfinite(embeddings.grad).all()
    assert embeddings.grad.abs().sum() > 0


def test_the_hardest_pair_is_the_hardest(embeddings, labels):
    """BatchHard against the matrix, in both orientations."""
    matrix = EMDMatcher().all_pairs(unpack(embeddings, CHANNELS))
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    itself = torch.eye(12, dtype=torch.bool)
    positive = matrix.masked_fill(~same | itself, torch.inf).argmin(dim=1)
    negative = matrix.masked_fill(same, -torch.inf).argmax(dim=1)
    for distance in (DeepEMDSimilarity, DeepEMDDistance):
        anchors, positives, negatives = miners.BatchHardMiner(distance=distance(CHANNELS))(
            embeddings, labels
        )
        assert torch.equal(anchors, torch.arange(12))
        assert torch.equal(positives, positive)
        assert torch.equal(negatives, negative)


def test_the_matrix_is_the_matchers(embeddings, generator):
    other = pack(structured_sets(5, NODES + 2, CHANNELS, generator))
    expected = EMDMatcher().all_pairs(unpack(embeddings, CHANNELS), unpack(other, CHANNELS))
    similarity, distance = DeepEMDSimilarity(CHANNELS), DeepEMDDistance(CHANNELS)
    assert similarity.is_inverted
    assert not distance.is_inverted
    assert torch.equal(similarity(embeddings, other), expected)
    assert torch.equal(distance(embeddings, other), 1 - expected)


@pytest.mark.parametrize("kind", [DeepEMDSimilarity, DeepEMDDistance])
def test_pairwise_is_the_diagonal(kind, embeddings, generator):
    """Sets of different sizes meet, in the matrix and in pairs."""
    other = pack(structured_sets(12, NODES + 3, CHANNELS, generator))
    distance = kind(CHANNELS)
    torch.testing.assert_close(
        distance.pairwise_distance(embeddings, other),
        distance(embeddings, other).diagonal(),
        rtol=0,
        atol=1e-6,
    )


def test_a_set_with_itself(embeddings):
    assert DeepEMDSimilarity(CHANNELS)(embeddings).diagonal().tolist() == pytest.approx([1] * 12)
    distance = DeepEMDDistance(CHANNELS)(embeddings)
    torch.testing.assert_close(distance.diagonal(), torch.zeros(12), rtol=0, atol=1e-5)
    assert torch.equal(distance, distance.mT)


class CountingMatcher(EMDMatcher):
    """Notes whether it was asked for sets among themselves, where halves are enough."""

    def all_pairs(self, query, reference=None, **options):
        self.__dict__.setdefault("halves", []).append(reference is None or reference is query)
        return super().all_pairs(query, reference, **options)


@pytest.mark.parametrize(
    "use",
    [
        lambda distance, x, y: losses.MultiSimilarityLoss(distance=distance)(x, y),
        lambda distance, x, y: losses.ContrastiveLoss(1, 0.2, distance=distance)(x, y),
        lambda distance, x, y: miners.MultiSimilarityMiner(distance=distance)(x, y),
        lambda distance, x, y: miners.BatchHardMiner(distance=distance)(x, y),
        lambda distance, x, y: distance(x),
        lambda distance, x, y: distance(x, x),
    ],
    ids=["MS loss", "contrastive", "MS miner", "batch hard", "alone", "twice"],
)
def test_pairs_among_themselves_are_solved_once(use, embeddings, labels):
    matcher = CountingMatcher()
    use(DeepEMDSimilarity(CHANNELS, matcher), embeddings, labels)
    assert matcher.halves == [True]


def test_an_equal_copy_is_another_side(embeddings):
    matcher = CountingMatcher()
    distance = DeepEMDSimilarity(CHANNELS, matcher)
    full = distance(embeddings, embeddings.clone())
    assert matcher.halves == [False]
    torch.testing.assert_close(distance(embeddings), full, rtol=0, atol=1e-6)


def test_steps_lower_a_contrastive_loss(generator, labels):
    """Random sets, no structure to find but what the labels say."""
    embeddings = torch.randn(12, NODES * CHANNELS, generator=generator, requires_grad=True)
    loss = losses.ContrastiveLoss(
        pos_margin=1, neg_margin=0.1, distance=DeepEMDSimilarity(CHANNELS)
    )
    optimizer = torch.optim.SGD([embeddings], lr=4.0)
    values = []
    for _ in range(40):
        optimizer.zero_grad()
        value = loss(embeddings, labels)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.5 * values[0]
    matrix = DeepEMDSimilarity(CHANNELS)(embeddings.detach())
    same = labels.unsqueeze(0) == labels.unsqueeze(1)
    same_class = matrix[same & ~torch.eye(12, dtype=torch.bool)].mean()
    assert same_class > matrix[~same].mean() + 0.3


def test_cross_batch_memory(embeddings, labels):
    loss = losses.CrossBatchMemory(
        losses.ContrastiveLoss(1, 0.2, distance=DeepEMDSimilarity(CHANNELS)),
        embedding_size=NODES * CHANNELS,
        memory_size=24,
    )
    embeddings.requires_grad_()
    for _ in range(2):
        value = loss(embeddings, labels)
    value.backward()
    assert embeddings.grad.abs().sum() > 0


def test_custom_knn_batched_distance_and_match_finder(embeddings):
    """PML's other users of a distance: they take matrix and pairs as they come."""
    distance = DeepEMDSimilarity(CHANNELS)
    matrix = distance(embeddings)
    _, rows = CustomKNN(distance)(embeddings, 3, embeddings, ref_includes_query=True)
    expected = matrix.fill_diagonal_(-torch.inf).argsort(dim=1, descending=True)[:, :3]
    assert torch.equal(rows, expected)
    parts = []
    BatchedDistance(distance, lambda mat, s, e: parts.append(mat), batch_size=5)(
        embeddings, embeddings
    )
    torch.testing.assert_close(torch.cat(parts), distance(embeddings), rtol=0, atol=1e-6)
    finder = MatchFinder(distance=distance, threshold=0.999)
    assert finder.get_matching_pairs(embeddings).diagonal().all()
    assert finder.is_match(embeddings[:1], embeddings[:1])


def test_power_and_settings_reach_their_places(embeddings):
    matcher = EMDMatcher(weights="uniform", ground_cost="centered_cosine")
    squared = DeepEMDDistance(CHANNELS, matcher, power=2)(embeddings)
    plain = 1 - matcher.all_pairs(unpack(embeddings, CHANNELS))
    torch.testing.assert_close(squared, plain.square(), rtol=0, atol=1e-6)
    assert not DeepEMDSimilarity(CHANNELS).normalize_embeddings


def test_statistics_can_be_collected(embeddings):
    distance = DeepEMDSimilarity(CHANNELS, collect_stats=True)
    distance(embeddings)
    assert distance.initial_avg_query_norm == pytest.approx(embeddings.norm(dim=1).mean().item())
    assert distance.channels == CHANNELS


@pytest.mark.parametrize("kind", [DeepEMDSimilarity, DeepEMDDistance])
def test_refuses_bad_input(kind, embeddings):
    with pytest.raises(ValueError, match="channels: expected 1 or more, got 0"):
        kind(0)
    with pytest.raises(
        ValueError, match=r"query_emb: .* multiple of channels = 7, got shape \[12, 3"
    ):
        kind(7)(embeddings)
    with pytest.raises(
        ValueError, match=r"ref_emb: .* multiple of channels = 8, got shape \[12, 3"
    ):
        kind(CHANNELS)(embeddings, embeddings[:, :30])
    with pytest.raises(ValueError, match=r"ref_emb: .* multiple of channels = 8"):
        kind(CHANNELS).pairwise_distance(embeddings, embeddings[:, :30])
    with pytest.raises(ValueError, match="2D tensor"):
        kind(CHANNELS)(unpack(embeddings, CHANNELS))
    broken = embeddings.clone()
    broken[2, 9] = torch.nan
    with pytest.raises(ValueError, match=r"query: .* first is NaN at index \[2, 1, 1\]"):
        kind(CHANNELS)(broken)
