"""The commands ``rerank``, ``search`` and ``tune``: exit codes, files, messages."""

import pandas as pd
import pytest
from small_data import BACKBONE

from emd_retrieval.cli.main import main


@pytest.fixture(scope="session")
def store(tmp_path_factory, image_folder, weights):
    path = tmp_path_factory.mktemp("cli") / "birds.store"
    arguments = ["--backbone", BACKBONE, "--weights", str(weights), "--resize", "64"]
    code = main(["extract", "--images", str(image_folder), "--store", str(path), "--crop", "64",
                 *arguments])  # fmt: skip
    assert code == 0
    return path


def test_rerank(tmp_path, store, image_folder, weights, capsys):
    code = main(
        ["rerank", "--store", str(store), "--queries", str(image_folder), "--weights", str(weights),
         "-k", "3", "--shortlist", "6", "--exclude-self", "--format", "csv",
         "--output", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    ranking = pd.read_csv(tmp_path / "ranking.csv")
    assert list(ranking) == ["query", "rank", "id", "similarity", "score"]
    assert len(ranking) == 36
    assert "rerank.md" in capsys.readouterr().out


def test_search(tmp_path, store, image_folder, weights, capsys):
    code = main(
        ["search", str(image_folder / "tit" / "00.png"), "--store", str(store), "--weights",
         str(weights), "-k", "2", "--shortlist", "6", "--images", str(image_folder),
         "--output", str(tmp_path)]
    )  # fmt: skip
    assert code == 0
    assert "tit/00.png" in capsys.readouterr().out
    assert (tmp_path / "answer.png").exists()


def test_tune(tmp_path, store, image_folder, weights, capsys):
    files = sorted(image_folder.rglob("*.png"))
    pd.DataFrame(
        {"id": [f.relative_to(image_folder).as_posix() for f in files],
         "label": [f.parent.name for f in files]}
    ).to_csv(tmp_path / "labels.csv", index=False)  # fmt: skip
    code = main(
        ["tune", "--store", str(store), "--queries", str(image_folder), "--weights", str(weights),
         "--labels", str(tmp_path / "labels.csv"), "--exclude-self", "--alphas", "0.5,1",
         "--shortlists", "5,11", "--output", str(tmp_path / "out")]
    )  # fmt: skip
    assert code == 0
    assert "use: --alpha" in capsys.readouterr().out
    assert len(pd.read_csv(tmp_path / "out" / "tune.csv")) == 4


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        (["-k", "200"], "200 answers do not fit into a shortlist of 100"),
        (["--index", "none.faiss"], "index: no file"),
        (["--candidates", "none.csv"], "candidates: no file"),
        (["--index-parameters", "nprobe"], "expected NAME=NUMBER"),
        (["--solver", "simplx"], "did you mean 'simplex'?"),
    ],
)
def test_bad_input_is_one_line_and_code_2(tmp_path, store, image_folder, weights, extra, words,
                                          capsys):  # fmt: skip
    code = main(
        ["rerank", "--store", str(store), "--queries", str(image_folder / "tit"), "--weights",
         str(weights), "--output", str(tmp_path), *extra]
    )  # fmt: skip
    assert code == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1
    assert words in error[0]
