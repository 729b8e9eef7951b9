"""Settings: frozen dataclasses from plain values and YAML, and back; wrong names are told.

What the settings mean is unknown here; recipes of every kind are read and written by it.
"""

from __future__ import annotations

import dataclasses
import difflib
import types
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

Settings = TypeVar("Settings")


def read_yaml(path: str | Path, name: str = "recipe") -> dict[str, Any]:
    """The sections of a YAML file; only plain values are read, no code is run.

    Args:
        path: The file.
        name: What to call it in an error.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not YAML, holds no settings, or one of them twice.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{name}: no file {str(path)!r}")
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)  # noqa: S506
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{name}: {path} is not YAML: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{name}: {path} holds no settings (sections with 'key: value' lines)")
    return content


def parse_override(text: str) -> dict[str, Any]:
    """The settings that ``section.key=value`` stands for, the value in YAML.

    Raises:
        ValueError: If the text is something else.

    Example:
        >>> parse_override("model.pyramid=[3, 2, 1]")
        {'model': {'pyramid': [3, 2, 1]}}
    """
    key, equals, value = text.partition("=")
    if not equals or not key.strip():
        raise ValueError(f"override: expected 'section.key=value', got {text!r}")
    try:
        setting = yaml.load(value, Loader=_Loader)  # noqa: S506
    except yaml.YAMLError as error:
        raise ValueError(f"override: {text!r} has a value that is not YAML: {error}") from error
    for part in reversed(key.strip().split(".")):
        setting = {part: setting}
    whole: dict[str, Any] = setting
    return whole


def merge_settings(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """Settings on top of settings, section by section.

    Example:
        >>> merge_settings({"a": {"b": 1, "c": 2}}, {"a": {"c": 3}})
        {'a': {'b': 1, 'c': 3}}
    """
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        if isinstance(value, Mapping):
            merged[key] = merge_settings(old if isinstance(old, Mapping) else {}, value)
        else:
            merged[key] = value
    return merged


def build_settings(kind: type[Settings], content: Any, where: str = "") -> Settings:
    """A settings class from plain values.

    Args:
        kind: A dataclass; its fields may be dataclasses, tuples, mappings and scalars.
        content: Sections and values by name; what is left out has its default.
        where: The section, for errors.

    Raises:
        ValueError: If a name is unknown (the nearest one is told) or a value does not fit.
    """
    built: Settings = _build(kind, content, where)
    return built


def plain_settings(value: Any) -> Any:
    """A settings class as plain values, defaults included."""
    return _plain(value)


def flat_settings(values: Mapping[str, Any], before: str = "") -> dict[str, Any]:
    """Plain settings by dotted key.

    Example:
        >>> flat_settings({"a": {"b": 1}, "c": 2})
        {'a.b': 1, 'c': 2}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            flat |= flat_settings(value, f"{before}{key}.")
        else:
            flat[f"{before}{key}"] = value
    return flat


def settings_differences(
    mine: Mapping[str, Any], others: Mapping[str, Any], *, but: Collection[str] = ()
) -> dict[str, tuple[Any, Any]]:
    """What two plain settings do differently, by dotted key, notes and ``but`` passed over."""
    left, right = flat_settings(mine), flat_settings(others)
    return {
        key: (left.get(key), right.get(key))
        for key in dict.fromkeys([*left, *right])
        if key not in ("notes", *but) and left.get(key) != right.get(key)
    }


def to_yaml(values: Mapping[str, Any]) -> str:
    """Plain settings as YAML: short lists on one line, notes as they were written."""
    return yaml.dump(dict(values), Dumper=_Dumper, sort_keys=False, allow_unicode=True)


def _build(kind: Any, content: Any, where: str) -> Any:
    """A settings class from plain values."""
    if content is None:
        content = {}
    if not isinstance(content, Mapping):
        raise ValueError(f"{where or 'recipe'}: expected settings, got {content!r}")
    hints = get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind) if f.init]
    values = {}
    for key, value in content.items():
        dotted = f"{where}.{key}" if where else str(key)
        if key not in names:
            near = difflib.get_close_matches(str(key), names, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            section = f"{where} has" if where else "a recipe has"
            raise ValueError(f"{dotted}: no such setting{hint} ({section}: {', '.join(names)})")
        values[key] = _convert(value, hints[key], dotted)
    for setting in dataclasses.fields(kind):
        needed = setting.default is setting.default_factory is dataclasses.MISSING
        if setting.init and needed and setting.name not in values:
            raise ValueError(f"{where or 'recipe'}: expected {setting.name!r}, got none")
    try:
        return kind(**values)
    except ValueError as error:
        # Settings classes of other rooms do not know which section they are.
        message = str(error)
        named = not where or message.startswith(f"{where}.")
        joint = "." if message.partition(":")[0] in names else ": "
        raise ValueError(message if named else f"{where}{joint}{message}") from error


def _convert(value: Any, hint: Any, where: str) -> Any:
    """A YAML value as the type that a setting has."""
    if dataclasses.is_dataclass(hint):
        return _build(hint, value, where)
    origin, arguments = get_origin(hint), get_args(hint)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in arguments:
            return None
        (hint,) = (part for part in arguments if part is not type(None))
        return _convert(value, hint, where)
    if origin is tuple:
        return _sequence(value, arguments, where)
    if isinstance(origin, type) and issubclass(origin, Mapping):
        if not isinstance(value, Mapping):
            raise ValueError(f"{where}: expected 'name: value' pairs, got {value!r}")
        return {str(name): _number_if_text(item) for name, item in value.items()}
    if hint is float and not isinstance(value, bool):
        value = _number_if_text(value)
        value = float(value) if isinstance(value, int) else value
    if hint is str and isinstance(value, int | float) and not isinstance(value, bool):
        # Class specs such as 7 are read as numbers.
        value = str(value)
    if not isinstance(value, hint) or (hint is int and isinstance(value, bool)):
        kinds = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
        raise ValueError(f"{where}: expected {kinds.get(hint, hint)}, got {value!r}")
    return value


def _sequence(value: Any, arguments: tuple[Any, ...], where: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise ValueError(f"{where}: expected a list, got {value!r}")
    if arguments[-1] is Ellipsis:
        return tuple(_convert(item, arguments[0], where) for item in value)
    if len(value) != len(arguments):
        raise ValueError(f"{where}: expected {len(arguments)} values, got {list(value)}")
    return tuple(_convert(item, kind, where) for item, kind in zip(value, arguments, strict=True))


def _number_if_text(value: Any) -> Any:
    """YAML reads 1e-3, without a point, as text."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _plain(value: Any) -> Any:
    if dataclasses.is_dataclass(value):
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        return {name: _plain(getattr(value, name)) for name in fields}
    if isinstance(value, Mapping):
        return {name: _plain(item) for name, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, tuple) else value


class _Loader(yaml.SafeLoader):
    """Plain values only; a key written twice is an error, not the last one's."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        twice = next((key for i, key in enumerate(keys) if key in keys[:i]), None)
        if twice is not None:
            raise yaml.constructor.ConstructorError(
                None, None, f"{twice!r} is written twice", node.start_mark
            )
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Short lists on one line, notes as they were written."""


_Dumper.add_representer(
    list, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True)
)
_Dumper.add_representer(
    str,
    lambda dumper, value: dumper.represent_scalar(
        "tag:yaml.org,2002:str", value, style="|" if "\n" in value else None
    ),
)
