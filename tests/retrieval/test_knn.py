import pytest
import torch
import torch.nn.functional as F
from pytorch_metric_learning.testers import GlobalEmbeddingSpaceTester
from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
from pytorch_metric_learning.utils.inference import InferenceModel
from safetensors.torch import save_file
from support import structured_sets

from emd_retrieval.features import global_vectors, pack
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import EMDKNN, rank_by, score_ranking, search_sets

CHANNELS, NODES, COUNT = 8, 5, 24


@pytest.fixture
def sets(generator):
    return structured_sets(COUNT, NODES, CHANNELS, generator)


@pytest.fixture
def labels():
    return torch.arange(COUNT) % 6


def by_hand(query, gallery, k, shortlist, exclude=None, global_node=None):
    """Shortlist by cosine, sort its similarities, leave the tail: in plain loops."""
    coarse = global_vectors(query, global_node) @ global_vectors(gallery, global_node).mT
    fine = EMDMatcher().all_pairs(query, gallery)
    rows = []
    for q in range(len(query)):
        order = coarse[q].argsort(descending=True).tolist()
        if exclude is not None:
            order.remove(int(exclude[q]))
        head = sorted(order[:shortlist], key=lambda row, q=q: -fine[q, row].item())
        rows.append((head + order[shortlist:])[:k])
    return torch.tensor(rows)


@pytest.mark.parametrize(("shortlist", "k"), [(8, 8), (8, 15), (8, 3), (1, 10), (23, 23)])
@pytest.mark.parametrize("global_node", [None, -1])
def test_shortlist_rerank_and_tail(shortlist, k, global_node, sets):
    itself = torch.arange(COUNT)
    knn = EMDKNN(CHANNELS, shortlist, global_node=global_node)
    distances, rows = knn(pack(sets), k, pack(sets), ref_includes_query=True)
    assert torch.equal(rows, by_hand(sets, sets, k, shortlist, itself, global_node))
    compared = min(k, shortlist)
    assert torch.isfinite(distances[:, :compared]).all()
    assert torch.isposinf(distances[:, compared:]).all(), "nothing compares the tail to the head"
    assert (distances[:, :compared].diff(dim=1) >= 0).all(), "nearest first"


def test_distances_are_one_minus_the_similarity(sets):
    query, gallery = sets[:7], sets[7:]
    distances, rows = EMDKNN(CHANNELS, 10)(pack(query), 10, pack(gallery))
    similarity = EMDMatcher().all_pairs(query, gallery).gather(1, rows)
    torch.testing.assert_close(distances, 1 - similarity, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shortlist", [COUNT - 1, COUNT, 1000])
def test_a_shortlist_of_everything_is_all_pairs(shortlist, sets):
    arguments = (pack(sets), COUNT - 1, pack(sets), True)
    expected_distances, expected = EMDKNN(CHANNELS, None)(*arguments)
    distances, rows = EMDKNN(CHANNELS, shortlist)(*arguments)
    assert torch.equal(rows, expected)
    torch.testing.assert_close(distances, expected_distances, rtol=0, atol=1e-5)


def test_sets_of_different_sizes_meet(generator):
    query = structured_sets(3, 4, CHANNELS, generator)
    gallery = structured_sets(9, 7, CHANNELS, generator)
    _, rows = EMDKNN(CHANNELS, 5)(pack(query), 9, pack(gallery))
    assert torch.equal(rows, by_hand(query, gallery, 9, 5))


def test_accuracy_calculator_gives_the_same_metrics(sets, labels):
    calculator = AccuracyCalculator(
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r"),
        k="max_bin_count",
        knn_func=EMDKNN(CHANNELS, None),
        device=torch.device("cpu"),
    )
    theirs = calculator.get_accuracy(pack(sets), labels)
    ours = score_ranking(
        rank_by(EMDMatcher().all_pairs(sets), COUNT - 1, exclude=torch.arange(COUNT)), labels
    )
    assert 100 * theirs["precision_at_1"] == pytest.approx(ours.mean["P@1"])
    assert 100 * theirs["r_precision"] == pytest.approx(ours.mean["RP"])
    assert 100 * theirs["mean_average_precision_at_r"] == pytest.approx(ours.mean["MAP@R"])


@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("shortlist", [8, None])
def test_global_embedding_space_tester(normalize, shortlist, sets, labels):
    """The tester L2-normalises packed sets by default; scores must not move by it."""
    scaled = sets * torch.linspace(0.05, 40, COUNT).view(-1, 1, 1)

    def accuracies(normalize_embeddings, given):
        calculator = AccuracyCalculator(
            include=("mean_average_precision_at_r",),
            k="max_bin_count",
            knn_func=EMDKNN(CHANNELS, shortlist),
            device=torch.device("cpu"),
        )
        tester = GlobalEmbeddingSpaceTester(
            accuracy_calculator=calculator,
            normalize_embeddings=normalize_embeddings,
            dataloader_num_workers=0,
            data_device=torch.device("cpu"),
        )
        dataset = torch.utils.data.TensorDataset(pack(given), labels)
        return tester.test({"val": dataset}, 0, torch.nn.Identity())["val"]

    expected = accuracies(False, sets)
    assert accuracies(normalize, scaled) == expected
    assert 0 < expected["mean_average_precision_at_r_level0"] < 1


def test_normalising_a_packed_set_moves_no_similarity(sets):
    knn = EMDKNN(CHANNELS, None)
    plain, rows = knn(pack(sets[:5]), 19, pack(sets[5:]))
    normalized, again = knn(F.normalize(pack(sets[:5])), 19, F.normalize(pack(sets[5:])))
    assert torch.equal(rows, again)
    torch.testing.assert_close(plain, normalized, rtol=0, atol=1e-5)


@pytest.mark.parametrize("shortlist", [8, None])
def test_inference_model(shortlist, sets, tmp_path):
    """``get_nearest_neighbors`` calls with a query and k alone; sets come by train and add."""
    knn = EMDKNN(CHANNELS, shortlist, reset_before=False, reset_after=False)
    model = InferenceModel(torch.nn.Identity(), knn_func=knn, data_device=torch.device("cpu"))
    model.train_knn(pack(sets[:15]), batch_size=4)
    model.add_to_knn(pack(sets[15:]), batch_size=4)
    for _ in range(2):
        distances, rows = model.get_nearest_neighbors(pack(sets[:3]), k=5)
        assert torch.equal(rows[:, 0], torch.arange(3)), "a set is nearest to itself"
        torch.testing.assert_close(distances[:, 0], torch.zeros(3), rtol=0, atol=1e-5)
    model.save_knn_func(tmp_path / "sets.index")
    other = InferenceModel(
        torch.nn.Identity(),
        knn_func=EMDKNN(CHANNELS, shortlist, reset_before=False, reset_after=False),
        data_device=torch.device("cpu"),
    )
    other.load_knn_func(tmp_path / "sets.index")
    again = other.get_nearest_neighbors(pack(sets[:3]), k=5)
    assert torch.equal(again[1], rows)
    assert torch.equal(again[0], distances)


def test_resets_as_faiss_knn_does(sets):
    packed = pack(sets)
    knn = EMDKNN(CHANNELS, None)
    knn(packed[:2], 1, packed)
    with pytest.raises(ValueError, match=r"reference: there is nothing to search; pass reference="):
        knn(packed[:2], 1)
    knn.train(packed)
    assert knn(packed[:2], 1)[1].flatten().tolist() == [0, 1]

    keeping = EMDKNN(CHANNELS, None, reset_before=False, reset_after=False)
    keeping.train(packed[:4])
    _, rows = keeping(packed[5:6], 1, packed[4:8])
    assert rows.item() == 5, "a reference of a call comes after those added before"
    keeping.reset()
    with pytest.raises(ValueError, match="nothing to search"):
        keeping(packed[:2], 1)

    replacing = EMDKNN(CHANNELS, None, reset_before=True, reset_after=False)
    replacing.train(packed[:4])
    assert replacing(packed[5:6], 1, packed[4:8])[1].item() == 1
    assert replacing(packed[5:6], 1)[1].item() == 1, "the reference is kept after the call"


def test_train_forgets_and_add_does_not(sets):
    packed = pack(sets)
    knn = EMDKNN(CHANNELS, None, reset_after=False)
    knn.train(packed[:4])
    knn.train(packed[4:6])
    assert knn(packed[5:6], 1)[1].item() == 1
    knn.add(packed[8:10].numpy())
    assert knn(packed[9:10], 1)[1].item() == 3
    with pytest.raises(ValueError, match=r"k: expected 1 to 4 \(the reference sets\), got 5"):
        knn(packed[:1], 5)


def test_embeddings_with_a_gradient_are_taken(sets):
    packed = pack(sets).requires_grad_()
    distances, _ = EMDKNN(CHANNELS, 4)(packed, 2, packed, True)
    assert not distances.requires_grad


def test_save_and_load(sets, tmp_path):
    knn = EMDKNN(CHANNELS)
    with pytest.raises(ValueError, match=r"there are no sets to save; call train\(\) first"):
        knn.save(tmp_path / "x")
    assert not (tmp_path / "x").exists()
    with pytest.raises(FileNotFoundError, match="nothing"):
        knn.load(tmp_path / "nothing")
    (tmp_path / "text").write_text("no sets")
    with pytest.raises(ValueError, match=r"filename: '.*text' holds no saved sets"):
        knn.load(tmp_path / "text")
    save_file({"weights": torch.zeros(2)}, tmp_path / "weights")
    with pytest.raises(ValueError, match=r"filename: '.*weights' holds no saved sets"):
        knn.load(tmp_path / "weights")
    knn.train(pack(sets))
    knn.save(tmp_path / "sets")
    with pytest.raises(ValueError, match=r"sets: expected shape \[R, M, 4\], got \[24, 5, 8\]"):
        EMDKNN(channels=4).load(tmp_path / "sets")


def test_refuses_bad_input(sets):
    with pytest.raises(ValueError, match="channels: expected a positive number, got 0"):
        EMDKNN(0)
    with pytest.raises(ValueError, match="shortlist: expected a positive number, got 0"):
        EMDKNN(8, 0)
    packed = pack(sets)
    with pytest.raises(ValueError, match=r"query: .* multiple of channels = 7, got shape \[24, 40"):
        EMDKNN(7)(packed, 1, torch.zeros(3, 14))
    with pytest.raises(ValueError, match=r"reference: .* multiple of channels = 7"):
        EMDKNN(7)(torch.zeros(3, 14), 1, packed)
    knn = EMDKNN(CHANNELS)
    knn.train(packed)
    with pytest.raises(ValueError, match=r"embeddings: expected shape \[R, 5, 8\], got \[24, 4, 8"):
        knn.add(packed[:, :32])
    with pytest.raises(ValueError, match=r"k: expected 1 to 23 \(the reference sets\), got 24"):
        EMDKNN(CHANNELS)(packed, 24, packed, ref_includes_query=True)
    packed[3, 2] = torch.nan
    for shortlist in (5, None):
        knn = EMDKNN(CHANNELS, shortlist)
        with pytest.raises(ValueError, match=r"reference: .* got 1 .* NaN at index \[3, 0, 2\]"):
            knn(packed[:2], 2, packed)
        with pytest.raises(ValueError, match=r"query: expected finite values, got 1 that"):
            knn(packed, 2, packed[:2])
        with pytest.raises(ValueError, match=r"embeddings: expected finite values, got 1 that"):
            knn.train(packed)


def test_search_sets_needs_no_index(sets):
    ranking = search_sets(sets[:4], sets, 9, matcher=EMDMatcher(), shortlist=6)
    assert torch.equal(ranking.rows, by_hand(sets[:4], sets, 9, 6))
    everything = search_sets(sets[:4], sets, 9, matcher=EMDMatcher(), shortlist=None)
    assert torch.equal(everything.rows, by_hand(sets[:4], sets, 9, COUNT))


@pytest.mark.parametrize("ground_cost", ["cosine", "centered_cosine"])
@pytest.mark.parametrize("global_node", [None, 0])
def test_a_prepared_gallery_is_the_same_gallery(ground_cost, global_node, sets):
    """The first stage sees raw nodes whatever the ground cost makes of them."""
    shifted = sets + 1.5
    matcher = EMDMatcher(ground_cost=ground_cost)
    prepared = matcher.prepare(shifted)
    settings = {"matcher": matcher, "shortlist": 6, "global_node": global_node}
    expected = search_sets(shifted[:4], shifted, 9, **settings)
    for query in (shifted[:4], prepared.at(slice(4))):
        ranking = search_sets(query, prepared, 9, **settings)
        assert torch.equal(ranking.rows, expected.rows)
    itself = torch.arange(COUNT)
    among = search_sets(prepared, prepared, 9, exclude=itself, **settings)
    knn = EMDKNN(CHANNELS, 6, matcher=matcher, global_node=global_node)
    _, rows = knn(pack(shifted), 9, pack(shifted), ref_includes_query=True)
    assert torch.equal(rows, among.rows)
    apart = search_sets(shifted, shifted.clone(), 9, exclude=itself, **settings)
    assert torch.equal(rows, apart.rows)
