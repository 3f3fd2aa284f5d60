"""Where other packages plug in: pluggy hooks, found through the entry-point group ``kvcached``."""

from __future__ import annotations

import functools
import logging
from collections.abc import Mapping

import pluggy

from kvcached_vmm.fairness import debts
from kvcached_vmm.records import LedgerView

logger = logging.getLogger("kvcached")

PROJECT = "kvcached"
specification = pluggy.HookspecMarker(PROJECT)
implementation = pluggy.HookimplMarker(PROJECT)


class Hooks:
    """What a plugin may implement, with ``@kvcached_plugins.hub.implementation``."""

    @specification(firstresult=True)
    def kvcached_debts(self, view: LedgerView, now: float) -> Mapping[int, int] | None:
        """Who gives back how much, so that those who wait are served.

        Each engine asks for itself, so the answer must follow from the arguments alone. An engine
        gives what it can spare and no more, whatever it is told: live blocks stay.

        Args:
            view: the ledger of one device.
            now: seconds on the monotonic clock, as in the ledger.

        Returns:
            Bytes by ``AccountView.slot``; None leaves the answer to the next plugin.
        """


class DefaultPolicy:
    """``kvcached_vmm.fairness.debts``."""

    @implementation(trylast=True)
    def kvcached_debts(self, view: LedgerView, now: float) -> Mapping[int, int]:
        return debts(view, now)


@functools.cache
def plugins() -> pluggy.PluginManager:
    """The plugin manager of this process; installed plugins are loaded at the first call.

    Raises:
        pluggy.PluginValidationError: a plugin implements a hook that does not exist, or with
            other arguments.
    """
    manager = pluggy.PluginManager(PROJECT)
    manager.add_hookspecs(Hooks)
    manager.register(DefaultPolicy())
    manager.load_setuptools_entrypoints(PROJECT)
    manager.check_pending()
    return manager


def owed_bytes(view: LedgerView, slot: int, now: float) -> int:
    """What the engine with ``slot`` should give back, by the policy in force.

    A policy of somebody else that fails is reported, once for each error, and ours is asked in its
    place: an engine that waits must not wait for a bug.
    """
    try:
        answer: Mapping[int, int] = plugins().hook.kvcached_debts(view=view, now=now)
        return max(0, int(answer.get(slot, 0)))
    except Exception as error:
        _report(repr(error))
        return debts(view, now).get(slot, 0)


@functools.lru_cache(maxsize=16)
def _report(error: str) -> None:
    logger.exception("kvcached: a reclaim policy failed; the default one is used")
