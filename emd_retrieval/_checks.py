"""Argument checks for the public border: one wording for every shape, dtype and range error.

Nothing here knows images, features or transport; the insides of the package trust what passed.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

Size = int | str


def check_tensor(
    name: str,
    value: object,
    dims: Sequence[Size],
    *,
    sizes: dict[str, int] | None = None,
    floating: bool = True,
    finite: bool = False,
) -> dict[str, int]:
    """Check that ``value`` is a tensor of the named shape and return the size of each name.

    Args:
        name: The argument's name, as the caller wrote it.
        value: What the caller passed.
        dims: One entry a dimension: an ``int`` must match exactly, a name is bound to the size it
            meets first and must match after that. A leading ``"..."`` takes any dimensions.
        sizes: Names bound already, for instance by an earlier argument. It is not changed.
        floating: Require a floating-point dtype.
        finite: Require finite values.

    Returns:
        The bound names, those in ``sizes`` included.

    Raises:
        TypeError: If ``value`` is not a tensor, or not floating point where it must be.
        ValueError: If the shape does not fit, or a value is not finite.

    Example:
        >>> check_tensor("query", torch.zeros(2, 25, 64), ["B", "N", "D"])
        {'B': 2, 'N': 25, 'D': 64}
        >>> check_tensor("query", torch.zeros(25, 64), ["B", "N", "D"])
        Traceback (most recent call last):
        ...
        ValueError: query: expected shape [B, N, D], got [25, 64]
    """
    if not isinstance(value, Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor, got {type(value).__name__}")
    if floating and not value.is_floating_point():
        raise TypeError(f"{name}: expected a floating-point tensor, got dtype {value.dtype}")
    bound = dict(sizes or {})
    wanted = list(dims)
    shape = list(value.shape)
    got = list(shape)
    if wanted and wanted[0] == "...":
        wanted = wanted[1:]
        shape = shape[len(shape) - len(wanted) :] if len(shape) >= len(wanted) else []
    fits = len(shape) == len(wanted)
    if fits:
        for size, want in zip(shape, wanted, strict=True):
            fits = fits and size == (
                want if isinstance(want, int) else bound.setdefault(want, size)
            )
    if not fits:
        known = {w: bound[w] for w in wanted if isinstance(w, str) and w in (sizes or {})}
        told = f", with {', '.join(f'{k} = {v}' for k, v in known.items())}" if known else ""
        raise ValueError(f"{name}: expected shape [{', '.join(map(str, dims))}]{told}, got {got}")
    if finite:
        check_finite(name, value)
    return bound


def check_finite(name: str, value: Tensor) -> None:
    """Raise ``ValueError`` naming the first entry that is not finite."""
    # A finite sum has finite terms, and takes far less time than looking at each of a few values.
    if math.isfinite(float(value.detach().sum())) or bool(torch.isfinite(value).all()):
        return
    bad = ~torch.isfinite(value)
    where = [int(i) for i in bad.nonzero()[0]]
    kind = "NaN" if bool(torch.isnan(value[tuple(where)])) else "infinite"
    raise ValueError(
        f"{name}: expected finite values, got {int(bad.sum())} that are not; "
        f"the first is {kind} at index {where} of shape {list(value.shape)}"
    )


def check_choice(name: str, value: str, choices: Sequence[str]) -> str:
    """Return ``value`` if it is one of ``choices``; else raise, with the nearest choice named.

    >>> check_choice("solver", "simplx", ["simplex", "pot"])
    Traceback (most recent call last):
    ...
    ValueError: solver: expected one of simplex, pot; got 'simplx' (did you mean 'simplex'?)
    """
    if value in choices:
        return value
    import difflib

    near = difflib.get_close_matches(str(value), list(choices), n=1)
    hint = f" (did you mean {near[0]!r}?)" if near else ""
    raise ValueError(f"{name}: expected one of {', '.join(choices)}; got {value!r}{hint}")


def check_positive(name: str, value: float, *, allow_zero: bool = False) -> None:
    """Raise unless ``value`` is a finite number above zero (or zero if allowed)."""
    try:
        ok = 0 < value < float("inf") or (allow_zero and value == 0)
    except TypeError:
        raise TypeError(f"{name}: expected a number, got {value!r}") from None
    if not ok:
        kind = "zero or more" if allow_zero else "a positive number"
        raise ValueError(f"{name}: expected {kind}, got {value!r}")
