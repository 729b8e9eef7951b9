"""``emd-retrieval train``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

EXAMPLES = """examples:
  the paper's setting, multi-similarity loss, sets of random patches:
    emd-retrieval train recipes/retrieval/cub200_resnet50/multi_similarity.yaml \\
        --method sampling --data CUB_200_2011 --run runs/ms_sampling
  another learning rate and pyramid (overrides come right after the recipe):
    emd-retrieval train recipes/retrieval/cub200_resnet50/arcface.yaml \\
        optimization.learning_rate=3e-6 "model.pyramid=[5, 2, 1]" --data CUB_200_2011 --run runs/a
  on four GPUs, every pair of a batch compared as on one:
    emd-retrieval train recipes/retrieval/cub200_resnet50/arcface.yaml --data CUB_200_2011 \\
        --run runs/a4 --device cuda --devices 4
  classes 1-50 of CUB, the trunk frozen, weights from a file, test classes left alone:
    emd-retrieval train recipes/retrieval/cub50_efficientnet_lite0/contrastive.yaml \\
        --data CUB_200_2011 --weights tf_efficientnet_lite0.safetensors --run runs/c \\
        --validate-only
A killed run goes on where it was: give the same command again. --seed N (not 0) trains with seed N.
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``train`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "train",
        help="a recipe to a trained, evaluated model",
        description="Train a recipe, then retrieve the test classes (query = gallery, all pairs).",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="in place of the recipe's settings"
    )
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR",
                        help="the run's folder: model, record, logs")  # fmt: skip
    parser.add_argument(
        "--method", metavar="WORD", help="raw, fcn, grid or sampling (the recipe's)"
    )
    parser.add_argument("--validate-only", action="store_true", help="leave the test classes alone")
    add_machine(parser)
    add_compile(parser)
    several = parser.add_argument_group("several devices")
    several.add_argument("--devices", type=int, default=1, metavar="N",
                         help="train on N of them, a process each (1)")  # fmt: skip
    several.add_argument("--nodes", type=int, default=1, metavar="N",
                         help="machines, the same command on each (1)")  # fmt: skip
    parser.set_defaults(run=run)
    return parser


def add_machine(parser: argparse.ArgumentParser) -> None:
    """Options of every command that trains: where the data lie, and what computes."""
    where = parser.add_argument_group("data and machine")
    where.add_argument("--data", type=Path, metavar="DIR", help="the images (the recipe's)")
    where.add_argument(
        "--weights", type=Path, metavar="FILE", help="of the backbone; timm's hub without"
    )
    where.add_argument(
        "--cache", type=Path, default=Path("runs/trunk_features"), metavar="DIR",
        help="features of frozen trunks, shared by all runs (runs/trunk_features)",
    )  # fmt: skip
    where.add_argument("--device", default=None, help="torch device (cuda where there is one)")
    where.add_argument("--workers", type=int, metavar="N", help="decoding processes (by cores)")


def add_compile(parser: argparse.ArgumentParser) -> None:
    """``--compile``, for commands that cache features of frozen trunks."""
    parser.add_argument(
        "--compile", action="store_true",
        help="compile a frozen trunk before features are cached: pays from some thousand on",
    )  # fmt: skip


def machine_of(options: argparse.Namespace) -> Any:
    """What :func:`add_machine`'s options say."""
    from emd_retrieval import workflows
    from emd_retrieval.cli.options import set_threads, torch_device
    from emd_retrieval.features.extraction import default_workers

    set_threads(options.threads)
    more = {name: getattr(options, name) for name in ("devices", "nodes") if name in options}
    return workflows.Machine(
        cache=options.cache,
        weights=options.weights,
        device=torch_device(options.device),
        num_workers=default_workers() if options.workers is None else options.workers,
        compiled=getattr(options, "compile", False),
        **more,
    )


def run(options: argparse.Namespace) -> None:
    """Train, and print what came of it."""
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    seed = [f"seed={options.seed}"] if options.seed else []
    record, _ = workflows.train_recipe(
        workflows.TrainRecipe(
            recipe=options.recipe,
            run=options.folder,
            method=options.method,
            overrides=(*options.overrides, *seed),
            data=options.data,
            machine=machine_of(options),
            validate_only=options.validate_only,
            seed=options.seed,
        )
    )
    if record is not None:  # the other processes of several devices leave that to the first
        print_record(record, options.folder)
