"""Candidates from tables and archives."""

import numpy as np
import pandas as pd
import pytest
import torch

from emd_retrieval.retrieval import (
    Candidates,
    CandidateTable,
    EMDReranker,
    LocalFeatureStore,
)


def rows(**columns):
    return pd.DataFrame({"query": ["a", "b", "a", "b", "a"], "id": [4, 5, 6, 7, 8]} | columns)


def written(path, table):
    table.to_csv(path, index=False) if path.suffix == ".csv" else table.to_parquet(path)
    return CandidateTable.read(path)


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_tables_are_ordered_by_rank_or_score(tmp_path, suffix):
    file = tmp_path / f"t{suffix}"
    table = written(file, rows(score=[0.1, 0.9, 0.3, 0.2, 0.2]))
    assert table.queries == ("a", "b") or set(table.queries) == {"a", "b"}
    chosen = table.of(["b", "a"])
    assert chosen.candidates.ids.tolist() == [[5, 7, -1], [6, 8, 4]]
    np.testing.assert_allclose(chosen.candidates.scores, [[0.9, 0.2, -np.inf], [0.3, 0.2, 0.1]])
    ranked = written(file, rows(rank=[3, 1, 1, 2, 2])).of(["a"])
    assert ranked.candidates.ids.tolist() == [[6, 8, 4]]
    assert ranked.candidates.scores is None
    assert written(file, rows()).of(["a"]).candidates.ids.tolist() == [[4, 6, 8]]


def test_ids_may_be_strings(tmp_path):
    table = written(tmp_path / "t.csv", rows().assign(id=list("vwxyz")))
    assert table.of(["b"]).candidates.ids.tolist() == [["w", "y", None]]


def test_archives(tmp_path):
    file = tmp_path / "c.npz"
    np.savez(file, ids=np.array([[3, 4], [5, -1]]), scores=np.array([[0.5, 0.4], [0.3, -np.inf]]))
    table = CandidateTable.read(file)
    assert table.queries == (0, 1)
    assert table.of([1]).candidates.ids.tolist() == [[5, -1]]
    np.savez(file, ids=np.array([["x"], ["y"]]), queries=np.array(["p", "q"]))
    assert CandidateTable.read(file).of(["q"]).candidates.ids.tolist() == [["y"]]


def test_search_answers_its_queries_in_order(tmp_path):
    table = CandidateTable(["a", "b"], Candidates(np.array([[1, 2, 3], [4, 5, 6]])))
    assert table.search(torch.zeros(2, 9), 2).ids.tolist() == [[1, 2], [4, 5]]
    with pytest.raises(ValueError, match=r"each of the 2 queries of the table, got 3"):
        table.search(torch.zeros(3, 9), 2)
    path = tmp_path / "s"
    with LocalFeatureStore.create(path, channels=2, nodes=1) as writer:
        writer.append(np.arange(6), torch.ones(6, 1, 2))
    with pytest.raises(ValueError, match=r"1 of its 6 ids of the table are not in the store"):
        table.check(LocalFeatureStore.open(path))
    CandidateTable(["a"], Candidates(np.array([[1, 5, -1]]))).check(LocalFeatureStore.open(path))


def test_a_query_leaves_itself_out():
    candidates = Candidates(np.array([[1, 2, 3], [4, 5, 6]]), np.ones((2, 3), np.float32))
    rest = candidates.without(np.array([2, 9]))
    assert rest.ids.tolist() == [[1, 3, -1], [4, 5, 6]]
    assert rest.scores.tolist() == [[1, 1, -np.inf], [1, 1, 1]]
    named = Candidates(np.array([["a", "b"]], dtype=object)).without(np.array(["a"], dtype=object))
    assert named.ids.tolist() == [["b", None]]


@pytest.mark.parametrize(
    ("table", "words"),
    [
        (rows().drop(columns="id"), r"expected a column 'id' in t\.csv, got query"),
        (rows(score=["x"] * 5), r"a number in every row of 'score'"),
        (rows(score=[1, 2, np.nan, 4, 5]), r"a number in every row of 'score'"),
        (rows().assign(query=["a", None, "a", "b", "c"]), r"without a value for 'query'"),
        (rows().iloc[:0], r"has no rows"),
        (rows(score=["x"] * 5).iloc[:0], r"has no rows"),
        (
            rows().assign(query="q", id=[1, 2, 1, -1, -1]),
            r"each id once a query in t\.csv, got 1 "
            r"more than once for query 'q' \(1 such rows\)",
        ),
    ],
)
def test_bad_tables(tmp_path, table, words):
    with pytest.raises(ValueError, match=words):
        written(tmp_path / "t.csv", table)


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        CandidateTable.read(tmp_path / "none.csv")
    for name in ("t.parquet", "t.npz"):
        (tmp_path / name).write_bytes(b"no table")
        with pytest.raises(ValueError, match=rf"{name} is not a readable"):
            CandidateTable.read(tmp_path / name)
    (tmp_path / "t.txt").write_text("a")
    with pytest.raises(ValueError, match=r"expected \.parquet, \.csv or \.npz, got t\.txt"):
        CandidateTable.read(tmp_path / "t.txt")
    np.savez(tmp_path / "pickled.npz", ids=np.array([[{"a": 1}]], dtype=object))
    with pytest.raises(ValueError, match=r"pickled\.npz is not a readable file of arrays"):
        CandidateTable.read(tmp_path / "pickled.npz")
    np.savez(tmp_path / "other.npz", vectors=np.ones(3))
    with pytest.raises(ValueError, match=r"expected an array 'ids' in other\.npz, got vectors"):
        CandidateTable.read(tmp_path / "other.npz")


def test_queries_without_candidates():
    table = CandidateTable([1, 2], Candidates(np.array([[1], [2]])), name="t.csv")
    with pytest.raises(ValueError, match=r"t\.csv has none for 1 of 2 queries, the first is 3"):
        table.of([1, 3])
    with pytest.raises(ValueError, match=r"is 3; the first that it has is 1\. Queries are called"):
        table.of([1, 3])
    with pytest.raises(ValueError, match=r"it has ids as numbers where the queries have text"):
        table.of(["1"])
    with pytest.raises(ValueError, match=r"query of the table once, got 1 more .* is 1$"):
        CandidateTable([1, 1], Candidates(np.array([[1], [2]])))


def test_ids_of_a_csv_stay_as_they_are(tmp_path):
    """Leading zeros, NA and a byte-order mark; plain numbers are numbers unless text is wanted."""
    file = tmp_path / "t.csv"
    text = "query,id,score\n007,0012,0.5\n007,NA,0.4\nNA,null,0.9\n12,1.0,0.1\n"
    file.write_bytes(b"\xef\xbb\xbf" + text.encode())
    table = CandidateTable.read(file).of(["007", "NA", "12"])
    assert table.candidates.ids.tolist() == [["0012", "NA"], ["null", None], ["1.0", None]]
    file.write_text("query,id\n7,12\n7,-1\n")
    numbers = CandidateTable.read(file)
    assert numbers.queries == (7,)
    assert numbers.candidates.ids.tolist() == [[12, -1]]
    assert CandidateTable.read(file, ids="string").candidates.ids.tolist() == [["12", "-1"]]
    file.write_text("query,id\n7,12\n,4\n")
    with pytest.raises(ValueError, match=r"t\.csv has rows without a value for 'query'"):
        CandidateTable.read(file)
    file.write_text("query,id\n7,99999999999999999999\n")
    assert CandidateTable.read(file).candidates.ids.tolist() == [["99999999999999999999"]]


def test_a_query_that_an_archive_names_twice_is_named(tmp_path):
    file = tmp_path / "c.npz"
    np.savez(file, ids=np.ones((4, 1), np.int64), queries=np.array(["a", "b", "a", "a"]))
    message = r"^queries: expected each query of c\.npz once, got 2 more than once, .* is 'a'$"
    with pytest.raises(ValueError, match=message):
        CandidateTable.read(file)


def test_candidates_twice_in_one_answer_are_named(tmp_path):
    with LocalFeatureStore.create(tmp_path / "s", channels=2, nodes=1) as writer:
        writer.append(np.arange(6), torch.ones(6, 1, 2))
    reranker = EMDReranker(LocalFeatureStore.open(tmp_path / "s"))
    with pytest.raises(ValueError, match=r"each id once a query, but query 1 has 4 twice \(1 of 2"):
        reranker.rerank(torch.ones(2, 1, 2), [[1, 2, 3], [4, 5, 4]], k=1)
