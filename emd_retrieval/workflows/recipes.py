"""A folder of recipes: one a loss, beside the base that they share."""

from __future__ import annotations

from pathlib import Path

from emd_retrieval.training import load_recipe

BASE_FILE = "base.yaml"


def recipe_files(folder: str | Path) -> dict[str, Path]:
    """The recipes of a folder by the name of their loss; its ``base.yaml`` is none.

    Raises:
        FileNotFoundError: If there is no such folder, or no recipe in it.
        ValueError: If a file cannot be read, or two have the same loss.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"recipes: no folder {str(folder)!r}")
    files: dict[str, Path] = {}
    for path in sorted(folder.glob("*.yaml")):
        if path.name == BASE_FILE:
            continue
        loss = load_recipe(path).loss.name
        if loss in files:
            raise ValueError(
                f"recipes: {files[loss].name} and {path.name} in {folder} both train {loss}"
            )
        files[loss] = path
    if not files:
        raise FileNotFoundError(f"recipes: no recipe (*.yaml) in {folder}")
    return files
