"""Recipe files as people write them: a base to build on, and what a method does otherwise.

``base: base.yaml`` (or a list; the last wins) takes over the settings of other files; ``methods``
holds settings for one method each. What comes out is the flat, typed recipe of a run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from emd_retrieval._checks import check_choice
from emd_retrieval.settings import merge_settings, parse_override, read_yaml
from emd_retrieval.training.recipe import METHODS, Recipe, recipe_from_dict


def load_recipe(
    path: str | Path, overrides: Sequence[str] = (), *, method: str | None = None
) -> Recipe:
    """Read a recipe for one method; only plain values are read, no code is run.

    Args:
        path: The YAML file. Its ``base`` is relative to it; settings of its own come on top, then
            those below ``methods`` for the chosen method, then the overrides. What nobody sets has
            its default; a loss there must be.
        overrides: As ``"section.key=value"``, the value in YAML: ``"model.method=grid"``,
            ``"loss.parameters.beta=40"``, ``"model.pyramid=[5, 2, 1]"``.
        method: ``"raw"``, ``"fcn"``, ``"grid"`` or ``"sampling"``; the file's by default.

    Raises:
        FileNotFoundError: If the file or a base is missing.
        ValueError: If a file is not YAML, a name in it is unknown (the nearest one is told), or a
            value does not fit.
    """
    path = Path(path)
    content = compose_recipe(path, ())
    ours: dict[str, dict[str, Any]] = {name: {} for name in METHODS}
    ours |= method_settings(content.pop("methods", None), path)
    asked_for: dict[str, Any] = {}
    for override in overrides:
        asked_for = merge_settings(asked_for, parse_override(override))
    named = "method"
    if method is None:
        named = "model.method"
        method = str(section_of(merge_recipes(content, asked_for), "model").get("method", "fcn"))
    check_choice(named, method, METHODS)
    # What was asked for by hand counts more than the method's own settings.
    for layer in (ours[method], {"model": {"method": method}}, asked_for):
        content = merge_recipes(content, layer)
    if (asked := section_of(content, "model").get("method", method)) != method:
        raise ValueError(f"method: expected one, got {method!r} and the override {asked!r}")
    try:
        return recipe_from_dict(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"recipe {path}: {error}") from error


def compose_recipe(path: Path, above: tuple[Path, ...]) -> dict[str, Any]:
    """The settings of a file on top of those of its bases."""
    if not path.is_file():
        asked = f", the base of {above[-1]}" if above else ""
        raise FileNotFoundError(f"recipe: no file {str(path)!r}{asked}")
    if path.resolve() in [other.resolve() for other in above]:
        raise ValueError(f"recipe: {path} is its own base, by way of {above[-1]}")
    content = read_yaml(path)
    bases = content.pop("base", [])
    bases = [bases] if isinstance(bases, str) else bases
    if not isinstance(bases, list) or not all(isinstance(base, str) for base in bases):
        raise ValueError(f"recipe: base of {path} must be a file or a list of files, got {bases!r}")
    whole: dict[str, Any] = {}
    for base in bases:
        whole = merge_recipes(whole, compose_recipe(path.parent / base, (*above, path)))
    return merge_recipes(whole, content)


def merge_recipes(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on top of settings, section by section; notes are added to notes."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if key == "notes" and isinstance(old, str) and isinstance(value, str):
            merged[key] = f"{old.rstrip()}\n{value}"
        elif key == "loss" and isinstance(value, Mapping) and "name" in value:
            # Parameters belong to the loss they were written for.
            merged[key] = dict(value)
        elif isinstance(old, Mapping) and isinstance(value, Mapping):
            merged[key] = merge_recipes(old, value)
        else:
            merged[key] = dict(value) if isinstance(value, Mapping) else value
    return merged


def method_settings(content: Any, path: Path) -> dict[str, dict[str, Any]]:
    """The settings below ``methods``, by method."""
    if content is None:
        return {}
    if not isinstance(content, Mapping):
        raise ValueError(f"recipe {path}: methods: expected settings a method, got {content!r}")
    for method, settings in content.items():
        try:
            check_choice("methods", str(method), METHODS)
        except ValueError as error:
            raise ValueError(f"recipe {path}: {error}") from error
        if not isinstance(settings, Mapping):
            raise ValueError(
                f"recipe {path}: methods.{method}: expected settings, got {settings!r}"
            )
    return dict(content)


def section_of(content: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A section of settings; empty where there is none."""
    section = content.get(name)
    return section if isinstance(section, Mapping) else {}
