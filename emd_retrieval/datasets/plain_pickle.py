"""Reading the pickles that CIFAR is published as, without running anything that is in them.

Only dictionaries, lists, tuples, text, bytes, numbers and integer NumPy arrays can come out; a file
that asks for anything else is refused at the first name it asks for.
"""

from __future__ import annotations

import codecs
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_INTEGERS = frozenset(["u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8"])
_DEEPEST = 4


class UnsafePickleError(ValueError):
    """A pickle asks for more than plain data; nothing of it was run."""


def load_plain_pickle(path: str | Path) -> Any:
    """Load a pickle of plain data; text of Python 2 comes as bytes.

    Raises:
        FileNotFoundError: If there is no such file.
        UnsafePickleError: If it asks for a class or function other than NumPy's own of integer
            arrays, or nests deeper than data sets do.
        ValueError: If it is no pickle, or a damaged one.
    """
    path = Path(path)
    with path.open("rb") as file:
        try:
            return _plain(_PlainUnpickler(file, encoding="bytes").load(), _DEEPEST)
        except UnsafePickleError as error:
            raise UnsafePickleError(f"{path}: {error}; it was not loaded") from None
        # A damaged stream can make the unpickler raise nearly anything.
        except Exception as error:
            raise ValueError(
                f"{path}: not a pickle, or a damaged one ({type(error).__name__}: {error}); "
                "fetch the file again"
            ) from error


class _Builder:
    """A function that a pickle may call. A pickle's BUILD finds nothing on it to change."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *arguments: Any) -> Any:
        return self._function(*arguments)

    def __setstate__(self, state: object) -> None:
        raise UnsafePickleError("it changes a function")


class _Type:
    """An integer type, as a pickled ``numpy.dtype`` tells it."""

    __slots__ = ("order", "spec")

    def __init__(self, spec: object, *_: object) -> None:
        text = spec.decode("ascii") if isinstance(spec, bytes) else spec
        if not isinstance(text, str) or text not in _INTEGERS:
            raise UnsafePickleError(f"it holds an array of type {text!r}, which is no integer")
        self.spec = text
        self.order = "<"

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        order = state[1].decode("ascii") if isinstance(state[1], bytes) else state[1]
        if order not in ("<", ">", "|", "="):
            raise UnsafePickleError(f"it holds an array of byte order {order!r}")
        self.order = str(order)


class _Array:
    """An integer array, as a pickled ``numpy.ndarray`` tells it."""

    __slots__ = ("value",)

    value: NDArray[Any]

    def __init__(self, *_: object) -> None:
        self.value = np.empty(0, np.uint8)

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        _, shape, kind, fortran, raw = state
        self.value = _array(raw, kind, shape, bool(fortran))

    @classmethod
    def from_buffer(cls, raw: object, kind: object, shape: object, order: object) -> _Array:
        built = cls()
        built.value = _array(raw, kind, shape, order in ("F", b"F"))
        return built


def _array(raw: object, kind: object, shape: object, fortran: bool) -> NDArray[Any]:
    if isinstance(raw, str):
        # Python 3 reads protocol-0 strings of Python 2 so; each character is a byte.
        raw = raw.encode("latin1")
    if not isinstance(kind, _Type) or not isinstance(raw, bytes | bytearray):
        raise UnsafePickleError("it holds an array that is not of integers")
    if not isinstance(shape, tuple) or not all(isinstance(size, int) for size in shape):
        raise UnsafePickleError(f"it holds an array of shape {shape!r}")
    flat = np.frombuffer(bytes(raw), np.dtype(kind.order + kind.spec))
    native = flat.astype(kind.spec)
    return native.reshape(shape, order="F" if fortran else "C")


def _encode(text: object, encoding: object = "latin1") -> bytes:
    """How Python 3 writes bytes under the protocols of Python 2."""
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1", b"latin1"):
        raise UnsafePickleError(f"it encodes {type(text).__name__} as {encoding!r}")
    return codecs.encode(text, "latin1")


def _no_bytes(*arguments: object) -> bytes:
    """How Python 3 writes ``b""`` there. Called with a number, bytes would fill the memory."""
    if arguments:
        raise UnsafePickleError("it makes bytes in an unknown way")
    return b""


def _no_instance(*_: object) -> None:
    raise UnsafePickleError("it makes an array in an unknown way")


_ALLOWED: dict[tuple[str, str], Callable[..., Any]] = {
    ("_codecs", "encode"): _encode,
    ("__builtin__", "bytes"): _no_bytes,
    ("builtins", "bytes"): _no_bytes,
    ("numpy", "dtype"): _Type,
    # Only ever an argument of the two below.
    ("numpy", "ndarray"): _no_instance,
    **{
        (f"numpy.{core}.{module}", name): function
        for core in ("core", "_core")
        for module, name, function in (
            ("multiarray", "_reconstruct", _Array),
            ("numeric", "_frombuffer", _Array.from_buffer),
        )
    },
}


class _PlainUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        function = _ALLOWED.get((module, name))
        if function is None:
            raise UnsafePickleError(f"it asks for {module}.{name}, which plain data does not need")
        return _Builder(function)

    def persistent_load(self, pid: object) -> Any:
        raise UnsafePickleError("it refers to objects outside itself")


def _plain(value: Any, depth: int) -> Any:
    """The value with arrays in their places, or an error for anything that is not plain data."""
    if isinstance(value, _Array):
        return value.value
    if value is None or isinstance(value, bool | int | float | str | bytes):
        return value
    if depth and isinstance(value, dict):
        return {_plain(k, 0): _plain(v, depth - 1) for k, v in value.items()}
    if depth and isinstance(value, list | tuple):
        return type(value)(_plain(item, depth - 1) for item in value)
    if isinstance(value, dict | list | tuple):
        raise UnsafePickleError(f"it nests deeper than {_DEEPEST} levels")
    raise UnsafePickleError(f"it holds a {type(value).__name__}")
