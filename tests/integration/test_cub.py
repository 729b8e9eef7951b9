"""CUB-200-2011 classes 26 to 50 through the evaluate workflow, against independent measurements.

The numbers are those of the paper's protocol with frozen ImageNet features of EfficientNet-Lite0;
JPEG compression and resampling move P@1 by up to 0.7 points, hence the tolerances.
"""

import pandas as pd
import pytest

from emd_retrieval.features import extract_features
from emd_retrieval.records import ResultRecord
from emd_retrieval.workflows import EvaluateImages, evaluate_images

pytestmark = [pytest.mark.data, pytest.mark.slow]

METRICS = ["P@1", "RP", "MAP@R"]


@pytest.fixture(scope="module")
def runs(cub_root, lite0_weights, tmp_path_factory):
    """All pairs and a shortlist of 100, each with its folder; features are extracted once."""
    kept = []

    def extract_once(*arguments, **options):
        if not kept:
            kept.append(extract_features(*arguments, **options))
        return kept[0]

    results = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("emd_retrieval.workflows.evaluate.extract_features", extract_once)
        for shortlist in (None, 100):
            settings = EvaluateImages(
                data=cub_root,
                classes="26-50",
                backbone="tf_efficientnet_lite0",
                weights=lite0_weights,
                pyramid=(3, 2, 1),
                shortlist=shortlist,
            )
            folder = tmp_path_factory.mktemp(f"shortlist-{shortlist}")
            results[shortlist] = (*evaluate_images(settings, folder), folder)
    return results


def means(run):
    _, evaluation, _ = run
    return {name: scores.mean for name, scores in evaluation.scores.items()}


def test_the_data_is_what_was_measured(runs):
    record, evaluation, _ = runs[None]
    assert record.data["images"] == 1487
    assert record.data["num_classes"] == 25
    assert record.data["classes"] == "26-50"
    assert evaluation.left_out == 0


def test_raw(runs):
    """72.6 +- .6, 48.0 +- .3, 37.2 +- .3."""
    raw = means(runs[None])["Raw"]
    assert raw["P@1"] == pytest.approx(72.6, abs=0.6)
    assert raw["RP"] == pytest.approx(48.0, abs=0.3)
    assert raw["MAP@R"] == pytest.approx(37.2, abs=0.3)


def test_fcn_all_pairs(runs):
    """74.4 +- .6, 48.0 +- .3, 37.3 +- .3."""
    fcn = means(runs[None])["DeepEMD-FCN"]
    assert fcn["P@1"] == pytest.approx(74.4, abs=0.6)
    assert fcn["RP"] == pytest.approx(48.0, abs=0.3)
    assert fcn["MAP@R"] == pytest.approx(37.3, abs=0.3)


@pytest.mark.parametrize("metric", METRICS)
def test_a_shortlist_of_100_loses_next_to_nothing(runs, metric):
    everything, shortlist = (means(runs[k])["DeepEMD-FCN"][metric] for k in (None, 100))
    assert shortlist >= everything - 0.1


def test_the_curve_shows_what_a_shortlist_costs(runs):
    _, evaluation, _ = runs[None]
    curve = evaluation.curve.set_index("shortlist")
    assert curve.index[-1] == 1486
    for metric in METRICS:
        # Costs of all pairs and of a shortlist differ in the last bit, which may swap two
        # neighbours that are as near.
        assert curve.loc[100, metric] == pytest.approx(
            means(runs[100])["DeepEMD-FCN"][metric], abs=0.01
        )
        assert curve.loc[1486, metric] == means(runs[None])["DeepEMD-FCN"][metric]
    assert curve.loc[1486, "ms a query"] > curve.loc[100, "ms a query"] > 0


def test_intervals_are_as_wide_as_1487_queries_allow(runs):
    record, _, _ = runs[None]
    table = record.table.set_index(["method", "metric"])
    for row in table.itertuples():
        assert 2.0 < row.high - row.low < 5.0
    gain = table.loc[("DeepEMD-FCN", "P@1")]
    assert gain["gain_high"] - gain["gain_low"] < 4.0
    assert gain["gain_low"] < gain["gain"] < gain["gain_high"]


def test_the_folder_holds_the_report(runs):
    for record, _, folder in runs.values():
        files = {file.name for file in folder.iterdir()}
        assert files == {"evaluate.md", "evaluate.json", "evaluate.csv", "evaluate_shortlist.csv",
                         "gallery.png", "matches.png", "shortlist.png"}  # fmt: skip
        loaded = ResultRecord.load(folder / "evaluate.json")
        pd.testing.assert_frame_equal(loaded.table, record.table, check_dtype=False)
