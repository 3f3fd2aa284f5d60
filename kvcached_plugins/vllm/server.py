"""The engines that an API server of vLLM talks to: which they are, and what they may have."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from pathlib import Path
from typing import Any

from kvcached_plugins import control
from kvcached_plugins.limits import Change
from kvcached_plugins.own_engines import OwnEngines
from kvcached_vmm.errors import LedgerError
from kvcached_vmm.records import AccountView, LedgerView


def own_engines(arguments: Any) -> OwnEngines:
    """The engines of this ``vllm serve``; ``arguments`` are those of its command line, as vLLM
    keeps them in ``app.state.args``. One of several API servers shares its parent's engines."""
    parent = multiprocessing.parent_process()
    one_of_several = (getattr(arguments, "api_server_count", None) or 1) > 1
    return OwnEngines(parent.pid if parent and one_of_several else None)


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
