"""Few-shot recipe files: the layers of the retrieval recipes, for few-shot settings."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from emd_retrieval._checks import check_choice
from emd_retrieval.features import EXTRACTORS
from emd_retrieval.fewshot.recipe import FewshotRecipe, fewshot_recipe_from_dict
from emd_retrieval.settings import parse_override
from emd_retrieval.training.recipe_files import (
    compose_recipe,
    merge_recipes,
    method_settings,
    section_of,
)


def read_fewshot_recipe(
    path: str | Path, *, method: str | None = None, overrides: Sequence[str] = ()
) -> FewshotRecipe:
    """Read a recipe for one extractor.

    Args:
        path: The YAML file. Its ``base`` is relative to it; settings of its own come on top, then
            those below ``methods`` for the chosen extractor, then the overrides.
        method: ``"fcn"``, ``"grid"`` or ``"sampling"``; the file's by default.
        overrides: As ``"section.key=value"``, the value in YAML.

    Raises:
        FileNotFoundError: If the file or a base is missing.
        ValueError: If a file is not YAML, a name in it is unknown (the nearest one is told), or a
            value does not fit.
    """
    path = Path(path)
    content = compose_recipe(path, ())
    of_methods = method_settings(content.pop("methods", None), path)
    asked_for: dict[str, Any] = {}
    for override in overrides:
        asked_for = merge_recipes(asked_for, parse_override(override))
    if method is None:
        method = section_of(merge_recipes(content, asked_for), "model").get("method", "fcn")
    check_choice("method", str(method), EXTRACTORS)
    # What was asked for by hand counts more than the method's own settings.
    for layer in (of_methods.get(str(method), {}), {"model": {"method": method}}, asked_for):
        content = merge_recipes(content, layer)
    try:
        return fewshot_recipe_from_dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe {path}: {error}") from error
