"""Labelled image collections: what is in one, which classes of it, which of its images are sound.

Where the images come from (CUB, folders, the demo set) lives in the modules beside this one;
nothing here knows models or features.
"""

from __future__ import annotations

import difflib
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from torch.utils.data import Dataset

from emd_retrieval._checks import check_positive
from emd_retrieval.datasets.decoding import UnreadableImageError, decode_rgb, image_size
from emd_retrieval.progress import progress

ClassSpec = str | Sequence[str | int]

# A typing error in a range must not be spelled out number by number.
_WIDEST_RANGE = 100_000


@dataclass(frozen=True, eq=False)
class ImageCollection:
    """A labelled set of images, on disk or in memory.

    Attributes:
        name: What the collection is called in reports.
        images: Files, or the pixels themselves as RGB. Shape: ``[n]`` or ``[n, H, W, 3]`` uint8.
        labels: Class of each image, an index into ``class_names``. Shape: ``[n]``, int64.
        class_names: Name of each class, in the order of its number.
        class_numbers: The number a class goes by in a class spec, ascending: CUB's own number, or
            its 1-based rank. It stays with the class when others are left out.
        root: Folder that file names are told relative to; ``None`` for images in memory.
        settings: How in-memory images were generated; part of the identity.
    """

    name: str
    images: tuple[Path, ...] | NDArray[np.uint8]
    labels: NDArray[np.int64]
    class_names: tuple[str, ...]
    class_numbers: tuple[int, ...]
    root: Path | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if isinstance(self.images, np.ndarray):
            shape, dtype = self.images.shape, self.images.dtype
            if len(shape) != 4 or shape[3] != 3 or dtype != np.uint8:
                raise ValueError(
                    f"images: expected uint8 of shape [n, H, W, 3], got {dtype} {list(shape)}"
                )
        labels = np.array(self.labels)
        if labels.shape != (len(self.images),) or labels.dtype.kind not in "iu":
            raise ValueError(
                f"labels: expected {len(self.images)} integers, one an image; "
                f"got {labels.dtype} {list(labels.shape)}"
            )
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(self.class_names):
            raise ValueError(
                f"labels: expected 0 to {len(self.class_names) - 1} for {len(self.class_names)} "
                f"class names, got {labels.min()} to {labels.max()}"
            )
        if len(self.class_numbers) != len(self.class_names):
            raise ValueError(
                f"class_numbers: expected one a class name ({len(self.class_names)}), "
                f"got {len(self.class_numbers)}"
            )
        labels = labels.astype(np.int64)
        labels.flags.writeable = False
        object.__setattr__(self, "labels", labels)

    def __len__(self) -> int:
        return len(self.images)

    def __repr__(self) -> str:
        return f"ImageCollection({self.name!r}, {len(self)} images, {self.num_classes} classes)"

    @property
    def num_classes(self) -> int:
        """Number of classes, those that :meth:`subset` left without an image included."""
        return len(self.class_names)

    def image_name(self, index: int) -> str:
        """What to call an image: its path below ``root``, or class and index in memory."""
        if isinstance(self.images, np.ndarray):
            return f"{self.class_names[self.labels[index]]}/{index}"
        return _relative(self.images[index], self.root)

    def load(self, index: int) -> Image.Image:
        """The image at ``index``, decoded to RGB (see :func:`decode_rgb`).

        Raises:
            UnreadableImageError: If the file is missing or damaged.
        """
        image = self.images[index]
        return decode_rgb(image) if isinstance(image, Path) else Image.fromarray(image)

    def subset(self, indices: Sequence[int] | NDArray[Any]) -> ImageCollection:
        """The images at ``indices`` (or under a boolean mask), every class name kept.

        Raises:
            IndexError: If an index is out of range.
        """
        rows = np.arange(len(self))[np.asarray(indices, dtype=None if len(indices) else np.int64)]
        images = (
            self.images[rows]
            if isinstance(self.images, np.ndarray)
            else tuple(self.images[row] for row in rows)
        )
        return replace(self, images=images, labels=self.labels[rows])

    def first_of_each_class(self, count: int) -> ImageCollection:
        """At most ``count`` images of every class, the first ones; classes keep their numbers.

        Raises:
            ValueError: If ``count`` is not positive.
        """
        check_positive("count", count)
        kept = [np.flatnonzero(self.labels == label)[:count] for label in np.unique(self.labels)]
        return self.subset(np.sort(np.concatenate([np.empty(0, np.int64), *kept])))

    def select_classes(self, spec: ClassSpec) -> ImageCollection:
        """The images of some classes, labels renumbered from 0 in the order of class numbers.

        Args:
            spec: Numbers, ranges and names: ``"26-50"``, ``"1,3,7-9"``, ``"Robin,Wren"``, or a
                sequence of numbers and names (the way for a name that has a comma in it).

        Raises:
            ValueError: If the spec cannot be read, names a class that is not here (which ones are
                is told), or selects classes without a single image.
        """
        chosen = _parse_classes(spec, self.class_names, self.class_numbers, self.name)
        new_label = np.full(self.num_classes, -1)
        new_label[chosen] = np.arange(len(chosen))
        rows = np.flatnonzero(new_label[self.labels] >= 0)
        if not len(rows):
            raise ValueError(f"classes: {spec!r} selects classes of {self.name} without images")
        part = self.subset(rows)
        return replace(
            part,
            labels=new_label[part.labels],
            class_names=tuple(self.class_names[i] for i in chosen),
            class_numbers=tuple(self.class_numbers[i] for i in chosen),
        )

    def describe(self) -> dict[str, Any]:
        """What identifies the collection in a result record.

        ``sha256`` covers class and name of each image in order, with its file size in bytes or,
        in memory, its pixels; the same images give the same value wherever they lie.
        """
        digest = hashlib.sha256()
        for index, image in enumerate(self.images):
            label = self.class_names[self.labels[index]]
            if isinstance(image, Path):
                digest.update(f"{label}\t{self.image_name(index)}\t{_size(image)}\n".encode())
            else:
                digest.update(f"{label}\t{image.shape}\n".encode())
                digest.update(np.ascontiguousarray(image).data)
        present = np.unique(self.labels)
        return {
            "name": self.name,
            "images": len(self),
            "num_classes": len(present),
            "classes": _number_ranges([self.class_numbers[i] for i in present]),
            "sha256": digest.hexdigest(),
            **({"settings": dict(self.settings)} if self.settings else {}),
        }


class ImageDataset(Dataset[tuple[Any, int, int]]):
    """A collection as a torch data set: item ``i`` is ``(transform(image), label, i)``.

    Args:
        collection: What to serve.
        transform: From the RGB Pillow image to what a batch is made of, for instance a
            torchvision transform; ``None`` leaves the Pillow image.
    """

    def __init__(
        self, collection: ImageCollection, transform: Callable[[Image.Image], Any] | None = None
    ) -> None:
        self.collection = collection
        self.transform = transform

    def __len__(self) -> int:
        return len(self.collection)

    def __getitem__(self, index: int) -> tuple[Any, int, int]:
        image = self.collection.load(index)
        item = image if self.transform is None else self.transform(image)
        return item, int(self.collection.labels[index]), index


@dataclass(frozen=True)
class UnreadableImage:
    """An image that cannot be decoded: its index in the collection, its name, and why."""

    index: int
    name: str
    reason: str


def find_unreadable(collection: ImageCollection, *, decode: bool = False) -> list[UnreadableImage]:
    """Look at every file before the work starts, so that hours are not lost to one of them.

    Args:
        collection: What to look at; images in memory are fine by nature.
        decode: Also decode every pixel, as slow as one pass over the data. The default opens
            each file and reads its header: it finds missing, empty and foreign files in seconds,
            and misses damage further in.

    Returns:
        The unreadable images in the order of the collection.
    """
    if isinstance(collection.images, np.ndarray):
        return []
    look: Callable[[Path], object] = decode_rgb if decode else image_size

    def problem(path: Path) -> str | None:
        try:
            look(path)
        except UnreadableImageError as error:
            return str(error).removeprefix(f"{path}: ")
        return None

    # Pillow's decoders release the GIL.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = progress(
            pool.map(problem, collection.images),
            "checking images",
            total=len(collection),
            unit="image",
        )
        return [
            UnreadableImage(index, collection.image_name(index), reason)
            for index, reason in enumerate(found)
            if reason is not None
        ]


def check_readable(
    collection: ImageCollection, *, skip_errors: bool = False, decode: bool = False
) -> tuple[ImageCollection, list[UnreadableImage]]:
    """Stop at unreadable images, or on request leave them out and tell which.

    Args:
        collection: What to look at.
        skip_errors: Go on without the unreadable images instead of raising.
        decode: Decode every pixel, not only the headers (see :func:`find_unreadable`).

    Returns:
        The collection without the unreadable images, and those images.

    Raises:
        UnreadableImageError: If images are unreadable and ``skip_errors`` is false, or if none is
            readable.
    """
    unreadable = find_unreadable(collection, decode=decode)
    if not unreadable:
        return collection, []
    if skip_errors and len(unreadable) < len(collection):
        kept = np.ones(len(collection), dtype=bool)
        kept[[bad.index for bad in unreadable]] = False
        return collection.subset(kept), unreadable
    shown = "; ".join(f"{bad.name} ({bad.reason})" for bad in unreadable[:5])
    more = f"; and {len(unreadable) - 5} more" if len(unreadable) > 5 else ""
    advice = (
        "" if skip_errors else ". Restore or remove them, or set skip_errors to go on without them"
    )
    raise UnreadableImageError(
        f"{len(unreadable)} of {len(collection)} images of {collection.name} cannot be read: "
        f"{shown}{more}{advice}"
    )


def path_below(folder: Path, name: str) -> Path:
    """The file that a list or table in a folder names; what lies elsewhere is not for it to name.

    Links that lie in the folder are followed: data sets are often made of them.

    Args:
        folder: Where the list lies.
        name: Relative to the folder; or absolute, if it leads into it.

    Raises:
        ValueError: If it leads out of the folder.
    """
    path = folder / name
    if ".." in Path(name).parts or not path.absolute().is_relative_to(folder.absolute()):
        raise ValueError(
            f"expected a file below {folder}, the folder of the list, got {name!r}; move the list "
            "to a folder above the images, or link them into its folder"
        )
    return path


def class_numbers_of(names: Iterable[str]) -> list[tuple[int, str]]:
    """Order class names and number them, whatever order a file system lists them in.

    Names that are all whole numbers are their own numbers (folders ``0`` to ``9`` stay 0 to 9, and
    10 comes after 9); any others are sorted as text and numbered from 1.

    >>> class_numbers_of(["wren", "robin"])
    [(1, 'robin'), (2, 'wren')]
    >>> class_numbers_of(["10", "9"])
    [(9, '9'), (10, '10')]
    """
    ordered = sorted(set(names))
    if all(map(_is_number, ordered)):
        numbers = {int(name): name for name in ordered}
        if len(numbers) == len(ordered):
            return sorted(numbers.items())
    return list(enumerate(ordered, start=1))


def _parse_classes(
    spec: ClassSpec, names: Sequence[str], numbers: Sequence[int], collection: str
) -> list[int]:
    """Indices of the classes of a spec, ascending."""
    by_name = {name: index for index, name in enumerate(names)}
    by_number = {number: index for index, number in enumerate(numbers)}
    here = f"{collection} has classes {_number_ranges(numbers)}"
    entries = [entry.strip() for entry in spec.split(",")] if isinstance(spec, str) else list(spec)
    wanted: set[int] = set()
    missing: list[int] = []
    for entry in entries:
        if isinstance(entry, str) and entry in by_name and not _is_number(entry):
            wanted.add(by_name[entry])
            continue
        bounds = [part.strip() for part in str(entry).split("-")]
        if len(bounds) <= 2 and all(map(_is_number, bounds)):
            first, last = int(bounds[0]), int(bounds[-1])
            if first > last:
                raise ValueError(
                    f"classes: the range {entry!r} runs backwards; write {last}-{first}"
                )
            if last - first > _WIDEST_RANGE:
                raise ValueError(f"classes: the range {entry!r} is wider than the data; {here}")
            for number in range(first, last + 1):
                if number in by_number:
                    wanted.add(by_number[number])
                else:
                    missing.append(number)
            continue
        near = difflib.get_close_matches(str(entry), names, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(
            f"classes: expected numbers, ranges or class names as in '26-50', '1,3,7-9'; "
            f"got {entry!r}, which is no class of {collection}; {hint}{here}"
        )
    if missing:
        plural = "es are" if len(missing) > 1 else " is"
        raise ValueError(f"classes: class{plural} not here: {_number_ranges(missing)}; {here}")
    if not wanted:
        raise ValueError(f"classes: expected at least one class, got {spec!r}; {here}")
    return sorted(wanted)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _number_ranges(numbers: Iterable[int]) -> str:
    """Write numbers as a class spec.

    >>> _number_ranges([1, 2, 3, 5, 8, 9])
    '1-3,5,8-9'
    """
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def _relative(path: Path, root: Path | None) -> str:
    inside = root is not None and path.is_relative_to(root)
    return (path.relative_to(root) if inside and root is not None else path).as_posix()


def _size(path: Path) -> int:
    """Size in bytes, -1 for a file that is gone: identity must not fail where reading would."""
    try:
        return path.stat().st_size
    except OSError:
        return -1
