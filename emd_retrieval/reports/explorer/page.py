"""The HTML file: templates, style and script beside this module, filled with a run's records."""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader, StrictUndefined

from emd_retrieval.records import ResultRecord
from emd_retrieval.reports.explorer.data import ExplorerData, Match
from emd_retrieval.reports.gallery import short_label

_HERE = Path(__file__).parent


@dataclass(frozen=True)
class PageFigure:
    """A figure of the page.

    Attributes:
        title: Heading above it.
        text: What it shows, for those who cannot see it.
        svg: The drawing.
    """

    title: str
    text: str
    svg: bytes

    @property
    def address(self) -> str:
        """The drawing as an address that needs no file and no network."""
        return f"data:image/svg+xml;base64,{base64.b64encode(self.svg).decode()}"


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
    content: dict[str, Any] = {
        "title": title or (records[0].title if records else "Run"),
        "records": [_record(record) for record in records],
        "figures": figures,
        "explorer": explorer,
        "classes": [] if explorer is None else _classes(explorer),
        "style": (_HERE / "page.css").read_text(encoding="utf-8"),
        "script": (_HERE / "page.js").read_text(encoding="utf-8"),
        "data": "" if explorer is None else _payload(explorer),
    }
    template = environment.get_template("page.html.j2")
    size = len(template.render(**content, size="").encode())
    return template.render(**content, size=_size(size))


def _record(record: ResultRecord) -> dict[str, Any]:
    tables = []
    for number, (name, table) in enumerate(record.tables.items()):
        if number == 0 and record.summary is not None:
            table = record.summary
        tables.append({"name": name, "table": _table(table)})
    return {"record": record, "tables": tables}


def _table(table: pd.DataFrame) -> dict[str, Any]:
    numeric = [pd.api.types.is_numeric_dtype(table[name]) for name in table.columns]
    columns = [{"name": str(n), "numeric": f} for n, f in zip(table.columns, numeric, strict=True)]
    return {"columns": columns, "rows": table.to_numpy(dtype=object).tolist()}


def _classes(explorer: ExplorerData) -> list[dict[str, Any]]:
    """Classes by what they gained, with where their dots lie on a scale of percent."""
    order = sorted(explorer.classes, key=lambda result: result.before - result.after)
    place = {name: index for index, name in enumerate(explorer.class_names)}
    return [
        {
            "name": short_label(result.name, 48),
            "index": place[result.name],
            "queries": result.queries,
            "before": result.before,
            "after": result.after,
            "gain": result.after - result.before,
            "left": min(result.before, result.after),
            "width": abs(result.after - result.before),
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
    content = {
        "methods": explorer.methods,
        "metric": explorer.metric,
        "classes": [short_label(name, 48) for name in explorer.class_names],
        "layouts": layouts,
        "pictures": pictures,
        "queries": [
            [q.picture, _rounded(q.scores, 2), q.neighbours.tolist(),
             [_rounded(row) for row in q.similarities]]
            for q in explorer.queries
        ],
        "matches": {f"{a} {b}": _match(m) for (a, b), m in explorer.matches.items()},
    }  # fmt: skip
    text = json.dumps(content, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return text.replace("<", "\\u003c")


def _match(match: Match) -> list[Any]:
    flows = [
        [int(i), int(j), *_rounded([mass, cost])]
        for (i, j), mass, cost in zip(match.pairs, match.flow, match.cost, strict=True)
    ]
    weights = [_rounded(match.query_weights), _rounded(match.reference_weights)]
    return [round(match.similarity, 4), *weights, flows]


def _rounded(values: Any, digits: int = 4) -> list[float | None]:
    """Numbers as short as the picture needs; what is not finite is left empty."""
    return [round(float(v), digits) if math.isfinite(v) else None for v in values]


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return "" if math.isnan(value) else f"{value:.2f}"
    return str(value)


def _size(count: int) -> str:
    return f"{count / 1e6:.1f} MB" if count >= 1e5 else f"{math.ceil(count / 1e3)} kB"
