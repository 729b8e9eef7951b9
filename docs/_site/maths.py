r"""Equations at build time: ``$...$`` and ``$$...$$`` become MathML, which browsers draw.

So a page needs no script, no fonts of its own and no network, and a reader's software can read the
equation out.
"""

from __future__ import annotations

import html
import re
from typing import Any

from latex2mathml.converter import convert

_INLINE = re.compile(r'<span class="arithmatex">\\\((.*?)\\\)</span>', re.DOTALL)
_BLOCK = re.compile(r'<div class="arithmatex">\\\[(.*?)\\\]</div>', re.DOTALL)


def on_page_content(content: str, page: Any, config: Any, files: Any) -> str:
    """Replace what the markdown extension marked as an equation."""
    content = _BLOCK.sub(lambda found: _mathml(found.group(1), "block"), content)
    return _INLINE.sub(lambda found: _mathml(found.group(1), "inline"), content)


def _mathml(escaped: str, display: str) -> str:
    markup = convert(html.unescape(escaped).strip(), display=display)
    return f'<div class="equation">{markup}</div>' if display == "block" else markup
