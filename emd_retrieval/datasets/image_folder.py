"""Any folder of class sub-folders as a collection, and the choice between that and CUB's layout."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from emd_retrieval.datasets.base import ClassSpec, ImageCollection, class_numbers_of
from emd_retrieval.datasets.cub import is_cub, load_cub
from emd_retrieval.progress import progress

IMAGE_SUFFIXES = frozenset(
    [
        ".jpg",
        ".jpeg",
        ".jpe",
        ".jfif",
        ".png",
        ".webp",
        ".bmp",
        ".gif",
        ".tif",
        ".tiff",
        ".ppm",
        ".pgm",
        ".pbm",
    ]
)


def load_images(path: str | Path, classes: ClassSpec | None = None) -> ImageCollection:
    """Load a labelled image data set: CUB's layout where ``images.txt`` tells of it, else folders.

    Args:
        path: The data set's folder.
        classes: Which classes (see :meth:`ImageCollection.select_classes`); ``None`` for all.

    Raises:
        FileNotFoundError: If there is nothing to load (see :func:`load_cub`,
            :func:`load_image_folder`).
        ValueError: If the index files or ``classes`` do not fit.
    """
    return load_cub(path, classes) if is_cub(Path(path)) else load_image_folder(path, classes)


def load_image_folder(root: str | Path, classes: ClassSpec | None = None) -> ImageCollection:
    """Load a folder whose sub-folders are the classes.

    Images may lie at any depth below their class; hidden files and folders and files without an
    image's suffix are passed over. Sub-folders without an image are no classes. A class folder may
    be a symbolic link; below it links to folders are not followed, so no loop can mix classes.

    Args:
        root: The folder.
        classes: Class names, or numbers: 1 is the first class name in sorted order (names that are
            all whole numbers are their own numbers); ``None`` for all.

    Returns:
        The collection, images sorted by class and path.

    Raises:
        FileNotFoundError: If the folder is missing or empty, has no sub-folders, or holds no image.
        ValueError: If ``classes`` does not fit.
    """
    root = Path(root)
    layout = "expected one sub-folder a class with its images inside"
    if not root.is_dir():
        what = "is a file" if root.exists() else "no such folder"
        raise FileNotFoundError(f"{root}: {what}; {layout}")
    entries = [entry for entry in root.iterdir() if not entry.name.startswith(".")]
    if not entries:
        raise FileNotFoundError(f"{root}: the folder is empty; {layout}")
    above = {root.resolve(), *root.resolve().parents}
    folders = {
        entry.name: entry for entry in entries if entry.is_dir() and entry.resolve() not in above
    }
    if not folders:
        raise FileNotFoundError(f"{root}: {len(entries)} files but no sub-folders; {layout}")
    files = {name: sorted(image_files(folder)) for name, folder in folders.items()}
    ordered = class_numbers_of(name for name, paths in files.items() if paths)
    if not ordered:
        raise FileNotFoundError(
            f"{root}: no image in its {len(folders)} sub-folders; {layout} "
            f"({', '.join(sorted(IMAGE_SUFFIXES))})"
        )
    collection = ImageCollection(
        name=root.resolve().name,
        images=tuple(path for _, name in ordered for path in files[name]),
        labels=np.repeat(np.arange(len(ordered)), [len(files[name]) for _, name in ordered]),
        class_names=tuple(name for _, name in ordered),
        class_numbers=tuple(number for number, _ in ordered),
        root=root,
    )
    return collection if classes is None else collection.select_classes(classes)


def save_image_folder(collection: ImageCollection, folder: str | Path) -> Path:
    """Write a collection as class sub-folders of PNG files, which :func:`load_image_folder` reads.

    The folder appears under its name only when every image is written.

    Args:
        collection: What to write.
        folder: Where to; it must not exist yet, or be empty.

    Returns:
        The folder.

    Raises:
        FileExistsError: If the folder holds something already.
        ValueError: If a class name cannot be a folder's name.
        UnreadableImageError: If an image of the collection cannot be decoded.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise FileExistsError(f"{folder}: exists and is not an empty folder; choose another name")
    for name in collection.class_names:
        if name.startswith(".") or set(name) & set('/\\:*?"<>|') or not name:
            raise ValueError(f"class name {name!r} cannot be the name of a folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-") as partial:
        # A folder of its own inside: mkdir gives it the usual permissions.
        whole = Path(partial, "images")
        counts = [0] * collection.num_classes
        for index in progress(range(len(collection)), "writing images", unit="image"):
            label = int(collection.labels[index])
            counts[label] += 1
            target = whole / collection.class_names[label]
            target.mkdir(parents=True, exist_ok=True)
            collection.load(index).save(target / f"{counts[label]:04d}.png")
        whole.mkdir(exist_ok=True)
        whole.replace(folder)
    return folder


def image_files(folder: Path) -> Iterator[Path]:
    """Every image below a folder, which may be a link itself; links to folders are not followed."""
    for place, folders, names in os.walk(folder, onerror=_raise):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            path = Path(place, name)
            if not name.startswith(".") and path.suffix.lower() in IMAGE_SUFFIXES:
                yield path


def _raise(error: OSError) -> None:
    raise error
