"""Hyper-parameters for Table 8 by random search on held-out training classes.

    python benchmarks/tune_table8.py --recipes recipes/retrieval/cub50_efficientnet_lite0 \
        --space recipes/retrieval/search.yaml --data CUB_200_2011 \
        --weights tf_efficientnet_lite0.safetensors --losses arcface --methods raw,fcn \
        --trials 30 --folds 0,1 --output runs/tune.csv

Test classes are never looked at. Trial n of a loss draws the same values for every method, so that
methods are held against each other on equal terms. A row is written when a trial ends; run the same
command again to go on, or with more trials.
"""

import argparse
import random
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import yaml

from emd_retrieval.progress import progress
from emd_retrieval.training import load_recipe
from emd_retrieval.workflows.recipes import recipe_files
from emd_retrieval.workflows.train import Machine, fit, load_data


def draw(space, loss, trial, seed):
    """One value of each list; trial 0 is the recipe as it is."""
    if trial == 0:
        return []
    generator = random.Random(f"{seed} {loss} {trial}")
    lists = {**space.get("all", {}), **space.get(loss, {})}
    return [f"{key}={generator.choice(values)}" for key, values in lists.items()]


def measure(recipe, overrides, method, folds, data, machine):
    """Mean validation metric over folds, and what else a row needs."""
    values, steps, start = [], [], time.perf_counter()
    for fold in folds:
        whole = [*overrides, f"validation.fold={fold}"]
        settings = load_recipe(recipe, method=method, overrides=whole)
        training, _ = load_data(settings, data)
        run = Path(tempfile.mkdtemp())
        try:
            trained = fit(settings, run, training, machine)
        finally:
            shutil.rmtree(run)
        values.append(trained.summary["validation"][settings.validation.metric])
        steps.append(trained.summary["best_step"])
    return {
        "value": float(np.mean(values)),
        "steps": " ".join(map(str, steps)),
        "seconds": round(time.perf_counter() - start, 1),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--recipes", type=Path, required=True)
    parser.add_argument("--space", type=Path, required=True)
    parser.add_argument("--data", type=Path)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--cache", type=Path, default=Path("runs/trunk_features"))
    parser.add_argument("--losses")
    parser.add_argument("--methods", default="raw,fcn")
    parser.add_argument("--trials", type=int, default=30)
    parser.add_argument("--folds", default="0")
    parser.add_argument("--override", action="append", default=[], metavar="key=value")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path, required=True)
    options = parser.parse_args()
    machine = Machine(cache=options.cache, weights=options.weights, device=options.device)
    files = recipe_files(options.recipes)
    space = yaml.safe_load(options.space.read_text(encoding="utf-8"))
    folds = [int(fold) for fold in options.folds.split(",")]
    losses = options.losses.split(",") if options.losses else list(files)
    rows = []
    if options.output.exists():
        rows = pd.read_csv(options.output).to_dict("records")
    done = {(row["loss"], row["method"], row["trial"]) for row in rows}
    todo = [
        (loss, method, trial)
        for trial in range(options.trials)
        for loss in losses
        for method in options.methods.split(",")
        if (loss, method, trial) not in done
    ]
    for loss, method, trial in progress(todo, "trials", unit="trial"):
        drawn = draw(space, loss, trial, options.seed)
        row = {"loss": loss, "method": method, "trial": trial, "settings": " ".join(drawn)}
        try:
            overrides = [*drawn, *options.override]
            row |= measure(files[loss], overrides, method, folds, options.data, machine)
        except (ValueError, RuntimeError) as error:
            # A draw that diverges is a result: nobody should choose it.
            row |= {"value": float("nan"), "error": str(error)[:200]}
        rows.append(row)
        options.output.parent.mkdir(parents=True, exist_ok=True)
        pd.DataFrame(rows).to_csv(options.output, index=False)
    table = pd.DataFrame(rows).sort_values("value", ascending=False)
    print(table.groupby(["loss", "method"]).head(3).sort_values(["loss", "method"]).to_string())


if __name__ == "__main__":
    main()
