"""A bell that any process that maps the same word can ring, and wait for without polling."""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import time

_FUTEX = {"x86_64": 202, "aarch64": 98}.get(platform.machine())
"""The number of the futex system call; it is not in the C library."""
_WAIT, _WAKE = 0, 1
_EVERYBODY = (1 << 31) - 1
_POLL_SECONDS = 0.005
"""How often to look on a machine whose system call we do not know."""
_WORD = struct.Struct("<I")

_libc = ctypes.CDLL(None, use_errno=True)


class _Timespec(ctypes.Structure):
    _fields_ = (("seconds", ctypes.c_long), ("nanoseconds", ctypes.c_long))


class Bell:
    """The 32-bit word at ``at`` of a shared mapping, which may be closed at any time.

    The address is all that is kept: an exported buffer would keep the mapping open, and to the
    system call an address without memory is merely an error.
    """

    def __init__(self, shared: mmap.mmap, at: int) -> None:
        self._shared = shared
        self._at = at
        self._address = ctypes.c_void_p(ctypes.addressof(ctypes.c_uint32.from_buffer(shared, at)))

    @property
    def rings(self) -> int:
        """A figure that is another one after every ring."""
        return int(_WORD.unpack_from(self._shared, self._at)[0])

    def ring(self) -> None:
        """Wake everybody who waits.

        The time is what no slow ringer can set back to a figure that somebody has heard.
        """
        word = _WORD.pack(time.monotonic_ns() & 0xFFFFFFFF)
        self._shared[self._at : self._at + _WORD.size] = word
        if _FUTEX is not None:
            _libc.syscall(_FUTEX, self._address, _WAKE, _EVERYBODY, None, None, 0)

    def wait(self, heard: int, timeout_s: float) -> None:
        """Return when it has rung since ``rings`` was ``heard``, after ``timeout_s``, or earlier.

        The interpreter lock is not held meanwhile.
        """
        if _FUTEX is None:
            time.sleep(min(timeout_s, _POLL_SECONDS))
            return
        limit = _Timespec(int(timeout_s), int(timeout_s % 1 * 1e9))
        value = ctypes.c_uint32(heard)
        _libc.syscall(_FUTEX, self._address, _WAIT, value, ctypes.byref(limit), None, 0)
