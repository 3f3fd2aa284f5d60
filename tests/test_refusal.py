"""Why an engine refused to start reaches whoever started it, in one sentence."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest

from kvcached_plugins.refusal import (
    NOTE,
    Refusal,
    expect_refusals,
    wait_for_engine_startup,
)


@pytest.fixture
def note(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(NOTE, "")
    expect_refusals(tmp_path)
    return Path(os.environ[NOTE])


def refuse_in_a_child(sentence: str) -> None:
    child = os.fork()
    if not child:
        Refusal(sentence)
        os._exit(0)
    os.waitpid(child, 0)


def failed() -> None:
    raise RuntimeError("Engine core initialization failed.")


def test_a_refusal_ends_the_process_with_its_sentence() -> None:
    assert Refusal("no.").code == "kvcached: no."
    assert not isinstance(Refusal("no."), Exception)


def test_the_reason_of_a_child_replaces_the_traceback_of_its_parent(note: Path) -> None:
    refuse_in_a_child("the budget is too small.")
    assert stat.S_IMODE(note.stat().st_mode) == 0o600
    with pytest.raises(Refusal) as refused:
        wait_for_engine_startup(failed)
    assert refused.value.code == "kvcached: the budget is too small."
    assert not note.exists()


def test_the_first_of_several_children_is_heard(note: Path) -> None:
    refuse_in_a_child("the first.")
    refuse_in_a_child("the second.")
    assert note.read_text() == "the first."


def test_a_failure_that_was_not_a_refusal_stays_what_it_was(note: Path) -> None:
    with pytest.raises(RuntimeError, match="initialization failed"):
        wait_for_engine_startup(failed)
    assert not note.exists()


def test_the_process_itself_leaves_no_note(note: Path) -> None:
    Refusal("said here already.")
    assert not note.exists()


def test_a_start_that_works_is_left_alone() -> None:
    assert wait_for_engine_startup(lambda: 7) == 7
