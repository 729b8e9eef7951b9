"""``emd-retrieval tune``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emd_retrieval.cli.rerank import add_search_options, search_settings

EXAMPLES = """examples:
  queries that are images of the store, labels by id:
    emd-retrieval tune --store birds.store --queries photos/ --labels labels.csv --exclude-self \\
        --weights resnet50.safetensors
  the best P@1 within 2 ms a query, for an index of your own:
    emd-retrieval tune --store birds.store --index gallery.faiss --queries queries.npz \\
        --labels labels.csv --query-labels query_labels.csv --metric P@1 --budget-ms 2
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``tune`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "tune",
        help="choose alpha and shortlist size on labelled queries",
        description="Try every alpha and shortlist size on labelled queries, against latency.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_search_options(parser)
    parser.add_argument(
        "--queries", type=Path, required=True, metavar="PATH", help="images or arrays, see rerank"
    )
    parser.add_argument("--query-vectors", type=Path, metavar="FILE", help="global vectors, .npy")
    parser.add_argument(
        "--labels", type=Path, required=True, metavar="FILE",
        help="of the gallery: .csv or .parquet with columns id and label",
    )  # fmt: skip
    parser.add_argument("--query-labels", type=Path, metavar="FILE", help="of the queries (labels)")
    parser.add_argument(
        "--alphas", default="0,0.2,0.4,0.5,0.6,0.7,0.8,0.9,1", metavar="A,B,...",
        help="to be tried (0 to 1)",
    )  # fmt: skip
    parser.add_argument(
        "--shortlists", default="10,20,50,100,200", metavar="C,D,...",
        help="sizes to be tried (10,20,50,100,200)",
    )  # fmt: skip
    parser.add_argument("--metric", default="MAP@R", choices=["P@1", "RP", "MAP@R"], help="(MAP@R)")
    parser.add_argument("--budget-ms", type=float, metavar="MS", help="largest median latency")
    parser.add_argument(
        "--exclude-self", action="store_true", help="leave a query's own id out of its answer"
    )
    parser.add_argument(
        "--skip-errors", action="store_true", help="leave unreadable images out, and list them"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/tune"), metavar="DIR", help="(runs/tune)"
    )
    parser.set_defaults(run=run)
    return parser


def run(options: argparse.Namespace) -> None:
    """Tune, write the table and the plot, print the choice."""
    from emd_retrieval import workflows
    from emd_retrieval.cli.options import sizes
    from emd_retrieval.cli.printing import print_record

    settings = workflows.TuneReranking(
        **search_settings(options),
        queries=options.queries,
        query_vectors=options.query_vectors,
        labels=options.labels,
        query_labels=options.query_labels,
        metric=options.metric,
        budget_ms=options.budget_ms,
        exclude_self=options.exclude_self,
        skip_errors=options.skip_errors,
        alphas=_numbers("--alphas", options.alphas),
        sizes=sizes("--shortlists", options.shortlists),
    )
    record, tuned = workflows.tune_queries(settings, options.output)
    print_record(record, options.output)
    print(f"\nuse: --alpha {tuned.alpha:g} --shortlist {tuned.shortlist}")


def _numbers(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",") if part.strip()]
    except ValueError:
        raise ValueError(f"{option}: expected numbers as in 10,50,100, got {text!r}") from None
