"""The HTML file: template, style and scripts beside this module, filled with a run's records."""

from __future__ import annotations

import base64
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from emd_retrieval.records import ResultRecord
from emd_retrieval.reports.explorer.data import ExplorerData, Match
from emd_retrieval.reports.gallery import short_label

_HERE = Path(__file__).parent
_SCRIPTS = ("match.js", "list.js")
_LONG = 14  # rows; longer tables are folded away
_WORD = 65535
_INTERVAL = re.compile(r"^(\S+) (\[.+\]|± \S+|\([+-].+\))$")


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        title: Heading above it.
        text: What it shows, for those who cannot see it.
        svg: The drawing.
        narrow: The drawing for a phone; the same one by default.
    """

    title: str
    text: str
    svg: bytes
    narrow: bytes | None = None

    @property
    def address(self) -> str:
        """The drawing as an address that needs no file and no network."""
        return _address(self.svg)

    @property
    def narrow_address(self) -> str:
        """The same of the drawing for a phone."""
        return _address(self.svg if self.narrow is None else self.narrow)


def render_page(
    records: Sequence[ResultRecord],
    *,
    figures: Sequence[PageFigure] = (),
    explorer: ExplorerData | None = None,
    title: str | None = None,
) -> str:
    """One self-contained HTML file: it opens from disk and fetches nothing.

    Args:
        records: What the run measured; the first gives the page its title.
        figures: Drawn after the tables.
        explorer: Queries and matches to look at.
        title: The page's title, needed where there are no records.

    Raises:
        ValueError: If there is nothing to show.
    """
    if not (records or figures or explorer):
        raise ValueError("records: expected a record, a figure or an explorer to show, got none")
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined,
        trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    environment.filters["cell"] = _cell
    environment.filters["inline"] = _inline
    environment.tests["gain"] = lambda text: text.startswith("gain")
    content: dict[str, Any] = {
        "title": title or (records[0].title if records else "Run"),
        "records": [_record(record) for record in records],
        "figures": figures,
        "explorer": explorer,
        "classes": [] if explorer is None else _classes(explorer),
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "script": "\n".join((_HERE / name).read_text(encoding="utf-8") for name in _SCRIPTS),
        "data": "" if explorer is None else _payload(explorer),
    }
    template = environment.get_template("page.html.j2")
    size = len(_utf8(template.render(**content, size="")))
    return _utf8(template.render(**content, size=_size(size))).decode()


def _utf8(page: str) -> bytes:
    """The page's bytes; names of files that are no UTF-8 are spelt out."""
    return page.encode("utf-8", "backslashreplace")


def _record(record: ResultRecord) -> dict[str, Any]:
    tables = []
    for number, (name, table) in enumerate(record.tables.items()):
        if number == 0 and record.summary is not None:
            table = record.summary
        # What a run is about is never folded away.
        folded = number > 0 and len(table) > _LONG
        heading = f"{name[:1].upper()}{name[1:]}"
        tables.append({"heading": heading, "long": folded, "table": _table(table)})
    return {"record": record, "tables": tables}


def _table(table: pd.DataFrame) -> dict[str, Any]:
    numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table.columns]
    columns = [{"name": str(n), "numeric": f} for n, f in zip(table.columns, numeric, strict=True)]
    return {"columns": columns, "rows": table.to_numpy(dtype=object).tolist()}


def _classes(explorer: ExplorerData) -> list[dict[str, Any]]:
    """Classes by what they gained, and how long the bar of each is, in percent of the track."""
    order = sorted(explorer.classes, key=lambda result: result.before - result.after)
    place = {name: index for index, name in enumerate(explorer.class_names)}
    most = max((abs(result.after - result.before) for result in order), default=0.0) or 1.0
    return [
        {
            "name": short_label(result.name, 48),
            "index": place[result.name],
            "queries": result.queries,
            "before": result.before,
            "after": result.after,
            "gain": result.after - result.before,
            "width": 50 * abs(result.after - result.before) / most,
        }
        for result in order
    ]


def _payload(explorer: ExplorerData) -> str:
    """The explorer's data as JSON that cannot end the script element it stands in."""
    layouts: list[list[list[float | None]]] = []
    places: dict[bytes, int] = {}
    pictures = []
    for picture in explorer.pictures:
        place = -1
        if picture.boxes is not None:
            place = places.setdefault(picture.boxes.tobytes(), len(places))
            if place == len(layouts):
                layouts.append([_rounded(box) for box in picture.boxes])
        jpeg = base64.b64encode(picture.jpeg).decode()
        pictures.append([jpeg, picture.label, picture.name, *picture.size, place])
    costs = _range(explorer.matches.values())
    content = {
        "methods": explorer.methods,
        "metric": explorer.metric,
        "labelled": explorer.labelled,
        "classes": [short_label(name, 48) for name in explorer.class_names],
        "layouts": layouts,
        "costs": costs,
        "pictures": pictures,
        "queries": [
            [q.picture, _rounded(q.scores, 2), q.neighbours.tolist(),
             [_rounded(row) for row in q.similarities]]
            for q in explorer.queries
        ],
        "matches": {f"{a} {b}": _match(m, costs) for (a, b), m in explorer.matches.items()},
    }  # fmt: skip
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")


def _range(matches: Iterable[Match]) -> tuple[float, float]:
    """The lowest and the highest ground cost of all flows."""
    bounds = [(float(m.cost.min()), float(m.cost.max())) for m in matches if len(m.cost)]
    return min((low for low, _ in bounds), default=0.0), max((h for _, h in bounds), default=1.0)


def _match(match: Match, costs: tuple[float, float]) -> list[Any]:
    """Similarity, numbers of nodes, and weights and flows in 16-bit numbers: thousands stay small.

    The numbers are the weights of both sides, then query node, reference node, mass and cost of
    each flow; shares of 65535, costs between the page's lowest and highest.
    """
    low, high = costs
    flows = np.empty((len(match.flow), 4), "<u2")
    flows[:, :2] = match.pairs
    flows[:, 2] = _words(match.flow)
    flows[:, 3] = _words((match.cost.astype(np.float64) - low) / max(high - low, 1e-12))
    weights = _words(match.query_weights), _words(match.reference_weights)
    packed = np.concatenate([*weights, flows.ravel()]).astype("<u2").tobytes()
    return [
        round(match.similarity, 4), *(len(part) for part in weights),
        base64.b64encode(packed).decode(),
    ]  # fmt: skip


def _words(shares: Any) -> Any:
    return np.rint(np.asarray(shares, np.float64).clip(0, 1) * _WORD).astype("<u2")


def _rounded(values: Any, digits: int = 4) -> list[float | None]:
    """Numbers as short as the picture needs; what is not finite is left empty."""
    return [round(float(v), digits) if math.isfinite(v) else None for v in values]


def _cell(value: Any) -> str:
    """A cell's text; an interval behind a number is marked, so that it can be quieter."""
    if value is None:
        return ""
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.2f}"
    found = _INTERVAL.match(str(value))
    if found is None:
        return str(value)
    return Markup(f'{escape(found[1])} <span class="interval">{escape(found[2])}</span>')  # noqa: S704


def _inline(values: Mapping[str, Any], name: str = "") -> str:
    """Settings in one line; those of a group carry its name."""
    parts = []
    for key, value in values.items():
        path = f"{name}.{key}" if name else str(key)
        if isinstance(value, Mapping):
            parts.append(_inline(value, path))
        elif isinstance(value, (list, tuple)):
            parts += [f"{path} {' '.join(str(part) for part in value)}"] if value else []
        elif value is not None:
            parts.append(f"{path} {value}")
    return ", ".join(part for part in parts if part)


def _address(svg: bytes) -> str:
    return f"data:image/svg+xml;base64,{base64.b64encode(svg).decode()}"


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{math.ceil(count / 1e3)} kB"
