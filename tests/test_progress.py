"""Bars: live on a terminal; a few lines in a log."""

import io
import sys

import pytest
import tqdm

from llama_jax.progress import progress_bar


class Stream(io.StringIO):
    def __init__(self, terminal: bool):
        super().__init__()
        self.isatty = lambda: terminal


@pytest.fixture
def shown(monkeypatch):
    """Calls as `shown(terminal=True, seconds=10)`: the states of a bar that moves once a second."""

    def show(terminal: bool, seconds: int) -> list[str]:
        now = [0.0]
        monkeypatch.setattr(tqdm.std, "time", lambda: now[0])
        monkeypatch.setattr(tqdm.tqdm, "monitor_interval", 0)  # no thread that looks at another clock
        monkeypatch.setattr(sys, "stderr", Stream(terminal))
        with progress_bar(seconds, "reading", unit="B") as bar:
            for _ in range(seconds):
                now[0] += 1
                bar.update()
        written = sys.stderr.getvalue()
        assert written.endswith("\n") and "reading: 100%" in written and "1.00B/s" in written
        return [state.split("|")[2].split()[0] for state in written.split("\r") if state.strip()]

    return show


def test_a_terminal_sees_every_second(shown):
    assert set(shown(True, 290)) == {f"{n}/290" for n in range(291)}


def test_a_log_sees_the_beginning_every_minute_and_the_end(shown):
    assert shown(False, 290) == ["0/290", "60/290", "120/290", "180/290", "240/290", "290/290"]


def test_a_log_of_a_moment_sees_the_beginning_and_the_end(shown):
    assert shown(False, 2) == ["0/2", "2/2"]
