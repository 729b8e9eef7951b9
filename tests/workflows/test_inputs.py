import zipfile

import numpy as np
import pandas as pd
import pytest
import torch

from emd_retrieval.features import global_vectors
from emd_retrieval.workflows.inputs import read_labels, read_matrix, read_ranking


@pytest.fixture
def sets():
    return np.random.default_rng(0).normal(size=(6, 3, 4)).astype(np.float32)


def save(path, content):
    """Write an array, a table or bytes by the path's ending; returns the path."""
    if isinstance(content, bytes):
        path.write_bytes(content)
    elif path.suffix == ".npy":
        np.save(path, content)
    elif path.suffix == ".csv":
        pd.DataFrame(content).to_csv(path, index=False)
    else:
        pd.DataFrame(content).to_parquet(path)
    return path


@pytest.mark.parametrize("dtype", [np.float32, np.float64, np.float16, ">f4"])
def test_packed_sets_and_sets(dtype, sets, tmp_path):
    sets = sets.astype(dtype)
    packed, _, labels = read_matrix(save(tmp_path / "p.npy", sets.reshape(6, 12)), 4, None)
    plain, vectors, _ = read_matrix(save(tmp_path / "s.npy", sets), None, -1)
    assert packed.shape == (6, 3, 4)
    assert packed.dtype == torch.float32
    assert torch.equal(packed, torch.from_numpy(sets.astype(np.float32)))
    assert torch.equal(plain, packed)
    assert torch.equal(vectors, global_vectors(packed, -1))
    assert labels is None


def test_plain_vectors(sets, tmp_path):
    nodes, vectors, _ = read_matrix(save(tmp_path / "v.npy", sets[:, 0]), None, None)
    assert nodes.shape == (6, 1, 4)
    torch.testing.assert_close(vectors.norm(dim=1), torch.ones(6))
    integers, _, _ = read_matrix(save(tmp_path / "i.npy", np.arange(12).reshape(3, 4)), None, None)
    assert integers[1, 0].tolist() == [4, 5, 6, 7]


def test_fortran_order_is_read_as_it_is_meant(sets, tmp_path):
    packed = np.asfortranarray(sets.reshape(6, 12))
    nodes, _, _ = read_matrix(save(tmp_path / "f.npy", packed), 4, None)
    assert torch.equal(nodes, torch.from_numpy(sets))


def test_parquet_with_numeric_columns(sets, tmp_path):
    table = pd.DataFrame(sets.reshape(6, 12)).rename(columns=str)
    table.insert(0, "id", [f"image {i}" for i in range(6)])
    table.insert(3, "label", list("aabbcc"))
    table["path"] = "somewhere"
    nodes, _, labels = read_matrix(save(tmp_path / "t.parquet", table), 4, None)
    assert torch.equal(nodes, torch.from_numpy(sets))
    assert list(labels) == list("aabbcc")


@pytest.mark.parametrize("suffix", ["parquet", "pq"])
def test_parquet_with_a_list_column(suffix, sets, tmp_path):
    table = pd.DataFrame({"embedding": list(sets.reshape(6, 12)), "label": [3, 3, 4, 4, 5, 5]})
    nodes, _, labels = read_matrix(save(tmp_path / f"t.{suffix}", table), 4, None)
    assert torch.equal(nodes, torch.from_numpy(sets))
    assert labels.tolist() == [3, 3, 4, 4, 5, 5]


FLAT = np.ones((6, 12), np.float32)
NESTED = {"embedding": [[[1.0, 2.0], [3.0, 4.0]]] * 2}


@pytest.mark.parametrize(
    ("name", "content", "channels", "node", "message"),
    [
        ("a.npy", FLAT, 5, None,
         "embeddings (a.npy): expected a packed set whose width is a multiple of channels = 5, "
         "got shape [6, 12]"),
        ("a.npy", FLAT, 0, None,
         "channels: expected a positive number, got 0"),
        ("a.npy", FLAT.reshape(6, 3, 4), 5, None,
         "channels: a.npy holds sets of 4 channels, got 5"),
        ("a.npy", FLAT, 4, 3, "global_node: expected a node of 3, got 3"),
        ("a.npy", FLAT[0], None, None,
         "embeddings: expected numbers of shape [n, N*D], [n, N, D] or [n, D] in a.npy, got "
         "float32 [12]"),
        ("a.npy", FLAT[:0], None, None,
         "embeddings: expected numbers of shape [n, N*D], [n, N, D] or [n, D] in a.npy, got "
         "float32 [0, 12]"),
        ("a.npy", np.array([["a", "b"]]), None, None,
         "embeddings: expected numbers of shape [n, N*D], [n, N, D] or [n, D] in a.npy, got "
         "<U1 [1, 2]"),
        ("a.npy", FLAT * 1j, None, None,
         "embeddings: expected numbers of shape [n, N*D], [n, N, D] or [n, D] in a.npy, got "
         "complex64 [6, 12]"),
        ("a.npy", np.where(np.eye(6, 12) * np.arange(12) == 3, np.nan, FLAT), 4, None,
         "embeddings (a.npy): expected finite values, got 1 that are not; the first is NaN at "
         "index [3, 0, 3] of shape [6, 3, 4]"),
        ("a.npy", FLAT.astype(np.float64) * 1e300, 4, None,
         "embeddings (a.npy): expected finite values, got 72 that are not; the first is infinite "
         "at index [0, 0, 0] of shape [6, 3, 4]"),
        ("a.npz", b"PK", None, None,
         "embeddings: expected an array (.npy) or a table (.parquet), got a.npz"),
        ("a.txt", b"1 2", None, None, "a.txt: expected a table, .parquet or .csv, got '.txt'"),
        ("a.parquet", {"x": [1.0], "city": ["Rome"], "bird": ["wren"]}, None, None,
         "embeddings: columns city, bird of a.parquet are not numbers; keep the numeric columns, "
         "or one list column 'embedding'"),
        ("a.parquet", {"embedding": [[1.0, 2.0], [1.0]]}, None, None,
         "embeddings: expected lists of one size in column 'embedding' of a.parquet, got [1], [2]"),
        ("a.parquet", {"embedding": [[1.0, 2.0], None]}, None, None,
         "embeddings: expected lists of one size in column 'embedding' of a.parquet, got [], [2]"),
        ("a.parquet", {"label": [1, 2]}, None, None,
         "embeddings: expected numbers of shape [n, N*D], [n, N, D] or [n, D] in a.parquet, got "
         "float32 [2, 0]"),
        ("a.parquet", {"x": [1.0, None]}, None, None,
         "embeddings (a.parquet): expected finite values, got 1 that are not; the first is NaN at "
         "index [1, 0, 0] of shape [2, 1, 1]"),
    ],
)  # fmt: skip
def test_embeddings_that_do_not_fit(name, content, channels, node, message, tmp_path):
    with np.errstate(over="ignore"), pytest.raises(ValueError) as caught:
        read_matrix(save(tmp_path / name, content), channels, node)
    assert str(caught.value) == message


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.npy", b"", r"^a\.npy is not a readable file of arrays \("),
        ("a.npy", b"not an array", r"^a\.npy is not a readable file of arrays \("),
        ("a.npy", b"PK\x03\x04 broken archive", r"^a\.npy is not a readable file of arrays \("),
        ("a.npy", np.array([{"x": 1}], dtype=object), r"^a\.npy is not a readable .* allow_pickle"),
        ("a.parquet", b"no table", r"^a\.parquet is not a readable table \("),
        ("a.parquet", b"", r"^a\.parquet is not a readable table \("),
        ("a.parquet", NESTED, r"^embeddings: expected a flat list of numbers in every row of col"),
        ("a.parquet", {"embedding": ["a", "b"]}, r"^embeddings: expected a flat list of numbers"),
    ],
)
def test_files_that_cannot_be_read(name, content, message, tmp_path):
    with pytest.raises(ValueError, match=message):
        read_matrix(save(tmp_path / name, content), None, None)


def test_an_archive_under_another_name(tmp_path):
    with zipfile.ZipFile(tmp_path / "a.npy", "w") as archive:
        np.save(tmp_path / "inner.npy", FLAT)
        archive.write(tmp_path / "inner.npy", "inner.npy")
    with pytest.raises(ValueError, match=r"^a\.npy: an archive of arrays \(\.npz\), expected"):
        read_matrix(tmp_path / "a.npy", None, None)


def test_a_missing_file_is_named(tmp_path):
    for path in (tmp_path / "nothing.npy", tmp_path / "nothing.parquet", tmp_path):
        with pytest.raises(FileNotFoundError, match="no file "):
            read_matrix(path, None, None)


@pytest.mark.parametrize(
    "content",
    [
        ("l.npy", np.array([7, 7, 2, 7])),
        ("l.npy", np.array(["wren", "wren", "tit", "wren"])),
        ("l.csv", {"image": range(4), "label": ["wren", "wren", "tit", "wren"]}),
        ("l.parquet", {"label": [7, 7, 2, 7]}),
        ("l.csv", {"label": [0.5, 0.5, 1.5, 0.5]}),
    ],
    ids=["numbers", "strings", "csv", "parquet", "fractions"],
)
def test_labels(content, tmp_path):
    name, values = content
    labels, names = read_labels(
        save(tmp_path / name, values), np.array(["not", "these", "ones", "!"]), 4, tmp_path / "e"
    )
    assert labels.tolist() == [0, 0, 1, 0]
    assert list(names.values()) == [0, 1]


def test_labels_of_the_embeddings_own_file_and_of_a_second_one(tmp_path):
    labels, names = read_labels(None, np.array(["tit", "wren"]), 2, tmp_path / "query")
    gallery, both = read_labels(
        None, np.array(["robin", "wren", "wren"]), 3, tmp_path / "gallery", names
    )
    assert labels.tolist() == [0, 1]
    assert gallery.tolist() == [2, 1, 1]
    assert both == {"tit": 0, "wren": 1, "robin": 2}
    assert names == {"tit": 0, "wren": 1}, "the caller's names are not changed"


@pytest.mark.parametrize(
    ("name", "content", "option", "message"),
    [
        (None, None, "labels",
         "labels: e.npy has no column 'label'; pass a labels file (--labels FILE)"),
        (None, None, "gallery_labels",
         "gallery_labels: e.npy has no column 'label'; pass a labels file (--gallery-labels FILE)"),
        ("l.npy", np.arange(3), "labels",
         "labels: expected 4, one for each row of e.npy, got shape [3]"),
        ("l.npy", np.zeros((4, 1)), "labels",
         "labels: expected 4, one for each row of e.npy, got shape [4, 1]"),
        ("l.csv", {"class": [1] * 4, "x": [2] * 4}, "labels",
         "l.csv: expected a column 'label', got class, x"),
        ("l.csv", {"label": ["a", None, "b", None]}, "labels", "labels: 2 of 4 are missing"),
        ("l.txt", b"a b c d", "labels", "l.txt: expected a table, .parquet or .csv, got '.txt'"),
    ],
)  # fmt: skip
def test_labels_that_do_not_fit(name, content, option, message, tmp_path):
    path = None if name is None else save(tmp_path / name, content)
    with pytest.raises(ValueError) as caught:
        read_labels(path, None, 4, tmp_path / "e.npy", option=option)
    assert str(caught.value) == message


LABELS = {"id": [10, 11, 12, 13, 14], "label": ["wren", "tit", "wren", "tit", "wren"]}
ANSWERS = {10: [12, 14, 11], 11: [13, 10, 12], 12: [11, 10, 14], 13: [10, 11, 12]}


def ranking_table(order=None, itself=False, answers=ANSWERS):
    """Rows of answers; with ``order`` shuffled, and to be put in order by rank or score."""
    rows = []
    for query, ids in answers.items():
        given = [query, *ids] if itself else ids
        rows += [(query, identity, place) for place, identity in enumerate(given)]
    table = pd.DataFrame(rows, columns=["query", "id", "rank"])
    if order is None:
        return table.drop(columns="rank")
    table = table.sample(frac=1, random_state=0)
    if order == "score":
        table["score"] = 1 / (1 + table.pop("rank"))
    return table


@pytest.mark.parametrize("order", [None, "rank", "score"])
@pytest.mark.parametrize("itself", [False, True])
@pytest.mark.parametrize("suffix", ["csv", "parquet"])
def test_ranking_of_gallery_images(order, itself, suffix, tmp_path):
    table = read_ranking(
        save(tmp_path / f"r.{suffix}", ranking_table(order, itself)),
        save(tmp_path / f"l.{suffix}", LABELS),
        None,
    )
    assert table.queries == (10, 11, 12, 13)
    assert table.gallery_includes_query
    ids = [*table.queries, 14]
    assert table.ranking.depth == 2, "as deep as the largest R"
    for query, row in zip(table.queries, table.ranking.rows.tolist(), strict=True):
        assert [ids[place] for place in row] == ANSWERS[query][:2]
    assert table.query_labels.tolist() == table.gallery_labels.tolist()[:4]
    assert table.gallery_labels[4] == table.query_labels[0]


def test_ranking_with_queries_of_their_own(tmp_path):
    """Query 10 is not gallery image 10, and finding it counts."""
    answers = {10: [10, 11, 12, 14, 13], "q": [11, 13, 10, 12, 14]}
    answers = {str(query): [f"g{i}" for i in ids] for query, ids in answers.items()}
    gallery = {"id": [f"g{i}" for i in LABELS["id"]], "label": LABELS["label"]}
    queries = {"id": ["q", "10", "unused"], "label": ["tit", "wren", "owl"]}
    table = read_ranking(
        save(tmp_path / "r.parquet", ranking_table(answers=answers)),
        save(tmp_path / "l.parquet", gallery),
        save(tmp_path / "q.parquet", queries),
    )
    assert table.queries == ("10", "q")
    assert not table.gallery_includes_query
    assert table.ranking.rows.tolist() == [[0, 1, 2], [1, 3, 0]]
    assert table.query_labels[0] == table.gallery_labels[0]
    assert table.query_labels[1] == table.gallery_labels[1]


def test_answers_as_short_as_their_own_r(tmp_path):
    """R of the tits is 1 and of the wrens 2: no answer has to be longer than its own R."""
    answers = {10: [12, 14], 11: [13], 13: [14]}
    table = read_ranking(
        save(tmp_path / "r.csv", ranking_table(answers=answers)),
        save(tmp_path / "l.csv", LABELS),
        None,
    )
    assert table.ranking.rows.shape == (3, 2)


@pytest.mark.parametrize(
    ("table", "labels", "message"),
    [
        (pd.DataFrame({"q": [1], "id": [2]}), LABELS,
         "r.parquet: expected a column 'query', got q, id"),
        (pd.DataFrame({"query": [1], "image": [2]}), LABELS,
         "r.parquet: expected a column 'id', got query, image"),
        (ranking_table(), {"id": [1], "class": ["a"]},
         "l.parquet: expected a column 'label', got id, class"),
        (ranking_table(), {"id": [10, 11, 10], "label": list("abc")},
         "labels: 1 ids of l.parquet are listed twice"),
        (ranking_table(), {"id": [10, 11, 12], "label": ["a", None, None]},
         "labels: 2 ids of l.parquet have no label"),
        (ranking_table(), {"id": [10, 11, 12], "label": list("aaa")},
         "ranking: 1 queries of r.parquet have no label in l.parquet, the first is 13"),
        (ranking_table(), {"id": [10, 11, 12, 13], "label": list("aabb")},
         "ranking: 1 ids of r.parquet have no label in l.parquet, the first is 14"),
        (ranking_table(), {**LABELS, "id": [str(i) for i in LABELS["id"]]},
         "ranking: 4 queries of r.parquet have no label in l.parquet, the first is 10; one file "
         "has ids as numbers, the other as text"),
        (ranking_table(answers={10: [12, 11, 12]}), LABELS,
         "ranking: the answer of query 10 lists id 12 twice"),
        (ranking_table(answers={10: [12], 11: [13]}), LABELS,
         "ranking: the answer of query 10 has 1 ids, but R = 2 gallery images are of its class; "
         "RP and MAP@R need R places"),
        (ranking_table(itself=True, answers={10: [], 11: []}), LABELS,
         "ranking: r.parquet has no answers"),
        (ranking_table("rank").astype({"rank": str}), LABELS,
         "r.parquet: expected a number in every row of column 'rank'"),
        (ranking_table("score").assign(score=[None] + [0.5] * 11), LABELS,
         "r.parquet: expected a number in every row of column 'score'"),
    ],
)  # fmt: skip
def test_rankings_that_do_not_fit(table, labels, message, tmp_path):
    with pytest.raises(ValueError) as caught:
        read_ranking(
            save(tmp_path / "r.parquet", table), save(tmp_path / "l.parquet", labels), None
        )
    assert str(caught.value) == message


@pytest.mark.parametrize("content", [b"", b"\x00\x01\xff\xfe"])
def test_a_ranking_that_is_no_table(content, tmp_path):
    with pytest.raises(ValueError, match=r"^r\.csv is not a readable table"):
        read_ranking(save(tmp_path / "r.csv", content), save(tmp_path / "l.csv", LABELS), None)
