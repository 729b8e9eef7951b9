"""``emd-retrieval``: the parser, the one place that turns errors into exit codes, and dispatch."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import Any, NoReturn, TextIO

from emd_retrieval.progress import quiet


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command.

    Args:
        arguments: Without the program's name; the process's own by default.

    Returns:
        0 on success, 1 if the run failed, 2 for bad input, 130 after Ctrl-C.
    """
    parser = build_parser()
    options = parser.parse_args(arguments)
    warnings.showwarning = _show_warning
    # Libraries log chatter at INFO; a person sees progress bars and results instead.
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stderr)
    try:
        with quiet(options.quiet):
            options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:
        # The reader of our output has gone, as in `emd-retrieval ... | head`.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (ValueError, TypeError, FileNotFoundError, NotADirectoryError, PermissionError) as error:
        return _fail(error, 2, options.debug)
    except (RuntimeError, OSError, MemoryError) as error:
        return _fail(error, 1, options.debug)
    return 0


class _Parser(argparse.ArgumentParser):
    """Bad usage in one line, like every other bad input; argparse would print the usage as well."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"emd-retrieval: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """The whole command line."""
    # Imported here, so that `emd-retrieval --help` does not wait for torch.
    from emd_retrieval.cli import (
        demo,
        evaluate,
        explain,
        extract,
        fewshot,
        report,
        rerank,
        search,
        table8,
        train,
        tune,
    )

    parser = _Parser(
        prog="emd-retrieval",
        description="Image retrieval by the Earth Mover's Distance between sets of local features.",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="examples:\n"
        "  emd-retrieval demo\n"
        "  emd-retrieval evaluate --data CUB_200_2011 --classes 101-200",
    )
    parser.add_argument("--version", action="version", version=f"emd_retrieval {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for module in (demo, evaluate, extract, train, table8, rerank, search, tune, report, explain):
        command = module.add_command(commands)
        _add_common(command)
    for command in fewshot.add_commands(commands):
        _add_common(command)
    return parser


def _add_common(command: argparse.ArgumentParser) -> None:
    common = command.add_argument_group("running")
    common.add_argument(
        "--seed", type=_seed, default=0, help="seed of everything random (default 0)"
    )
    common.add_argument("--threads", type=int, metavar="N", help="CPU threads (default: all)")
    common.add_argument("--quiet", action="store_true", help="no progress bars")
    common.add_argument("--debug", action="store_true", help="on an error, show the traceback")


def _seed(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"expected a whole number, zero or more, got {text!r}")
    return int(text)


def _fail(error: BaseException, code: int, debug: bool) -> int:
    if debug:
        raise error
    text = " ".join(str(error).split()) or type(error).__name__
    print(f"emd-retrieval: error: {text}", file=sys.stderr)
    return code


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    if issubclass(category, UserWarning) and "emd_retrieval" in filename:
        print(f"emd-retrieval: warning: {message}", file=sys.stderr)
    else:
        logging.getLogger("py.warnings").info("%s", message)


def _version() -> str:
    from emd_retrieval import __version__

    return __version__


Subparsers = Any
