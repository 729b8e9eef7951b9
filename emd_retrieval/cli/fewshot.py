"""``emd-retrieval fewshot``: ``pretrain``, ``train``, ``test``, ``table`` and ``figure``."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from emd_retrieval.cli.train import add_machine, machine_of

EXAMPLES = """examples:
  CIFAR-FS on two CPU cores, both stages, then 1-shot and 5-shot:
    emd-retrieval fewshot pretrain recipes/fewshot/cifar_fs_cpu.yaml --data cifar --run runs/pre
    emd-retrieval fewshot train recipes/fewshot/cifar_fs_cpu.yaml --data cifar \\
        --start runs/pre --run runs/fcn
    emd-retrieval fewshot test recipes/fewshot/cifar_fs_cpu.yaml --data cifar --run runs/fcn \\
        --shot 1,5
  other classifiers, 5- and 10-way:
    emd-retrieval fewshot test recipes/fewshot/cifar_fs_cpu.yaml --data cifar --run runs/pre \\
        --classifiers nearest,proto_net,knn --way 5,10
  across domains, on CUB:
    emd-retrieval fewshot test recipes/fewshot/cifar_fs_cpu.yaml data.name=cub --across \\
        --data CUB_200_2011 --run runs/fcn
  the paper's Table 2, and Figure 5; what is missing is trained first, runs are shared:
    emd-retrieval fewshot table 2 recipes/fewshot/cifar_fs_cpu.yaml --data cifar \\
        --runs runs/cifar_fs --output results/fewshot_table2
    emd-retrieval fewshot figure 5 recipes/fewshot/cifar_fs_cpu.yaml --data cifar \\
        --runs runs/cifar_fs --output results/fewshot_figure5
A killed run goes on where it was: give the same command again. --seed N (not 0) trains with seed N.
"""


def add_commands(commands: Any) -> list[argparse.ArgumentParser]:
    """Add ``fewshot`` to the command line.

    Returns:
        The parsers of its own commands.
    """
    group = commands.add_parser(
        "fewshot",
        help="few-shot recognition: pre-train, meta-train, test",
        description="Few-shot recognition by recipe: pre-train, meta-train, test on episodes.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    own = group.add_subparsers(title="commands", metavar="COMMAND", required=True)
    return [
        _add(own, "pretrain", "classify the base classes", _pretrain),
        _add(own, "train", "meta-train a pre-trained run on episodes", _train),
        _add(own, "test", "accuracy of a run over test episodes", _test),
        _add_results(own, "table", "a table of the paper, ours beside it", _table),
        _add_results(own, "figure", "Figure 5, accuracy by support images", _figure),
    ]


def _add(own: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = own.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="in place of the recipe's settings"
    )
    parser.add_argument("--run", dest="folder", type=Path, required=True, metavar="DIR",
                        help="the run's folder: model, record, log")  # fmt: skip
    parser.add_argument("--method", metavar="WORD", help="fcn, grid or sampling (the recipe's)")
    if name == "test":
        parser.add_argument("--output", type=Path, metavar="DIR", help="of the record (the run's)")
        parser.add_argument("--classifiers", default="", metavar="NAMES",
                            help="comma-separated (nearest at one shot, sfc at more)")  # fmt: skip
        parser.add_argument("--way", default="5", metavar="N,N", help="classes an episode (5)")
        parser.add_argument("--shot", default="1", metavar="N,N", help="images a class (1)")
        parser.add_argument("--split", default="test", help="train, val or test (test)")
        parser.add_argument(
            "--record", default="", metavar="N,N", help="keep episodes, for explain --episode"
        )
        parser.add_argument(
            "--across", action="store_true", help="the run is of another data set, as meant"
        )
    else:
        parser.add_argument("--compile", action="store_true", help="compile the backbone")
    if name == "train":
        parser.add_argument(
            "--start", type=Path, required=True, metavar="DIR", help="the pre-trained run"
        )
    add_machine(parser)
    parser.set_defaults(run=run)
    return parser


def _add_results(own: Any, name: str, text: str, run: Any) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = own.add_parser(
        name,
        help=text,
        description=f"{text[0].upper()}{text[1:]}. What is missing is trained first.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    which = "1, 2, 3, 4, 5 or 7" if name == "table" else "5"
    parser.add_argument("number", type=int, metavar="N", help=which)
    parser.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML file")
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="in place of the recipe's settings"
    )
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="of the record")
    parser.add_argument("--runs", type=Path, default=Path("runs/fewshot"), metavar="DIR",
                        help="runs and scores, shared by all tables (runs/fewshot)")  # fmt: skip
    parser.add_argument("--stage", default="train", metavar="WORD",
                        help="pretrain: test pre-trained weights only (train)")  # fmt: skip
    parser.add_argument("--episodes", type=int, metavar="N", help="at most, a cell (the recipe's)")
    parser.add_argument("--rows", default="", metavar="TEXT",
                        help="only rows whose name contains one of these, split by ;")  # fmt: skip
    if name == "table":
        parser.add_argument("--target", default="cub", metavar="NAME",
                            help="Table 5: the data set to test on (cub)")  # fmt: skip
        parser.add_argument("--target-data", type=Path, metavar="DIR", help="Table 5: its folder")
    else:
        parser.add_argument("--shot", default="1,2,3,5,10", metavar="N,N", help="(1,2,3,5,10)")
    add_machine(parser)
    parser.set_defaults(run=run)
    return parser


def _pretrain(options: argparse.Namespace) -> None:
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    print_record(workflows.fewshot_pretrain(_stage(options)), options.folder)


def _train(options: argparse.Namespace) -> None:
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    print_record(workflows.fewshot_train(_stage(options)), options.folder)


def _test(options: argparse.Namespace) -> None:
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    seed = [f"test.seed={options.seed}"] if options.seed else []
    record = workflows.fewshot_test(
        workflows.FewshotTrial(
            recipe=options.recipe,
            run=options.folder,
            output=options.output,
            classifiers=names(options.classifiers),
            ways=numbers("--way", options.way),
            shots=numbers("--shot", options.shot),
            split=options.split,
            across=options.across,
            record=numbers("--record", options.record) if options.record else (),
            method=options.method,
            overrides=(*options.overrides, *seed),
            data=options.data,
            machine=machine_of(options),
        )
    )
    print_record(record, options.folder if options.output is None else options.output)


def _table(options: argparse.Namespace) -> None:
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    settings = _results(options, target=options.target, target_data=options.target_data)
    record = workflows.fewshot_table(options.number, settings, options.output)
    print_record(record, options.output)


def _figure(options: argparse.Namespace) -> None:
    from emd_retrieval import workflows
    from emd_retrieval.cli.printing import print_record

    if options.number != 5:
        raise ValueError(f"figure: expected 5, got {options.number}")
    settings = _results(options, shots=numbers("--shot", options.shot))
    print_record(workflows.fewshot_figure(settings, options.output), options.output)


def _results(options: argparse.Namespace, **more: Any) -> Any:
    from emd_retrieval import workflows

    seed = [f"seed={options.seed}"] if options.seed else []
    return workflows.FewshotTable(
        recipe=options.recipe,
        runs=options.runs,
        stage=options.stage,
        episodes=options.episodes,
        rows=tuple(part.strip() for part in options.rows.split(";") if part.strip()),
        overrides=(*options.overrides, *seed),
        data=options.data,
        machine=machine_of(options),
        **more,
    )


def _stage(options: argparse.Namespace) -> Any:
    from emd_retrieval import workflows

    seed = [f"seed={options.seed}"] if options.seed else []
    return workflows.FewshotStage(
        recipe=options.recipe,
        run=options.folder,
        start=getattr(options, "start", None),
        method=options.method,
        overrides=(*options.overrides, *seed),
        data=options.data,
        machine=machine_of(options),
        compiled=options.compile,
    )


def names(text: str) -> tuple[str, ...]:
    """The parts of a comma-separated list."""
    return tuple(part.strip() for part in text.split(",") if part.strip())


def numbers(option: str, text: str) -> tuple[int, ...]:
    """Whole numbers of a comma-separated list.

    Raises:
        ValueError: If a part is none, or there is none.
    """
    parts = names(text)
    if not parts or not all(part.isdecimal() for part in parts):
        raise ValueError(f"{option}: expected whole numbers such as 5,10, got {text!r}")
    return tuple(int(part) for part in parts)
