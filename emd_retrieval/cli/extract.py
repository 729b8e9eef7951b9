"""``emd-retrieval extract``."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from emd_retrieval.cli.options import add_feature_options, add_work_options

EXAMPLES = """examples:
  all images below a folder, 14 nodes an image, half precision:
    emd-retrieval extract --images photos/ --store photos.store --backbone resnet50.tv_in1k
  a list of paths, a quarter of the room, weights from a file:
    emd-retrieval extract --images list.txt --store small.store --codec int8 \\
        --backbone resnet50 --weights resnet50.safetensors
  two processes of one machine, or of many that share the folder:
    torchrun --nproc-per-node 2 -m emd_retrieval.cli extract --images photos/ --store photos.store
"""


def add_command(commands: Any) -> argparse.ArgumentParser:
    """Add ``extract`` to the command line."""
    parser: argparse.ArgumentParser = commands.add_parser(
        "extract",
        help="images to a local-feature store",
        description="Extract local features into a store. A killed run goes on where it was.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--images", type=Path, required=True, metavar="PATH",
        help="a folder; a text file, a path a line; or .parquet/.csv: path, and id if wanted",
    )  # fmt: skip
    parser.add_argument("--store", type=Path, required=True, metavar="DIR", help="the store")

    features = parser.add_argument_group("features")
    add_feature_options(features)

    stored = parser.add_argument_group("store")
    stored.add_argument(
        "--codec", default="float16", choices=["float32", "float16", "int8"], help="(float16)"
    )
    stored.add_argument(
        "--global-vectors", action=argparse.BooleanOptionalAction, default=True,
        help="store the pooled vectors too (yes)",
    )  # fmt: skip
    stored.add_argument(
        "--shard", metavar="I/N", help="this process's share, 0/N to N-1/N (torchrun: by itself)"
    )

    add_work_options(parser.add_argument_group("work"))
    parser.set_defaults(run=partial(run, default=parser.get_default))
    return parser


def run(options: argparse.Namespace, default: Callable[[str], Any]) -> None:
    """Extract, and say what was stored.

    Args:
        options: What the user chose.
        default: Gives an option's value where the user chose nothing.
    """
    from emd_retrieval import workflows
    from emd_retrieval.cli.options import feature_settings, set_threads, work_settings

    set_threads(options.threads)
    part, parts = _shard(options.shard)
    done = workflows.extract_images(
        workflows.ExtractImages(
            images=options.images,
            store=options.store,
            **feature_settings(options, default, device=_local_device(options.device)),
            **work_settings(options),
            codec=options.codec,
            global_vectors=options.global_vectors,
            part=part,
            parts=parts,
        )
    )
    whose = "" if parts == 1 else f" of shard {part}/{parts}"
    print(f"{done.stored} images{whose} stored in {done.path}, {done.there} were there already")
    if done.skipped:
        from emd_retrieval.workflows.extract import SKIPPED

        print(f"{len(done.skipped)} unreadable images left out, listed in {SKIPPED}")
    if not done.joined:
        print("the store is there once the other shards are done")
    elif parts > 1:
        print(f"all {parts} shards are done; the store is whole")


def _shard(text: str | None) -> tuple[int, int]:
    """The share of this process: what the user says, or what torchrun does."""
    if text is None:
        return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    number, _, count = text.partition("/")
    if not (number.isdecimal() and count.isdecimal() and int(number) < int(count)):
        raise ValueError(f"--shard: expected I/N with I from 0 to N - 1, as in 0/2; got {text!r}")
    return int(number), int(count)


def _local_device(name: str | None) -> str | None:
    """Under torchrun every process of a machine takes a GPU of its own."""
    import torch

    local = os.environ.get("LOCAL_RANK")
    if name is not None or local is None or not torch.cuda.is_available():
        return name
    return f"cuda:{int(local) % torch.cuda.device_count()}"
