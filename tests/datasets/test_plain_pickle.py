"""Pickles of plain data come back as they were; anything that could run is refused, and not run."""

from __future__ import annotations

import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from emd_retrieval.datasets.plain_pickle import UnsafePickleError, load_plain_pickle


def write(folder: Path, content: bytes) -> Path:
    file = folder / "data.pickle"
    file.write_bytes(content)
    return file


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_plain_data_comes_back(tmp_path: Path, protocol: int) -> None:
    content = {
        "data": np.arange(24, dtype=np.uint8).reshape(2, 3, 4),
        "fortran": np.asfortranarray(np.arange(6, dtype=np.int64).reshape(2, 3)),
        "big": np.arange(5, dtype=">i4"),
        "empty": np.empty((0, 3), np.uint8),
        "names": ["a", b"\xff\x00", b"", "ü"],
        "labels": [1, 2**40, -3, True, None, 0.5],
        "pair": (1, ["x"]),
    }
    loaded = load_plain_pickle(write(tmp_path, pickle.dumps(content, protocol)))
    assert list(loaded) == list(content)
    for key, value in content.items():
        if isinstance(value, np.ndarray):
            assert loaded[key].dtype == value.dtype.newbyteorder("=")
            np.testing.assert_array_equal(loaded[key], value)
        else:
            assert loaded[key] == value


def test_python_2_pickles(tmp_path: Path) -> None:
    """As CIFAR's own files are: protocol 2, byte strings as text, arrays by their raw bytes."""
    stream = (
        b"\x80\x02}q\x01(U\x04dataq\x02cnumpy.core.multiarray\n_reconstruct\nq\x03cnumpy\nndarray\n"
        b"q\x04K\x00\x85U\x01b\x87Rq\x05(K\x01K\x02K\x03\x86cnumpy\ndtype\nq\x06U\x02u1K\x00K\x01"
        b"\x87Rq\x07(K\x03U\x01|NNNJ\xff\xff\xff\xffJ\xff\xff\xff\xffK\x00tb\x89U\x06\x01\x02\x03"
        b"\xfd\xfe\xfftbU\x06labelsq\x08]q\x09(K\x05K\x07eu."
    )
    loaded = load_plain_pickle(write(tmp_path, stream))
    assert loaded[b"labels"] == [5, 7]
    assert loaded[b"data"].tolist() == [[1, 2, 3], [253, 254, 255]]


class Runs:
    """Unpickled without a guard, it would make a folder."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.how = function, arguments

    def __reduce__(self) -> Any:
        return self.how


@pytest.mark.parametrize("protocol", [0, 2, 4])
@pytest.mark.parametrize("name", ["mkdir", "system", "eval", "getattr"])
def test_hostile_pickles_do_not_run(tmp_path: Path, protocol: int, name: str) -> None:
    trace = tmp_path / "ran"
    attack = {
        "mkdir": Runs(os.mkdir, str(trace)),
        "system": Runs(os.system, f"touch {trace}"),
        "eval": Runs(eval, f"__import__('os').mkdir({str(trace)!r})"),
        "getattr": Runs(getattr, "text", "upper"),
    }[name]
    file = write(tmp_path, pickle.dumps({"data": [attack]}, protocol))
    with pytest.raises(UnsafePickleError, match=r"data\.pickle: it asks for .*not loaded"):
        load_plain_pickle(file)
    assert not trace.exists()
    if name == "mkdir":
        pickle.loads(file.read_bytes())  # noqa: S301 (ours: shows that the attack is a real one)
        assert trace.exists()


OBJECTS = pickle.dumps(np.array([{}, []], dtype=object), 2)
HOSTILE = {
    "objects in an array": (OBJECTS, "no integer"),
    "floats in an array": (pickle.dumps(np.ones(2), 2), "no integer"),
    "a numpy scalar": (pickle.dumps(np.int64(3), 2), "asks for numpy.*scalar"),
    "bytes as long as memory": (b"c__builtin__\nbytes\n(L99999999999L\ntR.", "makes bytes"),
    "another codec": (b"c_codecs\nencode\n(Vx\nVzip\ntR.", "encodes"),
    "a set": (pickle.dumps({1, 2}, 4), "holds a set"),
    "a complex number": (pickle.dumps(1j, 2), "asks for .*complex"),
    "a persistent id": (b"Pname\n.", "outside itself"),
    "a builder that is changed": (b"cnumpy\ndtype\n}(Vfunction\nK\x01ub.", "changes a function"),
    "a builder as the value": (b"cnumpy\ndtype\n.", "holds a _Builder"),
    "an array of no type": (
        b"cnumpy.core.multiarray\n_reconstruct\n(tR(K\x01K\x01\x85NI00\nVa\ntb.",
        "not of integers",
    ),
    "an ndarray made directly": (b"cnumpy\nndarray\n(K\x02tR.", "unknown way"),
    "lists in lists": (pickle.dumps([[[[[1]]]]], 2), "deeper"),
    "a list in itself": (b"]q\x00h\x00a.", "deeper"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_what_is_not_plain_is_refused(tmp_path: Path, name: str) -> None:
    content, message = HOSTILE[name]
    pickletools.dis(content, out=open(os.devnull, "w"))  # noqa: SIM115, PTH123 (a whole pickle)
    with pytest.raises(UnsafePickleError, match=message):
        load_plain_pickle(write(tmp_path, content))


@pytest.mark.parametrize(
    "content",
    [b"", b"not a pickle", pickle.dumps({"data": np.zeros(99, np.uint8)}, 2)[:-40]],
    ids=["empty", "text", "cut off"],
)
def test_damaged_files_are_named(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(ValueError, match=r"data\.pickle: not a pickle, or a damaged one"):
        load_plain_pickle(write(tmp_path, content))


def test_shape_and_bytes_must_agree(tmp_path: Path) -> None:
    stream = pickle.dumps(np.zeros(6, np.uint8), 2).replace(b"K\x06", b"K\x07", 1)
    with pytest.raises(ValueError, match="damaged"):
        load_plain_pickle(write(tmp_path, stream))


def test_a_missing_file_is_a_missing_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        load_plain_pickle(tmp_path / "none")
