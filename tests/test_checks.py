import pytest
import torch

from emd_retrieval._checks import check_choice, check_finite, check_positive, check_tensor


def test_binds_names_and_carries_them_on():
    sizes = check_tensor("query", torch.zeros(2, 5, 8), ["B", "N", "D"])
    assert sizes == {"B": 2, "N": 5, "D": 8}
    more = check_tensor("reference", torch.zeros(3, 7, 8), ["R", "M", "D"], sizes=sizes)
    assert more == {"B": 2, "N": 5, "D": 8, "R": 3, "M": 7}
    assert sizes == {"B": 2, "N": 5, "D": 8}, "the caller's dictionary is not changed"


def test_leading_dots_take_any_dimensions():
    for leading in ((), (4,), (2, 3)):
        assert check_tensor("cost", torch.zeros(*leading, 5, 6), ["...", "N", "M"]) == {
            "N": 5,
            "M": 6,
        }


@pytest.mark.parametrize(
    ("value", "dims", "sizes", "error", "message"),
    [
        ([1.0], ["N"], None, TypeError, "x: expected a torch.Tensor, got list"),
        (
            torch.zeros(3, dtype=torch.int64),
            ["N"],
            None,
            TypeError,
            "x: expected a floating-point tensor, got dtype torch.int64",
        ),
        (torch.zeros(3), ["N", "D"], None, ValueError, "x: expected shape [N, D], got [3]"),
        (torch.zeros(()), ["N"], None, ValueError, "x: expected shape [N], got []"),
        (torch.zeros(3, 4), ["N", 5], None, ValueError, "x: expected shape [N, 5], got [3, 4]"),
        (torch.zeros(3, 4), ["N", "N"], None, ValueError, "x: expected shape [N, N], got [3, 4]"),
        (
            torch.zeros(3, 4),
            ["R", "D"],
            {"D": 8, "B": 2},
            ValueError,
            "x: expected shape [R, D], with D = 8, got [3, 4]",
        ),
        (
            torch.zeros(3),
            ["...", "N", "D"],
            None,
            ValueError,
            "x: expected shape [..., N, D], got [3]",
        ),
    ],
)
def test_says_what_was_expected_and_what_came(value, dims, sizes, error, message):
    with pytest.raises(error) as caught:
        check_tensor("x", value, dims, sizes=sizes)
    assert str(caught.value) == message


def test_integers_pass_where_they_may():
    check_tensor("labels", torch.zeros(3, dtype=torch.int64), ["N"], floating=False)


@pytest.mark.parametrize(
    ("bad", "kind"),
    [(float("nan"), "NaN"), (float("inf"), "infinite"), (-float("inf"), "infinite")],
)
def test_names_the_first_value_that_is_not_finite(bad, kind):
    values = torch.zeros(3, 4)
    values[1, 2] = values[2, 3] = bad
    with pytest.raises(ValueError, match="got 2 that are not") as caught:
        check_tensor("nodes", values, ["n", "D"], finite=True)
    assert str(caught.value) == (
        "nodes: expected finite values, got 2 that are not; "
        f"the first is {kind} at index [1, 2] of shape [3, 4]"
    )


def test_empty_tensors_are_finite():
    check_finite("nodes", torch.zeros(0, 3))


def test_choice_names_the_nearest():
    assert check_choice("solver", "pot", ["simplex", "pot"]) == "pot"
    with pytest.raises(ValueError, match=r"^solver: expected one of simplex, pot; got 'zzz'$"):
        check_choice("solver", "zzz", ["simplex", "pot"])
    with pytest.raises(ValueError, match=r"did you mean 'simplex'\?"):
        check_choice("solver", "simplx", ["simplex", "pot"])


@pytest.mark.parametrize("value", [1, 0.5, 1e9])
def test_positive_numbers_pass(value):
    check_positive("k", value)


@pytest.mark.parametrize("value", [0, -1, float("nan"), float("inf")])
def test_other_numbers_do_not(value):
    with pytest.raises(ValueError, match=r"^k: expected a positive number, got "):
        check_positive("k", value)


def test_zero_passes_where_it_may():
    check_positive("floor", 0.0, allow_zero=True)
    with pytest.raises(ValueError, match=r"^floor: expected zero or more, got -1$"):
        check_positive("floor", -1, allow_zero=True)


@pytest.mark.parametrize("value", ["5", None, [1]])
def test_what_is_no_number_is_named(value):
    with pytest.raises(TypeError, match=r"^k: expected a number, got "):
        check_positive("k", value)
