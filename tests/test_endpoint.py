"""`GET /kvcached` and `PATCH /kvcached/limits`, without an engine behind them."""

from __future__ import annotations

import asyncio
import json
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from kvcached_plugins.limits import Change
from kvcached_plugins.vllm import endpoint
from kvcached_plugins.vllm.endpoint import Endpoint
from kvcached_vmm.account import Account
from kvcached_vmm.ledger import Ledger
from kvcached_vmm.records import AccountView
from kvcached_vmm.units import GIB, MIB

fastapi = pytest.importorskip("fastapi", reason="comes with vLLM")
testclient = pytest.importorskip("starlette.testclient", reason="comes with vLLM")

BUDGET = 100 * MIB
Join = Callable[..., Account]


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", "1")
    monkeypatch.setenv("KVCACHED_DIR", str(folder))
    monkeypatch.setenv("VLLM_PLUGINS", "kvcached,kvcached_endpoint")
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    monkeypatch.setattr(endpoint, "own_engines", lambda arguments: _is_own)


@pytest.fixture
def join(folder: Path) -> Iterator[Join]:
    """Makes accounts in the ledgers of `folder`; those called "stranger" are another server's."""
    opened: list[Ledger] = []

    def join(name: str = "own", device: str = "host", **terms: Any) -> Account:
        opened.append(Ledger.open(folder, device))
        return opened[-1].join(name, BUDGET, engine="vllm", **terms)

    yield join
    for ledger in opened:
        ledger.close()


def _is_own(account: AccountView) -> bool:
    return account.name != "stranger"


def serve(*keys: str) -> Any:
    """A client of a server with these keys; it sends none itself."""
    app, plugin = fastapi.FastAPI(), Endpoint()
    plugin.attach_router(app)
    asyncio.run(plugin.init_state(None, app.state, Namespace(api_key=list(keys) or None)))
    return testclient.TestClient(app)


def bearer(key: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {key}"}


def terms(account: Account) -> tuple[int, int | None, float, int | None]:
    (found,) = [each for each in account.view().accounts if each.slot == account.slot]
    return found.minimum_bytes, found.maximum_bytes, found.weight, found.cache_bytes


def test_the_page_has_the_servers_engines_and_the_budget(join: Join) -> None:
    own = join(maximum_bytes=40 * MIB)
    join("stranger")
    join("stranger", device="GPU-1")
    own.reserve(5 * MIB)
    answer = serve().get("/kvcached")
    assert answer.status_code == 200
    (device,) = answer.json()["devices"]
    (engine,) = device.pop("engines")
    assert device == {
        "device": "host",
        "budget_bytes": BUDGET,
        "set_by_user": True,
        "capacity_bytes": BUDGET,
        "used_bytes": 5 * MIB,
        "free_bytes": 95 * MIB,
    }
    assert engine.keys() == AccountView.__dataclass_fields__.keys()
    assert (engine["name"], engine["reserved_bytes"]) == ("own", 5 * MIB)
    assert (engine["maximum_bytes"], engine["cache_bytes"]) == (40 * MIB, None)
    assert engine["counters"]["commits"] == 0


def test_limits_change_together_and_the_answer_has_them(join: Join) -> None:
    own, stranger = join(), join("stranger")
    asked = {"minimum": "10MiB", "maximum": 20 * MIB, "weight": 2, "cache": "1.5 MiB"}
    answer = serve().patch("/kvcached/limits", json=asked)
    assert answer.status_code == 200
    assert answer.json()["devices"][0]["engines"][0]["weight"] == 2.0
    assert terms(own) == (10 * MIB, 20 * MIB, 2.0, 3 * MIB // 2)
    assert terms(stranger) == (0, None, 1.0, None)


def test_what_is_not_named_stays_and_null_takes_a_bound_away(join: Join) -> None:
    own = join(minimum_bytes=MIB, maximum_bytes=2 * MIB, weight=3.0, cache_bytes=0)
    client = serve()
    assert client.patch("/kvcached/limits", json={"maximum": None}).status_code == 200
    assert terms(own) == (MIB, None, 3.0, 0)
    assert client.patch("/kvcached/limits", json={"cache": None, "minimum": 0}).status_code == 200
    assert terms(own) == (0, None, 3.0, None)


@pytest.mark.parametrize(
    ("body", "status", "sentence"),
    [
        (b"", 400, "The body is not JSON."),
        (b"{", 400, "The body is not JSON."),
        (b"\xff\xfe", 400, "The body is not JSON."),
        (b"[" * 50_000, 400, "The body is not JSON."),
        (b'{"minimum": ' + b"9" * 5000 + b"}", 400, "The body is not JSON."),
        (b"{}", 422, "Give a JSON object with one or more of minimum, maximum, weight, cache."),
        (b"[1]", 422, "Give a JSON object with one or more of minimum, maximum, weight, cache."),
        (b'{"minimum": 1, "min": 2}', 422, "'min' is none of minimum, maximum, weight, cache."),
        (b'{"weight": 1, "weight": 2}', 422, "Each field may be given once."),
        (b'{"minimum": null}', 422, "minimum: "),
        (b'{"minimum": -1}', 422, "minimum: "),
        (b'{"maximum": true}', 422, "maximum: "),
        (b'{"maximum": 1.5}', 422, "maximum: "),
        (b'{"maximum": "much"}', 422, "maximum: "),
        (b'{"cache": 1152921504606846976}', 422, "cache: "),
        (b'{"cache": []}', 422, "cache: "),
        (b'{"weight": null}', 422, "weight: "),
        (b'{"weight": 0}', 422, "weight: "),
        (b'{"weight": NaN}', 422, "weight: "),
        (b'{"weight": 1e400}', 422, "weight: "),
        (b'{"weight": "two"}', 422, "weight: "),
        (b'{"weight": true}', 422, "weight: "),
        (b'{"weight": 2, "minimum": "1TiB"}', 422, "minimum: 1 TiB cannot be guaranteed"),
        (b'{"minimum": 2048, "maximum": 1024}', 422, "minimum: 2 KiB is more than the maximum"),
        (b" " * 70_000, 413, "The body is longer than 65536 bytes."),
    ],
)
def test_a_bad_request_is_told_in_one_sentence_and_changes_nothing(
    join: Join, body: bytes, status: int, sentence: str
) -> None:
    own = join(weight=7.0)
    answer = serve().patch("/kvcached/limits", content=body)
    assert answer.status_code == status
    error = answer.json()["error"]
    assert error["message"].startswith(sentence)
    assert error["code"] == status
    assert terms(own) == (0, None, 7.0, None)


def test_engines_that_were_changed_first_are_as_they_were_when_a_later_one_is_refused(
    join: Join,
) -> None:
    first = join(device="A", cache_bytes=MIB)
    join("stranger", device="B", minimum_bytes=90 * MIB)
    join(device="B")
    answer = serve().patch("/kvcached/limits", json={"minimum": "20MiB", "cache": None})
    assert answer.status_code == 422
    assert terms(first) == (0, None, 1.0, MIB)


def test_without_an_engine_there_is_nothing_to_limit(join: Join) -> None:
    join("stranger")
    client = serve()
    assert client.get("/kvcached").json() == {"devices": []}
    answer = client.patch("/kvcached/limits", json={"weight": 2})
    assert answer.status_code == 503


def test_a_damaged_ledger_is_told(join: Join, folder: Path) -> None:
    join()
    (folder / "host.ledger").chmod(0o644)
    answer = serve().get("/kvcached")
    assert answer.status_code == 503
    assert "is not private" in answer.json()["error"]["message"]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        bearer("wrong"),
        bearer(""),
        bearer("secret "),
        {"Authorization": "secret"},
        {"Authorization": "Basic secret"},
        {"Authorization": "Bearer s\u00e9cret".encode("latin-1")},
        {"X-API-Key": "secret"},
    ],
)
def test_without_the_servers_key_nothing_is_told_or_done(
    join: Join, headers: dict[str, Any]
) -> None:
    own = join()
    client = serve("secret")
    answer = client.get("/kvcached", headers=headers)
    assert answer.status_code == 401
    assert answer.headers["WWW-Authenticate"] == "Bearer"
    assert "devices" not in answer.json()
    assert client.patch("/kvcached/limits", json={"weight": 2}, headers=headers).status_code == 401
    assert terms(own)[2] == 1.0


def test_each_of_the_servers_keys_will_do(join: Join, monkeypatch: pytest.MonkeyPatch) -> None:
    join()
    client = serve("secret", "other")
    for key in ("secret", "other"):
        assert client.get("/kvcached", headers=bearer(key)).status_code == 200
    assert client.get("/kvcached", headers={"Authorization": "bearer other"}).status_code == 200
    monkeypatch.setenv("VLLM_API_KEY", "of the environment")
    assert serve("secret").get("/kvcached", headers=bearer("of the environment")).status_code == 401
    assert serve().get("/kvcached").status_code == 401
    assert serve().get("/kvcached", headers=bearer("of the environment")).status_code == 200


def test_before_its_keys_are_known_it_lets_nobody_in(join: Join) -> None:
    join()
    app, plugin = fastapi.FastAPI(), Endpoint()
    plugin.attach_router(app)
    client = testclient.TestClient(app)
    assert client.get("/kvcached").status_code == 401
    assert client.patch("/kvcached/limits", json={"weight": 2}).status_code == 401


def test_other_methods_are_not_there(join: Join) -> None:
    join()
    client = serve()
    assert client.post("/kvcached/limits", json={"weight": 2}).status_code == 405
    assert client.put("/kvcached").status_code == 405


@pytest.mark.parametrize("toggle", ["", "0", "off"])
def test_with_the_elastic_cache_off_there_are_no_routes(
    monkeypatch: pytest.MonkeyPatch, toggle: str
) -> None:
    monkeypatch.setenv("ENABLE_KVCACHED", toggle)
    assert serve().get("/kvcached").status_code == 404


def test_naming_the_endpoint_alone_is_warned_about(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    serve()
    assert not caplog.records
    monkeypatch.setenv("VLLM_PLUGINS", "kvcached_endpoint")
    serve()
    assert "but not kvcached" in caplog.text


def test_sizes_reach_the_ledger_as_bytes() -> None:
    body = json.dumps({"minimum": "2GiB", "maximum": str(3 * GIB), "weight": 100}).encode()
    assert endpoint.parse(body) == Change(2 * GIB, 3 * GIB, 100.0, None)
