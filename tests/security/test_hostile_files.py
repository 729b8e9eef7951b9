"""Files that would run code, through every loader of the package: each is refused, nothing runs.

The payload makes a folder. That it would is shown first, so that a test here cannot pass by
attacking with a dud.
"""

from __future__ import annotations

import ast
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from training.recipes import small_birds, small_recipe

from emd_retrieval.datasets import load_cifar100, load_cifar_fs, load_fc100
from emd_retrieval.features.backbones import read_weights
from emd_retrieval.fewshot.matches import EpisodeMatches
from emd_retrieval.records import ResultRecord
from emd_retrieval.reports.explorer import ExplorerData
from emd_retrieval.retrieval import EMDKNN, LocalFeatureStore
from emd_retrieval.retrieval.shortlists import CandidateTable, FaissIndexShortlist
from emd_retrieval.settings import parse_override, read_yaml
from emd_retrieval.training import load_model, load_recipe, train
from emd_retrieval.workflows.fewshot_recipes import read_fewshot_recipe
from emd_retrieval.workflows.images import read_image_list
from emd_retrieval.workflows.inputs import read_labels, read_matrix, read_ranking

PACKAGE = Path(__file__).parents[2] / "emd_retrieval"


class Payload:
    """Unpickled without a guard, it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = str(marker)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.marker,)


@pytest.fixture
def marker(tmp_path: Path) -> Path:
    return tmp_path / "ran"


def as_pickle(file: Path, payload: Payload) -> None:
    file.write_bytes(pickle.dumps({"data": payload, "state_dict": payload}, 2))


def as_checkpoint(file: Path, payload: Payload) -> None:
    torch.save({"state_dict": {"weight": payload}}, file)


def as_array(file: Path, payload: Payload) -> None:
    with file.open("wb") as target:
        np.save(target, np.array([payload], dtype=object), allow_pickle=True)


def as_archive(file: Path, payload: Payload) -> None:
    values = np.array([[payload]], dtype=object)
    names = ("ids", "nodes", "header", "query", "query_weights")
    with file.open("wb") as target:
        np.savez(target, allow_pickle=True, **dict.fromkeys(names, values))


def as_yaml(file: Path, payload: Payload) -> None:
    file.write_text(f"data: !!python/object/apply:os.mkdir ['{payload.marker}']\n")


def unguarded_array(file: Path) -> Any:
    return np.load(file, allow_pickle=True)


def unguarded_archive(file: Path) -> Any:
    with np.load(file, allow_pickle=True) as archive:
        return archive["ids"]


UNGUARDED: dict[Callable[[Path, Payload], None], Callable[[Path], Any]] = {
    as_pickle: lambda file: pickle.loads(file.read_bytes()),  # noqa: S301
    as_checkpoint: lambda file: torch.load(file, weights_only=False),
    as_array: unguarded_array,
    as_archive: unguarded_archive,
    as_yaml: lambda file: yaml.unsafe_load(file.read_text()),
}


@pytest.mark.parametrize("write", UNGUARDED)
def test_the_attacks_are_real(write: Any, tmp_path: Path, marker: Path) -> None:
    file = tmp_path / "hostile"
    write(file, Payload(marker))
    UNGUARDED[write](file)
    assert marker.is_dir()


def _labels(file: Path) -> Any:
    return read_labels(file, None, 1, Path("sets.npy"))


def _knn(file: Path) -> Any:
    EMDKNN(channels=8).load(file)


def _store(part: str) -> Callable[[Path], Any]:
    """A store, one of whose files is the hostile one."""

    def load(file: Path) -> Any:
        folder = file.parent / "sets.store"
        with LocalFeatureStore.create(folder, channels=4, nodes=2, ids="string") as writer:
            writer.append(["a", "b"], torch.rand(2, 2, 4))
        (chosen,) = [path for path in folder.rglob("*") if path.is_file() and path.name == part]
        chosen.write_bytes(file.read_bytes())
        store = LocalFeatureStore.open(folder)
        store.verify()
        return store.nodes()

    return load


def _cifar(folder: Path, part: str) -> None:
    loaders = {"train": load_cifar100, "CIFAR_FS_val.pickle": lambda f: load_cifar_fs(f, "val"),
               "FC100_val.pickle": lambda f: load_fc100(f, "val")}  # fmt: skip
    for other in ("test", "meta", "train"):
        if part == "train":
            (folder / other).write_bytes((folder / part).read_bytes())
    loaders[part](folder)


LOADERS: list[tuple[str, Callable[[Path, Payload], None], Callable[[Path], Any]]] = [
    ("w.pth", as_pickle, read_weights),
    ("w.pth", as_checkpoint, read_weights),
    ("w.pt", as_checkpoint, read_weights),
    ("w.safetensors", as_pickle, read_weights),
    ("w.safetensors", as_checkpoint, read_weights),
    ("sets.npy", as_array, lambda f: read_matrix(f, None, None)),
    ("sets.npy", as_pickle, lambda f: read_matrix(f, None, None)),
    ("sets.parquet", as_pickle, lambda f: read_matrix(f, None, None)),
    ("labels.npy", as_array, _labels),
    ("labels.csv", as_pickle, _labels),
    ("labels.parquet", as_pickle, _labels),
    ("ranking.parquet", as_pickle, lambda f: read_ranking(f, f, None)),
    ("images.parquet", as_pickle, read_image_list),
    ("images.csv", as_pickle, read_image_list),
    ("images.txt", as_pickle, read_image_list),
    ("candidates.npz", as_archive, CandidateTable.read),
    ("candidates.npz", as_pickle, CandidateTable.read),
    ("candidates.parquet", as_pickle, CandidateTable.read),
    ("index.faiss", as_pickle, FaissIndexShortlist.read),
    ("index.faiss", as_checkpoint, FaissIndexShortlist.read),
    ("knn.safetensors", as_pickle, _knn),
    ("knn.safetensors", as_checkpoint, _knn),
    ("matches.npz", as_archive, EpisodeMatches.load),
    ("explorer.npz", as_archive, ExplorerData.load),
    ("record.json", as_pickle, ResultRecord.load),
    ("store", as_pickle, _store("store.json")),
    ("store", as_pickle, _store("nodes.bin")),
    ("store", as_pickle, _store("ids.bin")),
    ("train", as_pickle, lambda f: _cifar(f.parent, f.name)),
    ("CIFAR_FS_val.pickle", as_pickle, lambda f: _cifar(f.parent, f.name)),
    ("FC100_val.pickle", as_pickle, lambda f: _cifar(f.parent, f.name)),
    ("recipe.yaml", as_yaml, read_yaml),
    ("recipe.yaml", as_yaml, load_recipe),
    ("recipe.yaml", as_yaml, read_fewshot_recipe),
    ("recipe.yaml", as_yaml, lambda f: parse_override(f"data={f.read_text().partition(': ')[2]}")),
]


@pytest.mark.parametrize(
    ("name", "write", "load"),
    LOADERS,
    ids=[f"{number}-{name}-{write.__name__}" for number, (name, write, _) in enumerate(LOADERS)],
)
def test_a_hostile_file_is_refused(
    name: str, write: Any, load: Callable[[Path], Any], tmp_path: Path, marker: Path
) -> None:
    file = tmp_path / name
    write(file, Payload(marker))
    with pytest.raises(ValueError) as caught:
        load(file)
    assert str(caught.value)
    assert not marker.exists()


@pytest.mark.parametrize("write", [as_pickle, as_checkpoint])
def test_a_hostile_checkpoint_and_model(write: Any, tmp_path: Path, marker: Path) -> None:
    """A run that would go on from a checkpoint, and one that would be used."""
    recipe, birds = small_recipe(optimization__steps=2), small_birds()
    run = tmp_path / "run"

    def start() -> Any:
        return train(recipe, run, data=birds, cache=tmp_path / "cache", workers=0)

    whole = start().path
    model = (whole / "model.safetensors").read_bytes()
    write(whole / "model.safetensors", Payload(marker))
    with pytest.raises(ValueError):
        load_model(whole)
    (whole / "model.safetensors").write_bytes(model)
    # As a killed run leaves it: a checkpoint, and neither weights nor a summary.
    for file in ("model.safetensors", "run.json"):
        (whole / file).unlink()
    write(whole / "checkpoint.ckpt", Payload(marker))
    with pytest.raises(ValueError, match="checkpoint"):
        start()
    assert not marker.exists()


def _name_of(node: ast.expr) -> str:
    if isinstance(node, ast.Attribute):
        return f"{_name_of(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def _keyword(call: ast.Call, name: str) -> object:
    for word in call.keywords:
        if word.arg == name:
            return getattr(word.value, "value", getattr(word.value, "id", None))
    return None


# What runs code or programs, or would on another's file; the last part of a name is enough.
FORBIDDEN = {
    "eval", "exec", "os.system", "os.popen", "pickle.load", "pickle.loads", "pd.read_pickle",
    "pandas.read_pickle", "joblib.load", "marshal.loads", "shelve.open", "yaml.unsafe_load",
    "yaml.full_load", "tempfile.mktemp", "torch.hub.load", "torch.jit.load",
}  # fmt: skip


def unsafe_calls(source: str) -> list[str]:
    """Calls of a source that could run what is in a file."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        name = _name_of(node.func)
        bad = name in FORBIDDEN or _keyword(node, "shell") is True
        bad |= name == "torch.load" and _keyword(node, "weights_only") is not True
        bad |= name == "np.load" and _keyword(node, "allow_pickle") is not False
        bad |= name == "yaml.load" and _keyword(node, "Loader") not in ("_Loader", "SafeLoader")
        bad |= _keyword(node, "weights_only") is False or _keyword(node, "allow_pickle") is True
        if bad:
            found.append(f"line {node.lineno}: {name}")
    return found


def test_no_code_loads_without_a_guard() -> None:
    found = {
        file.name: calls
        for file in PACKAGE.rglob("*.py")
        if (calls := unsafe_calls(file.read_text(encoding="utf-8")))
    }
    assert not found


@pytest.mark.parametrize(
    "line",
    ["torch.load(f)", "torch.load(f, weights_only=False)", "np.load(f)", "pickle.load(f)",
     "yaml.load(f, Loader=yaml.Loader)", "subprocess.run('ls', shell=True)", "eval(text)",
     "trainer.fit(t, weights_only=False)"],
)  # fmt: skip
def test_the_search_sees_them(line: str) -> None:
    assert unsafe_calls(line)
