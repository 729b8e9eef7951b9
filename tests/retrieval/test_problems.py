"""Problems straight from stored codes, against the matcher's own costs and weights."""

import pytest
import torch
from support import structured_sets

from emd_retrieval.matching import EMDMatcher
from emd_retrieval.retrieval import LocalFeatureStore
from emd_retrieval.retrieval._problems import instruction_sets, write_problems
from emd_retrieval.retrieval.problems import _tensor_problems, build_problems, is_native

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
