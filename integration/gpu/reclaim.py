"""How soon memory is there that an idle or busy neighbour on the device holds as prefix cache.

One stock ``vllm serve`` with the plugin fills a budget with cached prefixes. This process is the
second engine of the ledger: it asks for memory, waits for the grant, and commits it with the
device's driver. Beside it the driver's own floor for the same hand-over, measured in the same run.
Writes reclaim.json, again after each size.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from integration.gpu import floor, harness, watch
from integration.gpu.bursts import Load, Reply, figures, longest_gap_s, spread_ms
from integration.gpu.process import exit_on_signals, stop_all
from integration.gpu.record import GIB, Json
from integration.gpu.tenants import OURS, House, Seat
from integration.gpu.vmm_cost import MIB, make_arena
from integration.gpu.watch import LedgerWatch, gib
from integration.probe import wait_for_grant
from kvcached_vmm.errors import OutOfMemory
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import format_size

PEER = "peer"
EXTENT_BYTES = 16 * MIB
SLACK_EXTENTS = 24
"""Of the budget, beyond the largest size and what the busy load keeps live."""
SERVER_BYTES = 20 * GIB
"""Weights, activations and contexts of an 8B server, this process and the holder, generously."""
GOALS_MS = {(GIB, "idle"): 12.0, (8 * GIB, "idle"): 50.0}
"""Request to grant, median."""
BUSY_MS = 10.0
"""Request to grant of 1 GiB from a busy peer: one step of its, and this."""
SETTLE_S = 1.0
"""After a fill: memory without content is given back, and the engine is quiet."""
AFTERMATH_S = 0.2
"""From a grant to a look at what the peer gave beyond it: releases that were under way are done."""
SMALL = {
    "sizes": [64 << 20, 256 << 20],
    "rounds": [3, 2],
    "fill": Load(1, 256, 1),
    "busy": Load(1, 64, 64),
    "streams": 2,
}


def parse(words: Sequence[str]) -> argparse.Namespace:
    parser = harness.parser(__doc__, "reclaim.py")
    add = parser.add_argument
    add("--sizes", type=harness.sizes, default=[GIB, 8 * GIB, 32 * GIB], help="comma-separated")
    add("--rounds", type=_counts, default=[10, 6, 3], help="of each size, idle and busy")
    add("--fill", type=harness.load, default=Load(1, 512, 1), help="what fills the cache")
    add("--busy", type=harness.load, default=Load(1, 256, 256), help="requests of a busy peer")
    add("--streams", type=int, default=16, help="of them at any time")
    return harness.parse(parser, words, SMALL)


def _counts(text: str) -> list[int]:
    return [int(word) for word in text.split(",")]


class Probe:
    """The second engine: an account in the device's ledger and an arena on the device."""

    def __init__(self, ledger: Ledger, cpu: bool, largest_bytes: int) -> None:
        self._driver = floor.open_driver(cpu)
        self._arena = make_arena(self._driver, EXTENT_BYTES, largest_bytes)
        self._account = ledger.join("probe", None, engine="probe", arena_bytes=largest_bytes)

    def take(self, size_bytes: int) -> Json:
        """Ask for memory that only the peer can give, commit it, and give all of it back."""
        account, arena = self._account, self._arena
        free = account.view().free_bytes // EXTENT_BYTES * EXTENT_BYTES
        ballast = account.reserve(free, EXTENT_BYTES)
        try:
            peer = next(each for each in account.view().accounts if each.name == PEER)
            began = time.time()
            grant_s = wait_for_grant(account, size_bytes, EXTENT_BYTES)
            extents = range(size_bytes // EXTENT_BYTES)
            before = time.perf_counter()
            short = self._commit(extents)
            commit_s = time.perf_counter() - before
            account.commit(size_bytes, size_bytes)
            time.sleep(AFTERMATH_S)
            too_much = account.view().free_bytes
            arena.decommit(extents)
            account.release(size_bytes)
        finally:
            account.cancel(ballast)
        return {
            "began": began,
            "grant_s": grant_s,
            "commit_s": commit_s,
            "driver_was_short": short,
            "given_beyond_gib": gib(too_much),
            "free_taken_before_gib": gib(ballast),
            "peer_cached_gib": gib(peer.cached_bytes),
            "peer_idle_gib": gib(peer.idle_bytes),
        }

    def close(self) -> None:
        self._account.close()
        self._arena.close()

    def _commit(self, extents: range) -> int:
        """How often the driver had not got what the ledger had granted; it should be never."""
        for short in range(1000):
            try:
                self._arena.commit(extents)
                return short
            except OutOfMemory:
                time.sleep(0.002)
        raise TimeoutError("the driver has not got what the ledger granted")


class Reclaim:
    """The run: floor, server, and rounds against it."""

    def __init__(self, run: harness.Run) -> None:
        o = run.o
        self.run = run
        self.sizes = dict(zip(o.sizes, o.rounds, strict=False))
        if run.on_gpu:
            room = run.sampler.total_bytes - run.sampler.used_bytes() - SERVER_BYTES
            self.sizes = {size: n for size, n in self.sizes.items() if size <= room - 8 * GIB}
        live = o.streams * (o.busy.prompt_tokens + o.busy.output_tokens) * run.token_bytes
        largest = max(self.sizes)
        self.budget_bytes = largest + 2 * live + SLACK_EXTENTS * EXTENT_BYTES
        o.plugin_env = {
            "KVCACHED_BUDGET": str(self.budget_bytes),
            "KVCACHED_EXTENT": str(EXTENT_BYTES),
            "KVCACHED_CACHE_TTL": "3600",
            **o.plugin_env,
        }
        self.found: Json = {"budget_gib": gib(self.budget_bytes), "floor": {}, "peers": {}}
        self._orders = 0

    def play(self) -> None:
        run, o = self.run, self.run.o
        folder = run.work / "elastic"
        house = House(run, folder, {PEER: Seat(self.budget_bytes, OURS)})
        self.house = house
        try:
            if not house.wait_ready(min(run.deadline, time.time() + o.ready_s)):
                return
            for size, rounds in self.sizes.items():
                name = format_size(size)
                self.found["floor"][name] = floor.measure(o.cpu, size, EXTENT_BYTES, rounds)
            self.save()
            self.looking = LedgerWatch(house.ledger, run.device, 1.0)
            probe = Probe(Ledger.open(house.ledger, run.device), o.cpu, max(self.sizes))
            try:
                for peer in ("idle", "busy"):
                    self.rounds(probe, peer)
            finally:
                probe.close()
                self.looking.stop()
        finally:
            self.found["servers"] = house.describe()
            self.save()
            house.stop()
            self.found["servers"] = house.describe()

    def rounds(self, probe: Probe, peer: str) -> None:
        for size, rounds in self.sizes.items():
            with self.serving(f"busy-{size}", peer == "busy") as load:
                before = self.looking.counters()[PEER]
                taken = []
                for _ in range(rounds):
                    if self.run.left_s() < 20.0:
                        self.run.note(f"{format_size(size)}, {peer}: no time for all rounds")
                        break
                    self.fill()
                    taken.append(probe.take(size))
                counted = watch.counted(before, self.looking.counters()[PEER])
            found = figure(taken, load)
            found["peer_counters"] = counted
            self.found["peers"].setdefault(peer, {})[format_size(size)] = found
            self.save()
            print(f"{format_size(size)}, {peer}: {json.dumps(found['grant_ms'])}", flush=True)

    def fill(self) -> None:
        """Until the peer's cache holds what the budget has, but for a slack."""
        run, fill = self.run, self.run.o.fill
        tokens = fill.prompt_tokens
        for _ in range(6):
            view = self.looking.view()
            assert view is not None
            peer = next(each for each in view.accounts if each.name == PEER)
            missing = self.budget_bytes - peer.cached_bytes - peer.live_bytes
            count = -(-(missing - SLACK_EXTENTS // 2 * EXTENT_BYTES) // (tokens * run.token_bytes))
            if count <= 0:
                break
            self._orders += 1
            label, load = f"fill-{self._orders}", fill._replace(requests=count)
            seeds = {PEER: 10_000 + self._orders}
            began, replies = self.house.play(label, load, seeds, run.deadline)
            told = figures(replies[PEER], load, began)
            if told["failed"]:
                run.note(f"{label}: {told['failed']} requests failed: {told['errors']}")
            time.sleep(0.1)
        time.sleep(SETTLE_S)

    @contextmanager
    def serving(self, label: str, busy: bool) -> Iterator[list[Reply]]:
        """A steady load on the peer while the block runs; its replies are there afterwards."""
        replies: list[Reply] = []
        if not busy:
            yield replies
            return
        o, client = self.run.o, self.house.tenants[PEER].client
        client.order(label, time.time(), o.busy, 500_000 + len(label), o.streams)
        time.sleep(2.0)
        try:
            yield replies
        finally:
            client.release(label)
            until = min(self.run.deadline, time.time() + 60.0)
            while not client.done(label) and time.time() < until:
                time.sleep(0.05)
            replies += client.replies(label)
            errors = [each.error for each in replies if each.error]
            if errors or not replies:
                self.run.note(f"{label}: {len(errors)} of {len(replies)} failed: {errors[:3]}")

    def save(self) -> None:
        self.run.save({**self.found, "goals": goals(self.found)})


def figure(taken: Sequence[Json], load: Sequence[Reply]) -> Json:
    """Of all rounds with one size: grant, commit, and what the peer's requests noticed."""
    found: Json = {
        "grant_ms": spread_ms(each["grant_s"] for each in taken),
        "commit_ms": spread_ms(each["commit_s"] for each in taken),
        "grant_and_commit_ms": spread_ms(each["grant_s"] + each["commit_s"] for each in taken),
        "rounds": list(taken),
    }
    if load:
        found["step_ms"] = spread_ms(gap for reply in load for gap in reply.gaps_s if gap > 1e-4)
        beside = (
            longest_gap_s(load, each["began"], each["began"] + each["grant_s"]) for each in taken
        )
        found["longest_step_beside_ms"] = spread_ms(gap for gap in beside if gap is not None)
    return found


def goals(found: Json) -> list[Json]:
    """Each goal whose size was measured: what may be, what is, and the driver's own floor."""
    told = []
    limits = dict(GOALS_MS)
    step = found["peers"].get("busy", {}).get(format_size(GIB), {}).get("step_ms")
    if step:
        limits[GIB, "busy"] = step["median"] + BUSY_MS
    for (size_bytes, peer), limit in limits.items():
        size = format_size(size_bytes)
        grant: Json = found["peers"].get(peer, {}).get(size, {}).get("grant_ms", {})
        if grant:
            told.append(
                {
                    "size": size,
                    "peer": peer,
                    "grant_ms_at_most": round(limit, 3),
                    "grant_ms": grant["median"],
                    "driver_release_ms": found["floor"][size]["release_there_ms"].get("median"),
                    "driver_hand_over_ms": found["floor"][size]["hand_over_ms"].get("median"),
                    "met": grant["median"] <= limit,
                }
            )
    return told


def main() -> int:
    o = parse(sys.argv[1:])
    exit_on_signals()
    run = harness.Run("reclaim", o)
    reclaim = Reclaim(run)
    try:
        reclaim.play()
    except Exception as error:
        run.note(f"{type(error).__name__}: {error}"[:300])
    finally:
        stop_all()
        run.attempt("the last save", reclaim.save)
        print(
            json.dumps({"goals": goals(reclaim.found), "floor": reclaim.found["floor"]}, indent=1)
        )
        print(f"ended after {time.time() - o.started:.1f} s, logs in {run.work}")
    missed = [goal for goal in goals(reclaim.found) if not goal["met"]]
    return 1 if run.notes or missed or not reclaim.found["peers"] else 0


if __name__ == "__main__":
    sys.exit(main())
