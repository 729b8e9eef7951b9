"""A few-shot run: a stage of a recipe to a folder that is a model. Killed, it goes on.

Pre-training starts from the recipe's weights, meta-training from a pre-trained run.
"""

from __future__ import annotations

import csv
import hashlib
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor

from emd_retrieval._checksums import check_checkpoint, load_tensors, save_tensors
from emd_retrieval._files import check_folder, write_text
from emd_retrieval.datasets import ImageCollection, ImageDataset
from emd_retrieval.features import Extractor, build_extractor, extract_features, load_backbone
from emd_retrieval.features.extraction import default_workers
from emd_retrieval.fewshot.emd_classifiers import EMDNearest
from emd_retrieval.fewshot.episodes import Episodes, draw_episodes
from emd_retrieval.fewshot.evaluation import EpisodeScores, evaluate_episodes
from emd_retrieval.fewshot.named import build_classifier
from emd_retrieval.fewshot.recipe import FewshotRecipe, fewshot_recipe_from_dict
from emd_retrieval.fewshot.stages import (
    EpisodeBatches,
    ImageBatches,
    MetaTrainingStage,
    PretrainingStage,
    Stage,
    StageData,
)
from emd_retrieval.fewshot.views import MemoryViews, training_views, views_of
from emd_retrieval.records import package_versions
from emd_retrieval.settings import read_yaml
from emd_retrieval.training.draws import number_of
from emd_retrieval.training.lightning_tools import StepProgress, quiet_lightning, torch_threads
from emd_retrieval.training.model import (
    RECIPE_FILE,
    SUMMARY_FILE,
    WEIGHTS_FILE,
    check_recipe_file,
    read_summary,
    write_summary,
)
from emd_retrieval.training.monitor import BEST_FILE, CHECKPOINT_FILE, LOG_FILE
from emd_retrieval.training.recipe import RANDOM_WEIGHTS
from emd_retrieval.training.run_lock import only_writer
from emd_retrieval.training.trunk_cache import state_checksum

_LOG = logging.getLogger(__name__)
_COLUMNS = ("step", "loss", "accuracy", "learning_rate", "seconds", "validation", "interval")
_SAVED = {"float32": torch.float32, "float16": torch.float16}


@dataclass(frozen=True, kw_only=True)
class Place:
    """Where and how a stage computes; nothing of it is part of a recipe.

    Attributes:
        accelerator: Lightning's name of the device kind: ``"cpu"`` or ``"cuda"``.
        workers: Loading processes; by the machine's cores by default.
        threads: CPU threads of torch; as they are by default.
        compiled: Compile the backbone.
    """

    accelerator: str = "cpu"
    workers: int | None = None
    threads: int | None = None
    compiled: bool = False


@dataclass(frozen=True)
class FewshotRun:
    """A finished run.

    Attributes:
        path: Its folder.
        extractor: With its best weights, in evaluation mode.
        recipe: What it was trained by.
        summary: ``run.json``: stage, steps, best step, validation, data, seconds, versions.
    """

    path: Path
    extractor: Extractor
    recipe: FewshotRecipe
    summary: dict[str, Any]


def pretrain(
    recipe: FewshotRecipe,
    run: str | Path,
    *,
    data: ImageCollection,
    validation: ImageCollection | None = None,
    weights: str | Path | None = None,
    place: Place | None = None,
    description: str | None = "pre-training",
) -> FewshotRun:
    """Pre-train by a recipe, or go on with a run that was killed; a finished one is loaded.

    Args:
        recipe: What to do.
        run: The run's folder.
        data: Images of the base classes.
        validation: Images of the validation classes; not needed with ``validation.episodes`` 0.
        weights: A weights file in place of the recipe's.
        place: Where to compute.
        description: Name of the progress bar.

    Raises:
        ValueError: If the folder holds another run, one from other ``weights`` among them, or the
            data cannot give the episodes.
        NonFiniteLossError: If a loss is not finite.
        StoreLockedError: If another process trains in the run's folder.
    """
    run = Path(run)
    finished = _finished(recipe, "pretrain", run, data)
    if finished is not None and weights is None:
        return finished
    settings = recipe.pretraining
    extractor = _extractor(_as_map(recipe), weights=weights)
    begun = state_checksum(extractor.backbone)
    if finished is not None:
        # Runs of earlier versions do not say.
        if finished.summary.get("weights_sha256", begun) != begun:
            raise ValueError(f"run: {run} started from other weights than those of {weights}")
        return finished
    validator = _validator(_as_map(recipe), extractor, validation, settings.bf16, place)
    labels, classes = _dense_labels(data)
    source = training_views(data, extractor, recipe.views, number_of("pretrain", recipe.seed))
    stage = PretrainingStage(
        extractor, source, settings, images=len(data), classes=classes, seed=recipe.seed
    )
    batches = ImageBatches(labels, settings.batch_size, recipe.seed)
    monitor = _Monitor(
        run,
        every=settings.validate_every * settings.epoch_steps(len(data)),
        steps=settings.num_steps(len(data)),
        validate=validator,
        validate_first=False,
        save=lambda path: _save(extractor, recipe, path),
    )
    return _run(
        recipe, "pretrain", run, data, stage, batches, monitor, place, description, 1,
        {"weights_sha256": begun},
    )  # fmt: skip


def meta_train(
    recipe: FewshotRecipe,
    run: str | Path,
    *,
    data: ImageCollection,
    start: FewshotRun,
    validation: ImageCollection | None = None,
    place: Place | None = None,
    description: str | None = "meta-training",
) -> FewshotRun:
    """Meta-train by a recipe, or go on with a run that was killed; a finished one is loaded.

    Args:
        recipe: What to do.
        run: The run's folder.
        data: Images of the base classes.
        start: The pre-trained run whose weights it starts from.
        validation: Images of the validation classes; not needed with ``validation.episodes`` 0.
        place: Where to compute.
        description: Name of the progress bar.

    Raises:
        ValueError: If the folder holds another run, ``start`` is of another backbone, image size
            or data set, or the data cannot give the episodes.
        NonFiniteLossError: If a loss is not finite.
        StoreLockedError: If another process trains in the run's folder.
    """
    run = Path(run)
    check_fits(recipe, start)
    if (finished := _finished(recipe, "train", run, data, start)) is not None:
        return finished
    settings = recipe.meta_training
    episodes = draw_episodes(
        data.labels,
        way=settings.way,
        shot=settings.shot,
        queries=settings.queries,
        count=settings.episodes,
        seed=number_of("training episodes", recipe.seed),
    )
    extractor = _extractor(recipe, pretrained=False)
    extractor.load_state_dict(start.extractor.state_dict())
    validator = _validator(recipe, extractor, validation, settings.bf16, place)
    source = training_views(data, extractor, recipe.views, number_of("train", recipe.seed))
    matcher = settings.matcher(recipe.matching)
    stage = MetaTrainingStage(
        extractor,
        source,
        settings,
        build_classifier(settings.classifier, matcher),
        seed=recipe.seed,
        frozen_batch_norm=recipe.model.frozen_batch_norm,
    )
    monitor = _Monitor(
        run,
        every=max(1, settings.validate_every // settings.accumulate),
        steps=settings.steps,
        validate=validator,
        validate_first=True,
        save=lambda path: _save(extractor, recipe, path),
        start=_weights_sha(start.path),
    )
    return _run(
        recipe, "train", run, data, stage, EpisodeBatches(episodes), monitor, place, description,
        settings.accumulate, {"start": start.path.name, "start_sha256": monitor.start},
    )  # fmt: skip


def load_fewshot_run(run: str | Path) -> FewshotRun:
    """Load a finished run.

    Raises:
        FileNotFoundError: If it has not finished.
        ValueError: If its files do not fit each other.
    """
    run = Path(run)
    summary = read_summary(run)
    if "stage" not in summary:
        raise ValueError(f"run: {run} is no few-shot run; expected one of pretrain or train")
    check_recipe_file(run, summary)
    recipe = read_run_recipe(run)
    extractor = _extractor(
        _as_map(recipe) if summary["stage"] == "pretrain" else recipe, pretrained=False
    )
    _load(extractor, run / WEIGHTS_FILE)
    return FewshotRun(run, extractor.eval(), recipe, summary)


def with_extractor(run: FewshotRun, recipe: FewshotRecipe) -> Extractor:
    """A run's backbone below the extractor of another recipe: one set of weights serves all three.

    Raises:
        ValueError: If the recipe is of another backbone or image size.
    """
    check_fits(recipe, run, same_data=False)
    extractor = _extractor(recipe, pretrained=False)
    extractor.load_state_dict(run.extractor.state_dict())
    return extractor.eval()


def read_run_recipe(run: Path) -> FewshotRecipe:
    """The recipe that a run keeps."""
    return fewshot_recipe_from_dict(read_yaml(run / RECIPE_FILE))


def check_fits(recipe: FewshotRecipe, start: FewshotRun, *, same_data: bool = True) -> None:
    """Whether a run's weights serve a recipe.

    Raises:
        ValueError: If backbone, image size or (where it matters) data set are others.
    """
    theirs = start.recipe
    pairs = [
        ("model.backbone", recipe.model.backbone, theirs.model.backbone),
        ("model.layer", recipe.model.layer, theirs.model.layer),
    ]
    if recipe.model.method == "fcn" and (theirs.model.method == "fcn" or _is_pretrained(start)):
        pairs.append(("views.crop", recipe.views.crop, theirs.views.crop))
    if same_data:
        pairs.append(("data.name", recipe.data.name, theirs.data.name))
    wrong = [
        f"{key}: {mine!r} here, {other!r} there" for key, mine, other in pairs if mine != other
    ]
    if wrong:
        raise ValueError(
            f"run: the weights of {start.path} do not fit the recipe ({'; '.join(wrong)})"
        )


def validation_episodes(recipe: FewshotRecipe, labels: Tensor) -> Episodes:
    """The fixed episodes of the validation. Shape: ``[n]``."""
    settings = recipe.validation
    return draw_episodes(
        labels,
        way=settings.way,
        shot=1,
        queries=settings.queries,
        count=settings.episodes,
        seed=settings.seed,
    )


def _as_map(recipe: FewshotRecipe) -> FewshotRecipe:
    """Pre-training sees whole images, and is validated by DeepEMD-FCN on the map itself."""
    model = replace(recipe.model, method="fcn", pyramid=(), include_map=True)
    return replace(recipe, model=model)


def _is_pretrained(run: FewshotRun) -> bool:
    return bool(run.summary["stage"] == "pretrain")


def _extractor(
    recipe: FewshotRecipe, *, weights: str | Path | None = None, pretrained: bool = True
) -> Extractor:
    settings = recipe.model
    file = settings.weights if weights is None else weights
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(number_of("weights", recipe.seed))
        backbone = load_backbone(
            settings.backbone,
            weights=None if file == RANDOM_WEIGHTS or not pretrained else file,
            pretrained=pretrained and file != RANDOM_WEIGHTS,
            layer=settings.layer,
        )
    return build_extractor(
        settings.method,
        backbone,
        pyramid=settings.pyramid,
        include_map=settings.include_map,
        grid=settings.grid,
        patches=settings.patches,
        patch_size=settings.patch_size,
        context=settings.context,
        training_context=settings.training_context,
        scale=settings.scale,
        ratio=settings.ratio,
    )


def _dense_labels(data: ImageCollection) -> tuple[Tensor, int]:
    present, labels = np.unique(data.labels, return_inverse=True)
    return torch.from_numpy(labels), len(present)


def _validator(
    recipe: FewshotRecipe,
    extractor: Extractor,
    validation: ImageCollection | None,
    bf16: bool,
    place: Place | None,
) -> Callable[[], EpisodeScores] | None:
    settings = recipe.validation
    if not settings.episodes:
        return None
    if validation is None:
        raise ValueError(
            "validation: expected images of the validation classes, got none; validation.episodes "
            "0 trains without"
        )
    if settings.images_per_class is not None:
        validation = validation.first_of_each_class(settings.images_per_class)
    # Drawn now, so that data which cannot give them fail before the training.
    episodes = validation_episodes(recipe, torch.from_numpy(validation.labels.copy()))
    views = views_of(extractor, recipe.views)
    dataset = ImageDataset(
        validation, extractor.evaluation_transform(resize=views.resize, crop=views.crop)
    )
    workers = (place or Place()).workers

    def validate() -> EpisodeScores:
        device = next(extractor.parameters()).device
        features = extract_features(
            dataset,
            extractor,
            batch_size=100,
            device=device,
            bf16=bf16,
            num_workers=default_workers() if workers is None else workers,
            description="validating",
        )
        return evaluate_episodes(EMDNearest(recipe.matching), features.nodes.to(device), episodes)

    return validate


def _finished(
    recipe: FewshotRecipe,
    stage: str,
    run: Path,
    data: ImageCollection,
    start: FewshotRun | None = None,
) -> FewshotRun | None:
    """The run if it is there and whole; refuses to go on with what another one began."""
    check_folder(run, "run")
    if not (run / RECIPE_FILE).is_file():
        return None
    differences = recipe.differences(read_run_recipe(run), stage)
    if differences:
        shown = "; ".join(
            f"{key}: {mine!r} here, {other!r} there" for key, (mine, other) in differences.items()
        )
        raise ValueError(
            f"run: {run} holds a run of another recipe ({shown}). Take another folder, or remove "
            "that one"
        )
    if not (run / SUMMARY_FILE).is_file():
        return None
    (run / BEST_FILE).unlink(missing_ok=True)  # it may have been killed just before
    found = load_fewshot_run(run)
    if found.summary["stage"] != stage:
        raise ValueError(
            f"run: {run} is of the stage {found.summary['stage']!r}, expected {stage!r}"
        )
    if found.summary["data"]["sha256"] != data.describe()["sha256"]:
        raise ValueError(f"run: {run} was trained on other images than {data.name} has now")
    if start is not None and found.summary["start_sha256"] != _weights_sha(start.path):
        raise ValueError(f"run: {run} started from other weights than those of {start.path}")
    return found


def _run(
    recipe: FewshotRecipe,
    name: str,
    run: Path,
    data: ImageCollection,
    stage: Stage,
    batches: ImageBatches | EpisodeBatches,
    monitor: _Monitor,
    place: Place | None,
    description: str | None,
    accumulate: int,
    more: Mapping[str, Any] | None = None,
) -> FewshotRun:
    place = Place() if place is None else place
    with only_writer(run):
        write_text(run / RECIPE_FILE, recipe.to_yaml())
        workers = default_workers() if place.workers is None else place.workers
        # Slicing what is in memory costs less than handing it from one process to another.
        workers = 0 if isinstance(stage.source, MemoryViews) else workers
        stage.extractor.to(memory_format=torch.channels_last)
        if place.compiled:
            stage.extractor.backbone.compile()
        began = time.monotonic()
        checkpoint = run / CHECKPOINT_FILE
        callbacks: list[Any] = [monitor]
        if description is not None:
            callbacks.append(StepProgress(description, monitor.steps))
        with quiet_lightning(), torch_threads(place.threads), torch.random.fork_rng():
            trainer = lightning.Trainer(
                max_steps=monitor.steps,
                max_epochs=-1,
                accumulate_grad_batches=accumulate,
                accelerator=place.accelerator,
                devices=1,
                precision="bf16-mixed" if stage.settings.bf16 else "32-true",
                logger=False,
                enable_checkpointing=False,
                enable_progress_bar=False,
                enable_model_summary=False,
                callbacks=callbacks,
            )
            resume = str(checkpoint) if checkpoint.is_file() else None
            if resume is not None:
                check_checkpoint(checkpoint)
                _LOG.info("going on from %s", checkpoint)
            loader = StageData(batches, stage.source, accumulate=accumulate, workers=workers)
            # Backbones are built in evaluation mode, and Lightning leaves the mode as it is.
            stage.train()
            if monitor.steps:
                trainer.fit(stage, loader, ckpt_path=resume, weights_only=True)
        extractor = stage.extractor.cpu()
        if (run / BEST_FILE).is_file():
            _load(extractor, run / BEST_FILE)
        _save(extractor, recipe, run / WEIGHTS_FILE)
        write_summary(
            run,
            {
                "stage": name,
                "steps": trainer.global_step,
                "best_step": monitor.best_step if monitor.best else trainer.global_step,
                "validation": monitor.best,
                "data": data.describe(),
                "seconds": round(time.monotonic() - began, 1),
                "versions": package_versions(),
                **(more or {}),
            },
        )
        (run / BEST_FILE).unlink(missing_ok=True)
    return load_fewshot_run(run)


class _Monitor(Callback):
    """Validates, keeps the best weights, saves checkpoints and logs; its state is in them."""

    def __init__(
        self,
        run: Path,
        *,
        every: int,
        steps: int,
        validate: Callable[[], EpisodeScores] | None,
        validate_first: bool,
        save: Callable[[Path], None],
        start: str = "",
        log_every: int = 10,
    ) -> None:
        self.run = run
        self.every = every
        self.steps = steps
        self.validate = validate
        self.validate_first = validate_first
        self.save = save
        self.start = start
        self.log_every = log_every
        self.best: dict[str, float] | None = None
        self.best_step = 0
        self._seen = 0
        self._since = 0.0

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs."""
        return {"best": self.best, "best_step": self.best_step, "start": self.start}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ValueError: If it is of a run that started from other weights.
        """
        if state_dict["start"] != self.start:
            raise ValueError(
                f"run: {self.run} started from other weights; take another folder, or remove it"
            )
        self.best, self.best_step = state_dict["best"], state_dict["best_step"]

    def on_train_start(self, trainer: Any, *_: Any) -> None:
        """Open the log where the run stands."""
        self._seen = trainer.global_step
        rows = [row for row in read_fewshot_log(self.run) if int(row["step"]) <= self._seen]
        # What a killed run logged before its first checkpoint, at step 0 too, is logged again.
        rows = rows if self._seen else []
        lines = [",".join(_COLUMNS), *(",".join(row[c] for c in _COLUMNS) for row in rows)]
        write_text(self.run / LOG_FILE, "\n".join(lines) + "\n")
        if self._seen == 0 and self.validate_first:
            self._validate(0)
        self._since = time.monotonic()

    def on_train_batch_end(
        self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Log, and every so many steps validate and save."""
        step = trainer.global_step
        if step == self._seen:
            return
        self._seen = step
        if step % self.log_every == 0 or step in (1, self.steps):
            self._write(
                step,
                {
                    "loss": float(outputs["loss"]),
                    "accuracy": 100 * float(outputs["accuracy"]),
                    "learning_rate": trainer.optimizers[0].param_groups[0]["lr"],
                    "seconds": time.monotonic() - self._since,
                },
            )
        if step % self.every and step != self.steps:
            return
        began = time.monotonic()
        self._validate(step)
        partial = self.run / f".{CHECKPOINT_FILE}"
        trainer.save_checkpoint(partial)
        partial.replace(self.run / CHECKPOINT_FILE)
        self._since += time.monotonic() - began

    def _validate(self, step: int) -> None:
        if self.validate is None:
            return
        scores = self.validate()
        found = {"validation": 100 * scores.mean, "interval": 100 * scores.interval}
        self._write(step, found)
        if self.best is None or found["validation"] > self.best["validation"]:
            self.best, self.best_step = found, step
            self.save(self.run / BEST_FILE)

    def _write(self, step: int, values: Mapping[str, float]) -> None:
        row = {name: f"{value:.7g}" for name, value in values.items()}
        with (self.run / LOG_FILE).open("a", newline="", encoding="utf-8") as file:
            csv.DictWriter(file, _COLUMNS, lineterminator="\n").writerow({"step": step, **row})


def read_fewshot_log(run: Path) -> list[dict[str, str]]:
    """The rows of a run's log, as text; values that were not logged at a step are empty."""
    path = run / LOG_FILE
    if not path.is_file():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        # A killed process may leave half a line.
        return [row for row in csv.DictReader(file) if None not in row.values()]


def _save(extractor: Extractor, recipe: FewshotRecipe, path: Path) -> None:
    kind = _SAVED[recipe.model.saved]
    state = {
        name: (value.to(kind) if value.is_floating_point() else value).detach().cpu().contiguous()
        for name, value in extractor.state_dict().items()
    }
    save_tensors(path, state)


def _load(extractor: Extractor, path: Path) -> None:
    try:
        extractor.load_state_dict(load_tensors(path))
    except FileNotFoundError:
        raise
    except Exception as error:
        first = str(error).strip().splitlines()[0]
        raise ValueError(f"run: {path} does not fit its recipe ({first})") from error


def _weights_sha(run: Path) -> str:
    with (run / WEIGHTS_FILE).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
