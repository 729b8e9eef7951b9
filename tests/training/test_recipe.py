import pytest

from emd_retrieval.metric_learning import LossSettings
from emd_retrieval.training import Recipe, load_recipe, recipe_from_dict
from emd_retrieval.training.recipe import learning_rate_factor

LOSS = {"name": "multi_similarity", "parameters": {"beta": 40.0}}


@pytest.fixture
def file(tmp_path):
    def write(text="loss: {name: multi_similarity, parameters: {beta: 40.0}}\n"):
        path = tmp_path / "recipe.yaml"
        path.write_text(text, encoding="utf-8")
        return path

    return write


def test_yaml_reads_back_to_an_equal_recipe(file):
    recipe = recipe_from_dict(
        {
            "loss": {**LOSS, "miner": "multi_similarity", "miner_parameters": {"epsilon": 0.2}},
            "model": {"method": "sampling", "scale": [0.2, 0.9], "weights": None, "layer": -2},
            "notes": "From the first fold:\n  beta of 20, 40 and 60.\n",
            "data": {"root": "birds", "classes_train": 7},
        }
    )
    assert load_recipe(file(recipe.to_yaml())) == recipe
    assert recipe.data.classes_train == "7"
    assert recipe.differences(recipe) == {}


def test_what_is_left_out_has_the_papers_defaults(file):
    recipe = load_recipe(file())
    assert recipe == Recipe(loss=LossSettings(**LOSS))
    assert recipe.views.crop == 227
    assert recipe.model.pyramid == (3, 2, 1)


def test_overrides_are_read_as_yaml(file):
    recipe = load_recipe(
        file(),
        [
            "model.method=grid",
            "model.grid=[4, 2]",
            "loss.parameters.alpha=1e-2",
            "optimization.learning_rate=1e-6",
            "optimization.gradient_clip=null",
            "model.frozen_trunk=true",
            "loss.miner=multi_similarity",
        ],
    )
    assert recipe.model.method == "grid"
    assert recipe.model.grid == (4, 2)
    assert recipe.loss.parameters == {"beta": 40.0, "alpha": 0.01}
    assert recipe.optimization.learning_rate == 1e-6
    assert recipe.optimization.gradient_clip is None
    assert recipe.model.frozen_trunk is True
    assert recipe.loss.miner == "multi_similarity"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("optimization.learning_rat=1", r"recipe\.yaml: .*learning_rat: .*mean 'learning_rate'"),
        ("modle.method=raw", r"modle: no such setting; did you mean 'model'\?"),
        ("loss.parameters.bet=1", r"loss: parameter of the multi_similarity loss.*mean 'beta'"),
        ("matching.solver=simplx", r"matching\.solver: .*did you mean 'simplex'"),
        ("model.method=fnc", r"model\.method: .*did you mean 'fcn'"),
        ("model.layer=last", r"model\.layer: expected a whole number, got 'last'"),
        ("model.frozen_trunk=1", r"model\.frozen_trunk: expected true or false, got 1"),
        ("model.pyramid=3", r"model\.pyramid: expected a list, got 3"),
        ("views.scale=[0.5]", r"views\.scale: expected 2 values"),
        ("views.crop=300", r"views\.crop: expected 1 to views\.resize = 256"),
        ("optimization.batch_size=30", r"batch_size: expected two classes or more"),
        ("optimization.batch_size=4", r"batch_size: expected two classes or more"),
        ("optimization.images_per_class=1", r"images_per_class: expected 2 or more with the multi"),
        ("optimization.proxy_start=class_means", r"proxy_start: the multi_similarity loss has no"),
        ("validation.folds=1", r"validation\.folds: expected 2 or more, or 0"),
        ("validation.fold=4", r"validation\.fold: expected 0 to 3, got 4"),
        ("seed=true", r"seed: expected a whole number, got True"),
        ("model=raw", r"model: expected settings, got 'raw'"),
        ("method", r"override: expected 'section\.key=value', got 'method'"),
        ("seed.of=1", r"seed: expected a whole number, got {'of': 1}"),
        ("seed=[1", r"override: 'seed=\[1' has a value that is not YAML"),
    ],
)
def test_what_does_not_fit_is_told_by_name(override, message, file):
    with pytest.raises(ValueError, match=message):
        load_recipe(file("seed: 3\nloss: {name: multi_similarity}\n"), [override])


def test_settings_that_do_not_go_together():
    with pytest.raises(ValueError, match=r"embedding_size: expected a number with frozen_trunk"):
        recipe_from_dict({"loss": LOSS, "model": {"frozen_trunk": True, "embedding_size": None}})
    with pytest.raises(ValueError, match=r"similarity: expected 'emd' with method raw"):
        recipe_from_dict({"loss": LOSS, "model": {"method": "raw"}, "similarity": "mean"})
    with pytest.raises(ValueError, match=r"loss: expected a section with a name, got none"):
        recipe_from_dict({"seed": 1})
    for loss in ({"parameters": {"beta": 2}}, {}, None):
        with pytest.raises(ValueError, match=r"^loss: expected 'name', got none$"):
            recipe_from_dict({"loss": loss})


def test_files_that_are_no_recipes(file, tmp_path):
    with pytest.raises(FileNotFoundError, match="no file"):
        load_recipe(tmp_path / "absent.yaml")
    with pytest.raises(ValueError, match="holds no settings"):
        load_recipe(file("- 1\n"))
    with pytest.raises(ValueError, match=r"is not YAML: 'seed' is written twice"):
        load_recipe(file("seed: 1\nseed: 2\n"))
    with pytest.raises(ValueError, match="is not YAML"):
        load_recipe(file("loss: !!python/object/apply:os.getcwd []\n"))


def test_differences_name_both_values_and_pass_over_what_decides_nothing():
    chunks = {"memory_mb": 7.0}
    one = recipe_from_dict({"loss": LOSS, "notes": "a"})
    other = recipe_from_dict(
        {"loss": {"name": "contrastive"}, "notes": "b", "seed": 2, "matching": chunks}
    )
    assert one.differences(other) == {
        "loss.name": ("multi_similarity", "contrastive"),
        "loss.parameters.beta": (40.0, None),
        "seed": (0, 2),
    }


def test_the_learning_rate_rises_and_falls():
    def shares(schedule):
        return [
            learning_rate_factor(step, steps=10, warmup_steps=2, schedule=schedule)
            for step in (0, 1, 2, 6, 10)
        ]

    assert shares("cosine") == pytest.approx([0.5, 1, 1, 0.5, 0])
    assert shares("constant") == [0.5, 1, 1, 1, 1]
