import numpy as np
import pytest
import small_data
from PIL import Image

from emd_retrieval.cli import main
from emd_retrieval.matching import EMDMatcher
from emd_retrieval.workflows import ExplainImages, explain_images


def settings(image_folder, weights, **changes):
    chosen = {
        "query": image_folder / "robin" / "00.png", "reference": image_folder / "wren" / "01.png",
        "backbone": small_data.BACKBONE, "weights": weights, "resize": 48, "crop": 48,
        "pyramid": (2, 1), "grid": (2,), "patches": 4, **changes,
    }  # fmt: skip
    return ExplainImages(**chosen)


@pytest.mark.parametrize("extractor", ["fcn", "grid", "sampling"])
def test_two_images_give_a_match_with_places(extractor, image_folder, weights, tmp_path):
    patch = {} if extractor == "fcn" else {"patch_size": 32}
    match, files = explain_images(
        settings(image_folder, weights, extractor=extractor, **patch), tmp_path / "out"
    )
    assert match.flow.shape == (len(match.boxes), len(match.reference_boxes))
    np.testing.assert_allclose(match.flow.sum(axis=1), match.query_weights, atol=1e-5)
    np.testing.assert_allclose(match.flow.sum(axis=0), match.reference_weights, atol=1e-5)
    assert match.similarity == pytest.approx(1 - (match.flow * match.cost).sum(), abs=1e-5)
    assert [file.name for file in files] == ["match.png", "rebuilt.png", "flows.png"]
    for file in files:
        assert Image.open(file).width > 500


def test_an_image_is_itself(image_folder, weights):
    same = settings(image_folder, weights, reference=image_folder / "robin" / "00.png")
    match, files = explain_images(same)
    assert match.similarity == pytest.approx(1, abs=1e-5)
    assert files == []


def test_the_matcher_counts(image_folder, weights):
    match, _ = explain_images(
        settings(image_folder, weights, matcher=EMDMatcher(weights="uniform"))
    )
    np.testing.assert_allclose(match.query_weights, 1 / 5, atol=1e-6)


def test_what_cannot_be_drawn_is_refused(image_folder, weights, tmp_path):
    with pytest.raises(FileNotFoundError, match="reference: no file"):
        explain_images(settings(image_folder, weights, reference=tmp_path / "no.png"))
    with pytest.raises(ValueError, match="formats"):
        explain_images(settings(image_folder, weights), tmp_path, formats=["gif"])
    clusters = EMDMatcher(weights="k_means", clusters=2)
    with pytest.raises(ValueError, match="no place in the image"):
        explain_images(settings(image_folder, weights, matcher=clusters))


def test_the_command(image_folder, weights, tmp_path, capsys):
    command = [
        "explain", str(image_folder / "robin" / "00.png"), str(image_folder / "robin" / "01.png"),
        "--backbone", small_data.BACKBONE, "--weights", str(weights), "--resize", "48", "--crop",
        "48", "--format", "png,svg", "--output", str(tmp_path), "--device", "cpu", "--quiet",
    ]  # fmt: skip
    assert main(command) == 0
    assert "similarity 0." in capsys.readouterr().out
    names = {f"{name}.{kind}" for name in ("match", "rebuilt", "flows") for kind in ("png", "svg")}
    assert {file.name for file in tmp_path.iterdir()} == names
    assert main([*command, "--patches", "9"]) == 2
    assert "--patches goes with --extractor sampling" in capsys.readouterr().err
