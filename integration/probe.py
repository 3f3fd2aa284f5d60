"""An account that asks for memory as an engine does, to time how soon neighbours give it."""

from __future__ import annotations

import time

from kvcached_vmm.ledger import Account
from kvcached_vmm.units import format_size

LOOK_SECONDS = 0.0002


def wait_for_grant(
    account: Account, size_bytes: int, unit_bytes: int, timeout_s: float = 30.0
) -> float:
    """Seconds until the ledger has granted `size_bytes`, which stay granted.

    Raises:
        TimeoutError: they were not; what was granted has been given back.
    """
    began = time.perf_counter()
    granted = account.reserve(size_bytes, unit_bytes)
    while granted < size_bytes:
        account.report(0, 0, size_bytes - granted)
        time.sleep(LOOK_SECONDS)
        granted += account.reserve(size_bytes - granted, unit_bytes)
        if time.perf_counter() - began > timeout_s:
            account.report(0, 0)
            account.cancel(granted)
            raise TimeoutError(f"{format_size(granted)} of {format_size(size_bytes)} were granted")
    seconds = time.perf_counter() - began
    account.report(0, 0)
    return seconds
