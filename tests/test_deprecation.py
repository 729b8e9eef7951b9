"""The way out of the public names: as before, with a warning that says what to write."""

import inspect
import warnings

import pytest

from emd_retrieval._deprecation import deprecated, renamed_argument


@deprecated(since="0.2", removed_in="0.4", instead="add_all")
def add(a: int, b: int = 1) -> int:
    """Add."""
    return a + b


@renamed_argument("n", "count", since="0.2", removed_in="0.4")
def repeat(text: str, count: int = 1) -> str:
    """Repeat."""
    return text * count


def test_a_deprecated_function_works_and_warns_its_caller():
    with pytest.warns(DeprecationWarning, match=r"^add is deprecated since 0\.2 and goes in 0\.4; "
                      r"use add_all$") as caught:  # fmt: skip
        assert add(2, b=3) == 5
    assert caught[0].filename == __file__, "the caller's line, not ours"
    assert add.__doc__ == "Add."
    assert list(inspect.signature(add).parameters) == ["a", "b"]


def test_a_renamed_argument():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert repeat("a", count=3) == repeat("a", 3) == "aaa"
    with pytest.warns(DeprecationWarning, match=r"^repeat: the argument n is deprecated .* use "
                      r"count$") as caught:  # fmt: skip
        assert repeat("a", n=2) == "aa"
    assert caught[0].filename == __file__
    with pytest.raises(TypeError, match=r"^count: expected one name, got n \(its old name\)"):
        repeat("a", n=2, count=2)
