"""Two processes that would train in one folder: the second is refused, until the first is gone."""

import multiprocessing
import os
import signal
import time

import pytest
from training.recipes import small_birds, small_recipe

from emd_retrieval.retrieval import StoreLockedError
from emd_retrieval.training import train
from emd_retrieval.training.run_lock import only_writer

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="this system does not fork")


def _hold(run, connection):
    with only_writer(run):
        connection.send("held")
        time.sleep(600)


@pytest.fixture
def rival(tmp_path):
    here, there = multiprocessing.Pipe(duplex=False)
    process = multiprocessing.get_context("fork").Process(target=_hold, args=(tmp_path, there))
    process.start()
    assert here.recv() == "held"
    yield process
    process.kill()
    process.join()


def test_the_second_process_is_refused_until_the_first_is_dead(rival, tmp_path):
    recipe, birds = small_recipe(optimization__steps=2), small_birds()
    refused = f"^run: .* is being written by process {rival.pid}; a run has one writer at a time$"
    with pytest.raises(StoreLockedError, match=refused):
        train(recipe, tmp_path, data=birds, workers=0)
    assert [file.name for file in tmp_path.iterdir()] == ["writer.lock"], "nothing was touched"
    os.kill(rival.pid, signal.SIGKILL)
    rival.join()
    assert train(recipe, tmp_path, data=birds, workers=0).summary["steps"] == 2


def test_a_finished_run_is_loaded_whoever_looks_at_it(tmp_path):
    recipe, birds = small_recipe(optimization__steps=2), small_birds()
    train(recipe, tmp_path, data=birds, workers=0)
    with only_writer(tmp_path):
        assert train(recipe, tmp_path, data=birds, workers=0).summary["steps"] == 2


@pytest.mark.parametrize("variable", ["NODE_RANK", "GROUP_RANK"])
def test_other_machines_of_a_group_do_not_ask(variable, rival, tmp_path, monkeypatch):
    monkeypatch.setenv(variable, "1")
    with only_writer(tmp_path):
        pass
