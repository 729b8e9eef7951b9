import io
import threading
from contextlib import redirect_stderr

import pytest

from emd_retrieval.progress import is_silent, progress, progress_counter, quiet


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_shows_what_the_work_is_on_a_terminal():
    with redirect_stderr(Terminal()) as terminal:
        assert list(progress(range(3), "decoding", unit="image")) == [0, 1, 2]
        with progress_counter("solving", total=10, unit="pair") as bar:
            bar.update(4)
    assert "decoding" in terminal.getvalue()
    assert "image" in terminal.getvalue()
    assert "solving" in terminal.getvalue()


def test_a_pipe_gets_nothing():
    with redirect_stderr(io.StringIO()) as pipe:
        assert is_silent()
        assert list(progress([1], "decoding")) == [1]
        with progress_counter("solving", total=1) as bar:
            bar.update(1)
    assert pipe.getvalue() == ""


def test_quiet_silences_what_is_inside_and_only_that():
    with redirect_stderr(Terminal()) as terminal:
        assert not is_silent()
        with quiet():
            assert is_silent()
            with quiet(False):
                assert not is_silent()
            assert list(progress([1], "decoding")) == [1]
        assert not is_silent()
    assert terminal.getvalue() == ""


def test_quiet_ends_with_an_error():
    with redirect_stderr(Terminal()):
        with pytest.raises(RuntimeError, match="inside"), quiet():
            raise RuntimeError("inside")
        assert not is_silent()


def test_a_counter_without_a_name_is_hidden():
    with redirect_stderr(Terminal()) as terminal, progress_counter(None, total=2) as bar:
        bar.update(2)
    assert terminal.getvalue() == ""


def test_quiet_is_of_its_own_thread():
    """A run in another thread keeps its own bars."""
    seen = []
    with redirect_stderr(Terminal()), quiet():
        thread = threading.Thread(target=lambda: seen.append(is_silent()))
        thread.start()
        thread.join()
    assert seen == [False]
