"""Reading the tables and arrays that people bring: parquet, CSV, .npy and .npz, as they are meant.

What the columns mean is the caller's. In a CSV every cell is text, so the caller says which columns
are names: an id ``007`` or ``NA`` must not become the number 7 or a missing value.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
from numpy.typing import NDArray

from emd_retrieval._checksums import check_archive

TABLES = (".parquet", ".pq", ".csv")
# Up to 18 digits fit int64; a number written otherwise, as 007 or 1.0, is a name.
_WHOLE = re.compile(r"-?[1-9][0-9]{0,17}|0")


def read_table(path: Path, names: Collection[str] = ()) -> pd.DataFrame:
    """Read a table.

    Args:
        path: ``.parquet``, ``.pq`` or ``.csv`` (UTF-8, with or without a byte-order mark).
        names: Columns of names, for instance ids. Where every value of one is a whole number in its
            plain form the column is int64, else it is text as it stands; only empty is missing.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is of another kind, cannot be read, or pages of the parquet file do not
            fit the checksums that they have.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    if path.suffix not in TABLES:
        raise ValueError(f"{path.name}: expected a table, .parquet or .csv, got {path.suffix!r}")
    try:
        if path.suffix == ".csv":
            return _read_csv(path, names)
        table: pd.DataFrame = (
            pq.ParquetFile(path, page_checksum_verification=True).read().to_pandas()
        )
    except Exception as error:  # of pandas and Arrow, whatever a damaged file makes of them
        raise ValueError(f"{path.name} is not a readable table ({error})") from error
    return table


def read_arrays(path: Path) -> NDArray[Any] | dict[str, NDArray[Any]]:
    """An array of ``.npy``, or the arrays of ``.npz`` by name; nothing is unpickled.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it cannot be read, or an archive's member does not fit its checksum.
    """
    if not path.is_file():
        raise FileNotFoundError(f"no file {str(path)!r}")
    try:
        loaded = np.load(path, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded
        with loaded:
            check_archive(path)
            return {name: loaded[name] for name in loaded.files}
    except Exception as error:  # of NumPy, zipfile and zlib, whatever a damaged file makes of them
        raise ValueError(f"{path.name} is not a readable file of arrays ({error})") from error


def as_utf8(table: pd.DataFrame) -> pd.DataFrame:
    r"""The table with names of files that are no UTF-8 escaped, so that every writer takes it.

    Example:
        >>> name = b"wr\xe9n.jpg".decode(errors="surrogateescape")
        >>> as_utf8(pd.DataFrame({"id": pd.Series([name], dtype=object)}))["id"].tolist()
        ['wr\\udce9n.jpg']
    """
    texts = [name for name in table if table[name].dtype == object]
    return table.assign(**{str(name): table[name].map(_utf8_if_text) for name in texts})


def utf8_text(text: str) -> str:
    """A text with what is no UTF-8 escaped, for tables and pictures."""
    return text.encode("utf-8", "backslashreplace").decode("utf-8")


def _utf8_if_text(value: object) -> object:
    return utf8_text(value) if isinstance(value, str) else value


def _read_csv(path: Path, names: Collection[str]) -> pd.DataFrame:
    table = pd.read_csv(
        path,
        dtype=dict.fromkeys(names, "str"),
        keep_default_na=False,
        na_values=[""],
        encoding="utf-8-sig",
    )
    for name in names:
        if name in table:
            values = table[name]
            if len(values) and values.map(_is_whole).all():
                table[name] = values.astype("int64")
            else:
                table[name] = values.astype(object)
    return table


def _is_whole(value: object) -> bool:
    return isinstance(value, str) and _WHOLE.fullmatch(value) is not None
