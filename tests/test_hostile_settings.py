"""Any text in any variable and any body of an HTTP request: accepted, or refused in a sentence."""

from __future__ import annotations

import asyncio
import json
import math
import string
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from kvcached_plugins.settings import Settings, enabled
from kvcached_vmm.account import Account
from kvcached_vmm.errors import SettingsError
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.units import LARGEST, MIB

VARIABLES = (
    *("KVCACHED_BUDGET", "KVCACHED_MAX", "KVCACHED_MIN", "KVCACHED_WEIGHT", "KVCACHED_CACHE_MAX"),
    *("KVCACHED_CACHE_TTL", "KVCACHED_DECAY", "KVCACHED_EXTENT", "KVCACHED_RESERVE"),
    *("KVCACHED_NAME", "KVCACHED_DIR", "KVCACHED_LOG", "KVCACHED_POISON"),
)
SIZES = ("budget_bytes", "maximum_bytes", "minimum_bytes", "cache_bytes", "extent_bytes")

anything = st.one_of(
    st.text(),
    st.text(st.characters()),  # lone surrogates as well
    st.text(string.digits + ".eEkmgtibx+-_ ", max_size=30),
    st.integers().map(str),
    st.floats().map(str),
    st.sampled_from(["\0", "9" * 400, "1e400", "٣GiB", "nan", "-0", "/" * 5000, "~nobody-there/x"]),
)
few = settings(
    max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture], deadline=None
)


@pytest.mark.parametrize("variable", VARIABLES)
@few
@given(text=anything)
def test_any_text_in_a_variable_is_a_value_or_refused_by_name(variable: str, text: str) -> None:
    try:
        read = Settings.read({variable: text, "HOME": "/home/somebody"})
    except SettingsError as error:
        said = str(error)
    else:
        check_values(read)
        return
    assert said.startswith(f"{variable}=")
    assert said.endswith(".")
    assert "\n" not in said
    said.encode()  # can be printed
    assert len(said) < len(repr(text)) + 200


def check_values(read: Settings) -> None:
    for name in SIZES:
        size = getattr(read, name)
        assert size is None or 0 <= size < LARGEST
    assert 0.01 <= read.weight <= 100
    assert math.isfinite(read.cache_seconds + read.decay_seconds)
    assert min(read.cache_seconds, read.decay_seconds) >= 0
    assert read.directory.is_absolute()
    assert read.name is None or (read.name.isprintable() and len(read.name.encode()) < 64)


@few
@given(text=anything)
def test_any_text_in_the_toggle_is_on_off_or_refused(text: str) -> None:
    said = ""
    try:
        enabled({"ENABLE_KVCACHED": text})
    except SettingsError as error:
        said = str(error)
    assert not said or "one of 1, true, yes, on" in said


@few
@given(variables=st.dictionaries(st.sampled_from(VARIABLES), anything))
def test_any_environment_is_read_or_refused(variables: dict[str, str]) -> None:
    said = ""
    try:
        check_values(Settings.read({**variables, "HOME": "/home/somebody"}))
    except SettingsError as error:
        said = str(error)
    assert not said or any(variable in said for variable in variables)


@pytest.fixture
def account(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Account]:
    pytest.importorskip("fastapi", reason="comes with vLLM")
    monkeypatch.setenv("ENABLE_KVCACHED", "1")
    monkeypatch.setenv("KVCACHED_DIR", str(folder))
    monkeypatch.setenv("VLLM_PLUGINS", "kvcached,kvcached_endpoint")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr("kvcached_plugins.vllm.endpoint.own_engines", lambda _: lambda _: True)
    ledger = Ledger.open(folder, "host")
    yield ledger.join("own", 100 * MIB, minimum_bytes=MIB)
    ledger.close()


def client(*keys: str) -> Any:
    """A client of a server that raises nothing to it: what goes wrong there is a status here."""
    import fastapi
    from starlette.testclient import TestClient

    from kvcached_plugins.vllm.endpoint import Endpoint

    app, plugin = fastapi.FastAPI(), Endpoint()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, app.state, Namespace(api_key=list(keys) or None)))
    return TestClient(app)


values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), anything),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(), inner)),
    max_leaves=6,
)
fields = st.one_of(st.sampled_from(["minimum", "maximum", "weight", "cache"]), st.text())


def terms(account: Account) -> tuple[object, ...]:
    (found,) = account.view().accounts
    return found.minimum_bytes, found.maximum_bytes, found.weight, found.cache_bytes


@few
@given(body=st.one_of(st.dictionaries(fields, values).map(json.dumps), st.binary(), st.text()))
@example(body="[" * 60_000)
@example(body='{"minimum": 1e999}')
@example(body='{"weight": NaN}')
@example(body='{"minimum": ' + "9" * 5000 + "}")
@example(body='{"maximum": "\\ud800"}')
@example(body='{"\\ud800": 1}')
def test_any_body_is_a_change_or_refused_and_changes_nothing(
    account: Account, body: str | bytes
) -> None:
    before = terms(account)
    raw = body.encode(errors="surrogatepass") if isinstance(body, str) else body
    answer = client().patch("/kvcached/limits", content=raw)
    assert answer.status_code in (200, 400, 422, 413), answer.text
    if answer.status_code != 200:
        assert answer.json()["error"]["message"]
        assert terms(account) == before


@few
@given(header=st.binary(max_size=60).filter(lambda raw: not {0, 10, 13} & set(raw)))
@example(header=b"Bearer")
@example(header=b"Bearer \xff\xfe")
@example(header=b"bearer  right")
@example(header=b"Basic right")
def test_no_header_but_the_key_opens(account: Account, header: bytes) -> None:
    asked = client("right")
    for method, path in (("GET", "/kvcached"), ("PATCH", "/kvcached/limits")):
        answer = asked.request(method, path, headers=[(b"Authorization", header)], content=b"{}")
        right = header.lower().startswith(b"bearer ") and header[7:] == b"right"
        assert (answer.status_code == 401) != right
    assert terms(account)[0] == MIB


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "TRACE"])
@pytest.mark.parametrize("path", ["/kvcached", "/kvcached/limits", "/kvcached/../kvcached/limits/"])
def test_no_other_method_does_anything(account: Account, method: str, path: str) -> None:
    before = terms(account)
    body = b'{"minimum": 0}'
    assert client().request(method, path, content=body).status_code in (404, 405)
    assert terms(account) == before
