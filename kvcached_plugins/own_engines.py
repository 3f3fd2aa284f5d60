"""Which engines of the ledgers belong to a server: those whose processes it has started."""

from __future__ import annotations

import os

import psutil

from kvcached_vmm.records import SLOTS, AccountView


class OwnEngines:
    """Tells the engines of one server from all others: they run in processes that it, or a process
    that it started, has started. Engines in another pid namespace are never its own.

    Args:
        root_pid: the server's first process; None: this one.
    """

    def __init__(self, root_pid: int | None = None) -> None:
        self.root_pid = root_pid or os.getpid()
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
