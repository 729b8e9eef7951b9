"""What watches a run: validation with early stopping, checkpoints, and the logs."""

from __future__ import annotations

import csv
import logging
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import Callback

from emd_retrieval._files import write_text
from emd_retrieval.training.recipe import ValidationSettings

_LOG = logging.getLogger(__name__)
CHECKPOINT_FILE = "checkpoint.ckpt"
BEST_FILE = "best.safetensors"
LOG_FILE = "log.csv"
_COLUMNS = ("step", "loss", "learning_rate", "seconds", "P@1", "RP", "MAP@R")


class RunLog:
    """``log.csv`` and, where TensorBoard is installed, its event files, a row a logged step.

    Args:
        run: The run's folder.
        step: Where the run goes on; rows of later steps, of a killed process, are dropped.
    """

    def __init__(self, run: Path, step: int = 0) -> None:
        self._path = run / LOG_FILE
        # What a killed run logged before its first checkpoint, at step 0 too, is logged again.
        kept = [row for row in read_log(run) if int(row["step"]) <= step] if step else []
        lines = [",".join(_COLUMNS), *(",".join(row[c] for c in _COLUMNS) for row in kept)]
        write_text(self._path, "\n".join(lines) + "\n")
        self._board: Any = None
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            _LOG.info("TensorBoard is not installed; %s alone is written", LOG_FILE)
        else:
            self._board = SummaryWriter(str(run / "tensorboard"), purge_step=step + 1)

    def write(self, step: int, values: Mapping[str, float]) -> None:
        """Log some values of a step."""
        row = {name: f"{value:.7g}" for name, value in values.items()}
        with self._path.open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, _COLUMNS, lineterminator="\n").writerow({"step": step, **row})
        if self._board is not None:
            for name, value in values.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Finish the event files."""
        if self._board is not None:
            self._board.close()


def read_log(run: Path) -> list[dict[str, str]]:
    """The rows of a run's log, as text; values that were not logged at a step are empty."""
    path = run / LOG_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A killed process may leave half a line.
        return [row for row in csv.DictReader(file) if None not in row.values()]


class Monitor(Callback):
    """Validates, keeps the best weights, stops early, saves checkpoints and logs.

    All of its state travels in the checkpoints.

    Args:
        run: The run's folder.
        settings: How often, and when to stop.
        steps: Steps of the run.
        validate: Gives the metrics in percent; ``None`` validates nothing. Called on every process,
            which must all get the same answer.
        save_best: Writes the weights as they are to a file.
        log_every: Steps between logged losses.
        origin: Checksums of what a run starts from, by what to call it.

    Raises:
        ValueError: If a checkpoint is of a run that started from something else.
    """

    def __init__(
        self,
        run: Path,
        settings: ValidationSettings,
        steps: int,
        validate: Callable[[], dict[str, float]] | None,
        save_best: Callable[[Path], None],
        *,
        log_every: int = 10,
        origin: Mapping[str, str] | None = None,
    ) -> None:
        self.run = run
        self.settings = settings
        self.steps = steps
        self.validate = validate
        self.save_best = save_best
        self.log_every = log_every
        self.origin = dict(origin or {})
        self.best: dict[str, float] | None = None
        self.best_step = 0
        self.waited = 0
        self.stopped = False
        self._seen = 0
        self._log: RunLog | None = None
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {
            "best": self.best,
            "best_step": self.best_step,
            "waited": self.waited,
            "stopped": self.stopped,
            "origin": self.origin,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint."""
        state = dict(state_dict)
        before = state.pop("origin", {})
        others = [
            name for name in self.origin if before.get(name, self.origin[name]) != self.origin[name]
        ]
        if others:
            raise ValueError(
                f"run: {self.run} was begun with other {' and '.join(others)}; take another "
                "folder, or remove that one"
            )
        for name, value in state.items():
            setattr(self, name, value)

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Open the logs; a fresh run validates the untrained model first."""
        self._seen = trainer.global_step
        if trainer.is_global_zero:
            self._log = RunLog(self.run, trainer.global_step)
        if trainer.global_step == 0:
            self._validate(trainer)
        if self.stopped:
            trainer.should_stop = True
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and every so many steps validate and save."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if self._log is not None and (step % self.log_every == 0 or step == 1):
            seconds = time.monotonic() - self._since
            rate = trainer.optimizers[0].param_groups[0]["lr"]
            # Lightning hands out a batch's share of the step's loss.
            loss = float(outputs["loss"]) * trainer.accumulate_grad_batches
            self._log.write(step, {"loss": loss, "learning_rate": rate, "seconds": seconds})
        if step % self.settings.every and step != self.steps:
            return
        began = time.monotonic()
        self._validate(trainer)
        partial = self.run / f".{CHECKPOINT_FILE}"
        trainer.save_checkpoint(partial)
        if trainer.is_global_zero:
            partial.replace(self.run / CHECKPOINT_FILE)
        self._since += time.monotonic() - began

    def on_train_end(self, *_: Any) -> None:
        """Close the logs."""
        self._close()

    def on_exception(self, *_: Any) -> None:
        """Close the logs."""
        self._close()

    def _validate(self, trainer: Any) -> None:
        step = trainer.global_step
        if self.validate is None:
            return
        metrics = self.validate()
        if self._log is not None:
            self._log.write(step, metrics)
        name = self.settings.metric
        if self.best is None or metrics[name] > self.best[name]:
            self.best, self.best_step, self.waited = metrics, step, 0
            if trainer.is_global_zero:
                self.save_best(self.run / BEST_FILE)
            return
        self.waited += 1
        if self.waited >= self.settings.patience:
            self.stopped = trainer.should_stop = True

    def _close(self) -> None:
        if self._log is not None:
            self._log.close()
            self._log = None
