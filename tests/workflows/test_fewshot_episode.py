"""Recorded episodes, from a few-shot test to the figures of ``explain``."""

import numpy as np
import pytest
import small_data
import torch
from PIL import Image

from emd_retrieval.cli import main
from emd_retrieval.workflows import (
    FewshotStage,
    FewshotTrial,
    Machine,
    explain_episode,
    fewshot_pretrain,
    fewshot_test,
)
from emd_retrieval.workflows.fewshot_episode import EpisodeRecord

RECIPE = """
notes: small
data: {name: folder}
model: {backbone: test_resnet, patch_size: 32, patches: 3, grid: [2]}
views: {resize: 64, crop: 64}
pretraining: {steps: 1, batch_size: 4, learning_rate: 0.02}
validation: {episodes: 0}
test: {queries: 2, one_shot_episodes: 3, episodes: 3}
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("episodes")
    for split, classes in (("train", ("a", "b")), ("val", ("c",)), ("test", ("f$x$", "g"))):
        small_data.write_images(folder / "data" / split, per_class=5, classes=classes)
    (folder / "small.yaml").write_text(RECIPE)
    common = {"recipe": folder / "small.yaml", "data": folder / "data",
              "machine": Machine(cache=folder / "cache"), "run": folder / "run"}  # fmt: skip
    fewshot_pretrain(FewshotStage(**common))
    return common


@pytest.mark.parametrize("method", ["fcn", "sampling"])
def test_a_test_keeps_episodes(method, place, tmp_path):
    fewshot_test(
        FewshotTrial(
            **place, output=tmp_path, ways=(2,), shots=(1, 2), record=(0, 2), method=method
        )
    )
    files = sorted(file.name for file in tmp_path.glob("*.npz"))
    assert files == [f"episode_2way_{shot}shot_{n}.npz" for shot in (1, 2) for n in (0, 2)]
    record = EpisodeRecord.load(tmp_path / "episode_2way_2shot_2.npz")
    found = record.matches
    assert len(found) == 2 * 2 * 2, "the first query of each class, every support image"
    assert set(record.labels) == {"f$x$", "g"}
    assert record.pictures.shape[0] == len(record.rows) == len(record.names)
    value = 1 - (found.flow * found.cost).sum((1, 2))
    torch.testing.assert_close(value, found.similarity, atol=1e-4, rtol=0)
    boxes = found.query_boxes
    assert torch.equal(boxes[0], boxes[-1]) is (method == "fcn"), "random patches are each image's"
    assert float((boxes[..., 2:] - boxes[..., :2]).min()) > 0
    for picture in record.nearest():
        own = found.similarity[found.query == _row_of(record, picture.query)]
        assert picture.similarity == pytest.approx(float(own.max()))


def _row_of(record, pixels):
    return next(
        int(row)
        for row, picture in zip(record.rows, record.pictures, strict=True)
        if np.array_equal(picture, pixels)
    )


def test_an_episode_is_drawn(place, tmp_path, capsys):
    fewshot_test(FewshotTrial(**place, output=tmp_path, ways=(2,), record=(1,)))
    file = tmp_path / "episode_2way_1shot_1.npz"
    pictures, files = explain_episode(file, tmp_path / "out", formats=("png", "svg"))
    assert len(pictures) == 2
    titles = {"f$x$ as f$x$, right", "f$x$ as g, wrong", "g as g, right", "g as f$x$, wrong"}
    assert {picture.title for picture in pictures} < titles
    assert len(files) == 6
    heights = []
    for rows in ("2", "1"):
        output = tmp_path / rows
        command = ["explain", "--episode", str(file), "--rows", rows, "--output", str(output)]
        assert main(command) == 0
        with Image.open(output / "rebuilt.png") as image:
            heights.append(image.height)
    assert heights[0] == pytest.approx(2 * heights[1], abs=2)
    assert capsys.readouterr().out.count("similarity") == 3


def test_what_cannot_be_recorded_is_told_first(place, tmp_path):
    with pytest.raises(ValueError, match="record: expected episodes 0 to 2, got 3"):
        fewshot_test(FewshotTrial(**place, output=tmp_path, ways=(2,), record=(3,)))
    clusters = ["matching.weights=k_means", "matching.clusters=2"]
    with pytest.raises(ValueError, match="record: the clusters of k_means have no place"):
        fewshot_test(
            FewshotTrial(**place, output=tmp_path, ways=(2,), record=(0,), overrides=clusters)
        )
    assert not list(tmp_path.iterdir())


def test_what_is_no_episode_is_told(tmp_path, capsys):
    file = tmp_path / "other.npz"
    np.savez(file, rows=np.arange(3))
    assert main(["explain", "--episode", str(file)]) == 2
    assert "other.npz is not a recorded episode" in capsys.readouterr().err
    file.write_bytes(b"nothing")
    with pytest.raises(ValueError, match="is not a recorded episode"):
        EpisodeRecord.load(file)
    assert main(["explain", "--episode", str(tmp_path / "no.npz")]) == 2
    assert "episode: no file" in capsys.readouterr().err
    assert main(["explain", "a.jpg", "--episode", str(file)]) == 2
    assert "an image does not go with --episode" in capsys.readouterr().err
    assert main(["explain", "--episode", str(file), "--backbone", "resnet18"]) == 2
    assert "--backbone does not go with --episode" in capsys.readouterr().err
    assert main(["explain", "a.jpg"]) == 2
    assert "expected two images, A and B, or --episode FILE" in capsys.readouterr().err
    assert main(["explain", "a.jpg", "b.jpg", "--rows", "2"]) == 2
    assert "--rows goes with --episode" in capsys.readouterr().err
