"""The engines that an API server of vLLM talks to: which they are, and what they may have."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from kvcached_plugins import control
from kvcached_plugins.limits import Change
from kvcached_vmm.errors import LedgerError
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
        reading = control.read(self._directory)
        if reading.faults:
            raise LedgerError(" ".join(reading.faults))
        found = [
            (view, [each for each in view.accounts if self._mine(each)]) for view in reading.ledgers
        ]
        return [(view, accounts) for view, accounts in found if accounts]

    def apply(self, change: Change) -> None:
        """Make the change for all engines of this server, or for none.

        Raises:
            BadLimit: a ledger does not take it.
            LedgerError: there is no engine, or a ledger cannot be read.
        """
        found = [(view, account) for view, accounts in self.read() for account in accounts]
        if not found:
            raise LedgerError("No engine of this server is in a ledger.")
        control.apply(change, found, self._directory)
