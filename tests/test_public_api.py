"""The public names and their signatures: an inventory.

Changing it is a decision, with a line in the changelog; then ``python tests/test_public_api.py``
writes the signatures anew. A name that goes takes the way of ``emd_retrieval/_deprecation.py``.
"""

import importlib
import inspect
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import emd_retrieval

PUBLIC = [
    "Backbone",
    "DeepEMDDistance",
    "DeepEMDSNRDistance",
    "DeepEMDSimilarity",
    "EMDKNN",
    "EMDMatcher",
    "EMDReranker",
    "Evaluation",
    "Extractor",
    "FCNExtractor",
    "FaissShortlist",
    "FeatureSet",
    "GridExtractor",
    "ImageCollection",
    "ImageDataset",
    "LocalFeatureStore",
    "LossSettings",
    "MetricLoss",
    "Ranking",
    "Recipe",
    "ResultRecord",
    "SamplingExtractor",
    "SetMatch",
    "TrainedModel",
    "TransportPlan",
    "available_solvers",
    "build_extractor",
    "build_loss",
    "cluster_nodes",
    "compare_rankings",
    "cross_reference_weights",
    "demo_birds",
    "emd",
    "evaluate_sets",
    "extract_features",
    "global_vectors",
    "ground_cost",
    "load_backbone",
    "load_images",
    "load_model",
    "load_recipe",
    "lower_bound",
    "pack",
    "pyramid_pool",
    "raise_pending_faults",
    "score_ranking",
    "search_sets",
    "solve",
    "solve_top_k",
    "train",
    "unpack",
]
SIGNATURES = Path(__file__).with_name("public_signatures.txt")
HEAVY = ["torch", "numpy", "pandas", "matplotlib", "timm", "faiss", "pytorch_metric_learning"]


def test_the_inventory():
    assert sorted(emd_retrieval.__all__) == sorted(PUBLIC)
    assert set(PUBLIC) <= set(dir(emd_retrieval))


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_is_documented_and_at_home(name):
    value = getattr(emd_retrieval, name)
    assert inspect.getdoc(value), f"{name} has no docstring"
    # A class or function that moved house must keep its name in the room's own inventory.
    room = importlib.import_module(".".join(value.__module__.split(".")[:2]))
    assert getattr(room, name) is value
    if hasattr(room, "__all__"):
        assert name in room.__all__


@pytest.mark.parametrize("name", PUBLIC)
def test_every_name_has_types(name):
    value = getattr(emd_retrieval, name)
    function = value.__init__ if inspect.isclass(value) else value
    hints = inspect.signature(function).parameters.values()
    untyped = [p.name for p in hints if p.name != "self" and p.annotation is p.empty]
    assert not untyped


def signatures():
    """A line for each public function, class and method or property that this package defines."""
    lines = []
    for name in sorted(PUBLIC):
        value = getattr(emd_retrieval, name)
        lines.append(f"{name}{_arguments(value)}")
        if not inspect.isclass(value):
            continue
        for member in sorted(vars(value)):
            if member.startswith("_"):
                continue
            found = inspect.getattr_static(value, member)
            if isinstance(found, property):
                lines.append(f"{name}.{member}")
            elif callable(found) or isinstance(found, classmethod | staticmethod):
                lines.append(f"{name}.{member}{_arguments(getattr(value, member))}")
    return lines


def _arguments(function):
    """Names, kinds and defaults; annotations are for the type checker."""
    parameters = [
        p.replace(annotation=p.empty) for p in inspect.signature(function).parameters.values()
    ]
    # What a default factory gives is told by its kind: its text may hold an address.
    parameters = [
        p.replace(default=type(p.default)) if " at 0x" in repr(p.default) else p for p in parameters
    ]
    return str(inspect.Signature(parameters))


def test_signatures():
    assert signatures() == SIGNATURES.read_text(encoding="utf-8").splitlines()


def test_an_unknown_name_is_an_attribute_error():
    with pytest.raises(AttributeError, match="no attribute 'no_such_name'"):
        _ = emd_retrieval.no_such_name


def test_import_alone_is_light():
    """``import emd_retrieval`` and tab completion must not wait for torch and its friends."""
    code = (
        "import sys, emd_retrieval; dir(emd_retrieval); emd_retrieval.__version__; "
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_version_is_the_one_of_the_packaging():
    packaging = Path(__file__).parents[1] / "pyproject.toml"
    project = tomllib.loads(packaging.read_text(encoding="utf-8"))["project"]
    assert emd_retrieval.__version__ == project["version"]


if __name__ == "__main__":
    SIGNATURES.write_text("\n".join(signatures()) + "\n", encoding="utf-8")
