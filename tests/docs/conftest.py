"""What a reader of the documentation has on disk, small: data, weights, recipes, an index."""

import csv
import pickle
import shutil
from pathlib import Path

import faiss
import numpy as np
import pytest
import small_data
import timm
import torch
import yaml

from emd_retrieval import datasets
from emd_retrieval.cli.main import main
from emd_retrieval.datasets.fewshot_splits import class_lists
from emd_retrieval.features import backbones
from emd_retrieval.retrieval import LocalFeatureStore

ROOT = Path(__file__).parents[2]
SMALL = {
    "retrieval": {
        "model": {"embedding_size": 8, "pyramid": [2, 1], "grid": [2], "patches": 2,
                  "patch_size": 32},
        "views": {"resize": 36, "crop": 32, "cached": 1},
        "optimization": {"batch_size": 4, "images_per_class": 2, "steps": 4, "warmup_steps": 0},
        "validation": {"folds": 2, "every": 2},
    },
    "fewshot": {
        "model": {"backbone": small_data.BACKBONE},
        "views": {"resize": 64, "crop": 64},
        "pretraining": {"steps": 2, "batch_size": 4, "learning_rate": 0.02},
        "meta_training": {"queries": 1, "episodes": 2, "validate_every": 2},
        "validation": {"queries": 1, "episodes": 2},
        "test": {"queries": 1, "one_shot_episodes": 3, "episodes": 3},
        "methods": {"grid": {"model": {"grid": [2], "patch_size": 32}},
                    "sampling": {"model": {"patches": 2, "patch_size": 32}}},
    },
}  # fmt: skip
"""What takes time in a recipe, made small. All else of the shipped recipes stays."""


def use_small_network(patch):
    """timm's hub is out of reach: every model of it is its smallest network, random weights."""

    def create_model(name, pretrained=False, **settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            return create(small_data.BACKBONE, pretrained=False, **settings)

    create = timm.create_model
    patch.setattr(backbones.timm, "create_model", create_model)


def draw_few_birds(patch):
    """Two pictures of a species, whatever number is asked for."""
    draw = datasets.demo_birds
    patch.setattr(datasets, "demo_birds", lambda species, images, **how: draw(species, 2, **how))


def merged(one, other):
    both = dict(one)
    for name, value in other.items():
        old = both.get(name)
        both[name] = merged(old, value) if isinstance(old, dict) and value else value
    return both


def write_cub(folder):
    """Four pictures of a species that recipes train or test on, two of any other."""
    root = small_data.write_cub(folder, range(1, 201), per_class=4, side=36)
    few = {f"{n:03d}.Bird_{n}/{i}.png" for n in range(51, 201) for i in (2, 3)}
    images = (root / "images.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in images if line.split()[1] not in few]
    numbers = {line.split()[0] for line in kept}
    labels = (root / "image_class_labels.txt").read_text(encoding="utf-8").splitlines()
    labels = [line for line in labels if line.split()[0] in numbers]
    for name, lines in (("images", kept), ("image_class_labels", labels)):
        (root / f"{name}.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_recipes(folder):
    for source in (ROOT / "recipes").rglob("*.yaml"):
        recipe = yaml.safe_load(source.read_text(encoding="utf-8"))
        kind = source.relative_to(ROOT / "recipes").parts[0]
        if source.name != "search.yaml":
            recipe = merged(recipe, SMALL[kind])
        file = folder / source.relative_to(ROOT / "recipes")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(yaml.safe_dump(recipe), encoding="utf-8")


def write_cifar100(folder):
    """Eight images of each of the 100 classes, as Python's release of CIFAR-100 has them."""
    folder.mkdir(parents=True)
    names = sorted(name for split in class_lists("cifar_fs").values() for name in split)
    generator = np.random.default_rng(0)
    colours = generator.uniform(40, 215, (100, 3, 1, 1))
    for part, count in (("train", 7), ("test", 1)):
        labels = [label for label in range(100) for _ in range(count)]
        data = colours[labels] + generator.normal(0, 20, (len(labels), 3, 32, 32))
        batch = {
            "data": data.clip(0, 255).astype(np.uint8).reshape(-1, 3072),
            "fine_labels": labels,
            "coarse_labels": [label // 5 for label in labels],
            "filenames": [f"{names[label]}_{i}.png" for i, label in enumerate(labels)],
        }
        (folder / part).write_bytes(pickle.dumps(batch, 2))
    groups = [f"group_{i}" for i in range(20)]
    meta = {"fine_label_names": names, "coarse_label_names": groups}
    (folder / "meta").write_bytes(pickle.dumps(meta, 2))


def write_table(file, header, rows):
    with file.open("w", newline="", encoding="utf-8") as opened:
        csv.writer(opened).writerows([header, *rows])


def write_answers(folder):
    """Embeddings, and rankings of the photos by one system and another."""
    generator = np.random.default_rng(0)
    np.save(folder / "sets.npy", generator.normal(size=(12, 5 * 128)).astype(np.float32))
    np.save(folder / "labels.npy", np.arange(12) % 3)
    ids = sorted(path.relative_to(folder / "photos").as_posix()
                 for path in (folder / "photos").rglob("*.png"))  # fmt: skip
    write_table(folder / "labels.csv", ["id", "label"], [[i, i.split("/")[0]] for i in ids])
    for name in ("ranking", "before"):
        rows = [[query, i] for query in ids for i in generator.permutation(ids) if i != query]
        write_table(folder / f"{name}.csv", ["query", "id"], rows)


def write_index(folder):
    """A FAISS index of the photos' global vectors, in the store's order."""
    command = ["extract", "--images", str(folder / "photos"), "--store", str(folder / "made.store"),
               "--weights", str(folder / "resnet50.safetensors"), "--quiet"]  # fmt: skip
    assert main(command) == 0
    store = LocalFeatureStore.open(folder / "made.store")
    vectors = np.ascontiguousarray(store.global_vectors(np.arange(len(store))), np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(vectors)
    faiss.write_index(index, str(folder / "gallery.faiss"))
    shutil.rmtree(folder / "made.store")


@pytest.fixture(scope="session")
def readers_disk(tmp_path_factory):
    """Not to be written to."""
    folder = tmp_path_factory.mktemp("reader")
    write_cub(folder)
    photos = small_data.write_images(folder / "photos")
    small_data.write_images(folder / "new", per_class=1)
    for name, of in (("bird", "robin/00"), ("wren", "wren/01"), ("a", "tit/00"), ("b", "tit/01")):
        shutil.copy(photos / f"{of}.png", folder / f"{name}.jpg")
    for name in ("resnet50", "tf_efficientnet_lite0"):
        small_data.write_weights(folder / f"{name}.safetensors")
    write_recipes(folder / "recipes")
    write_cifar100(folder / "cifar-100-python")
    shutil.copytree(folder / "cifar-100-python", folder / "cifar" / "cifar-100-python")
    write_answers(folder)
    with pytest.MonkeyPatch.context() as patch:
        use_small_network(patch)
        write_index(folder)
    return folder


@pytest.fixture
def reader(readers_disk, tmp_path, monkeypatch):
    """A reader's working folder, who sits in it."""
    for entry in readers_disk.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    monkeypatch.chdir(tmp_path)
    use_small_network(monkeypatch)
    draw_few_birds(monkeypatch)
    return tmp_path
