"""Qdrant as a first stage, in its embedded local mode; a server speaks the same interface."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from emd_retrieval.retrieval import EMDReranker, LocalFeatureStore, QdrantShortlist

qdrant = pytest.importorskip("qdrant_client", reason="needs the extra 'qdrant'")
models = qdrant.models


@pytest.fixture
def vectors(generator):
    return torch.randn(40, 8, generator=generator)


def client_with(vectors, distance, payload=None):
    client = qdrant.QdrantClient(":memory:")
    client.create_collection("birds", vectors_config=models.VectorParams(size=8, distance=distance))
    client.upsert(
        "birds",
        [
            models.PointStruct(id=i, vector=v.tolist(), payload={"file": f"{i}.jpg"})
            for i, v in enumerate(vectors)
        ],
    )
    return client


@pytest.mark.parametrize("distance", ["Cosine", "Dot", "Euclid"])
def test_it_finds_the_nearest(vectors, distance):
    unit = F.normalize(vectors, dim=1)
    client = client_with(unit, models.Distance(distance))
    shortlist = QdrantShortlist("birds", client=client)
    found = shortlist.search(vectors[:3], 5)
    scores, rows = (unit[:3] @ unit.T).topk(5, dim=1)
    np.testing.assert_array_equal(found.ids, rows)
    np.testing.assert_allclose(found.scores, scores, atol=1e-4)
    assert (shortlist.search(vectors[:1], 50).ids[0, 40:] == -1).all()


def test_ids_from_the_payload_end_to_end(tmp_path, vectors):
    client = client_with(vectors, models.Distance.COSINE)
    shortlist = QdrantShortlist("birds", client=client, id_key="file")
    names = [f"{i}.jpg" for i in range(40)]
    path = tmp_path / "s"
    with LocalFeatureStore.create(path, channels=8, nodes=1, ids="string") as writer:
        writer.append(names, vectors[:, None])
    store = LocalFeatureStore.open(path)
    shortlist.check(store)
    first = shortlist.search(vectors[:2], 6)
    found = EMDReranker(store).rerank(vectors[:2, None], first.ids, first.scores, k=1, alpha=0.5)
    assert found.ids.tolist() == [["0.jpg"], ["1.jpg"]]
    with pytest.raises(ValueError, match=r"point 0 of 'birds' has no 'name' in its payload"):
        QdrantShortlist("birds", client=client, id_key="name").check(store)
    with pytest.raises(ValueError, match=r"the store s has strings as ids; expected id_key"):
        QdrantShortlist("birds", client=client).check(store)


def test_refusals(vectors):
    client = client_with(vectors, models.Distance.MANHATTAN)
    with pytest.raises(ValueError, match=r"metric Manhattan; expected Cosine, Dot or Euclid"):
        QdrantShortlist("birds", client=client)
    with pytest.raises(ValueError, match=r"no collection 'cats' in the client; there are birds"):
        QdrantShortlist("cats", client=client)
    with pytest.raises(ValueError, match="one of url, path and client"):
        QdrantShortlist("birds")
    good = QdrantShortlist("birds", client=client_with(vectors, models.Distance.DOT))
    with pytest.raises(ValueError, match=r"collection 'birds' has 8 dimensions, .* have 4"):
        good.search(torch.ones(1, 4), 2)


def test_points_of_other_norms_want_queries_as_they_are(tmp_path, vectors):
    long = vectors * torch.linspace(2, 5, 40)[:, None]
    with LocalFeatureStore.create(tmp_path / "s", channels=8, nodes=1) as writer:
        writer.append(np.arange(40), vectors[:, None])
    store = LocalFeatureStore.open(tmp_path / "s")
    client = client_with(long, models.Distance.EUCLID)
    with pytest.raises(ValueError, match=r"collection 'birds' compares by L2 .*--no-normalize"):
        QdrantShortlist("birds", client=client).check(store)
    plain = QdrantShortlist("birds", client=client, normalize=False)
    plain.check(store)
    expected = torch.cdist(vectors[:3], long).argmin(dim=1)
    assert plain.search(vectors[:3], 1).ids[:, 0].tolist() == expected.tolist()
    QdrantShortlist("birds", client=client_with(long, models.Distance.DOT)).check(store)


def test_a_client_of_its_own_is_closed(tmp_path, vectors):
    """The embedded mode lets one client at a time into its folder."""
    folder = tmp_path / "q"
    client = qdrant.QdrantClient(path=str(folder))
    client.create_collection(
        "birds", vectors_config=models.VectorParams(size=8, distance=models.Distance.DOT)
    )
    client.close()
    with QdrantShortlist("birds", path=folder) as first:
        with pytest.raises(RuntimeError, match="already accessed"):
            QdrantShortlist("birds", path=folder)
        assert first.channels == 8
    with pytest.raises(ValueError, match="no collection 'cats'"):
        QdrantShortlist("cats", path=folder)
    dropped = QdrantShortlist("birds", path=folder)
    del dropped
    QdrantShortlist("birds", path=folder).close()
    # One that is the caller's stays open.
    mine = client_with(vectors, models.Distance.DOT)
    QdrantShortlist("birds", client=mine).close()
    assert mine.collection_exists("birds")


def test_a_folder_that_is_not_there_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"qdrant: no folder '.*none'"):
        QdrantShortlist("birds", path=tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.filterwarnings("ignore:Failed to obtain server version")
def test_a_server_that_does_not_answer_is_a_usual_error():
    with pytest.raises(ConnectionError, match=r"qdrant: http://127\.0\.0\.1:9 cannot be asked for"):
        QdrantShortlist("birds", url="http://127.0.0.1:9")


@pytest.mark.parametrize("value", [3.5, ["a"], {"a": 1}])
def test_a_payload_that_is_no_id_is_refused(tmp_path, vectors, value):
    client = client_with(vectors, models.Distance.DOT)
    client.set_payload("birds", {"file": value}, points=[0])
    with pytest.raises(ValueError, match=r"a whole number or a string as 'file' of point 0"):
        QdrantShortlist("birds", client=client, id_key="file").search(vectors[:1], 40)
