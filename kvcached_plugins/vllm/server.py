"""The engines that an API server of vLLM talks to: which they are, and what they may have."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import psutil

from kvcached_vmm.errors import KVCachedError, LedgerError
from kvcached_vmm.ledger import Ledger, devices
from kvcached_vmm.records import SLOTS, AccountView, LedgerView


class OwnEngines:
    """Tells the engines of one ``vllm serve`` from all others: they run in processes that it, or a
    process that it started, has started. Engines in another pid namespace are never its own.

    ``arguments`` are those of the command line, as vLLM keeps them in ``app.state.args``.
    """

    def __init__(self, arguments: Any) -> None:
        parent = multiprocessing.parent_process()
        one_of_several = (getattr(arguments, "api_server_count", None) or 1) > 1
        self.root_pid = parent.pid if parent and parent.pid and one_of_several else os.getpid()
        self._namespace = os.stat("/proc/self/ns/pid").st_ino
        self._known: dict[tuple[int, float], bool] = {}

    def __call__(self, account: AccountView) -> bool:
        if account.namespace != self._namespace:
            return False
        process = account.pid, account.started
        if process not in self._known:
            if len(self._known) >= 2 * SLOTS:
                self._known.clear()
            self._known[process] = self._is_below(account.pid)
        return self._known[process]

    def _is_below(self, pid: int) -> bool:
        """Takes about a millisecond."""
        try:
            process = psutil.Process(pid)
            return self.root_pid in (pid, *(each.pid for each in process.parents()))
        except psutil.Error:
            return False


class Refused(KVCachedError):
    """The limits contradict each other, or what others were promised."""


class Change(NamedTuple):
    """What ``Ledger.set_terms`` is told: sizes in bytes; what is None stays."""

    minimum_bytes: int | None = None
    maximum_bytes: int | None = None
    weight: float | None = None
    cache_bytes: int | None = None
    no_maximum: bool = False
    no_cache_bound: bool = False


class Server:
    """The engines of one server: those accounts in the ledgers of ``directory`` that are ``mine``.

    Safe to use from several threads.
    """

    def __init__(self, directory: Path, mine: Callable[[AccountView], bool]) -> None:
        self._directory = directory
        self._mine = mine

    def read(self) -> list[tuple[LedgerView, list[AccountView]]]:
        """Each device that has engines of this server, and these.

        Raises:
            LedgerError: a ledger cannot be read.
        """
        found = []
        for device in devices(self._directory):
            with contextlib.closing(Ledger.open(self._directory, device)) as ledger:
                view = ledger.snapshot()
            if accounts := [account for account in view.accounts if self._mine(account)]:
                found.append((view, accounts))
        return found

    def apply(self, change: Change) -> None:
        """Make the change for all engines of this server, or for none.

        Raises:
            Refused: a ledger does not take it.
            LedgerError: there is no engine, or a ledger cannot be read.
        """
        found = [(view.device, account) for view, accounts in self.read() for account in accounts]
        if not found:
            raise LedgerError("No engine of this server is in a ledger.")
        with contextlib.ExitStack() as undo:
            for device, account in found:
                try:
                    set_terms(self._directory, device, account, change)
                except LedgerError as error:
                    raise Refused(str(error)) from error
                undo.callback(self._restore, device, account)
            undo.pop_all()

    def _restore(self, device: str, account: AccountView) -> None:
        """Undo a change, for another engine's was refused. Who has left meanwhile needs nothing."""
        before = Change(
            account.minimum_bytes,
            account.maximum_bytes,
            account.weight,
            account.cache_bytes,
            account.maximum_bytes is None,
            account.cache_bytes is None,
        )
        with contextlib.suppress(LedgerError):
            set_terms(self._directory, device, account, before)


def set_terms(directory: Path, device: str, account: AccountView, change: Change) -> None:
    """Tell the ledger.

    Raises:
        LedgerError: it refuses, or cannot be used.
    """
    with contextlib.closing(Ledger.open(directory, device)) as ledger:
        ledger.set_terms(account, **change._asdict())
