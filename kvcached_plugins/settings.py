"""Every environment variable, parsed and validated in one place.

Names start with ``KVCACHED_``: vLLM warns about ``VLLM_`` names that it does not know.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from kvcached_plugins import OFF, TOGGLE
from kvcached_plugins.limits import LARGEST_WEIGHT, SMALLEST_WEIGHT
from kvcached_vmm.errors import SettingsError
from kvcached_vmm.poison import LARGE, NAN, Poison
from kvcached_vmm.units import parse_size

_ON = ("1", "true", "yes", "on")
_POISONS = {"nan": NAN, "large": LARGE}
_LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR")

CACHE_SECONDS = 60.0
"""Idle eviction at about 45 s is best in published traces; below 40 it thrashes, above 80 it hoards
(Prism, arXiv 2505.04021). A vLLM user expects prefixes to last a little longer than that."""

T = TypeVar("T")


def enabled(environment: Mapping[str, str] | None = None) -> bool:
    """Whether the user asked for an elastic cache.

    Raises:
        SettingsError: the toggle is neither on nor off.
    """
    text = (os.environ if environment is None else environment).get(TOGGLE, "").strip().lower()
    if text in _ON:
        return True
    if text in OFF:
        return False
    raise SettingsError(
        f"{TOGGLE}={text!r} is not understood: use one of {', '.join(_ON)} to turn the elastic KV "
        "cache on, or unset it to leave the engine alone."
    )


@dataclass(frozen=True)
class Settings:
    """What a user can set. Sizes in bytes, times in seconds; None leaves the choice to us.

    Attributes:
        budget_bytes: KVCACHED_BUDGET, what all engines on the device may use for KV together.
        maximum_bytes: KVCACHED_MAX, what this engine may use.
        minimum_bytes: KVCACHED_MIN, what this engine is always sure of.
        weight: KVCACHED_WEIGHT, this engine's share while several wait, against the others'.
        cache_bytes: KVCACHED_CACHE_MAX, how much prefix cache is kept before new blocks evict it.
        cache_seconds: KVCACHED_CACHE_TTL, how long a prefix that nobody asks for is kept.
        decay_seconds: KVCACHED_DECAY, how long memory without content is kept for reuse.
        extent_bytes: KVCACHED_EXTENT, how much memory is committed or released at a time.
        reserve_bytes: KVCACHED_RESERVE, memory committed ahead of need while requests run.
        name: KVCACHED_NAME, how tools call this engine.
        poison: KVCACHED_POISON, fills memory that comes and goes, to find who reads what nobody
            wrote. Costs time.
        directory: KVCACHED_DIR, the folder of the ledger that engines share.
        log_level: KVCACHED_LOG.
    """

    budget_bytes: int | None
    maximum_bytes: int | None
    minimum_bytes: int
    weight: float
    cache_bytes: int | None
    cache_seconds: float
    decay_seconds: float
    extent_bytes: int | None
    reserve_bytes: int | None
    poison: Poison | None
    name: str | None
    directory: Path
    log_level: str

    @classmethod
    def read(cls, environment: Mapping[str, str] | None = None) -> Settings:
        """Read the environment.

        Raises:
            SettingsError: names the variable, its value and what is accepted.
        """
        env = os.environ if environment is None else environment
        settings = cls(
            budget_bytes=_optional(env, "KVCACHED_BUDGET", _positive_size, _SIZE),
            maximum_bytes=_optional(env, "KVCACHED_MAX", _positive_size, _SIZE),
            minimum_bytes=_optional(env, "KVCACHED_MIN", parse_size, _SIZE) or 0,
            weight=_optional(env, "KVCACHED_WEIGHT", _weight, _WEIGHTS) or 1.0,
            cache_bytes=_optional(env, "KVCACHED_CACHE_MAX", parse_size, _SIZE),
            cache_seconds=_seconds(env, "KVCACHED_CACHE_TTL", CACHE_SECONDS),
            decay_seconds=_seconds(env, "KVCACHED_DECAY", 0.5),
            extent_bytes=_optional(env, "KVCACHED_EXTENT", _positive_size, _SIZE),
            reserve_bytes=_optional(env, "KVCACHED_RESERVE", parse_size, _SIZE),
            poison=_optional(env, "KVCACHED_POISON", _poison, f"one of {', '.join(_POISONS)}"),
            name=_optional(env, "KVCACHED_NAME", _name, "1 to 63 printable characters without '/'"),
            directory=_optional(env, "KVCACHED_DIR", _absolute, "an absolute path")
            or default_directory(env),
            log_level=_optional(env, "KVCACHED_LOG", _level, f"one of {', '.join(_LEVELS)}")
            or "INFO",
        )
        if settings.maximum_bytes is not None and settings.minimum_bytes > settings.maximum_bytes:
            raise SettingsError(
                f"KVCACHED_MIN={env['KVCACHED_MIN']} is more than KVCACHED_MAX="
                f"{env['KVCACHED_MAX']}; lower one or raise the other."
            )
        return settings


def default_directory(environment: Mapping[str, str]) -> Path:
    """The user's runtime folder, or one in their home; never a place that all can write to."""
    runtime = environment.get("XDG_RUNTIME_DIR", "")
    if runtime.startswith("/"):
        return Path(runtime) / "kvcached"
    cache = environment.get("XDG_CACHE_HOME", "")
    if cache.startswith("/"):
        return Path(cache) / "kvcached"
    try:
        return Path.home() / ".cache" / "kvcached"
    except RuntimeError:
        raise SettingsError(
            "There is no home folder for the ledger; set KVCACHED_DIR to a folder of your own."
        ) from None


_WEIGHTS = f"a number from {SMALLEST_WEIGHT:g} to {LARGEST_WEIGHT:g}"
_SIZE = "a size such as 512MiB or 2GiB"


def _optional(
    env: Mapping[str, str], variable: str, parse: Callable[[str], T], accepted: str
) -> T | None:
    text = env.get(variable, "").strip()
    if not text:
        return None
    try:
        return parse(text)
    except (ValueError, RuntimeError):
        raise SettingsError(f"{variable}={text!r} is not accepted: give {accepted}.") from None


def _seconds(env: Mapping[str, str], variable: str, default: float) -> float:
    value = _optional(env, variable, _duration, "a number of seconds, 0 or more")
    return default if value is None else value


def _duration(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise ValueError
    return value


def _weight(text: str) -> float:
    value = float(text)
    if not SMALLEST_WEIGHT <= value <= LARGEST_WEIGHT:
        raise ValueError
    return value


def _poison(text: str) -> Poison:
    if text.lower() not in _POISONS:
        raise ValueError
    return _POISONS[text.lower()]


def _positive_size(text: str) -> int:
    size = parse_size(text)
    if size == 0:
        raise ValueError
    return size


def _name(text: str) -> str:
    if not text.isprintable() or "/" in text or len(text.encode()) > 63:
        raise ValueError
    return text


def _absolute(text: str) -> Path:
    path = Path(text).expanduser()
    if not path.is_absolute() or "\0" in text:
        raise ValueError
    return path


def _level(text: str) -> str:
    if text.upper() not in _LEVELS:
        raise ValueError
    return text.upper()
