"""Makes calls of the host driver fail in engines under test. For tests only: nothing of the package
knows of it. Python imports this file at its start if PYTHONPATH names its folder.

`KVC_TEST_FAULTS` names a folder. `plan.json` in it says which calls fail from now on:
`{"kinds": ["create"], "share": 0.3, "times": 5}`; what has failed is added to `failed`. With
`"taken": true` another process has all memory that the driver has free.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.machinery
import importlib.util
import json
import os
import random
import sys
from pathlib import Path
from typing import Any

KINDS = ("create", "map", "allow", "unmap", "release", "memory", "reserve")


class Plan:
    """What fails now. Read anew when the file is another one."""

    def __init__(self, folder: str) -> None:
        self._path = f"{folder}/plan.json"
        self._failed = os.open(f"{folder}/failed", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        self._found = (0, 0)
        self._plan: dict[str, Any] = {}
        self._left = 0
        self._chance = random.Random(1)

    def fails(self, kind: str) -> bool:
        self._look()
        plan = self._plan
        if kind not in plan.get("kinds", ()) or not self._left:
            return False
        if self._chance.random() >= plan.get("share", 1.0):
            return False
        self._left -= 1
        os.write(self._failed, f"{kind}\n".encode())
        return True

    def is_taken(self) -> bool:
        """Whether another process has all memory."""
        self._look()
        return bool(self._plan.get("taken"))

    def _look(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            file_now = os.stat(self._path)
            found = (file_now.st_ino, file_now.st_mtime_ns)  # numbers of files come back
            if found != self._found:
                self._found = found
                with open(self._path, encoding="ascii") as file:
                    self._plan = json.load(file)
                self._left = self._plan.get("times") or -1


def install(folder: str) -> None:
    from kvcached_vmm.driver import DeviceMemory
    from kvcached_vmm.errors import DriverError, OutOfMemory
    from kvcached_vmm.host_driver import HostDriver

    plan = Plan(folder)

    def faulty(kind: str) -> Any:
        original = getattr(HostDriver, kind)
        error = OutOfMemory if kind == "create" else DriverError

        @functools.wraps(original)
        def call(*args: Any) -> Any:
            if plan.fails(kind):
                raise error(kind, "a fault made on purpose")
            return original(*args)

        return call

    for kind in KINDS:
        setattr(HostDriver, kind, faulty(kind))
    ask = HostDriver.memory

    def memory(driver: HostDriver) -> DeviceMemory:
        found = ask(driver)
        return DeviceMemory(0, found.total_bytes) if plan.is_taken() else found

    HostDriver.memory = memory  # type: ignore[method-assign]


def run_the_next() -> None:
    """Python runs one ``sitecustomize`` only: run the one that this one hides, if there is one."""
    here = str(Path(__file__).parent)
    others = [entry for entry in sys.path if Path(entry) != Path(here)]
    found = importlib.machinery.PathFinder.find_spec("sitecustomize", others)
    if found is not None and found.loader is not None:
        module = importlib.util.module_from_spec(found)
        sys.modules["sitecustomize_of_others"] = module
        found.loader.exec_module(module)


run_the_next()
if os.environ.get("KVC_TEST_FAULTS"):
    install(os.environ["KVC_TEST_FAULTS"])
