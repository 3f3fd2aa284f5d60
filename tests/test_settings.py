"""Every variable, good and bad; a bad one is named, with its value and what is accepted."""

from __future__ import annotations

import contextlib
import pwd
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from kvcached_plugins.settings import CACHE_SECONDS, Settings, default_directory, enabled
from kvcached_vmm.errors import SettingsError
from kvcached_vmm.units import GIB, MIB

SIZES = {
    "KVCACHED_BUDGET": "budget_bytes",
    "KVCACHED_MAX": "maximum_bytes",
    "KVCACHED_MIN": "minimum_bytes",
    "KVCACHED_CACHE_MAX": "cache_bytes",
    "KVCACHED_EXTENT": "extent_bytes",
    "KVCACHED_RESERVE": "reserve_bytes",
}
MAY_BE_NOTHING = {"KVCACHED_MIN", "KVCACHED_CACHE_MAX", "KVCACHED_RESERVE"}
SECONDS = {"KVCACHED_CACHE_TTL": "cache_seconds", "KVCACHED_DECAY": "decay_seconds"}
VARIABLES = [
    *SIZES,
    *SECONDS,
    *("KVCACHED_NAME", "KVCACHED_DIR", "KVCACHED_LOG", "KVCACHED_POISON"),
]


def complaint(**environment: str) -> str:
    """What the user is told about ``environment``."""
    with pytest.raises(SettingsError) as refused:
        Settings.read(environment)
    text = str(refused.value)
    assert text.endswith(".")
    assert "\n" not in text
    return text


@pytest.mark.parametrize("text", ["1", "true", "YES", " on ", "True"])
def test_the_toggle_is_on(text: str) -> None:
    assert enabled({"ENABLE_KVCACHED": text})


@pytest.mark.parametrize("text", [None, "", "0", "false", "No", "OFF", "  "])
def test_the_toggle_is_off(text: str | None) -> None:
    assert not enabled({} if text is None else {"ENABLE_KVCACHED": text})


def test_a_toggle_that_is_neither_is_refused_by_name_and_value() -> None:
    with pytest.raises(SettingsError, match=r"^ENABLE_KVCACHED='maybe' .* one of 1, true, yes, on"):
        enabled({"ENABLE_KVCACHED": "Maybe"})


def test_the_toggle_is_read_when_asked_not_when_imported(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prior art ignored a variable that a script set after its imports (kvcached #316)."""
    monkeypatch.delenv("ENABLE_KVCACHED", raising=False)
    assert not enabled()
    monkeypatch.setenv("ENABLE_KVCACHED", "1")
    monkeypatch.setenv("KVCACHED_NAME", "late")
    assert enabled()
    assert Settings.read().name == "late"


@pytest.mark.parametrize(
    "environment", [{}, dict.fromkeys(VARIABLES, "  ")], ids=["unset", "blank"]
)
def test_nothing_set_means_defaults(environment: dict[str, str]) -> None:
    settings = Settings.read(environment)
    assert {getattr(settings, field) for field in SIZES.values()} == {None, 0}
    assert (settings.minimum_bytes, settings.name) == (0, None)
    assert 0 < settings.decay_seconds < settings.cache_seconds == CACHE_SECONDS
    assert settings.directory == default_directory(environment)
    assert settings.log_level == "INFO"


@pytest.mark.parametrize(("variable", "field"), SIZES.items())
@pytest.mark.parametrize(("text", "size"), [("512MiB", 512 * MIB), (" 2G ", 2 * GIB), ("7", 7)])
def test_a_size_is_read(variable: str, field: str, text: str, size: int) -> None:
    assert getattr(Settings.read({variable: text}), field) == size


@pytest.mark.parametrize("variable", SIZES)
@pytest.mark.parametrize("text", ["lots", "-1", "5X", "1e9", "12 34"])
def test_what_is_no_size_is_refused(variable: str, text: str) -> None:
    told = complaint(**{variable: text})
    assert told == f"{variable}={text!r} is not accepted: give a size such as 512MiB or 2GiB."


@pytest.mark.parametrize(("variable", "field"), SIZES.items())
def test_zero_is_a_limit_where_it_makes_sense_and_refused_where_not(
    variable: str, field: str
) -> None:
    """Prior art ignored a limit of 0; ours is either obeyed or refused."""
    if variable in MAY_BE_NOTHING:
        assert getattr(Settings.read({variable: "0"}), field) == 0
    else:
        assert f"{variable}='0'" in complaint(**{variable: "0"})


@pytest.mark.parametrize(("variable", "field"), SECONDS.items())
@pytest.mark.parametrize(("text", "seconds"), [("0", 0.0), ("0.5", 0.5), ("90", 90.0)])
def test_seconds_are_read(variable: str, field: str, text: str, seconds: float) -> None:
    assert getattr(Settings.read({variable: text}), field) == seconds


@pytest.mark.parametrize("variable", SECONDS)
@pytest.mark.parametrize("text", ["-1", "nan", "inf", "1e999", "2s", "soon"])
def test_what_is_no_duration_is_refused(variable: str, text: str) -> None:
    told = complaint(**{variable: text})
    assert told == f"{variable}={text!r} is not accepted: give a number of seconds, 0 or more."


@pytest.mark.parametrize("name", ["llama", "ein Name", "名前", "x" * 63])
def test_a_name_is_read(name: str) -> None:
    assert Settings.read({"KVCACHED_NAME": name}).name == name


@pytest.mark.parametrize("name", ["a/b", "two\nlines", "x" * 64, "\udcff", "ä" * 32])
def test_a_name_that_does_not_fit_is_refused(name: str) -> None:
    assert complaint(KVCACHED_NAME=name).startswith(f"KVCACHED_NAME={name!r} is not accepted")


def test_a_folder_is_an_absolute_path_and_may_be_under_home(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    assert Settings.read({"KVCACHED_DIR": "/run/kv"}).directory == Path("/run/kv")
    assert Settings.read({"KVCACHED_DIR": "~/kv"}).directory == Path("/home/someone/kv")
    for text in ("run/kv", ".", "a\0b", "/a\0b"):
        told = complaint(KVCACHED_DIR=text)
        assert told == f"KVCACHED_DIR={text!r} is not accepted: give an absolute path."


def test_the_default_folder_is_the_users_own(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/someone")
    runtime, cache = {"XDG_RUNTIME_DIR": "/run/user/7"}, {"XDG_CACHE_HOME": "/var/cache/me"}
    assert default_directory({**runtime, **cache}) == Path("/run/user/7/kvcached")
    assert default_directory(cache) == Path("/var/cache/me/kvcached")
    assert default_directory({}) == Path("/home/someone/.cache/kvcached")
    relative = {"XDG_RUNTIME_DIR": "run", "XDG_CACHE_HOME": "cache"}
    assert default_directory(relative) == Path("/home/someone/.cache/kvcached")


def test_a_log_level_is_read_in_any_case() -> None:
    assert Settings.read({"KVCACHED_LOG": "debug"}).log_level == "DEBUG"
    told = complaint(KVCACHED_LOG="loud")
    assert told.endswith("give one of DEBUG, INFO, WARNING, ERROR.")


def test_more_for_sure_than_at_most_is_refused() -> None:
    told = complaint(KVCACHED_MIN="2GiB", KVCACHED_MAX="1GiB")
    assert "KVCACHED_MIN=2GiB is more than KVCACHED_MAX=1GiB" in told
    equal = Settings.read({"KVCACHED_MIN": "1GiB", "KVCACHED_MAX": "1024MiB"})
    assert equal.minimum_bytes == equal.maximum_bytes


random_text = st.one_of(
    st.text(max_size=70),
    st.text(alphabet="0123456789.kmgtiKMGTIBeE+-_ /~naif", max_size=12),
    st.from_regex(r"\s*\d{1,30}(\.\d{1,9})? ?([kmgtKMGT]i?)?[bB]?\s*", fullmatch=True),
)


@given(st.dictionaries(st.sampled_from(["ENABLE_KVCACHED", *VARIABLES]), random_text, max_size=5))
def test_random_text_never_raises_anything_but_a_settings_error(
    environment: dict[str, str],
) -> None:
    assume(not environment.get("KVCACHED_DIR", "").strip().startswith("~"))
    with contextlib.suppress(SettingsError):
        enabled(environment)
    with contextlib.suppress(SettingsError):
        settings = Settings.read(environment)
        assert settings.minimum_bytes <= (settings.maximum_bytes or settings.minimum_bytes)
        assert settings.directory.is_absolute()
        assert settings.decay_seconds >= 0 <= settings.cache_seconds


def test_hundreds_of_digits_are_refused() -> None:
    assert "KVCACHED_BUDGET" in complaint(KVCACHED_BUDGET="9" * 400)


@pytest.mark.parametrize("variable", ["KVCACHED_BUDGET", "KVCACHED_MIN", "KVCACHED_MAX"])
def test_a_size_that_the_ledger_cannot_hold_is_refused(variable: str) -> None:
    assert variable in complaint(**{variable: "9999999T"})


def test_the_home_of_nobody_is_refused() -> None:
    assert "KVCACHED_DIR='~nobody-of-that-name/kv'" in complaint(
        KVCACHED_DIR="~nobody-of-that-name/kv"
    )


def test_a_user_without_a_home_is_told_to_set_a_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    def unknown(_: int) -> None:
        raise KeyError

    monkeypatch.delenv("HOME", raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert "KVCACHED_DIR" in complaint()
