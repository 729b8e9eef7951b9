"""Problems straight from stored codes, against the matcher's own costs and weights."""

import os

import numpy as np
import pytest
import torch
from support import structured_sets

from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.retrieval._problems import (
    instruction_sets,
    read_rows,
    write_problems,
    write_problems_from_files,
)
from emd_retrieval.retrieval.problems import (
    _tensor_problems,
    build_problems,
    build_problems_from_files,
    is_native,
    nearest_from_files,
)
from emd_retrieval.transport import solve_top_k

CPU = torch.device("cpu")


def store_of(folder, sets, codec="float32"):
    nodes = None if isinstance(sets, list) else sets.shape[1]
    channels = sets[0].shape[-1]
    with LocalFeatureStore.create(folder, channels=channels, nodes=nodes, codec=codec) as writer:
        writer.append(torch.arange(len(sets)), sets)
    return LocalFeatureStore.open(folder)


@pytest.mark.parametrize("instruction_set", instruction_sets())
@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
@pytest.mark.parametrize(("stored_nodes", "query_nodes", "channels"), [(14, 14, 128), (5, 33, 19)])
def test_native_problems_are_the_matchers(
    tmp_path, generator, instruction_set, codec, stored_nodes, query_nodes, channels
):
    sets = structured_sets(9, stored_nodes, channels, generator)
    queries = structured_sets(2, query_nodes, channels, generator)
    queries[0, 1] = 0
    encoded = store_of(tmp_path, sets, codec).read_encoded()
    rows = torch.tensor([[3, 1, 8], [0, -1, 3]]).numpy()
    for matcher in (
        EMDMatcher(),
        EMDMatcher(weights="uniform"),
        EMDMatcher(weight_floor=0.5, weight_floor_scale="absolute"),
    ):
        assert is_native(matcher, CPU)
        problems = build_problems(matcher, queries, encoded, rows, instruction_set=instruction_set)
        decoded = encoded.decode()
        for query, place in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 2)):
            match = matcher.match(queries[query], decoded[rows[query, place]])
            at = query, place
            torch.testing.assert_close(problems.cost[at].mT, match.cost, rtol=0, atol=2e-6)
            torch.testing.assert_close(problems.query_weights[at], match.query_weights)
            torch.testing.assert_close(problems.stored_weights[at], match.reference_weights)
        assert problems.cost[1, 1].min() > 3
        assert problems.stored_weights[1, 1].sum() == pytest.approx(1)


@pytest.mark.parametrize("native", [True, False])
def test_padding_nodes_bring_no_mass(tmp_path, generator, native):
    sets = [structured_sets(1, n, 16, generator)[0] for n in (3, 7, 5)]
    query = structured_sets(1, 6, 16, generator)
    encoded = store_of(tmp_path, sets).read_encoded()
    rows = torch.tensor([[2, 0, 1]]).numpy()
    build = build_problems if native else _tensor_problems
    options = () if native else (None,)
    problems = build(EMDMatcher(), query, encoded, rows, *options)
    for place, row in enumerate(rows[0]):
        match = EMDMatcher().match(query[0], sets[row])
        count = len(sets[row])
        weights = problems.stored_weights[0, place]
        torch.testing.assert_close(weights[:count], match.reference_weights)
        assert (weights[count:] == 0).all()
        torch.testing.assert_close(problems.query_weights[0, place], match.query_weights)
        torch.testing.assert_close(
            problems.cost[0, place, :count].mT, match.cost, rtol=0, atol=2e-6
        )


def test_shifts_move_all_costs_of_a_candidate(tmp_path, generator):
    encoded = store_of(tmp_path, structured_sets(3, 4, 8, generator)).read_encoded()
    query = structured_sets(1, 4, 8, generator)
    rows = torch.tensor([[0, 2]]).numpy()
    shifts = torch.tensor([[0.5, -2.0]]).numpy()
    plain = build_problems(EMDMatcher(), query, encoded, rows)
    for build in (build_problems, _tensor_problems):
        moved = build(EMDMatcher(), query, encoded, rows, shifts)
        torch.testing.assert_close(
            moved.cost - plain.cost,
            torch.tensor([0.5, -2.0]).view(1, 2, 1, 1).expand_as(plain.cost),
            rtol=0,
            atol=1e-6,
        )


def test_threads_share_the_pairs(tmp_path, generator):
    encoded = store_of(tmp_path, structured_sets(60, 25, 64, generator)).read_encoded()
    queries = structured_sets(3, 25, 64, generator)
    rows = torch.stack([torch.randperm(60, generator=generator) for _ in range(3)]).numpy()
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        alone = build_problems(EMDMatcher(), queries, encoded, rows)
        torch.set_num_threads(3)
        shared = build_problems(EMDMatcher(), queries, encoded, rows)
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(alone.cost, shared.cost)
    assert torch.equal(alone.stored_weights, shared.stored_weights)
    assert torch.equal(alone.query_weights, shared.query_weights)


def test_the_native_core_refuses_rows_outside(tmp_path, generator):
    codes = torch.zeros(2, 3, 4).numpy()
    out = [torch.empty(shape).numpy() for shape in ((1, 1, 3, 3), (1, 1, 3), (1, 1, 3))]
    for rows in ([[2]], [[-2]]):
        with pytest.raises(ValueError, match="rows of codes"):
            write_problems(
                torch.zeros(1, 3, 4).numpy(), codes, None, None, torch.tensor(rows).numpy(), None,
                False, 0.0, False, 9.0, *out, 1, None,
            )  # fmt: skip


@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_problems_from_files_are_those_from_memory(tmp_path, generator, codec):
    """Over several shards, with a deleted set in front and candidates that are not there."""
    path = tmp_path / "s.store"
    with LocalFeatureStore.create(path, channels=19, nodes=5, codec=codec, shard_rows=4) as writer:
        writer.append(torch.arange(11), structured_sets(11, 5, 19, generator))
    store = LocalFeatureStore.open(path)
    store.delete([2])
    queries = structured_sets(3, 7, 19, generator)
    rows = np.array([[9, 0, -1, 4], [3, 9, 2, 6], [-1, -1, 1, -1]])
    shifts = np.linspace(-1, 1, 12, dtype=np.float32).reshape(3, 4)
    matcher = EMDMatcher()
    assert build_problems_from_files(matcher, queries, store, rows) is None, "not checked yet"
    encoded = store.read_encoded()
    for shift in (None, shifts):
        read = build_problems_from_files(matcher, queries, store, rows, shift)
        known = build_problems(matcher, queries, encoded, rows, shift)
        assert torch.equal(read.cost, known.cost)
        assert torch.equal(read.stored_weights, known.stored_weights)
        assert torch.equal(read.query_weights, known.query_weights)


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("query_count", [1, 5])
@pytest.mark.parametrize("codec", ["float32", "float16", "int8"])
def test_the_nearest_from_files_are_those_of_the_solver(
    tmp_path, generator, codec, query_count, threads
):
    store = store_of(tmp_path, structured_sets(40, 14, 64, generator), codec)
    store.nodes()
    queries = structured_sets(query_count, 25, 64, generator)
    orders = [torch.randperm(40, generator=generator) for _ in range(query_count)]
    rows = torch.stack(orders).numpy()
    rows[0, [3, 8]] = -1
    shifts = torch.randn(rows.shape, generator=generator).mul(0.1).numpy()
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for shift in (None, shifts):
            found = nearest_from_files(EMDMatcher(), queries, store, rows, shift, 7)
            problems = build_problems_from_files(EMDMatcher(), queries, store, rows, shift)
            known = solve_top_k(problems.cost, problems.stored_weights, problems.query_weights, 7)
            assert (found.index == known.index.numpy()).all()
            assert (found.distance == known.distance.numpy()).all()
            assert (found.solved == known.solved.numpy()).all()
    finally:
        torch.set_num_threads(before)


def test_what_the_native_search_cannot_answer_is_left_to_others(tmp_path, generator):
    sets = structured_sets(3, 4, 8, generator)
    store = store_of(tmp_path / "few", sets)
    rows = np.array([[0, 1, 2]])
    ask = (EMDMatcher(), sets[:1], store, rows)
    assert nearest_from_files(*ask, None, 2) is None, "not held against checksums yet"
    store.nodes()
    assert nearest_from_files(*ask, None, 2) is not None
    broken = np.full((1, 3), np.nan, np.float32)
    assert nearest_from_files(*ask, broken, 2) is None, "a fault, which the solver names"
    many = store_of(tmp_path / "many", structured_sets(3, 65, 8, generator))
    many.nodes()
    assert nearest_from_files(EMDMatcher(), sets[:1], many, rows, None, 2) is None


def test_sets_of_varying_size_are_left_to_the_store(tmp_path, generator):
    store = store_of(tmp_path, [structured_sets(1, n, 8, generator)[0] for n in (3, 4)])
    store.nodes()
    rows = np.array([[0, 1]])
    assert build_problems_from_files(EMDMatcher(), torch.ones(1, 3, 8), store, rows) is None


@pytest.fixture
def numbers(tmp_path):
    """A file of the bytes 0 to 99, and its descriptor."""
    path = tmp_path / "numbers.bin"
    path.write_bytes(bytes(range(100)))
    file = os.open(path, os.O_RDONLY)
    yield file
    os.close(file)


@pytest.mark.parametrize("threads", [1, 3])
def test_rows_are_read_in_any_order(numbers, threads):
    starts = np.array([40, 50, 60, 0, 90, 10, 40])
    read = np.full((7, 10), 255, np.uint8)
    assert read_rows(numbers, starts, None, read, threads) == (-1, 0)
    assert (read == starts[:, None] + np.arange(10)).all()


def test_rows_on_many_threads(tmp_path, generator):
    data = torch.randint(256, (400, 5000), dtype=torch.uint8, generator=generator).numpy()
    data.tofile(tmp_path / "rows.bin")
    rows = torch.randperm(400, generator=generator).numpy()
    read = np.empty_like(data)
    with (tmp_path / "rows.bin").open("rb") as file:
        assert read_rows(file.fileno(), rows * 5000, None, read, 4) == (-1, 0)
    assert (read == data[rows]).all()


def test_short_rows_end_in_zeros(numbers):
    lengths = np.array([10, 3, 0, 10])
    starts = np.array([20, 30, 33, 33])
    read = np.full((4, 10), 255, np.uint8)
    assert read_rows(numbers, starts, lengths, read, 1) == (-1, 0)
    places = np.arange(10)
    assert (read == np.where(places < lengths[:, None], starts[:, None] + places, 0)).all()


def test_the_first_row_that_cannot_be_read_is_named(numbers):
    read = np.empty((4, 10), np.uint8)
    assert read_rows(numbers, np.array([70, 80, 90, 100]), None, read, 1) == (3, 0)
    assert read_rows(numbers, np.array([0, 95, 10, 200]), None, read, 1) == (1, 0)
    place, error = read_rows(-1, np.array([0]), None, read[:1], 1)
    assert (place, os.strerror(error)) == (0, "Bad file descriptor")
    with pytest.raises(ValueError, match="starts: expected zero or more"):
        read_rows(numbers, np.array([-1]), None, read[:1], 1)
    with pytest.raises(ValueError, match="lengths: expected zero to the width"):
        read_rows(numbers, np.array([0]), np.array([11]), read[:1], 1)


def test_problems_of_a_file_that_ends_too_early(numbers):
    out = [np.empty(shape, np.float32) for shape in ((1, 1, 3, 3), (1, 1, 3), (1, 1, 3))]
    for offset, whole in ((52, True), (53, False)):
        done = write_problems_from_files(
            np.ones((1, 3, 4), np.float32), np.array([numbers]), np.array([offset]), "float32",
            np.array([[0]]), None, False, 0.0, False, 9.0, *out, 1, None,
        )  # fmt: skip
        assert done is whole
