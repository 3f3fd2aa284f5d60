"""Which engines an API server of vLLM talks to."""

from __future__ import annotations

import multiprocessing
import os
from typing import Any

import psutil

from kvcached_vmm.records import AccountView


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

    def __call__(self, account: AccountView) -> bool:
        if account.namespace != self._namespace:
            return False
        try:
            process = psutil.Process(account.pid)
            return self.root_pid in (process.pid, *(each.pid for each in process.parents()))
        except psutil.Error:
            return False
