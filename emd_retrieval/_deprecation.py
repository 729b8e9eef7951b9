"""How a public name goes: it works on for two minor releases and says what takes its place.

Nothing is deprecated at present; ``docs/reliability.md`` has the policy.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def deprecated(
    *, since: str, removed_in: str, instead: str
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Mark a function or method that is to go.

    Args:
        since: The release that says so first.
        removed_in: The release that will not have it.
        instead: What to write in its place.

    Returns:
        A decorator; the function works as before and warns its caller with a
        ``DeprecationWarning``.

    Example:
        >>> @deprecated(since="0.2", removed_in="0.4", instead="solve")
        ... def solve_one(cost): return cost
        >>> with warnings.catch_warnings(record=True) as caught:
        ...     warnings.simplefilter("always")
        ...     _ = solve_one(1)
        >>> print(caught[0].message)
        solve_one is deprecated since 0.2 and goes in 0.4; use solve
    """

    def mark(function: Callable[P, R]) -> Callable[P, R]:
        text = f"{function.__qualname__} is deprecated since {since} and goes in {removed_in}"

        @functools.wraps(function)
        def warned(*arguments: P.args, **named: P.kwargs) -> R:
            warnings.warn(f"{text}; use {instead}", DeprecationWarning, stacklevel=2)
            return function(*arguments, **named)

        return warned

    return mark


def renamed_argument(
    old: str, new: str, *, since: str, removed_in: str
) -> Callable[[Callable[..., R]], Callable[..., R]]:
    """Take an argument by its old name as well, with a ``DeprecationWarning``.

    Args:
        old: The name that is to go.
        new: The name in the signature.
        since: The release that says so first.
        removed_in: The release that will not take the old name.

    Returns:
        A decorator; a call with both names is a ``TypeError``.
    """

    def mark(function: Callable[..., R]) -> Callable[..., R]:
        @functools.wraps(function)
        def warned(*arguments: Any, **named: Any) -> R:
            if old in named:
                if new in named:
                    raise TypeError(f"{new}: expected one name, got {old} (its old name) as well")
                warnings.warn(
                    f"{function.__qualname__}: the argument {old} is deprecated since {since} and "
                    f"goes in {removed_in}; use {new}",
                    DeprecationWarning,
                    stacklevel=2,
                )
                named[new] = named.pop(old)
            return function(*arguments, **named)

        return warned

    return mark
