import numpy as np
import pytest

from emd_retrieval.retrieval import Interval, bootstrap_interval


def test_covers_the_true_mean_as_often_as_it_says():
    """300 draws of 60 skewed values; the number of intervals that cover is about 285 +- 4."""
    generator = np.random.default_rng(0)
    covered = 0
    for trial in range(300):
        interval = bootstrap_interval(generator.gamma(4.0, 1.0, 60), seed=trial, resamples=1000)
        covered += interval.low <= 4.0 <= interval.high
    assert 0.90 <= covered / 300 <= 0.98


def test_is_as_wide_as_the_normal_interval():
    values = np.random.default_rng(1).normal(50.0, 20.0, 2000)
    interval = bootstrap_interval(values)
    half = 1.96 * values.std() / 2000**0.5
    assert interval.low == pytest.approx(values.mean() - half, abs=0.05 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.05 * half)
    narrow = bootstrap_interval(values, level=0.5)
    assert interval.low < narrow.low < narrow.high < interval.high


def test_a_paired_difference_is_far_narrower_than_its_parts():
    generator = np.random.default_rng(2)
    hard = generator.normal(50, 30, 500)
    gain = bootstrap_interval((hard + generator.normal(1, 2, 500)) - hard)
    alone = bootstrap_interval(hard)
    assert gain.excludes_zero
    assert gain.high - gain.low < 0.15 * (alone.high - alone.low)


def test_the_seed_decides(monkeypatch):
    values = np.random.default_rng(3).normal(size=50)
    first = bootstrap_interval(values, seed=1)
    np.random.default_rng().random(10)
    assert bootstrap_interval(values, seed=1) == first
    assert bootstrap_interval(values, seed=2) != first


def test_many_values_are_drawn_in_chunks():
    """More than the four million draws that are held at once."""
    values = np.random.default_rng(4).normal(size=5000)
    interval = bootstrap_interval(values, resamples=1000)
    assert interval.low < interval.mean < interval.high
    assert interval.high - interval.low == pytest.approx(2 * 1.96 / 5000**0.5, rel=0.15)


@pytest.mark.parametrize(
    ("low", "high", "expected"), [(0.1, 2, True), (-2, -0.1, True), (-1, 1, False), (0, 1, False)]
)
def test_excludes_zero(low, high, expected):
    assert Interval(0.5, low, high).excludes_zero is expected


@pytest.mark.parametrize("values", [[], [[1.0, 2.0]], [1.0, np.nan], [np.inf]])
def test_refuses_what_has_no_mean(values):
    with pytest.raises(ValueError, match=r"values: expected finite numbers \[q\], got"):
        bootstrap_interval(np.array(values))


@pytest.mark.parametrize("level", [0.0, 1.0, 95])
def test_refuses_a_level_that_is_no_coverage(level):
    with pytest.raises(ValueError, match="level: expected a number between 0 and 1, got"):
        bootstrap_interval(np.ones(3), level=level)
