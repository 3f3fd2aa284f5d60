"""Reclaim policies of other packages are used if they work, reported if not, refused if wrong."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping

import pluggy
import pytest
from test_debts import NOW, engine, ledger

from kvcached_plugins import hub
from kvcached_vmm.records import LedgerView

CROWDED = ledger(
    100,
    engine(0, committed_bytes=50, idle_bytes=50),
    engine(1, committed_bytes=50, evictable_bytes=50),
    engine(2, wanted_bytes=20, demand_bytes=20),
)
OURS = {0: 20, 1: 0, 2: 0}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """Each test with a plugin manager of its own."""
    for cached in (hub.plugins, hub._report):
        cached.cache_clear()
    yield
    hub.plugins.cache_clear()


def owed(view: LedgerView = CROWDED) -> dict[int, int]:
    return {each.slot: hub.owed_bytes(view, each.slot, NOW) for each in view.accounts}


class CacheFirst:
    """A policy of somebody else: the cache goes first."""

    @hub.implementation
    def kvcached_debts(self, view: LedgerView, now: float) -> Mapping[int, int]:
        assert now == NOW
        need = sum(each.wanted_bytes for each in view.accounts)
        return {each.slot: need for each in view.accounts if each.evictable_bytes >= need}


class Abstaining:
    @hub.implementation
    def kvcached_debts(self, view: LedgerView) -> None:
        return None


class Answering:
    """Answers whatever it was made with, or raises it."""

    def __init__(self, answer: object) -> None:
        self._answer = answer

    @hub.implementation
    def kvcached_debts(self, view: LedgerView, now: float) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


def test_without_plugins_our_policy_decides() -> None:
    assert owed() == OURS


def test_a_policy_of_somebody_else_decides_in_our_place() -> None:
    hub.plugins().register(CacheFirst())
    assert owed() == {0: 0, 1: 20, 2: 0}


def test_a_policy_may_leave_the_answer_to_the_next() -> None:
    hub.plugins().register(CacheFirst())
    hub.plugins().register(Abstaining())
    assert owed() == {0: 0, 1: 20, 2: 0}


def test_nobody_owes_what_a_policy_does_not_ask_for() -> None:
    hub.plugins().register(Answering({}))
    assert owed() == {0: 0, 1: 0, 2: 0}


@pytest.mark.parametrize(
    "answer",
    [
        pytest.param(RuntimeError("a bug"), id="raises"),
        pytest.param([1, 2, 3], id="no-mapping"),
        pytest.param({0: "much", 1: "more", 2: "most"}, id="no-numbers"),
        pytest.param({0: float("nan"), 1: float("inf"), 2: None}, id="no-finite-numbers"),
    ],
)
def test_a_policy_that_fails_is_reported_and_ours_is_used(
    answer: object, caplog: pytest.LogCaptureFixture
) -> None:
    hub.plugins().register(Answering(answer))
    with caplog.at_level(logging.ERROR, "kvcached"):
        assert owed() == OURS
    assert "a reclaim policy failed; the default one is used" in caplog.text


def test_a_policy_that_fails_all_the_time_is_not_reported_all_the_time(
    caplog: pytest.LogCaptureFixture,
) -> None:
    hub.plugins().register(Answering(RuntimeError("a bug")))
    with caplog.at_level(logging.ERROR, "kvcached"):
        for _ in range(100):
            assert owed() == OURS
    assert len(caplog.records) == 1


@pytest.mark.parametrize("answer", [{0: -5}, {7: 100}])
def test_odd_answers_ask_nobody_for_anything(answer: Mapping[int, int]) -> None:
    hub.plugins().register(Answering(answer))
    assert owed() == {0: 0, 1: 0, 2: 0}


def test_a_wrong_signature_fails_when_the_plugin_is_registered() -> None:
    class Wrong:
        @hub.implementation
        def kvcached_debts(self, view: LedgerView, budget: int) -> Mapping[int, int]:
            return {}

    with pytest.raises(pluggy.PluginValidationError, match="budget"):
        hub.plugins().register(Wrong())
    assert owed() == OURS


def test_an_installed_plugin_that_hooks_what_does_not_exist_is_named_when_it_is_loaded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Mistaken:
        @hub.implementation
        def kvcached_depts(self, view: LedgerView) -> None:
            return None

    def load(manager: pluggy.PluginManager, group: str, name: str | None = None) -> int:
        manager.register(Mistaken(), "mistaken")
        return 1

    monkeypatch.setattr(pluggy.PluginManager, "load_setuptools_entrypoints", load)
    with pytest.raises(pluggy.PluginValidationError, match="kvcached_depts"):
        hub.plugins()


def test_a_plugin_that_cannot_be_loaded_leaves_our_policy(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def load(manager: pluggy.PluginManager, group: str, name: str | None = None) -> int:
        raise ImportError("no module named nonsense")

    monkeypatch.setattr(pluggy.PluginManager, "load_setuptools_entrypoints", load)
    with caplog.at_level(logging.ERROR, "kvcached"):
        assert owed() == OURS
    assert "no module named nonsense" in caplog.text
