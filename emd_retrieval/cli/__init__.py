"""The command line: parse, call, print. What a command does lives in ``workflows``."""

from emd_retrieval.cli.main import main

__all__ = ["main"]
