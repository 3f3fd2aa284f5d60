"""What may be asked of a server's engines over HTTP, and how it is put in force: all or nothing."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from kvcached_vmm.errors import KVCachedError, LedgerError
from kvcached_vmm.ledger import Ledger, devices
from kvcached_vmm.records import AccountView, LedgerView
from kvcached_vmm.units import LARGEST, parse_size

FIELDS = ("minimum", "maximum", "weight", "cache")
WEIGHTS = 0.01, 100.0


class BadRequest(KVCachedError):
    """The request cannot be done; ``status`` is the HTTP status that says so."""

    def __init__(self, status: int, sentence: str) -> None:
        super().__init__(sentence)
        self.status = status


class Change(NamedTuple):
    """What ``Ledger.set_terms`` is told: sizes in bytes; what is None stays."""

    minimum_bytes: int | None = None
    maximum_bytes: int | None = None
    weight: float | None = None
    cache_bytes: int | None = None
    no_maximum: bool = False
    no_cache_bound: bool = False


def parse(body: bytes) -> Change:
    """The change that a JSON object asks for.

    Raises:
        BadRequest: 400 if it is not JSON, 422 if it is not a change.
    """
    try:
        asked = json.loads(body, object_pairs_hook=_each_once)
    except (ValueError, RecursionError):
        raise BadRequest(400, "The body is not JSON.") from None
    if not isinstance(asked, dict) or not asked:
        raise BadRequest(422, f"Give a JSON object with one or more of {', '.join(FIELDS)}.")
    unknown = sorted(asked.keys() - set(FIELDS))
    if unknown:
        raise BadRequest(422, f"{unknown[0]!r} is none of {', '.join(FIELDS)}.")
    return Change(
        _size(asked, "minimum"),
        None if _is_null(asked, "maximum") else _size(asked, "maximum"),
        _weight(asked),
        None if _is_null(asked, "cache") else _size(asked, "cache"),
        _is_null(asked, "maximum"),
        _is_null(asked, "cache"),
    )


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
        found = []
        for device in devices(self._directory):
            with contextlib.closing(Ledger.open(self._directory, device)) as ledger:
                view = ledger.snapshot()
            if accounts := [account for account in view.accounts if self._mine(account)]:
                found.append((view, accounts))
        return found

    def apply(self, change: Change) -> None:
        """Make the change for all engines of this server, or for none.

        Raises:
            BadRequest: 422 if the ledger refuses it, 503 if there is no engine.
            LedgerError: a ledger cannot be read.
        """
        found = [(view.device, account) for view, accounts in self.read() for account in accounts]
        if not found:
            raise BadRequest(503, "No engine of this server is in a ledger.")
        with contextlib.ExitStack() as undo:
            for device, account in found:
                try:
                    set_terms(self._directory, device, account, change)
                except LedgerError as error:
                    raise BadRequest(422, str(error)) from error
                undo.callback(self._restore, device, account)
            undo.pop_all()

    def _restore(self, device: str, account: AccountView) -> None:
        """Undo a change, for another engine's was refused. Who has left meanwhile needs nothing."""
        before = Change(
            account.minimum_bytes,
            account.maximum_bytes,
            account.weight,
            account.cache_bytes,
            account.maximum_bytes is None,
            account.cache_bytes is None,
        )
        with contextlib.suppress(LedgerError):
            set_terms(self._directory, device, account, before)


def set_terms(directory: Path, device: str, account: AccountView, change: Change) -> None:
    """Tell the ledger.

    Raises:
        LedgerError: it refuses, or cannot be used.
    """
    with contextlib.closing(Ledger.open(directory, device)) as ledger:
        ledger.set_terms(account, **change._asdict())


def _each_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len(dict(pairs)) < len(pairs):
        raise BadRequest(422, "Each field may be given once.")
    return dict(pairs)


def _is_null(asked: dict[str, Any], field: str) -> bool:
    return field in asked and asked[field] is None


def _size(asked: dict[str, Any], field: str) -> int | None:
    if field not in asked:
        return None
    size = asked[field]
    if isinstance(size, str):
        with contextlib.suppress(ValueError):
            size = parse_size(size)
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < LARGEST:
        raise BadRequest(
            422, f"{field} must be a size from 0 up, as a number of bytes or a text such as 2GiB."
        )
    return size


def _weight(asked: dict[str, Any]) -> float | None:
    if "weight" not in asked:
        return None
    weight = asked["weight"]
    least, most = WEIGHTS
    if (
        not isinstance(weight, (int, float))
        or isinstance(weight, bool)
        or not least <= weight <= most
    ):
        raise BadRequest(422, f"weight must be a number from {least:g} to {most:g}.")
    return float(weight)
