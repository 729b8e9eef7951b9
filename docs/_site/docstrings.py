"""Docstrings as this code base writes them, for mkdocstrings: Sphinx's roles, ``Example:``."""

from __future__ import annotations

import re
from typing import Any

import griffe

_ROLE = re.compile(r":(?:class|func|meth|mod|attr|data|exc):`(~?)([\w.]+)`")
_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)


class Docstrings(griffe.Extension):
    """A role becomes a link, which is dropped where the thing has no place on the site."""

    def on_object(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Rewrite the docstring of anything that has one."""
        if obj.docstring is not None:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            obj.docstring.value = _ROLE.sub(lambda role: _link(role, obj), text)


def _link(role: re.Match[str], obj: griffe.Object) -> str:
    short, name = role.groups()
    try:
        target = obj.resolve(name)
    except griffe.NameResolutionError:
        target = name
    shown = name.rpartition(".")[2] if short else name
    return f'<autoref optional identifier="{target}"><code>{shown}</code></autoref>'
