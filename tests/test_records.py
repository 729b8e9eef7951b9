import json
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from emd_retrieval import records
from emd_retrieval._files import whole_file, write_text
from emd_retrieval.records import ResultRecord, command_line, markdown_table


@pytest.fixture
def record():
    return ResultRecord(
        name="evaluate",
        title="Raw against DeepEMD",
        tables={
            "metrics": pd.DataFrame(
                {
                    "method": ["Raw", "DeepEMD"],
                    "value": [72.6, 74.4],
                    "gain": [None, 1.8],
                    "queries": [1487, 1487],
                }
            ),
            "the shortlist": pd.DataFrame({"shortlist": [10, 100], "MAP@R": [37.0, 37.3]}),
        },
        summary=pd.DataFrame({"method": ["Raw"], "P@1": ["72.6 [70.3, 74.8]"]}),
        settings={"pyramid": [3, 2, 1], "layer": None, "weights": "Vögel.safetensors"},
        data={"name": "CUB", "images": 1487},
        seed=3,
        notes=("One note.",),
        figures=("gallery.png",),
    )


def test_round_trip(record, tmp_path):
    record.save(tmp_path)
    loaded = ResultRecord.load(tmp_path / "evaluate.json")
    for name, table in record.tables.items():
        pd.testing.assert_frame_equal(loaded.tables[name], table, check_dtype=False)
    pd.testing.assert_frame_equal(loaded.summary, record.summary, check_dtype=False)
    assert loaded.table["gain"].isna().tolist() == [True, False]
    for name in (
        "name", "title", "settings", "data", "seed", "notes", "figures", "command", "created",
        "commit", "versions", "hardware",
    ):  # fmt: skip
        assert getattr(loaded, name) == getattr(record, name), name


def test_files(record, tmp_path):
    files = record.save(tmp_path / "new" / "folder")
    names = ["evaluate.csv", "evaluate_the_shortlist.csv", "evaluate.md", "evaluate.json"]
    assert [file.name for file in files] == names
    assert sorted(file.name for file in files[0].parent.iterdir()) == sorted(names)
    pd.testing.assert_frame_equal(pd.read_csv(files[0]), record.table, check_dtype=False)
    assert "Vögel" in files[3].read_text(encoding="utf-8")


def test_markdown_shows_the_summary_in_place_of_the_main_table(record):
    text = record.to_markdown()
    assert "72.6 [70.3, 74.8]" in text
    assert "1487" in text.split("## How this was made")[1]
    assert "## metrics" not in text
    assert "## the shortlist" in text
    assert "- One note." in text
    assert "![gallery](gallery.png)" in text
    for fact in ("seed", "commit", "settings", "hardware", "versions", "data"):
        assert f"- **{fact}**:" in text
    assert "layer" not in text, "what was not set is left out"


def test_says_what_decides_results(record):
    assert record.versions["python"].count(".") == 2
    assert {"torch", "timm", "faiss-cpu", "pytorch-metric-learning", "POT"} <= set(record.versions)
    assert record.hardware["cores"] >= 1
    assert record.hardware["memory_gib"] >= 1
    assert record.created.endswith("+00:00")


@pytest.mark.parametrize("name", ["", "a/b", "..", "a b", "a.b", "-_-"])
def test_names_that_are_no_file_names_are_refused(name):
    table = {"metrics": pd.DataFrame({"a": [1]})}
    with pytest.raises(ValueError, match="name: expected letters, digits, '-' and '_'"):
        ResultRecord(name=name, title="", tables=table, settings={}, data={}, seed=0)


def test_a_record_without_tables_is_refused():
    with pytest.raises(ValueError, match="tables: expected at least one table"):
        ResultRecord(name="x", title="", tables={}, settings={}, data={}, seed=0)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"tables": []}', '{"tables": {}, "summary": null}']
)
def test_what_is_no_record_is_refused(text, tmp_path):
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ValueError, match=r"record: x\.json is not a result record"):
        ResultRecord.load(tmp_path / "x.json")


def test_records_of_a_newer_version_are_refused_not_misread(record, tmp_path):
    content = json.loads(record.to_json()) | {"energy": 3}
    del content["sha256"]
    (tmp_path / "x.json").write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"is not a result record .*energy"):
        ResultRecord.load(tmp_path / "x.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nothing\.json"):
        ResultRecord.load(tmp_path / "nothing.json")


def test_markdown_table_survives_what_is_in_it():
    text = markdown_table(
        pd.DataFrame({"a|b": ["x|y", "two\nlines"], "n": [1.5, float("nan")], "k": [3, 40]})
    )
    lines = text.splitlines()
    assert len(lines) == 4
    assert len({len(line) for line in lines}) == 1, "columns are aligned"
    bars = [line.replace("\\|", "").count("|") for line in lines]
    assert set(bars) == {4}, "one bar more than columns in every row"
    assert lines[2].endswith("| 1.50 |   3 |")
    assert lines[3].endswith("|      |  40 |"), "what is not a number is an empty cell"


def test_markdown_table_without_rows():
    assert markdown_table(pd.DataFrame({"method": []})).splitlines()[0] == "| method |"


def test_a_failing_write_leaves_the_old_file_and_no_litter(tmp_path):
    file = write_text(tmp_path / "table.csv", "old")

    def write_half():
        with whole_file(file) as partial:
            partial.write_text("ne")
            raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        write_half()
    assert file.read_text() == "old"
    assert list(tmp_path.iterdir()) == [file]


def test_a_block_that_writes_nothing_fails_and_leaves_the_old_file(tmp_path):
    file = write_text(tmp_path / "table.csv", "old")
    with pytest.raises(FileNotFoundError), whole_file(file):
        pass
    assert file.read_text() == "old"


def test_a_record_that_cannot_be_written_leaves_the_old_one(record, tmp_path, monkeypatch):
    record.save(tmp_path)
    before = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def fail(*arguments, **options):
        raise OSError("disk full")

    monkeypatch.setattr(pd.DataFrame, "to_csv", fail)
    with pytest.raises(OSError, match="disk full"):
        record.save(tmp_path)
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == before


def test_command_line_can_be_pasted(monkeypatch):
    monkeypatch.setattr(
        sys, "argv", ["/opt/venv/bin/emd-retrieval", "evaluate", "--data", "my birds"]
    )
    assert command_line() == "emd-retrieval evaluate --data 'my birds'"


def test_command_line_of_a_module(tmp_path):
    """``python -m package`` has the path of a ``__main__.py`` as its program: none to run."""
    package = tmp_path / "probe"
    package.mkdir()
    (package / "__main__.py").write_text(
        "from emd_retrieval.records import command_line\nprint(command_line())\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "probe", "--data", "my birds"],
        cwd=tmp_path, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "python -m probe --data 'my birds'"


@pytest.mark.skipif(shutil.which("git") is None, reason="git is not installed")
def test_commit_is_that_of_the_checkout_and_only_of_it(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    package = tmp_path / "package"
    package.mkdir()
    module = package / "records.py"
    module.write_text("x = 1\n")
    monkeypatch.setattr(records, "__file__", str(module))

    def git(*arguments):
        identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
        done = subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *arguments],
            check=True, capture_output=True, text=True,
        )  # fmt: skip
        return done.stdout.strip()

    assert records.code_commit() is None, "outside git"
    git("init", "--quiet")
    git("commit", "--quiet", "--allow-empty", "--message", "of another project")
    assert records.code_commit() is None, "an installed package inside another project"
    git("add", ".")
    git("commit", "--quiet", "--message", "tracked")
    assert records.code_commit() == git("rev-parse", "HEAD")[:12]
    module.write_text("x = 2\n")
    assert records.code_commit() == git("rev-parse", "HEAD")[:12] + "-dirty"


def test_commit_is_none_without_git(monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert records.code_commit() is None
