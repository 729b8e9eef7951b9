"""``emd-retrieval rerank``, and the options that it shares with ``search`` and ``tune``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emd_retrieval.cli.options import add_report_option

EXAMPLES = """examples:
  an index that exists, queries as images, extracted as the store's were:
    emd-retrieval rerank --index gallery.faiss --store birds.store --queries photos/ \\
        --weights resnet50.safetensors -k 10 --shortlist 100
  a shortlist from any other system, queries as packed sets:
    emd-retrieval rerank --candidates results.parquet --store birds.store --queries queries.npy
  the store's own global vectors, both scores mixed:
    emd-retrieval rerank --store birds.store --queries queries.npy --alpha 0.7 --format csv
  with a page to look at, pictures of both sides in it:
    emd-retrieval rerank --store birds.store --queries photos/ --report --images birds/
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``rerank`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "rerank",
        help="an existing index, its answers in EMD order",
        description="Search an index, re-rank its answers by EMD, write the ranking.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_search_options(parser)
    parser.add_argument(
        "--queries", type=Path, required=True, metavar="PATH",
        help="images (folder, list, table) or arrays: .npy [Q, N*D] or [Q, N, D], .npz",
    )  # fmt: skip
    parser.add_argument("--query-vectors", type=Path, metavar="FILE", help="global vectors, .npy")
    add_answer_options(parser)
    parser.add_argument(
        "--exclude-self", action="store_true", help="leave a query's own id out of its answer"
    )
    parser.add_argument(
        "--skip-errors", action="store_true", help="leave unreadable images out, and list them"
    )
    parser.add_argument(
        "--format", default="parquet", choices=["parquet", "csv"], help="of the ranking (parquet)"
    )
    parser.add_argument(
        "--output", type=Path, default=Path("runs/rerank"), metavar="DIR", help="(runs/rerank)"
    )
    add_report_option(parser)
    parser.add_argument(
        "--images", type=Path, metavar="PATH",
        help="the store's images (folder, list, table), for the pictures of the page",
    )  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def add_search_options(parser: argparse.ArgumentParser) -> None:
    """Store, first stage, matching and device."""
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="see extract")
    parser.add_argument(
        "--model", type=Path, metavar="RUN", help="the trained run that the store was made with"
    )
    parser.add_argument(
        "--weights", type=Path, metavar="FILE", help="the weights file that the store was made with"
    )
    first = parser.add_argument_group("first stage (the store's global vectors by default)")
    first.add_argument("--index", type=Path, metavar="FILE", help="a FAISS index")
    first.add_argument(
        "--index-ids", type=Path, metavar="FILE",
        help="store id of each vector of the index: .npy, or text, an id a line",
    )  # fmt: skip
    first.add_argument(
        "--index-parameters", default="", metavar="NAME=X,...", help="nprobe=16, efSearch=64"
    )
    first.add_argument(
        "--normalize", action=argparse.BooleanOptionalAction, default=True,
        help="scale queries to unit norm, as an index of unit vectors wants them (yes)",
    )  # fmt: skip
    first.add_argument(
        "--candidates", type=Path, metavar="FILE",
        help="a ready shortlist: .parquet, .csv (query, id, score) or .npz (ids, scores, queries)",
    )  # fmt: skip
    first.add_argument("--qdrant", metavar="URL", help="a Qdrant server, or its local folder")
    first.add_argument("--collection", metavar="NAME", help="the Qdrant collection")
    first.add_argument("--id-key", metavar="KEY", help="payload entry with the store's id")

    matching = parser.add_argument_group("matching (as the store's model was trained)")
    matching.add_argument(
        "--ground-cost", choices=["cosine", "centered_cosine", "snr"], help="(cosine)"
    )
    matching.add_argument(
        "--node-weights", choices=["cross_reference", "uniform"], help="(cross_reference)"
    )
    matching.add_argument("--solver", help="transport solver (simplex)")

    work = parser.add_argument_group("work")
    work.add_argument("--device", help="torch device (cuda where there is one)")
    work.add_argument("--batch-size", type=int, default=32, metavar="N", help="(32)")
    work.add_argument("--workers", type=int, metavar="N", help="decoding processes (by cores)")


def add_answer_options(parser: argparse.ArgumentParser, k: int = 10) -> None:
    """How many answers, of how many candidates, by which score."""
    parser.add_argument("-k", type=int, default=k, metavar="K", help=f"answers a query ({k})")
    parser.add_argument(
        "--shortlist", type=int, default=100, metavar="C", help="candidates compared by EMD (100)"
    )
    parser.add_argument(
        "--alpha", type=float, default=1.0, metavar="A",
        help="alpha * EMD + (1 - alpha) * first stage's score (1); see tune",
    )  # fmt: skip


def search_settings(options: argparse.Namespace) -> dict[str, Any]:
    """The fields of :class:`SearchSettings` that all three commands read."""
    from emd_retrieval._checks import check_choice
    from emd_retrieval.cli.options import set_threads, torch_device
    from emd_retrieval.features.extraction import default_workers
    from emd_retrieval.transport import available_solvers

    set_threads(options.threads)
    if options.solver is not None:
        check_choice("--solver", options.solver, available_solvers())
    matching = {
        "ground_cost": options.ground_cost,
        "weights": options.node_weights,
        "solver": options.solver,
    }
    return {
        "store": options.store,
        "model": options.model,
        "weights": options.weights,
        "index": options.index,
        "index_ids": options.index_ids,
        "index_parameters": _parameters(options.index_parameters),
        "normalize": options.normalize,
        "candidates": options.candidates,
        "qdrant": options.qdrant,
        "collection": options.collection,
        "id_key": options.id_key,
        "matching": {name: value for name, value in matching.items() if value is not None},
        "device": torch_device(options.device),
        "batch_size": options.batch_size,
        "num_workers": default_workers() if options.workers is None else options.workers,
    }


def run(options: argparse.Namespace) -> None:
    """Re-rank, write the ranking, say what was done."""
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    settings = workflows.RerankQueries(
        **search_settings(options),
        queries=options.queries,
        query_vectors=options.query_vectors,
        shortlist=options.shortlist,
        k=options.k,
        alpha=options.alpha,
        exclude_self=options.exclude_self,
        skip_errors=options.skip_errors,
        format=options.format,
        report=options.report,
        images=options.images,
    )
    record, _ = workflows.rerank_queries(settings, options.output)
    print_record(record, options.output)


def _parameters(text: str) -> dict[str, float]:
    parameters = {}
    for part in filter(None, (part.strip() for part in text.split(","))):
        name, _, value = part.partition("=")
        try:
            parameters[name.strip()] = float(value)
        except ValueError:
            raise ValueError(
                f"--index-parameters: expected NAME=NUMBER as in nprobe=16, got {part!r}"
            ) from None
    return parameters
