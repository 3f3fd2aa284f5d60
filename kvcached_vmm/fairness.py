"""Who may have how much when there is not enough for all, and who gives back what.

Pure functions of the ledger: every engine computes its own part from the same figures, so nobody
has to be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from kvcached_vmm.records import AGES, NO_LIMIT, AccountView, LedgerView

SILENCE_SECONDS = 1.0
"""An engine reports every 0.1 s at least, unless it is stopped or its machine is overloaded."""


class Claim(NamedTuple):
    """``floor`` bytes are due whatever happens, more than ``cap`` are of no use."""

    weight: float
    floor: int
    cap: int


def fair_shares(total: int, claims: Sequence[Claim]) -> list[int]:
    """Divide ``total`` bytes: all rise together, by their weights, until each has its cap.

    What one does not need goes to the others (weighted max-min fairness). Floors are met first.
    """
    shares = [claim.floor for claim in claims]
    settled = sum(shares)
    steps = sorted(
        (level, opens, index)
        for index, (weight, floor, cap) in enumerate(claims)
        if cap > floor
        for level, opens in ((floor / weight, 1), (cap / weight, 0))
    )
    rising: set[int] = set()
    width = 0.0
    for level, opens, index in steps:
        if settled + level * width >= total:
            break
        if opens:
            rising.add(index)
            settled -= claims[index].floor
            width += claims[index].weight
        else:
            rising.discard(index)
            shares[index] = claims[index].cap
            settled += claims[index].cap
            width -= claims[index].weight
    width = math.fsum(claims[index].weight for index in rising)
    for index in rising:
        weight, floor, cap = claims[index]
        shares[index] = min(cap, max(floor, int((total - settled) * (weight / width))))
    return shares


def claim_of(account: AccountView) -> Claim:
    """What an engine is due, and needs."""
    most = account.demand_bytes
    if account.maximum_bytes is not None:
        most = min(most, account.maximum_bytes)
    return Claim(account.weight, account.minimum_bytes, max(most, account.minimum_bytes))


def debts(view: LedgerView, now: float) -> Mapping[int, int]:
    """Bytes that each engine, by its slot, should give back now, so that those who wait are served.

    First what holds no content, from the engine furthest above its fair share on; then cached
    blocks, those that were used longest ago first, whoever has them. An engine that could evict
    as much of its own cache gets only older ones, and nobody gives its own for what it covets
    itself. The reserve of one that serves is for those who wait, not for those who covet: two would
    hand it to and fro. One that waits itself gives what is above its fair share, to those below
    theirs. Guarantees hold, live blocks are not touched, and what is on its way out counts as free
    already. Who has not reported for a while, as ``now`` on the monotonic clock tells, is neither
    counted on nor served: it could not use what others evict.
    """
    shares = fair_shares(view.capacity_bytes, [claim_of(each) for each in view.accounts])
    share_of = {each.slot: share for each, share in zip(view.accounts, shares, strict=True)}
    heard = [each for each in view.accounts if now - each.heartbeat < SILENCE_SECONDS]
    wanted, covets, older_than = _needs(heard)
    coveted = sum(covets.values())
    free = view.free_bytes + sum(each.leaving_bytes for each in heard)
    owed: dict[int, int] = {}
    spare = {
        each.slot: max(0, each.used_bytes - each.leaving_bytes - each.minimum_bytes)
        for each in heard
    }

    def owe(slot: int, size_bytes: int, need: int) -> None:
        part = min(size_bytes, spare[slot], need - free - sum(owed.values()))
        if part > 0:
            owed[slot] = owed.get(slot, 0) + part
            spare[slot] -= part

    givers = [each for each in heard if not each.wanted_bytes]
    for giver in sorted(givers, key=lambda each: share_of[each.slot] - each.used_bytes):
        need = wanted if giver.live_bytes else wanted + coveted
        owe(giver.slot, giver.idle_bytes, need)
    parcels = sorted(
        (used_at, giver.slot, (giver.evictable_bytes + index) // AGES)
        for giver in givers
        for index, used_at in enumerate(giver.ages)
        if giver.evictable_bytes
    )
    for used_at, slot, size_bytes in parcels:
        of_others = coveted - covets.get(slot, 0)
        owe(slot, size_bytes, wanted + of_others if used_at < older_than else wanted)

    waiters = [each for each in heard if each.wanted_bytes]
    above = {each.slot: each.used_bytes - share_of[each.slot] for each in waiters}
    due = sum(min(each.wanted_bytes, max(0, -above[each.slot])) for each in waiters)
    for waiter in sorted(waiters, key=lambda each: -above[each.slot]):
        owe(waiter.slot, min(waiter.idle_bytes + waiter.evictable_bytes, above[waiter.slot]), due)
    return owed


def _needs(accounts: Iterable[AccountView]) -> tuple[int, dict[int, int], float]:
    """What is wanted, what each one covets, and since when unused cache may go for the latter."""
    wanted, covets = 0, {}
    older_than = 0.0
    for account in accounts:
        most = account.maximum_bytes
        room = NO_LIMIT if most is None else max(0, most - account.used_bytes)
        wanted += min(account.wanted_bytes, room)
        if account.coveted_bytes and room:
            covets[account.slot] = coveted = min(account.coveted_bytes, room)
            has_enough = account.evictable_bytes >= coveted
            older_than = max(older_than, account.ages[0] if has_enough else math.inf)
    return wanted, covets, older_than
