"""Images by id, from a folder, a list or a table, and their views for an extractor."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from emd_retrieval._tables import TABLES, read_table
from emd_retrieval.datasets import UnreadableImageError, decode_rgb, image_files
from emd_retrieval.datasets.image_folder import IMAGE_SUFFIXES


@dataclass(frozen=True)
class ImageList:
    """Images by id.

    Attributes:
        paths: One a file.
        ids: One a file, each once: strings, or int64.
    """

    paths: tuple[Path, ...]
    ids: list[str] | NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, number: int, count: int) -> ImageList:
        """One of ``count`` runs of the list; behind one another they are the list."""
        start, end = (len(self) * i // count for i in (number, number + 1))
        return ImageList(self.paths[start:end], self.ids[start:end])


def read_image_list(path: Path, *, name: str = "images") -> ImageList:
    """The images of a folder, a list or a table; order and ids are those of the source.

    Args:
        path: Of the folder or file.
        name: The argument that the path came from, for messages.

    Raises:
        FileNotFoundError: If there is nothing there, or not one image.
        ValueError: If a table has no column ``path``, or an id appears twice.
    """
    if path.is_dir():
        files = sorted(image_files(path))
        images = ImageList(tuple(files), [file.relative_to(path).as_posix() for file in files])
    elif not path.is_file():
        raise FileNotFoundError(f"{name}: no folder or file {str(path)!r}")
    elif path.suffix in TABLES:
        images = _read_table(path, name)
    else:
        data = path.read_bytes()
        if b"\0" in data:
            raise ValueError(
                f"{name}: {path.name} is no list of paths (not a text file); expected a folder, a "
                "text file with a path a line, or a table (.parquet, .csv)"
            )
        # Names of files need not be UTF-8; as Python's own they keep their bytes.
        lines = data.decode("utf-8-sig", errors="surrogateescape").split("\n")
        names = [line.strip() for line in lines if line.strip()]
        images = ImageList(tuple(path.parent / name for name in names), names)
    if not len(images):
        what = f"no image ({', '.join(sorted(IMAGE_SUFFIXES))})" if path.is_dir() else "no path"
        raise FileNotFoundError(f"{name}: {path} has {what} in it")
    values: list[Any] = images.ids.tolist() if isinstance(images.ids, np.ndarray) else images.ids
    twice = pd.Series(values, dtype=object).duplicated()
    if twice.any():
        raise ValueError(
            f"{name}: {int(twice.sum())} ids of {path.name} appear twice, the first is "
            f"{values[int(twice.argmax())]!r}"
        )
    return images


class ImageViews(Dataset[tuple[int, Tensor | None, str]]):
    """Item ``i``: its number, its views or ``None``, and why there are none."""

    def __init__(self, images: ImageList, transform: Any) -> None:
        self.images = images
        self.transform = transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[int, Tensor | None, str]:
        path = self.images.paths[index]
        try:
            return index, self.transform(decode_rgb(path)), ""
        except UnreadableImageError as error:
            return index, None, str(error).removeprefix(f"{path}: ")


def collate_views(
    items: list[tuple[int, Tensor | None, str]],
) -> tuple[list[int], Tensor | None, list[tuple[int, str]]]:
    """A batch: numbers of the images that could be read, their views, and the others with why."""
    views = [(row, view) for row, view, _ in items if view is not None]
    failures = [(row, reason) for row, view, reason in items if view is None]
    stacked = torch.stack([view for _, view in views]) if views else None
    return [row for row, _ in views], stacked, failures


def _read_table(path: Path, argument: str) -> ImageList:
    try:
        table = read_table(path, ("path", "id"))
    except ValueError as error:
        raise ValueError(f"{argument}: {error}") from error
    if "path" not in table:
        raise ValueError(
            f"{argument}: expected a column 'path' in {path.name}, got "
            f"{', '.join(map(str, table.columns)) or 'no columns'}"
        )
    for name in {"path", "id"} & set(table.columns):
        if table[name].isna().any():
            raise ValueError(f"{argument}: {path.name} has rows without a value for {name!r}")
    names = [str(name) for name in table["path"]]
    paths = tuple(path.parent / name for name in names)
    if "id" not in table:
        return ImageList(paths, names)
    if pd.api.types.is_integer_dtype(table["id"]):
        return ImageList(paths, table["id"].to_numpy(dtype=np.int64))
    return ImageList(paths, [str(name) for name in table["id"]])
