"""The recipes that ship: each is whole and typed, and those of the paper's setting run."""

import re
import shutil
from pathlib import Path

import pytest
import small_data
import yaml

from emd_retrieval.training import METHODS, load_recipe
from emd_retrieval.workflows import Machine, Table8, TrainRecipe, run_table8, train_recipe
from emd_retrieval.workflows.recipes import recipe_files

RETRIEVAL = Path(__file__).parents[1] / "recipes" / "retrieval"
FOLDERS = ["cub200_resnet50", "cub50_efficientnet_lite0", "cub50_finetuned"]
LOSSES = {
    "normalized_softmax", "contrastive", "soft_triple", "snr_contrastive", "arcface",
    "multi_similarity",
}  # fmt: skip
SMALL = (
    "model.weights=random", "model.patch_size=32", "model.patches=3", "views.resize=36",
    "views.crop=32", "optimization.steps=2", "optimization.batch_size=16",
    "data.classes_train=1-40", "data.classes_test=101-120",
)  # fmt: skip


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_recipe_a_loss(folder):
    files = recipe_files(RETRIEVAL / folder)
    assert set(files) == LOSSES
    assert all(path.stem == loss for loss, path in files.items())


@pytest.mark.parametrize("folder", FOLDERS)
@pytest.mark.parametrize("method", METHODS)
def test_the_method_is_one_word(folder, method):
    for path in recipe_files(RETRIEVAL / folder).values():
        recipe = load_recipe(path, method=method)
        assert recipe.model.method == method
        assert recipe.model.embedding_size == 128
        assert recipe.model.frozen_batch_norm
        assert recipe.model.frozen_trunk is (folder == "cub50_efficientnet_lite0")
        assert len(recipe.notes.split()) > 20, "where the hyper-parameters come from"


def test_the_papers_setting():
    for path in recipe_files(RETRIEVAL / "cub200_resnet50").values():
        recipe = load_recipe(path)
        assert recipe.model.backbone == "resnet50.tv_in1k"
        assert (recipe.data.classes_train, recipe.data.classes_test) == ("1-100", "101-200")
        assert recipe.model.pyramid == (3, 2, 1)
        assert recipe.model.grid == (3, 2)
        assert recipe.model.patches == 25
        assert (recipe.views.resize, recipe.views.crop) == (256, 227)
        assert recipe.optimization.optimizer == "rmsprop"
        assert recipe.optimization.learning_rate == 1e-6
        assert recipe.optimization.batch_size == 32


def test_finetuning_takes_the_losses_of_the_frozen_runs():
    for loss, path in recipe_files(RETRIEVAL / "cub50_finetuned").items():
        frozen = load_recipe(RETRIEVAL / "cub50_efficientnet_lite0" / f"{loss}.yaml")
        recipe = load_recipe(path)
        assert recipe.loss == frozen.loss
        assert recipe.optimization.steps <= 600
        assert recipe.optimization.batch_size == 32


def test_the_search_draws_settings_that_there_are():
    space = yaml.safe_load((RETRIEVAL / "search.yaml").read_text(encoding="utf-8"))
    assert set(space) == LOSSES | {"all"}
    for loss, path in recipe_files(RETRIEVAL / "cub50_efficientnet_lite0").items():
        for key, values in {**space["all"], **space[loss]}.items():
            for value in values:
                load_recipe(path, overrides=[f"{key}={value}"])


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "base.yaml").write_text(
        "model: {method: fcn, embedding_size: 8}\noptimization: {steps: 7}\nnotes: below\n"
        "methods: {grid: {optimization: {steps: 9}}}\n"
    )
    (tmp_path / "own.yaml").write_text(
        "base: base.yaml\nloss: {name: contrastive}\noptimization: {batch_size: 16}\nnotes: above\n"
    )
    return tmp_path


def test_settings_come_in_layers(folder):
    recipe = load_recipe(folder / "own.yaml")
    assert (recipe.model.method, recipe.model.embedding_size) == ("fcn", 8)
    assert (recipe.optimization.steps, recipe.optimization.batch_size) == (7, 16)
    assert recipe.notes == "below\nabove"
    assert load_recipe(folder / "own.yaml", method="grid").optimization.steps == 9
    override = ["optimization.steps=11"]
    chosen = load_recipe(folder / "own.yaml", method="grid", overrides=override)
    assert chosen.optimization.steps == 11
    by_override = load_recipe(folder / "own.yaml", overrides=["model.method=grid"])
    assert by_override.optimization.steps == 9
    assert list(recipe_files(folder)) == ["contrastive"]


def test_overrides_of_a_loss_count_in_any_order(folder):
    override = ["loss.parameters.beta=3", "loss.name=multi_similarity"]
    for overrides in (override, override[::-1]):
        loss = load_recipe(folder / "own.yaml", overrides=overrides).loss
        assert (loss.name, loss.parameters) == ("multi_similarity", {"beta": 3})


def test_a_loss_of_ones_own_takes_no_parameters_of_the_bases(folder):
    (folder / "base.yaml").write_text("loss: {name: arcface, parameters: {scale: 3}}\n")
    assert load_recipe(folder / "own.yaml").loss.parameters == {}
    (folder / "own.yaml").write_text("base: base.yaml\nloss: {parameters: {margin: 5}}\n")
    assert load_recipe(folder / "own.yaml").loss.parameters == {"scale": 3, "margin": 5}


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("base: other.yaml", {}, r"recipe: no file '.*other\.yaml', the base of .*own\.yaml$"),
        ("base: own.yaml", {}, r"recipe: .*own\.yaml is its own base, by way of .*own\.yaml$"),
        ("base: {a: 1}", {}, r"recipe: base of .* must be a file or a list of files, got \{'a'"),
        ("- 1", {}, r"recipe: .*own\.yaml holds no settings"),
        ("a: [", {}, r"recipe: .*own\.yaml is not YAML: "),
        ("seed: 1\nseed: 2", {}, r"recipe: .*own\.yaml is not YAML: 'seed' is written twice"),
        ("methods: 3", {}, r"recipe .*: methods: expected settings a method, got 3"),
        ("methods: {gird: {}}", {}, r"recipe .*: methods: .* got 'gird' \(did you mean 'grid'\?\)"),
        ("methods: {grid: 3}", {}, r"recipe .*: methods\.grid: expected settings, got 3"),
        ("loss: {name: arcfase}", {}, r"recipe .*: loss\.name: .*\(did you mean 'arcface'\?\)"),
        ("loss: {name: arcface}\nmodl: {}", {}, r"recipe .*: modl: .*did you mean 'model'\?"),
        ("loss: {name: arcface}", {"method": "fnc"}, r"method: .*\(did you mean 'fcn'\?\)"),
        ("loss: {name: arcface}", {"overrides": ["seed"]}, r"override: expected 'section\.key=va"),
        ("loss: {name: arcface}", {"overrides": ["seed=["]}, r"override: 'seed=\[' has a value"),
        ("loss: {name: arcface}", {"method": "fcn", "overrides": ["model.method=grid"]},
         r"method: expected one, got 'fcn' and the override 'grid'"),
    ],
)  # fmt: skip
def test_bad_recipes(text, options, message, tmp_path):
    path = tmp_path / "own.yaml"
    path.write_text(text)
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        load_recipe(path, **options)
    assert re.match(message, str(caught.value)), str(caught.value)


def test_two_recipes_of_one_loss(folder):
    shutil.copy(folder / "own.yaml", folder / "two.yaml")
    with pytest.raises(ValueError, match=r"^recipes: own\.yaml and two\.yaml in .* both train con"):
        recipe_files(folder)
    with pytest.raises(FileNotFoundError, match="no folder"):
        recipe_files(folder / "nowhere")
    (folder / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no recipe"):
        recipe_files(folder / "empty")


@pytest.fixture(scope="module")
def cub(tmp_path_factory):
    """Some classes of CUB's two halves in its layout, two small pictures each."""
    numbers = [*range(1, 41), *range(101, 121)]
    return small_data.write_cub(tmp_path_factory.mktemp("cub"), numbers)


@pytest.fixture
def folder_to_remove(tmp_path):
    """A ResNet-50 and its checkpoint are 500 MB a run, which pytest would keep for days."""
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("loss", sorted(LOSSES))
def test_the_papers_setting_runs(loss, cub, folder_to_remove):
    """Two steps of ResNet-50 with random weights, Raw and FCN."""
    settings = Table8(
        recipes=RETRIEVAL / "cub200_resnet50",
        runs=folder_to_remove / "runs",
        data=cub,
        losses=(loss,),
        methods=("raw", "fcn"),
        seeds=1,
        overrides=SMALL,
        machine=Machine(cache=folder_to_remove / "cache"),
    )
    record, failures = run_table8(settings)
    assert failures == {}
    assert len(record.table) == 2 * 3
    assert record.table["value"].between(0, 100).all()
    assert record.table["paper"].notna().all()
    assert record.settings["backbone"] == "resnet50.tv_in1k"


@pytest.mark.slow
@pytest.mark.parametrize("method", ["grid", "sampling"])
def test_patches_run(method, cub, folder_to_remove):
    record, scores = train_recipe(
        TrainRecipe(
            recipe=RETRIEVAL / "cub200_resnet50" / "multi_similarity.yaml",
            run=folder_to_remove / "run",
            method=method,
            overrides=(
                *SMALL, "optimization.batch_size=8", "data.classes_train=1-8",
                "data.classes_test=101-104", "validation.folds=2",
            ),
            data=cub,
            machine=Machine(cache=folder_to_remove / "cache"),
        )
    )  # fmt: skip
    assert scores is not None
    assert record.settings["model"]["method"] == method
    assert len(scores.per_query) == 8
