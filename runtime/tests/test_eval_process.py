"""`tq eval`: the processes of its engines, and what is told when one fails."""

import os
import time

import pytest

from turboquant_runtime.eval import process


def _counts(argument, say):
    say("one")
    print("words of its own")
    return argument + 1


def _raises(argument, say):
    raise ValueError("first line\nsecond line")


def _vanishes(argument, say):
    os._exit(3)


def _hangs(argument, say):
    time.sleep(600)


def test_a_process_says_what_it_does_and_hands_back_its_result(tmp_path) -> None:
    assert list(process.run(_counts, 1, tmp_path / "log")) == ["one", process.Done(2)]
    assert "words of its own" in (tmp_path / "log").read_text()


@pytest.mark.parametrize(
    ("work", "reason"),
    [
        (_raises, "ValueError: first line second line"),
        (_vanishes, "its process ended"),
        (_hangs, "nothing was heard of it for 3 s"),
    ],
)
def test_a_process_that_fails_is_told_in_one_line(tmp_path, monkeypatch, work, reason) -> None:
    if work is _hangs:
        monkeypatch.setattr(process, "SILENT_SECONDS", 3.0)
    assert list(process.run(work, None, tmp_path / "log")) == [process.Failed(reason)]
