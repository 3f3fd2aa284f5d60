"""What can go wrong, as types. Every message says what happened, why, and what to do."""

from __future__ import annotations


class KVCachedError(Exception):
    """Base of every error this project raises; its text is one sentence for a person."""


class DriverError(KVCachedError):
    """A driver call failed. ``call`` names it and ``code`` is what the driver answered."""

    def __init__(self, call: str, code: str) -> None:
        super().__init__(f"{call} failed: {code}.")
        self.call = call
        self.code = code


class OutOfMemory(DriverError):
    """No physical memory for an extent right now. Nothing has changed; the call may be repeated."""


class DeviceUnsupported(KVCachedError):
    """This machine or GPU cannot map virtual memory the way an arena needs it."""


class LedgerError(KVCachedError):
    """The shared ledger cannot be used: wrong owner, corrupt, newer version, or full."""


class LedgerBusy(LedgerError):
    """Another process holds the ledger's lock. Nothing has changed; the call may be repeated."""


class SettingsError(KVCachedError):
    """A variable holds something that we cannot accept."""


class ContractError(KVCachedError):
    """The installed engine is not one that we know how to extend."""


class EngineUnsupported(KVCachedError):
    """The engine runs with a model, layout or feature that an elastic cache does not support."""
