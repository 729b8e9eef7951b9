import copy
import math

import pytest
import torch
from support import structured_sets
from torch.nn.functional import normalize

from emd_retrieval.features import pack, unpack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.metric_learning import (
    LOSSES,
    MINERS,
    DeepEMDSimilarity,
    DeepEMDSNRDistance,
    LossSettings,
    build_loss,
    loss_parameters,
)

CHANNELS, NODES, CLASSES = 8, 3, 4
PROXY_LOSSES = ["normalized_softmax", "soft_triple", "arcface", "proxy_anchor"]


@pytest.fixture
def labels():
    return torch.arange(CLASSES).repeat_interleave(3)


@pytest.fixture
def packed(generator):
    centers = structured_sets(CLASSES, NODES, CHANNELS, generator).repeat_interleave(3, dim=0)
    return pack(centers + 0.7 * torch.randn(centers.shape, generator=generator))


def build(name, nodes=NODES, miner=None, matcher=None, channels=CHANNELS, **parameters):
    settings = LossSettings(name=name, parameters=parameters, miner=miner)
    generator = torch.Generator().manual_seed(5)
    return build_loss(
        settings,
        num_classes=CLASSES,
        channels=channels,
        nodes=nodes,
        matcher=matcher,
        generator=generator,
    )


@pytest.mark.parametrize("nodes", [None, NODES], ids=["raw", "sets"])
@pytest.mark.parametrize("name", LOSSES)
def test_every_loss_leads_down(name, nodes, packed, labels):
    embeddings = (packed if nodes else packed[:, :CHANNELS]).clone().requires_grad_()
    loss = build(name, nodes)
    value = loss(embeddings, labels)
    value.backward()
    assert value.ndim == 0
    assert torch.isfinite(value)
    assert value > 0
    for tensor in (embeddings, *loss.proxies()):
        assert torch.isfinite(tensor.grad).all()
        assert tensor.grad.any()
    # Short, since averages over violating pairs jump where a pair stops being one.
    step = 1e-3 / embeddings.grad.norm()
    assert loss(embeddings.detach() - step * embeddings.grad, labels) < value
    assert len(loss.proxies()) == (name in PROXY_LOSSES)


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "triplet_margin"])
def test_gradient_against_finite_differences(name, generator):
    """In float64, where the random problem is away from the kinks of the plan and of the loss."""
    embeddings = pack(torch.randn(4, 2, 4, generator=generator, dtype=torch.float64))
    parameters = {"centers_per_class": 2} if name == "soft_triple" else {}
    matcher = EMDMatcher(solver="pot")
    loss = build(name, 2, matcher=matcher, channels=4, **parameters).double()
    labels = torch.tensor([0, 0, 1, 1])
    assert torch.autograd.gradcheck(
        lambda x: loss(x, labels), embeddings.requires_grad_(), eps=1e-6, atol=1e-4, rtol=1e-4
    )


def similarities(left, right, matcher=None):
    matrix = EMDMatcher() if matcher is None else matcher
    return matrix.all_pairs(unpack(left, CHANNELS), unpack(right, CHANNELS)).tolist()


def test_normalized_softmax_in_plain_loops(packed, labels):
    loss = build("normalized_softmax", temperature=0.1)
    matrix = similarities(packed, loss.proxies()[0].detach().mT.contiguous())
    terms = []
    for row, label in zip(matrix, labels.tolist(), strict=True):
        exponentials = [math.exp(similarity / 0.1) for similarity in row]
        terms.append(-math.log(exponentials[label] / sum(exponentials)))
    expected = sum(terms) / len(terms)
    assert loss(packed, labels).item() == pytest.approx(expected, rel=1e-4)


def test_arcface_in_plain_loops(packed, labels):
    loss = build("arcface", margin=20.0, scale=10.0)
    matrix = similarities(packed, loss.proxies()[0].detach().mT.contiguous())
    terms = []
    for row, label in zip(matrix, labels.tolist(), strict=True):
        row[label] = math.cos(math.acos(row[label]) + math.radians(20.0))
        exponentials = [math.exp(10 * similarity) for similarity in row]
        terms.append(-math.log(exponentials[label] / sum(exponentials)))
    assert loss(packed, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def test_soft_triple_in_plain_loops(packed, labels):
    loss = build("soft_triple", la=15.0, gamma=0.2, margin=0.05, centers_per_class=3)
    matrix = similarities(packed, loss.proxies()[0].detach().mT.contiguous())
    terms = []
    for row, label in zip(matrix, labels.tolist(), strict=True):
        of_class = []
        for c in range(CLASSES):
            near = row[3 * c : 3 * c + 3]
            shares = [math.exp(s / 0.2) for s in near]
            of_class.append(sum(a * s for a, s in zip(shares, near, strict=True)) / sum(shares))
        of_class[label] -= 0.05
        exponentials = [math.exp(15 * similarity) for similarity in of_class]
        terms.append(-math.log(exponentials[label] / sum(exponentials)))
    assert loss(packed, labels).item() == pytest.approx(sum(terms) / len(terms), rel=1e-4)


def mean_of_positive(terms):
    kept = [term for term in terms if term > 0]
    return sum(kept) / len(kept) if kept else 0.0


def pairs(labels):
    for i, a in enumerate(labels.tolist()):
        for j, b in enumerate(labels.tolist()):
            if i != j:
                yield i, j, a == b


def test_contrastive_in_plain_loops(packed, labels):
    """Margins are similarities: PML's averages run over the pairs that violate them."""
    matrix = similarities(packed, packed)
    positive = [max(0.9 - matrix[i][j], 0) for i, j, same in pairs(labels) if same]
    negative = [max(matrix[i][j] - 0.3, 0) for i, j, same in pairs(labels) if not same]
    expected = mean_of_positive(positive) + mean_of_positive(negative)
    loss = build("contrastive", pos_margin=0.9, neg_margin=0.3)
    assert loss(packed, labels).item() == pytest.approx(expected, rel=1e-4)


def test_snr_contrastive_in_plain_loops(packed, labels):
    matrix = similarities(packed, packed, EMDMatcher(ground_cost="snr"))
    positive = [max(1 - matrix[i][j] - 0.1, 0) for i, j, same in pairs(labels) if same]
    negative = [max(1.5 - (1 - matrix[i][j]), 0) for i, j, same in pairs(labels) if not same]
    sums = unpack(packed, CHANNELS).sum(2).abs().mean().item()
    loss = build("snr_contrastive", pos_margin=0.1, neg_margin=1.5, embedding_reg_weight=0.2)
    expected = mean_of_positive(positive) + mean_of_positive(negative) + 0.2 * sums
    assert loss(packed, labels).item() == pytest.approx(expected, rel=1e-4)
    assert isinstance(loss.distance, DeepEMDSNRDistance)


def test_multi_similarity_in_plain_loops(packed, labels):
    matrix = similarities(packed, packed)
    terms = []
    for i in range(12):
        same = [math.exp(-2 * (matrix[i][j] - 0.4)) for a, j, s in pairs(labels) if a == i and s]
        other = [
            math.exp(20 * (matrix[i][j] - 0.4)) for a, j, s in pairs(labels) if a == i and not s
        ]
        terms.append(math.log(1 + sum(same)) / 2 + math.log(1 + sum(other)) / 20)
    loss = build("multi_similarity", alpha=2.0, beta=20.0, base=0.4)
    assert loss(packed, labels).item() == pytest.approx(sum(terms) / 12, rel=1e-4)


@pytest.mark.parametrize("nodes", [None, NODES])
def test_soft_triples_centres_are_pulled_together(nodes, packed, labels):
    embeddings = packed if nodes else packed[:, :CHANNELS]
    plain = build("soft_triple", nodes, centers_per_class=3)
    pulled = build("soft_triple", nodes, centers_per_class=3, weight_reg_weight=0.5)
    centers = plain.proxies()[0].detach().mT
    pull = 0.0
    for c in range(CLASSES):
        for a, b in ((0, 1), (0, 2), (1, 2)):
            left, right = centers[3 * c + a], centers[3 * c + b]
            if nodes:
                similarity = similarities(left[None], right[None])[0][0]
            else:
                similarity = float(normalize(left, dim=0) @ normalize(right, dim=0))
            pull += math.sqrt(2 - 2 * similarity) / (2 * 3 * CLASSES)
    difference = pulled(embeddings, labels) - plain(embeddings, labels)
    assert difference.item() == pytest.approx(0.5 * pull, rel=1e-3)


@pytest.mark.parametrize("nodes", [None, NODES])
@pytest.mark.parametrize("miner", MINERS)
def test_every_miner_shares_the_distance(miner, nodes, packed, labels):
    embeddings = (packed if nodes else packed[:, :CHANNELS]).clone().requires_grad_()
    loss = build("contrastive", nodes, miner=miner, neg_margin=-1.0)
    assert loss.miner.distance is loss.distance
    mined = loss.miner(embeddings, labels)
    assert all(len(part) for part in mined)
    value = loss(embeddings, labels)
    assert value.item() == pytest.approx(loss.loss(embeddings, labels, mined).item())
    value.backward()
    assert embeddings.grad.any()


def test_half_precision_does_not_reach_the_proxies(packed, labels):
    loss = build("normalized_softmax")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = loss(packed.bfloat16().requires_grad_(), labels)
    assert half.dtype == torch.float32
    assert loss.proxies()[0].dtype == torch.float32
    assert half.item() == pytest.approx(loss(packed, labels).item(), rel=0.05)


def test_proxies_start_from_the_generator():
    first, again = build("arcface"), build("arcface")
    assert torch.equal(first.proxies()[0], again.proxies()[0])
    assert first.proxies()[0].std().item() == pytest.approx(1, abs=0.2)
    assert build("soft_triple").proxies()[0].abs().max() < 1, "PML's own scale"


@pytest.mark.parametrize("name", PROXY_LOSSES)
def test_proxies_start_from_class_means(name, packed, labels):
    loss = build(name)
    means = torch.stack([packed[labels == c].mean(0) for c in range(CLASSES)])
    loss.initialize_proxies(means)
    (proxies,) = loss.proxies()
    rows = proxies.detach() if name == "proxy_anchor" else proxies.detach().mT
    nearest = loss.distance(packed, rows).argmax(1) // (len(rows) // CLASSES)
    assert torch.equal(nearest, labels), "a set is nearest to the mean of its class"
    loss.initialize_proxies(means, noise=0.1, generator=torch.Generator().manual_seed(0))
    noise = (rows - means.repeat_interleave(len(rows) // CLASSES, 0)).std()
    assert noise.item() == pytest.approx(0.1 * means.square().mean().sqrt().item(), rel=0.3)


def test_settings_name_their_parameters():
    assert loss_parameters("soft_triple") == (
        "centers_per_class", "gamma", "la", "margin", "weight_reg_weight",
    )  # fmt: skip
    for name in LOSSES:
        assert not {"distance", "num_classes", "embedding_size"} & set(loss_parameters(name))


def test_a_copy_is_whole(packed, labels):
    loss = build("multi_similarity", miner="multi_similarity")
    embeddings = packed.clone().requires_grad_()
    expected = loss(embeddings, labels)
    twin = copy.deepcopy(loss)
    assert torch.equal(twin(embeddings, labels), expected)
    assert twin.miner.distance is twin.distance


def test_refuses_bad_settings():
    with pytest.raises(ValueError, match=r"^name: expected one of .*did you mean 'arcface'"):
        LossSettings(name="arc_face")
    with pytest.raises(ValueError, match=r"multi_similarity loss: .*did you mean 'alpha'"):
        LossSettings(name="multi_similarity", parameters={"alhpa": 1.0})
    with pytest.raises(ValueError, match=r"expected one of .*; got 'num_classes'"):
        LossSettings(name="arcface", parameters={"num_classes": 3})
    with pytest.raises(TypeError, match="alpha: expected a number"):
        LossSettings(name="multi_similarity", parameters={"alpha": [1.0]})
    with pytest.raises(ValueError, match="miner: distance_weighted samples by the density of L2"):
        LossSettings(name="contrastive", miner="distance_weighted")
    with pytest.raises(ValueError, match=r"miner: expected one of .*did you mean 'batch_hard'"):
        LossSettings(name="contrastive", miner="batchhard")
    with pytest.raises(ValueError, match=r"batch_hard miner: expected one of"):
        LossSettings(name="contrastive", miner="batch_hard", miner_parameters={"margin": 1.0})
    with pytest.raises(ValueError, match="miner_parameters: expected none without a miner"):
        LossSettings(name="contrastive", miner_parameters={"margin": 1.0})
    with pytest.raises(ValueError, match="matcher: expected none for plain vectors"):
        build("contrastive", None, matcher=EMDMatcher())
    with pytest.raises(ValueError, match="channels: expected a positive number"):
        build("contrastive", channels=0)
    with pytest.raises(ValueError, match="matcher: expected ground_cost='snr', got 'cosine'"):
        DeepEMDSNRDistance(CHANNELS, EMDMatcher())


def test_refuses_bad_batches(packed, labels):
    loss = build("multi_similarity")
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[B, 24\], got \[12, 16\]"):
        loss(packed[:, :16], labels)
    with pytest.raises(ValueError, match=r"labels: expected shape \[B\], with B = 12"):
        loss(packed, labels[:5])
    with pytest.raises(TypeError, match="labels: expected an integer tensor"):
        loss(packed, labels.float())
    with pytest.raises(ValueError, match="labels: expected two classes or more in a batch, got 2"):
        loss(packed, torch.full_like(labels, 2))
    with pytest.raises(ValueError, match="labels: expected a batch, got an empty one"):
        loss(packed[:0], labels[:0])
    with pytest.raises(ValueError, match="labels: expected classes 0 to 3, the 4 with proxies"):
        build("arcface")(packed, labels + 1)
    with pytest.raises(ValueError, match="the multi_similarity loss has no proxies"):
        loss.initialize_proxies(packed[:4])
    with pytest.raises(ValueError, match=r"vectors: expected shape \[4, 24\]"):
        build("arcface").initialize_proxies(packed)


def test_matcher_settings_reach_the_distance():
    matcher = EMDMatcher(weights="uniform", solver="pot")
    assert build("contrastive", matcher=matcher).distance.matcher is matcher
    assert isinstance(build("contrastive").distance, DeepEMDSimilarity)
    snr = build("snr_contrastive", matcher=matcher).distance.matcher
    assert snr == EMDMatcher(weights="uniform", solver="pot", ground_cost="snr")
