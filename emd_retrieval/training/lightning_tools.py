"""What every use of Lightning here shares: our progress bar in place of its own, and quiet."""

from __future__ import annotations

import logging
import pickle
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.callbacks import Callback

from emd_retrieval.progress import progress_counter


class StepProgress(Callback):
    """The package's own progress bar in place of Lightning's; it counts optimiser steps.

    Args:
        description: What the work is.
        steps: Steps of the whole run.
    """

    def __init__(self, description: str, steps: int) -> None:
        self._counter = progress_counter(description, total=steps, unit="step")
        self._bar: Any = None

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Open the bar where the run stands."""
        self._bar = self._counter.__enter__()
        self._bar.update(trainer.global_step)

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        """Move it."""
        self._bar.update(trainer.global_step - self._bar.n)

    def on_train_end(self, *_: Any) -> None:
        """Close it."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Close it."""
        self._close()

    def _close(self) -> None:
        if self._bar is not None:
            self._bar = None
            self._counter.__exit__(None, None, None)


@contextmanager
def torch_threads(threads: int | None) -> Iterator[None]:
    """So many CPU threads of torch inside the block; as many as before without a number."""
    before = torch.get_num_threads()
    torch.set_num_threads(before if threads is None else threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def quiet_lightning() -> Iterator[None]:
    """Lightning's banners and tips are for those who call it; here the caller called us.

    Raises:
        ValueError: If a checkpoint that is gone on from asks for more than plain values.
    """
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", module="lightning")
            yield
    except pickle.UnpicklingError as error:
        # torch's own text advises to load the file without a guard.
        raise ValueError(
            "checkpoint: it asks for more than tensors and plain values, so it was not loaded; "
            "remove checkpoint.ckpt, and the run starts anew"
        ) from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
