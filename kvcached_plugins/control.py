"""Who shares memory on this machine, and what each may have; for people's tools and other programs.

    from kvcached_plugins import control

    control.limit("llama", maximum="2GiB", cache="none")
    control.trim()

Reading makes no folder and no file. A change is in force at once, also for an engine that serves
nothing; an engine that is above a new limit gives memory back as its blocks come free.
"""

from __future__ import annotations

import contextlib
import difflib
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvcached_plugins import limits
from kvcached_plugins.limits import NONE as NONE
from kvcached_plugins.limits import BadLimit as BadLimit
from kvcached_plugins.limits import Change, Size
from kvcached_plugins.settings import Settings
from kvcached_vmm.errors import KVCachedError, LedgerError
from kvcached_vmm.ledger import Ledger, devices
from kvcached_vmm.records import AccountView, LedgerView


class UnknownEngine(KVCachedError):
    """No engine has that name or process id. ``nearest`` is a name that was perhaps meant."""

    def __init__(self, message: str, name: str, nearest: str | None) -> None:
        super().__init__(message)
        self.name = name
        self.nearest = nearest


class AmbiguousEngine(KVCachedError):
    """Several engines answer to a name. ``pids`` tells them apart."""

    def __init__(self, message: str, name: str, pids: tuple[int, ...]) -> None:
        super().__init__(message)
        self.name = name
        self.pids = pids


@dataclass(frozen=True)
class Reading:
    """All ledgers of a folder, one after another.

    Attributes:
        at: when they were read, in seconds since the epoch.
        clock: the same on the monotonic clock, which heartbeats and ages are on.
        ledgers: those that could be read, by device.
        faults: one sentence for each of the others.
    """

    at: float
    clock: float
    ledgers: tuple[LedgerView, ...]
    faults: tuple[str, ...] = ()


@dataclass(frozen=True)
class Engine:
    """One engine: its account on each of its devices. An engine with tensor parallelism has more
    than one, perhaps of several processes; limits are of each device."""

    name: str
    accounts: Mapping[str, AccountView]

    @property
    def pids(self) -> tuple[int, ...]:
        return tuple(dict.fromkeys(account.pid for account in self.accounts.values()))

    @property
    def used_bytes(self) -> int:
        """What is committed or reserved, on all its devices."""
        return sum(account.used_bytes for account in self.accounts.values())


def read(directory: str | Path | None = None) -> Reading:
    """What all engines have, now.

    Args:
        directory: the folder of the ledgers; by default the one that engines started with the same
            environment use.

    Raises:
        LedgerError: the folder cannot be read.
        SettingsError: the environment holds something that we cannot accept.
    """
    folder = _folder(directory)
    views, faults = [], []
    for device in devices(folder):
        try:
            with contextlib.closing(Ledger.open(folder, device)) as ledger:
                views.append(ledger.snapshot())
        except LedgerError as error:
            faults.append(str(error))
    return Reading(time.time(), time.monotonic(), tuple(views), tuple(dict.fromkeys(faults)))


def find(name: str, directory: str | Path | None = None) -> Engine:
    """The engine that is called ``name``, or whose process id that is.

    Raises:
        UnknownEngine: there is none.
        AmbiguousEngine: there are several on one device, or several in that process.
        LedgerError, SettingsError: as ``read`` does.
    """
    folder = _folder(directory)
    return _find(name, read(folder), folder)


def limit(
    name: str,
    *,
    minimum: Size | None = None,
    maximum: Size | None = None,
    weight: float | str | None = None,
    cache: Size | None = None,
    directory: str | Path | None = None,
) -> Engine:
    """Change what an engine may have on each of its devices. What is None stays as it is.

    Either all of it is in force when this returns or, if it raises, nothing.

    Args:
        name: as for ``find``.
        minimum: never granted to others; 0: nothing is guaranteed.
        maximum: the most that it may have, from 0 up; ``"none"``: the budget is the limit.
        weight: its share under pressure against the others' weights, from 0.01 to 100.
        cache: what its cached blocks may hold, from 0 up; ``"none"``: anything.
        directory: as for ``read``.

    Returns:
        The engine with the terms that are now in force.

    Raises:
        BadLimit: a value is not one, or contradicts another, or the budget.
        UnknownEngine, AmbiguousEngine, LedgerError, SettingsError: as ``find`` does.
    """
    change = limits.change(minimum, maximum, weight, cache)
    folder = _folder(directory)
    reading = read(folder)
    engine = _find(name, reading, folder)
    views = {view.device: view for view in reading.ledgers}
    apply(change, [(views[device], each) for device, each in engine.accounts.items()], folder)
    return _again(engine, folder)


def apply(
    change: Change, accounts: Sequence[tuple[LedgerView, AccountView]], directory: str | Path
) -> None:
    """Make a change for all ``accounts``, read with the ledgers beside them, or for none.

    Raises:
        BadLimit: a ledger would not take it.
        LedgerError: a ledger does not take it, or cannot be used.
    """
    folder = Path(directory)
    for view, account in accounts:
        limits.check(change, account, view)
    with contextlib.ExitStack() as undo:
        for view, account in accounts:
            with contextlib.closing(Ledger.open(folder, view.device)) as ledger:
                _set(ledger, account, change)
            undo.callback(_restore, folder, view.device, account)
        undo.pop_all()


def trim(name: str | None = None, directory: str | Path | None = None) -> tuple[Engine, ...]:
    """Ask an engine, or all, to give back all that it can spare: what holds no content, and what
    holds cached blocks. It keeps its minimum. Answered in its own time, mostly within 0.1 s.

    Returns:
        Those who were asked, as they were before.

    Raises:
        UnknownEngine, AmbiguousEngine, LedgerError, SettingsError: as ``find`` does.
    """
    folder = _folder(directory)
    reading = read(folder)
    if name is not None:
        engine = _find(name, reading, folder)
        for device, account in engine.accounts.items():
            with contextlib.closing(Ledger.open(folder, device)) as ledger:
                ledger.set_terms(account, trim=True)
        return (engine,)
    asked = []
    for view in reading.ledgers:
        with contextlib.closing(Ledger.open(folder, view.device)) as ledger:
            for account in view.accounts:
                with contextlib.suppress(LedgerError):  # it has left, and all its memory is back
                    ledger.set_terms(account, trim=True)
                    asked.append(Engine(account.name, {view.device: account}))
    return tuple(asked)


def _folder(directory: str | Path | None) -> Path:
    return Settings.read().directory if directory is None else Path(directory)


def _find(name: str, reading: Reading, folder: Path) -> Engine:
    everybody = [(view.device, each) for view in reading.ledgers for each in view.accounts]
    found = [(device, each) for device, each in everybody if each.name == name]
    if not found:
        found = [(device, each) for device, each in everybody if str(each.pid) == name]
    if not found:
        raise _unknown(name, [each.name for _, each in everybody], reading, folder)
    if max(Counter(device for device, _ in found).values()) > 1:
        pids = tuple(dict.fromkeys(each.pid for _, each in found))
        if len(pids) == 1:
            listed = ", ".join(repr(each.name) for _, each in found)
            message = f"process {pids[0]} has several engines: {listed}; give the name of one"
        else:
            listed = ", ".join(map(str, pids))
            message = f"several engines are called {name!r}; give the process id of one: {listed}"
        raise AmbiguousEngine(f"{message} (KVCACHED_NAME tells engines apart).", name, pids)
    return Engine(found[0][1].name, dict(found))


def _unknown(name: str, names: list[str], reading: Reading, folder: Path) -> UnknownEngine:
    if not names:
        why = " ".join(["", *reading.faults])
        return UnknownEngine(f"No engine shares a budget in {folder}.{why}", name, None)
    lower = {each.lower(): each for each in names}
    near = difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.5)
    nearest = lower[near[0]] if near else None
    hint = f"did you mean {nearest!r}?" if nearest else f"there are {', '.join(sorted(set(names)))}"
    return UnknownEngine(f"No engine is called {name!r}; {hint}", name, nearest)


def _restore(folder: Path, device: str, old: AccountView) -> None:
    before = Change(
        old.minimum_bytes,
        -1 if old.maximum_bytes is None else old.maximum_bytes,
        old.weight,
        -1 if old.cache_bytes is None else old.cache_bytes,
    )
    with (
        contextlib.suppress(LedgerError),
        contextlib.closing(Ledger.open(folder, device)) as ledger,
    ):
        _set(ledger, old, before)


def _set(ledger: Ledger, account: AccountView, change: Change) -> None:
    minimum, maximum, weight, cache = change
    ledger.set_terms(
        account,
        minimum_bytes=minimum,
        maximum_bytes=maximum,
        weight=weight,
        cache_bytes=cache,
        no_maximum=maximum is not None and maximum < 0,
        no_cache_bound=cache is not None and cache < 0,
    )


def _again(engine: Engine, folder: Path) -> Engine:
    """The engine with its present figures; what has left meanwhile is as it was."""
    now = {
        (view.device, account.slot, account.joined): account
        for view in read(folder).ledgers
        for account in view.accounts
    }
    return Engine(
        engine.name,
        {
            device: now.get((device, account.slot, account.joined), account)
            for device, account in engine.accounts.items()
        },
    )
