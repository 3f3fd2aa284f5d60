"""The thread that answers neighbours for an engine that takes no steps."""

from __future__ import annotations

import logging
import threading
import weakref
from typing import Protocol

from kvcached_plugins.shares import Shares
from kvcached_plugins.tenant import LOOK_SECONDS
from kvcached_vmm.errors import KVCachedError

logger = logging.getLogger("vllm.kvcached")

RELEASE_LOOK_SECONDS = 0.001
"""How soon an idle engine looks whether the device has come to what it gives back, and then twice
as late each time: neighbours wait, and a device that runs their kernels needs a moment to turn."""


HEARTBEAT_SECONDS = 0.2
"""How often an idle engine shows that it would answer (``fairness.SILENCE_SECONDS``), and how often
one is woken that serves and that nobody waits for: whatever takes the interpreter from a launch
makes it longer."""


class Answering(Protocol):
    """An engine that answers its neighbours when it is told to look."""

    @property
    def stopped(self) -> bool: ...

    @property
    def is_calm(self) -> bool: ...

    @property
    def is_releasing(self) -> bool: ...

    def look(self, heard: int) -> None: ...


def start_reclaimer(engine: Answering, shares: Shares) -> None:
    """Have ``engine`` look when the bell of ``shares`` rings, and now and then, until they are
    closed. That does not keep alive an engine that its user has dropped."""
    threading.Thread(
        target=_run, args=(weakref.ref(engine), shares), name="kvcached-reclaimer", daemon=True
    ).start()


def _run(watched: weakref.ref[Answering], shares: Shares) -> None:
    heard, pause, soon = 0, LOOK_SECONDS, RELEASE_LOOK_SECONDS
    while (heard := shares.wait_for_bell(heard, pause)) >= 0:
        engine = watched()
        if engine is None:
            return
        try:
            engine.look(heard)
        except (KVCachedError, ValueError) as error:  # ValueError: the ledger is being closed
            if not engine.stopped:
                logger.error("kvcached: memory cannot be given back now: %s", error)
        if engine.is_releasing:
            pause, soon = soon, min(2 * soon, LOOK_SECONDS)
        else:
            pause = HEARTBEAT_SECONDS if engine.is_calm else LOOK_SECONDS
            soon = RELEASE_LOOK_SECONDS
        del engine
