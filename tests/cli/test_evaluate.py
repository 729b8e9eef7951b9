import io
import json
import shutil
import subprocess
import sys
import warnings
from contextlib import redirect_stderr

import numpy as np
import pandas as pd
import pytest
import small_data
import torch
from support import structured_sets

from emd_retrieval import __version__
from emd_retrieval.cli import main


@pytest.fixture(autouse=True)
def _leave_warnings_as_they_were(monkeypatch):
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)


@pytest.fixture
def images(image_folder, weights):
    return [
        "evaluate", "--data", str(image_folder), "--backbone", small_data.BACKBONE,
        "--weights", str(weights), "--resize", "48", "--crop", "48", "--pyramid", "2,1",
        "--workers", "0",
    ]  # fmt: skip


@pytest.fixture
def sets(tmp_path, generator):
    nodes = structured_sets(12, 5, 8, generator)
    np.save(tmp_path / "sets.npy", nodes.flatten(1).numpy())
    np.save(tmp_path / "labels.npy", np.arange(12) % 3)
    return ["evaluate", "--embeddings", str(tmp_path / "sets.npy"), "--labels",
            str(tmp_path / "labels.npy"), "--channels", "8"]  # fmt: skip


@pytest.fixture
def ranking(tmp_path):
    rows = [(q, i) for q in range(6) for i in range(6) if i != q]
    pd.DataFrame(rows, columns=["query", "id"]).to_csv(tmp_path / "ranking.csv", index=False)
    labels = pd.DataFrame({"id": range(6), "label": list("aabbcc")})
    labels.to_csv(tmp_path / "labels.csv", index=False)
    return ["evaluate", "--ranking", str(tmp_path / "ranking.csv"), "--labels",
            str(tmp_path / "labels.csv")]  # fmt: skip


def test_images(images, tmp_path, capsys):
    output = tmp_path / "out"
    assert main([*images, "--shortlist", "5", "--seed", "7", "--output", str(output)]) == 0
    printed = capsys.readouterr()
    assert "Raw against DeepEMD-FCN on birds" in printed.out
    assert "| gain of DeepEMD-FCN |" in printed.out
    assert f"written to {output}: evaluate.csv, evaluate.json, evaluate.md" in printed.out
    assert printed.err == "", "no bars into a pipe, no chatter"
    files = {file.name for file in output.iterdir()}
    assert files >= {"evaluate.md", "evaluate_shortlist.csv", "gallery.png", "shortlist.png"}
    record = json.loads((output / "evaluate.json").read_text(encoding="utf-8"))
    assert record["seed"] == 7
    assert record["settings"]["shortlist"] == 5
    assert record["settings"]["pyramid"] == [2, 1]


def test_options_reach_the_settings(images, tmp_path, capsys):
    options = [
        "--shortlist", "all", "--include-map", "--layer", "-2", "--ground-cost", "centered_cosine",
        "--node-weights", "uniform", "--weight-floor", "0.01", "--solver", "pot", "--bf16",
        "--batch-size", "5", "--classes", "1,3", "--device", "cpu", "--output", str(tmp_path),
    ]  # fmt: skip
    assert main([*images, *options]) == 0
    record = json.loads((tmp_path / "evaluate.json").read_text(encoding="utf-8"))
    expected = {
        "shortlist": "all pairs", "include_map": True, "layer": -2, "weights": "net.safetensors",
        "ground_cost": "centered_cosine", "weight_floor": 0.01, "solver": "pot", "bf16": True,
        "backbone": small_data.BACKBONE, "resize": 48, "crop": 48,
    }  # fmt: skip
    assert {name: record["settings"].get(name) for name in expected} == expected
    assert record["data"]["classes"] == "1,3"


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--extractor", "grid", "--grid", "2", "--context", "1.5", "--patch-size", "32"],
         {"extractor": "grid", "grid": [2], "context": 1.5, "patch_size": 32}),
        (["--extractor", "sampling", "--patches", "3", "--patch-size", "32"],
         {"extractor": "sampling", "patches": 3, "patch_size": 32}),
    ],
)  # fmt: skip
def test_patches(options, expected, images, tmp_path, capsys):
    images = images[:-4] + images[-2:]  # no --pyramid
    assert main([*images, *options, "--shortlist", "all", "--output", str(tmp_path)]) == 0
    record = json.loads((tmp_path / "evaluate.json").read_text(encoding="utf-8"))
    assert {name: record["settings"].get(name) for name in expected} == expected
    assert f"DeepEMD-{expected['extractor'].title()}" in capsys.readouterr().out


def test_embeddings_and_threads(sets, tmp_path, capsys):
    before = torch.get_num_threads()
    try:
        output = tmp_path / "out"
        assert main([*sets, "--shortlist", "all", "--threads", "2", "--output", str(output)]) == 0
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert "Raw against DeepEMD, stored sets" in capsys.readouterr().out
    record = json.loads((output / "evaluate.json").read_text(encoding="utf-8"))
    assert record["hardware"]["threads"] == 2


def test_ranking(ranking, tmp_path, capsys):
    output = tmp_path / "out"
    baseline = str(tmp_path / "ranking.csv")
    assert main([*ranking, "--baseline", baseline, "--output", str(output)]) == 0
    assert "gain of ranking" in capsys.readouterr().out
    assert sorted(file.name for file in output.iterdir()) == [
        "evaluate.csv", "evaluate.json", "evaluate.md",
    ]  # fmt: skip


def test_the_default_output_is_below_the_current_folder(ranking, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(ranking) == 0
    assert (tmp_path / "runs" / "evaluate" / "evaluate.md").is_file()
    assert "written to runs/evaluate: " in capsys.readouterr().out


@pytest.mark.parametrize("quiet", [False, True])
def test_progress_is_shown_on_a_terminal_unless_quiet(quiet, images, tmp_path, capsys):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    with redirect_stderr(Terminal()) as terminal:
        arguments = [*images, "--output", str(tmp_path), *(["--quiet"] if quiet else [])]
        assert main(arguments) == 0
    assert ("extracting" in terminal.getvalue()) is not quiet
    assert "| Raw " in capsys.readouterr().out, "the result is printed either way"


def test_images_left_out_are_told(images, image_folder, tmp_path, capsys):
    folder = shutil.copytree(image_folder, tmp_path / "broken")
    (folder / "wren" / "02.png").write_bytes(b"no picture")
    images[2] = str(folder)
    assert main([*images, "--skip-errors", "--output", str(tmp_path / "out")]) == 0
    printed = capsys.readouterr()
    assert printed.err.startswith("emd-retrieval: warning: left out wren/02.png: ")
    assert len(printed.err.splitlines()) == 1
    assert "- 1 images could not be read and are left out." in printed.out


def one_line(capsys):
    """The one line on stderr, without the program's name."""
    printed = capsys.readouterr()
    assert printed.out == ""
    lines = printed.err.splitlines()
    assert len(lines) == 1, printed.err
    assert "Traceback" not in lines[0]
    return lines[0].removeprefix("emd-retrieval: error: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shortlist", "2"], "shortlist: 2 is smaller than the largest R, 3 "),
        (["--shortlist", "0"], "--shortlist: expected a positive whole number or 'all', got '0'"),
        (["--shortlist", "ten"], "--shortlist: expected a positive whole number or 'all', got 't"),
        (["--pyramid", "3;2"], "--pyramid: expected sizes as in 3,2,1, got '3;2'"),
        (["--pyramid", ""], "pyramid: expected at least one level, or include_map=True"),
        (["--crop", "50"], "crop: expected 1 to resize = 48 pixels, got 50"),
        (["--classes", "9"], "classes: class is not here: 9; birds has classes 1-3"),
        (["--backbone", "resnet_18"],
         "backbone: expected a model of timm, got 'resnet_18'; nearest names: "),
        (["--layer", "77"], "layer: 'test_resnet' has feature maps 0 to "),
        (["--weights", "nothing.pth"], "weights: no file 'nothing.pth'"),
        (["--solver", "simplx"], "--solver: expected one of simplex, pot, opencv, sinkhorn, qp; "
         "got 'simplx' (did you mean 'simplex'?)"),
        (["--device", "gpu"], "--device: 'gpu' cannot be used here ("),
        (["--threads", "0"], "--threads: expected 1 or more, got 0"),
        (["--weight-floor", "-1"], "weight_floor: expected zero or more, got -1.0"),
        (["--gallery", "nowhere"], "nowhere: no such folder"),
        (["--labels", "l.npy"], "--labels goes with --embeddings or --ranking, not with --data"),
        (["--channels", "8"], "--channels goes with --embeddings, not with --data"),
        (["--baseline", "b.csv"], "--baseline goes with --ranking, not with --data"),
        (["--grid", "2"], "--grid goes with --extractor grid, not with fcn"),
        (["--patch-size", "9"], "--patch-size goes with --extractor grid or sampling, not with f"),
        (["--extractor", "grid"], "--pyramid goes with --extractor fcn, not with grid"),
    ],
)  # fmt: skip
def test_bad_input_for_images(options, message, images, capsys, monkeypatch):
    def refuse(*arguments, **options):
        raise RuntimeError("the work began before the input was looked at")

    monkeypatch.setattr("emd_retrieval.workflows.evaluate.extract_features", refuse)
    assert main([*images, *options]) == 2
    assert one_line(capsys).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--channels", "7"], "embeddings (sets.npy): expected a packed set whose width is a mul"),
        (["--labels", "nothing.npy"], "no file 'nothing.npy'"),
        (["--gallery-labels", "l.npy"], "gallery_labels: there is no gallery; pass gallery_embed"),
        (["--global-node", "9"], "global_node: expected a node of 5, got 9"),
        (["--data", "d"], "argument --data: not allowed with argument --embeddings"),
        (["--classes", "1-3"], "--classes goes with --data, not with --embeddings"),
        (["--backbone", "resnet18"], "--backbone goes with --data, not with --embeddings"),
        (["--bf16"], "--bf16 goes with --data, not with --embeddings"),
        (["--query-labels", "q.csv"], "--query-labels goes with --ranking, not with --embeddings"),
    ],
)
def test_bad_input_for_embeddings(options, message, sets, capsys):
    try:
        code = main([*sets, *options])
    except SystemExit as end:
        code = end.code
    assert code == 2
    assert one_line(capsys).startswith(message)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--shortlist", "50"], "--shortlist goes with --data or --embeddings, not with --ranking"),
        (["--solver", "pot"], "--solver goes with --data or --embeddings, not with --ranking"),
        (["--baseline", "nothing.csv"], "no file 'nothing.csv'"),
        (["--query-labels", "nothing.csv"], "no file 'nothing.csv'"),
    ],
)
def test_bad_input_for_a_ranking(options, message, ranking, capsys):
    assert main([*ranking, *options]) == 2
    assert one_line(capsys).startswith(message)


def test_a_ranking_needs_labels(ranking, capsys):
    assert main(ranking[:3]) == 2
    assert one_line(capsys).startswith("--ranking needs --labels FILE: a table with columns id and")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND (see emd-retrieval --help)"),
        (["evaluat"], "argument COMMAND: invalid choice: 'evaluat'"),
        (["evaluate"], "one of the arguments --data --embeddings --ranking is required (see "
         "emd-retrieval evaluate --help)"),
        (["evaluate", "--data", "d", "--fast"], "unrecognized arguments: --fast"),
        (["evaluate", "--data"], "argument --data: expected one argument"),
        (["evaluate", "--data", "d", "--seed", "-1"],
         "argument --seed: expected a whole number, zero or more, got '-1'"),
        (["evaluate", "--data", "d", "--extractor", "girds"],
         "argument --extractor: invalid choice: 'girds'"),
    ],
)  # fmt: skip
def test_bad_usage(arguments, message, capsys):
    with pytest.raises(SystemExit) as end:
        main(arguments)
    assert end.value.code == 2
    assert one_line(capsys).startswith(message)


def test_an_output_that_is_a_file(ranking, tmp_path, capsys):
    (tmp_path / "out").write_text("in the way")
    assert main([*ranking, "--output", str(tmp_path / "out")]) == 2
    assert one_line(capsys).startswith("output: expected a folder, got ")


def test_a_run_that_fails_has_another_code(ranking, capsys, monkeypatch):
    """1 where the input was good; ``--debug`` shows where."""

    def fail(*arguments):
        raise OSError("disk full\nsecond line")

    monkeypatch.setattr("emd_retrieval.workflows.evaluate_ranking", fail)
    assert main(ranking) == 1
    assert one_line(capsys) == "disk full second line"
    with pytest.raises(OSError, match="disk full"):
        main([*ranking, "--debug"])


def test_interruption(ranking, capsys, monkeypatch):
    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr("emd_retrieval.workflows.evaluate_ranking", interrupt)
    assert main(ranking) == 130
    assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize("arguments", [["--help"], ["evaluate", "--help"], ["--version"]])
def test_help_does_not_wait_for_torch(arguments):
    code = (
        "import sys; from emd_retrieval.cli import main\n"
        f"try: main({arguments})\n"
        "except SystemExit as end: assert end.code == 0, end.code\n"
        "heavy = {'torch', 'numpy', 'pandas', 'timm', 'faiss', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    if arguments == ["--version"]:
        assert done.stdout == f"emd_retrieval {__version__}\n"
    else:
        assert "examples:" in done.stdout
        assert "emd-retrieval evaluate --data" in done.stdout


def test_examples_of_the_help_are_commands_that_parse(capsys):
    from emd_retrieval.cli.evaluate import EXAMPLES
    from emd_retrieval.cli.main import build_parser

    commands = EXAMPLES.replace("\\\n", " ").splitlines()
    commands = [line.split() for line in commands if line.strip().startswith("emd-retrieval ")]
    assert len(commands) == 5
    for command in commands:
        assert build_parser().parse_args(command[1:]).run


def test_as_a_module(ranking, tmp_path):
    arguments = [*ranking, "--output", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, "-m", "emd_retrieval.cli", *arguments], capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")
    record = json.loads((tmp_path / "out" / "evaluate.json").read_text(encoding="utf-8"))
    assert record["command"].startswith("python -m emd_retrieval.cli evaluate --ranking ")
