import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from training.recipes import small_birds, small_recipe

from emd_retrieval.datasets import demo_birds
from emd_retrieval.training import (
    NonFiniteLossError,
    build_model,
    embed_collection,
    load_model,
    load_recipe,
    train,
)
from emd_retrieval.training.monitor import Monitor, read_log
from emd_retrieval.training.task import FeatureTable, MetricLearningTask
from emd_retrieval.training.trunk_cache import state_checksum

FINE_TUNED = {
    "model__frozen_trunk": False,
    "model__pyramid": [2],
    "optimization__steps": 6,
    "validation__every": 3,
}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tmp_path, cache):
    def start(name="run", keep_checkpoint=False, **changes):
        return train(
            small_recipe(**changes), tmp_path / name, data=small_birds(), cache=cache, workers=0,
            keep_checkpoint=keep_checkpoint,
        )  # fmt: skip

    return start


class Killed(BaseException):
    pass


def kill_at(step, monkeypatch):
    """End the process, as far as training can tell, after a step and its checkpoint."""
    whole = Monitor.on_train_batch_end

    def dying(self, trainer, *arguments):
        whole(self, trainer, *arguments)
        if trainer.global_step == step:
            raise Killed

    monkeypatch.setattr(Monitor, "on_train_batch_end", dying)


def state_of(path):
    return torch.load(path / "checkpoint.ckpt", weights_only=True)


def rows_of(path):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in read_log(path)]


@pytest.mark.parametrize(
    "changes",
    [
        {"optimization__accumulate": 2, "optimization__gradient_clip": 1.0},
        {
            "model__method": "raw",
            "loss": {"name": "normalized_softmax"},
            "optimization__images_per_class": 1,
            "optimization__optimizer": "rmsprop",
            "optimization__proxy_learning_rate": 0.01,
        },
        {**FINE_TUNED, "optimization__steps": 9, "model__frozen_batch_norm": False},
    ],
    ids=["cached sets, accumulated", "cached raw, proxies", "fine-tuned"],
)
def test_a_killed_run_ends_in_the_same_numbers(changes, run, monkeypatch, tmp_path):
    whole = run("whole", **changes, keep_checkpoint=True)
    kill = 8 if "model__frozen_trunk" in changes else 10
    with monkeypatch.context() as patch:
        kill_at(kill, patch)
        with pytest.raises(Killed):
            run("killed", **changes)
    assert not (tmp_path / "killed" / "run.json").exists()
    resumed = run("killed", **changes, keep_checkpoint=True)
    one, other = (state_of(path) for path in (whole.path, resumed.path))
    assert one["state_dict"].keys() == other["state_dict"].keys()
    for name, value in one["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
    assert one["callbacks"] == other["callbacks"]
    assert one["lr_schedulers"] == other["lr_schedulers"]
    states = (
        load_file(whole.path / "model.safetensors"),
        load_file(resumed.path / "model.safetensors"),
    )
    assert all(torch.equal(value, states[1][name]) for name, value in states[0].items())
    assert rows_of(whole.path) == rows_of(resumed.path)
    assert whole.summary["validation"] == resumed.summary["validation"]


@pytest.mark.parametrize("method", ["fcn", "raw", "grid", "sampling"])
def test_every_method_learns(method, run):
    found = run(
        model__method=method,
        loss={"name": "normalized_softmax"},
        optimization__steps=40,
        optimization__learning_rate=2e-2,
        validation__folds=0,
    )
    losses = [float(row["loss"]) for row in read_log(found.path)]
    assert max(losses[-2:]) < 0.75 * losses[0]
    assert found.summary["validation"] is None
    assert found.summary["best_step"] == found.summary["steps"] == 40


@pytest.mark.parametrize("frozen", [True, False])
def test_batch_norms_learn_statistics_unless_frozen(frozen, run):
    changes = {**FINE_TUNED, "model__frozen_batch_norm": frozen, "validation__folds": 0}
    after = run(**changes).model.extractor.state_dict()
    before = build_model(small_recipe(**changes)).extractor.state_dict()
    statistics = [name for name in before if name.endswith("running_mean")]
    assert statistics
    assert all(torch.equal(before[name], after[name]) is frozen for name in statistics)


@pytest.mark.parametrize("what", ["images", "weights"])
def test_a_killed_run_does_not_go_on_with_other(what, run, monkeypatch, tmp_path, cache):
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            run("killed")
    data, weights = small_birds(), None
    if what == "images":
        data = demo_birds(8, 6, size=48, seed=9)
    else:
        other = build_model(small_recipe(seed=7)).extractor.backbone.model
        weights = tmp_path / "other.safetensors"
        save_file({name: part.contiguous() for name, part in other.state_dict().items()}, weights)
    with pytest.raises(ValueError, match=f"was begun with other {what}; take another folder"):
        train(
            small_recipe(), tmp_path / "killed", data=data, cache=cache, weights=weights, workers=0
        )


def test_the_logged_loss_is_that_of_a_batch_however_many_make_a_step(run):
    first = [
        float(read_log(run(f"run{n}", optimization__accumulate=n).path)[1]["loss"]) for n in (1, 4)
    ]
    assert first[1] > 0.6 * first[0]


def test_fine_tuning_moves_the_trunk_and_keeps_batch_norms(run):
    found = run(**FINE_TUNED, keep_checkpoint=True)
    before = build_model(small_recipe(**FINE_TUNED)).extractor
    after = found.model.extractor
    norms = {
        name for name, part in before.named_modules() if isinstance(part, torch.nn.BatchNorm2d)
    }
    for name, value in before.state_dict().items():
        if name.rpartition(".")[0] in norms:
            assert torch.equal(value, after.state_dict()[name]), name
    # The best step may be the untrained one; the checkpoint has the last.
    name, first = next(before.named_parameters())
    assert name.startswith("backbone.")
    assert not torch.equal(state_of(found.path)["state_dict"][f"network.extractor.{name}"], first)


def test_bf16_and_worker_processes(tmp_path):
    recipe = small_recipe(
        **{
            **FINE_TUNED,
            "optimization__steps": 2,
            "optimization__bf16": True,
            "optimization__gradient_clip": 1.0,
            "validation__folds": 0,
        }
    )
    with_workers = train(recipe, tmp_path / "two", data=small_birds(), workers=2)
    alone = train(recipe, tmp_path / "none", data=small_birds(), workers=0)
    one, other = (run.model.extractor.state_dict() for run in (with_workers, alone))
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    assert all(value.dtype in (torch.float32, torch.int64) for value in one.values())


def test_gradients_are_clipped_in_bf16_too(run, monkeypatch):
    norms = []
    clip = torch.nn.utils.clip_grad_norm_

    def clipped(parameters, most):
        clip(parameters, most)
        squares = [p.grad.square().sum() for p in parameters if p.grad is not None]
        norms.append(torch.stack(squares).sum().sqrt().item())

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clipped)
    run(optimization__gradient_clip=1e-3, optimization__bf16=True, optimization__steps=3)
    assert len(norms) == 3
    assert 0 < max(norms) < 1.001e-3


def test_a_finished_run_is_a_model(run, cache):
    found = run(model__method="fcn")
    loaded = load_model(found.path)
    assert loaded.recipe == load_recipe(found.path / "recipe.yaml") == found.model.recipe
    birds = small_birds().select_classes("1-2")
    one, other = (embed_collection(model, birds) for model in (found.model, loaded))
    assert torch.equal(one.nodes, other.nodes)
    assert loaded.similarity == "emd"
    assert torch.equal(loaded.similarities(one), loaded.matcher.all_pairs(one.nodes))
    assert set(loaded.evaluate(one).mean) == {"P@1", "RP", "MAP@R"}
    summary = json.loads((found.path / "run.json").read_text())
    assert summary["data"]["images"] == len(small_birds())
    assert len(summary["held_out_classes"]) == 2
    assert summary["weights"]["file"] == "test_resnet"
    assert list(load_file(found.path / "model.safetensors")) == ["embedder.bias", "embedder.weight"]


def test_a_finished_run_is_not_trained_again(run, monkeypatch):
    found = run()
    monkeypatch.setattr(MetricLearningTask, "training_step", None)
    assert run().summary == found.summary


def test_the_mean_of_nodes_is_compared_by_cosine(run):
    model = run(similarity="mean").model
    features = embed_collection(model, small_birds())
    vectors = F.normalize(features.nodes.mean(dim=1), dim=1)
    torch.testing.assert_close(model.similarities(features), vectors @ vectors.mT)
    part = features.subset(torch.arange(5))
    torch.testing.assert_close(model.similarities(part, features), vectors[:5] @ vectors.mT)


def test_early_stopping_keeps_the_best_weights(run, monkeypatch):
    values = iter([10.0, 12.0, 11.0, 12.0, 9.0, 50.0])
    monkeypatch.setattr(
        "emd_retrieval.training.model.TrainedModel.evaluate",
        lambda *_, **__: type(
            "Scores", (), {"mean": dict.fromkeys(("P@1", "RP", "MAP@R"), next(values))}
        ),
    )
    seen = {}
    save = Monitor.on_train_batch_end

    def keep(self, trainer, module, *arguments):
        save(self, trainer, module, *arguments)
        seen[trainer.global_step] = module.network.embedder.weight.detach().clone()

    monkeypatch.setattr(Monitor, "on_train_batch_end", keep)
    found = run(optimization__steps=40, validation__patience=3)
    assert found.summary["stopped_early"]
    assert found.summary["steps"] == 16, "validated at 0, 4, ..., 16"
    assert found.summary["best_step"] == 4
    assert torch.equal(found.model.extractor.embedder.weight, seen[4])


def test_proxies_have_their_own_rate_and_no_decay(tmp_path):
    from emd_retrieval.metric_learning import LossSettings, build_loss

    recipe = small_recipe(
        loss={"name": "normalized_softmax"},
        optimization__proxy_learning_rate=0.5,
        optimization__weight_decay=0.1,
    )
    loss = build_loss(LossSettings(name="normalized_softmax"), num_classes=3, channels=4)
    task = MetricLearningTask(torch.nn.Linear(4, 4), loss, recipe.optimization, run=tmp_path)
    network, proxies = task.configure_optimizers()["optimizer"].param_groups
    assert (network["initial_lr"], network["weight_decay"]) == (1e-3, 0.1)
    assert (proxies["initial_lr"], proxies["weight_decay"]) == (0.5, 0.0)
    assert [p.shape for p in proxies["params"]] == [(4, 3)]


def test_proxies_may_start_at_class_means(run, monkeypatch):
    started = {}
    start = Monitor.on_train_start

    def look(self, trainer, module, *arguments):
        start(self, trainer, module, *arguments)
        started["proxies"] = module.loss.proxies()[0].detach().clone()

    monkeypatch.setattr(Monitor, "on_train_start", look)
    found = run(
        model__method="raw",
        loss={"name": "normalized_softmax"},
        optimization__proxy_start="class_means",
        optimization__steps=1,
        validation__folds=0,
    )
    features = embed_collection(build_model(found.model.recipe), small_birds())
    mean = features.global_vectors[features.labels == 2].mean(dim=0)
    torch.testing.assert_close(started["proxies"][:, 2], mean, rtol=1e-3, atol=1e-4)


def test_a_run_of_another_recipe_is_refused(run, monkeypatch, tmp_path):
    with monkeypatch.context() as patch:
        kill_at(4, patch)
        with pytest.raises(Killed):
            run()
    with pytest.raises(
        ValueError, match=r"another recipe \(seed: 1 here, 0 there\)\. Take another folder"
    ):
        run(seed=1)
    run(notes="A note changes nothing.")
    with pytest.raises(ValueError, match="was trained on other images"):
        train(small_recipe(), tmp_path / "run", data=small_birds().select_classes("1-6"))


def test_a_loss_that_is_not_finite_leaves_its_batch(run, monkeypatch, tmp_path):
    at = FeatureTable.at

    def broken(self, rows, views=None):
        features = at(self, rows, views)
        features[2] = float("nan")
        return features

    monkeypatch.setattr(FeatureTable, "at", broken)
    with pytest.raises(NonFiniteLossError, match=r"not finite at step 0; .*non_finite_batch"):
        run()
    batch = load_file(tmp_path / "run" / "non_finite_batch.safetensors")
    assert batch["embeddings"].shape == (8, 5 * 16)
    assert batch["embeddings"].isnan().any(dim=1).nonzero().squeeze(1).tolist() == [2]
    labels = torch.from_numpy(small_birds().labels.copy())
    # Rows tell which images they were: same class, same training label.
    same = labels[batch["rows"]].unsqueeze(1) == labels[batch["rows"]]
    assert torch.equal(same, batch["labels"].unsqueeze(1) == batch["labels"])


def test_too_few_classes(tmp_path):
    with pytest.raises(ValueError, match=r"need 4 classes to train on, got 3"):
        train(small_recipe(validation__folds=0), tmp_path, data=small_birds().select_classes("1-3"))


def test_the_trunk_of_a_frozen_run_is_held_to_its_weights(tmp_path, cache, run):
    model = build_model(small_recipe())
    file = tmp_path / "trunk.safetensors"

    def write(change=0.0):
        state = model.extractor.backbone.model.state_dict()
        name = next(iter(state))
        state[name] = state[name] + change
        save_file({name: value.contiguous() for name, value in state.items()}, file)

    write()
    found = run(model__weights=str(file))
    assert found.summary["weights"]["file"] == "trunk.safetensors"
    assert found.summary["weights"]["backbone_sha256"] == state_checksum(model.extractor.backbone)
    moved = file.rename(tmp_path / "moved.safetensors")
    with pytest.raises(FileNotFoundError, match=r"pass the file 'trunk\.safetensors' as weights"):
        load_model(found.path)
    again = load_model(found.path, weights=moved)
    assert torch.equal(again.extractor.embedder.weight, found.model.extractor.embedder.weight)
    write(change=0.1)
    with pytest.raises(ValueError, match="was trained on other weights of test_resnet"):
        load_model(found.path)
    save_file({"embedder.weight": torch.zeros(3, 4)}, found.path / "model.safetensors")
    with pytest.raises(ValueError, match=r"does not fit its recipe: .*embedder\.weight \[3, 4\]"):
        load_model(found.path, weights=moved)


def test_a_run_that_has_not_finished_is_no_model(tmp_path):
    with pytest.raises(FileNotFoundError, match="is not there"):
        load_model(tmp_path / "absent")
    with pytest.raises(FileNotFoundError, match="has not finished; start it again"):
        load_model(tmp_path)


_TWO_PROCESSES = """
import sys
from pathlib import Path
from emd_retrieval.training import train
from training.recipes import small_birds, small_recipe

changes = {changes!r}
if __name__ == "__main__":
    run, cache = map(Path, sys.argv[1:])
    train(small_recipe(**changes), run, data=small_birds(), cache=cache, devices=2, workers=0,
          keep_checkpoint=True)
"""


# With longer steps rounding would grow into the later gradients.
SHORT = {
    "optimization__steps": 2,
    "optimization__learning_rate": 1e-5,
    "optimization__warmup_steps": 0,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes",
    [
        {**FINE_TUNED, **SHORT, "validation__folds": 3},
        {"loss": {"name": "normalized_softmax"}, **SHORT},
    ],
    ids=["fine-tuned, pairs", "cached, proxies"],
)
def test_two_processes_are_one(changes, run, tmp_path, cache):
    """Losses, validation and weights: pairs across processes count, and gradients are not off."""
    alone = run("alone", **changes, keep_checkpoint=True)
    script = tmp_path / "script.py"
    script.write_text(_TWO_PROCESSES.format(changes=changes))
    done = subprocess.run(
        [sys.executable, script, tmp_path / "two", cache],
        env={**_environment(), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=480,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((tmp_path / "two" / "run.json").read_text())["processes"] == 2
    for one, other in zip(rows_of(alone.path), rows_of(tmp_path / "two"), strict=True):
        assert one.keys() == other.keys()
        for name, value in one.items():
            if name in ("step", "loss", "learning_rate") and value:
                assert float(other[name]) == pytest.approx(float(value), rel=2e-4), (name, one)
    # Adam's first moments are the gradients; weights would hide their scale.
    one, other = (
        state_of(path)["optimizer_states"][0]["state"] for path in (alone.path, tmp_path / "two")
    )
    assert one.keys() == other.keys()
    for number, state in one.items():
        gradient, error = state["exp_avg"], other[number]["exp_avg"] - state["exp_avg"]
        assert error.norm() <= 5e-3 * gradient.norm() + 1e-7, number


def _environment():
    tests = Path(__file__).parents[1]
    paths = [str(tests), str(tests.parent), os.environ.get("PYTHONPATH", "")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
