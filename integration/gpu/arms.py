"""The servers of one arm of a comparison, from start to end: static, ours or kvcached."""

from __future__ import annotations

import argparse
import time
from collections.abc import Mapping, Sequence

from integration.gpu import floor, harness, peer, watch
from integration.gpu.record import GIB, Json
from integration.gpu.tenants import OURS, PEER, STOCK, House, Seat
from integration.gpu.watch import LedgerWatch, gib

KINDS = (STOCK, OURS, PEER)
LOOK_S = 0.05
PEER_WAIT_S = 60.0
"""For kvcached's build to end, which run.sh starts beside whatever comes first."""
SWITCHED_ON = ("kvcached MRV2 persistent allocation", "Init kvcached KV cache allocator")
"""kvcached says one of these in an engine's log when its patches have taken, depending on vLLM's
model runner; else the engine is stock."""


def kinds(text: str) -> list[str]:
    """Parse ``static,ours,kvcached``."""
    words = text.split(",")
    if unknown := set(words) - set(KINDS):
        told = f"no such arm: {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}"
        raise argparse.ArgumentTypeError(told)
    return words


class Arm:
    """Servers of one kind that have ``budget_bytes`` of KV memory between them.

    Static: each its equal part. Ours: one budget. kvcached: it has no budget, so a ballast takes
    what the device has beyond, once its servers are up.
    """

    def __init__(
        self,
        run: harness.Run,
        kind: str,
        engines: Sequence[str],
        budget_bytes: int,
        *,
        engine_args: Mapping[str, Json] | None = None,
        label: str | None = None,
    ) -> None:
        self.run = run
        self.kind = kind
        self.began = time.time()
        self.found: Json = {"arm": kind}
        self.budget_bytes = budget_bytes
        self.before_bytes = run.sampler.used_bytes()
        self._ballast: floor.Holder | None = None
        self.house: House | None = None
        self.watch: LedgerWatch | None = None
        if kind == PEER and (why := peer.missing(run.o.peer, min(PEER_WAIT_S, run.left_s()))):
            run.note(why)
            return
        size = budget_bytes // len(engines) if kind == STOCK else budget_bytes
        arguments = engine_args or {}
        env = {"KVCACHED_BUDGET": str(budget_bytes)} if kind == OURS else {}
        seats = {name: Seat(size, kind, arguments.get(name, {}), env) for name in engines}
        self.house = House(run, run.work / (label or kind), seats)
        if kind == OURS:
            self.watch = LedgerWatch(self.house.ledger, run.device, LOOK_S)
            self.watch.start()

    def wait_ready(self, until: float) -> bool:
        """Whether all serve by then; for kvcached also whether it is really on."""
        house, run = self.house, self.run
        if house is None or not house.wait_ready(min(until, time.time() + run.o.ready_s)):
            return False
        self.found["ready_after_s"] = round(time.time() - self.began, 2)
        if self.kind == PEER:
            return self._confine(house)
        return True

    def _confine(self, house: House) -> bool:
        for tenant in house.tenants.values():
            log = tenant.log.read_text(errors="replace")
            if not any(told in log for told in SWITCHED_ON):
                self.run.note(f"{tenant.name}: kvcached did not switch on; its arm is left out")
                return False
        total = self.run.sampler.total_bytes
        free = total - self.run.sampler.used_bytes()
        size = peer.ballast_bytes(free, total, self.budget_bytes) // GIB * GIB
        if size:
            self._ballast = floor.Holder(self.run.o.cpu, GIB)
            self._ballast.hold(size)
        self.found["ballast_gib"] = gib(size)
        return True

    def end(self) -> None:
        """Stop all of it and wait until its memory is back."""
        if self.watch is not None:
            self.watch.stop()
        if self._ballast is not None:
            self._ballast.close()
            self._ballast = None
        if self.house is not None:
            self.house.stop()
            self.run.sampler.wait_below(self.before_bytes + GIB, timeout_s=15.0)

    def result(self) -> Json:
        """What is known of it: servers, memory over time, and whether the budget was kept."""
        sampler, now = self.run.sampler, time.time()
        found: Json = {**self.found, "budget_gib": gib(self.budget_bytes)}
        if self.house is not None:
            found["servers"] = self.house.describe()
        found["memory_gib"] = sampler.window(self.began, now)
        found["memory_series_gib"] = sampler.series(self.began, now, 0.5)
        if self.watch is not None:
            found["ledger"] = watch.budget_check(self.watch.samples)
            found["ledger_errors"] = self.watch.errors[:10]
            found["series"] = watch.series(self.watch.samples, self.began, 0.5)
        return found
