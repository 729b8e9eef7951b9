"""``emd-retrieval evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from emd_retrieval.cli.options import add_feature_options, add_report_option, add_work_options

EXAMPLES = """examples:
  a dataset, its classes 101 to 200, the paper's pyramid, every pair compared:
    emd-retrieval evaluate --data CUB_200_2011 --classes 101-200 --backbone resnet50.tv_in1k \\
        --extractor fcn --pyramid 3,2,1 --shortlist all
  any folder of class sub-folders, weights from a file:
    emd-retrieval evaluate --data photos/ --backbone resnet50 --weights resnet50.safetensors
  a trained run, with the weights of its frozen trunk:
    emd-retrieval evaluate --data CUB_200_2011 --classes 26-50 --model runs/ms_fcn \\
        --weights tf_efficientnet_lite0.safetensors --shortlist all
  embeddings you have: packed sets of 128-channel nodes, query and gallery apart:
    emd-retrieval evaluate --embeddings query.npy --labels query_labels.npy --channels 128 \\
        --gallery-embeddings gallery.parquet
  a ranking you have (columns query, id), labels by id:
    emd-retrieval evaluate --ranking ranking.csv --labels labels.csv --baseline before.csv
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``evaluate`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "evaluate",
        help="P@1, RP and MAP@R: Raw against DeepEMD",
        description="Retrieve by global vectors, re-rank by EMD; report P@1, RP and MAP@R.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    source = parser.add_argument_group("what to evaluate (one of)")
    what = source.add_mutually_exclusive_group(required=True)
    what.add_argument("--data", type=Path, metavar="DIR", help="images: CUB or class sub-folders")
    what.add_argument("--embeddings", type=Path, metavar="FILE", help=".npy or .parquet")
    what.add_argument("--ranking", type=Path, metavar="FILE", help=".csv or .parquet: query, id")

    images = parser.add_argument_group("images")
    images.add_argument("--classes", metavar="SPEC", help="for instance 26-50 or 1,3,7-9 (all)")
    images.add_argument("--gallery", type=Path, metavar="DIR", help="search here, not in --data")
    add_feature_options(images)
    add_work_options(images)

    stored = parser.add_argument_group("stored embeddings and rankings")
    stored.add_argument("--labels", type=Path, metavar="FILE", help=".npy, .csv or .parquet")
    stored.add_argument("--channels", type=int, metavar="D", help="of packed sets [n, N*D]")
    stored.add_argument("--global-node", type=int, metavar="I", help="the 1x1 node (mean of nodes)")
    stored.add_argument("--gallery-embeddings", type=Path, metavar="FILE", help="search here")
    stored.add_argument("--gallery-labels", type=Path, metavar="FILE", help="its labels")
    stored.add_argument("--query-labels", type=Path, metavar="FILE", help="of a ranking's queries")
    stored.add_argument("--baseline", type=Path, metavar="FILE", help="a ranking to compare with")

    matching = parser.add_argument_group("matching")
    matching.add_argument(
        "--shortlist", default="100", metavar="K|all", help="candidates compared by EMD (100)"
    )
    matching.add_argument(
        "--ground-cost", default="cosine", choices=["cosine", "centered_cosine"], help="(cosine)"
    )
    matching.add_argument(
        "--node-weights",
        default="cross_reference",
        choices=["cross_reference", "uniform"],
        help="(cross_reference)",
    )
    matching.add_argument("--weight-floor", type=float, default=1e-3, metavar="F", help="(0.001)")
    matching.add_argument("--solver", default="simplex", help="transport solver (simplex)")

    out = parser.add_argument_group("output")
    out.add_argument("--output", type=Path, metavar="DIR", help="folder (runs/evaluate)")
    add_report_option(out)
    parser.set_defaults(run=partial(run, default=parser.get_default))
    return parser


def run(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Evaluate, write the results folder, print the table.

    Args:
        options: What the user chose.
        default: Gives an option's value where the user chose nothing.
    """
    from emd_retrieval import workflows
    from emd_retrieval._checks import check_choice
    from emd_retrieval.cli.options import feature_settings, set_threads, work_settings
    from emd_retrieval.cli.printing import print_record
    from emd_retrieval.matching import EMDMatcher
    from emd_retrieval.transport import available_solvers

    set_threads(options.threads)
    _refuse_foreign(options, default)
    check_choice("--solver", options.solver, available_solvers())
    output = options.output or Path("runs/evaluate")
    matcher = EMDMatcher(
        ground_cost=options.ground_cost,
        weights=options.node_weights,
        weight_floor=options.weight_floor,
        solver=options.solver,
    )
    shortlist = _shortlist(options.shortlist)
    if options.data is not None:
        record, _ = workflows.evaluate_images(
            workflows.EvaluateImages(
                data=options.data,
                classes=options.classes,
                gallery=options.gallery,
                **feature_settings(options, default),
                **work_settings(options),
                shortlist=shortlist,
                matcher=matcher,
                report=options.report,
            ),
            output,
        )
    elif options.embeddings is not None:
        record, _ = workflows.evaluate_stored_sets(
            workflows.EvaluateSets(
                embeddings=options.embeddings,
                labels=options.labels,
                channels=options.channels,
                gallery_embeddings=options.gallery_embeddings,
                gallery_labels=options.gallery_labels,
                global_node=options.global_node,
                shortlist=shortlist,
                matcher=matcher,
                seed=options.seed,
            ),
            output,
        )
    else:
        if options.labels is None:
            raise ValueError("--ranking needs --labels FILE: a table with columns id and label")
        record, _ = workflows.evaluate_ranking(
            workflows.EvaluateRanking(
                ranking=options.ranking,
                labels=options.labels,
                query_labels=options.query_labels,
                baseline=options.baseline,
                seed=options.seed,
            ),
            output,
        )
    print_record(record, output)


def _shortlist(text: str) -> int | None:
    if text == "all":
        return None
    if not text.isdigit() or int(text) < 1:
        raise ValueError(f"--shortlist: expected a positive whole number or 'all', got {text!r}")
    return int(text)


_MATCHING = ("shortlist", "ground_cost", "node_weights", "weight_floor", "solver")
_READ_BY = {
    "--data": (
        "classes", "gallery", "model", "backbone", "weights", "layer", "extractor", "pyramid",
        "include_map", "grid", "context", "patches", "patch_size", "resize", "crop", "batch_size",
        "device", "bf16", "workers", "skip_errors", "report", *_MATCHING,
    ),
    "--embeddings": (
        "labels", "channels", "global_node", "gallery_embeddings", "gallery_labels", *_MATCHING,
    ),
    "--ranking": ("labels", "query_labels", "baseline"),
}  # fmt: skip


def _refuse_foreign(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """An option that the chosen source does not read is a misunderstanding, not a detail."""
    chosen = next(source for source in _READ_BY if getattr(options, source[2:]) is not None)
    for name in dict.fromkeys(name for names in _READ_BY.values() for name in names):
        if name in _READ_BY[chosen] or getattr(options, name) == default(name):
            continue
        readers = " or ".join(source for source, names in _READ_BY.items() if name in names)
        raise ValueError(f"--{name.replace('_', '-')} goes with {readers}, not with {chosen}")
